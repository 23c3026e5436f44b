"""Queueing rounds ahead of what the host has read: order, how many are under way, which times belong to which round."""

import pytest
import torch

from fused_parallel.speculative import ahead as module


class Recorded:
    """Stands for AdaptiveLength: lengths in turn, and what it was told."""

    def __init__(self):
        self.told, self.chosen = [], 0

    def choose(self):
        self.chosen += 1
        return self.chosen % 3

    def record(self, *numbers):
        self.told.append(numbers)


class Rounds:
    """Stands for Round: round n gives each of two sequences n + 1 and, if it drafted, n + 101; all drafts are right. As
    on a device, a round runs when it is read (its snapshot), not when it is queued."""

    def __init__(self, captures=(), late=()):
        self.late = late
        self.k, self.queued, self.read, self.tree = 0, 0, 0, None
        self.clock, self.told = torch.zeros(1, dtype=torch.int64), None
        self.alive, self.captures, self.clocks = [], captures, []

    def draft_next(self, shape):
        self.k = shape

    def go_on(self, alive):
        self.alive.append(list(alive))

    def wants_capture(self):
        return self.queued in self.captures

    def must_catch_up(self):
        return self.queued in self.late

    def catch_up(self):
        assert not self.must_catch_up() or self.queued == self.read  # no other round's time counts it

    def capture(self, replay):
        assert replay and (not self.wants_capture() or self.queued == self.read)
        return self.queued in self.captures

    def run(self):
        self.clocks.append(int(self.clock))
        row = [self.queued + 1, self.queued + 101 if self.k else -1, self.k - 1, self.k, self.k, self.clocks[-1]]
        self.told = torch.tensor([row, row])
        self.queued += 1
        return True


def run(monkeypatch, rounds, ahead, ends, **options):
    """The yields, and the most rounds under way; sequence i ends with round ends[i]."""
    most, done = 0, [False, False]

    class Snapshot:
        def __init__(self, told):
            self.rows = told.tolist()

        def read(self):
            nonlocal most
            most = max(most, rounds.queued - rounds.read)
            rounds.read += 1
            return self.rows

    monkeypatch.setattr(module, "Snapshot", Snapshot)
    yields = []
    needed, living = lambda most: not all(done), lambda: [not d for d in done]
    for told in module.run_ahead(rounds, needed, living, lambda: None, ahead=ahead, **options):
        yields.append(told)
        done = [rounds.read > end for end in ends]
    return yields, most


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_rounds_come_in_order_and_late_ones_do_not_count(monkeypatch, ahead):
    rounds = Rounds()
    yields, most = run(monkeypatch, rounds, ahead, (2, 6))
    assert most == ahead and rounds.queued == rounds.read == len(yields) == 7 + ahead - 1
    assert [y.rows[0][0] for y in yields] == list(range(1, len(yields) + 1))
    assert [len(y.pairs) for y in yields] == [2] * 3 + [1] * 4 + [0] * (ahead - 1)
    # A sequence is fed until the host has read that it ended.
    assert [alive[0] for alive in rounds.alive] == [True] * (3 + ahead - 1) + [False] * 4


def test_no_more_rounds_than_needed_are_queued(monkeypatch):
    class Snapshot(list):
        def read(self):
            return self

    rounds, taken = Rounds(), 0
    monkeypatch.setattr(module, "Snapshot", lambda told: Snapshot(told.tolist()))
    yields = module.run_ahead(rounds, lambda most: taken + most < 5, lambda: [True, True], lambda: None, ahead=2)
    for _ in yields:
        taken += 1
    assert taken == rounds.queued == 5


def test_a_round_that_may_not_be_needed_is_not_queued_ahead(monkeypatch):
    """Rounds of 2 drafts may give 3 tokens: of 5 wanted, the second is needed for sure, once the first is known."""
    rounds, taken, asked = Rounds(), 0, []
    rounds.k = 2

    class Snapshot(list):
        def read(self):
            return self

    def needed(most):
        asked.append(most)
        return taken + most < 5

    monkeypatch.setattr(module, "Snapshot", lambda told: Snapshot(told.tolist()))
    for _ in module.run_ahead(rounds, needed, lambda: [True, True], lambda: None, ahead=2):
        taken += 2
    assert rounds.queued == 3 and max(asked) == 3


@pytest.mark.parametrize("ahead", [1, 2])
def test_each_time_is_told_once_with_its_round(monkeypatch, ahead):
    times = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times) * 1e-3)
    adaptive, rounds = Recorded(), Rounds(captures=(5,), late=(8,))
    yields, _ = run(monkeypatch, rounds, ahead, (11, 11), adaptive=adaptive, capture=True)
    assert [y.length for y in yields] == [(n + 1) % 3 for n in range(len(yields))]
    assert sum(y.capturing > 0 for y in yields) == 1
    # The first rounds bring no time. Where the queue was emptied for a capture or a draft that was late, two rounds
    # were read in a row, of which the second one's is told.
    assert all(t == (0, 0, 0, 0, 0) for t in adaptive.told[:ahead])
    untold = () if ahead == 1 else (3, 6)
    expected = [y for n, y in enumerate(yields) if n not in untold]
    told = [t for t in adaptive.told if len(t) == 7]
    assert len(told) == len(yields) - ahead - len(untold)
    for y, (k, us, drafted, accepted, rejected, later, wanted) in zip(expected, told, strict=False):
        assert (k, drafted, accepted, rejected) == (y.length, 2 * k if y.pairs else 0, drafted, 0)
        assert us > 0 and wanted == drafted and later == ()
