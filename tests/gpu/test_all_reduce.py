"""The all-reduce kernels on virtual ranks of one GPU: exact sums, equal bits, sentinels, rotation, graphs, bounded
waits."""

import itertools
import time

import pytest
import torch
from _virtual_ranks import VirtualRanks

from fused_parallel import _ext
from fused_parallel.testing.tolerances import assert_close

pytestmark = pytest.mark.skipif(_ext.why_no_kernels() is not None, reason=f"no CUDA kernels: {_ext.why_no_kernels()}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORLDS = [2, 3, 4, 8]
EPS = 1e-5


@pytest.fixture(params=WORLDS, scope="module")
def ranks(request):
    made = VirtualRanks(request.param)
    yield made
    made.check()


def in_rank_order(xs: list[torch.Tensor]) -> torch.Tensor:
    """What the kernels promise to the bit: partials summed in fp32 in rank order, rounded once."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def random(n, dtype, world):
    return [torch.randn(n, device="cuda", dtype=dtype) for _ in range(world)]


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_exactly(ranks, dtype, two_shot, seed):
    """Integers, so that the sum is exact in every dtype and order; odd sizes from 1 to 64 K elements."""
    for n in [*range(1, 40), *range(41, 65536, 2777), 65536]:
        xs = [torch.randint(-8, 9, (n,), device="cuda").to(dtype) for _ in range(ranks.world)]
        expected = sum(x.long() for x in xs)
        for out in ranks.all_reduce(xs, two_shot):
            assert torch.equal(out.long(), expected), n
    ranks.check()


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(ranks, dtype, two_shot, seed):
    for n in (5, 4097, 100_003):
        xs = random(n, dtype, ranks.world)
        outs = ranks.all_reduce(xs, two_shot)
        expected = in_rank_order(xs)
        assert all(torch.equal(out, expected) for out in outs)
        again = ranks.all_reduce([x.clone() for x in xs], two_shot, in_place=True)
        assert all(torch.equal(out, expected) for out in again)


@pytest.mark.parametrize("two_shot", [False, True])
def test_sizes_in_turn(ranks, two_shot, seed):
    """Shrinking and growing batches, dtypes mixed: what a generation held before must have been cleared to its size."""
    for repeat in range(3):
        for step, batch in enumerate((1, 6, 12, 8, 16, 3, 5, 2, 4, 1)):
            xs = random(batch * 2880, DTYPES[(step + repeat) % 3], ranks.world)
            for out in ranks.all_reduce(xs, two_shot if step % 3 else not two_shot):
                assert torch.equal(out, in_rank_order(xs))


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_look_like_the_sentinel(ranks, dtype, two_shot):
    """Signed zeros, the sentinel's own bit pattern, NaN and infinities: results as the sum's, and no wait stalls."""
    begin = time.monotonic()
    pattern = torch.full((4096,), -0x7FFF8000, dtype=torch.int32, device="cuda").view(dtype)  # 0x80008000
    zeros = torch.zeros(999, device="cuda", dtype=dtype)
    for values in (zeros, -zeros, pattern):
        for out in ranks.all_reduce([values.clone() for _ in range(ranks.world)], two_shot):
            assert torch.allclose(out.float(), values.float() * ranks.world, rtol=0, atol=1e-40)
    xs = random(1000, dtype, ranks.world)
    xs[0][::3], xs[1][::5], xs[1][7] = float("inf"), float("nan"), float("-inf")
    expected = in_rank_order(xs)
    for out in ranks.all_reduce(xs, two_shot):
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))
    ranks.check()
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_and_all_gather(ranks, dtype, seed):
    """In turn with all-reduces, so that generations change hands between kinds of calls."""
    for n in (8, 16, 1000, 4096, 100_000):
        xs = random(ranks.world * n, dtype, ranks.world)
        parts = [torch.full((n,), float("nan"), device="cuda", dtype=dtype) for _ in xs]
        gathered = [torch.full_like(x, float("nan")) for x in xs]
        ranks.start()
        for rank in range(ranks.world):
            ranks.launch_part("reduce_scatter", rank, xs[rank], parts[rank])
            ranks.launch_part("all_gather", rank, parts[rank], gathered[rank])
        ranks.finish()
        summed = ranks.all_reduce(xs, two_shot=n % 16 == 0)
        expected = in_rank_order(xs)
        for rank in range(ranks.world):
            assert torch.equal(parts[rank], expected[rank * n : (rank + 1) * n])
            assert torch.equal(gathered[rank], expected) and torch.equal(summed[rank], expected)
    ranks.check()


# The last does not fit the slots.
NORM_SHAPES = [
    (1, 8192),
    (3, 2880),
    (16, 8192),
    (17, 8192),
    (70, 4096),
    (200, 8192),
    (5, 16384),
    (2, 64),
    (33, 512),
    (700, 8192),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(ranks, dtype, seed):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernel with the norm needs Hopper")
    big = VirtualRanks(ranks.world, slot_bytes=8 << 20)
    for (rows, hidden), cluster in itertools.product(NORM_SHAPES, (0, 1, 2, 4, 8)):
        xs = [x.view(rows, hidden) for x in random(rows * hidden, dtype, ranks.world)]
        residual, weight = (torch.randn(s, device="cuda", dtype=dtype) for s in ((rows, hidden), (hidden,)))
        outs = big.all_reduce_add_rms_norm(xs, residual, weight, EPS, cluster)
        new = (in_rank_order(xs).float() + residual.float()).to(dtype)
        normed = new.double() / (new.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        for got_normed, got_new in outs:
            assert torch.equal(got_new, new), (rows, hidden)
            assert_close(got_normed, normed)
            assert torch.equal(got_normed, outs[0][0])
    big.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_with_changing_inputs_and_skew(ranks, dtype, seed):
    """A hundred replays of a graph of calls of different sizes, each rank's stream delayed at random; eager calls
    between."""
    sizes = (17, 40_000, 2880, 100_000)
    xs = [random(n, dtype, ranks.world) for n in sizes]
    outs = [[torch.empty_like(x) for x in group] for group in xs]

    def calls(rank):
        for i in range(len(sizes)):
            ranks.launch(rank, xs[i][rank], outs[i][rank], two_shot=i % 2 == 1)

    graphs = ranks.skewed_graphs(calls, 10, 60_000)
    for replay in range(100):
        for group in xs:
            for x in group:
                x.normal_()
        for group in outs:
            for out in group:
                out.fill_(float("nan"))
        if replay % 10 == 3:
            ranks.on_all(calls, [60_000 * (rank % 2) for rank in range(ranks.world)])
        else:
            graphs[replay % len(graphs)].replay()
        for group, results in zip(xs, outs, strict=True):
            expected = in_rank_order(group)
            assert all(torch.equal(out, expected) for out in results), replay
    ranks.check()


def test_missing_rank_is_named_within_the_timeout():
    """Rank 1 never comes: rank 0's kernels end, the record names it, and a chain of calls costs one timeout."""
    ranks = VirtualRanks(2, timeout_seconds=0.5)
    x = torch.randn(5000, device="cuda")
    torch.cuda.synchronize()
    begin = time.monotonic()
    ranks.start()
    for _ in range(160):
        ranks.launch(0, x, torch.empty_like(x), two_shot=False)
    torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    assert 0.4 < seconds < 1.5
    assert ranks.native[0].failed_rank() == 1
    assert ranks.native[0].failure() == "all_reduce (one-shot) on rank 0 waited in vain for rank 1 (call 0)"
    assert ranks.native[1].failure() == "" and ranks.native[1].failed_rank() == -1


def test_a_late_rank_never_sums_what_a_failed_one_sent():
    """Rank 0 gives up on rank 1 and is called on; when rank 1 comes at last, it must not take later pushes of rank 0
    for those it waits for."""
    ranks = VirtualRanks(2, timeout_seconds=0.3)
    xs = [[torch.full((4000,), float(10 * call + rank + 1), device="cuda") for rank in range(2)] for call in range(8)]
    outs = [[torch.full_like(x, float("nan")) for x in pair] for pair in xs]
    torch.cuda.synchronize()
    for call in range(8):
        ranks.launch(0, xs[call][0], outs[call][0], two_shot=False)
    torch.cuda.synchronize()
    assert ranks.native[0].failed_rank() == 1
    for call in range(8):
        ranks.launch(1, xs[call][1], outs[call][1], two_shot=False)
    torch.cuda.synchronize()
    assert torch.equal(outs[0][1], xs[0][0] + xs[0][1])  # rank 0 had sent this before it gave up
    assert ranks.native[1].failed_rank() == 0
    assert all(pair[1].isnan().all() for pair in outs[2:])  # a failed group's calls do nothing


def test_streams_are_ordered_or_refused(seed):
    ranks = VirtualRanks(2)
    sides = [torch.cuda.Stream() for _ in range(2)]
    xs = random(50_000, torch.float32, 2)
    for turn in range(20):
        previous = list(ranks.streams)
        outs = ranks.all_reduce(xs)
        ranks.streams, sides = sides, previous  # the next call comes on other streams, with no order between them
        again = [torch.empty_like(x) for x in xs]
        for rank in range(2):
            ranks.launch(rank, xs[rank], again[rank], two_shot=turn % 2 == 0)
        torch.cuda.synchronize()
        assert all(torch.equal(a, in_rank_order(xs)) for a in (*outs, *again))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured in one CUDA graph on different streams"), torch.cuda.graph(graph):
        ranks.start()
        for stream in sides:
            stream.wait_stream(torch.cuda.current_stream())
        try:
            for _ in range(2):
                ranks.launch(0, xs[0], again[0], two_shot=False)
                ranks.streams, sides = sides, ranks.streams
        finally:
            for stream in (*ranks.streams, *sides):
                torch.cuda.current_stream().wait_stream(stream)


def test_errors():
    ranks = VirtualRanks(2, slot_bytes=1024)
    x = torch.randn(1000, device="cuda")
    with pytest.raises(RuntimeError, match="a grid of 0 CTAs of 100 threads"):
        ranks.launch(0, x, x, two_shot=False, threads=100)
    with pytest.raises(RuntimeError, match="not aligned to 16 bytes"):
        ranks.launch(0, x[1:9], x[1:9], two_shot=False)
    with pytest.raises(RuntimeError, match=r"\[2, 500\]: a row does not fit slots of 1024 bytes"):
        ranks.launch_norm(0, x.view(2, 500), x, x, x, x, EPS)
    with pytest.raises(RuntimeError, match=r"all_gather: parts of 10 elements .* no multiple of 16 bytes"):
        ranks.launch_part("all_gather", 0, x[:10], x)
    with pytest.raises(RuntimeError, match="AllReduceWorkspace: rank 2 of 2"):
        _ext.extension().AllReduceWorkspace(2, [1, 2], 1024, 1, 1, 1.0, 0, 1)
