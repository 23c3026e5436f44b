"""What stands where in the layer of bench_block.py: kernel by kernel, when it starts and how long it takes.

    python benchmarks/block_timeline.py [--M 1 8 64]

Prints, for the rows of bench_block.py and for `whole` (cuBLAS and this library's all-reduce + residual + RMSNorm in the
row-parallel layers, whatever the tuning table says), the medians over a graph's blocks on rank 0, in microseconds from
the start of the block's first kernel, and the time of a block without the profiler. Kernels of one block overlap where
one lets the next in early.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Bench, captured, main, parser
from bench_block import MODELS, _Block, _nccl
from torch.profiler import ProfilerActivity, profile

from fused_parallel.comm import tuning
from fused_parallel.comm.capabilities import agree
from fused_parallel.comm.workspace import workspace_of

BLOCKS, REPLAYS, TIMED = 6, 8, 20  # blocks in a graph; replays under the profiler; and before, by events


@contextlib.contextmanager
def _chosen(pg: dist.ProcessGroup, choice: tuning.Choice | None):
    """Row-parallel layers of few rows by `choice` instead of the table's."""
    table = agree(pg).tuning
    before = dict(table)
    if choice is not None:
        table |= {op: [(None, choice)] for op in ("matmul_all_reduce", "matmul_all_reduce_add_rms_norm")}
        workspace_of(pg).forget_choices()
    try:
        yield
    finally:
        table |= before
        if choice is not None:
            workspace_of(pg).forget_choices()


def _timeline(bench: Bench, name: str, run: Callable[[], object]) -> None:
    replay = captured(lambda: [run() for _ in range(BLOCKS)])
    for _ in range(5):
        replay()
    torch.cuda.synchronize()
    dist.barrier(group=bench.pg)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(TIMED):
        replay()
    end.record()
    torch.cuda.synchronize()
    us = 1e3 * start.elapsed_time(end) / (TIMED * BLOCKS)
    dist.barrier(group=bench.pg)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    on_gpu = (e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_gpu)
    kernels, rest = divmod(len(events), REPLAYS * BLOCKS)
    bench.say(f"{name}: {us:.1f} us a block")
    if rest or not kernels:
        bench.say(f"  {len(events)} kernels in {REPLAYS * BLOCKS} blocks: not alike")
        return
    blocks = [events[i : i + kernels] for i in range(0, len(events), kernels)]
    blocks = [block for i, block in enumerate(blocks) if i % BLOCKS]  # a graph's first begins on an idle GPU
    for k, (_, _, kernel) in enumerate(blocks[0]):
        begins = statistics.median(block[k][0] - block[0][0] for block in blocks)
        takes = statistics.median(block[k][1] - block[k][0] for block in blocks)
        bench.say(f"  {begins:8.1f} + {takes:7.1f}  {kernel[:100]}")


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments, floors=False)
    hidden, intermediate = MODELS[arguments.model]
    pg, world = bench.pg, bench.world
    alone = [dist.new_group([r]) for r in range(world)][pg.rank()]
    with torch.no_grad():
        blocks = {
            "one_gpu": _Block(hidden, intermediate, alone, bench),
            "fused": _Block(hidden, intermediate, pg, bench),
            "fused_sequence_parallel": _Block(hidden, intermediate, pg, bench, sequence_parallel=True),
        }
        for p in (p for block in blocks.values() for p in block.parameters() if p.dim() == 2):
            p.normal_(std=p.shape[1] ** -0.5)
        functions = blocks | {"whole": blocks["fused"], bench.backend: _nccl(blocks["fused"], pg)}
        for m in arguments.M:
            for name, function in functions.items():
                scattered = name == "fused_sequence_parallel"
                if scattered and m % world:
                    continue
                ranks = 1 if name == "one_gpu" else world
                x = torch.randn(m, hidden // ranks, device=bench.device, dtype=bench.dtype)
                residual = torch.randn(m // world if scattered else m, hidden, device=bench.device, dtype=bench.dtype)
                with _chosen(pg, tuning.WHOLE if name == "whole" else None):
                    _timeline(bench, f"{name} M={m}", lambda f=function, x=x, r=residual: f(x, r))
    return 0


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="llama-3-70b")
    p.add_argument("--M", type=int, nargs="+", default=(1, 8, 64))
    main(run, p)
