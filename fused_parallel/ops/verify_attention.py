"""verify_attention: attention of the newest tokens of each sequence against its cached keys and values."""

from __future__ import annotations

import torch

from ..reference import verify_attention as reference
from ._dispatch import NO_KERNEL, choose_fused
from ._library import check_floating, register


def _impl(q, k_cache, v_cache, cache_lens, block_table, tree_mask, scale: float) -> torch.Tensor:
    choose_fused("verify_attention", NO_KERNEL, on_gpu=q.is_cuda)
    return reference.verify_attention(q, k_cache, v_cache, cache_lens, block_table, tree_mask, scale)


_op = register(
    "verify_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lens, Tensor? block_table, "
    "Tensor? tree_mask, float scale) -> Tensor",
    _impl,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the S newest tokens of each sequence (S = k + 1 in verification, 1 in plain decode, any in prefill).

    Args:
        q: [B, S, Hq, D], fp16, bf16 or fp32, this rank's heads; token i of sequence b stands at position
            cache_lens[b] - S + i.
        k_cache, v_cache: [B, C, Hkv, D]; with `block_table`, [pages, page, Hkv, D]. Hq is a multiple of Hkv
            (grouped-query attention). The S new tokens' keys and values are already written.
        cache_lens: int32 [B], tokens in the cache counting the S new ones: S <= cache_lens[b] <= capacity.
        block_table: int32 [B, n]: the pages of each sequence in order; entries past a sequence's end must still be
            valid page numbers.
        tree_mask: bool [B, S, S]: new token i attends new token j where [b, i, j] is true, instead of j <= i.
        scale: of the scores; default D ** -0.5.

    Returns:
        [B, S, Hq, D] like q.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit; on CPUs also lengths out of range (on GPUs they are not
        read back and must be right).

    No communication. Runs on the current stream; capturable in CUDA graphs; traced by torch.compile as one node.
    """
    op = "verify_attention"
    check_floating(op, q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{op}: q must be [B, S, Hq, D] and the caches alike and 4-dimensional, got q {tuple(q.shape)}, "
            f"k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
        )
    batch, new, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    if k_cache.shape[3] != dim or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: q has {heads} heads of {dim}, the cache {kv_heads} of {k_cache.shape[3]}; head sizes must be equal "
            "and q's heads a multiple of the cache's"
        )
    if not isinstance(cache_lens, torch.Tensor):
        raise TypeError(f"{op}: cache_lens must be a tensor int32 [{batch}], got {type(cache_lens).__name__}")
    if cache_lens.dtype != torch.int32 or tuple(cache_lens.shape) != (batch,):
        raise TypeError(f"{op}: cache_lens must be int32 [{batch}], got {cache_lens.dtype} {tuple(cache_lens.shape)}")
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"{op}: q has batch {batch}, the caches {k_cache.shape[0]}; paged caches need block_table")
        capacity = k_cache.shape[1]
    else:
        if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch:
            raise TypeError(
                f"{op}: block_table must be int32 [{batch}, n], got {block_table.dtype} {tuple(block_table.shape)}"
            )
        capacity = block_table.shape[1] * k_cache.shape[1]
    if tree_mask is not None and (tree_mask.dtype != torch.bool or tuple(tree_mask.shape) != (batch, new, new)):
        raise TypeError(
            f"{op}: tree_mask must be bool [{batch}, {new}, {new}], got {tree_mask.dtype} {tuple(tree_mask.shape)}"
        )
    if not torch.compiler.is_compiling() and not cache_lens.is_cuda and batch:
        low, high = int(cache_lens.min()), int(cache_lens.max())
        if low < new or high > capacity:
            raise ValueError(
                f"{op}: cache_lens must lie in [{new}, {capacity}] (new tokens, capacity), got {low} to {high}"
            )
    return _op(q, k_cache, v_cache, cache_lens, block_table, tree_mask, dim**-0.5 if scale is None else scale)
