"""all_reduce_add_rms_norm: what follows every row-parallel matmul of a transformer layer, as one operation."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _ext
from ..comm import collectives
from ..comm.groups import group_from_name, resolve_group
from ..comm.tuning import Choice
from ..comm.workspace import AllReduceWorkspace, workspace_of
from . import _direct
from ._debug import check_agreement
from ._library import check_floating, register
from .add_rms_norm import add_norm, check_norm
from .all_reduce import aligned, all_reduce_, kernel_choice, known_choice, why_not_fused


def _why_not_fused(x: torch.Tensor, pg: dist.ProcessGroup) -> str | None:
    if (reason := why_not_fused(x, pg)) is not None:
        return reason
    row = x.shape[-1] * x.element_size()
    if workspace_of(pg).takes_rows(row):
        return None
    most = _ext.extension().all_reduce_max_norm_row_bytes
    return f"its kernel is for Hopper GPUs and rows of a multiple of 16 up to {most} bytes, not of {row}"


def _arguments(x: torch.Tensor, eps: float, choice: Choice) -> tuple:
    """The launcher's arguments between the addresses and the stream."""
    hidden = x.shape[-1]
    return x.numel() // hidden, hidden, eps, choice.cluster, choice.ctas, _ext.DTYPE_CODES[x.dtype]


def launch_reduce_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: AllReduceWorkspace,
    choice: Choice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel on contiguous, aligned tensors: (normed, new_residual). Counted as communication as a whole."""
    workspace.check()
    normed, new_residual = torch.empty_like(x), torch.empty_like(x)
    with collectives.counted(x):
        workspace.native.all_reduce_add_rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            new_residual.data_ptr(),
            *_arguments(x, eps, choice),
            _direct.raw_stream(workspace.device_index),
        )
    return normed, new_residual


def reduce_add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, pg: dist.ProcessGroup):
    """The operation, by one kernel where there is one for the call, else by an all-reduce and `add_rms_norm`; `x` may
    be overwritten."""
    if pg.size() == 1:
        return add_norm(x, residual, weight, eps)
    choice = kernel_choice("all_reduce_add_rms_norm", x, pg, _why_not_fused)
    if choice is None:
        return add_norm(all_reduce_(x, pg), residual, weight, eps)
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    x, residual, weight = aligned(x), aligned(residual), aligned(weight)
    return launch_reduce_norm(x, residual, weight, eps, workspace_of(pg), choice)


def _impl(x, residual, weight, eps: float, group_name: str):
    pg = group_from_name(group_name)
    check_agreement("all_reduce_add_rms_norm", pg, x, residual, weight)
    # Where it takes two operations, the first works in place: not on the caller's tensor.
    if pg.size() > 1 and kernel_choice("all_reduce_add_rms_norm", x, pg, _why_not_fused) is None:
        x = x.clone(memory_format=torch.contiguous_format)
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
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    group,
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
    workspace = _direct.workspace_for(group)
    if (
        workspace is not None
        and _direct.plain(x, index := workspace.device_index)
        and _direct.plain(residual, index)
        and _direct.plain(weight, index)
        and x.dtype is residual.dtype is weight.dtype
        and x.shape == residual.shape
    ):
        known = workspace.known.get(("all_reduce_add_rms_norm", x.dtype, x.shape, weight.shape, eps))
        if known is not None:
            normed, new_residual = torch.empty_like(x), torch.empty_like(x)
            try:
                workspace.native.all_reduce_add_rms_norm(
                    x.data_ptr(),
                    residual.data_ptr(),
                    weight.data_ptr(),
                    normed.data_ptr(),
                    new_residual.data_ptr(),
                    *known,
                    _direct.raw_stream(index),
                )
            except RuntimeError:
                workspace.check()
                raise
            return normed, new_residual
    check_floating("all_reduce_add_rms_norm", x=x, residual=residual, weight=weight)
    check_norm("all_reduce_add_rms_norm", x.shape, residual, weight, eps)
    pg = resolve_group(group)
    out = _op(x, residual, weight, eps, pg.group_name)
    if (choice := known_choice("all_reduce_add_rms_norm", x, pg, _why_not_fused)) is not None:
        key = ("all_reduce_add_rms_norm", x.dtype, x.shape, weight.shape, eps)
        _direct.remember(group, pg, key, _arguments(x, eps, choice))
    return out
