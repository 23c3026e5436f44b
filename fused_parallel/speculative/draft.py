"""Where drafted tokens come from."""

from __future__ import annotations

import torch

from .. import ops


class ModelDraft:
    """Drafts with a smaller model, which every rank that uses it holds whole.

    Args:
        model: a LlamaForCausalLM made with mesh=None, of the target's vocabulary.
        batch, capacity: of its KV cache, in tokens.
    """

    def __init__(self, model, batch: int, capacity: int) -> None:
        self.model = model
        self.cache = model.make_cache(batch, capacity)
        self.vocab_size = model.config.vocab_size

    def prefill(self, input_ids: torch.Tensor, lens: torch.Tensor) -> None:
        """Take in the prompts: ids [B, S] padded on the right, their lengths int32 [B]."""
        self.model(input_ids, self.cache, logits_at=(lens - 1).long())

    def propose(
        self,
        last_two: torch.Tensor,
        lens: torch.Tensor,
        k: int,
        *,
        seed: torch.Tensor,
        step: torch.Tensor,
        temperature: torch.Tensor,
        greedy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft k tokens a sequence.

        Args:
            last_two: int64 [B, 2]: the last two tokens, the second not yet seen by the target.
            lens: int32 [B]: tokens the target has cached; the second of `last_two` stands at that position. Setting the
                draft's cache by it is the rollback of what the target rejected.
            greedy: all temperatures are 0; the draft is then a point mass.

        Returns:
            (tokens int64 [B, k], the log-weights they were sampled from [B, k, V], or None if greedy).
        """
        # The draft has never seen the last token it proposed itself; feeding two tokens covers the case that it was
        # accepted, and rewrites the same values otherwise.
        self.cache.lens.copy_(lens - 1)
        drawn = temperature > 0
        tokens, weights, feed = [], [], last_two
        for i in range(k):
            logits = self.model(feed, self.cache)[:, -1, : self.vocab_size]
            self.cache.lens += feed.shape[1]
            if greedy:
                token = ops.sample(logits, seed=seed, step=step, temperature=0.0, position=i)
            else:
                # Scaled before sampling, so that what verify is given is exactly what was sampled from. A row drafted
                # at temperature 0 comes from a point mass.
                scaled = logits.float() / temperature.clamp_min(1e-30).unsqueeze(1)
                token = ops.sample(scaled, seed=seed, step=step, temperature=drawn.float(), position=i)
                point = torch.full_like(scaled, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)
                weights.append(torch.where(drawn.unsqueeze(1), scaled, point))
            tokens.append(token)
            feed = token.unsqueeze(1)
        return torch.stack(tokens, 1), None if greedy else torch.stack(weights, 1)
