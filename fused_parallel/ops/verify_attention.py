"""verify_attention: attention of the newest tokens of each sequence against its cached keys and values."""

from __future__ import annotations

import torch

from .. import _ext
from ..reference import verify_attention as reference
from . import _direct
from ._dispatch import choose_fused
from ._library import check_floating, register, why_no_kernel_for

_HEAD_DIMS = (64, 128)


def _strides(t: torch.Tensor) -> list[int]:
    """Of all but the last dimension, in elements; 0 for dimensions of size 1, whose strides mean nothing."""
    return [stride if size > 1 else 0 for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True)]


def _rows_aligned(t: torch.Tensor, bytes: int) -> bool:
    """Whether elements of the last dimension are contiguous, and begin at multiples of `bytes`."""
    size = t.element_size()
    return t.stride(-1) == 1 and t.data_ptr() % bytes == 0 and all(s * size % bytes == 0 for s in _strides(t))


def _why_not_fused(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, capacity: int) -> str | None:
    """Why the reference must do this call. Without its sizes, as each reason is told once."""
    if (why := why_no_kernel_for(q)) is not None:
        return why
    if q.dtype == torch.float32:
        return "the kernel is for float16 and bfloat16, not for float32"
    if q.shape[3] not in _HEAD_DIMS:
        return f"the kernel is for heads of {' or '.join(map(str, _HEAD_DIMS))}, not of {q.shape[3]}"
    most = _ext.extension().verify_attention_max_new_tokens
    if q.shape[1] > most:
        return f"the kernel takes up to {most} new tokens a sequence, and prefill has more"
    if not (_rows_aligned(k_cache, 16) and _rows_aligned(v_cache, 16)):
        return "the kernel reads caches in place, and their rows must be contiguous and begin at multiples of 16 bytes"
    if capacity > 2**30 or max(k_cache.stride(1), v_cache.stride(1)) >= 2**30:
        return "the kernel takes caches of up to 2**30 tokens a sequence, less than 2**30 elements from each other"
    return None


def _launch(q, k_cache, v_cache, cache_lens, block_table, tree_mask, scale: float, capacity: int) -> torch.Tensor:
    """Run the kernels on the current stream of q's device."""
    extension = _ext.extension()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Kept in names until after the launch: a temporary would give its memory back before the kernels are queued.
    q = q if _rows_aligned(q, 4) else q.clone(memory_format=torch.contiguous_format)
    cache_lens = cache_lens.contiguous()
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    tree_mask = None if tree_mask is None else tree_mask.contiguous()
    batch, new, heads, dim = q.shape
    shape = {
        "batch": batch,
        "new_tokens": new,
        "heads": heads,
        "kv_heads": k_cache.shape[2],
        "head_dim": dim,
        "capacity": capacity,
        "device": q.device.index,
    }
    scratch_bytes = extension.verify_attention_scratch_bytes(**shape)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=q.device) if scratch_bytes else None
    extension.verify_attention(
        q=q.data_ptr(),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        cache_lens=cache_lens.data_ptr(),
        block_table=0 if block_table is None else block_table.data_ptr(),
        tree_mask=0 if tree_mask is None else tree_mask.data_ptr(),
        out=out.data_ptr(),
        scratch=0 if scratch is None else scratch.data_ptr(),
        q_strides=_strides(q),
        k_strides=_strides(k_cache),
        v_strides=_strides(v_cache),
        block_table_stride=0 if block_table is None else block_table.stride(0),
        page=k_cache.shape[1],
        scale=scale,
        dtype=_ext.DTYPE_CODES[q.dtype],
        stream=_direct.raw_stream(q.device.index),
        **shape,
    )
    return out


def _impl(q, k_cache, v_cache, cache_lens, block_table, tree_mask, scale: float, context: int | None) -> torch.Tensor:
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    # Prefill is what torch's own kernels are for, and no fallback.
    prefill = context is not None and q.is_cuda and q.shape[1] > _ext.limit("verify_attention_max_new_tokens")
    if prefill or not choose_fused("verify_attention", _why_not_fused(q, k_cache, v_cache, capacity), on_gpu=q.is_cuda):
        return reference.verify_attention(q, k_cache, v_cache, cache_lens, block_table, tree_mask, scale, context)
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return _launch(q, k_cache, v_cache, cache_lens, block_table, tree_mask, scale, capacity)


_op = register(
    "verify_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lens, Tensor? block_table, "
    "Tensor? tree_mask, float scale, SymInt? context) -> Tensor",
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
    context: int | None = None,
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
        tree_mask: bool [B, S, S]: new token i attends new token j where [b, i, j] is true, instead of j <= i. A token
            that attends nothing at all gets zeros.
        scale: of the scores; default D ** -0.5.
        context: how many tokens every sequence held before these, where the host knows: cache_lens are context + S.
            Beyond 64 new tokens, prefill, torch's causal kernels then read no more of the cache than that; without it
            all of the capacity is scanned under a mask.

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
    if context is not None and not 0 <= context <= capacity - new:
        raise ValueError(f"{op}: context must lie in [0, {capacity - new}] (capacity less new tokens), got {context}")
    for name, t in (("cache_lens", cache_lens), ("block_table", block_table), ("tree_mask", tree_mask)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{op}: {name} is on {t.device} but q is on {q.device}")
    if not torch.compiler.is_compiling() and not cache_lens.is_cuda and batch:
        low, high = int(cache_lens.min()), int(cache_lens.max())
        if low < new or high > capacity:
            raise ValueError(
                f"{op}: cache_lens must lie in [{new}, {capacity}] (new tokens, capacity), got {low} to {high}"
            )
        if context is not None and (low, high) != (context + new, context + new):
            raise ValueError(f"{op}: with context={context} all cache_lens are {context + new}, got {low} to {high}")
    return _op(q, k_cache, v_cache, cache_lens, block_table, tree_mask, dim**-0.5 if scale is None else scale, context)
