"""The law of what verification returns: joint chi-square of four tokens over several rounds, and the acceptance rates.

Target and draft depend on the two tokens before. Variants that are wrong on purpose must fail the same test. Of 16
tokens, with a draft that is the target backwards, each position has a test and each two consecutive ones.
"""

import functools

import _verify_ranks as ranks
import _verify_rounds as rounds
import _verify_wrong as wrong
import pytest
import torch
from _verify_rounds import ALPHA, CHAINS, FAMILY_ALPHA, ROUNDS, TREES, VOCAB, K

from fused_parallel.reference import noise
from fused_parallel.reference.vocab_shard import VocabShard
from fused_parallel.testing.spawn import run_ranks

REQUESTS = 100_000
FEWER = 20_000  # enough to see what is wrong on purpose
SAMPLES = 200_000
POSITIONS_ALPHA = FAMILY_ALPHA / (len(CHAINS) + 1)  # the chains and the sharded one, each of several p-values
run = functools.partial(rounds.run, requests=REQUESTS)


@pytest.mark.parametrize("name", ROUNDS)
def test_law(name):
    assert run(ROUNDS[name])[0] > ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-point_mass", "tree-drawn", "tree-top"])
def test_law_with_filters(name):
    p, model, _ = run(ROUNDS[name], requests=FEWER, vocab=5, length=3, temperature=1.3, top_k=4, top_p=0.9, min_p=0.08)
    assert p > ALPHA
    assert 0.2 < (model.p == 0).double().mean() < 0.8  # the filters did remove tokens


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_acceptance_rates(method):
    _, model, first = run(CHAINS[f"{method}-full_q"], length=1)
    rounds.check_acceptance(model, first, method)


def test_block_accepts_more_than_rejection():
    model = rounds.Markov(VOCAB, torch.Generator().manual_seed(rounds.MODEL_SEED))
    assert sum(rounds.acceptance(model, K, True, True)) > 1.02 * sum(rounds.acceptance(model, K, True, False))


@pytest.mark.parametrize("name", CHAINS)
def test_every_position(name):
    assert rounds.run_positions(CHAINS[name], SAMPLES)[0] > POSITIONS_ALPHA


def test_every_position_of_a_sharded_vocabulary():
    """Block over two ranks, which exchanges all that rejection does and its sums."""
    print(f"TEST_SEED={rounds.MASTER_SEED}")
    first, second = run_ranks(ranks.positions, 2, "block-full_q", SAMPLES // 4)
    assert first == second
    assert first[0] > POSITIONS_ALPHA


# Wrong on purpose: each must fail the chi-square test that the right ones pass.


@pytest.mark.parametrize("name", ROUNDS)
def test_residual_from_the_whole_target_fails(name, monkeypatch):
    draw = VocabShard.draw
    monkeypatch.setattr(VocabShard, "draw", lambda self, candidates, *rest: draw(self, candidates[-1:], *rest))
    assert run(ROUNDS[name], requests=FEWER)[0] < ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-full_q", "tree-drawn"])
def test_residual_p_instead_of_p_minus_q_fails(name, monkeypatch):
    wrong.residual_p(monkeypatch)
    assert run(ROUNDS[name], requests=FEWER)[0] < ALPHA


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (wrong.residual_p, "rejection-full_q"),
        (wrong.residual_p, "block-full_q"),
        (wrong.residual_unscaled, "block-full_q"),
        (wrong.thresholds_of_rejection, "block-full_q"),
        (wrong.thresholds_of_rejection, "block-point_mass"),
    ],
)
def test_mistakes_fail_in_some_position(mistake, name, monkeypatch):
    mistake(monkeypatch)
    assert rounds.run_positions(CHAINS[name], FEWER)[0] < POSITIONS_ALPHA


@pytest.mark.parametrize("name", CHAINS)
def test_residual_from_the_whole_target_fails_in_some_position(name, monkeypatch):
    draw = VocabShard.draw
    monkeypatch.setattr(VocabShard, "draw", lambda self, candidates, *rest: draw(self, candidates[-1:], *rest))
    assert rounds.run_positions(CHAINS[name], FEWER)[0] < POSITIONS_ALPHA


@pytest.mark.parametrize("name", ROUNDS)
def test_reused_step_fails(name):
    assert run(ROUNDS[name], requests=FEWER, key=lambda done, step: torch.zeros_like(step))[0] < ALPHA


@pytest.mark.parametrize("name", CHAINS)
def test_reused_step_fails_in_some_position(name):
    zero = lambda done, step: torch.zeros_like(step)  # noqa: E731
    assert rounds.run_positions(CHAINS[name], FEWER, key=zero)[0] < POSITIONS_ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-full_q"])
def test_residual_noise_shared_with_the_draft_fails(name, monkeypatch):
    """Accept noise would do no harm: of one key a uniform and a Gumbel, whose first 16 bits come from a block of their
    own, have only the bits behind those in common."""
    monkeypatch.setitem(noise.STREAMS, "residual", noise.STREAMS["draft"])
    assert run(ROUNDS[name])[0] < ALPHA


@pytest.mark.parametrize("name", ["rejection-full_q", "block-full_q"])
def test_accepting_by_the_noise_of_a_drafted_token_fails(name, monkeypatch):
    """The uniform of a Gumbel that the draft was drawn by."""

    def shared(seed, step, position, stream):
        seed, step, position = torch.broadcast_tensors(seed, step, position)
        gumbel = noise.gumbel(seed.flatten(), step.flatten(), position.flatten(), "draft", 0, 1)
        return -torch.expm1(-torch.exp(-gumbel)).view(seed.shape)

    monkeypatch.setattr(noise, "uniform", shared)
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
    top = functools.partial(rounds.tree_round, siblings="without_replacement", proposal="top")
    assert run(top, requests=FEWER)[0] < ALPHA


def test_siblings_drawn_but_not_removed_from_q_fails(monkeypatch):
    wrong.siblings_left_in_q(monkeypatch)
    assert run(TREES["tree-drawn"], requests=FEWER)[0] < ALPHA
