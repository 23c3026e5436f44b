"""Matmuls with their communication inside, on several GPUs: a thousand replays under skew, streams, and what is made at
first use."""

import pytest
import torch
import torch.distributed as dist
from _matmul_ranks import Layer, use_kernels
from _worlds import WORLDS

import fused_parallel as fp
from fused_parallel.comm.workspace import workspace_of
from fused_parallel.testing.spawn import run_ranks


def replays(mesh, kind: str, count: int):
    """Layers of several sizes in one graph, inputs changed in place, ranks delayed at random, eager calls on another
    stream between."""
    group = mesh["tp"]
    with fp.use("fused"):
        if kind == "decode":
            use_kernels(group)
            layers = [Layer(group, m, n) for m, n in ((1, 512), (7, 264), (40, 512), (16, 2048))]
            algorithms = [layer.algorithms_of_few() for layer in layers]
        else:
            use_kernels(group, few=0)
            tiles = 128 * (group.size() - 1)  # and a row of tiles for every rank, the least
            layers = [Layer(group, tiles + group.size(), 256), Layer(group, tiles + 1, 8, 8)]
            algorithms = [layer.algorithms() for layer in layers]
        assert all(found == {kind} for found in algorithms), algorithms
        _replay(group.get_local_rank(), layers, kind == "persistent", count)


def _replay(rank: int, layers: list[Layer], all_forms: bool, count: int) -> None:
    def body():
        return [layer.run() if all_forms else layer.few() for layer in layers]

    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = body()
    side = torch.cuda.Stream()
    sleeps = torch.randint(0, 200_000, (count,), generator=torch.Generator().manual_seed(rank)).tolist()
    for step in range(count):
        for i, layer in enumerate(layers):
            layer.fill(10 * step + i)
        for outs in captured:
            for out in outs:
                out.fill_(float("nan"))
        torch.cuda._sleep(sleeps[step])
        if step % 10 == 7:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                got = body()
            torch.cuda.current_stream().wait_stream(side)
        else:
            graph.replay()
            got = captured
        wrong = [layer.wrong(outs) for layer, outs in zip(layers, got, strict=True)]
        assert not torch.stack(wrong).any(), (step, wrong)
    fp.check()


@WORLDS
@pytest.mark.parametrize("kind", ["decode", "persistent"])
def test_thousand_replays_under_skew(kind, world):
    run_ranks(replays, world, kind, 1000, device="cuda")


def two_streams(mesh):
    """Two layers of one group at once on a stream each, without waiting between: operations follow each other in the
    order of the calls, which is the same on all ranks."""
    group = mesh["tp"]
    rank = group.get_local_rank()
    use_kernels(group, few=100 << 10)
    few, many = Layer(group, 40, 512), Layer(group, 300, 512)
    assert few.algorithms_of_few() == {"decode"} and many.algorithms() == {"persistent"}
    calls = [(few, few.few), (many, many.run)]
    for _, call in calls:
        call()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(100):
        for i, (layer, _) in enumerate(calls):
            layer.fill(2 * turn + i)
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        got = []
        for i, (layer, call) in enumerate(calls * 2):
            with torch.cuda.stream(streams[(i + turn) % 2]):
                if rank == (turn + i) % 3 % 2:
                    torch.cuda._sleep(100_000)
                got.append((layer, call()))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        wrong = [layer.wrong(outs) for layer, outs in got]
        assert not torch.stack(wrong).any(), (turn, wrong)
    fp.check()


def test_two_layers_on_two_streams():
    run_ranks(two_streams, 2, device="cuda")


def two_streams_in_a_capture(mesh):
    group = mesh["tp"]
    use_kernels(group, few=100 << 10)
    few, many = Layer(group, 40, 512), Layer(group, 300, 512)
    few.few(), many.run()
    torch.cuda.synchronize()
    for first, second in ((few.few, many.few), (many.gathered, few.few), (many.scattered, many.gathered)):
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        refused = pytest.raises(RuntimeError, match="captured in one CUDA graph on different streams")
        with refused, torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            try:
                first()
                with torch.cuda.stream(side):
                    second()
            finally:
                torch.cuda.current_stream().wait_stream(side)
    assert not torch.stack([few.wrong(few.few()), many.wrong(many.run())]).any()  # the group is as before
    fp.check()


def test_two_streams_in_one_capture_are_refused():
    run_ranks(two_streams_in_a_capture, 2, device="cuda")


def first_use(mesh):
    """A new group: each kind of memory is made by the first eager call that wants it, and a capture before is refused,
    which leaves the group as it was."""
    group = dist.new_group([0, 1])
    few, many = Layer(group, 8, 512), Layer(group, 300, 512)

    def refused(match: str, call) -> None:
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match=f"{match}.* cannot be captured"), torch.cuda.graph(graph):
            many.residual.add(1)  # a capture of nothing is warned of
            call()

    refused("first operation of a group", few.few)
    use_kernels(group, few=100 << 10)
    workspace = workspace_of(group)

    def made():
        return workspace._matmul is not None, workspace._gather is not None, len(workspace._handles)

    assert not few.wrong(few.few()) and made() == (False, False, 1)
    for call in (many.few, many.scattered):
        refused("first matmul_all_reduce or matmul_reduce_scatter of many rows", call)
    refused("first all_gather_matmul of many rows", many.gathered)
    assert not few.wrong(few.few()) and made() == (False, False, 1)
    many.scattered()
    assert made() == (True, False, 2)
    refused("first all_gather_matmul of many rows", many.gathered)
    assert not many.wrong(many.run()) and made() == (True, True, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [few.few(), many.run()]
    for step in range(5):
        for layer, outs in zip((few, many), captured, strict=True):
            layer.fill(step)
            for out in outs:
                out.fill_(float("nan"))
        graph.replay()
        assert not few.wrong(captured[0]) and not many.wrong(captured[1]), step
    larger = Layer(group, 6000, 1024)
    assert larger.algorithms() == {"persistent"} and not larger.wrong(larger.run())
    assert made() == (True, True, 3)  # nothing grows
    fp.check()


def test_first_use():
    run_ranks(first_use, 2, device="cuda")
