"""Verification of a tree of drafted tokens, one node after the other (SpecInfer, Miao 2024; Sequoia, Chen 2024).

Everything in float64. Where ranks share the vocabulary, the rows are gathered first; then every rank computes the same.
"""

from __future__ import annotations

import torch

from ..comm import collectives
from . import noise
from .filters import target_weights
from .verify import residual
from .vocab_shard import NONE, VocabShard


def _whole_vocabulary(logits: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """[B, R, width] per rank -> [B, R, world * width] on every rank."""
    if shard.pg is None:
        return logits
    batch, rows, _ = logits.shape
    parts = collectives.all_gather(logits.reshape(batch * rows, -1).T, shard.pg)
    return parts.T.reshape(batch, rows, -1)


def _refuse_drawn(p, draft_weights, removed, token, shard: VocabShard):
    """For a token drawn from q without the `removed`: log p / q, the target that refusing it leaves, and log q."""
    weights = draft_weights.masked_fill(removed, NONE)[:, None]
    q = shard.statistics((weights, token[:, None]))[0]
    logq = q.log_probability[:, 0]
    left = residual(torch.zeros_like(logq), p, q.normalise(weights)[:, 0])
    return shard.pick(p, token) - logq, left, logq


def _normalise(weights: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of [B, width] log-weights; `otherwise` in the rows that have no mass."""
    total = torch.logsumexp(weights, -1, keepdim=True)
    return torch.where(total > NONE, weights - total, otherwise)


def verify_tree(
    target_logits,
    draft_tokens,
    parents,
    draft_logits,
    seed,
    step,
    temperature,
    num_draft_tokens,
    top_k,
    top_p,
    min_p,
    max_depth: int,
    shard: VocabShard,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, num_accepted, logprobs and path of `fp.verify_tree`; the arguments are those, as tensors.

    Siblings follow the without-replacement rule where draft_logits are given, else the deterministic one.
    """
    target_logits = _whole_vocabulary(target_logits, shard)
    if draft_logits is not None:
        draft_logits = _whole_vocabulary(draft_logits, shard)
    shard = VocabShard(target_logits.shape[-1], shard.vocab_size)
    batch, nodes = draft_tokens.shape
    device = draft_tokens.device
    ids = shard.ids(device)

    weights, greedy = target_weights(target_logits, temperature, top_k, top_p, min_p, shard)
    target = shard.statistics((weights, torch.zeros(batch, nodes + 1, dtype=torch.int64, device=device)))[0]
    logp = target.normalise(weights)
    point_mass = torch.where(ids == target.argmax[..., None], 0.0, NONE)
    start = torch.where(greedy[:, None, None], point_mass, logp)  # of each row, before any child of its node is tried
    if draft_logits is not None:
        draft_weights = shard.clean(draft_logits).double()
    valid = (draft_tokens >= 0) & (draft_tokens < shard.vocab_size)
    if num_draft_tokens is not None:
        valid &= torch.arange(nodes, device=device) < num_draft_tokens[:, None]
    u = noise.uniform(seed[:, None], step[:, None], torch.arange(nodes, device=device), "accept")

    depth = torch.arange(max_depth, device=device)
    path = torch.full((batch, max_depth), -1, device=device)
    accepted = torch.zeros(batch, dtype=torch.int64, device=device)
    current = torch.full_like(accepted, -1)  # the last accepted node, -1 for the root
    p, removed = start[:, 0], torch.zeros(batch, ids.shape[0], dtype=torch.bool, device=device)
    for node in range(nodes):  # parents stand before their children: one pass visits each accepted node's children
        token = draft_tokens[:, node]
        tried = (parents[:, node] == current) & valid[:, node] & (accepted < max_depth)
        here = ids == token[:, None]
        ratio, left = shard.pick(p, token), p.masked_fill(here, NONE)
        if draft_logits is not None:
            drawn_ratio, drawn_left, logq = _refuse_drawn(p, draft_weights[:, node], removed, token, shard)
            tried &= (logq > NONE) | greedy
            ratio = torch.where(greedy, ratio, drawn_ratio)
            left = torch.where(greedy[:, None], left, drawn_left)
        taken = tried & (u[:, node].log() < ratio)
        refused = tried & ~taken
        p = torch.where(refused[:, None], _normalise(left, p), p)
        p = torch.where(taken[:, None], start[:, node + 1], p)
        removed = (removed | here & refused[:, None]) & ~taken[:, None]
        path = torch.where(taken[:, None] & (depth == accepted[:, None]), node, path)
        current = torch.where(taken, node, current)
        accepted = accepted + taken

    row = torch.nn.functional.pad(path + 1, (1, 0))  # target row of each returned token
    logp_last = logp.take_along_dim((current + 1)[:, None, None], 1)[:, 0]
    last, _ = shard.draw([p, logp_last], logp_last, greedy, seed, step, accepted, "residual")
    length = torch.arange(max_depth + 1, device=device)
    tokens = torch.nn.functional.pad(draft_tokens.gather(1, path.clamp(min=0)), (0, 1))
    beyond = length > accepted[:, None]
    tokens = tokens.where(length != accepted[:, None], last[:, None]).masked_fill(beyond, -1)
    logprobs = logp.flatten(1).gather(1, row * ids.shape[0] + tokens.clamp(min=0))
    return tokens, accepted.int(), logprobs.masked_fill(beyond, 0.0).float(), path
