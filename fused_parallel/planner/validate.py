"""The cost model against what was measured: `python -m fused_parallel.planner.validate` prints every error.

With `--steps benchmarks/results/planner.csv` it compares whole steps and peak memory that benchmarks/bench_planner.py
measured, by the constants of the GPU in the CSV or of a probe profile (`--profile`); none of those steps is an input.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

from .._table import print_table
from ..testing.results import latest, parse_shape, read
from .cluster import CLUSTERS, NCCL, OURS, Cluster, load_cluster
from .cost import Step, all_reduce_us, layer_us, link_all_reduce_us, matmul_us, stage_cost
from .hardware import GPUS, LINKS
from .measured import (
    H100_CONTEXT,
    H100_DECODE_LAYERS,
    H100_DECODE_US,
    PAIR_ALL_REDUCE_US,
    PAIR_CONTEXT,
    PAIR_DECODE_MS,
    PAIR_MATMUL_US,
    PUBLISHED_405B_TOKENS_PER_S,
    SLOWEST_EAGER_LAYER_US,
    SURVEY_CALLS,
    SURVEY_GPUS,
    SURVEY_MS,
    SURVEY_ROW_BYTES,
    fit_link,
)
from .model import ModelShape, load_model
from .search import Search
from .workload import Workload

SURVEY_LINKS = {"H200 NVLink4": "nvlink4", "RTX PRO 6000 PCIe5": "pcie5", "L40S PCIe4": "pcie4"}
SHARES = ("matmul_start_us", "memory_share", "compute_share")
STEP_CLUSTERS = {"H100": "2xh100", "H200": "2xh200"}  # by what the GPU's name holds
TRTLLM_ATTENTION_SHARE = 0.75  # published forward rate of FlashAttention 3; hardware.GPU has the default
IMPLS = {"fused": OURS, "torch_nccl": NCCL}
HOST_COUNTS = 1.05  # a prefill that the slowest host seen makes so many times as long depends on the host
Row = tuple[str, float, float]  # what, measured, predicted


def survey() -> list[Row]:
    """160 all-reduces of a 70B forward in ms. The links' constants were fitted to these very rows."""
    return [
        (
            f"{name}, {gpus} GPUs, {tokens} token(s)",
            ms,
            SURVEY_CALLS * link_all_reduce_us(LINKS[SURVEY_LINKS[name]], gpus, tokens * SURVEY_ROW_BYTES) / 1e3,
        )
        for name, by_tokens in SURVEY_MS.items()
        for tokens, row in by_tokens.items()
        for gpus, ms in zip(SURVEY_GPUS, row, strict=True)
    ]


def pair_all_reduce() -> list[Row]:
    """NCCL on two H200, in us, by the survey's constants alone: none of these was used for them."""
    link = LINKS["nvlink4"]
    return [
        (f"{tokens} token(s)", us, link_all_reduce_us(link, 2, tokens * 8192 * 2))
        for tokens, us in PAIR_ALL_REDUCE_US.items()
    ]


def pair_matmul() -> list[Row]:
    """cuBLAS on an H200, in us. Constants come from the rows of M=1 and the median rate of M >= 512."""
    gpu = CLUSTERS["2xh200"].gpu
    return [(f"M={m} K={k} N={n}", us, matmul_us(gpu, m, k, n)[0]) for (m, k, n), us in PAIR_MATMUL_US.items()]


def pair_decode(with_nccl: bool) -> list[Row]:
    """A decode step of 70B shapes on two H200 in ms. The constant of a layer comes from batch 1 without all-reduces,
    the all-reduce from the pair's own table; the other rows are predictions."""
    cluster, model = CLUSTERS["2xh200"], load_model("llama-3-70b")
    rows = []
    for batch, (nccl, without) in PAIR_DECODE_MS.items():
        step = Step(batch, 1, PAIR_CONTEXT, 1)
        cost = stage_cost(model, cluster, step, tp=2, layers=model.layers, dtype="bf16", head=True)
        predicted = cost.us - (0 if with_nccl else cost.communication)
        rows.append((f"batch {batch}", nccl if with_nccl else without, predicted / 1e3))
    return rows


def h100_decode(impl: str) -> list[Row]:
    """A decode step of 20 layers of 70B shapes on two H100 in ms, by this library ("fused") or by plain torch and NCCL.
    The constant of a layer comes from batch 1, all-reduces from their own tables; batch 64 is predicted."""
    cluster = CLUSTERS["2xh100"].of(IMPLS[impl])
    model = dataclasses.replace(load_model("llama-3-70b"), layers=H100_DECODE_LAYERS)
    rows = []
    for batch, us in H100_DECODE_US[impl].items():
        step = Step(batch, 1, H100_CONTEXT, 1)
        cost = stage_cost(model, cluster, step, tp=2, layers=model.layers, dtype="bf16", head=True)
        rows.append((f"batch {batch}", us / 1e3, cost.us / 1e3))
    return rows


def steps(path: str | Path, cluster: Cluster | None = None) -> dict[str, list[Row]]:
    """What bench_planner.py measured and what is predicted for it, in ms, memory in GB; by what it is of and the
    backend, prefills that the host may hold up apart. cluster: default the preset of the GPU in each row. Raises
    ValueError for a GPU without one."""
    groups: dict[str, list[Row]] = {}
    for row in latest(read(path)):
        shape = parse_shape(row["shape"])
        if (shape["what"], row["mode"]) == ("offload", "eager") and "draft" in shape:
            continue  # plans draft in CUDA graphs
        backend = IMPLS[row["impl"]]
        where = cluster or _cluster_of(row["gpu"])
        predicted = _predict(shape, where.of(backend))
        measured = float(row["bytes"]) / 1e9 if shape["what"] == "memory" else float(row["us_p50"]) / 1e3
        of = f" ({shape['of']})" if "of" in shape else ""
        if shape["what"] == "prefill":
            slow, free = (
                _predict(shape, dataclasses.replace(where.of(backend), eager_layer_us=us))
                for us in (SLOWEST_EAGER_LAYER_US, 0.0)
            )
            of = " (host)" if slow > HOST_COUNTS * free else ""
        text = " ".join(f"{k}={v}" for k, v in shape.items() if k not in ("what", "split", "of"))
        groups.setdefault(f"{shape['what']}{of}, {backend}", []).append((text, measured, predicted))
    return groups


def _cluster_of(gpu: str) -> Cluster:
    for part, name in STEP_CLUSTERS.items():
        if part in gpu:
            return CLUSTERS[name]
    raise ValueError(
        f"steps measured on {gpu!r} need a profile of that machine: --profile (fused-parallel probe --out)"
    )


def _predict(shape: dict[str, str], cluster: Cluster) -> float:
    """Milliseconds, or GB, of one row."""
    what, name = shape["what"], shape["model"]
    tp, batch, context = (int(shape[k]) for k in ("tp", "batch", "ctx"))
    micro, streamed, k = (int(shape.get(key, default)) for key, default in (("micro", 1), ("streamed", 0), ("k", 0)))
    stages = [int(n) for n in shape["split"].split("+")]
    drafting = {"draft": _shape_of(shape["draft"]), "acceptance": 0.5} if k else {}
    workload = Workload(input=context, output=int(shape.get("new", 1)), batch=batch, **drafting)
    search = Search(_shape_of(name), cluster, workload)
    if what == "memory":
        memory = search.memory("bf16", tp, stages, batch, 0)[int(shape["rank"]) // tp % len(stages)]
        return memory.total if shape["of"] == "device" else memory.total - memory.reserved
    if what == "prefill":
        return search.prefill_us("bf16", tp, stages, 0, math.ceil(context / int(shape["chunk"])))[0] / 1e3
    return search.decode_round("bf16", tp, stages, batch, micro, streamed, k)[0].period / 1e3


def _shape_of(name: str) -> ModelShape:
    name, _, layers = name.partition(":")
    model = load_model(name)
    return dataclasses.replace(model, layers=int(layers)) if layers else model


def summary(groups: dict[str, list[Row]]) -> list[str]:
    """A line of Markdown a group, and of all steps: rows, median and worst error. docs/planning.md holds them."""
    of_steps = [row for name, rows in groups.items() if not name.startswith("memory") for row in rows]
    lines = []
    for name, rows in [*groups.items(), ("all steps", of_steps)]:
        if rows:
            off = sorted(map(abs, errors(rows)))
            lines.append(f"| {name} | {len(rows)} | {100 * statistics.median(off):.1f} % | {100 * off[-1]:.1f} % |")
    return lines


def published_405b() -> list[Row]:
    """The most output tokens/s of Llama 405B in fp8, its cache too, over batches with TP8 on 8 H200; nothing was fitted
    to them. The engine's attention is taken to reach the published rate of FlashAttention 3."""
    model, cluster, rows = load_model("llama-3-405b"), CLUSTERS["8xh200"], []
    model = dataclasses.replace(model, kv_dtype="fp8")
    cluster = dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, attention_share=TRTLLM_ATTENTION_SHARE))
    for (prompt, answer), measured in PUBLISHED_405B_TOKENS_PER_S.items():
        batches = tuple(2**i for i in range(11))
        search = Search(model, cluster, Workload(input=prompt, output=answer, batch=batches, dtypes=("fp8",)))
        best = max(c.tokens_per_s for c in search.run() if (c.tp, c.resident) == (8, 1))
        rows.append((f"{prompt} in, {answer} out", measured, best))
    return rows


def errors(rows: list[Row]) -> list[float]:
    """predicted / measured - 1 of each row."""
    return [predicted / measured - 1 for _, measured, predicted in rows]


def main(arguments: list[str] | None = None) -> None:
    """Print the constants and the comparisons, or those of whole steps."""
    parser = argparse.ArgumentParser(prog="python -m fused_parallel.planner.validate", description=__doc__)
    parser.add_argument("--steps", metavar="CSV", help="compare the steps that bench_planner.py wrote")
    parser.add_argument("--profile", metavar="FILE", help="a probe profile of the machine they were measured on")
    args = parser.parse_args(arguments)
    if args.steps:
        _print_steps(args.steps, args.profile)
    else:
        _print_parts()


def _print_steps(path: str, profile: str | None) -> None:
    groups = steps(path, load_cluster(profile) if profile else None)
    for name, rows in groups.items():
        unit = "GB" if name.startswith("memory") else "ms"
        cells = [[w, f"{m:.2f}", f"{p:.2f}", f"{100 * (p / m - 1):+.1f}"] for w, m, p in rows]
        print_table(f"{name} ({unit})", ["what", "measured", "model", "error %"], cells)
    print("\n".join(["| compared | rows | median error | worst |", "| --- | ---: | ---: | ---: |", *summary(groups)]))


def _print_parts() -> None:
    cluster, pair = CLUSTERS["2xh200"], CLUSTERS["2xh100"]
    layers = (cluster, pair, pair.of(OURS))
    print_table(
        "constants of the links, fitted to the survey",
        ["link", "start us", "hop us", "bus GB/s at 2 GPUs", "sharing"],
        [[SURVEY_LINKS[n], *(f"{v:.2f}" for v in fit_link(n).values())] for n in SURVEY_MS],
    )
    print_table(
        "constants of the GPU",
        ["what", "value"],
        [
            *[[f"{n}: {k}", f"{getattr(GPUS[n], k):.3f}"] for n in ("h200", "h100") for k in SHARES],
            *[[f"{c.name}, {c.backend}: a layer's constant us", f"{layer_us(c):.1f}"] for c in layers],
            ["all-reduce of 16 KB on the pair us", f"{all_reduce_us(cluster, 2, 16384):.1f}"],
        ],
    )
    for title, rows in (
        ("160 NCCL all-reduces (ms; fitted)", survey()),
        ("NCCL all-reduce on two H200 (us; predicted from the survey)", pair_all_reduce()),
        ("cuBLAS on one H200 (us; three constants fitted)", pair_matmul()),
        ("70B decode step on two H200 without all-reduces (ms; batch 1 fitted)", pair_decode(False)),
        ("70B decode step on two H200 with NCCL (ms; predicted)", pair_decode(True)),
        ("70B:20 decode step on two H100, this library (ms; batch 1 fitted)", h100_decode("fused")),
        ("70B:20 decode step on two H100, plain torch and NCCL (ms; batch 1 fitted)", h100_decode("torch_nccl")),
        ("Llama 405B fp8 on 8 H200, published maximum tokens/s (predicted)", published_405b()),
    ):
        cells = [[w, m, f"{p:.2f}", f"{100 * (p / m - 1):+.1f}"] for w, m, p in rows]
        print_table(title, ["what", "measured", "model", "error %"], cells)


if __name__ == "__main__":
    main()
