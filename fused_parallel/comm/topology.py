"""What connects the GPUs of this host: NVLink, PCIe, NUMA and peer access, by nvidia-ml-py where it is installed."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from types import ModuleType

import torch

# The least common ancestor of two GPUs on the PCIe tree, by NVML's levels, named as `nvidia-smi topo` does.
_PCIE_LEVELS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_MAX_NVLINKS = 36


@functools.cache
def _nvml() -> tuple[ModuleType | None, str | None]:
    """(initialised pynvml, None), or (None, why not)."""
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML does not start: {error}"
    return pynvml, None


def host_identity() -> str:
    """What ranks compare to know whether they share a host: its name, or FUSED_PARALLEL_HOST where that does not tell
    (containers and network namespaces of one machine, hosts with equal names)."""
    return os.environ.get("FUSED_PARALLEL_HOST") or socket.gethostname()


def why_no_nvml() -> str | None:
    """Why there is no NVML here; None if there is."""
    return _nvml()[1]


@functools.cache
def _handle(index: int):
    """NVML's handle of torch's device `index` (CUDA_VISIBLE_DEVICES renumbers, so by UUID); None if unknown."""
    nvml = _nvml()[0]
    if nvml is None:
        return None
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except (nvml.NVMLError, AttributeError):
        return None


def _ask(function: str, *arguments):
    """An NVML query's answer, None where the driver or the virtual machine does not give one."""
    nvml = _nvml()[0]
    if nvml is None or any(a is None for a in arguments):
        return None
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def sm_clock_mhz(index: int) -> int | None:
    """The SM clock of GPU `index` now, in MHz; None without NVML."""
    nvml = _nvml()[0]
    return None if nvml is None else _ask("nvmlDeviceGetClockInfo", _handle(index), nvml.NVML_CLOCK_SM)


def cpus_near(index: int) -> set[int] | None:
    """The CPUs beside GPU `index` that this process may use; None where NVML does not tell."""
    words = -(-(os.cpu_count() or 1) // 64)
    mask = _ask("nvmlDeviceGetCpuAffinity", _handle(index), words)
    if mask is None:
        return None
    near = {64 * place + bit for place, word in enumerate(mask) for bit in range(64) if word >> bit & 1}
    return near & os.sched_getaffinity(0) or None


def _active_nvlinks(index: int) -> list[int]:
    return [link for link in range(_MAX_NVLINKS) if _ask("nvmlDeviceGetNvLinkState", _handle(index), link) == 1]


def _nvlinks_between(a: int, b: int) -> int:
    """NVLinks from GPU `a` to GPU `b`: those that end at `b`, or through switches as many as the lesser of both has."""
    nvml = _nvml()[0]
    links = _active_nvlinks(a)
    if nvml is None or not links:
        return 0
    bus_of_b = getattr(_ask("nvmlDeviceGetPciInfo", _handle(b)), "busId", None)
    ends = [getattr(_ask("nvmlDeviceGetNvLinkRemotePciInfo", _handle(a), link), "busId", None) for link in links]
    direct = sum(end is not None and end == bus_of_b for end in ends)
    if direct:
        return direct
    through = _ask("nvmlDeviceGetP2PStatus", _handle(a), _handle(b), getattr(nvml, "NVML_P2P_CAPS_INDEX_NVLINK", 2))
    # 0 is NVML_P2P_STATUS_OK; None: the query is not supported here, the links are what there is to go by.
    return min(len(links), len(_active_nvlinks(b))) if through in (0, None) else 0


def pair_link(a: int, b: int) -> str:
    """What connects GPUs `a` and `b`, named as `nvidia-smi topo -m` does: "NV18" (18 NVLinks) or the PCIe path "PIX",
    "PXB", "PHB", "NODE", "SYS". Without NVML: "P2P" if they can access each other's memory, else "host"."""
    if count := _nvlinks_between(a, b):
        return f"NV{count}"
    level = _ask("nvmlDeviceGetTopologyCommonAncestor", _handle(a), _handle(b))
    if level is not None:
        return _PCIE_LEVELS.get(level, f"PCIe level {level}")
    return "P2P" if torch.cuda.can_device_access_peer(a, b) else "host"


def _rank_of_link(name: str) -> tuple[int, int]:
    if name.startswith("NV"):
        return 0, -int(name[2:])
    order = ["P2P", "PIX", "PXB", "PHB", "NODE", "SYS", "host"]
    return (1 + order.index(name), 0) if name in order else (99, 0)


@functools.cache
def link_name(indices: Sequence[int] | None = None) -> str:
    """The slowest link among the GPUs `indices` (a tuple; default: all visible); "none" for fewer than two."""
    indices = tuple(range(torch.cuda.device_count())) if indices is None else indices
    pairs = [pair_link(a, b) for a in indices for b in indices if a < b]
    return max(pairs, key=_rank_of_link) if pairs else "none"


def _gpu(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    handle = _handle(index)
    return {
        "index": index,
        "name": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "nvlinks": len(_active_nvlinks(index)) if handle is not None else None,
        "pcie_generation": _ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        "pcie_width": _ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
        "numa_node": _ask("nvmlDeviceGetNumaNodeId", handle),
        "power_limit_w": (lambda mw: None if mw is None else mw / 1e3)(_ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
        "sm_clock_max_mhz": _ask("nvmlDeviceGetMaxClockInfo", handle, 1) if handle is not None else None,
    }


def topology() -> dict:
    """The GPUs torch sees on this host and what connects each pair; empty lists without a GPU.

    Entries that neither torch nor NVML tells are None. `source` is "nvml", or "torch" without NVML.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "source": "torch" if _nvml()[0] is None else "nvml",
        "driver": _ask("nvmlSystemGetDriverVersion"),
        "gpus": [_gpu(index) for index in range(count)],
        "pairs": [
            {"a": a, "b": b, "link": pair_link(a, b), "peer_access": torch.cuda.can_device_access_peer(a, b)}
            for a in range(count)
            for b in range(count)
            if a < b
        ],
    }
