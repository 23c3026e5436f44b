"""Verification of drafted trees: the kernels against the reference, and against a chain of as many nodes.

    python benchmarks/bench_verify_tree.py [--shapes 1,4,4 8,4,4] [--rules without_replacement deterministic]

A shape is B,width,depth: at each of `depth` levels `width` siblings below the first of the level before, so
width x depth nodes. They are drawn without replacement from the draft's distribution, or are its top tokens
("deterministic"). The rows of the draft's logits of siblings are the same; each has its own memory.

Prints a table and appends it to benchmarks/results/verify_tree.csv. `fused`: the kernels, temperature 0.8; `reference`:
the same in float64, in torch operations; `fused_chain`: `fp.verify` of a chain of width x depth nodes by rejection,
which reads as many logits. Tokens are checked against the reference's first. `floor_us` = bytes over the rate at which
this GPU reads its memory, every logit read once.
"""

import argparse
import sys

import torch
from _common import DTYPES, Budget, memory_bytes_per_us, told

import fused_parallel as fp
from fused_parallel.ops.verify import verify
from fused_parallel.ops.verify_tree import SIBLINGS, verify_tree
from fused_parallel.testing.results import RESULTS, append, make_row
from fused_parallel.testing.timer import time_collective

SHAPES = ["1,4,4", "8,4,4", "32,4,4", "64,4,4", "1,2,8", "64,2,8"]
IMPLS = ["fused", "fused_chain", "reference"]
TEMPERATURE = 0.8


def make_inputs(batch, width, depth, vocab, dtype, rule):
    target = torch.randn(batch, width * depth + 1, vocab, dtype=dtype, device="cuda") * 3
    tokens, logits = [], []
    for level in range(depth):
        row = max(0, (level - 1) * width + 1)  # of the target after the first node of the level before
        draft = target[:, row] / TEMPERATURE + 0.5 * torch.randn(batch, vocab, dtype=dtype, device="cuda")
        scores = draft.float()
        if rule == "without_replacement":  # exponential races: the first arrivals, in their order
            scores = scores.softmax(-1) / torch.empty(scores.shape, device="cuda").exponential_()
        tokens.append(scores.topk(width).indices)
        logits.append(draft[:, None].expand(-1, width, -1))
    above = [max(-1, (level - 1) * width) for level in range(depth) for _ in range(width)]
    return (
        target,
        torch.cat(tokens, 1),
        torch.tensor(above, device="cuda"),
        torch.cat(logits, 1) if rule == "without_replacement" else None,
        torch.randint(0, 2**62, (batch,), device="cuda"),
        torch.arange(batch, device="cuda"),
        torch.full((batch,), TEMPERATURE, device="cuda"),
    )


def tree(mode, rule, depth):
    def call(target, tokens, parents, logits, seed, step, temperature):
        given = {"seed": seed, "step": step, "temperature": temperature, "siblings": rule, "max_depth": depth}
        with fp.use(mode):
            return verify_tree(target, tokens, parents, logits, **given)

    return call


def chain(target, tokens, parents, logits, seed, step, temperature):
    with fp.use("fused"):
        return verify(target, tokens, logits, seed=seed, step=step, temperature=temperature, method="rejection")


def measure(shape, rule, args, bytes_per_us, wrong):
    batch, width, depth = map(int, shape.split(","))
    dtype, nodes = DTYPES[args.dtype], width * depth
    torch.manual_seed(batch)
    checked = make_inputs(batch, width, depth, args.vocab, dtype, rule)
    fused, reference = (tree(mode, rule, depth) for mode in ("fused", "reference"))
    differ = (fused(*checked).tokens != reference(*checked).tokens).any(1).sum().item()
    if differ > 1:  # one may be a near tie
        wrong.append(f"{differ} of {batch} requests differ: {shape} {rule}")
        return []
    del checked

    def inputs(index):
        torch.manual_seed(index)
        return make_inputs(batch, width, depth, args.vocab, dtype, rule)

    moved = batch * (nodes + 1 + (nodes if rule == "without_replacement" else 0)) * args.vocab * dtype.itemsize
    rows = []
    for name, function in {"fused": fused, "fused_chain": chain, "reference": reference}.items():
        if name not in args.impls:
            continue
        for mode in args.modes:
            slow = {"calls": 1, "rounds": 5, "warmup": 1} if name == "reference" else {"calls": 4}
            timing = time_collective(function, inputs=inputs, mode=mode, **slow)
            keys = {"B": batch, "width": width, "depth": depth, "V": args.vocab, "siblings": rule}
            about = {"world_size": 1, "dtype": dtype, "mode": mode, "shape": keys, "bytes": moved}
            rows.append(make_row("verify_tree", name, timing, floor_us=moved / bytes_per_us, **about))
            append(rows[-1:], args.results)  # at once: a run that is cut short keeps what it has
            print(f"{name} {rows[-1]['shape']} {mode}: {timing.us_p50:.1f} us", flush=True)
    return rows


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,width,depth")
    parser.add_argument("--rules", nargs="+", choices=SIBLINGS, default=SIBLINGS)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=IMPLS)
    parser.add_argument("--modes", nargs="+", choices=("graph", "eager"), default=["graph"])
    parser.add_argument("--results", default=RESULTS, metavar="DIR")
    Budget.argument(parser, 50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_verify_tree: needs a CUDA GPU, torch sees none")
    budget = Budget(args.seconds)
    bytes_per_us = memory_bytes_per_us()
    rows, wrong = [], []
    for rule in args.rules:
        for shape in args.shapes:
            if not budget.over(f"{shape} {rule}"):
                rows += measure(shape, rule, args, bytes_per_us, wrong)
    return told(rows, wrong)


if __name__ == "__main__":
    sys.exit(main())
