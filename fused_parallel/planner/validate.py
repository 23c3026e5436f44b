"""The cost model against what was measured: `python -m fused_parallel.planner.validate` prints every error."""

from __future__ import annotations

from .._table import print_table
from .cluster import CLUSTERS
from .cost import Step, all_reduce_us, layer_us, link_all_reduce_us, matmul_us, stage_cost
from .hardware import LINKS
from .measured import (
    PAIR_ALL_REDUCE_US,
    PAIR_CONTEXT,
    PAIR_DECODE_MS,
    PAIR_MATMUL_US,
    PUBLISHED_405B_TOKENS_PER_S,
    SURVEY_CALLS,
    SURVEY_GPUS,
    SURVEY_MS,
    SURVEY_ROW_BYTES,
    compute_share,
    fit_link,
    matmul_start_us,
    memory_share,
)
from .model import load_model
from .search import Search
from .workload import Workload

SURVEY_LINKS = {"H200 NVLink4": "nvlink4", "RTX PRO 6000 PCIe5": "pcie5", "L40S PCIe4": "pcie4"}
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


def published_405b() -> list[Row]:
    """The most output tokens/s of Llama 405B in fp8 over batches with TP8 on 8 H200; nothing was fitted to them."""
    model, cluster, rows = load_model("llama-3-405b"), CLUSTERS["8xh200"], []
    for (prompt, answer), measured in PUBLISHED_405B_TOKENS_PER_S.items():
        batches = tuple(2**i for i in range(11))
        search = Search(model, cluster, Workload(input=prompt, output=answer, batch=batches, dtypes=("fp8",)))
        best = max(c.tokens_per_s for c in search.run() if (c.tp, c.resident) == (8, 1))
        rows.append((f"{prompt} in, {answer} out", measured, best))
    return rows


def errors(rows: list[Row]) -> list[float]:
    """predicted / measured - 1 of each row."""
    return [predicted / measured - 1 for _, measured, predicted in rows]


def main() -> None:
    """Print the constants and the comparisons."""
    cluster = CLUSTERS["2xh200"]
    print_table(
        "constants of the links, fitted to the survey",
        ["link", "start us", "hop us", "bus GB/s at 2 GPUs", "sharing"],
        [[SURVEY_LINKS[n], *(f"{v:.2f}" for v in fit_link(n).values())] for n in SURVEY_MS],
    )
    print_table(
        "constants of the GPU",
        ["what", "value"],
        [
            ["matmul start us", f"{matmul_start_us():.2f}"],
            ["share of the datasheet's bandwidth", f"{memory_share():.3f}"],
            ["share of the datasheet's TFLOP/s", f"{compute_share():.3f}"],
            ["constant of a layer us", f"{layer_us(cluster):.1f}"],
            ["all-reduce of 16 KB on the pair us", f"{all_reduce_us(cluster, 2, 16384):.1f}"],
        ],
    )
    for title, rows in (
        ("160 NCCL all-reduces (ms; fitted)", survey()),
        ("NCCL all-reduce on two H200 (us; predicted from the survey)", pair_all_reduce()),
        ("cuBLAS on one H200 (us; three constants fitted)", pair_matmul()),
        ("70B decode step on two H200 without all-reduces (ms; batch 1 fitted)", pair_decode(False)),
        ("70B decode step on two H200 with NCCL (ms; predicted)", pair_decode(True)),
        ("Llama 405B fp8 on 8 H200, published maximum tokens/s (predicted; published with fp8 KV)", published_405b()),
    ):
        cells = [[w, m, f"{p:.2f}", f"{100 * (p / m - 1):+.1f}"] for w, m, p in rows]
        print_table(title, ["what", "measured", "model", "error %"], cells)


if __name__ == "__main__":
    main()
