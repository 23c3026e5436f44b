"""Attention of the newest tokens against the KV cache on one GPU: the kernels against torch's attention.

    python benchmarks/bench_verify_attention.py [--shapes 32,8192,5,32,4,128] [--impls fused torch_flash]

Shapes are B,ctx,q,hq,hkv,d: sequences, tokens of each in a contiguous cache (the new ones included), new tokens (1 is
plain decode), query and KV heads, head size. Checks every implementation against float64, prints a table and appends it
to benchmarks/results/verify_attention.csv, row by row. Peers: `torch_sdpa` with a mask and enable_gqa, as one would
write it; `torch_folded`, the query heads of a KV head folded into rows, so that torch need not repeat keys and values;
`torch_flash`, its flash kernel with the causal mask at the end of the context, which knows no ragged lengths;
`torch_flex`, FlexAttention compiled with a causal block mask; `flashinfer`, its paged append attention (where it is
installed: the `peers` extra). Their masks and plans are made beforehand. `fused_paged` is `fused` with shuffled pages
of 64 tokens. `floor_us` = the bytes of all keys and values over the rate at which this GPU reads its memory, measured
first.
"""

import argparse
import functools
import sys
import textwrap

import torch
import torch.nn.functional as F
from _common import DTYPES, Budget, memory_bytes_per_us, relative, told
from _flashinfer_verify import PagedAttention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fused_parallel.ops._dispatch import use
from fused_parallel.ops.verify_attention import verify_attention
from fused_parallel.testing.results import RESULTS, append, make_row
from fused_parallel.testing.timer import time_collective
from fused_parallel.testing.tolerances import RELATIVE_ERROR

SHAPES = ["32,8192,5,32,4,128", "1,32768,5,32,4,128", "32,8192,1,32,4,128", "1,32768,1,32,4,128", "1,8192,5,32,4,128"]
SHAPES += ["1,1024,5,32,4,128", "8,8192,5,32,4,128", "32,8192,5,8,1,128", "64,4096,8,32,8,128", "32,8192,16,32,4,128"]
SHAPES += ["32,8192,1,32,32,128", "32,8192,5,32,8,64"]
PAGE = 64


def make_inputs(batch, context, new, heads, kv_heads, dim, dtype):
    """q, the caches, lengths, and the additive mask of the peers [1, 1, new, context]."""
    q = torch.randn(batch, new, heads, dim, dtype=dtype, device="cuda")
    k, v = torch.randn(2, batch, context, kv_heads, dim, dtype=dtype, device="cuda")
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    hidden = torch.ones(new, context, dtype=torch.bool, device="cuda").triu(context - new + 1)
    return q, k, v, lens, torch.zeros(1, 1, new, context, dtype=dtype, device="cuda").masked_fill(hidden, -torch.inf)


def fused(q, k, v, lens, mask):
    with use("fused"):
        return verify_attention(q, k, v, lens)


def fused_paged(q, k, v, lens, table):
    with use("fused"):
        return verify_attention(q, k, v, lens, block_table=table)


def torch_sdpa(q, k, v, lens, mask):
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    gqa = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=gqa).transpose(1, 2)


def torch_folded(q, k, v, lens, mask):
    batch, new, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows = q.view(batch, new, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * new, dim)
    mask = mask.expand(batch, kv_heads, group * new, -1) if new == 1 else mask
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.view(batch, kv_heads, group, new, dim).permute(0, 3, 1, 2, 4).reshape(q.shape)


def torch_flash(q, k, v, lens, mask):
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    gqa = q.shape[2] != k.shape[2]
    bias = causal_lower_right(q.shape[1], k.shape[1]) if q.shape[1] > 1 else None
    return F.scaled_dot_product_attention(*heads_first, attn_mask=bias, enable_gqa=gqa).transpose(1, 2)


@functools.cache
def compiled_flex():
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled for itself
    return torch.compile(flex_attention, dynamic=False)


def torch_flex(q, k, v, lens, mask):
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return compiled_flex()(*heads_first, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def flashinfer(q, k, v, lens, attention):
    return attention(q, k, v)


PEERS = (torch_sdpa, torch_folded, torch_flash, torch_flex, flashinfer)
IMPLEMENTATIONS = {f.__name__: f for f in (fused, fused_paged, *PEERS)}


def inputs_of(name, shape, dtype):
    """A function of `time_collective` that makes `name` its inputs."""
    batch, context, new, *heads_and_dim = shape

    def table():
        return torch.randperm(batch * context // PAGE, device="cuda").view(batch, -1).to(torch.int32)

    @functools.cache
    def planned():  # one plan and one table for all inputs, as for all layers of a model
        return PagedAttention(table(), new, *heads_and_dim, PAGE, dtype)

    @functools.cache
    def block_mask():
        return create_block_mask(lambda b, h, i, j: j <= i + context - new, None, None, new, context, device="cuda")

    def make(_):
        q, k, v, lens, mask = make_inputs(*shape, dtype)
        if name in ("fused_paged", "flashinfer"):
            # Random values in any order: the pages themselves need no shuffling.
            k, v = (t.view(-1, PAGE, *t.shape[2:]) for t in (k, v))
            return q, k, v, lens, table() if name == "fused_paged" else planned()
        if name == "torch_flex":
            mask = block_mask()
        if name == "torch_folded" and new > 1:
            mask = mask.repeat(1, 1, shape[3] // shape[4], 1)
        return q, k, v, lens, mask

    return make


def check(name, inputs) -> None:
    """Raise RuntimeError unless the first and the last sequence are right."""
    q, k, v, _, last = inputs
    out = IMPLEMENTATIONS[name](*inputs)
    if name in ("fused_paged", "flashinfer"):
        table = last.table if name == "flashinfer" else last
        k, v = (t[table.long()].flatten(1, 2) for t in (k, v))
    batch, new, heads, dim = q.shape
    context, kv_heads = k.shape[1:3]
    hidden = torch.ones(new, context, dtype=torch.bool, device="cuda").triu(context - new + 1)
    for b in {0, batch - 1}:
        queries = q[b].double().view(new, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("shgd,nhd->hgsn", queries, k[b].double()) * dim**-0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        exact = torch.einsum("hgsn,nhd->shgd", weights, v[b].double()).flatten(1, 2)
        error = relative(out[b], exact)
        if not error <= 2 * RELATIVE_ERROR[q.dtype]:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e} of sequence {b}, {tuple(q.shape)}")


def measure(shape, args, bytes_per_us, budget, wrong):
    batch, context, new, heads, kv_heads, dim = shape
    dtype = DTYPES[args.dtype]
    moved = 2 * batch * context * kv_heads * dim * dtype.itemsize
    rows = []
    for name in args.impls:
        if budget.over(f"{name} {shape}"):
            break
        make = inputs_of(name, shape, dtype)
        ours = name.startswith("fused")
        for mode in args.modes:
            try:
                check(name, make(0))
                counts = {"calls": 10, "rounds": 20} if ours else {"calls": 2, "rounds": 8, "warmup": 1}
                timing = time_collective(IMPLEMENTATIONS[name], inputs=make, mode=mode, **counts)
            except Exception as error:  # whatever a peer says about what it does not do
                if ours:
                    wrong.append(f"{name} {shape} {mode}: {type(error).__name__}: {error}")
                text = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
                print(f"not measured: {name} {shape} {mode}: {text}", flush=True)
                continue
            keys = {"B": batch, "ctx": context, "q": new, "hq": heads, "hkv": kv_heads, "d": dim}
            floor = moved / bytes_per_us
            about = {"world_size": 1, "dtype": dtype, "mode": mode, "shape": keys, "bytes": moved, "floor_us": floor}
            rows.append(make_row("verify_attention", name, timing, **about))
            append(rows[-1:], args.results)  # at once: a run that is cut short keeps what it has
            print(f"{name} {shape} {mode}: {timing.us_p50:.1f} us, {100 * floor / timing.us_p50:.0f} %", flush=True)
        torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,ctx,q,hq,hkv,d")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--impls", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--modes", nargs="+", choices=("graph", "eager"), default=["graph"])
    parser.add_argument("--results", default=RESULTS, metavar="DIR")
    Budget.argument(parser, 50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_verify_attention: needs a CUDA GPU, torch sees none")
    budget = Budget(args.seconds)
    bytes_per_us = memory_bytes_per_us()
    rows, wrong = [], []
    for shape in args.shapes:
        rows += measure(tuple(map(int, shape.split(","))), args, bytes_per_us, budget, wrong)
    return told(rows, wrong)


if __name__ == "__main__":
    sys.exit(main())
