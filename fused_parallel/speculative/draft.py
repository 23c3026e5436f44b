"""Where drafted tokens come from: a smaller model, or the sequence itself."""

from __future__ import annotations

import torch

from .. import ops
from .tree import PlacedTree


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

    def prefill(self, input_ids: torch.Tensor, lens: torch.Tensor, chunk: int | None = None) -> None:
        """Take in the prompts: ids [B, S] padded on the right, `chunk` tokens at a time (None: all), their lengths
        int32 [B]. Of a new cache."""
        chunk, first = chunk or input_ids.shape[1], torch.zeros_like(lens, dtype=torch.int64)
        for start in range(0, input_ids.shape[1], chunk):
            self.cache.lens.fill_(start)
            self.cache.context = start
            self.model(input_ids[:, start : start + chunk], self.cache, logits_at=first)  # of which none is wanted
        self.cache.context = None

    def propose(
        self,
        history: torch.Tensor,
        lens: torch.Tensor,
        k: int,
        *,
        missed: int,
        seed: torch.Tensor,
        step: torch.Tensor,
        temperature: torch.Tensor,
        greedy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Draft k tokens a sequence.

        Args:
            history: int64 [B, capacity]: the tokens so far; the first lens + 1 of each sequence count.
            lens: int32 [B]: tokens the target has cached; one more, at that position, it has not seen yet. Setting the
                draft's cache by it is the rollback of what the target rejected.
            missed: tokens a sequence that were decoded without a draft since the last call.
            greedy: all temperatures are 0; the draft is then a point mass.

        Returns:
            (tokens int64 [B, k], the log-weights they were sampled from [B, k, V], or None if greedy, None: all k
            count).
        """
        feed = self._unseen(history, lens, missed)
        drawn = temperature > 0
        tokens, weights = [], []
        for i in range(k):
            logits = self.model(feed, self.cache)[:, -1, : self.vocab_size]
            self.cache.lens += feed.shape[1]
            if greedy:
                token = ops.sample(logits, seed=seed, step=step, temperature=0.0, position=i)
            else:
                # A row drafted at temperature 0 comes from a point mass.
                scaled = _scaled(logits, temperature)
                token = ops.sample(scaled, seed=seed, step=step, temperature=drawn.float(), position=i)
                point = torch.full_like(scaled, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)
                weights.append(torch.where(drawn.unsqueeze(1), scaled, point))
            tokens.append(token)
            feed = token.unsqueeze(1)
        return torch.stack(tokens, 1), None if greedy else torch.stack(weights, 1), None

    def propose_tree(
        self,
        history: torch.Tensor,
        lens: torch.Tensor,
        placed: PlacedTree,
        *,
        missed: int,
        seed: torch.Tensor,
        step: torch.Tensor,
        temperature: torch.Tensor,
        greedy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft a tree of N tokens a sequence, depth by depth; arguments as of `propose`.

        Siblings are the most likely tokens where the temperature is 0, else drawn one after the other without those
        before them: as the argmax of log-weight + noise, the same noise for all of a node's children.

        Returns:
            (tokens int64 [B, N], the log-weights each was drawn from before any sibling was removed [B, N, V], or None
            if greedy): "without_replacement" and "deterministic" siblings of `fp.verify_tree`.
        """
        tree, batch = placed.tree, history.shape[0]
        tokens = torch.zeros(batch, tree.nodes, dtype=torch.int64, device=history.device)
        weights = None
        logits = self.model(self._unseen(history, lens, missed), self.cache)[:, -1:, : self.vocab_size]
        self.cache.lens.copy_(lens + 1)
        for depth in range(1, tree.depth + 1):
            above = [-1] if depth == 1 else list(tree.level(depth - 1))
            if depth > 1:
                # All nodes so far once more: those of one depth alone would see every branch behind them.
                end = above[-1] + 1
                logits = self.model(tokens[:, :end], self.cache, tree=placed.down_to[depth - 2])
                logits = logits[:, above[0] :, : self.vocab_size]
            for row, parent in enumerate(above):
                children = tree.children(parent)
                if not children:
                    continue
                left = logits[:, row].float() if greedy else _scaled(logits[:, row], temperature)
                if not greedy:
                    if weights is None:
                        weights = left.new_empty(batch, tree.nodes, self.vocab_size)
                    weights[:, children.start : children.stop] = left.unsqueeze(1)
                left = left.clone()
                for child in children:
                    heat = 0.0 if greedy else (temperature > 0).float()
                    token = ops.sample(left, seed=seed, step=step, temperature=heat, position=parent + 1)
                    tokens[:, child] = token
                    left.scatter_(1, token.unsqueeze(1), -torch.inf)
        self.cache.lens.copy_(lens)  # where `keep_path` expects the root
        return tokens, weights

    def catch_up(self, history: torch.Tensor, lens: torch.Tensor, missed: int) -> None:
        """Take in the tokens of rounds without a draft; arguments as of `propose`, which misses nothing then."""
        feed = self._unseen(history, lens, missed)
        self.model(feed, self.cache, logits_at=torch.zeros_like(lens, dtype=torch.int64))

    def _unseen(self, history: torch.Tensor, lens: torch.Tensor, missed: int) -> torch.Tensor:
        """The tokens to begin a round with, the last of each sequence among them; sets the cache's lengths to what is
        before them."""
        # The draft has never seen the last token it proposed itself (of a tree: those of the last depth); feeding two
        # tokens covers the case that it was accepted, and rewrites the same values otherwise.
        window = missed + 2
        # A sequence that stands still may be shorter than what the others missed: it begins at its first token and
        # repeats its last, behind which there are none. What it drafts does not count.
        start, last = (lens + 1 - window).clamp_min(0), lens.long().unsqueeze(1)
        self.cache.lens.copy_(start)
        at = start.long().unsqueeze(1) + torch.arange(window, device=lens.device)
        return history.gather(1, torch.minimum(at, last))


def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Scaled before sampling, so that what verification is given is exactly what was sampled from."""
    return logits.float() / temperature.clamp_min(1e-30).unsqueeze(1)


class NgramDraft:
    """Drafts what followed the last tokens when they stood in the sequence before ("prompt lookup"); costs no model.

    The longest match counts, of 3 tokens, of 2 or of 1, and among equals the latest. Drafts are point masses; where
    nothing matches, or the sequence ends before k tokens, a sequence's draft is shorter. Everything happens on the
    device, without synchronisation. Source: Saxena 2023, "Prompt Lookup Decoding".
    """

    longest = 3

    def prefill(self, input_ids: torch.Tensor, lens: torch.Tensor, chunk: int | None = None) -> None:
        """There is nothing to take in: the history is given with every call."""

    def propose(self, history: torch.Tensor, lens: torch.Tensor, k: int, **_):
        """(tokens int64 [B, k], None, how many of them count int32 [B]); arguments as of ModelDraft."""
        last = lens.long().unsqueeze(1)  # position of the last token
        at = torch.arange(history.shape[1], device=history.device)
        # Positions whose tokens, and as many before them, equal the last ones: for 1, 2, 3 tokens.
        matches = at < last
        best = torch.full_like(last, -1)
        for back in range(self.longest):
            token = history.gather(1, (last - back).clamp_min(0))
            shifted = torch.full_like(history, -1)
            shifted[:, back:] = history[:, : history.shape[1] - back]
            matches = matches & (shifted == token) & (last >= back) & (at >= back)
            found = torch.where(matches, at, -1).amax(1, keepdim=True)
            best = torch.where(found >= 0, found, best)
        count = torch.where(best >= 0, (last - best).clamp(max=k), 0)
        tokens = history.gather(1, (best + 1 + torch.arange(k, device=history.device)).clamp(0, history.shape[1] - 1))
        valid = torch.arange(k, device=history.device) < count
        return torch.where(valid, tokens, 0), None, count.squeeze(1).to(torch.int32)
