"""Which algorithm an operation takes for a payload: a table per group, rank 0's, agreed once (`capabilities.agree`).

The table comes from `fused-parallel probe --tune` on the same kind of GPU and number of ranks, else from the defaults
here, measured on two H100, for matmuls also on two H200 (docs/all_reduce.md, docs/matmul_all_reduce.md); for more ranks
they are extrapolated, and `--tune` is what to run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from .._version import __version__


class Choice(NamedTuple):
    """How one operation is done. All ranks must agree on the algorithm; they do on the rest, too, being one table.

    algorithm: "one_shot", "two_shot", or "library" (torch.distributed, and what follows as an operation of its own).
    threads: of a CTA, ctas: in the grid, at most; cluster: CTAs that share a row (with the norm). 0: the kernel's
    default.
    Of matmuls: "persistent", the kernel that exchanges tiles, "decode", the one for up to 64 rows, or "whole", matmul
    and collective one after the other, also where the kernel does not take the shape. rows, depth: only for x of so
    many rows or more, and a weight of so many columns, and twice as many rows, for each row of x, and more than
    `WIDE` rows for more than 16 of x; else "whole".
    """

    algorithm: str
    threads: int = 0
    ctas: int = 0
    cluster: int = 0
    depth: int = 0
    rows: int = 0

    def suits(self, m: int, k: int, n: int) -> bool:
        """Whether it is for x [m, k] and a weight [n, k]."""
        if self.depth > 0 and m > 16 and n <= WIDE:
            return False
        return m >= self.rows and m * self.depth <= min(k, n // 2)


# op -> (most bytes of one rank's payload, or None for all larger ones; choice), ascending. The payload is what a
# collective's input holds.
Table = dict[str, list[tuple[int | None, Choice]]]

_MB = 1 << 20
ONE, TWO, LIBRARY, WHOLE, PERSISTENT = map(Choice, ("one_shot", "two_shot", "library", "whole", "persistent"))
# The exchange hides behind the reading of the weight. 64 rows win with 4096 columns of 8192 rows, and lose with 2048
# and 7168 of 4096, where 32 do, too: K is split over four multiprocessors there (docs/matmul_all_reduce.md).
WIDE = 4096
DECODE = Choice("decode", depth=64)
# Few rows of tiles leave the exchange of the last ones bare: 512 rows lose at 16384 rows of the weight, too.
TALL = Choice("persistent", rows=1024)


def default_table(world: int) -> Table:
    """Measured for two ranks (H100, NVLink); for more a guess, by the bytes they send: one-shot (W - 1) payloads,
    two-shot 2 (W - 1) / W of one."""
    if world == 2:
        all_reduce = [
            (3 * _MB // 4, ONE),
            (3 * _MB, Choice("two_shot", 256, 132)),  # as many as let the next kernel become resident
            (24 * _MB, TWO),
            (None, Choice("one_shot", 128)),
        ]
        with_norm = [(640 << 10, Choice("one_shot", cluster=8)), (None, Choice("one_shot", cluster=1))]
    else:
        all_reduce = [(_MB // world, ONE), (None, TWO)]
        # Only one-shot keeps the sums for the norm.
        with_norm = [(4 * _MB // world, ONE), (None, LIBRARY)]
    return {
        "all_reduce": all_reduce,
        "all_reduce_add_rms_norm": with_norm,
        "reduce_scatter": [(None, ONE)],
        "matmul_all_reduce": [(2 * _MB, DECODE), (12 * _MB, WHOLE), (None, TALL)],
        # Of fewer rows the sum in one kernel with the norm gains as much as the exchange beside the matmul.
        "matmul_all_reduce_add_rms_norm": [(2 * _MB, DECODE), (24 * _MB, WHOLE), (None, TALL)],
        "matmul_reduce_scatter": [(6 * _MB, WHOLE), (None, PERSISTENT)],
        "all_gather": [(None, ONE)],
        "all_gather_matmul": [(3 * _MB, WHOLE), (None, TALL)],
    }


def choose(table: Table, op: str, bytes: int) -> Choice:
    """The table's choice for a payload of `bytes` bytes."""
    return next(choice for most, choice in table[op] if most is None or bytes <= most)


def path() -> Path:
    """The file that measured tables are kept in: FUSED_PARALLEL_TUNING, else in the user's cache directory."""
    if named := os.environ.get("FUSED_PARALLEL_TUNING"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_parallel" / "tuning.json"


def _key(world: int) -> str:
    return f"{torch.cuda.get_device_name()} x{world} fused_parallel {__version__}"


def save(table: Table, world: int) -> Path:
    """Add the table for this GPU and number of ranks to the file; OSError if that cannot be written."""
    file = path()
    tables = _read(file)
    tables[_key(world)] = table
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(tables, indent=1) + "\n")
    partial.replace(file)  # at once: another process may be reading
    return file


def _read(file: Path) -> dict:
    try:
        tables = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} is no tuning table ({error}); delete it, or write it again: fused-parallel probe --tune"
        ) from error
    if not isinstance(tables, dict):
        raise ValueError(f"{file} is no tuning table; delete it, or write it again: fused-parallel probe --tune")
    return tables


def load(world: int) -> Table:
    """The measured table for this GPU and number of ranks, if there is one, else the defaults.

    Raises ValueError if the file is there and cannot be used.
    """
    default = default_table(world)
    measured = _read(path()).get(_key(world), {})
    try:
        table = {
            op: [(most, Choice(*choice)) for most, choice in rows] for op, rows in measured.items() if op in default
        }
        if any(not rows or rows[-1][0] is not None for rows in table.values()):
            raise ValueError("the last row of an operation must have no limit")
        return default | table
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path()}: the table for {_key(world)} is not readable ({error}); delete the file") from error
