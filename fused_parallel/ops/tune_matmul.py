"""Measuring the tuning table's rows of matmuls with a collective: every kernel for the shape, the fastest is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _ext
from ..comm import tuning
from ..comm.capabilities import agree
from ..comm.tuning import Choice, Table
from ..comm.workspace import AllReduceWorkspace
from ..testing.timer import Timing, time_collective
from .linear import linear_silu_mul
from .matmul_all_reduce import matmul_all_reduce, matmul_all_reduce_add_rms_norm
from .matmul_reduce_scatter import all_gather_matmul, matmul_reduce_scatter

OPS = ("matmul_all_reduce", "matmul_all_reduce_add_rms_norm", "matmul_reduce_scatter", "all_gather_matmul")
N, K = 8192, 8192  # of a rank: between a 70B model's attention output and its MLP's on two
DTYPE = torch.bfloat16
_EPS = 1e-5


def rows_tried(op: str, quick: bool, world: int) -> list[int]:
    """Rows of the whole result; multiples of the ranks where each has its part of them."""
    most = _ext.limit("matmul_decode_max_rows")
    few = [1, most] if quick else [1, 8, 32, most]
    few = [] if op in ("matmul_reduce_scatter", "all_gather_matmul") else few
    many = [256, 2048] if quick else [128, 256, 512, 1024, 2048, 4096]
    return few + many if few else [rows // world * world for rows in many]


def candidates(op: str, world: int, rows: int) -> list[Choice]:
    """What is tried for a result of `rows` rows."""
    found = [tuning.WHOLE]
    if rows <= _ext.limit("matmul_decode_max_rows") and op.startswith("matmul_all_reduce"):
        found.append(tuning.DECODE)
    if rows > _ext.limit("matmul_tile_rows") * (world - 1):
        found.append(tuning.PERSISTENT)
    return found


def _function(op: str, pg, norm: torch.Tensor, before: torch.Tensor | None) -> Callable:
    """The operation; with `before` [2 K, K] behind that linear layer, as in a model: in a loop of its own the kernel
    for few rows would begin beside itself, which it does better than beside others."""
    function = _alone(op, pg, norm)
    return function if before is None else lambda x, w, r: function(linear_silu_mul(x, before), w, r)


def _alone(op: str, pg, norm: torch.Tensor) -> Callable:
    return {
        "matmul_all_reduce": lambda x, w, _: matmul_all_reduce(x, w, group=pg),
        "matmul_all_reduce_add_rms_norm": lambda x, w, r: matmul_all_reduce_add_rms_norm(x, w, r, norm, _EPS, group=pg),
        "matmul_reduce_scatter": lambda x, w, _: matmul_reduce_scatter(x, w, group=pg),
        "all_gather_matmul": lambda x, w, _: all_gather_matmul(x, w, group=pg),
    }[op]


def measure_matmuls(
    workspace: AllReduceWorkspace, table: Table, quick: bool, tell: Callable[[str], None] | None = None
) -> list[tuple[str, int, Choice, Timing]]:
    """Time all candidates on the ranks of the workspace's group, all of which call this, and put the fastest into
    `table`, whose collectives are used where a choice is "whole". Returns (op, payload bytes, Choice, Timing) rows."""
    from .tune import steps

    pg, device = workspace.pg, workspace.device
    world, norm = pg.size(), torch.randn(N, device=device, dtype=DTYPE)
    weights = [
        torch.randn(N, K, device=device, dtype=DTYPE).mul_(K**-0.5) for _ in range(3)
    ]  # 400 MB: no L2 keeps them
    layer_before = torch.randn(2 * K, K, device=device, dtype=DTYPE).mul_(K**-0.5)
    agreed = agree(pg).tuning
    before = dict(agreed)
    measured: list[tuple[str, int, Choice, Timing]] = []

    def use(op: str, rows: list) -> None:
        agreed[op] = rows
        workspace.forget_choices()

    try:
        for op in table:
            use(op, table[op])
        for op in OPS:
            best: list[tuple[int, Choice]] = []
            gathers = op == "all_gather_matmul"
            for rows in rows_tried(op, quick, world):
                # What the table is asked with: the result, or the input that is gathered.
                bytes = (rows // world * K if gathers else rows * N) * DTYPE.itemsize
                if tell is not None:
                    tell(f"{op} of {rows} rows")

                def inputs(i, rows=rows, gathers=gathers):
                    x = torch.randn(rows // world if gathers else rows, K, device=device, dtype=DTYPE)
                    return x, weights[i % len(weights)], torch.randn(rows, N, device=device, dtype=DTYPE)

                times = []
                found = candidates(op, world, rows)
                function = _function(op, pg, norm, layer_before if tuning.DECODE in found else None)
                for choice in found:
                    use(op, [(None, choice)])
                    timing = time_collective(
                        function,
                        inputs=inputs,
                        group=pg,
                        calls=12 if rows <= 512 else 4,
                        rounds=9 if quick else 15,
                    )
                    measured.append((op, bytes, choice, timing))
                    times.append((timing.us_p50, choice))
                best.append((bytes, min(times)[1]))
            table[op] = steps(best)
            use(op, table[op])
    finally:
        for op, rows in before.items():
            use(op, rows)
    return measured
