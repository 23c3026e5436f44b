"""Verification of drafted tokens on one GPU: the kernels against the reference and plain torch.

    python benchmarks/bench_verify.py [--shapes 1,4 64,7] [--impls fused torch] [--modes graph]

Checks that the kernels give the reference's tokens, prints a table and appends it to benchmarks/results/verify.csv.
`fused`: the kernels, temperature 0.8, no filters; `reference`: the same in float64, in torch operations; `torch`:
rejection in float32 by softmax, gather and an argmax over exponential noise, as one would write it (block: left out);
`torch_argmax_only`: softmax and argmax of the target rows, a part of the work. The drafts agree with the target more
often than not. `floor_us` = bytes over the rate at which this GPU reads its memory, each logit that must be seen read
once; the row a token is drawn from, and what block verification sums, is read again.
"""

import argparse
import sys

import torch
from _common import DTYPES

import fused_parallel as fp
from fused_parallel.comm.probe_device import hbm
from fused_parallel.ops.verify import verify
from fused_parallel.testing.results import RESULTS, append, make_row, show
from fused_parallel.testing.timer import time_collective

SHAPES = ["1,4", "8,4", "32,4", "64,4", "128,4", "64,7"]
CASES = [("full", "rejection"), ("onehot", "rejection"), ("full", "block"), ("onehot", "block"), ("onehot", "greedy")]
TEMPERATURE = 0.8


def make_inputs(batch, k, vocab, dtype, draft):
    target = torch.randn(batch, k + 1, vocab, dtype=dtype, device="cuda") * 3
    logits = target[:, :k] / TEMPERATURE + 0.5 * torch.randn(batch, k, vocab, dtype=dtype, device="cuda")
    # Exponential races draw from the softmax without float64 or a sort.
    tokens = torch.stack([(x.float().softmax(-1) / torch.empty(x.shape, device="cuda").exponential_()).argmax(-1)
                          for x in logits.unbind(1)], 1)  # fmt: skip
    seed = torch.randint(0, 2**62, (batch,), device="cuda")
    step = torch.arange(batch, device="cuda")
    temperature = torch.full((batch,), TEMPERATURE, device="cuda")
    return target, tokens, logits if draft == "full" else None, seed, step, temperature


def ours(mode, method):
    def call(target, tokens, logits, seed, step, temperature):
        with fp.use(mode):
            return verify(target, tokens, logits, seed=seed, step=step, temperature=temperature, method=method)

    return call


def torch_rejection(target, tokens, logits, seed, step, temperature):
    batch, k = tokens.shape
    p = torch.softmax(target.float() / temperature[:, None, None], -1)
    index = tokens[..., None]
    ratio = p[:, :k].gather(2, index)[..., 0]
    if logits is not None:
        q = torch.softmax(logits.float(), -1)
        ratio = ratio / q.gather(2, index)[..., 0]
    accepted = (torch.rand(batch, k, device="cuda") < ratio).long().cumprod(1).sum(1)
    row = p.take_along_dim(accepted[:, None, None], 1)[:, 0]
    at = accepted.clamp(max=k - 1)
    if logits is not None:
        rest = (row - q.take_along_dim(at[:, None, None], 1)[:, 0]).clamp(min=0)
    else:
        rest = row.scatter(1, tokens.gather(1, at[:, None]), 0.0)
    row = torch.where((accepted == k)[:, None], row, rest)
    last = (row / torch.empty_like(row).exponential_()).argmax(-1)
    length = torch.arange(k + 1, device="cuda")
    padded = torch.nn.functional.pad(tokens, (0, 1), value=-1)
    return torch.where(length < accepted[:, None], padded, -1).where(length != accepted[:, None], last[:, None])


def torch_argmax(target, tokens, logits, seed, step, temperature):
    return torch.softmax(target.float() / temperature[:, None, None], -1).argmax(-1)


def implementations(draft, method):
    found = {"fused": ours("fused", method), "reference": ours("reference", method)}
    if method == "rejection":
        found["torch"] = torch_rejection
    if method != "block" and draft == "onehot":
        found["torch_argmax_only"] = torch_argmax
    return found


def check(inputs, method) -> None:
    """Raise RuntimeError unless the kernels' tokens are the reference's, but for one near tie."""
    differ = (ours("fused", method)(*inputs).tokens != ours("reference", method)(*inputs).tokens).any(1).sum().item()
    if differ > 1:
        raise RuntimeError(f"{differ} of {len(inputs[1])} requests differ from the reference, {method}")


def measure(shape, draft, method, args, bytes_per_us):
    batch, k = map(int, shape.split(","))
    dtype = DTYPES[args.dtype]
    check(make_inputs(batch, k, args.vocab, dtype, draft), method)
    rows = batch * (k + 1) + (batch * k if draft == "full" else 0)
    moved = rows * args.vocab * dtype.itemsize
    measured = []
    for name, function in implementations(draft, method).items():
        if name not in args.impls:
            continue
        for mode in args.modes:
            slow = {} if name == "fused" else {"calls": 2, "rounds": 5, "warmup": 1}
            timing = time_collective(
                function, inputs=lambda _: make_inputs(batch, k, args.vocab, dtype, draft), mode=mode, **slow
            )
            measured.append(
                make_row(
                    "verify",
                    name,
                    timing,
                    world_size=1,
                    dtype=dtype,
                    mode=mode,
                    shape={"B": batch, "k": k, "V": args.vocab, "draft": draft, "method": method},
                    bytes=moved,
                    floor_us=moved / bytes_per_us,
                )
            )
    append(measured, args.results)  # at once: a run that is cut short keeps what it has
    return measured


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,k")
    parser.add_argument("--cases", nargs="+", default=[f"{d},{m}" for d, m in CASES], metavar="DRAFT,METHOD")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--impls", nargs="+", default=["fused", "reference", "torch", "torch_argmax_only"])
    parser.add_argument("--modes", nargs="+", choices=("graph", "eager"), default=["graph"])
    parser.add_argument("--results", default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_verify: needs a CUDA GPU, torch sees none")
    memory = hbm(0, quick=True)
    bytes_per_us = max(memory["copy_gb_per_s"], memory["read_gb_per_s"]) * 1e3
    print(f"floor_us from {bytes_per_us * 1e-6:.2f} TB/s", flush=True)
    torch.cuda.empty_cache()
    rows = []
    for case in args.cases:
        for shape in args.shapes:
            rows += measure(shape, *case.split(","), args, bytes_per_us)
    show(rows)


if __name__ == "__main__":
    main()
