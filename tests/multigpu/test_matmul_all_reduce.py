"""Matmuls with their communication inside, on two and four GPUs: float64, equal bits, graphs, skew, the most rows."""

import pytest
import torch
import torch.distributed as dist
from _matmul_ranks import EPS, Layer, matmul, poisoned, use_kernels
from _worlds import WORLDS

import fused_parallel as fp
from fused_parallel.comm.workspace import workspace_of
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close


class Problem:
    """Whole operands, alike on all ranks, and this rank's parts."""

    def __init__(self, group, m: int, k: int, n: int, dtype, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        rank, world = group.get_local_rank(), group.size()

        def make(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)

        self.group, self.rank, self.world = group, rank, world
        self.x, self.weight = make(m, world * k), make(n, world * k, scale=(world * k) ** -0.5)
        self.residual, self.norm, self.bias = make(m, n), make(n), make(n)
        self.xk, self.wk = (t.chunk(world, -1)[rank].contiguous() for t in (self.x, self.weight))
        self.rows = self.x[rank * (m // world) : (rank + 1) * (m // world)].clone()

    def run(self):
        g = {"group": self.group}
        out = [fp.matmul_all_reduce(self.xk, self.wk, **g), fp.matmul_all_reduce(self.xk, self.wk, self.bias, **g)]
        out += fp.matmul_all_reduce_add_rms_norm(self.xk, self.wk, self.residual, self.norm, EPS, **g)
        out += fp.matmul_all_reduce_add_rms_norm(self.xk, self.wk, self.residual, self.norm, EPS, self.bias, **g)
        if len(self.x) % self.world == 0:
            out.append(fp.matmul_reduce_scatter(self.xk, self.wk, **g))
            out.append(fp.all_gather_matmul(self.rows, self.weight, **g))
        return out

    def expected(self):
        product = self.x.double() @ self.weight.double().t()

        def normed(new):
            return [new * (new.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.double(), new]

        out = [product, product + self.bias.double(), *normed(product + self.residual.double())]
        out += normed(product + self.bias.double() + self.residual.double())
        if len(self.x) % self.world == 0:
            out += [product.chunk(self.world, 0)[self.rank], product]
        return out


def shapes(mesh, dtype):
    group = mesh["tp"]
    use_kernels(group)
    for m, k, n in (
        (1, 64, 128),
        (3, 100, 72),
        (17, 512, 4096),
        (127, 256, 128),
        (64, 2880, 2880),
        (130, 512, 136),
        (768, 2000, 520),  # the gather's columns come in three parts
        (1024, 1060, 8704),  # so they do where the own tiles are more than one for each multiprocessor
        (4097, 128, 7168),
    ):
        problem = Problem(group, m, k, n, dtype, seed=m)
        with poisoned():
            got = problem.run()
        for out, expected in zip(got, problem.expected(), strict=True):
            assert_close(out, expected, factor=4)
        with poisoned():
            again = problem.run()
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), (m, k, n)
        for out in got[:6]:  # what all ranks hold
            theirs = out.clone()
            dist.broadcast(theirs, 0)
            assert torch.equal(theirs, out), (m, k, n)
    fp.check()


@WORLDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes(dtype, world):
    run_ranks(shapes, world, dtype, device="cuda")


def most_rows(mesh):
    """32768 rows; and more than fit the slots at once: two launches of the kernel, one where rows are scattered."""
    layer = Layer(mesh["tp"], 32768, 1288)
    use_kernels(mesh["tp"])
    assert layer.algorithms() == {"persistent"}
    fit = workspace_of(layer.pg).matmul().most_rows(layer.n, False)
    for step in range(2):
        layer.fill(step)
        with poisoned():
            got = layer.run()
        assert not layer.wrong(got), step
    more = Layer(mesh["tp"], fit + 1, 1288)  # one row more than a launch holds, and than whole tiles
    assert len(matmul._launches(more.m, fit)) == 2
    assert more.algorithms() == {"persistent"} and not more.wrong(more.run())
    fp.check()


@WORLDS
def test_most_rows(world):
    run_ranks(most_rows, world, device="cuda")


def replays(mesh, count: int):
    """Three layers in one graph, inputs changed in place, ranks delayed at random, other collectives between."""
    group = mesh["tp"]
    use_kernels(group)
    first, second = Problem(group, 512, 1600, 512, torch.bfloat16, 1), Problem(group, 384, 512, 512, torch.bfloat16, 2)
    few = Problem(group, 16, 136, 2048, torch.bfloat16, 3)

    def body():
        return [*first.run(), fp.all_reduce(first.residual, group=group), *few.run(), *second.run()]

    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = body()
    sleeps = torch.randint(0, 300_000, (count,), generator=torch.Generator().manual_seed(dist.get_rank())).tolist()
    for step in range(count):
        for problem in (first, few, second):
            fresh = Problem(group, len(problem.x), problem.xk.shape[1], len(problem.weight), torch.bfloat16, step)
            problem.xk.copy_(fresh.xk), problem.rows.copy_(fresh.rows), problem.x.copy_(fresh.x)
        for out in captured:
            out.fill_(float("nan"))
        torch.cuda._sleep(sleeps[step])
        graph.replay()
        eager = body() if step % 5 == 0 else None
        if eager is not None:
            assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True)), step
        for got, problem in ((captured[:8], first), (captured[9:17], few), (captured[17:], second)):
            for out, expected in zip(got, Problem.expected(problem), strict=True):
                assert_close(out, expected, factor=4)
    fp.check()


def test_replays_under_skew():
    run_ranks(replays, 2, 60, device="cuda")


def compiled_mlp(mesh):
    group = mesh["tp"]
    use_kernels(group)
    torch.manual_seed(0)
    mlp = fp.nn.ParallelMLP(256, 512, group=group, device="cuda", dtype=torch.bfloat16)
    sizes = {"gate": (512, 256), "up": (512, 256), "down": (256, 512)}
    mlp.load_state_dict({f"{n}_proj.weight": torch.randn(s).bfloat16() / 16 for n, s in sizes.items()})
    x = torch.randn(300, 256).to("cuda", torch.bfloat16)
    with torch.no_grad():
        expected = mlp(x)
        got = torch.compile(mlp, fullgraph=True)(x)
    assert_close(got, expected.double(), factor=2)


def test_compiled_mlp():
    run_ranks(compiled_mlp, 2, device="cuda")
