"""rotary_cache_write: what stands between the q, k, v projection and the attention, in one pass."""

from __future__ import annotations

import torch

from .. import _ext
from ..reference import rotary_cache_write as reference
from . import _direct
from ._dispatch import choose_fused
from ._library import check_floating, register, why_no_kernel_for


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(q, k, v, cos, sin, k_cache, v_cache, positions) -> torch.Tensor:
    """Run the kernel on the current stream of q's device."""
    batch, tokens, q_heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    _ext.extension().rotary_cache_write(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        positions=positions.data_ptr(),
        q_out=out.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        k_cache_strides=k_cache.stride(),
        v_cache_strides=v_cache.stride(),
        batch=batch,
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=k.shape[2],
        dim=dim,
        capacity=k_cache.shape[1],
        dtype=_ext.DTYPE_CODES[q.dtype],
        device=q.device.index,
        stream=_direct.raw_stream(q.device.index),
    )
    return out


def _impl(q, k, v, cos, sin, k_cache, v_cache, positions) -> torch.Tensor:
    if choose_fused("rotary_cache_write", why_no_kernel_for(q), on_gpu=q.is_cuda):
        return _launch(q, k, v, cos, sin, k_cache, v_cache, positions)
    return reference.rotary_cache_write(q, k, v, cos, sin, k_cache, v_cache, positions)


_op = register(
    "rotary_cache_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor positions) -> Tensor",
    _impl,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)


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
    """Rotate the queries and keys of S new tokens of each sequence, and write keys and values to a layer's cache.

    A head x becomes x * cos + (-second half of x, first half of x) * sin (the halves convention, as transformers),
    computed in fp32 and rounded once to the dtype. v is written as it is.

    Args:
        q: [B, S, Hq, D], fp16, bf16 or fp32, D even, this rank's heads; any strides (views of a merged projection are
            read in place where the elements of a head are contiguous).
        k, v: [B, S, Hkv, D], likewise.
        cos, sin: [B, S, D], of the tokens' positions; of q's dtype.
        k_cache, v_cache: [B, C, Hkv, D], of q's dtype, with contiguous heads: written in place, nowhere but at
            `positions`. They must not overlap the other tensors.
        positions: int64 [B, S], where each token goes in its sequence's cache; those of a sequence differ from each
            other. A token whose position is not in [0, C) is not written; its q is rotated all the same.

    Returns:
        q rotated, a new contiguous tensor [B, S, Hq, D].

    A local operation: it concerns one rank and knows no group. Under tensor parallelism every rank calls it with its
    heads.

    On a GPU it is one kernel on the current stream of q's device, without synchronisation; it can be captured into a
    CUDA graph, replayed with changed inputs and positions, and traced by torch.compile(fullgraph=True). On a CPU, and
    where the kernel is missing, it runs its reference.

    Raises:
        TypeError: dtypes that are not supported or differ.
        ValueError: shapes, strides or devices that do not fit, or an input that requires a gradient while grad mode is
            on.
        NoFusedKernelError: under fp.use("fused") where the kernel cannot run.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    op = "rotary_cache_write"
    check_floating(op, q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 4 or q.shape[3] == 0 or q.shape[3] % 2:
        raise ValueError(f"{op}: q must be [B, S, Hq, D] with D even and at least 2, got shape {tuple(q.shape)}")
    batch, new, _, dim = q.shape
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != dim or v.shape != k.shape:
        raise ValueError(
            f"{op}: k and v must be [{batch}, {new}, Hkv, {dim}] beside q {tuple(q.shape)}, got k {tuple(k.shape)}, v "
            f"{tuple(v.shape)}"
        )
    for name, t in (("cos", cos), ("sin", sin)):
        if tuple(t.shape) != (batch, new, dim):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {(batch, new, dim)}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4 or t.shape[0] != batch or t.shape[2:] != k.shape[2:] or t.shape[1] != k_cache.shape[1]:
            raise ValueError(
                f"{op}: the caches must be alike and [{batch}, C, {k.shape[2]}, {dim}], got {name} {tuple(t.shape)}"
            )
        if t.stride(3) != 1:
            raise ValueError(f"{op}: the elements of a head must be contiguous, {name} has strides {t.stride()}")
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f"{op}: positions must be a tensor int64 {[batch, new]}, got {type(positions).__name__}")
    if positions.dtype != torch.int64 or tuple(positions.shape) != (batch, new):
        raise TypeError(f"{op}: positions must be int64 {[batch, new]}, got {positions.dtype} {tuple(positions.shape)}")
    if positions.device != q.device:
        raise ValueError(f"{op}: positions is on {positions.device} but q is on {q.device}")
    return _op(q, k, v, cos, sin, k_cache, v_cache, positions)
