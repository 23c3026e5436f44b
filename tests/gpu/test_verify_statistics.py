"""The law of what the kernels return: joint chi-square of the tokens of several rounds, and the acceptance rates."""

import functools

import _verify_rounds as rounds
import pytest
import torch

import fused_parallel as fp

REQUESTS, FEWER = 400_000, 20_000
run = functools.partial(rounds.run, requests=REQUESTS, device="cuda")


@pytest.fixture(autouse=True)
def _kernels():
    with torch.no_grad(), fp.use("fused"):
        yield


@pytest.mark.parametrize(("vocab", "length"), [(rounds.VOCAB, rounds.LENGTH), (16, 2)])
@pytest.mark.parametrize("name", rounds.ROUNDS)
def test_law(name, vocab, length):
    assert run(rounds.ROUNDS[name], vocab=vocab, length=length)[0] > rounds.ALPHA


@pytest.mark.parametrize("name", rounds.ROUNDS)
def test_law_with_filters(name):
    p, model, _ = run(rounds.ROUNDS[name], vocab=5, length=3, temperature=1.3, top_k=4, top_p=0.9, min_p=0.08)
    assert p > rounds.ALPHA
    assert 0.2 < (model.p == 0).double().mean() < 0.8  # the filters did remove tokens


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_acceptance_rates(method):
    _, model, first = run(rounds.CHAINS[f"{method}-full_q"], length=1)
    rounds.check_acceptance(model, first, method)


@pytest.mark.parametrize("name", rounds.ROUNDS)
def test_reused_step_fails(name):
    """The test sees what is wrong: a step that is not counted up."""
    wrong = run(rounds.ROUNDS[name], requests=FEWER, key=lambda done, step: torch.zeros_like(step))
    assert wrong[0] < rounds.ALPHA


def test_drawn_rule_on_top_siblings_fails():
    wrong = functools.partial(rounds.tree_round, siblings="without_replacement", proposal="top")
    assert run(wrong, requests=FEWER)[0] < rounds.ALPHA
