"""What to draft: as many tokens, or the tree of them, as pay, by what rounds have cost and how often drafts were
right."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence

from .tree import Tree, likely_tree

LENGTHS = (0, 1, 2, 3, 4, 6, 8)  # tried draft lengths; 0 is plain decoding
# Where every pass streams the weights, a round costs about the same whatever its length.
LENGTHS_OFFLOADED = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32)
_FIRST = (4, 0, 4, 0, 1)  # costs and acceptance are unknown at first
_WORTH_FIRST = 1.1  # tokens a sequence below which one of these is left out: the batch has shown that drafts are wrong
_LOOK_AROUND = 32  # rounds between two looks at a neighbour of the best length
_MOST_APART = 512  # where drafting does not pay, each look is twice as far from the one before, up to this
_MEMORY = 0.95  # weight of what was seen a round ago
_LOOK_COST = 0.02  # what a look at a tree, or at a draft where none pays, may cost, of the time since the last
_PLAIN_LOOK = 4  # of so many looks from a length that is best one is at plain decoding
# Trees for drafts that are right so often, where they are wrong mostly for siblings (nodes, depth, acceptance): the
# set by which a choice comes nearest to the best tree of 63 nodes, for acceptances of 0.3 to 0.9 and drafts of 1 to 10
# % of a pass (docs/offload.md), and two smaller ones for passes that take longer for more tokens.
_TREES = ((15, 2, 0.5), (31, 6, 0.7), (63, 3, 0.5), (63, 5, 0.5), (63, 9, 0.8), (63, 14, 0.9))
_OF_SIBLINGS = (0.35, 0.25, 0.2, 0.2, 0.2)  # acceptance of the second, third, ... that those trees are made for


def offloaded_trees(vocab_size: int) -> list[Tree]:
    """Those to choose from where every pass streams the weights."""
    siblings = _OF_SIBLINGS[: vocab_size - 1]
    return [likely_tree(nodes, depth, (acceptance, *siblings)) for nodes, depth, acceptance in _TREES]


class AdaptiveLength:
    """Chooses a round's draft, a length or one of `trees`, for the largest expected number of tokens a second, for the
    batch as a whole.

    A draft of k tokens of which each is accepted with probability a yields 1 + a + ... + a^k tokens a sequence, of
    which those beyond the first count only as far as there is a draft: n-gram drafts are of some sequences, and
    shorter. A tree yields as many, in the mean, as its accepted path is long, with a probability of its own for
    siblings that are tried second, third and so on. They are estimated over the last rounds, and a round's time as
    the median of the last five of its kind; of lengths that have not been seen it is interpolated, of trees it is
    that of their depth and what trees that were seen took more for each further node. Every 32nd round takes a
    neighbour of the best length, in turn with the best tree and with plain decoding, so that changes are noticed.
    Where drafting does not pay that is a round in 32 to 512, with one drafted token or in turn with a longer draft
    that was seen. Such a look, and one at a tree, is taken only where it costs little.

    Ranks that record the same numbers choose the same.
    """

    def __init__(self, lengths: tuple[int, ...] = LENGTHS, trees: Sequence[Tree] = ()) -> None:
        self.lengths, self.trees = lengths, list(trees)
        self.first: list[int | Tree] = [k for k in _FIRST if k in lengths]
        if self.trees:
            small = min(self.trees, key=lambda tree: tree.nodes)
            self.first[2:2], self.first[5:5] = [small], [small]  # twice: what comes for the first time takes longer
        self.times: dict[int | Tree, deque[float]] = {}
        places = max((max(tree.places) + 1 for tree in self.trees), default=1)
        self.accepted, self.rejected = [0.0] * places, [0.0] * places  # by place among siblings
        self.offered = self.wanted = 0.0  # drafted tokens, and those that would have been, had every sequence had all
        self.rounds = self.looks = 0
        self.apart, self.look = _LOOK_AROUND, _LOOK_AROUND  # rounds between looks, and the round of the next

    @property
    def most(self) -> int:
        """Tokens that a round may draft."""
        return max(*self.lengths, *(tree.nodes for tree in self.trees))

    def record(
        self,
        shape: int | Tree,
        microseconds: float,
        drafted: int,
        accepted: int,
        rejected: int,
        later: Sequence[Sequence[int]] = (),
        wanted: int | None = None,
    ) -> None:
        """A round of a length or tree took `microseconds`; of its `drafted` tokens `accepted` were, and in `rejected`
        sequences one was not (those behind it say nothing). Of a tree that is said of siblings tried first, and of
        those tried second, third, ... `later` has the same two numbers. `wanted`: tokens that would have been drafted,
        had every sequence had as many as the length says (None: they had)."""
        if microseconds > 0:
            self.times.setdefault(shape, deque(maxlen=5)).append(microseconds)
        if wanted or drafted:
            self.offered = _MEMORY * self.offered + drafted
            self.wanted = _MEMORY * self.wanted + (drafted if wanted is None else wanted)
        if not drafted:
            return
        tried = [(accepted, rejected), *later]
        known = [(a, right + wrong) for a, (right, wrong) in zip(self.acceptances(), tried, strict=False)]
        expected, variance = sum(a * n for a, n in known), sum(a * (1 - a) * n for a, n in known)
        if sum(right for right, _ in tried) > expected + 2 * variance**0.5:  # drafts are better than they were
            self.apart, self.look = _LOOK_AROUND, min(self.look, self.rounds + _LOOK_AROUND)
        for place, (right, wrong) in enumerate(tried):
            if right + wrong:
                self.accepted[place] = _MEMORY * self.accepted[place] + right
                self.rejected[place] = _MEMORY * self.rejected[place] + wrong

    def acceptances(self) -> list[float]:
        """The estimated probability that a drafted token is accepted, given that those before it were, and that the
        sibling tried after it is, given that it was not, and so on. Of siblings nothing has been seen of each is worth
        half the one before: a tree is not taken for hope alone."""
        found, before = [], 1.0
        for right, wrong in zip(self.accepted, self.rejected, strict=True):
            before = (right + before / 2) / (right + wrong + 1.0)
            found.append(before)
        return found

    def time(self, shape: int | Tree) -> float:
        """The expected microseconds of a round."""
        if shape in self.times:
            return statistics.median_low(self.times[shape])
        if isinstance(shape, Tree):
            further = [
                max(0.0, self.time(tree) - self.time(tree.depth)) / (tree.nodes - tree.depth)
                for tree in self.trees
                if tree in self.times
            ]
            each = sum(further) / len(further) if further else 0.0
            return self.time(shape.depth) + each * (shape.nodes - shape.depth)
        seen = sorted((k, statistics.median_low(times)) for k, times in self.times.items() if isinstance(k, int))
        if len(seen) == 1:
            return seen[0][1]
        # Linear between the neighbours that were seen, or beyond the last two of them.
        right = next((i for i, (length, _) in enumerate(seen) if length >= shape), len(seen) - 1)
        (a, at_a), (b, at_b) = seen[max(right - 1, 0)], seen[max(right, 1)]
        return max(at_a + (at_b - at_a) * (shape - a) / (b - a), min(at_a, at_b) / 2)

    def tokens(self, shape: int | Tree, covered: float | None = None) -> float:
        """Expected tokens of one sequence in a round; covered: the share of drafts that there are, default that of the
        last rounds."""
        acceptances = self.acceptances()
        if not isinstance(shape, Tree):
            if covered is None:
                covered = (self.offered + 1.0) / (self.wanted + 1.0)
            return 1.0 + covered * sum(acceptances[0] ** i for i in range(1, shape + 1))
        share = list(itertools.accumulate((1 - a for a in acceptances), lambda left, x: left * x, initial=1.0))
        reached = [1.0]  # of the root, then of each node: how often it is accepted
        for parent, place in zip(shape.parents, shape.places, strict=True):
            reached.append(reached[parent + 1] * share[place] * acceptances[place])
        return sum(reached)

    def rate(self, shape: int | Tree) -> float:
        """Expected tokens a microsecond, of one sequence."""
        return self.tokens(shape) / self.time(shape)

    def choose(self) -> int | Tree:
        """What to draft in the next round: so many tokens, or this tree."""
        self.rounds += 1
        if self.rounds <= len(self.first):
            first = self.first[self.rounds - 1]
            # By what drafts are worth where there are any: n-grams find more as the text grows.
            return first if self.tokens(first, 1.0) >= _WORTH_FIRST or 0 not in self.lengths else 0
        if not any(isinstance(shape, int) for shape in self.times):
            return self.lengths[0]
        if 0 in self.lengths and 0 not in self.times:
            return 0  # what all else is held against is never guessed
        best = max((*self.lengths, *self.trees), key=self.rate)
        if self.rounds < self.look:
            return best
        self.apart = _LOOK_AROUND if best else min(2 * self.apart, _MOST_APART)
        self.look = self.rounds + self.apart
        self.looks += 1
        if self.trees and self.looks % 2:
            # The best of the other kind.
            if isinstance(best, Tree):
                return max(self.lengths, key=self.rate)
            tree = max(self.trees, key=self.rate)
            if self._costs_little(tree, best):
                return tree
        turn = self.looks // 2 if self.trees else self.looks
        if best == 0 and turn % 2 == 0:
            seen = [k for k in self.lengths[2:] if k in self.times]  # others might have to be captured for this
            if seen and self._costs_little(length := seen[turn // 2 % len(seen)], best):
                return length
        if best != 0 and 0 in self.lengths and turn % _PLAIN_LOOK == 0:
            return 0
        kind = self.trees if isinstance(best, Tree) else self.lengths
        up = (self.looks // 2 if self.trees else self.look // _LOOK_AROUND) % 2 == 0
        at = kind.index(best) + (1 if up or best == 0 else -1)
        look = kind[min(max(at, 0), len(kind) - 1)]
        return look if best != 0 or self._costs_little(look, best) else best

    def _costs_little(self, look: int | Tree, best: int | Tree) -> bool:
        lost = self.time(look) - self.tokens(look) / self.rate(best)
        return lost < _LOOK_COST * self.apart * self.time(best)
