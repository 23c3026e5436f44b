"""`fused-parallel bench`: run the benchmarks of a checkout on all visible GPUs."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from ..comm.launch import free_port
from ..testing.results import CHECKOUT


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="run the benchmarks of a checkout",
        description="Without a name, list the benchmarks; else run those named, one after the other, on all visible "
        "GPUs. What follows -- goes to the benchmarks: fused-parallel bench all_reduce -- --tokens 1 64",
    )
    parser.add_argument("op", nargs="*", help="an operation with a benchmarks/bench_<op>.py, or 'all'")
    parser.set_defaults(run=run)


def find_benchmarks(root: Path = CHECKOUT) -> dict[str, Path]:
    """Operation -> script of the checkout at `root`; empty if that is none."""
    return {path.stem.removeprefix("bench_"): path for path in sorted((root / "benchmarks").glob("bench_*.py"))}


def run(args: argparse.Namespace) -> int:
    """List or run; the exit code of the first benchmark that fails, else 0."""
    scripts = find_benchmarks()
    if not scripts:
        print(
            f"fused-parallel bench: there are no benchmarks beside the installed package ({CHECKOUT}). They are in the "
            "source checkout: clone it, run `pip install -e .` there, then this command again",
            file=sys.stderr,
        )
        return 1
    # argparse gives no way to keep "--" and what follows it apart from the names: they are told apart by the dash.
    first_option = next((i for i, a in enumerate(args.op) if a.startswith("-")), len(args.op))
    names, options = args.op[:first_option], args.op[first_option:]
    if not names:
        print("\n".join(f"{name:24} {path}" for name, path in scripts.items()))
        print("run one: fused-parallel bench NAME [-- OPTIONS]", file=sys.stderr)
        return 0
    if names == ["all"]:
        names = list(scripts)
    if unknown := [name for name in names if name not in scripts]:
        print(
            f"fused-parallel bench: no benchmark {', '.join(unknown)}; there are {', '.join(scripts)}", file=sys.stderr
        )
        return 2
    for name in names:
        command = _command(scripts[name], options)
        print("$", " ".join(command), flush=True)
        code = subprocess.run(command, cwd=CHECKOUT).returncode
        if code:
            print(f"fused-parallel bench: {name} ended with exit code {code}", file=sys.stderr)
            return code
    return 0


def _command(script: Path, options: list[str]) -> list[str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:  # the script says itself what it needs, or runs on what there is
        return [sys.executable, str(script), *options]
    ranks = [f"--nproc-per-node={gpus}", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, str(script), *options]
