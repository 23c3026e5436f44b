"""How many tokens to draft: as many as pay, by what rounds have cost and how often drafts were right."""

from __future__ import annotations

import statistics
from collections import deque

LENGTHS = (0, 1, 2, 3, 4, 6, 8)  # tried draft lengths; 0 is plain decoding
# Where every pass streams the weights, a round costs about the same whatever its length.
LENGTHS_OFFLOADED = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32)
_FIRST = (4, 0, 4, 0, 1)  # costs and acceptance are unknown at first
_LOOK_AROUND = 32  # rounds between two looks at a neighbour of the best length
_MOST_APART = 512  # where drafting does not pay, each look is twice as far from the one before, up to this
_MEMORY = 0.95  # weight of what was seen a round ago


class AdaptiveLength:
    """Chooses a round's draft length for the largest expected number of tokens a second, for the batch as a whole.

    A draft of k tokens of which each is accepted with probability a yields 1 + a + ... + a^k tokens a sequence. `a` is
    estimated over the last rounds, and a round's time as the median of its length's last five; of lengths that have not
    been seen it is interpolated. Every 32nd round takes a neighbour of the best length, so that changes are noticed:
    where drafting does not pay, one round in 32 with one drafted token.

    Ranks that record the same numbers choose the same lengths.
    """

    def __init__(self, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.lengths = lengths
        self.first = [k for k in _FIRST if k in lengths]
        self.times: dict[int, deque[float]] = {}
        self.accepted, self.rejected = 0.0, 0.0
        self.rounds = 0
        self.apart, self.look = _LOOK_AROUND, _LOOK_AROUND  # rounds between looks, and the round of the next

    def record(self, k: int, microseconds: float, drafted: int, accepted: int, rejected: int) -> None:
        """A round of length k took `microseconds`; of its `drafted` tokens `accepted` were, and in `rejected` sequences
        one was not (those behind it say nothing)."""
        if microseconds > 0:
            self.times.setdefault(k, deque(maxlen=5)).append(microseconds)
        if drafted:
            if accepted > self.acceptance * (accepted + rejected):
                self.apart, self.look = _LOOK_AROUND, min(self.look, self.rounds + _LOOK_AROUND)
            self.accepted = _MEMORY * self.accepted + accepted
            self.rejected = _MEMORY * self.rejected + rejected

    @property
    def acceptance(self) -> float:
        """The estimated probability that a drafted token is accepted, given that those before it were."""
        return (self.accepted + 1.0) / (self.accepted + self.rejected + 2.0)

    def time(self, k: int) -> float:
        """The expected microseconds of a round of length k."""
        seen = sorted((length, statistics.median(times)) for length, times in self.times.items())
        if len(seen) == 1:
            return seen[0][1]
        # Linear between the neighbours that were seen, or beyond the last two of them.
        right = next((i for i, (length, _) in enumerate(seen) if length >= k), len(seen) - 1)
        (a, at_a), (b, at_b) = seen[max(right - 1, 0)], seen[max(right, 1)]
        return max(at_a + (at_b - at_a) * (k - a) / (b - a), min(at_a, at_b) / 2)

    def rate(self, k: int) -> float:
        """Expected tokens a microsecond, of one sequence."""
        return sum(self.acceptance**i for i in range(k + 1)) / self.time(k)

    def choose(self) -> int:
        """The length of the next round."""
        self.rounds += 1
        if self.rounds <= len(self.first):
            return self.first[self.rounds - 1]
        if not self.times:
            return self.lengths[0]
        best = max(self.lengths, key=self.rate)
        if self.rounds < self.look:
            return best
        self.apart = _LOOK_AROUND if best else min(2 * self.apart, _MOST_APART)
        self.look = self.rounds + self.apart
        at = self.lengths.index(best) + (1 if self.look // _LOOK_AROUND % 2 == 0 or best == 0 else -1)
        return self.lengths[min(max(at, 0), len(self.lengths) - 1)]
