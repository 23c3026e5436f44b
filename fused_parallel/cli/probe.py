"""`fused-parallel probe`: measure this machine's links, memory and matmuls."""

from __future__ import annotations

import argparse
import sys

import torch

from .._table import print_table
from ..comm.probe import probe, write_profile


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "probe",
        help="measure this machine: links, alpha-beta, ceilings",
        description="Measure what this machine has: link topology, copies between GPUs and with the host, all-reduce "
        "and send/recv by size, memory bandwidth, matmul rates. Nothing else should run on it meanwhile.",
    )
    parser.add_argument("--out", metavar="FILE", help="write the profile as JSON (docs/probe.md lists its keys)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats: seconds, and less exact")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead, measure which algorithm of all_reduce and all_reduce_add_rms_norm, and which kernel of the "
        "matmuls with a collective, is fastest at which size on all GPUs of this host, and keep the table for later "
        "runs (FUSED_PARALLEL_TUNING names another file)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the profile; the process's exit code."""
    if args.tune:
        return _tune(args.quick)
    if args.out:
        try:
            open(args.out, "a").close()  # found out before minutes of measuring, not after
        except OSError as error:
            print(f"fused-parallel probe: cannot write {args.out}: {error}", file=sys.stderr)
            return 1
    profile = probe(args.quick, progress=lambda what: print(f"measuring {what} ...", file=sys.stderr, flush=True))
    for title, columns, rows in tables(profile):
        print_table(title, columns, rows)
    if args.out:
        write_profile(profile, args.out)
        print(f"profile written to {args.out}")
    return 0


def _tune(quick: bool) -> int:
    from ..ops.tune import tune

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        print(f"fused-parallel probe --tune: needs two or more GPUs, torch sees {gpus}", file=sys.stderr)
        return 1
    try:
        table, measured, file = tune(gpus, quick)
    except (RuntimeError, OSError, ValueError) as error:
        print(f"fused-parallel probe --tune: {error}", file=sys.stderr)
        return 1
    columns = ["op", "KB", "algorithm", "threads", "ctas", "cluster"]
    rows = [[op, bytes >> 10, *choice, _n(t.us_p50, 2)] for op, bytes, choice, t in measured]
    print_table(f"{gpus} ranks, bf16, in CUDA graphs", [*columns, "us"], rows)
    chosen = [
        [op, "more" if most is None else f"<= {most >> 10}", *choice] for op in table for most, choice in table[op]
    ]
    print_table("chosen", columns, chosen)
    print(f"kept in {file}")
    return 0


def tables(profile: dict) -> list[tuple[str, list[str], list[list]]]:
    """The profile as (title, columns, rows) of the tables that have rows."""
    all_tables = [
        _gpu_table(profile),
        _matmul_table(profile),
        _copy_table(profile),
        _collective_table(profile),
        ("not measured", ["what", "why"], [[m["what"], m["why"]] for m in profile["not_measured"]]),
    ]
    return [table for table in all_tables if table[2]]


def _n(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _gpu_table(profile: dict) -> tuple[str, list[str], list[list]]:
    memory = {gpu["name"]: gpu["memory"] or {} for gpu in profile["gpus"]}
    rows = []
    if profile["host_memory"]:
        host = profile["host"]
        name = f"{host['cpu']}, {host['cpus']} CPUs"
        rows.append(["host", name, "", _n(profile["host_memory"]["copy_gb_per_s"]), "", _n(host["memory_bytes"] / 1e9)])
    for gpu in profile["topology"]["gpus"]:
        links = [p["link"] for p in profile["topology"]["pairs"] if gpu["index"] in (p["a"], p["b"])]
        of = memory.get(gpu["name"], {})
        rates = [_n(of.get("copy_gb_per_s")), _n(of.get("read_gb_per_s"))]
        rows.append(
            [f"GPU {gpu['index']}", gpu["name"], " ".join(sorted(set(links))), *rates, _n(gpu["memory_bytes"] / 1e9)]
        )
    return "memory", ["where", "model", "links", "copy GB/s", "read GB/s", "size GB"], rows


def _matmul_table(profile: dict) -> tuple[str, list[str], list[list]]:
    where = [("CPU", m) for m in profile["cpu_matmul"]]
    where += [(f"GPU {gpu['index']}", m) for gpu in profile["gpus"] for m in gpu["matmul"]]
    columns = ["where", "dtype", "M", "K", "N", "us", "TFLOP/s", "weight GB/s"]
    return (
        "matmul",
        columns,
        [
            [on, m["dtype"], m["m"], m["k"], m["n"], _n(m["us"]), _n(m["tflop_per_s"], 3), _n(m["weight_gb_per_s"])]
            for on, m in where
        ],
    )


def _copy_table(profile: dict) -> tuple[str, list[str], list[list]]:
    rows = []
    for h in profile["host_device"]:
        gpus = "GPU " + ", ".join(map(str, h["gpus"]))
        rows.append([f"host to {gpus}", "", _n(h["to_device_gb_per_s_each"]), ""])
        rows.append([f"{gpus} to host", "", _n(h["from_device_gb_per_s_each"]), ""])
        rows.append([f"host and {gpus}, both ways", "", _n(h["both_ways_gb_per_s_each_way"]), ""])
    for c in profile["peer_copies"]:
        name = f"GPU {c['src']} to GPU {c['dst']}" + (", both ways" if c["direction"] == "both_ways" else "")
        rows.append([name, _n(c["alpha_us"]), _n(c["beta_gb_per_s"]), _n(100 * c["relative_residual"])])
    return "copies (rates of each GPU, each way)", ["what", "alpha us", "GB/s", "residual %"], rows


def _collective_table(profile: dict) -> tuple[str, list[str], list[list]]:
    rows = [
        [
            c["op"],
            c["backend"],
            c["world_size"],
            c["mode"],
            _n(c["alpha_us"]),
            _n(c["beta_gb_per_s"], 2),
            _n(100 * c["relative_residual"]),
            f"{c['points'][0]['bytes']} B: {c['points'][0]['us']:.1f}",
            f"{c['points'][-1]['bytes']} B: {c['points'][-1]['us']:.1f}",
        ]
        for c in profile["collectives"]
    ]
    columns = [
        "operation",
        "backend",
        "ranks",
        "mode",
        "alpha us",
        "beta GB/s",
        "residual %",
        "smallest us",
        "largest us",
    ]
    return "collectives: time = alpha + bytes / beta", columns, rows
