"""Measuring this machine: what the planner and the benchmarks' floors are computed from. See docs/probe.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from .._version import __version__
from ..errors import PeerTimeoutError
from . import probe_collectives, probe_device, probe_layer
from .topology import topology, why_no_nvml

SCHEMA_VERSION = 1


def probe(quick: bool = False, progress: Callable[[str], None] | None = None) -> dict:
    """Measure what this machine has; the profile that `write_profile` stores.

    Args:
        quick: fewer sizes and repeats: seconds instead of minutes, and less exact.
        progress: called with the name of each measurement before it starts.

    Returns:
        A dictionary of JSON types; units stand in the key names (GB/s are 10^9 bytes per second), docs/probe.md lists
        the keys. What could not be measured is in `not_measured` with the reason; missing hardware raises nothing.

    Uses all visible GPUs, starts two local ranks over Gloo, one for each GPU that queues layers, and 2, 4, 8, ... over
    NCCL. Nothing else should run on the machine meanwhile.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing: list[dict[str, str]] = []

    def skip(what: str, why: str) -> None:
        missing.append({"what": what, "why": why})

    def measure(what: str, function: Callable, *arguments):
        """The measurement, or None with its failure noted: one that fails must not cost the others."""
        if progress is not None:
            progress(what)
        try:
            return function(*arguments)
        except (RuntimeError, OSError, ValueError, PeerTimeoutError) as error:
            skip(what, textwrap.shorten(f"{type(error).__name__}: {error}", 300))
            return None
        finally:
            if gpus:
                torch.cuda.empty_cache()

    profile = {
        "schema_version": SCHEMA_VERSION,
        "quick": quick,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": _versions(),
        "host": _host(),
        "topology": topology(),
        "host_memory": measure("host memory copy", probe_device.host_memory, quick),
        "cpu_matmul": measure("CPU matmul", probe_device.cpu_matmul, quick) or [],
        "gpus": [],
        "host_device": [],
        "peer_copies": [],
        "collectives": [],
    }
    if gpus and why_no_nvml():
        skip("NVLink, PCIe and NUMA of the GPUs", why_no_nvml())
    if gpus:
        _measure_gpus(profile, gpus, quick, measure)
    else:
        for what in ("GPU memory bandwidth", "GPU matmul", "host-device copies"):
            skip(what, _why_no_gpu())
    _measure_links(profile, gpus, quick, measure, skip)
    profile["not_measured"] = missing
    return profile


def _measure_gpus(profile: dict, gpus: int, quick: bool, measure: Callable) -> None:
    models = {}  # one GPU of each model: its like behave alike
    for gpu in profile["topology"]["gpus"]:
        models.setdefault(gpu["name"], gpu["index"])
    for name, index in models.items():
        kernel = measure(f"kernels in a graph on GPU {index}", probe_device.graph_kernel_us, index)
        memory = measure(f"memory of GPU {index}", probe_device.hbm, index, quick)
        matmul = measure(f"matmuls on GPU {index}", probe_device.gpu_matmul, index, quick)
        profile["gpus"].append(
            {"name": name, "index": index, "graph_kernel_us": kernel, "memory": memory, "matmul": matmul or []}
        )
    queueing = measure("queueing of layers", probe_layer.eager_layer_us, gpus)
    profile["host"]["eager_layer_us"] = queueing and queueing["first"]
    profile["host"]["eager_layer_us_of"] = queueing
    for devices in [[0]] + ([list(range(gpus))] if gpus > 1 else []):
        what = f"host-device copies of GPU(s) {', '.join(map(str, devices))}"
        if (rates := measure(what, probe_device.host_device, devices, quick)) is not None:
            profile["host_device"].append(rates)


def _measure_links(profile: dict, gpus: int, quick: bool, measure: Callable, skip: Callable) -> None:
    for other in range(1, gpus):
        pair = measure(f"copies between GPUs 0 and {other}", probe_device.peer_copies, 0, other, quick)
        profile["peer_copies"] += pair or []
    runs = [("cpu", 2)]
    if gpus < 2:
        why = "needs two GPUs, this machine shows one" if gpus else _why_no_gpu()
        skip("copies between GPUs", why)
        skip("NCCL all-reduce and send/recv", why)
    elif not torch.distributed.is_nccl_available():
        skip("NCCL all-reduce and send/recv", "this build of torch has no NCCL")
    else:
        runs += [("cuda", world) for world in probe_collectives.world_sizes(gpus)]
    for device, world in runs:
        what = f"{'NCCL' if device == 'cuda' else 'Gloo'} on {world} ranks"
        profile["collectives"] += measure(what, probe_collectives.measure_collectives, device, world, quick) or []
        if device == "cuda":
            what = f"this library's all-reduce on {world} ranks"
            profile["collectives"] += measure(what, probe_collectives.measure_ours, world, quick) or []


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no GPU"


def _versions() -> dict:
    return {
        "fused_parallel": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
    }


def _host() -> dict:
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_profile(profile: dict, path: str | Path) -> None:
    """Write the profile as JSON. Raises OSError if `path` cannot be written."""
    Path(path).write_text(json.dumps(profile, indent=2, allow_nan=False) + "\n")


def load_profile(path: str | Path) -> dict:
    """Read a profile that `fused-parallel probe --out` wrote.

    Raises ValueError if the file is not such a profile or of another schema version, OSError if it cannot be read.
    """
    try:
        profile = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); write a profile with: fused-parallel probe --out {path}"
        ) from error
    version = profile.get("schema_version") if isinstance(profile, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version is {version!r}, this version of the library reads {SCHEMA_VERSION}; "
            f"measure again: fused-parallel probe --out {path}"
        )
    return profile
