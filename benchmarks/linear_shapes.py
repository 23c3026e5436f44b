"""Times of the local kernel for few rows (`ops.linear`, `ops.linear_silu_mul`) and of cuBLAS, in turns, on one GPU.

    python benchmarks/linear_shapes.py [M ...]

Shapes are those of 70B and 8B layers on one to eight GPUs; of gate and up cuBLAS computes both halves, without their
product. Each kernel follows itself, in a CUDA graph, with other weights in every call. Prints microseconds, medians:
ours, and cuBLAS in brackets.
"""

import sys

import torch
import torch.nn.functional as F

import fused_parallel as fp
from fused_parallel import ops
from fused_parallel.testing.timer import Subject, rotation_sets, time_in_turns

# Rows of the weight, K, whether they are gate and up.
SHAPES = {
    "gate_up 70B": (57344, 8192, True),
    "gate_up 70B/2": (28672, 8192, True),
    "gate_up 70B/4": (14336, 8192, True),
    "gate_up 70B/8": (7168, 8192, True),
    "qkv 70B": (10240, 8192, False),
    "qkv 70B/2": (5120, 8192, False),
    "head 70B/2": (64128, 8192, False),
    "o 70B": (8192, 8192, False),
    "o 70B/2": (8192, 4096, False),
    "down 70B/2": (8192, 14336, False),
    "gate_up 8B": (28672, 4096, True),
    "qkv 8B": (6144, 4096, False),
    "n4096": (4096, 4096, False),
    "n2560": (2560, 8192, False),
    "n1280": (1280, 8192, False),
}
CALLS, ROUNDS = 10, 12


def main(rows: list[int]) -> None:
    like = {"device": "cuda", "dtype": torch.bfloat16}
    for name, (n, k, gated) in SHAPES.items():
        count = rotation_sets(n * k * 2, CALLS)
        weights = [torch.randn(n, k, **like) * k**-0.5 for _ in range(count)]
        line = name.ljust(14)
        for m in rows:

            def inputs(i, m=m, k=k, weights=weights):
                return torch.randn(m, k, **like), weights[i % len(weights)]

            with fp.use("fused"):
                ours = Subject(ops.linear_silu_mul if gated else ops.linear, inputs, calls=CALLS)
            a, b = time_in_turns([ours, Subject(F.linear, inputs, calls=CALLS)], ROUNDS)
            line += f"| {m}: {a.us_p50:.1f} ({b.us_p50:.1f}) "
        print(line, flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("linear_shapes.py: needs a GPU, torch sees none")
    with torch.no_grad():
        main([int(m) for m in sys.argv[1:]] or [1, 16, 32, 64])
