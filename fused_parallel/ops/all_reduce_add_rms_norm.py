"""all_reduce_add_rms_norm: what follows every row-parallel matmul of a transformer layer, as one operation."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _ext
from ..comm.capabilities import agree
from ..comm.groups import group_from_name, resolve_group
from ..comm.workspace import SLOT_BYTES, workspace_of
from ..reference import all_reduce as reference
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import check_floating, register
from .add_rms_norm import add_norm, check_norm
from .all_reduce import UNTRIED, aligned, why_not_fused


def _why_not_fused(x: torch.Tensor, pg: dist.ProcessGroup) -> str | None:
    if (reason := why_not_fused(x, pg, SLOT_BYTES)) is not None:
        return reason
    if agree(pg).compute_capability[0] != 9:
        return "its kernel is for Hopper GPUs"
    row, most = x.shape[-1] * x.element_size(), _ext.extension().all_reduce_max_norm_row_bytes
    return None if row % 16 == 0 and row <= most else f"a row of {row} bytes is no multiple of 16 up to {most}"


def _launch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, pg: dist.ProcessGroup):
    workspace = workspace_of(pg)
    workspace.check()
    normed, new_residual = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    x, residual, weight = aligned(x), aligned(residual), aligned(weight)
    workspace.native.all_reduce_add_rms_norm(
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        weight=weight.data_ptr(),
        normed=normed.data_ptr(),
        new_residual=new_residual.data_ptr(),
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        hidden=x.shape[-1],
        eps=eps,
        dtype=_ext.DTYPE_CODES[x.dtype],
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return normed, new_residual


def reduce_add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, pg: dist.ProcessGroup):
    """The operation, by one kernel where there is one for the call, else by an all-reduce and `add_rms_norm`."""
    if pg.size() == 1:
        return add_norm(x, residual, weight, eps)
    if choose_fused("all_reduce_add_rms_norm", lambda: _why_not_fused(x, pg), on_gpu=x.is_cuda, untried=UNTRIED):
        return _launch(x, residual, weight, eps, pg)
    return add_norm(reference.all_reduce(x, pg), residual, weight, eps)


def _impl(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group_name: str):
    pg = group_from_name(group_name)
    check_agreement("all_reduce_add_rms_norm", pg, x, residual, weight)
    return reduce_add_norm(x, residual, weight, eps, pg)


def _fake(x, residual, weight, eps, group_name):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )


_op = register(
    "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group_name) -> (Tensor, Tensor)",
    _impl,
    _fake,
)


def all_reduce_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum `x` over the ranks, add the residual, normalise.

    new_residual = residual + sum over ranks of x, rounded to the dtype; normed = new_residual /
    sqrt(mean(new_residual ** 2) + eps) * weight, the mean in fp32.

    Args:
        x: [..., hidden], fp16, bf16 or fp32: this rank's partial sum.
        residual: like x, the same on every rank.
        weight: [hidden], the norm's weight.
        eps: added to the mean square.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        (normed, new_residual), new tensors like x, the same on every rank.

    Errors, streams, graphs and torch.compile: as `all_reduce`. Source of the norm: Zhang and Sennrich 2019.
    """
    check_floating("all_reduce_add_rms_norm", x=x, residual=residual, weight=weight)
    check_norm("all_reduce_add_rms_norm", x.shape, residual, weight, eps)
    return _op(x, residual, weight, eps, resolve_group(group).group_name)
