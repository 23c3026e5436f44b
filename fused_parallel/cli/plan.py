"""`fused-parallel plan`: which split of a model over which GPUs is fastest, predicted."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..planner import CLUSTERS, plan
from ..planner.model import KV_BYTES, PRESETS, WEIGHT_BYTES
from ..planner.workload import BACKENDS, RANKINGS, Workload


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "plan",
        help="predict which parallelism is fastest",
        description="Search tensor, pipeline and replica parallelism, offload and speculation for a model on a "
        "cluster; predict latency, throughput and memory, and say what limits each plan. Measures nothing, except with "
        "--cluster this. docs/planning.md has the formulas and their errors.",
    )
    parser.add_argument("--model", required=True, help=f"config.json, its directory, or one of {', '.join(PRESETS)}")
    parser.add_argument(
        "--cluster", required=True, help=f"this, a YAML or JSON file, a probe profile, or one of {', '.join(CLUSTERS)}"
    )
    parser.add_argument("--input", type=int, default=1024, help="prompt tokens a request (default 1024)")
    parser.add_argument("--output", type=int, default=256, help="new tokens a request (default 256)")
    parser.add_argument(
        "--batch", type=batches, default=(1,), help="requests in flight: 8, or 1,8,64, or 1..256 (powers of two)"
    )
    parser.add_argument("--rank", choices=RANKINGS, default="latency", help="what is best (default latency)")
    parser.add_argument("--dtype", default="bf16", help=f"of the weights, several by commas: {', '.join(WEIGHT_BYTES)}")
    parser.add_argument("--kv-dtype", choices=KV_BYTES, default="bf16", help="of the KV cache (default bf16)")
    parser.add_argument("--slo-tpot", type=float, metavar="MS", help="leave out plans slower than this a token")
    parser.add_argument("--slo-ttft", type=float, metavar="MS", help="leave out plans whose first token takes longer")
    parser.add_argument("--draft", help="model that drafts for speculation, named as --model")
    parser.add_argument(
        "--acceptance", type=float, help="probability that a drafted token is accepted; --draft needs it"
    )
    parser.add_argument("--no-offload", action="store_true", help="keep all weights on the GPUs")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="costs of this library's kernels, of plain torch and NCCL, or of each plan the faster (default: ours "
        "where they were measured, else nccl)",
    )
    parser.add_argument("--rows", type=positive, default=10, help="plans to print (default 10)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead")
    parser.add_argument("--plot", metavar="FILE", help="write the frontier and the wall as a picture")
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def batches(text: str) -> tuple[int, ...]:
    """Of "8", "1,8,64", or "1..256": the powers of two between, and both ends."""
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        low, high = map(int, found.groups())
        if not 1 <= low <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no range of batches: expected 1 <= low <= high")
        powers = (2**i for i in range(high.bit_length()))
        return tuple(sorted({low, high, *(p for p in powers if low <= p <= high)}))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no batch: expected 8, or 1,8,64, or 1..256")
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Plan and print; the process's exit code."""
    workload = Workload(
        input=args.input,
        output=args.output,
        batch=args.batch,
        rank=args.rank,
        slo_tpot_ms=args.slo_tpot,
        slo_ttft_ms=args.slo_ttft,
        draft=args.draft,
        acceptance=args.acceptance,
        dtypes=tuple(args.dtype.split(",")),
        kv_dtype=args.kv_dtype,
        offload=not args.no_offload,
        backend=args.backend,
    )
    if args.plot and not Path(args.plot).absolute().parent.is_dir():  # told before the search
        raise FileNotFoundError(f"--plot {args.plot}: there is no such folder")
    answer = plan(args.model, args.cluster, workload)
    if args.json:
        print(answer.to_json())
    else:
        answer.table(args.rows)
    if args.plot:
        answer.plot(args.plot)
    return 0
