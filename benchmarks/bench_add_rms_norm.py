"""Residual addition + RMSNorm on one GPU: the kernel against what torch offers for it.

    python benchmarks/bench_add_rms_norm.py [--tokens 1 64] [--hidden 8192] [--mode graph]

Checks every implementation against float64, prints a table and appends it to benchmarks/results/add_rms_norm.csv.
Peers: `torch` (the operations one by one), `torch_rms_norm` (addition, then torch.nn.functional.rms_norm) and
`torch_compile` (torch.compile of the first). `bytes` is what must move: x, residual and weight in, both results out.
`floor_us` = the smallest kernel in a graph + bytes at the faster of copying and reading this GPU's memory, both
measured first.
"""

import argparse
import sys

import torch
from _common import memory_bytes_per_us, relative

import fused_parallel as fp
from fused_parallel.comm.probe_device import graph_kernel_us
from fused_parallel.ops.add_rms_norm import add_rms_norm
from fused_parallel.testing.results import append, make_row, show
from fused_parallel.testing.timer import time_collective
from fused_parallel.testing.tolerances import RELATIVE_ERROR

TOKENS = [1, 8, 32, 64, 128, 256, 512, 1024, 8192]
HIDDEN = [2880, 4096, 7168, 8192]
DTYPE = torch.bfloat16
EPS = 1e-5


def torch_composite(x, residual, weight):
    new_residual = x + residual
    wide = new_residual.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (wide * scale * weight.float()).to(x.dtype), new_residual


def torch_rms_norm(x, residual, weight):
    new_residual = x + residual
    return torch.nn.functional.rms_norm(new_residual, weight.shape, weight, EPS), new_residual


def fused(x, residual, weight):
    with fp.use("fused"):
        return add_rms_norm(x, residual, weight, EPS)


def check(name: str, function, x, residual, weight) -> None:
    """Raise RuntimeError unless `function` computes the operation. The peers round once or twice more than we do."""
    exact = x.double() + residual.double()
    exact_normed = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    error = max(map(relative, function(x, residual, weight), (exact_normed, exact)))
    if not error <= 2 * RELATIVE_ERROR[DTYPE]:
        raise RuntimeError(f"{name} is wrong: relative error {error:.1e} at {tuple(x.shape)}")


def measure(tokens: int, hidden: int, mode: str, launch_us: float, bytes_per_us: float) -> list[dict[str, str]]:
    torch._dynamo.reset()  # compile for this very shape, the best case of torch.compile
    implementations = {
        "fused": fused,
        "torch": torch_composite,
        "torch_rms_norm": torch_rms_norm,
        "torch_compile": torch.compile(torch_composite, dynamic=False),
    }
    moved = (4 * tokens * hidden + hidden) * DTYPE.itemsize

    def inputs(_):
        x, residual = torch.randn(2, tokens, hidden, dtype=DTYPE, device="cuda")
        return x, residual, torch.randn(hidden, dtype=DTYPE, device="cuda")

    rows = []
    for name, function in implementations.items():
        check(name, function, *inputs(0))
        timing = time_collective(function, inputs=inputs, mode=mode)
        rows.append(
            make_row(
                "add_rms_norm",
                name,
                timing,
                world_size=1,
                dtype=DTYPE,
                mode=mode,
                shape={"tokens": tokens, "hidden": hidden},
                bytes=moved,
                floor_us=launch_us + moved / bytes_per_us,
            )
        )
    append(rows)  # at once: a run that is cut short keeps what it has
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--mode", choices=("graph", "eager"), default="graph")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_add_rms_norm: needs a CUDA GPU, torch sees none")
    bytes_per_us, launch_us = memory_bytes_per_us(), graph_kernel_us(0)
    print(f"and {launch_us:.2f} us a launch", flush=True)
    rows = []
    for hidden in args.hidden:
        for tokens in args.tokens:
            rows += measure(tokens, hidden, args.mode, launch_us, bytes_per_us)
    show(rows)


if __name__ == "__main__":
    main()
