"""The timer on CPUs: what it measures, which inputs the calls get, several ranks."""

import contextlib
import itertools
import time

import pytest
import torch

from fused_parallel.testing import timer
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.timer import (
    ROTATION_BYTES,
    Subject,
    compare,
    quantile,
    rotation_sets,
    time_collective,
    time_in_turns,
)


class Clock:
    """A clock in place of the timer's, which only the timed functions move: other load on the machine does not."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds):
        """A function whose calls take these times, in turn."""
        durations = itertools.cycle(seconds)

        def fn(*_):
            self.now += next(durations)

        return fn


def test_a_sleep_is_measured():
    timing = time_collective(lambda: time.sleep(5e-3), mode="eager", calls=2, rounds=5, warmup=1, device="cpu")
    assert 5000 <= timing.us_p20 <= timing.us_p50 <= timing.us_p80
    assert timing.us_p50 < 50_000
    assert timing.skew_pct == 0


@pytest.mark.parametrize("calls", [1, 7])
def test_the_time_is_per_call(monkeypatch, calls):
    clock = Clock(monkeypatch)
    timing = time_collective(clock.takes(3e-3), mode="eager", calls=calls, rounds=5, device="cpu")
    assert timing.us_p20 == timing.us_p80 == pytest.approx(3000)


def test_quantiles_are_over_the_rounds_without_the_warm_up(monkeypatch):
    clock = Clock(monkeypatch)
    durations = [1.0, 1.0] + [n * 1e-6 for n in (5, 1, 4, 2, 3, 0)]
    timing = time_collective(clock.takes(*durations), mode="eager", calls=1, warmup=2, rounds=6, device="cpu")
    assert (timing.us_p20, timing.us_p50, timing.us_p80) == pytest.approx((1, 2.5, 4), abs=1e-3)


def sets_seen(set_bytes, calls, **kwargs):
    """The input set that each call of one measured round was given."""
    seen = []

    def inputs(i):
        return torch.empty(set_bytes, dtype=torch.uint8), i

    time_collective(lambda _, i: seen.append(i), inputs=inputs, mode="eager", calls=calls, rounds=1, warmup=0, **kwargs)
    return seen


def test_calls_take_different_inputs():
    assert sets_seen(1000, 7) == [0, 1, 2, 3, 4, 5, 6]


def test_inputs_come_round_once_they_total_the_rotation():
    quarter = ROTATION_BYTES // 4
    assert sets_seen(quarter, 6) == [0, 1, 2, 3, 0, 1]
    assert sets_seen(ROTATION_BYTES, 3) == [0, 0, 0]


def test_all_tensors_of_a_set_count():
    seen = []
    half = torch.empty(ROTATION_BYTES // 2, dtype=torch.uint8)
    time_collective(
        lambda a, b, i: seen.append(i),
        inputs=lambda i: (half, [half], i),
        mode="eager",
        calls=3,
        rounds=1,
        warmup=0,
    )
    assert seen == [0, 0, 0]


def test_rotation_sets():
    assert rotation_sets(ROTATION_BYTES // 4, 100) == 4
    assert rotation_sets(ROTATION_BYTES // 4 - 1, 100) == 5
    assert rotation_sets(1, 20) == 20
    assert rotation_sets(ROTATION_BYTES, 20, mutates=True) == 20


def test_what_a_call_overwrites_is_restored_before_each_round():
    values = []

    def double(x):
        values.append(x.item())
        x.mul_(2)

    time_collective(
        double, inputs=lambda i: (torch.tensor([10.0 + i]),), mode="eager", mutates=True, calls=3, rounds=4, warmup=1
    )
    assert values == [10, 11, 12] * 5


def test_without_mutates_nothing_is_restored():
    values = []

    def double(x):
        values.append(x.item())
        x.mul_(2)

    time_collective(double, inputs=lambda i: (torch.tensor([1.0]),), mode="eager", calls=1, rounds=3, warmup=0)
    assert values == [1, 2, 4]


def test_compare_gives_the_ratio_and_changes_the_order(monkeypatch):
    clock, order = Clock(monkeypatch), []
    a, b = clock.takes(1e-3, 2e-3), clock.takes(4e-3)
    found = compare(
        lambda: (order.append("a"), a()),
        lambda: (order.append("b"), b()),
        mode="eager",
        calls=1,
        rounds=31,
        warmup=0,
        device="cpu",
    )
    assert (found.ratio_p20, found.ratio_p50, found.ratio_p80) == pytest.approx((0.25, 0.25, 0.5))
    assert (found.ours.us_p50, found.peer.us_p50) == pytest.approx((1000, 4000))
    assert found.sm_mhz is None
    pairs = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert sorted(map(tuple, pairs)) == [("a", "b")] * 16 + [("b", "a")] * 15
    assert all(first != second for first, second in itertools.pairwise(pairs))


def test_functions_in_turns(monkeypatch):
    clock, order = Clock(monkeypatch), []
    takes = {"a": clock.takes(1e-3), "b": clock.takes(4e-3), "c": clock.takes(2e-3, 6e-3)}

    def subject(name, calls):
        return Subject(lambda: (order.append(name), takes[name]()), mode="eager", calls=calls, device="cpu")

    found = time_in_turns([subject("a", 1), subject("b", 2), subject("c", 1)], rounds=4, warmup=1)
    assert [timing.us_p50 for timing in found] == pytest.approx([1000, 4000, 4000])
    assert "".join(order) == "abbc" + "abbc" + "bbca" + "cabb" + "abbc"


def rank_slower_by_rank(mesh):
    rank = mesh["tp"].get_local_rank()
    kwargs = {"group": mesh["tp"], "mode": "eager", "device": "cpu", "calls": 2}
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        timing = time_collective(clock.takes(1e-3 * (3 + rank)), rounds=5, **kwargs)
        # Of each pair of calls, the slowest rank's: 4 ms to 1 ms, whichever rank that is.
        ours, peer = clock.takes(4e-3 if rank else 2e-3), clock.takes(0.5e-3 if rank else 1e-3)
        return timing, compare(ours, peer, **kwargs)


def test_the_slowest_rank_counts_on_all_ranks():
    (first, compared), second = run_ranks(rank_slower_by_rank, 2)
    assert (first, compared) == second
    assert first.us_p50 == pytest.approx(4000)
    assert first.skew_pct == pytest.approx(25)
    assert compared.ratio_p50 == pytest.approx(4)


def test_after_capture_is_called_once_the_graph_is_there(monkeypatch):
    # torch's side of a capture, without a GPU: only the order counts here.
    happened = []

    @contextlib.contextmanager
    def captured(*_, **__):
        happened.append("capture")
        yield
        happened.append("captured")

    for name in ("device", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    subject = Subject(lambda: happened.append("call"), None, None, "eager", False, 2, "cpu", None)
    subject.stream, subject.after_capture = None, lambda: happened.append("after")
    subject._capture()
    assert happened == ["call", "call", "capture", "call", "call", "captured", "after"]


def test_after_capture_is_not_called_without_a_graph():
    def fail():
        raise AssertionError("nothing was captured")

    time_collective(lambda: None, mode="eager", calls=1, rounds=1, device="cpu", after_capture=fail)


def test_quantile():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2], 0.5) == 1.5
    assert quantile([0, 10, 20, 30, 40, 50], 0.2) == 10
    assert quantile([7], 0.8) == 7


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "graph"}, "needs a GPU"),
        ({"mode": "fast"}, "'fast'"),
        ({"mode": "eager", "calls": 0}, "calls must be at least 1, got 0"),
        ({"mode": "eager", "rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        time_collective(lambda: None, device="cpu", **kwargs)


def test_compare_refuses_few_rounds():
    with pytest.raises(ValueError, match="rounds must be at least 30, got 29"):
        compare(lambda: None, lambda: None, mode="eager", rounds=29, device="cpu")
