"""Tensors in memory that the other ranks of a group can reach."""

from __future__ import annotations

import torch

from .groups import resolve_group
from .workspace import why_no_workspace


def symmetric_empty(shape, dtype: torch.dtype, *, group) -> torch.Tensor:
    """An uninitialised tensor in torch's symmetric memory: on every rank of `group` one of the same shape, each mapped
    into all ranks.

    The library's collectives push from registers and need no registered inputs: such a tensor gains nothing there and
    changes no protocol. It is for kernels, torch's or the caller's, that read or write peers directly.

    Args:
        shape, dtype: the same on every rank.
        group: ProcessGroup or 1-D DeviceMesh of GPUs of one host.

    Collective, synchronises, not in a graph capture. Raises RuntimeError where the ranks' GPUs do not reach each other.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    pg = resolve_group(group)
    if (reason := why_no_workspace(pg)) is not None:
        raise RuntimeError(f"symmetric_empty: no symmetric memory for this group: {reason}")
    tensor = symmetric_memory.empty(shape, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()))
    symmetric_memory.rendezvous(tensor, pg.group_name)
    return tensor
