"""`fused-parallel wall`: what a layer computes and communicates, by batch and tensor-parallel degree."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..planner import CLUSTERS, load_cluster, load_model
from ..planner.layer_wall import measure_wall, predict_wall
from ..planner.model import PRESETS, load_config
from .plan import batches


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "wall",
        help="compute against communication of a layer, by batch and TP degree (on a CPU several minutes)",
        description="Time one decoder layer on 1, 2, 4, ... ranks of this machine, by this library and with "
        "NCCL's all-reduce (CPU: Gloo's), and say at which degree another GPU stops paying. With --cluster, predict it "
        "for another machine instead.",
    )
    parser.add_argument(
        "--model", default="llama-3-8b", help=f"config.json, its directory, or one of {', '.join(PRESETS)} (default 8b)"
    )
    parser.add_argument("--cluster", help=f"predict for: a file, a probe profile, or one of {', '.join(CLUSTERS)}")
    parser.add_argument("--batch", type=batches, default=(1, 8, 64), help="8, or 1,8,64 (the default), or 1..256")
    parser.add_argument("--context", type=int, default=1024, help="cached tokens of each sequence (default 1024)")
    parser.add_argument("--tp", type=batches, help="degrees, as --batch (default: powers of two up to the GPUs)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="where to measure; default: cuda where there is a GPU"
    )
    parser.add_argument("--plot", metavar="FILE", help="write the picture")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure or predict, print and plot; the process's exit code."""
    if args.context < 1:
        raise ValueError(f"wall: --context must be at least 1, got {args.context}")
    if min(args.batch) < 1:
        raise ValueError(f"wall: --batch must be at least 1, got {min(args.batch)}")
    if args.plot:
        from ..planner.plot import require_matplotlib

        require_matplotlib()  # found out before minutes of measuring, not after
        folder = Path(args.plot).resolve().parent
        if not folder.is_dir():
            raise ValueError(f"wall: --plot {args.plot}: there is no folder {folder}")
    if args.cluster is not None:
        if args.device is not None:
            raise ValueError("wall: --device says where to measure, --cluster predicts: give one of them")
        wall = predict_wall(load_model(args.model), load_cluster(args.cluster), args.batch, args.context, args.tp)
    else:
        wall = measure_wall(
            *load_config(args.model),
            args.batch,
            args.context,
            args.tp,
            device=args.device,
            progress=lambda what: print(f"measuring {what} ...", file=sys.stderr, flush=True),
        )
    wall.table()
    if args.plot:
        wall.plot(args.plot)
        print(f"picture written to {args.plot}")
    return 0
