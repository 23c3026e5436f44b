"""Self-attention with the heads split over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ._shards import merge_siblings
from .heads import HeadLayout
from .kv_cache import KVCache
from .linear import ColumnParallelLinear, RowParallelLinear
from .rms_norm import RMSNorm


def lens_after(positions: torch.Tensor) -> torch.Tensor:
    """int32 [B]: how many tokens each sequence's cache holds with the new ones at `positions` [B, S]."""
    return (positions[:, -1] + 1).to(torch.int32)


class QKVParallelLinear(ColumnParallelLinear):
    """The q, k and v projections in one matmul, split by heads over the ranks of `group`.

    Key-value heads fewer than ranks are replicated; heads that do not divide are padded with zero heads (see
    HeadLayout).
    Parameters: `weight` [(local_q + 2 * local_kv) * head_dim, hidden], `bias`. forward: x [..., hidden] -> (q, k, v),
    each [..., local heads, head_dim]. In a ParallelAttention
    it loads the tensors q_proj, k_proj, v_proj beside it in the state dict.
    """

    def __init__(
        self, hidden_size, num_heads, num_kv_heads, head_dim, bias=False, *, group, device=None, dtype=None
    ) -> None:
        from ..comm.groups import resolve_group

        pg = resolve_group(group)
        layout = HeadLayout.of(num_heads, num_kv_heads, pg.rank(), pg.size())
        super().__init__(
            hidden_size,
            (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim),
            bias,
            group=group,
            names=("q_proj", "k_proj", "v_proj"),
            shards=(layout.q_shard(0, head_dim), layout.kv_shard(0, head_dim), layout.kv_shard(0, head_dim)),
            device=device,
            dtype=dtype,
        )
        self.layout, self.head_dim = layout, head_dim

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = super().forward(x).unflatten(-1, (-1, self.head_dim))
        return heads.split((self.layout.local_q, self.layout.local_kv, self.layout.local_kv), dim=-2)


class ParallelAttention(nn.Module):
    """Causal grouped-query attention over a KV cache, as transformers' LlamaAttention, split by heads.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: of the whole model.
        layer: index of this layer in the KVCache.
        bias: whether q, k, v and o have biases.
        group: ProcessGroup or 1-D DeviceMesh.

    Loads state dicts with q_proj, k_proj, v_proj and o_proj; q, k and v are held merged in `qkv_proj`. forward: x
    [B, S, hidden], cos and sin [B, S, head_dim], the cache and the tokens' positions [B, S] -> [B, S, hidden]; with
    `residual` and `norm`, (norm(sum), sum) for sum = residual + output. The S tokens are written to the cache; its
    `lens` stay as they are. `lens` int32 [B], the tokens in the cache with the new ones, can be given where it serves
    many layers; default: the last token's position + 1. `tree_mask` bool [B, S, S]: which of the new tokens each one
    sees, as of `fp.verify_attention`; default: those up to itself.
    """

    def __init__(
        self, hidden_size, num_heads, num_kv_heads, head_dim, layer=0, bias=False, *, group, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.qkv_proj = QKVParallelLinear(
            hidden_size, num_heads, num_kv_heads, head_dim, bias, group=group, device=device, dtype=dtype
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            hidden_size,
            bias,
            group=group,
            shard=self.qkv_proj.layout.q_shard(1, head_dim),
            device=device,
            dtype=dtype,
        )
        merge_siblings(self)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: KVCache,
        positions: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        lens: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None,
    ):
        q, k, v = self.qkv_proj(x)
        k_cache, v_cache = cache.k[self.layer], cache.v[self.layer]
        q = ops.rotary_cache_write(q, k, v, cos, sin, k_cache, v_cache, positions)
        lens = lens_after(positions) if lens is None else lens
        out = ops.verify_attention(q, k_cache, v_cache, lens, tree_mask=tree_mask, context=cache.context)
        return self.o_proj(out.flatten(2), residual, norm)
