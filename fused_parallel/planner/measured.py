"""Measurements that the cost model takes its constants from or is compared with, and the fits of those constants.

Sources: "pair" is this project's measurement on two H200 (torch 2.11, NCCL 2.28.9, CUDA graphs); "survey" is the
published table of 160 NCCL all-reduces of one Llama-3-70B forward at 2, 4 and 8 GPUs.
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

H200_HBM_GB_S, H200_BF16_TFLOPS = 4800, 989.5  # NVIDIA H200 datasheet


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


@cache
def matmul_start_us() -> float:
    """What a skinny matmul costs besides reading its weight: the line through the pair's two at one token."""
    return _line(*_skinny())[0]


@cache
def memory_share() -> float:
    """The share of the datasheet's memory bandwidth that a skinny matmul reads with, from the same line."""
    return 1 / _line(*_skinny())[1] / 1e3 / H200_HBM_GB_S


def _skinny() -> tuple[list[float], list[float]]:
    points = [(k * n * 2, us) for (m, k, n), us in PAIR_MATMUL_US.items() if m == 1]
    return [p[0] for p in points], [p[1] for p in points]


@cache
def compute_share() -> float:
    """The share of the datasheet's dense bf16 rate that large matmuls reach: the median of the pair's, M >= 512."""
    rates = [2 * m * k * n / us / 1e6 for (m, k, n), us in PAIR_MATMUL_US.items() if m >= 512]
    return statistics.median(rates) / H200_BF16_TFLOPS
