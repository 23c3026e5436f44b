"""The persistent matmul kernel: by itself, and with its exchange between virtual ranks of one GPU."""

import time

import pytest
import torch
from _matmul_cases import NEEDS_HOPPER, operands, summed_products
from _virtual_ranks import VirtualRanks

from fused_parallel import _ext
from fused_parallel.testing.tolerances import assert_close

pytestmark = NEEDS_HOPPER

TILES = 512


class VirtualMatmuls(VirtualRanks):
    """VirtualRanks with the memory that tiles travel through."""

    def __init__(self, world: int, timeout_seconds: float = 20.0, max_threads: int | None = None):
        super().__init__(world, timeout_seconds=timeout_seconds, max_threads=max_threads)
        size = _ext.extension().matmul_workspace_bytes(TILES)
        self.staging = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(world)]
        self.controls = [torch.zeros(8, dtype=torch.uint8, device=self.device) for _ in range(world)]
        bases = [t.data_ptr() for t in self.staging]
        self.matmuls = [
            _ext.extension().MatmulWorkspace(native, bases, TILES, control.data_ptr())
            for native, control in zip(self.native, self.controls, strict=True)
        ]
        torch.cuda.synchronize()

    def matmul(self, rank: int, x, weight, out, scatter: bool) -> None:
        self.matmuls[rank].matmul_all_reduce(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            m=x.shape[0],
            n=weight.shape[0],
            k=x.shape[1],
            scatter=scatter,
            dtype=_ext.DTYPE_CODES[x.dtype],
            stream=self.streams[rank].cuda_stream,
        )

    def run(self, xs, weights, scatter: bool):
        rows = len(xs[0]) // self.world if scatter else len(xs[0])
        outs = [x.new_full((rows, len(weights[0])), float("nan")) for x in xs]
        self.on_all(lambda rank: self.matmul(rank, xs[rank], weights[rank], outs[rank], scatter))
        return outs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul_only(dtype, seed):
    stream = torch.cuda.current_stream().cuda_stream
    shapes = [(1, 8, 8), (127, 64, 256), (128, 64, 256), (129, 72, 264), (300, 2880, 2880), (2048, 512, 1000)]
    for m, k, n in [*shapes, (4097, 1024, 512)]:
        (x,), (weight,) = operands(1, m, k, n, dtype)
        out = x.new_full((m, n), float("nan"))
        arguments = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), m, n, k, _ext.DTYPE_CODES[dtype])
        _ext.extension().matmul_only(*arguments, torch.cuda.current_device(), stream)
        assert_close(out, x.double() @ weight.double().t())


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4, 5])  # five: more sources than are summed at once
@pytest.mark.parametrize("ctas", [None, 3], ids=["all CTAs", "3 CTAs"])  # of a few each has several own tiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums(world, scatter, dtype, ctas, seed):
    ranks = VirtualMatmuls(world, max_threads=ctas and ctas * 512)
    shapes = [(128 * world, 64, 256), (world * 171, 200, 264), (1536, 512, 1000), (world * 128, 2880, 2880)]
    for m, k, n in shapes * 2:
        if m > ranks.matmuls[0].most_rows(n, scatter):
            continue
        if scatter:
            m = m // world * world
        xs, weights = operands(world, m, k, n, dtype)
        outs = ranks.run(xs, weights, scatter)
        whole = summed_products(xs, weights)
        for rank, out in enumerate(outs):
            assert_close(out, whole.chunk(world)[rank] if scatter else whole, factor=2)
            assert scatter or torch.equal(out, outs[0])
        again = ranks.run(xs, weights, scatter)
        assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))
    ranks.check()


def test_graph_with_changing_inputs_and_skew(seed):
    """Replays of chained calls of two shapes with all-reduces between, each rank delayed at random."""
    ranks = VirtualMatmuls(2)
    problems = [operands(2, 512, 256, 512, torch.bfloat16), operands(2, 384, 512, 256, torch.bfloat16)]
    outs = [[x.new_empty(len(xs[0]), len(ws[0])) for x in xs] for xs, ws in problems]
    summed = [torch.empty_like(out) for out in outs[0]]

    def chain(rank):
        for (xs, ws), out in zip(problems, outs, strict=True):
            ranks.matmul(rank, xs[rank], ws[rank], out[rank], False)
            ranks.launch(rank, outs[0][rank], summed[rank], two_shot=False)

    graphs = ranks.skewed_graphs(chain, 8, 100_000)
    for replay in range(100):
        for xs, _ in problems:
            for x in xs:
                x.normal_()
        for tensor in (*outs[0], *outs[1], *summed):
            tensor.fill_(float("nan"))
        graphs[replay % len(graphs)].replay()
        for (xs, ws), out in zip(problems, outs, strict=True):
            assert_close(out[0], summed_products(xs, ws), factor=2)
            assert torch.equal(out[0], out[1]), replay
        assert torch.equal(summed[0], outs[0][0] * 2) and torch.equal(summed[0], summed[1])
    ranks.check()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_calls_of_other_shapes_do_not_mix(late, seed):
    """Three ranks, one of them late: the others go on to a call of another shape, whose flags lie elsewhere."""
    ranks = VirtualMatmuls(3)
    shapes = [(1152, 512, 512, True), (384, 64, 256, False), (1536, 64, 512, False), (387, 512, 256, True)]
    problems = [operands(3, m, k, n, torch.bfloat16) for m, k, n, _ in shapes]
    for _ in range(20):
        outs = []
        for (m, _, n, scatter), (xs, _) in zip(shapes, problems, strict=True):
            rows = m // 3 if scatter else m
            outs.append([x.new_full((rows, n), float("nan")) for x in xs])

        def calls(rank, outs=outs):
            for (*_, scatter), (xs, ws), out in zip(shapes, problems, outs, strict=True):
                ranks.matmul(rank, xs[rank], ws[rank], out[rank], scatter)

        ranks.on_all(calls, [400_000 if rank == late else 0 for rank in range(3)])
        for (*_, scatter), (xs, ws), out in zip(shapes, problems, outs, strict=True):
            whole = summed_products(xs, ws)
            for rank in range(3):
                assert_close(out[rank], whole.chunk(3)[rank] if scatter else whole, factor=2)
    ranks.check()


class VirtualGathers(VirtualRanks):
    """VirtualRanks with the memory that rows are gathered in."""

    def __init__(self, world: int, timeout_seconds=20.0, room: int = 4 << 20, max_threads: int | None = None):
        super().__init__(world, timeout_seconds=timeout_seconds, max_threads=max_threads)
        size = _ext.extension().gather_workspace_bytes(room)
        self.gathered = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(world)]
        self.controls = [torch.tensor([0, 0, 0, 1], dtype=torch.int32, device=self.device) for _ in range(world)]
        bases = [t.data_ptr() for t in self.gathered]
        self.gathers = [
            _ext.extension().GatherWorkspace(native, bases, room, control.data_ptr())
            for native, control in zip(self.native, self.controls, strict=True)
        ]
        torch.cuda.synchronize()

    def launch_gather(self, rank: int, x, weight, out) -> None:
        self.gathers[rank].all_gather_matmul(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            rows=x.shape[0],
            n=weight.shape[0],
            k=x.shape[1],
            dtype=_ext.DTYPE_CODES[x.dtype],
            stream=self.streams[rank].cuda_stream,
        )


@pytest.mark.parametrize("ctas", [None, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_gather_matmul(world, dtype, ctas, seed):
    """Calls of changing shapes, one after the other without waiting, ranks delayed, eager and as replays of a graph; a
    tile for each CTA, and several."""
    ranks = VirtualGathers(world, max_threads=ctas and ctas * 512)
    # Few tiles: SMs are left for copies. Two parts of columns in the second of all worlds, in the last of two ranks; of
    # more it has two parts of rows.
    shapes = [(256, 512, 512), (170, 4040, 264), (1, 64, 264), (130, 72, 520), (300, 1992, 256)]
    problems = []
    for rows, k, n in shapes:
        xs, _ = operands(world, rows, k, 8, dtype)
        _, weights = operands(world, 8, k, n, dtype)
        # Ranks have more columns of a result or fewer, as heads do not always divide evenly.
        weights = [w[: n - 8 * rank].contiguous() for rank, w in enumerate(weights)]
        problems.append((xs, weights, [w.new_full((world * rows, len(w)), float("nan")) for w in weights]))

    def calls(rank):
        for xs, weights, outs in (*problems, problems[0]):
            ranks.launch_gather(rank, xs[rank], weights[rank], outs[rank])

    def check():
        for xs, weights, outs in problems:
            whole = torch.cat(xs).double()
            for weight, out in zip(weights, outs, strict=True):
                assert_close(out, whole @ weight.double().t())
                out.fill_(float("nan"))

    for sleeps in torch.randint(0, 200_000, (5, world)).tolist():
        ranks.on_all(calls, sleeps)
        check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks.on_all(calls)
    for _ in range(50):
        for xs, *_ in problems:
            for x in xs:
                x.normal_()
        graph.replay()
        check()
    ranks.check()


@pytest.mark.parametrize("k", [64, 15000])
def test_gather_names_the_missing_rank(k):
    """Within one timeout, with one part to wait for and with four."""
    ranks = VirtualGathers(2, timeout_seconds=0.5)
    xs, ws = operands(2, 128, k, 128, torch.bfloat16)
    out = torch.empty(256, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    begin = time.monotonic()
    ranks.start()
    ranks.launch_gather(0, xs[0], ws[0], out)
    torch.cuda.synchronize()
    assert 0.4 < time.monotonic() - begin < 1.8
    assert ranks.native[0].failure() == "all_gather_matmul on rank 0 waited in vain for rank 1 (call 1)"
    with pytest.raises(RuntimeError, match="waited in vain for rank 1"):
        ranks.launch_gather(0, xs[0], ws[0], out)


@pytest.mark.parametrize("ctas", [8, 3, 1])  # of 8 tiles: a tile each, several, and all
def test_missing_rank_is_named_within_the_timeout(ctas):
    """And no sum that lacks its partial is announced to it."""
    ranks = VirtualMatmuls(2, timeout_seconds=0.5, max_threads=ctas * 512)
    xs, ws = operands(2, 512, 256, 512, torch.bfloat16)
    out = torch.empty(512, 512, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    begin = time.monotonic()
    ranks.start()
    ranks.matmul(0, xs[0], ws[0], out, False)
    torch.cuda.synchronize()
    assert 0.4 < time.monotonic() - begin < 1.5
    assert ranks.native[0].failure() == "matmul_all_reduce on rank 0 waited in vain for rank 1 (call 1)"
    # What has come to rank 1: rank 0's partials of its tiles, then the sums of rank 0's own.
    flags = ranks.staging[1][2 * TILES * 128 * 256 * 2 :].view(torch.int32).view(2, TILES, -1)[1]
    owned = 4 * 2 // 2
    assert flags[:owned].eq(1).all() and not flags[owned:].any()
    with pytest.raises(RuntimeError, match="waited in vain for rank 1"):
        ranks.matmul(0, xs[0], ws[0], out, False)


def test_errors():
    ranks = VirtualMatmuls(2)
    xs, ws = operands(2, 256, 64, 256, torch.bfloat16)
    with pytest.raises(RuntimeError, match="100 rows; must be from 129 to"):
        ranks.matmul(0, xs[0][:100], ws[0], xs[0], False)
    with pytest.raises(RuntimeError, match="only float16 and bfloat16"):
        ranks.matmul(0, xs[0].float(), ws[0].float(), xs[0].float(), False)
    with pytest.raises(RuntimeError, match="n and k must be multiples of 8"):
        ranks.matmul(0, xs[0][:, :60].contiguous(), ws[0][:, :60].contiguous(), xs[0], False)
