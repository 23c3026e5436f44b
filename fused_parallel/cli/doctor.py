"""`fused-parallel doctor`: what works on this machine, what falls back, and why."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .. import _ext
from .._table import print_table
from .._version import __version__
from ..comm.topology import topology, why_no_nvml
from ..ops._dispatch import environment_mode

OK, ABSENT, BROKEN = "ok", "absent", "BROKEN"
_OLDEST_TORCH = (2, 8)
_OPTIONAL = {
    "triton": "nothing yet: no operation has a Triton kernel in this version",
    "transformers": "fp.parallelize on transformers' models, and the comparison with them, are not available",
    "tokenizers": "prompts as text work for byte-level models only",
    "pynvml": "the topology lacks NVLink, PCIe and NUMA, and timings the SM clock (package nvidia-ml-py)",
    "matplotlib": "plots of benchmarks and plans are not drawn",
    "yaml": "clusters cannot be described in YAML, only in JSON (package pyyaml)",
}


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, whether it is `OK`, `ABSENT` (the library works without it, as
    `consequence` says) or `BROKEN` (the library cannot work), and what was found."""

    name: str
    state: str
    found: str
    consequence: str = ""


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="what works here, what falls back and why",
        description="Show what works on this machine and what falls back to a slower way, and why. Exit code 0 unless "
        "the library cannot work here at all.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the library cannot work here, else 0."""
    found = list(checks())
    rows = [[c.name, c.state, c.found, c.consequence] for c in found]
    print_table(f"fused_parallel {__version__}", ["what", "state", "found", "so"], rows)
    broken = [c.name for c in found if c.state == BROKEN]
    if broken:
        print(f"fused_parallel cannot work here: {', '.join(broken)}")
        return 1
    print(_summary(found))
    return 0


def _summary(found: list[Check]) -> str:
    state = {c.name: c.state for c in found}
    if state["CUDA kernels"] == OK:
        return "Operations with a CUDA kernel use it; the others use torch and torch.distributed."
    where = "GPUs over NCCL" if state["GPUs"] == OK and state["NCCL"] == OK else "CPUs over Gloo"
    return f"Everything works, on the reference implementations (torch and torch.distributed): {where}."


def checks() -> Iterator[Check]:
    """All checks in the order of the report. None of them raises."""
    yield Check("Python", OK, platform.python_version())
    yield _torch()
    yield from _distributed()
    yield _mode()
    yield from _gpus()
    yield from _extension()
    yield _nvcc()
    yield from _packages()


def _torch() -> Check:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    if version < _OLDEST_TORCH:
        wanted = ".".join(map(str, _OLDEST_TORCH))
        return Check("torch", BROKEN, f"{torch.__version__}, built {built}", f"needs {wanted} or newer: install it")
    return Check("torch", OK, f"{torch.__version__}, built {built}")


def _distributed() -> Iterator[Check]:
    if not dist.is_available():
        yield Check("torch.distributed", BROKEN, "not in this build of torch", "install a build that has it")
        return
    if dist.is_gloo_available():
        yield Check("Gloo", OK, "in this build of torch")
    else:
        state = ABSENT if dist.is_nccl_available() else BROKEN
        yield Check("Gloo", state, "not in this build of torch", "several ranks on CPUs do not work")
    if dist.is_nccl_available():
        version = (
            ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "in this build of torch"
        )
        yield Check("NCCL", OK, version)
    else:
        yield Check("NCCL", ABSENT, "not in this build of torch", "several ranks run on CPUs over Gloo")


def _mode() -> Check:
    try:
        return Check("FUSED_PARALLEL", OK, f"{environment_mode()} (choice of implementation)")
    except ValueError as error:
        return Check("FUSED_PARALLEL", BROKEN, str(error), "set it to one of these, or unset it")


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "torch is built for CPUs only"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver found (no nvidia-smi)"
    return "torch sees no GPU (driver too old for this CUDA, or CUDA_VISIBLE_DEVICES hides them)"


def _gpus() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield Check("GPUs", ABSENT, _why_no_gpu(), "runs on CPUs")
        return
    here = topology()
    names = [
        f"{g['name']} (capability {g['compute_capability'][0]}.{g['compute_capability'][1]})" for g in here["gpus"]
    ]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    yield Check("GPUs", OK, counted)
    if here["driver"]:
        yield Check("driver", OK, here["driver"])
    if len(names) < 2:
        yield Check("peer access", ABSENT, "one GPU", "tensor and pipeline parallelism need two or more, or CPU ranks")
        return
    links = ", ".join(dict.fromkeys(pair["link"] for pair in here["pairs"]))
    without = [f"{p['a']}-{p['b']}" for p in here["pairs"] if not p["peer_access"]]
    if without:
        so = "these GPUs exchange data through the host, by NCCL"
        yield Check("peer access", ABSENT, f"links {links}; none between GPUs {', '.join(without)}", so)
    else:
        yield Check("peer access", OK, f"all pairs, links {links}")
    yield Check("NVLink multicast", OK, "not used by this library: it makes no difference whether it is there")


def _extension() -> Iterator[Check]:
    extension = _ext.extension()
    if extension is None:
        yield Check("extension", ABSENT, _ext.why_no_extension(), "no CUDA kernels")
    else:
        kind = "with CUDA kernels" if extension.cuda_built else "without CUDA kernels"
        yield Check("extension", OK, f"built {kind}")
    why_not = _ext.why_no_kernels()
    if why_not is None:
        yield Check("CUDA kernels", OK, "run on this GPU")
    else:
        yield Check("CUDA kernels", ABSENT, why_not, "operations use their reference implementations")


def _nvcc() -> Check:
    path = shutil.which("nvcc")
    if path is None:
        return Check("nvcc", ABSENT, "not on PATH", "needed only to build the kernels")
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Check("nvcc", ABSENT, f"{path} does not run: {error}", "needed only to build the kernels")
    release = re.search(r"release ([\d.]+)", said)
    return Check("nvcc", OK, f"{release[1] if release else 'unknown version'} at {path}")


def _packages() -> Iterator[Check]:
    for package, without in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Check(package, ABSENT, f"not installed for {sys.executable}", without)
        elif package == "pynvml" and why_no_nvml():
            yield Check(package, ABSENT, why_no_nvml(), without)
        else:
            yield Check(package, OK, "installed")
