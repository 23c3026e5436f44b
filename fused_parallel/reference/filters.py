"""The target distribution: temperature, then top-k, top-p and min-p, on a vocabulary that may be spread over ranks."""

from __future__ import annotations

import torch

from .vocab_shard import NONE, VocabShard

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def _keys(x: torch.Tensor) -> torch.Tensor:
    """int64 keys of 32 bits in the order of the float32 values `x`; equal values (also +0 and -0) have equal keys."""
    bits = (x + 0.0).view(torch.int32).long()
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _threshold(keys: torch.Tensor, mass: torch.Tensor, goal: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The greatest key whose tokens at or above it have `goal` of mass or more; the lowest there is if none.

    Bisection over the 32 bits: it needs no sort and no gathered vocabulary, but 32 exchanges of one number a row.
    Shapes: keys and mass [B, R, width], goal broadcastable to [B, R].
    """
    low = torch.full(keys.shape[:-1], _LOWEST, device=keys.device)
    high = torch.full_like(low, _HIGHEST)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = shard.sum(torch.where(keys >= middle[..., None], mass, 0.0)) >= goal
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low


def target_weights(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    shard: VocabShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weights of the target, float64 [B, R, width] with -inf where a token is filtered out, and greedy, bool [B].

    A request is greedy unless its temperature is positive: its weights are those at temperature 1, without filters.
    """
    x = shard.clean(logits)
    greedy = ~(temperature > 0)
    # An infinite temperature would divide -inf to nan; the largest float32 is as flat.
    divisor = torch.where(greedy, 1.0, temperature).double().clamp(max=torch.finfo(torch.float32).max)
    weights = x.double() / divisor[:, None, None]

    def off(option: torch.Tensor, disabled: torch.Tensor) -> torch.Tensor:
        return (greedy | disabled)[:, None, None]

    if top_k is not None:
        keys = _keys(x)
        kth = _threshold(keys, (weights > NONE).double(), top_k.double()[:, None], shard)
        weights = weights.masked_fill((keys < kth[..., None]) & ~off(top_k, top_k <= 0), NONE)
    if top_p is not None or min_p is not None:
        maximum = shard.maximum(weights)[..., None]
        maximum = torch.where(maximum == NONE, 0.0, maximum)
    if top_p is not None:
        keys, mass = _keys(x), (weights - maximum).exp()
        least = _threshold(keys, mass, top_p.double()[:, None] * shard.sum(mass), shard)
        weights = weights.masked_fill((keys < least[..., None]) & ~off(top_p, ~((top_p > 0) & (top_p < 1))), NONE)
    if min_p is not None:
        floor = maximum + min_p.double().clamp(max=1).log()[:, None, None]
        weights = weights.masked_fill((weights < floor) & ~off(min_p, ~(min_p > 0)), NONE)
    return weights, greedy
