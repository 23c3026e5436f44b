"""Draw one token per request from the target distribution, with the noise that verification shares."""

from __future__ import annotations

import torch

from .filters import target_weights
from .vocab_shard import VocabShard


def sample(logits, seed, step, temperature, position, stream, top_k, top_p, min_p, shard: VocabShard) -> torch.Tensor:
    """int64 [B] from logits [B, width]; the arguments are those of `fp.sample`, as tensors."""
    weights, greedy = target_weights(logits[:, None], temperature, top_k, top_p, min_p, shard)
    weights = weights[:, 0]
    return shard.draw([weights], weights, greedy, seed, step, position, stream)[0]
