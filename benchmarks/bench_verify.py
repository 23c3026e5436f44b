"""Verification of drafted tokens: the kernels against the reference and plain torch.

    python benchmarks/bench_verify.py [--shapes 1,4 64,7] [--impls fused torch] [--top-p 0.9] [--top-k 50]
    torchrun --nproc-per-node 2 benchmarks/bench_verify.py --impls fused [--top-p 0.9]

By torchrun the vocabulary is spread over the ranks' GPUs, which check that they get the unsharded kernels' tokens; the
peers in torch are left out. Else on one GPU, where the tokens are checked against the reference's.

Prints a table and appends it to benchmarks/results/verify.csv. `fused`: the kernels, temperature 0.8; `reference`: the
same in float64, in torch operations; with --top-p, --top-k or --min-p, both filter, and the shape says so; `torch`:
rejection in float32 by softmax, gather and an argmax over exponential noise, as one would write it (block: left out);
`torch_argmax_only`: softmax and argmax of the target rows, a part of the work; `flashinfer`: its softmax and chain
speculative sampling (where it is installed: the `peers` extra), the draft's probabilities made beforehand. The drafts
agree with the target more often than not. `floor_us` = bytes over the rate at which this GPU reads its memory, each
logit that must be seen read once; the row a token is drawn from, and what block verification sums, is read again.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from _common import DTYPES, Budget, memory_bytes_per_us, told
from _flashinfer_verify import chain_speculative

import fused_parallel as fp
from fused_parallel.ops.verify import verify
from fused_parallel.testing.results import RESULTS, append, make_row
from fused_parallel.testing.timer import time_collective

SHAPES = ["1,4", "8,4", "32,4", "64,4", "128,4", "64,7"]
CASES = [("full", "rejection"), ("onehot", "rejection"), ("full", "block"), ("onehot", "block"), ("onehot", "greedy")]
IMPLS = ["fused", "reference", "torch", "torch_argmax_only", "flashinfer"]
FILTERS = {"top_p": torch.float32, "top_k": torch.int64, "min_p": torch.float32}
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


def ours(mode, method, filters, **sharded):
    def call(target, tokens, logits, seed, step, temperature):
        with fp.use(mode):
            return verify(
                target, tokens, logits, seed=seed, step=step, temperature=temperature, method=method, **filters,
                **sharded,
            )  # fmt: skip

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


def implementations(draft, method, filters, group):
    if group is not None:
        return {mode: ours(mode, method, filters, vocab_group=group) for mode in ("fused", "reference")}
    found = {mode: ours(mode, method, filters) for mode in ("fused", "reference")}
    if filters:
        return found
    if method == "rejection":
        found["torch"] = torch_rejection
        if draft == "full":
            found["flashinfer"] = chain_speculative
    if method != "block" and draft == "onehot":
        found["torch_argmax_only"] = torch_argmax
    return found


def share(inputs, group):
    """This rank's shard of a round's logits; the drafts are the first rank's."""
    rank, world = group.rank(), group.size()
    target, tokens, logits, *rest = inputs
    dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    part = slice(rank * (target.shape[-1] // world), (rank + 1) * (target.shape[-1] // world))
    return target[..., part].contiguous(), tokens, None if logits is None else logits[..., part].contiguous(), *rest


def differing(inputs, method, filters, group) -> int:
    """Requests whose tokens from the kernels are not the reference's, or sharded not the unsharded kernels'."""
    if group is None:
        got, expected = (ours(mode, method, filters)(*inputs) for mode in ("fused", "reference"))
    else:
        got = ours("fused", method, filters, vocab_group=group)(*share(inputs, group))
        expected = ours("fused", method, filters)(*inputs)
    differ = (got.tokens != expected.tokens).any(1).sum()
    if group is not None:
        dist.all_reduce(differ, dist.ReduceOp.MAX, group=group)  # ranks that disagree would wait for each other below
    return differ.item()


def measure(shape, draft, method, args, bytes_per_us, group, wrong):
    batch, k = map(int, shape.split(","))
    dtype = DTYPES[args.dtype]
    world = 1 if group is None else group.size()
    chosen = {name: getattr(args, name) for name in FILTERS if getattr(args, name) is not None}
    # Tensors: of a number, every call would make one.
    filters = {name: torch.full((batch,), chosen[name], dtype=FILTERS[name], device="cuda") for name in chosen}

    def inputs(index):
        torch.manual_seed(index)  # ranks share what they make
        made = make_inputs(batch, k, args.vocab, dtype, draft)
        return made if group is None else share(made, group)

    def with_probabilities(index):
        target, tokens, logits, *rest = inputs(index)
        return target, tokens, logits.float().softmax(-1), *rest

    torch.manual_seed(batch)
    differ = differing(make_inputs(batch, k, args.vocab, dtype, draft), method, filters, group)
    if differ > 1:  # one may be a near tie
        wrong.append(f"{differ} of {batch} requests differ: {shape} {draft} {method} {chosen}")
        return []
    rows = batch * (k + 1) + (batch * k if draft == "full" else 0)
    moved = rows * args.vocab * dtype.itemsize // world
    measured = []
    for name, function in implementations(draft, method, filters, group).items():
        if name not in args.impls:
            continue
        make = inputs if name != "flashinfer" else with_probabilities
        for mode in args.modes:
            slow = {"calls": 1 if name == "reference" else 2, "rounds": 5, "warmup": 1}
            slow = slow if name.startswith(("reference", "torch")) else {}
            try:
                timing = time_collective(function, inputs=make, group=group, mode=mode, **slow)
            except (ImportError, OSError, AssertionError, RuntimeError) as error:
                if name != "flashinfer":
                    raise
                print(f"not measured: {name}: {str(error)[:200]}", flush=True)
                continue
            keys = {"B": batch, "k": k, "V": args.vocab, "draft": draft, "method": method} | chosen
            about = {"world_size": world, "dtype": dtype, "mode": mode, "shape": keys, "bytes": moved}
            measured.append(make_row("verify", name, timing, floor_us=moved / bytes_per_us, **about))
            if group is None or group.rank() == 0:
                append(measured[-1:], args.results)  # at once: a run that is cut short keeps what it has
                print(f"{name} {measured[-1]['shape']} {mode}: {timing.us_p50:.1f} us", flush=True)
    return measured


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,k")
    parser.add_argument("--cases", nargs="+", default=[f"{d},{m}" for d, m in CASES], metavar="DRAFT,METHOD")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--impls", nargs="+", default=IMPLS)
    parser.add_argument("--modes", nargs="+", choices=("graph", "eager"), default=["graph"])
    for name, dtype in FILTERS.items():
        option, kind = "--" + name.replace("_", "-"), float if dtype.is_floating_point else int
        parser.add_argument(option, type=kind, help="filter the target, here and in the reference")
    parser.add_argument("--results", default=RESULTS, metavar="DIR")
    Budget.argument(parser, 50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_verify: needs a CUDA GPU, torch sees none")
    group = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        group = fp.init(tp=None)["tp"].get_group()
        if args.vocab % group.size():
            sys.exit(f"bench_verify: --vocab {args.vocab} does not split over {group.size()} ranks")
    budget = Budget(args.seconds, group)
    first = group is None or group.rank() == 0
    bytes_per_us = memory_bytes_per_us(first)
    rows, wrong = [], []
    for case in args.cases:
        for shape in args.shapes:
            if not budget.over(f"{shape} {case}"):
                rows += measure(shape, *case.split(","), args, bytes_per_us, group, wrong)
    code = told(rows, wrong) if first else int(bool(wrong))
    if group is not None:
        fp.finalize()
    return code


if __name__ == "__main__":
    sys.exit(main())
