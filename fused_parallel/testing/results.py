"""The figures of the benchmarks: one CSV per operation, appended to, with the columns every benchmark shares."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from .._table import print_table
from ..comm.topology import link_name
from .timer import Timing

COLUMNS = (
    "op", "impl", "world_size", "dtype", "mode", "shape", "us_p20", "us_p50", "us_p80", "skew_pct", "bytes",
    "floor_us", "gpu", "link", "torch", "triton", "cuda", "commit", "date",
)  # fmt: skip
# What a figure is of; of several rows with one key, the last counts.
KEY = ("op", "impl", "world_size", "dtype", "mode", "shape", "gpu", "link")
CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "benchmarks" / "results"


def shape_key(**sizes: object) -> str:
    """`shape_key(tokens=1, hidden=8192)` is "tokens=1;hidden=8192", in the order given."""
    for name, value in sizes.items():
        if any(c in f"{name}{value}" for c in ';=,\n"'):
            raise ValueError(f"shape_key: {name}={value!r} holds one of the separators ; = , quote or newline")
    return ";".join(f"{name}={value}" for name, value in sizes.items())


def parse_shape(shape: str) -> dict[str, str]:
    """The inverse of `shape_key`; values stay text."""
    return dict(part.split("=", 1) for part in shape.split(";")) if shape else {}


def make_row(
    op: str,
    impl: str,
    timing: Timing,
    *,
    world_size: int,
    dtype: torch.dtype,
    mode: str,
    shape: dict[str, object],
    bytes: int,
    floor_us: float | None,
    device: str = "cuda",
) -> dict[str, str]:
    """One line of the CSV: what was measured, and on what. `bytes` is what one call moves at least; see the benchmark.

    `floor_us` is the physical limit for the work, None where the machine's ceilings are not known.
    """
    return {
        "op": op,
        "impl": impl,
        "world_size": str(world_size),
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "shape": shape_key(**shape),
        "us_p20": f"{timing.us_p20:.2f}",
        "us_p50": f"{timing.us_p50:.2f}",
        "us_p80": f"{timing.us_p80:.2f}",
        "skew_pct": f"{timing.skew_pct:.1f}",
        "bytes": str(bytes),
        "floor_us": "" if floor_us is None else f"{floor_us:.2f}",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "link": link_name(tuple(range(min(world_size, torch.cuda.device_count())))) if device == "cuda" else "none",
        **versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def append(rows: Iterable[dict[str, str]], directory: str | Path = RESULTS) -> list[Path]:
    """Append `rows` to `directory`/<op>.csv, one file per operation; the files written. Call it on rank 0 only.

    Raises ValueError for a row with other columns, or a file whose header is not these columns.
    """
    directory = Path(directory)
    by_op: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if set(row) != set(COLUMNS):
            raise ValueError(f"results: a row has columns {sorted(row)}, expected {sorted(COLUMNS)}")
        by_op.setdefault(row["op"], []).append(row)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for op, of_op in by_op.items():
        path = directory / f"{op}.csv"
        new = not path.exists() or path.stat().st_size == 0
        if not new:
            read(path)  # refuses a file that is not ours before anything is added to it
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(of_op)
        paths.append(path)
    return paths


def read(path: str | Path) -> list[dict[str, str]]:
    """All rows of one CSV, oldest first. Raises ValueError if its header is not `COLUMNS`."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: the columns are {reader.fieldnames}, expected {list(COLUMNS)}")
    return rows


def latest(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The last row of every key, in the order in which the keys first appeared."""
    last: dict[tuple, dict[str, str]] = {}
    for row in rows:
        last[tuple(row[k] for k in KEY)] = row
    return list(last.values())


def show(rows: Iterable[dict[str, str]], title: str = "") -> None:
    """Print the rows' figures as a table."""
    columns = ("op", "impl", "dtype", "mode", "shape", "us_p20", "us_p50", "us_p80", "skew_pct", "floor_us")
    rows = list(rows)
    if rows and not title:
        first = rows[0]
        title = f"{first['world_size']} x {first['gpu']}, link {first['link']}, commit {first['commit']}"
    print_table(title, columns, [[row[c] for c in columns] for row in rows])


@functools.cache
def commit() -> str:
    """The checkout's commit, with "-dirty" if tracked files other than the figures themselves are changed.

    Where there is no git history, the environment variable FP_COMMIT, else "unknown".
    """
    try:
        if not (CHECKOUT / ".git").exists():
            raise OSError("no .git: a repository further up would not be this one")
        head = _git("rev-parse", "--short=12", "HEAD")
        figures = [":(exclude)benchmarks/results", ":(exclude)benchmarks/plots", ":(exclude)benchmarks/README.md"]
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *figures)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FP_COMMIT") or "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of torch, Triton ("none" if absent) and the CUDA that torch was built with ("none" for a CPU build)."""
    triton = next((v for v in map(_version_of, ("triton", "pytorch-triton")) if v), "none")
    return {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda or "none"}
