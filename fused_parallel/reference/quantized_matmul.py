"""Weight-only quantisation in plain torch: the format, and a matmul that dequantises first.

int8: values int8 [N, K], one scale a row, [N, 1]. int4: values uint8 [N, ceil(K / 2)], the even column in the low four
bits, each stored plus 8; one scale for 128 columns of a row, [N, ceil(K / 128)]. A weight is value * scale; symmetric,
so that zeros (padding) stay zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

KINDS = ("int8", "int4")
GROUP = 128  # columns that share a scale, int4
_LARGEST = {"int8": 127, "int4": 7}


def quantized_shapes(kind: str, n: int, k: int) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
    """(shape of the values, their dtype, shape of the scales) of a weight [n, k]."""
    if kind == "int8":
        return (n, k), torch.int8, (n, 1)
    return (n, -(-k // 2)), torch.uint8, (n, -(-k // GROUP))


def quantize(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales in `dtype`) of a floating weight [N, K]: each rounded to the nearest value that the rounded scale
    can represent."""
    n, k = weight.shape
    group = k if kind == "int8" else GROUP
    wide = F.pad(weight.float(), (0, -k % group)).view(n, -1, max(group, 1))
    scales = (wide.abs().amax(-1, keepdim=True) / _LARGEST[kind]).to(dtype)
    # Rounded to nothing (or all zeros): zeros.
    values = torch.where(scales > 0, wide / scales.float(), 0).round_().clamp_(-_LARGEST[kind], _LARGEST[kind])
    values = values.to(torch.int8).view(n, -1)[:, : k + (k % 2 if kind == "int4" else 0)]
    if kind == "int4":
        values = (values + 8).to(torch.uint8)
        values = values[:, ::2] | values[:, 1::2] << 4
    return values.contiguous(), scales.view(n, -1)


def dequantize(values: torch.Tensor, scales: torch.Tensor, k: int) -> torch.Tensor:
    """The weight [N, k] in the scales' dtype."""
    if values.dtype == torch.int8:
        return values.to(scales.dtype).mul_(scales)
    n, groups = scales.shape
    wide = torch.stack((values & 15, values >> 4), -1).view(n, -1).to(scales.dtype).sub_(8)
    if wide.shape[1] < groups * GROUP:
        wide = F.pad(wide, (0, groups * GROUP - wide.shape[1]))
    return wide.view(n, groups, GROUP).mul_(scales.unsqueeze(-1)).view(n, -1)[:, :k]


def quantized_matmul(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [..., K] times the weight, transposed: [..., N]."""
    return F.linear(x, dequantize(values, scales, x.shape[-1]))
