"""The rules of verification in fractions: what every comparison of a uniform may decide, and the law that comes of it.

A round is a list of outcomes. Each says on which side of which threshold the uniforms lie, which drafts are kept then,
and the weights that the token after them is drawn by. `output_law` sums over them; test_verify_exact.py holds the
library to the same thresholds and weights. Laws are tuples of Fractions, models functions of the tokens before.
"""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import NamedTuple


class Outcome(NamedTuple):
    decisions: dict  # of the drafts whose uniform matters: (threshold, whether the uniform lies below it)
    kept: tuple  # indices of the kept drafts
    weights: tuple  # of the next token, not normalised

    @property
    def probability(self):
        product = Fraction(1)
        for threshold, below in self.decisions.values():
            product *= threshold if below else 1 - threshold
        return product


def normalise(weights):
    total = sum(weights)
    return tuple(w / total for w in weights)


def one_hot(token, vocab):
    return tuple(Fraction(int(t == token)) for t in range(vocab))


def argmax_law(p):
    return one_hot(p.index(max(p)), len(p))


def residual(p, q, scale):
    """max(scale p - q, 0)."""
    return tuple(max(scale * a - b, Fraction(0)) for a, b in zip(p, q, strict=True))


def whole_target(p, q, scale):
    """Wrong: the token after a refusal from p."""
    return p


def unscaled(p, q, scale):
    """Wrong for block: max(p - q, 0), whatever the scale."""
    return residual(p, q, Fraction(1))


# Chains: p of k + 1 positions and q of k after the drafts before them, and the drafts.


def rejection(p, q, drafts, rest=residual):
    outcomes, decisions = [], {}
    for i, x in enumerate(drafts):
        threshold = min(Fraction(1), p[i][x] / q[i][x])
        weights = rest(p[i], q[i], Fraction(1))
        outcomes.append(Outcome(decisions | {i: (threshold, False)}, tuple(range(i)), weights))
        decisions = decisions | {i: (threshold, True)}
    return [*outcomes, Outcome(decisions, tuple(range(len(drafts))), p[-1])]


def block_thresholds(p, q, drafts, scales):
    k, out = len(drafts), []
    for i in range(1, k):
        beyond = sum(residual(p[i], q[i], scales[i]))
        out.append(Fraction(1) if scales[i] == 1 else beyond / (beyond + 1 - scales[i]))
    return [*out, scales[k]] if k else []


def rejection_thresholds(p, q, drafts, scales):
    """Wrong for block: each draft by its own ratio."""
    return [min(Fraction(1), p[i][x] / q[i][x]) for i, x in enumerate(drafts)]


def block(p, q, drafts, rest=residual, thresholds=block_thresholds):
    k, scales = len(drafts), [Fraction(1)]
    for i, x in enumerate(drafts):
        scales.append(min(Fraction(1), scales[-1] * p[i][x] / q[i][x]))
    heights = thresholds(p, q, drafts, scales)
    outcomes = []
    for below in itertools.product((False, True), repeat=k):
        kept = max((i + 1 for i in range(k) if below[i]), default=0)
        weights = p[k] if kept == k else rest(p[kept], q[kept], scales[kept])
        outcomes.append(Outcome(dict(enumerate(zip(heights, below, strict=True))), tuple(range(kept)), weights))
    return outcomes


def greedy(p, q, drafts):
    """Drafts are kept while they are the argmax: the rule for point masses, of the argmax's own point mass."""
    p = [argmax_law(row) for row in p]
    return rejection(p, [one_hot(x, len(p[0])) for x in drafts], drafts)


# Trees: p of the root and of each node after its path, q of each node's parent, parents and drafts (None: no token).


def removed(q, token):
    """q without a token, () where nothing is left."""
    left = tuple(Fraction(0) if t == token else w for t, w in enumerate(q))
    return normalise(left) if any(left) else ()


def kept_in_q(q, token):
    """Wrong: siblings as if drawn with replacement."""
    return q


def tree(p, q, parents, drafts, rest=residual, remove=removed, scale=normalise):
    """q None: deterministic siblings, each a point mass."""
    outcomes = []

    def visit(node, tried, law, draft_law, decisions, path):
        """`tried`: how many nodes have been looked at; `law`, `draft_law`: what node's elder children left of them."""
        for child in range(tried, len(parents)):
            x = drafts[child]
            if parents[child] != node or x is None:
                continue
            if q is None:
                here = one_hot(x, len(law))
            else:
                here = q[child] if draft_law is None else draft_law
                if not here or here[x] == 0:
                    continue
            threshold = min(Fraction(1), law[x] / here[x])
            if threshold > 0:
                visit(child, child + 1, p[child + 1], None, decisions | {child: (threshold, True)}, (*path, child))
            if threshold == 1:
                return  # never refused
            left = rest(law, here, Fraction(1))
            law, draft_law = scale(left), None if q is None else remove(here, x)
            decisions = decisions | {child: (threshold, False)}
        outcomes.append(Outcome(decisions, path, law))

    visit(-1, 0, p[0], None, {}, ())
    return outcomes


# Models and the law of what comes out.


class Model:
    """Target and draft laws that depend on all tokens before, in the ways that verification must stand.

    `kinds` cycle over the prefixes: "other" (any two laws, with zeros), "equal" (q = p), "reversed" (q is p backwards),
    "impossible" (p = 0 at q's favourite token), "apart" (no token in both).
    """

    KINDS = ("other", "equal", "reversed", "impossible", "apart")

    def __init__(self, vocab, length, seed, kinds=KINDS):
        self.vocab, self.p, self.q = vocab, {}, {}
        rng = random.Random(seed)
        for n in range(length + 1):
            for prefix in itertools.product(range(vocab), repeat=n):
                kind = kinds[(len(self.p) + seed) % len(kinds)]
                p, q = self._law(rng), self._law(rng)
                if kind == "equal":
                    q = p
                elif kind == "reversed":
                    q = p[::-1]
                elif kind == "impossible" and vocab > 1:
                    p = removed(p, q.index(max(q))) or removed(normalise((Fraction(1),) * vocab), q.index(max(q)))
                elif kind == "apart" and vocab > 1:
                    token = rng.randrange(vocab)
                    p, q = removed(normalise((Fraction(1),) * vocab), token), one_hot(token, vocab)
                self.p[prefix], self.q[prefix] = p, q

    def _law(self, rng):
        weights = [Fraction(rng.choice((0, 1, 1, 2, 2, 3, 4, 5, 6, 7))) for _ in range(self.vocab)]
        weights[rng.randrange(self.vocab)] += 1
        return normalise(weights)

    def chain(self, drafts):
        """p and q along a chain of drafts."""
        prefixes = [tuple(drafts[:i]) for i in range(len(drafts) + 1)]
        return [self.p[x] for x in prefixes], [self.q[x] for x in prefixes[:-1]]

    def tree(self, parents, drafts):
        """p of the root and of each node, q of each node's parent; uniform after a node that has no token."""
        paths = {-1: ()}
        for node, parent in enumerate(parents):
            paths[node] = None if paths[parent] is None or drafts[node] is None else (*paths[parent], drafts[node])
        anything = normalise((Fraction(1),) * self.vocab)
        p = [anything if paths[n] is None else self.p[paths[n]] for n in range(-1, len(parents))]
        q = [anything if paths[n] is None else self.q[paths[n]] for n in parents]
        return p, q

    def greedy(self):
        """The same with the target's argmax instead of its law."""
        other = object.__new__(Model)
        other.vocab, other.q = self.vocab, self.q
        other.p = {prefix: argmax_law(law) for prefix, law in self.p.items()}
        return other

    def joint(self, length):
        """The target's law of `length` tokens."""
        return continued({(): Fraction(1)}, self, length)


def continued(law, model, length):
    """{tokens: probability} with tokens drawn from the target after each, up to `length`; no zeros."""
    law = dict(law)
    for n in range(length):
        for tokens in [x for x in law if len(x) == n]:
            mass = law.pop(tokens)
            for t, p in enumerate(model.p[tokens]):
                if mass * p:
                    law[(*tokens, t)] = law.get((*tokens, t), 0) + mass * p
    return law


def chain_drafts(model, k):
    """{drafts: probability} of k tokens drawn from q one after the other."""
    out = {(): Fraction(1)}
    for _ in range(k):
        out = {(*x, t): m * w for x, m in out.items() for t, w in enumerate(model.q[x]) if w}
    return out


def tree_drafts(model, parents):
    """{drafts: probability} of siblings drawn from q without replacement; None where q has nothing left."""
    out = {(): Fraction(1)}
    for node, parent in enumerate(parents):
        grown = {}
        for drafts, mass in out.items():
            law = model.tree(parents[: node + 1], (*drafts, None))[1][node]
            if parent >= 0 and drafts[parent] is None:
                law = ()
            for elder in range(node):
                if parents[elder] == parent and law:
                    law = removed(law, drafts[elder])
            for t, w in enumerate(law) if law else [(None, Fraction(1))]:
                if w:
                    grown[(*drafts, t)] = mass * w
        out = grown
    return out


def output_law(model, proposals, outcomes, length):
    """{tokens: probability} of a round and then of tokens drawn from the target up to `length`.

    `proposals` is {drafts: probability}, `outcomes` a function of drafts.
    """
    law = {}
    for drafts, mass in proposals.items():
        total = Fraction(0)
        for outcome in outcomes(drafts):
            probability = outcome.probability
            total += probability
            if not probability:
                continue
            kept = tuple(drafts[i] for i in outcome.kept)
            # A wrong rule may leave nothing to draw from: that mass is lost, and no law of tokens is the target's.
            for t, w in enumerate(normalise(outcome.weights) if any(outcome.weights) else ()):
                if w:
                    law[(*kept, t)] = law.get((*kept, t), 0) + mass * probability * w
        assert total == 1, (drafts, total)
    return continued(law, model, length)
