"""Matmuls with a collective before or after them: what a fused kernel has to beat.

    torchrun --nproc-per-node 2 benchmarks/bench_matmul_all_reduce.py [--M 1 64 ...] [--K 4096 14336] [--N 8192]

Without torchrun it starts one rank a GPU. Operations and rows:

    matmul_all_reduce               x [M, K], weight [N, K] per rank -> [M, N], summed
    matmul_all_reduce_add_rms_norm  the same, the residual added, normalised
    matmul_reduce_scatter           the same as the first -> [M / W, N]
    all_gather_matmul               x [M / W, K], weight [N, K] per rank -> [M, N]

`fused` is this library's operation, `matmul_only` its kernels without the exchange, `cublas` torch's
matmul alone (on the gathered x), `cublas_nccl` matmul and NCCL one after the other (then the add_rms_norm kernel),
`cublas_allreduce` the matmul and this library's all-reduce (with the norm), `torch_fused` torch's
fused_matmul_reduce_scatter and fused_all_gather_matmul. Where W does not divide M the last two operations are not
measured. `bytes` are operands and result of one rank's matmul. `floor_us` = launch + the longest of computing the
matmul, moving `bytes` through memory, and the collective's bytes over the link: all three could happen at once.

The graphs of a shape's implementations are timed in turns: a matmul draws so much power that it slows down what is
measured after it.
"""

from __future__ import annotations

import argparse
import functools

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # registers torch.ops.symm_mem.fused_*
import torch.nn.functional as F
from _common import Bench, main, parser, relative

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.comm import collectives
from fused_parallel.ops.linear import linear
from fused_parallel.testing.timer import rotation_sets

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192, 16384)
DEPTHS = (4096, 14336)
CHECKED_ROWS = 64
OPS = ("matmul_all_reduce", "matmul_all_reduce_add_rms_norm", "matmul_reduce_scatter", "all_gather_matmul")
EPS = 1e-5


class _Shape:
    """One (M, K, N): inputs, the float64 result of some rows, and what the table says of it."""

    def __init__(self, bench: Bench, m: int, k: int, n: int, weights: list[torch.Tensor]):
        self.bench, self.m, self.k, self.n, self.weights = bench, m, k, n, weights
        self.calls = 20 if m <= 512 else 5
        self.blas = "cublas" if bench.device.type == "cuda" else "cpu"
        self.blas_and_backend = f"{self.blas}_{bench.backend}"
        self.part = m // bench.world
        self.checked = torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).long().unique().to(bench.device)

    def full(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bench.random(self.m, self.k, seed=i), self.weights[i % len(self.weights)]

    def part_of(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bench.random(self.part, self.k, seed=i), self.weights[i % len(self.weights)]

    def local(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The checked rows of x @ weight.T in float64."""
        return x[self.checked].double() @ weight.double().t()

    def summed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return collectives.all_reduce_(self.local(x, weight), self.bench.pg)

    def scattered(self, out: torch.Tensor, expected: torch.Tensor) -> float:
        """Error of this rank's part of the rows; 0 where none of the checked rows is in it."""
        first = self.part * self.bench.pg.rank()
        mine = (self.checked >= first) & (self.checked < first + self.part)
        return relative(out[self.checked[mine] - first], expected[mine]) if mine.any() else 0.0

    def floor_us(self, transferred: int) -> float | None:
        c = self.bench.ceilings
        if c is None:
            return None
        itemsize = self.bench.dtype.itemsize
        return c.launch_us + max(c.matmul_us(self.m, self.k, self.n, itemsize), c.transfer_us(transferred * itemsize))

    def measure(self, op: str, impl: str, fn, inputs, check, transferred: int) -> None:
        self.bench.measure(
            op,
            impl,
            fn,
            inputs,
            shape={"M": self.m, "K": self.k, "N": self.n},
            bytes=(self.m * self.k + self.k * self.n + self.m * self.n) * self.bench.dtype.itemsize,
            floor_us=self.floor_us(transferred),
            check=check,
            calls=self.calls,
            rounds=30 if self.m <= 512 else 15,
        )


def _matmul_all_reduce(s: _Shape) -> None:
    pg, world = s.bench.pg, s.bench.world
    sent = 2 * (world - 1) * s.m * s.n // world

    def with_nccl(x, weight):
        return collectives.all_reduce_(F.linear(x, weight), pg)

    def with_ours(x, weight):
        out = F.linear(x, weight)
        return fp.all_reduce(out, group=pg, out=out)

    def fused(x, weight):
        return fp.matmul_all_reduce(x, weight, group=pg)

    def alone(x, weight):
        if x.shape[0] <= _ext.extension().matmul_decode_max_rows:
            return linear(x, weight)
        out = x.new_empty(x.shape[0], weight.shape[0])
        _ext.extension().matmul_only(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            m=x.shape[0],
            n=weight.shape[0],
            k=x.shape[1],
            dtype=_ext.DTYPE_CODES[x.dtype],
            device=x.device.index,
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
        return out

    op = "matmul_all_reduce"
    if s.bench.device.type == "cuda":
        s.measure(op, "matmul_only", alone, s.full, lambda v: relative(alone(*v)[s.checked], s.local(*v)), 0)
    s.measure(op, s.blas, F.linear, s.full, lambda v: relative(F.linear(*v)[s.checked], s.local(*v)), 0)
    for impl, fn in ((s.blas_and_backend, with_nccl), (f"{s.blas}_allreduce", with_ours), ("fused", fused)):
        s.measure(op, impl, fn, s.full, lambda v, fn=fn: relative(fn(*v)[s.checked], s.summed(*v)), sent)


def _matmul_all_reduce_add_rms_norm(s: _Shape) -> None:
    pg, world, bench = s.bench.pg, s.bench.world, s.bench
    sent = 2 * (world - 1) * s.m * s.n // world
    norm = bench.random(s.n, seed=-99)
    dist.broadcast(norm, 0, group=pg)

    def inputs(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        residual = bench.random(s.m, s.n, seed=-100 - i)
        dist.broadcast(residual, 0, group=pg)
        return *s.full(i), residual

    def with_nccl(x, weight, residual):
        return fp.add_rms_norm(collectives.all_reduce_(F.linear(x, weight), pg), residual, norm, EPS)

    def with_ours(x, weight, residual):
        return fp.all_reduce_add_rms_norm(F.linear(x, weight), residual, norm, EPS, group=pg)

    def fused(x, weight, residual):
        return fp.matmul_all_reduce_add_rms_norm(x, weight, residual, norm, EPS, group=pg)

    def check(values, fn) -> float:
        x, weight, residual = values
        new = s.summed(x, weight) + residual[s.checked].double()
        normed = new * (new.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.double()
        got_normed, got_new = fn(*values)
        return max(relative(got_normed[s.checked], normed), relative(got_new[s.checked], new))

    op = "matmul_all_reduce_add_rms_norm"
    s.measure(op, s.blas, lambda x, w, _: F.linear(x, w), inputs, lambda v: 0.0, 0)  # checked above
    for impl, fn in ((s.blas_and_backend, with_nccl), (f"{s.blas}_allreduce", with_ours), ("fused", fused)):
        s.measure(op, impl, fn, inputs, functools.partial(check, fn=fn), sent)


def _matmul_reduce_scatter(s: _Shape) -> None:
    pg = s.bench.pg
    sent = (s.bench.world - 1) * s.part * s.n

    def with_nccl(x, weight):
        return collectives.reduce_scatter(F.linear(x, weight), pg)

    def torch_fused(x, weight):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight.t(), "sum", 0, pg.group_name)

    def fused(x, weight):
        return fp.matmul_reduce_scatter(x, weight, group=pg)

    op = "matmul_reduce_scatter"
    s.measure(op, s.blas, F.linear, s.full, lambda v: relative(F.linear(*v)[s.checked], s.local(*v)), 0)
    for impl, fn in ((s.blas_and_backend, with_nccl), ("torch_fused", torch_fused), ("fused", fused)):
        s.measure(op, impl, fn, s.full, lambda v, fn=fn: s.scattered(fn(*v), s.summed(*v)), sent)


def _all_gather_matmul(s: _Shape) -> None:
    pg = s.bench.pg
    sent = (s.bench.world - 1) * s.part * s.k

    def with_nccl(x, weight):
        return F.linear(collectives.all_gather(x, pg), weight)

    def torch_fused(x, weight):
        return torch.ops.symm_mem.fused_all_gather_matmul(x, [weight.t()], 0, pg.group_name)[1][0]

    def check(fn, values) -> float:
        x, weight = values
        return relative(fn(*values)[s.checked], s.local(collectives.all_gather(x, pg), weight))

    def fused(x, weight):
        return fp.all_gather_matmul(x, weight, group=pg)

    op = "all_gather_matmul"
    s.measure(op, s.blas, F.linear, s.full, lambda v: relative(F.linear(*v)[s.checked], s.local(*v)), 0)
    for impl, fn in ((s.blas_and_backend, with_nccl), ("torch_fused", torch_fused), ("fused", fused)):
        s.measure(op, impl, fn, s.part_of, functools.partial(check, fn), sent)


_RUN = dict(
    zip(
        OPS,
        (_matmul_all_reduce, _matmul_all_reduce_add_rms_norm, _matmul_reduce_scatter, _all_gather_matmul),
        strict=True,
    )
)


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments, in_turns=True)
    n = arguments.N
    for k in arguments.K:
        count = rotation_sets(n * k * bench.dtype.itemsize, 20)
        weights = [bench.random(n, k, seed=-1 - i, scale=k**-0.5) for i in range(count)]
        for m in arguments.M:
            shape = _Shape(bench, m, k, n, weights)
            for op in arguments.ops:
                if op in OPS[2:] and m % bench.world:
                    continue
                _RUN[op](shape)
                bench.take_turns()
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    p.add_argument("--M", type=int, nargs="+", default=ROWS, help=f"tokens, default {' '.join(map(str, ROWS))}")
    p.add_argument("--K", type=int, nargs="+", default=DEPTHS, help="default 4096 14336")
    p.add_argument("--N", type=int, default=8192)
    main(run, p)
