"""quantized_matmul: a linear layer whose weight is int8 or int4 (weight-only quantisation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _ext
from ..reference import quantized_matmul as reference
from . import _direct
from ._dispatch import choose_fused
from ._library import as_rows, check_floating, register, why_no_kernel_for

# Rows that the kernel takes: it reads the weight once for 8 of them, and its fp32 sums are then what takes time. Beyond
# it the weight is written and read in x's dtype, once, for the tensor cores (measured on an H100: docs/offload.md).
MOST_ROWS = 16


def _aligned(t: torch.Tensor) -> torch.Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _launch(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Run the kernel on the current stream of x's device."""
    rows, n = as_rows(x), values.shape[0]
    rows = rows if rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0 else rows.clone()
    values, scales = _aligned(values.contiguous()), scales.contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    _ext.extension().quantized_matmul(
        x=rows.data_ptr(),
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        out=out.data_ptr(),
        rows=rows.shape[0],
        n=n,
        k=x.shape[-1],
        x_row_stride=rows.stride(0),
        bits=8 if values.dtype == torch.int8 else 4,
        dtype=_ext.DTYPE_CODES[x.dtype],
        device=x.device.index,
        stream=_direct.raw_stream(x.device.index),
    )
    return out


def _dequantize(values: torch.Tensor, scales: torch.Tensor, k: int) -> torch.Tensor:
    """The weight [N, k] in the scales' dtype, by the kernel: the bits of `reference.dequantize`."""
    values, scales = _aligned(values.contiguous()), scales.contiguous()
    out = scales.new_empty(values.shape[0], k)
    _ext.extension().dequantize(
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        out=out.data_ptr(),
        n=values.shape[0],
        k=k,
        bits=8 if values.dtype == torch.int8 else 4,
        dtype=_ext.DTYPE_CODES[scales.dtype],
        device=scales.device.index,
        stream=_direct.raw_stream(scales.device.index),
    )
    return out


def _why_not_fused(x: torch.Tensor, values: torch.Tensor) -> str | None:
    reason = why_no_kernel_for(x)
    if reason is not None:
        return reason
    step = 16 if values.dtype == torch.int8 else 32
    return None if x.shape[-1] % step == 0 else f"the kernel takes multiples of {step} columns, not {x.shape[-1]}"


def _impl(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    if not choose_fused("quantized_matmul", _why_not_fused(x, values), on_gpu=x.is_cuda):
        return reference.quantized_matmul(x, values, scales)
    if rows <= MOST_ROWS:
        return _launch(x, values, scales)
    return F.linear(x, _dequantize(values, scales, x.shape[-1]))


def _fake(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


_op = register("quantized_matmul(Tensor x, Tensor values, Tensor scales) -> Tensor", _impl, _fake)


def quantized_matmul(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for a quantised weight, as `fp.nn.quantize_` makes it (this rank's part; no communication).

    Args:
        x: [..., K], fp16, bf16 or fp32.
        values: int8 [N, K], or for int4 uint8 [N, ceil(K / 2)]: two columns a byte, the even one in the low four bits,
            each plus 8.
        scales: in x's dtype, [N, 1] for int8, [N, ceil(K / 128)] for int4: weight = value * scale, rounded to x's
            dtype.

    Returns:
        [..., N]. Up to 16 rows of x on a GPU: one kernel for 8 of them, summed in fp32 in a fixed order and rounded
        once; a row's result does not depend on the others. More rows: the weight is dequantised by a kernel to memory
        of its own (N K elements of x's dtype, given back after) and multiplied by torch. CPUs, and K that is no
        multiple of 32 (int8: 16): the same in plain torch.

    Raises TypeError or ValueError for dtypes and shapes that do not fit, NoFusedKernelError under fp.use("fused") where
    the kernel cannot run. Runs on the current stream; capturable in CUDA graphs; traced by torch.compile as one node.
    """
    check_floating("quantized_matmul", x=x, scales=scales)
    if not isinstance(values, torch.Tensor) or values.dtype not in (torch.int8, torch.uint8):
        got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"quantized_matmul: values must be int8, or uint8 that hold int4, got {got}")
    if values.device != x.device:
        raise ValueError(f"quantized_matmul: values is on {values.device} but x is on {x.device}")
    kind = "int8" if values.dtype == torch.int8 else "int4"
    if x.dim() == 0 or values.dim() != 2:
        raise ValueError(
            f"quantized_matmul: x is {tuple(x.shape)} and values {tuple(values.shape)}: [..., K], [N, ...]"
        )
    shape, _, of_scales = reference.quantized_shapes(kind, values.shape[0], x.shape[-1])
    if tuple(values.shape) != shape or tuple(scales.shape) != of_scales:
        per = "a row" if kind == "int8" else f"{reference.GROUP} columns of a row"
        raise ValueError(
            f"quantized_matmul: x {tuple(x.shape)} needs {kind} values {shape} and scales {of_scales} (one for {per}), "
            f"got {tuple(values.shape)} and {tuple(scales.shape)}"
        )
    return _op(x, values, scales)
