"""The short way to a kernel: eager calls whose group, size and dtype have been through the long way before.

torch's dispatcher, the checks and the choice of implementation cost several times the launch itself. A call may leave
them out if they would find nothing new: plain CUDA tensors, nobody tracing, a size and dtype that the long way took a
kernel for. What is left out decides nothing between ranks: the tuning table's choice is the same either way. Nothing
that is remembered depends on an address. Verification and sampling do likewise, by ops/_verify_kernel.py.
"""

from __future__ import annotations

import torch

from ..comm.collectives import counting
from ..comm.workspace import AllReduceWorkspace, by_group, existing_workspace
from ._debug import debugging
from ._dispatch import current_mode

_is_compiling = torch.compiler.is_compiling
_modes_active = torch._C._len_torch_dispatch_stack  # torch.utils._python_dispatch reads it, too
# torch.cuda.current_stream makes an object: 1.5 us. CPU builds of torch have neither.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
MOST_KNOWN = 4096


def untraced() -> bool:
    """Whether nothing watches this call on its way through torch's dispatcher, and a kernel may take it."""
    return not _is_compiling() and not _modes_active() and current_mode() != "reference"


def watched() -> bool:
    """Whether calls on a group are counted or compared, which the short way does not do."""
    return debugging() or counting()


def workspace_for(group) -> AllReduceWorkspace | None:
    """The workspace behind `group=` if the short way may be taken now."""
    if _is_compiling():
        return None
    found = by_group.get(id(group))
    if found is None or found[0] is not group or watched() or not untraced():
        return None
    return found[1]


def plain(x: torch.Tensor, device_index: int) -> bool:
    """Whether a kernel can read `x` as it is: on that GPU, contiguous, aligned, no subclass, no gradient."""
    return (
        type(x) is torch.Tensor
        and x.get_device() == device_index
        and x.is_contiguous()
        and not x.requires_grad
        and not x.data_ptr() & 15
    )


def may_remember(pg) -> bool:
    """After the long way: whether it may have taken a kernel, so that the next such call may go the short way."""
    return not _is_compiling() and not _modes_active() and existing_workspace(pg) is not None


def keep(known: dict, key: tuple, arguments: object) -> None:
    """`known[key] = arguments`, in a memory that prompts of ever new lengths do not let grow without end."""
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[key] = arguments


def remember(group, pg, key: tuple, arguments: tuple) -> None:
    """The long way takes a kernel for calls like `key`: the launcher's `arguments` that do not change."""
    workspace = existing_workspace(pg)
    by_group[id(group)] = group, workspace
    keep(workspace.known, key, arguments)
