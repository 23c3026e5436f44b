"""Measurements that the cost model takes its constants from or is compared with, and the fits of those constants.

Sources: "pair" is this project's measurement on two H200 (torch 2.11, NCCL 2.28.9, CUDA graphs); "H100" is what
benchmarks/results/*.csv hold of two H100 80GB (SXM, NVLink; the same torch and NCCL, CUDA graphs, two ranks), whose
`shape` and `impl` are named; "survey" is the published table of 160 NCCL all-reduces of one Llama-3-70B forward at 2, 4
and 8 GPUs. tests/cpu/test_planner.py finds each H100 and verify figure in its CSV file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

# survey: milliseconds of 160 all-reduces of [tokens, 8192] in bf16, for 2, 4 and 8 GPUs
SURVEY_GPUS = (2, 4, 8)
SURVEY_MS = {
    "H200 NVLink4": {1: (1.2, 1.7, 2.9), 4096: (40, 52, 51)},
    "RTX PRO 6000 PCIe5": {1: (1.2, 2.3, 4.3), 4096: (294, 645, 788)},
    "L40S PCIe4": {1: (1.2, 2.6, 6.7), 4096: (537, 3152, 8866)},
}
SURVEY_CALLS, SURVEY_ROW_BYTES = 160, 8192 * 2

# pair: NCCL all-reduce of [tokens, 8192] in bf16 on two ranks, microseconds
PAIR_ALL_REDUCE_US = {
    1: 12.4, 8: 12.0, 32: 15.3, 64: 19.5, 128: 31.7, 256: 36.8, 512: 49.9, 1024: 78.2, 8192: 473
}  # fmt: skip

# pair: cuBLAS bf16 on random data, (M, K, N) -> microseconds
PAIR_MATMUL_US = {
    (1, 4096, 8192): 18.8,
    (1, 14336, 8192): 58.6,
    (64, 4096, 8192): 20.2,
    (64, 14336, 8192): 63.4,
    (512, 14336, 8192): 158,
    (2048, 4096, 8192): 188,
    (2048, 14336, 8192): 692,
    (8192, 4096, 8192): 828,
    (8192, 14336, 8192): 2888,
}

# pair: a decode step of Llama-3-70B shapes, TP2, context 1024, plain torch + cuBLAS + SDPA in one CUDA graph:
# batch -> (milliseconds with NCCL, milliseconds with the all-reduces left out)
PAIR_DECODE_MS = {1: (22.75, 21.22), 8: (23.76, 22.08), 32: (25.01, 23.06), 64: (27.41, 24.60)}
PAIR_CONTEXT = 1024
LAYER_CONSTANT_BATCH = 1  # the one batch of PAIR_DECODE_MS, without all-reduces, that the model takes a constant from

# NVIDIA's maximum output tokens/s of Llama 3.1 405B in fp8 (TensorRT Model Optimizer recipe, fp8 KV cache) on 8 H200,
# August 2024, by (input, output); the batch was not published. NVIDIA Technical Blog, "Boosting Llama 3.1 405B
# Performance up to 1.44x with NVIDIA TensorRT Model Optimizer on NVIDIA H200 GPUs", table 1. Used for no constant.
PUBLISHED_405B_TOKENS_PER_S = {(2048, 128): 463.1, (32768, 2048): 320.1, (120000, 2048): 71.5}

# H100: all_reduce.csv, tokens of hidden 8192 in bf16 -> (nccl, fused) microseconds
H100_ALL_REDUCE_US = {
    1: (7.88, 2.54), 8: (8.31, 2.82), 32: (11.28, 3.98), 64: (15.73, 5.65), 128: (29.12, 8.94), 256: (34.20, 15.31),
    512: (48.69, 26.97), 1024: (76.06, 52.77), 8192: (465.67, 419.00),
}  # fmt: skip

# The host's time to queue one layer of a prefill: what `fused-parallel probe --quick` measured as eager_layer_us on two
# of four H100 (commit 6b0285190108), and the most that it measured on a machine of that kind
# (benchmarks/results/probe_h100_quick.json): a host's speed changes by so much within minutes (docs/planning.md).
EAGER_LAYER_US = 595.2
SLOWEST_EAGER_LAYER_US = 1097.4

# H100: matmul_all_reduce.csv, (M, K, N) of a rank -> microseconds of (cublas: the matmul, fused: with its all-reduce).
# Of the run that the model was fitted to; with sums by the sending warps (commit 2f4c9b4524d6) 1 to 7 % less from 2048
# rows on.
H100_MATMUL_US = {
    (1, 4096, 8192): (25.14, 26.67),
    (1, 14336, 8192): (80.75, 81.56),
    (16, 4096, 8192): (25.59, 27.41),
    (16, 14336, 8192): (81.14, 82.11),
    (64, 4096, 8192): (26.47, 32.61),
    (64, 14336, 8192): (82.29, 88.16),
    (512, 4096, 8192): (46.90, 80.54),
    (512, 14336, 8192): (176.51, 200.46),
    (2048, 4096, 8192): (177.55, 250.76),
    (2048, 14336, 8192): (604.25, 681.06),
    (8192, 4096, 8192): (740.98, 954.03),
    (8192, 14336, 8192): (2710.88, 3030.26),
}

# H100: decode_step.csv, 20 layers of Llama-3-70B's shapes, TP2, 1024 tokens with the new one: impl -> batch -> us
H100_DECODE_US = {"torch_nccl": {1: 8164.48, 64: 9887.10}, "fused": {1: 6812.35, 64: 8099.46}}
H100_DECODE_LAYERS, H100_CONTEXT = 20, 1023

# H100: p2p.csv, fused_push, bytes -> microseconds of a message one way
H100_PUSH_US = {4194304: 16.43, 16777216: 53.22}

# One H200: verify.csv, method=rejection, draft=onehot (what fp.generate does at temperature 0), rows of logits
# B (k + 1) of 128256 in bf16 -> (fused, torch_argmax_only: the least that plain torch does with them) microseconds
VERIFY_US = {
    5: (13.73, 71.68), 40: (18.23, 99.10), 160: (34.45, 261.41), 320: (52.18, 502.56), 512: (64.51, 722.94),
    640: (86.91, 932.99),
}  # fmt: skip
VERIFY_ROW_BYTES = 128256 * 2

H200_HBM_GB_S, H200_BF16_TFLOPS = 4800, 989.5  # NVIDIA H200 datasheet
H100_HBM_GB_S, H100_BF16_TFLOPS = 3350, 989.5  # NVIDIA H100 datasheet, SXM5 80GB


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of the line through the points, by least squares of the relative errors."""
    w = [1 / y**2 for y in ys]
    total = sum(w)
    mx = sum(a * x for a, x in zip(w, xs, strict=True)) / total
    my = sum(a * y for a, y in zip(w, ys, strict=True)) / total
    spread = sum(a * (x - mx) ** 2 for a, x in zip(w, xs, strict=True))
    slope = sum(a * (x - mx) * (y - my) for a, x, y in zip(w, xs, ys, strict=True)) / spread
    return my - slope * mx, slope


@cache
def fit_link(survey: str) -> dict[str, float]:
    """All-reduce constants of a link of the survey: with n GPUs and `bytes` a rank

        us = start_us + hop_us (n - 1) + 2 (n - 1) / n * bytes / bus,    bus = bus_gb_s * (n / 2)^-sharing

    `sharing` is 0 where every GPU has its own path and 1 where all share one. Four constants for six measurements.
    """
    small, large = ([ms * 1e3 / SURVEY_CALLS for ms in SURVEY_MS[survey][t]] for t in (1, 4096))
    start = hop = 0.0
    bus, sharing = 1.0, 0.0
    for _ in range(20):  # each half is a line once the other is known
        moved = [2 * (n - 1) / n * 4096 * SURVEY_ROW_BYTES for n in SURVEY_GPUS]
        rates = [m / (us - start - hop * (n - 1)) for m, us, n in zip(moved, large, SURVEY_GPUS, strict=True)]
        x, y = [math.log(n / 2) for n in SURVEY_GPUS], [math.log(r) for r in rates]
        mx, my = statistics.mean(x), statistics.mean(y)
        slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
        sharing, bus = -slope, math.exp(my - slope * mx)
        waits = [
            us - 2 * (n - 1) / n * SURVEY_ROW_BYTES / (bus * (n / 2) ** -sharing)
            for us, n in zip(small, SURVEY_GPUS, strict=True)
        ]
        start, hop = _line([n - 1 for n in SURVEY_GPUS], waits)
        if start < 0:  # a line through the origin, of the relative errors
            ratios = [(n - 1) / w for n, w in zip(SURVEY_GPUS, waits, strict=True)]
            start, hop = 0.0, sum(ratios) / sum(r * r for r in ratios)
    return {"start_us": start, "hop_us": hop, "bus_gb_s": bus / 1e3, "sharing": sharing}


def _gpu_constants(matmul_us: dict[tuple[int, int, int], float], gb_s: float, tflops: float) -> dict[str, float]:
    """Of a GPU from its matmuls: `matmul_start_us`, what a skinny one costs besides reading its weight, and
    `memory_share`, the share of the datasheet's bandwidth it reads with, from the line through the two at one token;
    `compute_share`, the share of the datasheet's dense bf16 rate that large ones reach: the median of M >= 512."""
    one = [(k * n * 2, us) for (m, k, n), us in matmul_us.items() if m == 1]
    start, slope = _line([size for size, _ in one], [us for _, us in one])
    rates = [2 * m * k * n / us / 1e6 for (m, k, n), us in matmul_us.items() if m >= 512]
    return {
        "matmul_start_us": start,
        "memory_share": 1e-3 / slope / gb_s,
        "compute_share": statistics.median(rates) / tflops,
    }


@cache
def h200_constants() -> dict[str, float]:
    """From the pair's cuBLAS."""
    return _gpu_constants(PAIR_MATMUL_US, H200_HBM_GB_S, H200_BF16_TFLOPS)


@cache
def h100_constants() -> dict[str, float]:
    """From the H100's cuBLAS."""
    return _gpu_constants({s: us for s, (us, _) in H100_MATMUL_US.items()}, H100_HBM_GB_S, H100_BF16_TFLOPS)


Points = tuple[tuple[float, float], ...]  # (bytes, microseconds)


def h100_all_reduce(ours: bool) -> Points:
    """This library's, or NCCL's, by bytes."""
    return tuple((tokens * 8192 * 2, us[ours]) for tokens, us in H100_ALL_REDUCE_US.items())


def h100_behind() -> Points:
    """What this library's all-reduce adds to the matmul before it, by bytes: fused less cublas, the mean over K."""
    added: dict[int, list[float]] = {}
    for (m, _, n), (alone, fused) in H100_MATMUL_US.items():
        added.setdefault(m * n * 2, []).append(fused - alone)
    return tuple((size, statistics.mean(us)) for size, us in sorted(added.items()))


@cache
def ours_all_reduce() -> tuple[float, float]:
    """(microseconds of the smallest, GB/s of large ones) of this library's all-reduce on two H100: the line through the
    smallest and the largest."""
    (b0, t0), *_, (b1, t1) = h100_all_reduce(ours=True)
    return t0, (b1 - b0) / (t1 - t0) / 1e3


@cache
def push() -> tuple[float, float]:
    """(microseconds, GB/s) of this library's messages between two H100: the line through what was measured."""
    start, slope = _line(list(H100_PUSH_US), list(H100_PUSH_US.values()))
    return start, 1e-3 / slope


@cache
def verify_constants(ours: bool) -> tuple[float, float]:
    """(microseconds, GB/s of logits on an H200) of verifying, by this library, or of plain torch's argmax."""
    sizes = [rows * VERIFY_ROW_BYTES for rows in VERIFY_US]
    start, slope = _line(sizes, [us[0 if ours else 1] for us in VERIFY_US.values()])
    return start, 1e-3 / slope
