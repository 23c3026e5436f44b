"""Verification of a chain of drafted tokens, by rejection (Leviathan 2023, Chen 2023) or as a block (Sun 2024).

Everything in float64. Rows are requests' positions, [B, k + 1, width] of the target and [B, k, width] of the draft.
Exchanges between ranks that share the vocabulary: the rows' statistics, block's sums, the drawn token (and the
filters', see there); the vocabulary itself is never gathered.
"""

from __future__ import annotations

import torch

from . import noise
from .filters import target_weights
from .vocab_shard import NONE, RowStatistics, VocabShard


def residual(log_scale: torch.Tensor, logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """log max(exp(log_scale) p - q, 0) from logp and logq [..., width] and log_scale [...]."""
    logp = logp + log_scale[..., None]
    return torch.where(logq < logp, logp + torch.log1p(-torch.exp(logq - logp)), NONE)


def _accepted_by_rejection(u: torch.Tensor, ratio: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """How many drafts [B] to keep: before the first that is not valid or has u >= p / q. Arguments [B, k]."""
    return ((u.log() < ratio) & valid).long().cumprod(1).sum(1)


def _block_log_scales(ratio: torch.Tensor) -> torch.Tensor:
    """log p_i of block verification, [B, k + 1]: p_0 = 1, p_i = min(1, p_{i-1} p / q)."""
    scales = [torch.zeros_like(ratio[:, :1])]
    for i in range(ratio.shape[1]):
        scales.append((scales[-1] + ratio[:, i : i + 1]).nan_to_num(nan=NONE, posinf=0.0, neginf=NONE).clamp(max=0.0))
    return torch.cat(scales, 1)


def _accepted_by_block(
    u: torch.Tensor, log_scales: torch.Tensor, beyond: torch.Tensor, drafts: torch.Tensor, greedy: torch.Tensor
) -> torch.Tensor:
    """How many drafts [B] to keep: the longest block i <= drafts [B] with u_i < h_i. No early stop.

    `beyond` [B, k] holds Z_1 .. Z_k, where Z_{i+1} = sum max(p_i p - q, 0) at the position after block i.
    """
    scale = log_scales[:, 1:].exp()  # p_1 .. p_k
    after = torch.cat((beyond[:, 1:], torch.zeros_like(beyond[:, :1])), 1)
    h = torch.where(scale < 1, after / (after + 1 - scale), 1.0)
    length = torch.arange(1, u.shape[1] + 1, device=u.device)
    h = torch.where((length == drafts[:, None]) | greedy[:, None], scale, h)
    kept = torch.where((u < h) & (length <= drafts[:, None]), length, 0)
    return torch.cat((torch.zeros_like(drafts)[:, None], kept), 1).amax(1)


def _valid(draft_tokens, num_draft_tokens, draft: RowStatistics | None, greedy, shard: VocabShard):
    """bool [B, k]: drafts of the request that its draft model can have drawn; the first that is not ends the draft."""
    valid = (draft_tokens >= 0) & (draft_tokens < shard.vocab_size)
    if draft is not None:
        valid &= (draft.log_probability > NONE) | greedy[:, None]
    if num_draft_tokens is not None:
        valid &= torch.arange(draft_tokens.shape[1], device=valid.device) < num_draft_tokens[:, None]
    return valid.long().cumprod(1).bool()


def verify(
    target_logits,
    draft_tokens,
    draft_logits,
    seed,
    step,
    temperature,
    num_draft_tokens,
    top_k,
    top_p,
    min_p,
    method: str,
    shard: VocabShard,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, num_accepted and logprobs of `fp.verify`; the arguments are those, as tensors."""
    batch, k = draft_tokens.shape
    if method == "greedy":
        temperature = torch.zeros_like(temperature)
    weights, greedy = target_weights(target_logits, temperature, top_k, top_p, min_p, shard)
    rows = [(weights, torch.nn.functional.pad(draft_tokens, (0, 1), value=-1))]
    if draft_logits is not None:
        draft_weights = shard.clean(draft_logits).double()
        rows.append((draft_weights, draft_tokens))
    target, draft = (*shard.statistics(*rows), None)[:2]

    logp_token = target.log_probability[:, :k]
    is_argmax = torch.where(draft_tokens == target.argmax[:, :k], 0.0, NONE)
    # log p / q of the drafts; q of a point mass is 1, and that of a greedy request does not matter.
    ratio = logp_token if draft is None else logp_token - draft.log_probability
    ratio = torch.where(greedy[:, None], is_argmax, ratio)
    valid = _valid(draft_tokens, num_draft_tokens, draft, greedy, shard)
    drafts = valid.sum(1)
    position = torch.arange(k, device=draft_tokens.device)
    u = noise.uniform(seed[:, None], step[:, None], position, "accept")

    if method == "block":
        log_scales = _block_log_scales(ratio)
        if draft is None:
            mass = (target.maximum[:, :k] > NONE).double()  # none in a row without a finite logit
            beyond = log_scales[:, :k].exp() * (mass - logp_token.exp()).clamp(min=0.0)
        else:
            logp, logq = target.normalise(weights)[:, :k], draft.normalise(draft_weights)
            beyond = shard.sum(residual(log_scales[:, :k], logp, logq).exp())
        accepted = _accepted_by_block(u, log_scales, beyond, drafts, greedy)
    else:
        log_scales = torch.zeros(batch, k + 1, dtype=torch.float64, device=u.device)
        accepted = _accepted_by_rejection(u, ratio, valid)

    def row(x: torch.Tensor) -> torch.Tensor:
        return x.take_along_dim(accepted.clamp(max=x.shape[1] - 1)[:, None, None], 1)[:, 0]

    logp = row(target.normalise(weights))
    candidates = [logp]
    if k:
        refused = draft_tokens.take_along_dim(accepted.clamp(max=k - 1)[:, None], 1)
        if draft is None:
            rest = logp.masked_fill(shard.ids(logp.device) == refused, NONE)
        else:
            scale = log_scales.take_along_dim(accepted[:, None], 1)[:, 0]
            rest = residual(scale, logp, row(draft.normalise(draft_weights)))
        whole = (accepted == drafts) | greedy
        candidates.insert(0, torch.where(whole[:, None], logp, rest))
    last, logp_last = shard.draw(candidates, logp, greedy, seed, step, accepted, "residual")

    length = torch.arange(k + 1, device=last.device)
    drafted = torch.nn.functional.pad(draft_tokens, (0, 1), value=-1)
    tokens = torch.where(length < accepted[:, None], drafted, -1).where(length != accepted[:, None], last[:, None])
    logprobs = torch.where(length < accepted[:, None], target.log_probability, 0.0)
    logprobs = logprobs.where(length != accepted[:, None], logp_last[:, None])
    return tokens, accepted.int(), logprobs.float()
