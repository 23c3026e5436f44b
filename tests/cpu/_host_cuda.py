"""The verification kernels on the host: their sources, compiled by the host's compiler over tests/cpu/host_cuda, behind
the interface of the extension. It shows that decisions, thresholds and exchanges are right, not that the GPU's memory
order and arithmetic are; those are for tests/gpu."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).resolve().parent / "host_cuda"

# (file, pattern, replacement): instructions in PTX.
REPLACED = [
    ("verify_common.cuh", r'asm\("ex2\.approx.*?\);\n', "y = std::exp2(x);\nif (y < 0x1p-126f) y = 0.0f;\n"),
    ("verify_common.cuh", r'asm volatile\("prefetch.*?\);\n', ";\n"),
    ("verify_gather.cuh", r'asm volatile\("st\.shared.*?\);\n', "*reinterpret_cast<T*>(data + at) = x;\n"),
    ("common/vec.cuh", r'asm volatile\("ld\.global.*?\);\n', "v.raw = *reinterpret_cast<const uint4*>(p);\n"),
    ("common/vec.cuh", r'asm volatile\("prefetch.*?\);\n', "(void)p;\n"),
    ("common/vec.cuh", r"__cvta_generic_to_shared\(p\)", "0"),
]


def cuda_include() -> Path | None:
    """Where the toolkit's headers are, as nvcc says."""
    if shutil.which("nvcc") is None:
        return None
    command = ["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r'INCLUDES="-I([^"]+)"', said)
    return Path(found[1].strip()) if found and Path(found[1].strip(), "cuda_bf16.h").exists() else None


def make_library(into: Path) -> ctypes.CDLL:
    include = cuda_include() or pytest.skip("the CUDA toolkit's headers were not found")
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler in PATH")
    shutil.copytree(ROOT / "csrc", into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cpp"))
    for name, pattern, replacement in REPLACED:
        text = (into / name).read_text()
        changed, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        assert count, f"{name} has nothing like {pattern}"
        (into / name).write_text(changed)
    shutil.copytree(HOST, into, dirs_exist_ok=True)
    library = into / "verify_host.so"
    # -ffp-contract=off: sums and products are fused only where the source says so, so that results are the host's own.
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-pthread"]
    command = [compiler, *flags, f"-I{into}", f"-I{include}", str(into / "verify_host.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(library))


_KINDS = {"int": ctypes.c_int, "unsigned": ctypes.c_uint, "std::int64_t": ctypes.c_int64}


def argument_fields() -> list[tuple[str, type]]:
    """The fields of VerifyArguments, from the header."""
    text = (ROOT / "csrc" / "verify.h").read_text()
    body = re.sub(r"//.*", "", text[text.index("struct VerifyArguments {") :].split("{", 1)[1].split("};")[0])
    fields = []
    for declaration in filter(None, (" ".join(d.split()) for d in body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?([\w:]+(?:\*| \*)?) (.*)", declaration).groups()
        for name in names.split(", "):
            fields.append((name, ctypes.c_void_p if kind.endswith("*") else _KINDS[kind]))
    return fields


def argument_order() -> list[str]:
    """The names of the extension's `verify` by position, from the bindings, where they stand twice."""
    text = (ROOT / "csrc" / "bindings.cpp").read_text()
    text = text[text.index('"verify",') :]
    parameters, body = re.search(r"\[\]\((.*?)\) \{(.*?)\);\n\}", text, re.DOTALL).groups()
    order = [parameter.split()[-1] for parameter in parameters.split(",")]
    assert order == re.findall(r'py::arg\("(\w+)"\)', body)
    return order


class HostExtension:
    """What ops/_verify_kernel.py takes of the extension."""

    verify_max_draft_tokens = 32
    verify_max_shards = 16
    verify_max_tree_nodes = 63
    verify_record_bytes = 32

    def __init__(self, into: Path) -> None:
        self.library = make_library(into)
        self.library.scratch_bytes.restype = ctypes.c_size_t
        self.library.argument_bytes.restype = ctypes.c_size_t
        self.library.last_error.restype = ctypes.c_char_p
        self.library.verify_ranks.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int]

        class Arguments(ctypes.Structure):
            _fields_ = argument_fields()

        self.Arguments, self.order = Arguments, argument_order()
        assert ctypes.sizeof(Arguments) == self.library.argument_bytes()

    def verify_scratch_bytes(self, batch, k, width, has_draft, tree) -> int:
        return self.library.scratch_bytes(batch, k, width, int(has_draft), int(tree))

    def arguments(self, *values):
        fields = dict(zip(self.order, values, strict=True))
        for unused in ("device", "stream", "peers"):
            fields.pop(unused)
        return self.Arguments(stream=fields.pop("noise_stream"), **fields)

    def raise_if(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self.library.last_error().decode())

    def verify(self, *values) -> None:
        self.raise_if(self.library.verify(ctypes.byref(self.arguments(*values))))

    def row(self, arguments, row: int) -> tuple[float, float]:
        """Least logit kept and log2 of the sum of a target row, after a float32 call without draft logits."""
        threshold, log2_sum = ctypes.c_float(), ctypes.c_double()
        self.library.row_of(ctypes.byref(arguments), row, ctypes.byref(threshold), ctypes.byref(log2_sum))
        return threshold.value, log2_sum.value

    def gathered(self, row, dtype, aligned, begin, end, gather_from, ask) -> tuple[torch.Tensor, float]:
        """Of a row's logits begin to end - 1 those that are `ask` or more, in any order, after a CTA has gathered those
        from `gather_from` on; and from where on its lists have them. `dtype`: the extension's code."""
        found, listed_from = torch.empty(row.numel()), ctypes.c_float()
        count = self.library.gathered(
            ctypes.c_void_p(row.data_ptr()), dtype, row.numel(), int(aligned), begin, end, ctypes.c_float(gather_from),
            ctypes.c_float(ask), ctypes.c_void_p(found.data_ptr()), ctypes.byref(listed_from),
        )  # fmt: skip
        return found[:count], listed_from.value

    def selected(self, row, aligned, scale, mass, likely, top_k, top_p, min_p) -> tuple[float, float] | None:
        """The least logit that filters keep of a row in bfloat16, and the mass it keeps in units of the greatest
        weight, by counting values; None if it is further down. `likely`: the least that is listed beforehand, `mass`:
        of the whole row, `min_p`: as the least logit that it keeps, -inf for none."""
        least, kept, f = ctypes.c_float(), ctypes.c_double(), ctypes.c_float
        found = self.library.selected(
            ctypes.c_void_p(row.data_ptr()), row.numel(), int(aligned), f(row.nan_to_num(-torch.inf).max()), f(scale),
            ctypes.c_double(mass), f(likely), ctypes.c_int64(top_k), f(top_p), f(min_p), ctypes.byref(least),
            ctypes.byref(kept),
        )  # fmt: skip
        assert found >= 0, "sums are left behind"
        return (least.value, kept.value) if found else None

    def beyond(self, arguments) -> tuple[torch.Tensor, int]:
        """Block verification's sums Z of chunks, float64 [B, k, chunks] (of row 0 and of rows that do not matter: any
        content), after a float32 call; and over how many CTAs a row was spread."""
        at, splits = ctypes.POINTER(ctypes.c_double)(), ctypes.c_int()
        chunks = self.library.beyond_of(ctypes.byref(arguments), ctypes.byref(at), ctypes.byref(splits))
        count = arguments.batch * arguments.k * chunks
        return torch.tensor(at[:count]).double().view(arguments.batch, arguments.k, chunks), splits.value

    def set_multiprocessors(self, count: int) -> int:
        """Of the GPU that the launchers see; and the largest cluster of the launches since the last call of this."""
        return self.library.set_multiprocessors(count)

    def verify_ranks(self, *rounds: list, slot_bytes: int = 1 << 20, absent: int = -1) -> None:
        """Rounds of prepared calls, one for each rank, of all ranks at once, through memory they share."""
        world = len(rounds[0])
        array = (self.Arguments * (len(rounds) * world))(*(call for calls in rounds for call in calls))
        self.raise_if(self.library.verify_ranks(array, world, len(rounds), slot_bytes, absent))
