"""Attention output and MLP of a transformer layer on all GPUs against one: what splitting a layer gains.

    torchrun --nproc-per-node 2 benchmarks/bench_block.py [--model llama-3-70b] [--M 1 8 64 2048 8192]

Without torchrun it starts one rank a GPU. The attention's output projection, residual, norm, the gated MLP, residual,
norm, each rank its share of random weights, M tokens, in one graph. Rows:

    one_gpu                  the whole block on one GPU, by the same modules
    fused                    split over all ranks
    fused_sequence_parallel  split, and every rank holds its rows of what is between (M divisible by the ranks)
    nccl                     split, cuBLAS, NCCL (or Gloo) and the add_rms_norm kernel

Graphs are timed in turns. `bytes`: one rank's weights. `floor_us` = launch + the longer of reading them and computing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _common import Bench, main, parser, relative

import fused_parallel as fp

MODELS = {"llama-3-8b": (4096, 14336), "llama-3-70b": (8192, 28672), "llama-3-405b": (16384, 53248)}
EPS = 1e-5
TOLERANCE = 0.03  # bf16, two matmuls deep, against one GPU


class _Block(torch.nn.Module):
    def __init__(self, hidden: int, intermediate: int, group, bench: Bench, sequence_parallel: bool = False):
        super().__init__()
        options = {"group": group, "device": bench.device, "dtype": bench.dtype, "sequence_parallel": sequence_parallel}
        self.o_proj = fp.nn.RowParallelLinear(hidden, hidden, **options)
        self.mlp = fp.nn.ParallelMLP(hidden, intermediate, **options)
        self.norm = fp.nn.RMSNorm(hidden, EPS, device=bench.device, dtype=bench.dtype)
        self.norm.weight.fill_(1.0)

    def forward(self, attended: torch.Tensor, residual: torch.Tensor):
        normed, residual = self.o_proj(attended, residual, self.norm)
        return self.mlp(normed, residual, self.norm)


def _nccl(block: _Block, pg: dist.ProcessGroup) -> Callable:
    def reduce(x, residual):
        dist.all_reduce(x, group=pg)
        return fp.add_rms_norm(x, residual, block.norm.weight, EPS)

    def run(attended, residual):
        normed, residual = reduce(F.linear(attended, block.o_proj.weight), residual)
        gated = fp.silu_mul(F.linear(normed, block.mlp.gate_up_proj.weight))
        return reduce(F.linear(gated, block.mlp.down_proj.weight), residual)

    return run


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments, in_turns=True)
    with torch.no_grad():
        return _run(bench, arguments)


def _run(bench: Bench, arguments: argparse.Namespace) -> int:
    hidden, intermediate = MODELS[arguments.model]
    world, rank, pg = bench.world, bench.pg.rank(), bench.pg
    alone = [dist.new_group([r]) for r in range(world)][rank]
    whole = _Block(hidden, intermediate, alone, bench)
    generator = torch.Generator(bench.device).manual_seed(0)
    full = {"o_proj.weight": (hidden, hidden)} | {
        f"mlp.{n}_proj.weight": (intermediate, hidden)[:: 1 if n != "down" else -1] for n in ("gate", "up", "down")
    }
    state = {
        name: torch.randn(shape, device=bench.device, dtype=bench.dtype, generator=generator).mul_(shape[1] ** -0.5)
        for name, shape in full.items()
    }
    blocks = {"one_gpu": whole, "fused": _Block(hidden, intermediate, pg, bench)}
    blocks["fused_sequence_parallel"] = _Block(hidden, intermediate, pg, bench, sequence_parallel=True)
    for block in blocks.values():
        block.load_state_dict(state, strict=False)
    weights = sum(p.numel() for p in whole.parameters())
    functions = blocks | {bench.backend: _nccl(blocks["fused"], pg)}
    for m in arguments.M:
        for impl, function in functions.items():
            ranks = 1 if impl == "one_gpu" else world
            scattered = impl == "fused_sequence_parallel"
            if scattered and m % world:
                continue

            def inputs(i: int, m=m, ranks=ranks, scattered=scattered):
                whole = torch.Generator(bench.device).manual_seed(i)
                attended, residual = torch.randn(2, m, hidden, device=bench.device, dtype=bench.dtype, generator=whole)
                if ranks > 1:
                    attended = attended.chunk(world, -1)[rank].contiguous()
                return attended, residual.chunk(world)[rank].contiguous() if scattered else residual

            def check(values, function=function, ranks=ranks, scattered=scattered):
                expected = torch.cat(whole(*of_one(0)), -1)
                got = torch.cat(function(*values), -1)
                return relative(got, expected.chunk(world)[rank] if scattered else expected)

            def of_one(i: int, m=m):
                generator = torch.Generator(bench.device).manual_seed(i)
                return tuple(torch.randn(2, m, hidden, device=bench.device, dtype=bench.dtype, generator=generator))

            c, itemsize = bench.ceilings, bench.dtype.itemsize
            bench.measure(
                "block",
                impl,
                function,
                inputs,
                shape={"model": arguments.model, "tp": ranks, "M": m},
                bytes=weights * itemsize // ranks,
                floor_us=c and c.launch_us + c.matmul_us(m, hidden, weights // hidden // ranks, itemsize),
                check=check,
                tolerance=TOLERANCE,
                calls=4 if m <= 512 else 2,
                rounds=12,
            )
        bench.take_turns()
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="llama-3-70b")
    p.add_argument("--M", type=int, nargs="+", default=(1, 8, 64, 2048, 8192))
    main(run, p)
