"""Reference of verify_attention: torch's scaled_dot_product_attention under an explicit mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    scale: float,
    context: int | None = None,
) -> torch.Tensor:
    batch, new, _, _ = q.shape
    if block_table is not None:
        table = block_table.long()
        k_cache, v_cache = (c[table].flatten(1, 2) for c in (k_cache, v_cache))
    if context is not None:
        k_cache, v_cache = k_cache[:, : context + new], v_cache[:, : context + new]
    elif not q.is_cuda and batch:
        # On a CPU the lengths can be read for free; on a GPU that would synchronise, so all of the capacity is scanned.
        used = max(1, int(cache_lens.max()))
        k_cache, v_cache = k_cache[:, :used], v_cache[:, :used]
    if q.is_cuda:
        # torch's kernels read 16 bytes at once wherever a view begins, and end in "misaligned address".
        q, k_cache, v_cache = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (q, k_cache, v_cache))
    keys, half = k_cache.shape[1], q.dtype in (torch.bfloat16, torch.float16)
    causal = context is not None and tree_mask is None and (context == 0 or (q.is_cuda and half))
    if not causal:
        visible = _visible(cache_lens, new, keys, tree_mask)
    else:  # torch's kernels for this need no mask, skip what is hidden, and read nothing behind the keys
        visible = None if context == 0 else causal_lower_right(new, keys)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=visible,
        is_causal=causal and context == 0,
        scale=scale,
        enable_gqa=q.shape[2] != k_cache.shape[2],
    )
    return out.transpose(1, 2).contiguous()


def _visible(cache_lens: torch.Tensor, new: int, keys: int, tree_mask: torch.Tensor | None) -> torch.Tensor:
    """bool [B, 1, new, keys]: which keys each new token sees."""
    start = (cache_lens.long() - new).view(-1, 1, 1)
    key = torch.arange(keys, device=cache_lens.device).view(1, 1, -1)
    if tree_mask is None:
        query = torch.arange(new, device=cache_lens.device).view(1, -1, 1)
        return (key <= start + query).unsqueeze(1)
    among_new = tree_mask.gather(2, (key - start).clamp(0, new - 1).expand(-1, new, -1))
    return ((key < start) | (among_new & (key < start + new))).unsqueeze(1)
