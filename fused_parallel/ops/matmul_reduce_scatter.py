"""matmul_reduce_scatter and all_gather_matmul: the two halves of sequence-parallel tensor parallelism.

Many rows go to the persistent kernel of matmul_all_reduce; the second's begins with this rank's rows, while copy
engines bring the others'.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import _ext
from ..comm.groups import group_from_name, resolve_group
from ..comm.workspace import GATHER_BYTES, workspace_of
from . import _direct
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import check_floating, register
from .all_reduce import aligned, all_gather_, check_divisible, reduce_scatter_, why_not_fused
from .matmul_all_reduce import algorithm, check_matmul, launch_matmul


def _reduce_scatter(x: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("matmul_reduce_scatter", pg, x, weight)
    if algorithm("matmul_reduce_scatter", x, weight, pg) == "persistent":
        return launch_matmul(x, weight, pg, scatter=True)
    return reduce_scatter_(F.linear(x, weight), pg)


def _gathers_beside(x: torch.Tensor, weight: torch.Tensor, pg: dist.ProcessGroup) -> bool:
    """Whether the kernel takes x [M / W, K] and weight [N, K]; from what all ranks share."""
    if pg.size() == 1 or not choose_fused("all_gather_matmul", lambda: why_not_fused(x, pg), on_gpu=x.is_cuda):
        return False
    workspace, bytes = workspace_of(pg), x.numel() * x.element_size()
    if not workspace.hopper or x.element_size() != 2 or weight.shape[0] % 8 or weight.shape[1] % 8:
        return False
    fits = 0 < bytes * (pg.size() - 1) <= GATHER_BYTES and weight.shape[0] > 0
    choice = workspace.choice("all_gather_matmul", bytes)
    return fits and choice.algorithm == "persistent" and choice.suits(len(x) * pg.size(), x.shape[1], len(weight))


def _launch_gather(x: torch.Tensor, weight: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    workspace = workspace_of(pg)
    workspace.check()
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    x, weight = aligned(x), aligned(weight)
    (rows, k), n = x.shape, weight.shape[0]
    out = x.new_empty(rows * pg.size(), n)
    workspace.gather().all_gather_matmul(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        n,
        k,
        _ext.DTYPE_CODES[x.dtype],
        _direct.raw_stream(workspace.device_index),
    )
    return out


def _all_gather(x: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("all_gather_matmul", pg, x, weight)
    if _gathers_beside(x, weight, pg):
        return _launch_gather(x, weight, pg)
    return F.linear(all_gather_(x, pg), weight)


_reduce_scatter_op = register(
    "matmul_reduce_scatter(Tensor x, Tensor weight, str group_name) -> Tensor",
    _reduce_scatter,
    lambda x, weight, group_name: x.new_empty((x.shape[0] // group_from_name(group_name).size(), weight.shape[0])),
)
_all_gather_op = register(
    "all_gather_matmul(Tensor x, Tensor weight, str group_name) -> Tensor",
    _all_gather,
    lambda x, weight, group_name: x.new_empty((x.shape[0] * group_from_name(group_name).size(), weight.shape[0])),
)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    check_floating(op, x=x, weight=weight)
    check_matmul(op, x, weight)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have two dimensions, got shape {tuple(x.shape)}; flatten the leading ones")


def matmul_reduce_scatter(x: torch.Tensor, weight: torch.Tensor, *, group) -> torch.Tensor:
    """x @ weight.T summed over the ranks; each rank keeps its rows of the sum.

    Args:
        x: [M, K / tp], fp16, bf16 or fp32, M divisible by tp: this rank's columns of the input.
        weight: [N, K / tp], torch's layout.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        [M / tp, N]: rows [rank * M / tp, (rank + 1) * M / tp) of the sum.

    What no kernel of the matmul takes is torch's matmul and `reduce_scatter` in turn, whose kernel takes parts of a
    multiple of 16 bytes that fit a slot (64 MB / tp); fp.use("fused") refuses other parts. Else errors, streams, graphs
    and torch.compile: as `matmul_all_reduce`.
    """
    _check("matmul_reduce_scatter", x, weight)
    pg = resolve_group(group)
    check_divisible("matmul_reduce_scatter", x, pg.size())
    return _reduce_scatter_op(x, weight, pg.group_name)


def all_gather_matmul(x: torch.Tensor, weight: torch.Tensor, *, group) -> torch.Tensor:
    """Gather the ranks' rows of x, then multiply by this rank's rows of the weight.

    Args:
        x: [M / tp, K], fp16, bf16 or fp32: this rank's rows.
        weight: [N / tp, K], torch's layout.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        [M, N / tp]: this rank's columns of the product.

    What no kernel of the matmul takes is `all_gather` of x and torch's matmul in turn; the gather's kernel takes parts
    as that of `reduce_scatter`, and fp.use("fused") refuses others. Else errors, streams, graphs and torch.compile: as
    `matmul_all_reduce`.
    """
    _check("all_gather_matmul", x, weight)
    return _all_gather_op(x, weight, resolve_group(group).group_name)
