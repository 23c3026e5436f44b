"""The command line `fused-parallel`, one file per sub-command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from .._version import __version__

COMMANDS = ("demo", "generate", "plan", "wall", "probe", "bench", "doctor")
STARTS_RANKS = ("demo", "wall", "probe")


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; its exit code. Errors that a user can mend are one line on stderr and exit code 1
    (FUSED_PARALLEL_DEBUG=1 shows where they came from)."""
    parser = argparse.ArgumentParser(
        prog="fused-parallel", description="Fused kernels for parallel LLM inference: measure, run and inspect."
    )
    parser.add_argument("--version", action="version", version=f"fused_parallel {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest:
        # Options of a benchmark follow "--", which argparse drops; everyone else has none.
        if args.run.__module__ != f"{__name__}.bench":
            parser.error(f"unknown arguments: {' '.join(rest)}")
        args.op += rest
    try:
        command = args.run.__module__.rpartition(".")[2]
        starts = command in STARTS_RANKS or getattr(args, "cluster", None) == "this"  # which is probed
        if starts and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"{command} starts its own ranks: run it without torchrun")
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("FUSED_PARALLEL_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        # What all ranks find wrong in the same way, rank 0 tells; a lost peer concerns whoever notices.
        rank = os.environ.get("RANK", "0")
        if rank == "0" or isinstance(error, RuntimeError):
            where = f" (rank {rank})" if "RANK" in os.environ else ""
            print(f"fused-parallel{where}: {getattr(error, 'headline', error)}", file=sys.stderr, flush=True)
        return 1
