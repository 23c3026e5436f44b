"""Weight-only quantisation of parallel linear layers, and how quantised weights are read from a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from ..reference.quantized_matmul import KINDS, quantize, quantized_shapes
from ._shards import Piece, Reader, Shard
from .linear import ColumnParallelLinear, RowParallelLinear

_CHUNK = 64 << 20  # bytes of a weight (as fp32) that are quantised at once


def quantize_(module: nn.Module, kind: str) -> nn.Module:
    """Replace the weight of every ColumnParallelLinear and RowParallelLinear in `module` by integers, in place.

    Args:
        kind: "int8" (one scale a row) or "int4" (one for 128 columns of a row); both symmetric, rounded to nearest.
            What a rank holds is quantised: a row-parallel layer's rows have scales of their own on each rank.

    The layers then hold `values` and `scales` (the format of `fp.quantized_matmul`) instead of `weight`; weights on
    the meta device become memory without values, for `from_pretrained` to fill. State dicts hold values and scales;
    full-precision ones must be loaded before. Returns `module`. Raises ValueError for another kind, layers that are
    quantised already, and sequence-parallel ones.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize: must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    for layer in module.modules():
        if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            continue
        if layer.quantized is not None:
            raise ValueError(f"quantize_: a layer is quantised already ({layer.quantized})")
        if layer.sequence_parallel:
            raise ValueError("quantize_: there is no quantised form of sequence-parallel layers")
        weight = layer.weight
        shape, integers, of_scales = quantized_shapes(kind, *weight.shape)
        values = torch.empty(shape, dtype=integers, device=weight.device)
        scales = torch.empty(of_scales, dtype=weight.dtype, device=weight.device)
        layer.quantized, layer.weight_shape, layer.weight_shard = kind, tuple(weight.shape), layer.shards.pop("weight")
        del layer.weight
        layer.values = nn.Parameter(values, requires_grad=False)
        layer.scales = nn.Parameter(scales, requires_grad=False)
        if not weight.is_meta:
            n, k = weight.shape
            whole = Shard(0, n, (Piece("weight", 0, n, 0, n),))

            def read(source, dim, start, stop, weight=weight):
                return weight.data.narrow(dim, start, stop - start)

            fill_quantized(values, scales, kind, (n, k), whole, read, weight.device)
    return module


@torch.no_grad()
def fill_quantized(
    values: torch.Tensor,
    scales: torch.Tensor,
    kind: str,
    shape: tuple[int, int],
    shard: Shard,
    read: Reader,
    device: torch.device,
) -> None:
    """Quantise a local weight of `shape` whose pieces `read` gives (`fill` of _shards.py), some rows at a time, on
    `device`, into values and scales anywhere. Padding becomes zero."""
    n, k = shape
    rows = max(1, _CHUNK // (4 * max(k, 1)))

    def put(at: int, part: torch.Tensor) -> None:
        integers, factors = quantize(part.to(device), kind, scales.dtype)
        values[at : at + len(part)].copy_(integers)
        scales[at : at + len(part)].copy_(factors)

    if shard.dim == 0:
        if sum(p.stop - p.start for p in shard.pieces) < n:
            scales.zero_(), values.zero_()
        for p in shard.pieces:
            for start in range(p.start, p.stop, rows):
                stop = min(start + rows, p.stop)
                put(p.dest + start - p.start, read(p.source, 0, start, stop))
        return
    pieces = [(p, read(p.source, 1, p.start, p.stop)) for p in shard.pieces if p.stop > p.start]
    for start in range(0, n, rows):
        part = torch.zeros(min(rows, n - start), k)
        for p, columns in pieces:
            part[:, p.dest : p.dest + p.stop - p.start] = columns[start : start + rows]
        put(start, part)
