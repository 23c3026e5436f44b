"""Measuring the tuning table of a group (`comm.tuning`): every algorithm at every size, the fastest is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..comm import collectives, tuning
from ..comm.groups import init
from ..comm.launch import launch
from ..comm.probe_collectives import rank_environment
from ..comm.tuning import Choice, Table
from ..comm.workspace import AllReduceWorkspace, why_no_workspace, workspace_of
from ..testing.timer import Timing, time_collective
from .add_rms_norm import add_norm
from .all_reduce import launch_all_reduce
from .all_reduce_add_rms_norm import launch_reduce_norm
from .tune_matmul import measure_matmuls

HIDDEN = 8192
DTYPE = torch.bfloat16
OPS = ("all_reduce", "all_reduce_add_rms_norm")
_EPS = 1e-5


def rows_tried(quick: bool) -> list[int]:
    """Rows of HIDDEN elements of DTYPE: 16 KB to 128 MB."""
    return [1, 32, 1024] if quick else [2**i for i in range(14)]


def candidates(op: str, world: int, rows: int, multiprocessors: int) -> list[Choice]:
    """What is tried for a payload of `rows` rows."""
    if op == "all_reduce_add_rms_norm":
        kernels = [Choice("one_shot", cluster=cluster) for cluster in (1, 2, 4, 8)]
        if rows > 32:  # the largest grids that let the next kernel become resident
            kernels += [Choice("one_shot", cluster=1, ctas=multiprocessors // 2 // n) for n in (1, 2)]
        return [*kernels, tuning.LIBRARY]
    # At two ranks two-shot sends as much and waits twice: only for what it saves in memory traffic.
    algorithms = ["one_shot"] if world == 2 and rows <= 32 else ["one_shot", "two_shot"]
    if rows <= 16:
        grids = [(64, 0), (128, 0), (256, 0)]
    else:
        grids = [
            (128, 0),
            (256, 0),
            (512, 0),
            (128, multiprocessors * 2),
            (256, multiprocessors),
            (512, multiprocessors // 2),
        ]
    return [*(Choice(algorithm, *grid) for algorithm in algorithms for grid in grids), tuning.LIBRARY]


def function(op: str, choice: Choice, workspace: AllReduceWorkspace, weight: torch.Tensor, before: Table) -> Callable:
    """`op` done as `choice` says, as a function of x [rows, HIDDEN] and, with the norm, the residual. `before`: the
    table so far, for the all-reduce that precedes a norm of its own."""
    pg, kernel = workspace.pg, choice.algorithm != "library"

    def reduce(x: torch.Tensor, choice: Choice = choice) -> torch.Tensor:
        if choice.algorithm == "library":
            return collectives.all_reduce_(x, pg)
        launch_all_reduce(x, x, workspace, choice)
        return x

    if op == "all_reduce":
        return reduce
    if kernel:
        return lambda x, residual: launch_reduce_norm(x, residual, weight, _EPS, workspace, choice)

    def separately(x: torch.Tensor, residual: torch.Tensor):
        bytes = x.numel() * x.element_size()
        return add_norm(reduce(x, tuning.choose(before, "all_reduce", bytes)), residual, weight, _EPS)

    return separately


def measure(pg: dist.ProcessGroup, quick: bool, tell: Callable[[str], None] | None = None):
    """Time all candidates on the ranks of `pg`, all of which call this.

    Returns (table, rows): `rows` is a list of (op, payload bytes, Choice, Timing). The same on all ranks.
    """
    workspace = workspace_of(pg)
    device = workspace.device
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    weight = torch.randn(HIDDEN, device=device, dtype=DTYPE)
    table: Table = tuning.default_table(pg.size())
    measured: list[tuple[str, int, Choice, Timing]] = []
    for op in OPS:
        best: list[tuple[int, Choice]] = []
        for rows in rows_tried(quick):
            bytes = rows * HIDDEN * DTYPE.itemsize
            if tell is not None:
                tell(f"{op} of {bytes >> 10} KB")

            def inputs(_, rows=rows, tensors=1 if op == "all_reduce" else 2):
                return tuple(torch.randn(rows, HIDDEN, device=device, dtype=DTYPE) for _ in range(tensors))

            times = []
            for choice in candidates(op, pg.size(), rows, multiprocessors):
                timing = time_collective(
                    function(op, choice, workspace, weight, table),
                    inputs=inputs,
                    group=pg,
                    mutates=True,  # the sums go in place: restored before every round
                    calls=20 if rows <= 512 else 4,
                    rounds=9 if quick else 15,
                )
                measured.append((op, bytes, choice, timing))
                times.append((timing.us_p50, choice))
            best.append((bytes, min(times)[1]))
        table[op] = steps(best)
    return table, measured + measure_matmuls(workspace, table, quick, tell)


def steps(best: list[tuple[int, Choice]]) -> list[tuple[int | None, Choice]]:
    """A choice serves up to the middle, in powers, between its size and the next; neighbours alike become one."""
    steps: list[tuple[int | None, Choice]] = []
    for (bytes, choice), (next_bytes, following) in itertools.pairwise(best):
        if choice != following:
            steps.append((int((bytes * next_bytes) ** 0.5), choice))
    return [*steps, (None, best[-1][1])]


def _on_rank(quick: bool):
    pg = init(device="cuda", timeout=120)["tp"].get_group()
    if (reason := why_no_workspace(pg)) is not None:
        raise RuntimeError(f"the kernels cannot run here: {reason}")
    return measure(pg, quick)


def tune(world_size: int, quick: bool = False):
    """`measure` on `world_size` new local ranks, and save the table. Returns (table, rows, file).

    Raises RuntimeError where the kernels cannot run, OSError if the file cannot be written.
    """
    table, measured = launch(_on_rank, world_size, quick, timeout=600, environment=rank_environment())[0]
    return table, measured, tuning.save(table, world_size)
