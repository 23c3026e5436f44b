"""matmul_reduce_scatter and all_gather_matmul: the two halves of sequence-parallel tensor parallelism.

Many rows of the first go to the persistent kernel of matmul_all_reduce. The second gathers, then multiplies: gathering
block by block beside torch's matmuls was slower (docs/matmul_all_reduce.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..comm.groups import group_from_name, resolve_group
from ._debug import check_agreement
from ._library import check_floating, register
from .all_reduce import all_gather_, check_divisible, reduce_scatter_
from .matmul_all_reduce import algorithm, check_matmul, launch_matmul


def _reduce_scatter(x: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("matmul_reduce_scatter", pg, x, weight)
    if algorithm("matmul_reduce_scatter", x, weight, pg) == "persistent":
        return launch_matmul(x, weight, pg, scatter=True)
    return reduce_scatter_(F.linear(x, weight), pg)


def _all_gather(x: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("all_gather_matmul", pg, x, weight)
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
        [M / tp, N]: rows [rank * M / tp, (rank + 1) * M / tp) of the sum. Errors, streams, graphs and torch.compile: as
        `matmul_all_reduce`.
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
        [M, N / tp]: this rank's columns of the product. Errors, streams, graphs and torch.compile: as
        `matmul_all_reduce`.
    """
    _check("all_gather_matmul", x, weight)
    return _all_gather_op(x, weight, resolve_group(group).group_name)
