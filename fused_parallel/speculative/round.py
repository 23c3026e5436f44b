"""One round of generation on the device: draft k tokens, run the model on them, verify, move on.

Nothing in a round waits for the host and all its state lies in tensors that keep their place, so that a round can be
captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import torch

from .. import ops
from ..comm import collectives
from .draft import ModelDraft


class Round:
    """State of a batch of sequences, and the step from one round to the next.

    Args:
        model: a LlamaForCausalLM.
        draft: a smaller one, or None: k is 0 and a round yields one token.
        k: tokens drafted a round.
        capacity: of the KV caches, in tokens.
        seed, temperature, sampling, method: as `fp.verify` takes them, [B] on the model's device.

    Attributes, on the device, B sequences:
        tokens: int64 [B, k + 1], accepted: int32 [B]: the last round's verdict, the same on every rank.
        alive: bool [B]: sequences that go on; the others stand still. The caller clears it.
    """

    def __init__(self, model, draft, k: int, batch: int, capacity: int, *, seed, temperature, sampling, method) -> None:
        self.model, self.k, self.method, self.sampling = model, k, method, sampling
        self.seed, self.temperature = seed, temperature
        self.greedy = not bool((temperature > 0).any())
        self.tp, self.pp = model.tp_group, model.pp_group
        self.is_last = self.pp.rank() == self.pp.size() - 1
        self.cache = model.make_cache(batch, capacity)
        self.drafter = ModelDraft(draft, batch, capacity) if draft is not None and self.is_last else None
        like = {"dtype": torch.int64, "device": model.device}
        self.step = torch.zeros(batch, **like)
        self.previous, self.pending = torch.zeros(batch, **like), torch.zeros(batch, **like)
        self.drafts = torch.zeros(batch, k, **like)
        self.tokens = torch.zeros(batch, k + 1, **like)
        self.accepted = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, ids: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """Take in the prompts, ids [B, S] padded on the right, lens int32 [B]; the first new token of each, [B]."""
        last = (lens - 1).long()
        none = self.drafts[:, :0]
        first = self._verify(ids, none, None, logits_at=last)[:, 0]
        if self.drafter is not None:
            self.drafter.prefill(ids, lens)
        self.cache.lens.copy_(lens)
        self.previous.copy_(ids.gather(1, last.unsqueeze(1)).squeeze(1))
        self.pending.copy_(first)
        return first

    def run(self) -> None:
        """The next round, on the current stream: eager, or by the captured graph."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def capture(self) -> None:
        """Capture the round in a CUDA graph. The state is as before when it returns."""
        state = [self.step, self.previous, self.pending, self.cache.lens]
        saved = [t.clone() for t in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()  # what is made at first use is made outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        for t, value in zip(state, saved, strict=True):
            t.copy_(value)
        self._graph = graph

    def _run(self) -> None:
        self.step += 1
        draft_logits = None
        if self.k:
            if self.drafter is not None:
                proposed, draft_logits = self.drafter.propose(
                    torch.stack((self.previous, self.pending), 1),
                    self.cache.lens,
                    self.k,
                    seed=self.seed,
                    step=self.step,
                    temperature=self.temperature,
                    greedy=self.greedy,
                )
                self.drafts.copy_(proposed)
            self._share(self.drafts)
        fed = torch.cat((self.pending.unsqueeze(1), self.drafts), 1)
        verdict = self._verify(fed, self.drafts, draft_logits)
        self.tokens.copy_(verdict[:, :-1])
        self.accepted.copy_(verdict[:, -1])
        # A finished sequence stands still, so that it never outgrows the cache.
        self.cache.lens += (self.accepted + 1) * self.alive
        at = self.accepted.long().unsqueeze(1)
        chain = torch.cat((self.pending.unsqueeze(1), self.tokens), 1)
        self.previous.copy_(torch.where(self.alive, chain.gather(1, at).squeeze(1), self.previous))
        self.pending.copy_(torch.where(self.alive, chain.gather(1, at + 1).squeeze(1), self.pending))

    def _share(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank gets the `x` of the last stage's first rank. Ranks that computed it themselves hold the same bits
        on equal machines; sending it anyway keeps them from drifting apart on unequal ones, where a mismatch would
        hang."""
        if self.is_last:
            collectives.broadcast_(x, 0, self.tp)
        return collectives.broadcast_(x, self.pp.size() - 1, self.pp)

    def _verify(self, input_ids, drafts, draft_logits, logits_at=None) -> torch.Tensor:
        """Run the model on `input_ids` and judge `drafts` [B, k]: int64 [B, k + 2], the tokens, then how many were
        accepted."""
        logits = self.model(input_ids, self.cache, logits_at)
        batch, k = drafts.shape
        verdict = torch.empty(batch, k + 2, dtype=torch.int64, device=input_ids.device)
        if logits is not None:
            group = self.tp if self.tp.size() > 1 else None
            if draft_logits is not None and group is not None:
                draft_logits = _shard_of(draft_logits, logits.shape[-1], self.tp.rank())
            result = ops.verify(
                logits,
                drafts,
                draft_logits,
                seed=self.seed,
                step=self.step,
                temperature=self.temperature,
                method=self.method,
                vocab_size=self.model.config.vocab_size,
                vocab_group=group,
                **self.sampling,
            )
            verdict[:, :-1], verdict[:, -1] = result.tokens, result.num_accepted
        return self._share(verdict)


def _shard_of(weights: torch.Tensor, local: int, rank: int) -> torch.Tensor:
    """This rank's vocabulary shard of the draft's full log-weights, padded with -inf."""
    part = weights[..., rank * local : (rank + 1) * local]
    return torch.nn.functional.pad(part, (0, local - part.shape[-1]), value=-torch.inf)
