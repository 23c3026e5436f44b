"""What sampling and verification need of a vocabulary that may be spread over ranks: normalisers, thresholds, draws.

Each function exchanges a few float64 numbers a row in one all-gather and combines them in rank order, so that all ranks
hold the same bits. A shard of width V and no group is the whole vocabulary, by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..comm import collectives
from . import noise

NONE = float("-inf")  # the log-weight of a token that cannot be drawn


class RowStatistics(NamedTuple):
    """Of rows of log-weights over the whole vocabulary, float64, without the vocabulary's dimension."""

    maximum: torch.Tensor  # -inf where no token can be drawn
    argmax: torch.Tensor  # int64, the lowest id where several attain the maximum
    log_sum: torch.Tensor  # log of the sum of exp(weight - maximum), 0 where no token can be drawn
    log_probability: torch.Tensor  # of the row's given token; -inf where that is not in the vocabulary

    def normalise(self, weights: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of this rank's columns `weights` of the same rows."""
        return weights - _finite(self.maximum)[..., None] - self.log_sum[..., None]


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    return torch.where(maximum == NONE, 0.0, maximum)


def _greatest(parts: torch.Tensor) -> torch.Tensor:
    """Of [world, ..., n], the n numbers of the rank whose first is greatest; of the lowest rank, so id, where equal."""
    best = parts[0]
    for part in parts[1:]:
        best = torch.where(part[..., :1] > best[..., :1], part, best)
    return best


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns: ids rank * width to (rank + 1) * width - 1; those from vocab_size on are padding."""

    width: int
    vocab_size: int
    pg: dist.ProcessGroup | None = None

    @property
    def first(self) -> int:
        return self.pg.rank() * self.width if self.pg else 0

    def ids(self, device: torch.device) -> torch.Tensor:
        """Global token ids of the columns, int64 [width]."""
        return torch.arange(self.first, self.first + self.width, device=device)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[...] per rank -> [world, ...] on every rank."""
        return collectives.all_gather(x[None], self.pg) if self.pg else x[None]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the vocabulary of [..., width], added in rank order."""
        parts = self.gather(x.sum(-1))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum over the vocabulary of [..., width]."""
        return self.gather(x.amax(-1)).amax(0)

    def clean(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 logits without NaN (becomes -inf, as padding does) and +inf (becomes the largest float32)."""
        x = torch.nan_to_num(logits.float(), nan=NONE, posinf=torch.finfo(torch.float32).max, neginf=NONE)
        return x.masked_fill(self.ids(x.device) >= self.vocab_size, NONE)

    def pick(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """x[..., token] where this rank holds the token, else -inf: x [..., width], token int64 [...] of global ids."""
        column = token - self.first
        held = (column >= 0) & (column < self.width)
        value = x.gather(-1, column.clamp(0, self.width - 1)[..., None])[..., 0]
        return value.masked_fill(~held, NONE)

    def _best(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maximum of [..., width] and the lowest global id that attains it."""
        best = x.amax(-1)
        ids = self.ids(x.device)
        return best, torch.where(x == best[..., None], ids, ids[-1]).amin(-1)

    def statistics(self, *rows: tuple[torch.Tensor, torch.Tensor]) -> list[RowStatistics]:
        """One all-gather for the statistics of several (weights [B, R, width] float64, token int64 [B, R])."""
        mine = []
        for weights, token in rows:
            maximum, argmax = self._best(weights)
            total = (weights - _finite(maximum)[..., None]).exp().sum(-1)
            mine.append(torch.stack((maximum, argmax.double(), total, self.pick(weights, token)), -1))
        parts = self.gather(torch.cat(mine, 1))
        maximum, argmax = _greatest(parts[..., :2]).unbind(-1)
        total = torch.zeros_like(maximum)
        for part in parts:
            total = total + part[..., 2] * (part[..., 0] - _finite(maximum)).exp()
        log_sum = torch.where(maximum == NONE, 1.0, total).log()
        at_token = parts[..., 3].amax(0) - _finite(maximum) - log_sum
        whole = (maximum, argmax.long(), log_sum, at_token)
        out, begin = [], 0
        for weights, _ in rows:
            out.append(RowStatistics(*(x[:, begin : begin + weights.shape[1]] for x in whole)))
            begin += weights.shape[1]
        return out

    def draw(
        self,
        candidates: list[torch.Tensor],
        logp: torch.Tensor,
        greedy: torch.Tensor,
        seed,
        step,
        position,
        stream: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token per request by the Gumbel-max rule, the argmax where `greedy` [B]; one all-gather.

        `candidates` are log-weights [B, width], normalised or not; the first that leaves any token to draw counts, and
        id 0 is drawn where none does. Returns the global ids, int64 [B], and their entries of `logp` [B, width].
        """
        gumbel = noise.gumbel(seed, step, position, stream, self.first, self.width)
        score, token = self._best(torch.stack(candidates) + gumbel.masked_fill(greedy[:, None], 0.0))
        value = torch.stack([self.pick(logp, t) for t in token])
        best = _greatest(self.gather(torch.stack((score, token.double(), value), -1)))  # [candidates, B, 3]
        chosen = best[-1]
        for other in best[:-1].flip(0):
            chosen = torch.where(other[:, :1] > NONE, other, chosen)
        return chosen[:, 1].long(), chosen[:, 2]
