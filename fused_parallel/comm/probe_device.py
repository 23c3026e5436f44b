"""What one process can measure: memory, matmuls, host-device and GPU-to-GPU copies. Used by `comm.probe`.

Rates in GB/s are 10^9 bytes per second. All data is random: zeros make matmuls faster than they are on real ones.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

from ..testing.timer import quantile, time_collective
from .alpha_beta import fit_alpha_beta


def _gb_per_s(bytes: int, us: float) -> float:
    return bytes / us * 1e-3


def host_memory(quick: bool) -> dict:
    """Copy bandwidth of host memory with torch's threads, bytes read and written both counted."""
    size = 128 << 20 if quick else 512 << 20
    source, target = torch.rand(size // 4), torch.empty(size // 4)
    timing = time_collective(lambda: target.copy_(source), mode="eager", device="cpu", calls=1, rounds=5, warmup=1)
    return {"copy_gb_per_s": _gb_per_s(2 * size, timing.us_p50), "threads": torch.get_num_threads()}


# (M, K, N): one square, and one token through a weight too large for caches.
_CPU_SHAPES = ((1024, 1024, 1024), (1, 4096, 4096))
_GPU_SHAPES_QUICK = ((1, 8192, 8192), (64, 8192, 8192), (4096, 8192, 8192))
_GPU_SHAPES = tuple((m, 8192, 8192) for m in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192))


# What a prefill meets, and not a cold GPU: within 0.1 s of matmuls an H100 falls from 780 to 720 TFLOP/s, for power.
_SUSTAINED_S = 1.0
_SUSTAINED_ROWS = 1024  # from so many on


def _matmul(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, **counts) -> dict:
    def inputs(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        make = {"device": device, "dtype": torch.float32}
        return torch.randn(m, k, **make).to(dtype), (torch.randn(n, k, **make) * k**-0.5).to(dtype)

    mode = "graph" if device.type == "cuda" else "eager"
    timing = time_collective(torch.nn.functional.linear, inputs=inputs, mode=mode, **counts)
    return {
        "m": m,
        "k": k,
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "us": timing.us_p50,
        "tflop_per_s": 2 * m * k * n / timing.us_p50 * 1e-6,
        "weight_gb_per_s": _gb_per_s(k * n * dtype.itemsize, timing.us_p50),
    }


def cpu_matmul(quick: bool) -> list[dict]:
    """torch's matmul rate on this CPU with torch's threads, fp32 and bf16."""
    rounds = 3 if quick else 7
    return [
        _matmul(*shape, dtype, torch.device("cpu"), calls=4, rounds=rounds, warmup=1)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in _CPU_SHAPES
    ]


def gpu_matmul(index: int, quick: bool) -> list[dict]:
    """cuBLAS's rate in bf16 (fp16 before Ampere) on one GPU, weights rotated through memory; of many rows after a
    second of the same, in which the GPU's clock settles."""
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(index) >= (8, 0) else torch.float16
    shapes = _GPU_SHAPES_QUICK if quick else _GPU_SHAPES
    where = torch.device("cuda", index)
    found = []
    for shape in shapes:
        measure = functools.partial(_matmul, *shape, dtype, where, calls=10)
        if shape[0] >= _SUSTAINED_ROWS:
            warmup = math.ceil(_SUSTAINED_S * 1e6 / (10 * measure(rounds=3)["us"]))
            found.append(measure(rounds=30 if quick else 60, warmup=warmup))
        else:
            found.append(measure(rounds=5 if quick else 15))
    return found


def graph_kernel_us(index: int) -> float:
    """What the smallest kernel costs in a CUDA graph of many."""
    where = torch.device("cuda", index)
    return time_collective(lambda: torch.cuda._sleep(0), device=where, calls=100, rounds=10).us_p50


def hbm(index: int, quick: bool) -> dict:
    """Bandwidth of one GPU's memory: a copy (bytes read and written both counted), and the fastest of torch's reading
    reductions (sum, amax, matrix-vector product)."""
    free = torch.cuda.mem_get_info(index)[0]
    size = min(1 << 30 if quick else 4 << 30, free // 4) >> 20 << 20
    rounds = 5 if quick else 15

    def us(function: Callable[[], torch.Tensor]) -> float:
        return time_collective(function, device=torch.device("cuda", index), calls=3, rounds=rounds).us_p50

    source = torch.empty(size // 2, device=f"cuda:{index}", dtype=torch.bfloat16).normal_()
    # Not copy_: captured in a graph it becomes a memory copy node, which the copy engine does at two thirds of the
    # rate.
    copy_us = us(functools.partial(torch.neg, source, out=torch.empty_like(source)))
    as_float, matrix = source.view(torch.float32), source.view(-1, 8192)
    vector = torch.randn(8192, device=source.device, dtype=source.dtype)
    reads = {"sum": us(as_float.sum), "amax": us(as_float.amax), "mv": us(lambda: torch.mv(matrix, vector))}
    fastest = min(reads, key=reads.get)
    return {
        "copy_gb_per_s": _gb_per_s(2 * size, copy_us),
        "read_gb_per_s": _gb_per_s(size, reads[fastest]),
        "read_by": fastest,
    }


def _wall_seconds(enqueue: Callable[[], None], devices: list[int], rounds: int) -> float:
    """Median time of `enqueue` until all devices have done what it asked for."""
    took = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        enqueue()
        for index in devices:
            torch.cuda.synchronize(index)
        took.append(time.perf_counter() - begin)
    return quantile(took[1:], 0.5)  # the first one touches the pages


def host_device(devices: list[int], quick: bool) -> dict:
    """Bandwidth per GPU between pinned host memory and `devices`, all at once: to them, from them, and both."""
    size, rounds = (64 << 20, 5) if quick else (256 << 20, 9)
    sets = []
    for index in devices:
        make = {"dtype": torch.uint8, "device": f"cuda:{index}"}
        sets.append(
            {
                "up": torch.randint(256, (size,), dtype=torch.uint8).pin_memory(),
                "down": torch.empty(size, dtype=torch.uint8, pin_memory=True),
                "in": torch.empty(size, **make),
                "out": torch.randint(256, (size,), **make),
                "streams": (torch.cuda.Stream(index), torch.cuda.Stream(index)),
            }
        )
        torch.cuda.synchronize(index)

    def enqueue(up: bool, down: bool) -> None:
        for s in sets:
            if up:
                with torch.cuda.stream(s["streams"][0]):
                    s["in"].copy_(s["up"], non_blocking=True)
            if down:
                with torch.cuda.stream(s["streams"][1]):
                    s["down"].copy_(s["out"], non_blocking=True)

    def rate(up: bool, down: bool) -> float:
        return size / _wall_seconds(lambda: enqueue(up, down), devices, rounds) * 1e-9

    return {
        "gpus": devices,
        "to_device_gb_per_s_each": rate(True, False),
        "from_device_gb_per_s_each": rate(False, True),
        "both_ways_gb_per_s_each_way": rate(True, True),
    }


class _Copies:
    """Copies from GPU `src` to GPU `dst`, on streams of their own."""

    def __init__(self, src: int, dst: int, size: int):
        self.source = torch.randint(256, (size,), dtype=torch.uint8, device=f"cuda:{src}")
        self.target = torch.empty(size, dtype=torch.uint8, device=f"cuda:{dst}")
        self.streams = torch.cuda.Stream(src), torch.cuda.Stream(dst)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(src)

    def enqueue(self, count: int) -> None:
        # torch copies between GPUs on the current stream of the source and orders that of the target behind it.
        with torch.cuda.stream(self.streams[1]), torch.cuda.stream(self.streams[0]):
            self.start.record()
            for _ in range(count):
                self.target.copy_(self.source, non_blocking=True)
            self.end.record()

    def us(self) -> float:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3


def _copy_us(directions: list[tuple[int, int]], size: int, count: int = 20, rounds: int = 5) -> float:
    """Median over rounds of the slowest direction's time per copy, all directions started together."""
    copies = [_Copies(src, dst, size) for src, dst in directions]
    took = []
    for _ in range(rounds + 1):
        ready = torch.cuda.Event()
        with torch.cuda.stream(copies[0].streams[0]):
            torch.cuda._sleep(4_000_000)  # about 2 ms: the host queues all copies before the first starts
            ready.record()
        for c in copies:
            c.streams[0].wait_event(ready)
            c.enqueue(count)
        took.append(max(c.us() for c in copies) / count)
    return quantile(took[1:], 0.5)


def peer_copies(a: int, b: int, quick: bool) -> list[dict]:
    """Copies between GPUs `a` and `b` by torch (copy engine where there is peer access, else through the host): each
    direction alone, and both at once. Times are the device's, between copies queued back to back."""
    sizes = [16 << 10, 1 << 20, 64 << 20] if quick else [4 << 10 << 2 * i for i in range(9)]  # 4 KB ... 256 MB
    result = []
    for name, directions in (("one_way", [(a, b)]), ("one_way", [(b, a)]), ("both_ways", [(a, b), (b, a)])):
        us = [_copy_us(directions, size) for size in sizes]
        fit = fit_alpha_beta(sizes, us)
        result.append(
            {
                "src": directions[0][0],
                "dst": directions[0][1],
                "direction": name,
                "alpha_us": fit.alpha_us,
                "beta_gb_per_s": fit.beta_gb_per_s,
                "relative_residual": fit.relative_residual,
                "points": [{"bytes": s, "us": t, "gb_per_s": _gb_per_s(s, t)} for s, t in zip(sizes, us, strict=True)],
            }
        )
    return result
