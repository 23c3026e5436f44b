"""matmul_all_reduce and matmul_all_reduce_add_rms_norm: a row-parallel linear layer with what follows it.

The matmul is torch's, its result is rounded to the dtype before it travels. Many rows go in blocks, each one's sum
hidden behind the next one's matmul (`_blocks`); few rows, and all where the kernels over peer memory cannot run, as a
matmul and the operation that follows, which chooses its implementation itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..comm.groups import group_from_name, resolve_group
from ..comm.tuning import Choice
from ..comm.workspace import workspace_of
from . import _blocks
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import check_floating, register
from .add_rms_norm import add_norm, check_norm
from .all_reduce import aligned, all_reduce_, why_not_fused
from .all_reduce_add_rms_norm import reduce_add_norm


def block_choice(op: str, rows: int, row_bytes: int, x: torch.Tensor, pg: dist.ProcessGroup) -> Choice | None:
    """How to communicate `rows` rows of `row_bytes` bytes in blocks beside the matmul; None: after it (or before)."""
    if pg.size() == 1 or not choose_fused(op, lambda: why_not_fused(x, pg), on_gpu=x.is_cuda):
        return None
    workspace = workspace_of(pg)
    choice = workspace.choice(op, rows * row_bytes)
    if choice.algorithm != "blocks" or row_bytes % 16 or rows <= choice.rows // 2:
        return None
    return choice if choice.rows * row_bytes <= workspace.slot_bytes else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _impl(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("matmul_all_reduce", pg, x, weight, bias)
    n = weight.shape[0]
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    choice = block_choice("matmul_all_reduce", rows, n * x.element_size(), x, pg)
    if choice is None:
        out = all_reduce_(F.linear(x, weight), pg)
    else:
        out = _blocks.matmul_all_reduce(_rows(x), weight, workspace_of(pg), choice).view(*x.shape[:-1], n)
    return out if bias is None else out.add_(bias)


def _impl_norm(x, weight, residual, norm_weight, eps: float, bias, prefetch, group_name: str):
    op = "matmul_all_reduce_add_rms_norm"
    pg = group_from_name(group_name)
    check_agreement(op, pg, x, weight, residual, norm_weight, bias)
    if bias is not None:
        return add_norm(_impl(x, weight, None, group_name).add_(bias), residual, norm_weight, eps)
    n = weight.shape[0]
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    choice = block_choice(op, rows, n * x.element_size(), x, pg)
    if choice is None or not workspace_of(pg).takes_rows(n * x.element_size()):
        return reduce_add_norm(F.linear(x, weight), residual, norm_weight, eps, pg, prefetch)
    whole = aligned(residual), aligned(norm_weight)
    out = _blocks.matmul_all_reduce_add_rms_norm(
        _rows(x), weight, _rows(whole[0]), whole[1], eps, workspace_of(pg), choice
    )
    return tuple(t.view(residual.shape) for t in out)


def _fake(x, weight, bias, group_name):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_norm(x, weight, residual, norm_weight, eps, bias, prefetch, group_name):
    return _fake(x, weight, bias, group_name), _fake(x, weight, bias, group_name)


_op = register("matmul_all_reduce(Tensor x, Tensor weight, Tensor? bias, str group_name) -> Tensor", _impl, _fake)
_op_norm = register(
    "matmul_all_reduce_add_rms_norm(Tensor x, Tensor weight, Tensor residual, Tensor norm_weight, float eps, "
    "Tensor? bias, Tensor? prefetch, str group_name) -> (Tensor, Tensor)",
    _impl_norm,
    _fake_norm,
)


def check_matmul(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Raise ValueError unless x [..., K], weight [N, K] and bias [N] fit."""
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x [..., K] and weight [N, K] must share K, got {tuple(x.shape)} and {tuple(weight.shape)}; "
            "both hold this rank's part of K"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def matmul_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, group
) -> torch.Tensor:
    """x @ weight.T summed over the ranks, plus bias: a row-parallel linear layer.

    Args:
        x: [..., K / tp], fp16, bf16 or fp32: this rank's columns of the input.
        weight: [N, K / tp], torch's layout: this rank's columns of the weight.
        bias: [N] or None, the whole bias on every rank; added once, after the sum.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        [..., N], the same on every rank. Each rank's partial product is rounded to the dtype before the sum.

    Raises:
        TypeError, ValueError: bad dtype, shape or group.
        PeerTimeoutError: a rank died or did not answer within the group's timeout.

    Runs on the current stream, many rows also on a side stream that is forked from it and joined again; capturable in
    CUDA graphs; traced by torch.compile as one node.
    """
    check_floating("matmul_all_reduce", ("bias",), x=x, weight=weight, bias=bias)
    check_matmul("matmul_all_reduce", x, weight, bias)
    return _op(x, weight, bias, resolve_group(group).group_name)


def matmul_all_reduce_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
    *,
    group,
    prefetch: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`matmul_all_reduce`, then the residual added and the sum normalised (`all_reduce_add_rms_norm`).

    Args:
        x: [..., K / tp]; weight: [N, K / tp]; bias: [N] or None: as `matmul_all_reduce`.
        residual: [..., N], the same on every rank.
        norm_weight: [N]; eps: of the RMSNorm.
        group: ProcessGroup or 1-D DeviceMesh.
        prefetch: the weight of the matmul that follows, as in `all_reduce_add_rms_norm`.

    Returns:
        (normed [..., N], new_residual [..., N]), the same on every rank. Else as `matmul_all_reduce`.
    """
    op = "matmul_all_reduce_add_rms_norm"
    check_floating(op, ("bias",), x=x, weight=weight, residual=residual, norm_weight=norm_weight, bias=bias)
    check_matmul(op, x, weight, bias)
    check_norm(op, (*x.shape[:-1], weight.shape[0]), residual, norm_weight, eps)
    return _op_norm(x, weight, residual, norm_weight, eps, bias, prefetch, resolve_group(group).group_name)
