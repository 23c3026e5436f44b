"""Vocabulary-sharded sampling and verification: the unsharded tokens over 1 to 4 ranks, the same on all of them."""

import _verify_ranks as ranks
import pytest
import torch

from fused_parallel.testing.spawn import run_ranks


@pytest.mark.parametrize("vocab", [9, 127])  # 9: over four ranks, the last holds only padding
def test_any_number_of_shards(seed, vocab):
    results = run_ranks(ranks.compare, 4, seed, vocab)
    for rank, result in enumerate(results):
        assert {key[-1] for key in result} == {0, *range(rank + 1, 5)}
        for key, outputs in result.items():
            alone, first = results[0][(*key[:-1], 0)], results[0][key]
            for got, want, same in zip(outputs, alone, first, strict=True):
                if got.dtype.is_floating_point:  # log-probabilities: sums in another order
                    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), key
                else:
                    assert torch.equal(got, want), key
                assert torch.equal(got, same), key  # bit for bit on all ranks
    accepted = results[0]["block", "plain", True, 4][1].double().mean()
    assert accepted > 0


def test_the_vocabulary_is_not_gathered():
    small, large = (run_ranks(ranks.traffic, 2, vocab)[0] for vocab in (20, 2000))
    assert small == large  # calls and bytes
    assert [small[method, "none"][0] for method in ("rejection", "block", "greedy")] == [2, 3, 2]
    assert small["rejection", "min_p"][0] == 3


def test_module_on_a_mesh(seed):
    for whole, eager, compiled in run_ranks(ranks.module, 2, seed):
        assert torch.equal(eager, whole)
        assert torch.equal(compiled, whole)


def test_vocab_size_beyond_the_shards():
    message = "verify: vocab_size must be between 1 and 8 (2 shard(s) of 4 columns), got 9"
    assert run_ranks(ranks.bad_vocab_size, 2) == [message] * 2
