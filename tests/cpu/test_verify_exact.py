"""The rules of verification in exact arithmetic: the law they give is the target's, and the library follows them.

Two halves, over the same outcomes (_verify_exact.py): summed in fractions they give the target's joint law, with no
tolerance; and the library, given uniforms just below and just above each threshold, keeps the drafts and draws by the
weights that they say. A wrong rule fails the first half, a library changed in the same way the second.
"""

import functools
import itertools
import math
import random

import _verify_exact as exact
import _verify_wrong as wrong
import pytest
import torch

from fused_parallel.reference import noise
from fused_parallel.reference import verify as reference
from fused_parallel.reference import verify_tree as tree_reference
from fused_parallel.reference.vocab_shard import VocabShard

SIZES = list(itertools.product((1, 2, 3), (0, 1, 2, 3)))  # vocabulary, drafts
SEEDS = range(20)  # other rows, of another kind at each prefix
CHAINS = {"rejection": exact.rejection, "block": exact.block, "greedy": exact.greedy}
# Three siblings and a child of the second; two pairs, numbered by depth; a branch numbered depth first.
TREES = [(-1, -1, -1, 1), (-1, -1, 0, 0, 1), (-1, 0, 1, 1), (-1, 0, -1, 2, 2)]
EDGE = 1e-12  # how far from its threshold a uniform is put, relatively: the reference's float64 rounds to 1e-15


# The law, in fractions.


def chain_outcomes(model, rule, point_mass, drafts):
    p, q = model.chain(drafts)
    return rule(p, [exact.one_hot(x, model.vocab) for x in drafts] if point_mass else q, drafts)


def laws_of_chain(model, k, rule, point_mass):
    """The output's law; of point masses for each draft, since the rule must hold whatever is drafted."""
    outcomes = functools.partial(chain_outcomes, model, rule, point_mass)
    if not point_mass:
        return [exact.output_law(model, exact.chain_drafts(model, k), outcomes, k + 1)]
    every = itertools.product(range(model.vocab), repeat=k)
    return [exact.output_law(model, {drafts: exact.Fraction(1)}, outcomes, k + 1) for drafts in every]


def depth(parents):
    """Most drafts that a path holds."""
    above = []
    for parent in parents:
        above.append(1 + (above[parent] if parent >= 0 else 0))
    return max(above)


def tree_model(vocab, parents, seed, kinds=exact.Model.KINDS):
    return exact.Model(vocab, depth(parents) + 1, seed, kinds)


def laws_of_tree(model, parents, deterministic, **wrong):
    def outcomes(drafts):
        p, q = model.tree(parents, drafts)
        return exact.tree(p, None if deterministic else q, parents, drafts, **wrong)

    if not deterministic:
        return [exact.output_law(model, exact.tree_drafts(model, parents), outcomes, depth(parents) + 1)]
    every = itertools.product(range(model.vocab), repeat=len(parents))
    return [exact.output_law(model, {drafts: exact.Fraction(1)}, outcomes, depth(parents) + 1) for drafts in every]


def is_target(laws, model, length):
    joint = model.joint(length)
    assert sum(joint.values()) == 1
    return all(law == joint for law in laws)


@pytest.mark.parametrize("point_mass", [False, True], ids=["full_q", "point_mass"])
@pytest.mark.parametrize("method", CHAINS)
def test_law_of_chains(method, point_mass):
    for (vocab, k), seed in itertools.product(SIZES, SEEDS):
        model = exact.Model(vocab, k + 1, seed)
        if method == "greedy":
            model = model.greedy()
        assert is_target(laws_of_chain(model, k, CHAINS[method], point_mass), model, k + 1), (vocab, k, seed)


@pytest.mark.parametrize("deterministic", [False, True], ids=["without_replacement", "deterministic"])
@pytest.mark.parametrize("parents", TREES, ids=str)
def test_law_of_trees(parents, deterministic):
    for vocab, seed in ((1, 0), *itertools.product((2, 3), range(2))):
        model = tree_model(vocab, parents, seed)
        assert is_target(laws_of_tree(model, parents, deterministic), model, depth(parents) + 1), (vocab, seed)


def test_models_have_what_verification_must_stand():
    model = exact.Model(3, 3, 0)
    rows = [(model.p[x], model.q[x]) for x in model.p]
    assert any(p == q for p, q in rows)
    assert any(p == q[::-1] and p != q for p, q in rows)
    assert any(a == 0 and b == max(q) for p, q in rows for a, b in zip(p, q, strict=True))
    assert any(a > 0 and b == 0 for p, q in rows for a, b in zip(p, q, strict=True))
    assert any(all(a * b == 0 for a, b in zip(p, q, strict=True)) for p, q in rows)
    assert len({model.p[x] for x in model.p if len(x) == 2}) > 3  # depend on the prefix


WRONG_CHAINS = {
    "rejection, residual p": (functools.partial(exact.rejection, rest=exact.whole_target), False),
    "block, residual p": (functools.partial(exact.block, rest=exact.whole_target), False),
    "block, residual p - q unscaled": (functools.partial(exact.block, rest=exact.unscaled), False),
    "block, thresholds of rejection": (functools.partial(exact.block, thresholds=exact.rejection_thresholds), False),
    "rejection, residual p, point mass": (functools.partial(exact.rejection, rest=exact.whole_target), True),
    "block, residual p, point mass": (functools.partial(exact.block, rest=exact.whole_target), True),
    "block, thresholds of rejection, point mass": (
        functools.partial(exact.block, thresholds=exact.rejection_thresholds), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CHAINS)
def test_wrong_rules_of_chains_have_another_law(name):
    model = exact.Model(3, 4, 0, kinds=("other", "reversed"))
    assert not is_target(laws_of_chain(model, 3, *WRONG_CHAINS[name]), model, 4)


WRONG_TREES = {
    "residual p": dict(rest=exact.whole_target),
    "residual not normalised before the next sibling": dict(scale=lambda weights: weights),
    "drawn siblings left in q": dict(remove=exact.kept_in_q),
}


@pytest.mark.parametrize("name", WRONG_TREES)
def test_wrong_rules_of_trees_have_another_law(name):
    parents = TREES[1]
    model = tree_model(3, parents, 0, kinds=("other", "reversed"))
    assert not is_target(laws_of_tree(model, parents, False, **WRONG_TREES[name]), model, 3)


# The library, driven to both sides of every threshold.


def near(threshold, below):
    """A uniform on that side of a threshold, None where there is none."""
    if threshold == (0 if below else 1):
        return None
    return float(threshold) * (1 - EDGE if below else 1 + EDGE) or 1e-15


def forced(outcome, count, rng):
    """Uniforms that lead to an outcome, random where it does not depend on them; None where none does."""
    u = [rng.random() for _ in range(count)]
    for i, (threshold, below) in outcome.decisions.items():
        u[i] = near(threshold, below)
    return None if None in u else u


class Drive:
    """Collects requests and what they must give, then runs them through the reference at once, in float64 throughout.

    Logits keep their 64 bits, the accept uniforms are those given, and the weights that are drawn by are recorded.
    """

    def __init__(self, vocab, monkeypatch):
        self.vocab, self.patch, self.requests = vocab, monkeypatch, []

    def add(self, p, q, drafts, outcomes, rng):
        for outcome in outcomes:
            u = forced(outcome, len(drafts), rng)
            if u is not None:
                self.requests.append((p, q, [-1 if x is None else x for x in drafts], u, outcome))

    def check(self, call, temperature):
        """`call(target_logits, draft_tokens, draft_logits, seed, step, temperature, shard)` -> (tokens, kept nodes)."""
        p, q, drafts, u, outcomes = zip(*self.requests, strict=True)
        count, recorded = len(self.requests), []
        draw = VocabShard.draw

        def record(shard, candidates, *rest):
            recorded.extend(candidates)
            return draw(shard, candidates, *rest)

        zeros = torch.zeros(count, dtype=torch.int64)
        draft = None if q[0] is None else self.logits(q).view(count, -1, self.vocab)
        tokens = torch.tensor(drafts, dtype=torch.int64).view(count, -1)
        with self.patch.context() as patch:
            patch.setattr(VocabShard, "clean", lambda shard, logits: logits)
            patch.setattr(noise, "uniform", lambda *_: torch.tensor(u, dtype=torch.float64).view(count, -1))
            patch.setattr(VocabShard, "draw", record)
            shard = VocabShard(self.vocab, self.vocab)
            temperatures = torch.full((count,), temperature)
            out, kept = call(self.logits(p), tokens, draft, zeros, zeros, temperatures, shard)
        # The first candidate that leaves a token to draw, as `draw` says.
        weights = recorded[-1]
        for other in recorded[-2::-1]:
            weights = torch.where(other.isfinite().any(-1, keepdim=True), other, weights)
        if temperature == 0:  # the argmax is taken
            weights = torch.where(torch.arange(self.vocab) == weights.argmax(-1, keepdim=True), 0.0, -math.inf).double()
        want = torch.tensor([[float(w) for w in exact.normalise(o.weights)] for o in outcomes], dtype=torch.float64)
        length = torch.tensor([len(o.kept) for o in outcomes])
        assert kept == [list(o.kept) for o in outcomes]
        assert torch.allclose(weights.softmax(-1), want, rtol=1e-9, atol=1e-12)
        kept_tokens = [[d[i] for i in o.kept] for d, o in zip(drafts, outcomes, strict=True)]
        assert [row[:n].tolist() for row, n in zip(out, length, strict=True)] == kept_tokens
        last = out.gather(1, length[:, None])
        assert (want.gather(1, last) > 0).all()  # what was drawn can be drawn
        return count

    @staticmethod
    def logits(rows):
        return torch.tensor(
            [[[float(x) for x in row] for row in request] for request in rows], dtype=torch.float64
        ).log()


def drive_chains(method, point_mass, monkeypatch, kinds=exact.Model.KINDS):
    rng, count = random.Random(1), 0
    for vocab, k in SIZES:
        drive = Drive(vocab, monkeypatch)
        for seed in SEEDS:
            model = exact.Model(vocab, k + 1, seed, kinds)
            for drafts in itertools.product(range(vocab), repeat=k):
                p, q = model.chain(drafts)
                # A token that q cannot have drawn ends the draft; point masses and greedy requests have no such.
                bad = (i for i, x in enumerate(drafts) if q[i][x] == 0 and not point_mass and method != "greedy")
                n = next(bad, k)
                ones = [exact.one_hot(x, vocab) for x in drafts[:n]]
                outcomes = CHAINS[method](p[: n + 1], ones if point_mass else q[:n], drafts[:n])
                drive.add(p, None if point_mass else q, drafts, outcomes, rng)

        def call(target, tokens, draft, seed, step, temperature, shard):
            none = (None,) * 4
            out, kept, _ = reference.verify(
                target, tokens, draft, seed, step, temperature, *none, method=method, shard=shard
            )
            return out, [list(range(n)) for n in kept.tolist()]

        count += drive.check(call, 0.0 if method == "greedy" else 1.0)
    return count


def drive_trees(deterministic, monkeypatch, greedy=False):
    rng, count = random.Random(2), 0
    for parents, vocab in itertools.product(TREES, (2, 3)):
        drive = Drive(vocab, monkeypatch)
        for seed in range(2):
            model = tree_model(vocab, parents, seed)
            every = itertools.product(range(vocab), repeat=len(parents))
            proposals = list(every if deterministic or greedy else exact.tree_drafts(model, parents))
            for drafts in rng.sample(proposals, min(60, len(proposals))):
                p, q = model.tree(parents, drafts)
                laws = [exact.argmax_law(row) for row in p] if greedy else p
                outcomes = exact.tree(laws, None if deterministic or greedy else q, parents, drafts)
                drive.add(p, None if deterministic else q, drafts, outcomes, rng)

        def call(target, tokens, draft, seed, step, temperature, shard, parents=parents):
            rows = torch.tensor(parents).expand(len(tokens), -1)
            none = (None,) * 4
            out, _, _, path = tree_reference.verify_tree(
                target, tokens, rows, draft, seed, step, temperature, *none, max_depth=len(parents), shard=shard
            )
            return out, [[node for node in row if node >= 0] for row in path.tolist()]

        count += drive.check(call, 0.0 if greedy else 1.0)
    return count


@pytest.mark.parametrize("point_mass", [False, True], ids=["full_q", "point_mass"])
@pytest.mark.parametrize("method", CHAINS)
def test_chains_follow_the_rules(method, point_mass, monkeypatch):
    assert drive_chains(method, point_mass, monkeypatch) > 400


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["without_replacement", "deterministic"])
def test_trees_follow_the_rules(deterministic, greedy, monkeypatch):
    assert drive_trees(deterministic, monkeypatch, greedy) > 400


@pytest.mark.parametrize(
    ("mistake", "method", "point_mass"),
    [
        (wrong.residual_p, "rejection", False),
        (wrong.residual_p, "block", False),
        (wrong.residual_unscaled, "block", False),
        (wrong.thresholds_of_rejection, "block", False),
        (wrong.thresholds_of_rejection, "block", True),
    ],
)
def test_a_library_with_mistakes_in_chains_fails(mistake, method, point_mass, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        drive_chains(method, point_mass, monkeypatch)


@pytest.mark.parametrize("mistake", [wrong.residual_p, wrong.siblings_not_normalised, wrong.siblings_left_in_q])
def test_a_library_with_mistakes_in_trees_fails(mistake, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        drive_trees(False, monkeypatch)
