"""The timer on a GPU: graphs, cold inputs, restored inputs."""

import pytest
import torch

from fused_parallel.comm.topology import why_no_nvml
from fused_parallel.testing.timer import Subject, compare, time_collective, time_in_turns


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_twice_the_work_takes_twice_the_time(mode):
    # A kernel of a known number of cycles: both below and above, and far above what a launch costs.
    short, long = (
        time_collective(lambda n=n: torch.cuda._sleep(n), mode=mode, calls=4, rounds=15) for n in (1_000_000, 2_000_000)
    )
    assert long.us_p50 / short.us_p50 == pytest.approx(2, rel=0.15)
    assert 200 < short.us_p50 < 5000  # 0.2 to 5 GHz
    assert short.us_p20 <= short.us_p50 <= short.us_p80


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_rounds_in_turns_do_not_overlap(mode):
    # Where they did, a short round would end while a long one still runs, and both would take some of the other's time.
    cycles = (200_000, 2_000_000, 1_000_000)
    subjects = [Subject(lambda n=n: torch.cuda._sleep(n), mode=mode, calls=4) for n in cycles]
    alone = [time_collective(subject.fn, mode=mode, calls=4, rounds=15).us_p50 for subject in subjects]
    in_turns = [timing.us_p50 for timing in time_in_turns(subjects, rounds=15)]
    assert in_turns == pytest.approx(alone, rel=0.1)
    assert len({subject.stream for subject in subjects}) == 1


def test_a_graph_leaves_out_the_host():
    x = torch.randn(64, device="cuda")
    graph, eager = (time_collective(lambda: x + 1, mode=mode).us_p50 for mode in ("graph", "eager"))
    assert graph < eager


def test_inputs_are_not_in_the_cache():
    size = torch.cuda.get_device_properties(0).L2_cache_size // 3
    hot = torch.randn(size // 4, device="cuda")
    cold = compare(
        lambda x: x.sum(), lambda x: x.sum(), inputs=lambda i: (torch.randn_like(hot),), peer_inputs=lambda i: (hot,)
    )
    # The peer's sets are one tensor again and again: counted as rotated, but it stays in the cache within a round.
    assert cold.ratio_p50 > 1.02, cold
    assert (cold.sm_mhz is None) == (why_no_nvml() is not None)
    assert cold.sm_mhz is None or 100 < cold.sm_mhz[0] <= cold.sm_mhz[1] <= cold.sm_mhz[2] < 5000


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_overwritten_inputs_are_restored_before_every_round(mode):
    made = []

    def inputs(i):
        made.append(torch.full((1000,), float(i), device="cuda"))
        return (made[-1],)

    time_collective(lambda x: x.add_(1), inputs=inputs, mode=mode, mutates=True, calls=4, rounds=5)
    torch.cuda.synchronize()
    assert [x.unique().tolist() for x in made] == [[1.0], [2.0], [3.0], [4.0]]


def test_a_copy_is_as_fast_as_memory_can_be():
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    timing = time_collective(lambda: y.copy_(x), calls=2, rounds=10)
    gb_per_s = 2 * x.nbytes / timing.us_p50 * 1e-3
    assert 100 < gb_per_s < 12000
    assert torch.equal(x, y)


def test_other_streams_are_left_as_they_were():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        time_collective(lambda x: x * 2, inputs=lambda i: (torch.randn(10, device="cuda"),), rounds=2)
        assert torch.cuda.current_stream() == stream
