"""What takes several ranks to measure: all-reduce and send/recv by size, and this library's all-reduce. Used by
`comm.probe`."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..testing.timer import time_collective
from . import collectives
from .alpha_beta import fit_alpha_beta
from .groups import init
from .launch import launch

# No multicast in this library (it must run where there is none), so none in what it is planned with.
RANK_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0"}
_TIMEOUT_S = 120
# The row-parallel matmul of which it is measured what an all-reduce adds: Llama-70B's down projection, nearly.
_MATMUL_ROWS, _MATMUL_K, _MATMUL_N = (1, 64, 2048), 28672, 8192


def rank_environment() -> dict[str, str]:
    """Environment for ranks spawned to measure: defaults that what the user has set overrides."""
    return {name: os.environ.get(name, value) for name, value in RANK_ENVIRONMENT.items()}


def _sizes(backend: str, quick: bool) -> list[int]:
    if backend == "gloo":
        return [1 << 10, 32 << 10, 1 << 20] if quick else [256 << 2 * i for i in range(9)]  # 256 B ... 16 MB
    return [16 << 10, 1 << 20, 16 << 20] if quick else [4 << 10 << 2 * i for i in range(8)]  # 4 KB ... 64 MB


def _all_reduce(pg: dist.ProcessGroup) -> Callable[[torch.Tensor], object]:
    return lambda x: collectives.all_reduce_(x, pg)


def _ping_pong(pg: dist.ProcessGroup) -> Callable[[torch.Tensor], object]:
    def there_and_back(x: torch.Tensor) -> None:
        if pg.rank() == 0:
            collectives.send(x, 1, pg)
            collectives.recv_(x, 1, pg)
        else:
            collectives.recv_(x, 0, pg)
            collectives.send(x, 0, pg)

    return there_and_back


def _measure_on_rank(device: str, quick: bool) -> list[dict]:
    """Runs on every rank; the same list on all."""
    group = init(device=device, timeout=_TIMEOUT_S)["tp"].get_group()
    backend, world = ("nccl" if device == "cuda" else "gloo"), group.size()
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = _sizes(backend, quick)
    # (name, messages that one call sends one after the other, the call)
    operations = [("all_reduce", 1, _all_reduce(group))]
    if world == 2:
        operations.append(("send_recv", 2, _ping_pong(group)))
    measured = []
    for op, messages, function in operations:
        for mode in ("graph", "eager") if device == "cuda" else ("eager",):
            us = []
            for size in sizes:
                count = size // dtype.itemsize
                timing = time_collective(
                    function,
                    inputs=lambda _, count=count: (torch.randn(count, device=where).to(dtype),),
                    group=group,
                    mode=mode,
                    mutates=True,
                    calls=10 if size <= 1 << 20 else 4,
                    rounds=5 if quick else 15,
                )
                us.append(timing.us_p50 / messages)
            measured.append(_entry(op, backend, world, mode, dtype, sizes, us))
    return measured


def _entry(op: str, backend: str, world: int, mode: str, dtype: torch.dtype, sizes: list[int], us: list[float]) -> dict:
    """An entry of the profile's `collectives`."""
    fit = fit_alpha_beta(sizes, us)
    return {
        "op": op,
        "backend": backend,
        "world_size": world,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "alpha_us": fit.alpha_us,
        "beta_gb_per_s": fit.beta_gb_per_s,
        "relative_residual": fit.relative_residual,
        "points": [{"bytes": s, "us": t} for s, t in zip(sizes, us, strict=True)],
    }


def _measure_ours_on_rank(quick: bool) -> list[dict]:
    """Runs on every rank; the same list on all. RuntimeError where the kernels over peer memory do not run."""
    from ..ops.all_reduce import all_reduce, why_not_fused
    from ..ops.matmul_all_reduce import matmul_all_reduce

    group = init(device="cuda", timeout=_TIMEOUT_S)["tp"].get_group()
    where, dtype, world = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, group.size()
    if why := why_not_fused(torch.empty(8, device=where, dtype=dtype), group):
        raise RuntimeError(why)
    rounds = 5 if quick else 15

    def us(function: Callable, inputs: Callable[[int], tuple], calls: int) -> float:
        return time_collective(function, inputs=inputs, group=group, calls=calls, rounds=rounds).us_p50

    sizes, times = _sizes("nccl", quick), []
    for size in sizes:
        count = size // dtype.itemsize
        make = lambda _, count=count: (torch.randn(count, device=where).to(dtype),)  # noqa: E731
        times.append(us(lambda x: all_reduce(x, group=group), make, 10 if size <= 1 << 20 else 4))
    measured = [_entry("all_reduce", "fused_parallel", world, "graph", dtype, sizes, times)]
    k, n = _MATMUL_K // world, _MATMUL_N
    sizes, times = [], []
    for m in _MATMUL_ROWS:

        def inputs(_: int, m: int = m) -> tuple[torch.Tensor, torch.Tensor]:
            x, weight = torch.randn(m, k, device=where), torch.randn(n, k, device=where) * k**-0.5
            return x.to(dtype), weight.to(dtype)

        whole = us(lambda x, weight: matmul_all_reduce(x, weight, group=group), inputs, 10)
        alone = us(torch.nn.functional.linear, inputs, 10)
        sizes.append(m * n * dtype.itemsize)
        times.append(max(whole - alone, 0.1))  # what is hidden altogether is not less than nothing
    return [*measured, _entry("matmul_all_reduce", "fused_parallel", world, "graph", dtype, sizes, times)]


def measure_ours(world_size: int, quick: bool) -> list[dict]:
    """This library's all-reduce by payload size, and what its matmul_all_reduce takes beyond cuBLAS's matmul, in CUDA
    graphs on `world_size` new local ranks.

    Raises RuntimeError where its kernels do not run, with the reason, or if the ranks fail.
    """
    return launch(_measure_ours_on_rank, world_size, quick, timeout=300, environment=rank_environment())[0]


def measure_collectives(device: str, world_size: int, quick: bool) -> list[dict]:
    """All-reduce by payload size on `world_size` new local ranks, and with two ranks send/recv (half a ping-pong).

    `device` is "cuda" (NCCL, in CUDA graphs and eager) or "cpu" (Gloo, eager). Raises RuntimeError or PeerTimeoutError
    if the ranks fail.
    """
    return launch(_measure_on_rank, world_size, device, quick, timeout=300, environment=rank_environment())[0]


def world_sizes(gpus: int) -> list[int]:
    """Powers of two up to `gpus`, and `gpus` itself; none below two."""
    return sorted({n for n in (2, 4, 8, 16, gpus) if 2 <= n <= gpus})
