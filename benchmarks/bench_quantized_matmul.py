"""Matmuls with int8 and int4 weights on one GPU: ours against torch's own, and against bf16 weights.

    python benchmarks/bench_quantized_matmul.py [--rows 1 8] [--kind int4]

Rows: `fused` (fp.quantized_matmul: a kernel up to 32 rows, beyond as the next), `dequantize` (the reference: to a bf16
matrix, then cuBLAS), `cublas` (bf16 weights: two or four times the bytes, what quantising is to beat),
`torch_int8pack` and `torch_int4pack` (torch._weight_int8pack_mm, aten::_weight_int4pack_mm). All are checked against
float64. `bytes`: values, scales, input and output once; `floor_us`: a launch + those at the rate of reading this GPU's
memory.
"""

from __future__ import annotations

import argparse
import functools
import sys
import textwrap

import torch
import torch.nn.functional as F
from _common import Budget, memory_bytes_per_us, relative, told

import fused_parallel as fp
from fused_parallel.comm.probe_device import graph_kernel_us
from fused_parallel.reference.quantized_matmul import GROUP, dequantize, quantize
from fused_parallel.reference.quantized_matmul import quantized_matmul as reference
from fused_parallel.testing.results import RESULTS, append, make_row
from fused_parallel.testing.timer import time_collective

ROWS = [1, 4, 8, 16, 32, 64]
# (K, N) of a Llama-70B layer on one GPU: q, k, v; gate and up; down.
SHAPES = [(8192, 10240), (8192, 57344), (28672, 8192)]
DTYPE = torch.bfloat16
TOLERANCE = 0.01  # bf16 results, and peers that round weights or products to it


def torch_int4pack(k: int, n: int):
    """(function, what makes its weights of ours)."""

    def convert(values, scales):
        swapped = values << 4 | values >> 4  # torch has the even column in the high bits
        packed = torch.ops.aten._convert_weight_to_int4pack(swapped.contiguous(), 8)
        return packed, torch.stack((scales.T, torch.zeros_like(scales.T)), -1).contiguous()

    return lambda x, packed, both: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, both), convert


def torch_int8pack(k: int, n: int):
    return torch._weight_int8pack_mm, lambda values, scales: (values, scales.flatten())


def implementations(kind: str, k: int, n: int) -> dict:
    """impl -> (function, what makes its weights of ours)."""
    peer = (torch_int8pack if kind == "int8" else torch_int4pack)(k, n)
    return {
        "fused": (fp.quantized_matmul, lambda values, scales: (values, scales)),
        "dequantize": (reference, lambda values, scales: (values, scales)),
        "cublas": (F.linear, lambda values, scales: (dequantize(values, scales, k),)),
        f"torch_{kind}pack": peer,
    }


def quantized_weight(kind: str, k: int, n: int, seed: int):
    """(values, scales), random, the same for a seed."""
    torch.manual_seed(seed)
    parts = [torch.randn(min(4096, n - at), k, device="cuda") * k**-0.5 for at in range(0, n, 4096)]
    return tuple(torch.cat(of_all) for of_all in zip(*(quantize(p, kind, DTYPE) for p in parts), strict=True))


def tokens(m: int, k: int, seed: int) -> torch.Tensor:
    torch.manual_seed(1000 + seed)
    return torch.randn(m, k, device="cuda", dtype=DTYPE)


def product(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """In float64, in parts: the weight in it takes eight times the integers' bytes."""
    parts = zip(values.split(4096), scales.split(4096), strict=True)
    return torch.cat([x.double() @ dequantize(v, s.double(), x.shape[1]).T for v, s in parts], -1)


def measure(kind, k, n, args, launch_us, bytes_per_us, budget, wrong) -> list[dict[str, str]]:
    """All numbers of rows with one weight: making it takes longer than multiplying by it."""
    rows = []
    weight = functools.cache(functools.partial(quantized_weight, kind, k, n))
    expected = {m: product(tokens(m, k, 0), *weight(0)) for m in args.rows}
    for impl, (function, convert) in implementations(kind, k, n).items():
        converted = functools.cache(lambda i, convert=convert: convert(*weight(i)))
        for m in args.rows:
            about = f"{impl} {kind} M={m} K={k} N={n}"
            if budget.over(about):
                break

            def inputs(i: int, m=m, converted=converted):
                return tokens(m, k, i), *converted(i)

            try:
                error = relative(function(*inputs(0)), expected[m])
                if not error < TOLERANCE:
                    raise RuntimeError(f"wrong by {error:.1e}")
                timing = time_collective(function, inputs=inputs, calls=6, rounds=12)
            except Exception as failure:  # whatever a peer says about what it does not do
                if impl == "fused":
                    wrong.append(f"{about}: {type(failure).__name__}: {failure}")
                print(
                    f"not measured: {about}: {textwrap.shorten(f'{type(failure).__name__}: {failure}', 160)}",
                    flush=True,
                )
                continue
            per_row = 1 if kind == "int8" else k // GROUP
            moved = n * k // (1 if kind == "int8" else 2) + 2 * n * per_row + 2 * m * (k + n)
            row = make_row(
                "quantized_matmul",
                impl,
                timing,
                world_size=1,
                dtype=DTYPE,
                mode="graph",
                shape={"M": m, "K": k, "N": n, "kind": kind},
                bytes=moved,
                floor_us=launch_us + moved / bytes_per_us,
            )
            append([row], args.results)  # at once: a run that is cut short keeps what it has
            print(f"{impl} {row['shape']}: {timing.us_p50:.1f} us, floor {row['floor_us']}", flush=True)
            rows.append(row)
    return rows


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x")
    parser.add_argument("--kind", choices=("int8", "int4"), nargs="+", default=["int8", "int4"])
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help=f"which of {SHAPES} (K, N)")
    parser.add_argument("--results", default=RESULTS, metavar="DIR")
    Budget.argument(parser, 38)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_quantized_matmul: needs a CUDA GPU, torch sees none")
    budget = Budget(args.seconds)
    bytes_per_us, launch_us = memory_bytes_per_us(), graph_kernel_us(0)
    print(f"and {launch_us:.2f} us a launch", flush=True)
    rows, wrong = [], []
    for kind in args.kind:
        for index in args.shapes:
            if budget.over(f"{kind} K, N = {SHAPES[index]}"):
                continue
            rows += measure(kind, *SHAPES[index], args, launch_us, bytes_per_us, budget, wrong)
            torch.cuda.empty_cache()
    return told(rows, wrong)


if __name__ == "__main__":
    sys.exit(main())
