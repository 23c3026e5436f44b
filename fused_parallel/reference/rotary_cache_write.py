"""Reference of rotary_cache_write: plain torch in fp32, rounded once, where the kernel rounds."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, S, heads, D] by cos and sin [B, S, D] (halves convention, as transformers)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = x.float() * cos.float().unsqueeze(2) + turned * sin.float().unsqueeze(2)
    return rotated.to(x.dtype).contiguous()


def rotary_cache_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    batch, new = positions.shape
    if positions.numel() and k_cache.shape[1]:
        # Without reading back which positions are inside: a token outside writes again what its sequence's first token
        # inside writes, or, where there is none, what the cache holds.
        row = torch.arange(batch, device=q.device).unsqueeze(1)
        inside = (positions >= 0) & (positions < k_cache.shape[1])
        first_inside = inside.int().argmax(dim=1, keepdim=True)
        source = torch.where(inside, torch.arange(new, device=q.device), first_inside)
        some = inside.any(dim=1, keepdim=True)
        place = positions.gather(1, source).where(some, 0)
        for cache, values in ((k_cache, rotate(k, cos, sin)), (v_cache, v)):
            cache[row, place] = torch.where(some[..., None, None], values[row, source], cache[row, place])
    return rotate(q, cos, sin)
