"""The short way to a kernel: eager calls whose group, size and dtype have been through the long way before.

torch's dispatcher, the checks and the choice of implementation cost several times the launch itself. A call may leave
them out if they would find nothing new: plain CUDA tensors, nobody tracing, a group whose workspace exists. What is
left out decides nothing between ranks: the tuning table's choice is the same either way.
"""

from __future__ import annotations

import torch

from ..comm.workspace import AllReduceWorkspace, by_group
from ._debug import debugging
from ._dispatch import current_mode

_modes_active = torch._C._len_torch_dispatch_stack  # torch.utils._python_dispatch reads it, too
# torch.cuda.current_stream makes an object: 1.5 us. CPU builds of torch have neither.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def workspace_for(group) -> AllReduceWorkspace | None:
    """The workspace behind `group=` if the short way may be taken now."""
    if torch.compiler.is_compiling():
        return None
    workspace = by_group.get(group)
    if workspace is None or _modes_active() or current_mode() == "reference" or debugging():
        return None
    return workspace


def plain(x: torch.Tensor, like: torch.Tensor | None = None) -> bool:
    """Whether a kernel can read `x` as it is: a CUDA tensor, contiguous, aligned, no subclass, no gradient; and of the
    dtype, device and shape of `like`."""
    return (
        type(x) is torch.Tensor
        and x.is_cuda
        and x.is_contiguous()
        and not x.requires_grad
        and x.data_ptr() % 16 == 0
        and (like is None or (x.dtype is like.dtype and x.device == like.device and x.shape == like.shape))
    )
