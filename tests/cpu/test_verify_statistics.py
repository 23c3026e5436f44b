"""The law of what verification returns: joint chi-square of four tokens over several rounds, and the acceptance rates.

Target and draft depend on the two tokens before. Variants that are wrong on purpose must fail the same test.
"""

import functools
import itertools
import os

import _verify_rounds as rounds
import pytest
import torch

from fused_parallel.reference import noise
from fused_parallel.reference import verify as reference
from fused_parallel.reference import verify_tree as tree_reference
from fused_parallel.reference.vocab_shard import VocabShard

MASTER_SEED = int(os.environ.get("TEST_SEED", 20240317))  # of the requests' noise
MODEL_SEED = 20240317  # of target and draft: fixed, since how visible a mistake is depends on them
ALPHA = 1e-6  # a right implementation fails once in 10**6 tests
REQUESTS, LENGTH, VOCAB, K = 100_000, 4, 3, 3
FEWER = 20_000  # enough to see what is wrong on purpose

CHAINS = {
    f"{method}-{'full_q' if full_q else 'point_mass'}": functools.partial(
        rounds.chain_round, k=K, method=method, full_q=full_q
    )
    for method in ("rejection", "block")
    for full_q in (True, False)
}
TREES = {
    "tree-drawn": functools.partial(rounds.tree_round, siblings="without_replacement", proposal="drawn"),
    "tree-top": functools.partial(rounds.tree_round, siblings="deterministic", proposal="top"),
}
ROUNDS = CHAINS | TREES


def run(play, requests=REQUESTS, vocab=VOCAB, key=lambda done, step: step, length=LENGTH, **options):
    print(f"TEST_SEED={MASTER_SEED}")
    model = rounds.Markov(vocab, torch.Generator().manual_seed(MODEL_SEED), **options)
    generator = torch.Generator().manual_seed(MASTER_SEED)
    tokens, first = rounds.generate(model, play, requests, length, generator, key)
    p = rounds.p_value(tokens, model.joint(length))
    print(f"p-value {p:.3g}, accepted in the first round {first.double().mean():.3f}")
    return p, model, first.double()


def acceptance(model, k, full_q, block):
    """P(at least i accepted), i = 1..k, by enumeration of the drafts: E of prod min(1, p / q), or of block's p_i."""
    out = []
    for length in range(1, k + 1):
        total = 0.0
        for tokens in itertools.product(range(model.vocab), repeat=length):
            a, b, drawn, kept = 0, 0, 1.0, 1.0
            for t in tokens:
                p, q = model.p[a, b, t].item(), model.q[a, b, t].item()
                drawn *= q
                kept = min(1.0, kept * p / q) if block else kept * min(1.0, p / q)
                a, b = b, t
            total += drawn * kept
        out.append(total)
    return out


@pytest.mark.parametrize("name", ROUNDS)
def test_law(name):
    assert run(ROUNDS[name])[0] > ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-point_mass", "tree-drawn", "tree-top"])
def test_law_with_filters(name):
    p, model, _ = run(ROUNDS[name], FEWER, vocab=5, length=3, temperature=1.3, top_k=4, top_p=0.9, min_p=0.08)
    assert p > ALPHA
    assert 0.2 < (model.p == 0).double().mean() < 0.8  # the filters did remove tokens


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_acceptance_rates(method):
    """As many are accepted as the algorithm promises: refusing all and drawing from p would pass the tests above."""
    _, model, first = run(CHAINS[f"{method}-full_q"], length=1)
    full = first[torch.arange(REQUESTS) % 5 != 0]  # the others' drafts are shorter
    rates = acceptance(model, K, True, method == "block")
    for i, rate in enumerate(rates, 1):
        measured = (full >= i).double().mean().item()
        assert abs(measured - rate) < 5 * (rate * (1 - rate) / len(full)) ** 0.5, (i, measured, rate)


def test_block_accepts_more_than_rejection():
    model = rounds.Markov(VOCAB, torch.Generator().manual_seed(MODEL_SEED))
    assert sum(acceptance(model, K, True, True)) > 1.02 * sum(acceptance(model, K, True, False))


# Wrong on purpose: each must fail the chi-square test that the right ones pass.


@pytest.mark.parametrize("name", ROUNDS)
def test_residual_from_the_whole_target_fails(name, monkeypatch):
    draw = VocabShard.draw
    monkeypatch.setattr(VocabShard, "draw", lambda self, candidates, *rest: draw(self, candidates[-1:], *rest))
    assert run(ROUNDS[name], FEWER)[0] < ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-full_q", "tree-drawn"])
def test_residual_p_instead_of_p_minus_q_fails(name, monkeypatch):
    wrong = lambda log_scale, logp, logq: logp + log_scale[..., None]  # noqa: E731
    monkeypatch.setattr(reference, "residual", wrong)
    monkeypatch.setattr(tree_reference, "residual", wrong)
    assert run(ROUNDS[name], FEWER)[0] < ALPHA


@pytest.mark.parametrize("name", ROUNDS)
def test_reused_step_fails(name):
    assert run(ROUNDS[name], FEWER, key=lambda done, step: torch.zeros_like(step))[0] < ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-full_q"])
@pytest.mark.parametrize("stream", ["accept", "residual"])
def test_noise_shared_with_the_draft_fails(name, stream, monkeypatch):
    monkeypatch.setitem(noise.STREAMS, stream, noise.STREAMS["draft"])
    assert run(ROUNDS[name])[0] < ALPHA


@pytest.mark.parametrize(
    ("name", "biased"), [("rejection-full_q", False), ("block-full_q", True), ("block-point_mass", True)]
)
def test_noise_by_absolute_position_biases_block(name, biased, monkeypatch):
    """Noise keyed by (seed, position in the sequence) without the round: rejection stands it, block does not.

    Block looks at the uniforms of all its positions, and the next round would look at some of them again.
    """
    uniform, gumbel = noise.uniform, noise.gumbel

    def by_position(draw):
        return lambda seed, done, position, *rest: draw(seed, torch.zeros_like(done), position + done, *rest)

    monkeypatch.setattr(noise, "uniform", by_position(uniform))
    monkeypatch.setattr(noise, "gumbel", by_position(gumbel))
    p = run(ROUNDS[name], key=lambda done, step: done)[0]
    assert p < ALPHA if biased else p > ALPHA


def test_drawn_rule_on_top_siblings_fails():
    wrong = functools.partial(rounds.tree_round, siblings="without_replacement", proposal="top")
    assert run(wrong, FEWER)[0] < ALPHA


def test_siblings_drawn_but_not_removed_from_q_fails(monkeypatch):
    refuse = tree_reference._refuse_drawn
    monkeypatch.setattr(
        tree_reference, "_refuse_drawn", lambda p, q, removed, *rest: refuse(p, q, torch.zeros_like(removed), *rest)
    )
    assert run(TREES["tree-drawn"], FEWER)[0] < ALPHA
