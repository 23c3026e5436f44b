"""The timer on CPUs: what it measures, which inputs the calls get, several ranks."""

import time

import pytest
import torch

from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.timer import ROTATION_BYTES, compare, quantile, rotation_sets, time_collective


def test_a_known_duration_is_measured():
    timing = time_collective(lambda: time.sleep(5e-3), mode="eager", calls=2, rounds=5, warmup=1, device="cpu")
    assert 5000 <= timing.us_p20 <= timing.us_p50 <= timing.us_p80
    assert timing.us_p50 < 8000
    assert timing.skew_pct == 0


def test_per_call_time_does_not_depend_on_the_number_of_calls():
    one, ten = (
        time_collective(lambda: time.sleep(3e-3), mode="eager", calls=calls, rounds=5, device="cpu").us_p50
        for calls in (1, 10)
    )
    assert one == pytest.approx(ten, rel=0.5)


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


def test_compare_gives_the_ratio_and_changes_the_order():
    order = []

    def one(what, seconds):
        order.append(what)
        time.sleep(seconds)

    found = compare(
        lambda: one("a", 1e-3), lambda: one("b", 3e-3), mode="eager", calls=1, rounds=30, warmup=0, device="cpu"
    )
    assert 0.25 < found.ratio_p50 < 0.5
    assert found.ratio_p20 <= found.ratio_p50 <= found.ratio_p80
    assert found.ours.us_p50 < found.peer.us_p50
    assert found.sm_mhz is None
    assert sorted(order) == ["a"] * 30 + ["b"] * 30
    firsts = order[::2]
    assert firsts.count("a") == firsts.count("b") == 15


def rank_slower_by_rank(mesh):
    rank = mesh["tp"].get_local_rank()
    kwargs = dict(group=mesh["tp"], mode="eager", device="cpu", calls=2)
    timing = time_collective(lambda: time.sleep(4e-3 * (1 + rank)), rounds=5, **kwargs)
    compared = compare(lambda: time.sleep(1e-3 * (1 + rank)), lambda: time.sleep(1e-3), rounds=30, **kwargs)
    return timing, compared


def test_the_slowest_rank_counts_on_all_ranks():
    (first, compared), (second, _) = run_ranks(rank_slower_by_rank, 2)
    assert first == second
    assert 8000 <= first.us_p50 < 16000
    assert 25 < first.skew_pct < 75
    assert 1.3 < compared.ratio_p50 < 2.7


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
