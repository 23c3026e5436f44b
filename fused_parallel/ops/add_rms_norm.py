"""add_rms_norm and rms_norm: the residual addition and RMSNorm between the layers of a transformer, in one pass.

The pattern for all operations: public function (checks) -> torch.library operator -> `_impl`, which chooses between the
kernel (csrc/add_rms_norm.cu) and the reference (reference/add_rms_norm.py).
"""

from __future__ import annotations

import torch

from .. import _ext
from ..reference import add_rms_norm as reference
from . import _direct
from ._dispatch import choose_fused
from ._library import as_rows, check_floating, register, why_no_kernel_for


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
    """Run the kernel on the current stream of x's device; returns (normed, new_residual or None)."""
    rows = as_rows(x)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_residual = None if residual is None else torch.empty_like(normed)
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    residual = None if residual is None else residual.contiguous()
    weight = weight.contiguous()
    _ext.extension().add_rms_norm(
        x=rows.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        out=normed.data_ptr(),
        new_residual=0 if new_residual is None else new_residual.data_ptr(),
        rows=rows.shape[0],
        hidden=rows.shape[1],
        x_row_stride=rows.stride(0),
        eps=eps,
        dtype=_ext.DTYPE_CODES[x.dtype],
        device=x.device.index,
        stream=_direct.raw_stream(x.device.index),
    )
    return normed, new_residual


def _rms_norm_impl(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if choose_fused("rms_norm", why_no_kernel_for(x), on_gpu=x.is_cuda):
        return _launch(x, None, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """The operation without checks and without torch's dispatcher; other operations end in it, too."""
    if choose_fused("add_rms_norm", why_no_kernel_for(x), on_gpu=x.is_cuda):
        return _launch(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def _add_rms_norm_fake(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    return _rms_norm_fake(x, weight, eps), _rms_norm_fake(x, weight, eps)


_rms_norm = register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm_impl, _rms_norm_fake)
_add_rms_norm = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_norm,
    _add_rms_norm_fake,
)


def check_norm(op: str, shape, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> None:
    """Raise ValueError unless what is normed has a `shape` [..., hidden], residual the same, weight [hidden] and eps is
    positive."""
    shape = tuple(shape)
    if not shape or shape[-1] == 0:
        raise ValueError(f"{op}: x must be [..., hidden] with hidden >= 1, got shape {shape}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected {shape}")
    if tuple(weight.shape) != shape[-1:]:
        raise ValueError(f"{op}: the norm's weight has shape {tuple(weight.shape)}, expected {shape[-1:]}")
    if not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps!r}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension, computed in fp32 and rounded once.

    Everything else as in `add_rms_norm`.
    """
    check_floating("rms_norm", x=x, weight=weight)
    check_norm("rms_norm", x.shape, None, weight, eps)
    return _rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual, then normalise: what stands between the layers of a transformer.

    new_residual = x + residual, added in fp32 and rounded once to the dtype; normed = new_residual /
    sqrt(mean(new_residual ** 2) + eps) * weight over the last dimension, from the rounded sum, computed in fp32 and
    rounded once. A row's result does not depend on the rows beside it: on one GPU a token gets the same bits in any
    batch.

    Args:
        x: [..., hidden], float16, bfloat16 or float32, any strides (rows at one distance from each other are read in
            place, else x is copied).
        residual: like x.
        weight: [hidden], like x.
        eps: added to the mean square, positive.

    Returns:
        (normed, new_residual), new contiguous tensors of x's shape and dtype; they never share memory with the inputs.

    A local operation: it concerns one rank and knows no group. Under tensor parallelism every rank holds the whole
    hidden dimension and calls it alike.

    On a GPU it is one kernel on the current stream of x's device, without synchronisation; it can be captured into a
    CUDA graph, replayed with changed inputs, and traced by torch.compile(fullgraph=True). On a CPU, and where the
    kernel is missing, it runs its reference.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes or devices that do not fit, eps not positive, or an input that requires a gradient while
            grad mode is on.
        NoFusedKernelError: under fp.use("fused") where the kernel cannot run.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    check_floating("add_rms_norm", x=x, residual=residual, weight=weight)
    check_norm("add_rms_norm", x.shape, residual, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)
