"""Embedding and output head with the vocabulary split over the ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ._shards import ShardedModule, become, even_shard, fill_from_full
from .linear import gather_last


class VocabParallelEmbedding(ShardedModule):
    """`torch.nn.Embedding` with the vocabulary split over the ranks of `group`, padded to a multiple of it.

    Parameter: `weight` [local vocabulary, embedding_dim]. forward: ids int64 [...] -> [..., embedding_dim], whole on
    every rank (one all-reduce; each row comes from one rank, so the sum is exact). Ids must be in the vocabulary, as
    torch's.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, group, device=None, dtype=None) -> None:
        super().__init__(group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        shard = even_shard(0, num_embeddings, self.tp_rank, self.tp_size, "weight")
        self.add_parameter("weight", (shard.size, embedding_dim), shard, device, dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return F.embedding(input_ids, self.weight)
        (piece,) = self.shards["weight"].pieces
        mine = (input_ids >= piece.start) & (input_ids < piece.stop)
        rows = F.embedding((input_ids - piece.start).masked_fill(~mine, 0), self.weight)
        # Filled, not multiplied: a row 0 with inf or NaN must not leak into other tokens.
        return ops.all_reduce(rows.masked_fill(~mine.unsqueeze(-1), 0), group=self.group)


class ParallelLMHead(ShardedModule):
    """The output head, with the vocabulary split over the ranks of `group`, padded to a multiple of it.

    Parameter: `weight` [local vocabulary, hidden]. forward: hidden states [..., hidden] -> logits [..., local
    vocabulary], what `fp.verify` takes with `vocab_group` (the last ranks' padding is masked there by `vocab_size`);
    with `gather_output`, [..., vocabulary] on every rank. `tie(embedding)` shares the embedding's weight.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, *, group, gather_output: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__(group)
        self.hidden_size, self.vocab_size, self.gather_output = hidden_size, vocab_size, gather_output
        shard = even_shard(0, vocab_size, self.tp_rank, self.tp_size, "weight")
        self.add_parameter("weight", (shard.size, hidden_size), shard, device, dtype)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        if embedding.weight.shape != self.weight.shape:
            raise ValueError(
                f"cannot tie a head of {tuple(self.weight.shape)} to an embedding of {tuple(embedding.weight.shape)}"
            )
        self.weight = embedding.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = ops.linear(hidden_states, self.weight)
        return gather_last(logits, self.vocab_size, self.group) if self.gather_output else logits


def shard_embedding_(embedding: nn.Embedding, *, group) -> nn.Module:
    """Turn a `torch.nn.Embedding` holding the full weight into a VocabParallelEmbedding, in place."""
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise TypeError(
            f"cannot shard a {type(embedding).__name__}: expected torch.nn.Embedding itself, without max_norm"
        )
    if embedding.weight.is_meta:
        raise ValueError("cannot shard a layer on the meta device: load the weights first")
    weight = embedding.weight
    new = VocabParallelEmbedding(*weight.shape, group=group, device=weight.device, dtype=weight.dtype)
    fill_from_full(new, embedding)
    become(embedding, new)
    return embedding
