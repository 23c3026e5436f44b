"""silu_mul: the gate between the two matmuls of a gated MLP, in one pass."""

from __future__ import annotations

import torch

from .. import _ext
from ..reference import silu_mul as reference
from . import _direct
from ._dispatch import choose_fused
from ._library import as_rows, check_floating, register, why_no_kernel_for


def _launch(x: torch.Tensor) -> torch.Tensor:
    """Run the kernel on the current stream of x's device."""
    rows, size = as_rows(x), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], size)
    _ext.extension().silu_mul(
        x=rows.data_ptr(),
        out=out.data_ptr(),
        rows=rows.shape[0],
        size=size,
        x_row_stride=rows.stride(0),
        dtype=_ext.DTYPE_CODES[x.dtype],
        device=x.device.index,
        stream=_direct.raw_stream(x.device.index),
    )
    return out


def _impl(x: torch.Tensor) -> torch.Tensor:
    if choose_fused("silu_mul", why_no_kernel_for(x), on_gpu=x.is_cuda):
        return _launch(x)
    return reference.silu_mul(x)


_op = register("silu_mul(Tensor x) -> Tensor", _impl, lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = (gate, up), one after the other in the last dimension, as a merged projection gives them.

    silu(gate) = gate / (1 + exp(-gate)). All of it is computed in fp32 and rounded once to the dtype, where torch's
    F.silu(gate) * up rounds the factor, too. An element's result does not depend on those beside it.

    Args:
        x: [..., 2 * size], float16, bfloat16 or float32, any strides (rows at one distance from each other are read in
            place, else x is copied).

    Returns:
        [..., size], a new contiguous tensor of x's dtype.

    A local operation: it concerns one rank and knows no group. Under tensor parallelism every rank calls it with its
    part of gate and of up.

    On a GPU it is one kernel on the current stream of x's device, without synchronisation; it can be captured into a
    CUDA graph, replayed with changed inputs, and traced by torch.compile(fullgraph=True). On a CPU, and where the
    kernel is missing, it runs its reference.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a last dimension that is odd or empty, or an x that requires a gradient while grad mode is on.
        NoFusedKernelError: under fp.use("fused") where the kernel cannot run.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU).
    """
    check_floating("silu_mul", x=x)
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"silu_mul: x must be [..., 2 * size] with size >= 1, got shape {tuple(x.shape)}")
    return _op(x)
