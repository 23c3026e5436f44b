"""quantized_matmul: a linear layer whose weight is int8 or int4 (weight-only quantisation)."""

from __future__ import annotations

import torch

from ..reference import quantized_matmul as reference
from ._library import check_floating, register


def _impl(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return reference.quantized_matmul(x, values, scales)


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
        [..., N]. The weight is dequantised to memory of its own and multiplied by torch.

    Raises TypeError or ValueError for dtypes and shapes that do not fit. Runs on the current stream; capturable in CUDA
    graphs; traced by torch.compile as one node.
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
