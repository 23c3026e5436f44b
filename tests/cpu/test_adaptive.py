"""How many tokens are drafted: the estimate against simulated machines, and drafts from the sequence itself."""

import itertools
import random

import pytest
import torch

from fused_parallel.speculative import ahead
from fused_parallel.speculative.adaptive import LENGTHS, AdaptiveLength
from fused_parallel.speculative.draft import NgramDraft


def simulate(acceptance, plain_us, draft_us, verify_us, batch, rounds, seed, noise=0.03):
    """(tokens a microsecond over all rounds, the best fixed length's expected one, plain decoding's). A round of k
    tokens takes plain_us + k * (draft_us + verify_us). `acceptance` is a function of the round."""
    draw = random.Random(seed)
    adaptive = AdaptiveLength()
    tokens = time = 0.0
    seen = (0, 0, 0, 0)
    us = 0.0
    for number in range(rounds):
        k = adaptive.choose()
        right = []
        for _ in range(batch):
            n = 0
            while n < k and draw.random() < acceptance(number):
                n += 1
            right.append(n)
        adaptive.record(seen[0], us, *seen[1:])
        us = (plain_us + k * (draft_us + verify_us)) * draw.uniform(1 - noise, 1 + noise)
        seen = (k, k * batch, sum(right), sum(n < k for n in right))
        tokens += sum(n + 1 for n in right) / batch
        time += us

    def expected(k):
        a = acceptance(rounds)
        return sum(a**i for i in range(k + 1)) / (plain_us + k * (draft_us + verify_us))

    return tokens / time, max(map(expected, LENGTHS)), expected(0)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("draft_us", [10.0, 100.0, 400.0])
@pytest.mark.parametrize("batch", [1, 16])
def test_near_the_best_length_and_never_much_slower_than_plain(acceptance, draft_us, batch):
    rates = [simulate(lambda _: acceptance, 1000.0, draft_us, 20.0, batch, 3000, seed) for seed in range(3)]
    for rate, _, plain in rates:
        assert rate > 0.97 * plain
    assert sum(rate / best for rate, best, _ in rates) / 3 > 0.93


def test_a_short_run_of_many_sequences_learns_from_one_round():
    """Costs of 64 sequences on two H100: the first round shows that drafts are wrong, and no other is needed."""
    rates = [simulate(lambda _: 0.0, 7400.0, 1850.0, 50.0, 64, 160, seed) for seed in range(5)]
    assert all(rate > 0.98 * plain for rate, _, plain in rates), rates  # 0.985
    some = simulate(lambda _: 0.8, 7400.0, 300.0, 50.0, 64, 160, 0)
    assert some[0] > 0.9 * some[1]


def test_a_change_is_noticed():
    """Drafts are useless for 1500 rounds, then right: plain decoding at first, long drafts later."""
    rate, _, plain = simulate(lambda n: 0.0 if n < 1500 else 0.9, 1000.0, 50.0, 10.0, 1, 6000, 0)
    assert rate > 2.0 * plain


def test_looks_become_rare_where_drafting_does_not_pay():
    """A look costs a draft's pass over all tokens since the last one. It is 32, 64, ... rounds to the next, until one
    finds drafts that are right."""
    adaptive, looks, k = AdaptiveLength(), [], 0
    for number in range(4000):
        k = adaptive.choose()
        looks += [number] if k else []
        right = k if number > 3000 else 0
        adaptive.record(k, 1000.0 + 400.0 * k, k, right, int(right < k))
    apart = [b - a for a, b in itertools.pairwise(looks[3:]) if b <= 3000]  # after the three rounds at first
    assert apart[:4] == [64, 128, 256, 512] and set(apart[3:]) == {512}
    assert k > 0 and adaptive.apart == 32


def test_the_same_numbers_give_the_same_choices():
    one, other = AdaptiveLength(), AdaptiveLength()
    draw = random.Random(1)
    for _ in range(200):
        k = one.choose()
        assert other.choose() == k
        numbers = (k, draw.uniform(500, 2000), 4 * k, draw.randint(0, 4 * k), draw.randint(0, 4))
        one.record(*numbers), other.record(*numbers)


def lookup(tokens: list[int], k: int) -> list[int]:
    """The rule in plain Python."""
    for n in (3, 2, 1):
        for end in range(len(tokens) - 2, -1, -1):
            if len(tokens) > n - 1 <= end and tokens[end - n + 1 : end + 1] == tokens[len(tokens) - n :]:
                return tokens[end + 1 : end + 1 + k]
    return []


def test_ngram_drafts(seed):
    k, capacity, batch = 5, 60, 64
    lens = torch.randint(1, capacity - 1, (batch,), dtype=torch.int32)  # the last token stands at this position
    for symbols in (2, 4, 30, 1000):
        history = torch.randint(0, symbols, (batch, capacity))
        tokens, weights, counts = NgramDraft().propose(history, lens, k)
        assert weights is None and tokens.shape == (batch, k)
        for row, length, drafted, count in zip(
            history.tolist(), lens.tolist(), tokens.tolist(), counts.tolist(), strict=True
        ):
            expected = lookup(row[: length + 1], k)
            assert drafted[:count] == expected and drafted[count:] == [0] * (k - count)


class CapturedRounds:
    """Stands for Round, on a device whose time passes without the host's: a capture takes 100 ms, and a replay of k
    drafted tokens `us(k)`; a round after others without a draft has a graph of its own, or the draft catches up."""

    def __init__(self, acceptance, us, seed):
        self.draw, self.acceptance, self.us = random.Random(seed), acceptance, us
        self.k = self.missed = 0
        self.now = self.busy = self.captures = 0.0
        self.tree, self.graphs, self.told, self.clock = None, set(), None, torch.zeros(1, dtype=torch.int64)

    def draft_next(self, shape):
        self.k = shape

    def go_on(self, alive):
        pass

    def wants_capture(self):
        return (self.k, self.missed if self.k else 0) not in self.graphs

    def must_catch_up(self):
        return self.k > 0 and self.missed > 1

    def catch_up(self):
        if self.must_catch_up():
            self.missed, self.now = 0, max(self.now, self.busy) + 5e-4

    def capture(self, replay):
        if not self.wants_capture():
            return False
        self.graphs.add((self.k, self.missed if self.k else 0))
        self.now, self.captures = max(self.now, self.busy) + 0.1, self.captures + 0.1
        return True

    def run(self):
        right = 0
        while right < self.k and self.draw.random() < self.acceptance:
            right += 1
        self.busy = max(self.busy, self.now) + 1e-6 * self.us(self.k)
        self.told = (self.busy, [0] * (right + 1) + [right - 1, self.k, right, int(self.clock)])
        self.missed = 0 if self.k else self.missed + 1
        return True


@pytest.mark.parametrize("acceptance,first,more", [(0.3, 1900.0, 20.0), (0.5, 2200.0, 30.0), (0.8, 1200.0, 20.0)])
def test_captured_rounds_are_held_against_plain_decoding(monkeypatch, acceptance, first, more):
    """As in CUDA graphs, two rounds under way. A draft's first token costs most, as where a kernel for few rows is
    left: what a round of none takes must have been seen, though captures come between the first rounds."""
    times = {0: 1000.0} | {k: first + more * k for k in LENGTHS[1:]}
    rounds, adaptive = CapturedRounds(acceptance, times.__getitem__, 0), AdaptiveLength()

    class Snapshot:
        def __init__(self, told):
            self.at, self.row = told

        def read(self):
            rounds.now = max(rounds.now, self.at)
            return [self.row]

    monkeypatch.setattr(ahead, "Snapshot", Snapshot)
    monkeypatch.setattr(ahead.time, "perf_counter", lambda: rounds.now)
    done = tokens = 0
    going = ahead.run_ahead(
        rounds, lambda most: done < 4000, lambda: [True], lambda: None, ahead=2, adaptive=adaptive, capture=True
    )
    for told in going:
        done, tokens = done + 1, tokens + 1 + told.pairs[0][1]
    best = max(sum(acceptance**i for i in range(k + 1)) / times[k] for k in LENGTHS)
    assert tokens / (rounds.now - rounds.captures) > 0.97e6 * best
    assert len(rounds.graphs) <= 2 * len(LENGTHS) and adaptive.time(0) < 1100


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("step", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("matched", [0.1, 0.3, 0.7])
def test_drafts_of_some_sequences_only(matched, step, batch):
    """Where the sequence itself gives the drafts, few sequences may have one: a round's tokens are fewer then, and its
    time is not."""
    draw, adaptive = random.Random(1), AdaptiveLength()
    tokens = time = 0.0
    for _ in range(3000):
        k = adaptive.choose()
        drafted = [k if draw.random() < matched else 0 for _ in range(batch)]
        right = []
        for n in drafted:
            right.append(0)
            while right[-1] < n and draw.random() < 0.8:
                right[-1] += 1
        us = 1000.0 * (1 + step * k)
        rejected = sum(r < n for r, n in zip(right, drafted, strict=True))
        adaptive.record(k, us, sum(drafted), sum(right), rejected, (), k * batch)
        tokens, time = tokens + 1 + sum(right) / batch, time + us
    best = max((1 + matched * sum(0.8**i for i in range(1, k + 1))) / (1000.0 * (1 + step * k)) for k in LENGTHS)
    assert tokens / time > 0.97 / 1000.0
    assert tokens / time > (0.97 if batch > 1 else 0.88) * best
