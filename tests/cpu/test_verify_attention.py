"""verify_attention against float64 loops: grouped heads, ragged lengths, pages, tree masks; and its errors."""

import math

import pytest
import torch

import fused_parallel as fp
from fused_parallel.testing.tolerances import assert_close


def oracle(q, k, v, lens, tree_mask=None, scale=None):
    """Head by head, token by token, in float64; k and v [B, C, Hkv, D] contiguous."""
    batch, new, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(batch):
        start = int(lens[b]) - new
        for s in range(new):
            seen = list(range(start)) + [
                start + j for j in range(new) if (j <= s if tree_mask is None else tree_mask[b, s, j])
            ]
            for h in range(heads):
                kv = h // (heads // k.shape[2])
                scores = k[b, seen, kv].double() @ q[b, s, h].double() * (scale or 1 / math.sqrt(dim))
                out[b, s, h] = scores.softmax(0) @ v[b, seen, kv].double()
    return out


def inputs(batch, new, heads, kv_heads, dim, capacity, dtype):
    q = torch.randn(batch, new, heads, dim, dtype=dtype)
    k, v = (torch.randn(batch, capacity, kv_heads, dim, dtype=dtype) for _ in range(2))
    lens = torch.randint(new, capacity + 1, (batch,), dtype=torch.int32)
    return q, k, v, lens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new,heads,kv_heads,dim", [(1, 4, 4, 16), (5, 6, 2, 8), (1, 8, 1, 64), (7, 3, 3, 24)])
def test_ragged(new, heads, kv_heads, dim, dtype, seed):
    q, k, v, lens = inputs(4, new, heads, kv_heads, dim, 23, dtype)
    assert_close(fp.verify_attention(q, k, v, lens), oracle(q, k, v, lens), factor=2)
    assert_close(fp.verify_attention(q, k, v, lens, scale=0.3), oracle(q, k, v, lens, scale=0.3), factor=2)


def test_what_lies_behind_the_length_is_not_read(seed):
    q, k, v, lens = inputs(3, 4, 4, 2, 16, 20, torch.float32)
    expected = fp.verify_attention(q, k, v, lens)
    for b, n in enumerate(lens.tolist()):
        k[b, n:], v[b, n:] = 1e4, -1e4
    assert torch.equal(fp.verify_attention(q, k, v, lens), expected)


def test_pages_equal_contiguous(seed):
    q, k, v, lens = inputs(3, 4, 4, 2, 16, 24, torch.float32)
    table = torch.randperm(18).view(3, 6).to(torch.int32)  # 3 sequences of 6 pages of 4 tokens
    pages_k, pages_v = torch.empty(18, 4, 2, 16), torch.empty(18, 4, 2, 16)
    pages_k[table.long().flatten()] = k.reshape(18, 4, 2, 16)
    pages_v[table.long().flatten()] = v.reshape(18, 4, 2, 16)
    paged = fp.verify_attention(q, pages_k, pages_v, lens, block_table=table)
    assert torch.equal(paged, fp.verify_attention(q, k, v, lens))


def test_tree_mask(seed):
    q, k, v, lens = inputs(2, 5, 4, 2, 16, 20, torch.float32)
    parents = [-1, 0, 0, 1, 2]
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    for node in range(5):
        ancestor = node
        while ancestor >= 0:
            mask[:, node, ancestor] = True
            ancestor = parents[ancestor]
    assert_close(fp.verify_attention(q, k, v, lens, tree_mask=mask), oracle(q, k, v, lens, mask))
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5).contiguous()
    assert_close(fp.verify_attention(q, k, v, lens, tree_mask=causal), oracle(q, k, v, lens))


def test_opcheck_and_compile(seed):
    q, k, v, lens = inputs(2, 3, 4, 2, 16, 9, torch.float32)
    op = torch.ops.fused_parallel.verify_attention.default
    torch.library.opcheck(op, (q, k, v, lens, None, None, 0.25, None))
    torch.library.opcheck(op, (q, k, v, torch.full_like(lens, 5), None, None, 0.25, 2))
    compiled = torch.compile(lambda *a: fp.verify_attention(*a).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, lens), fp.verify_attention(q, k, v, lens).relu())


@pytest.mark.parametrize("context", [0, 1, 30])
def test_a_context_that_the_host_knows(context, seed):
    """Prefill: the same, and what lies behind the new tokens is not touched."""
    q, k, v, _ = inputs(2, 70, 4, 2, 16, 110, torch.float32)
    lens = torch.full((2,), context + 70, dtype=torch.int32)
    expected = oracle(q, k, v, lens)
    k[:, context + 70 :], v[:, context + 70 :] = torch.nan, torch.nan
    assert_close(fp.verify_attention(q, k, v, lens, context=context), expected)
    with pytest.raises(ValueError, match=f"with context={context} all cache_lens are {context + 70}"):
        fp.verify_attention(q, k, v, lens + torch.tensor([0, 1], dtype=torch.int32), context=context)
    with pytest.raises(ValueError, match=r"context must lie in \[0, 40\]"):
        fp.verify_attention(q, k, v, lens, context=41)


def test_one_graph_for_all_contexts(seed):
    q, k, v, _ = inputs(1, 8, 4, 2, 16, 64, torch.float32)
    attention = torch.compile(fp.verify_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for context in range(20):
        lens = torch.full((1,), context + 8, dtype=torch.int32)
        assert torch.equal(
            attention(q, k, v, lens, context=context), fp.verify_attention(q, k, v, lens, context=context)
        )


def test_empty_batch():
    q, k = torch.randn(0, 2, 4, 8), torch.randn(0, 5, 2, 8)
    assert fp.verify_attention(q, k, k, torch.empty(0, dtype=torch.int32)).shape == (0, 2, 4, 8)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lens": torch.tensor([2, 9])}, "cache_lens must be int32"),
        ({"lens": torch.tensor([2, 21], dtype=torch.int32)}, r"cache_lens must lie in \[3, 20\]"),
        ({"k": torch.randn(2, 20, 3, 16), "v": torch.randn(2, 20, 3, 16)}, "q's heads a multiple"),
        ({"v": torch.randn(2, 19, 2, 16)}, "the caches alike"),
        ({"k": torch.randn(5, 20, 2, 16), "v": torch.randn(5, 20, 2, 16)}, "paged caches need block_table"),
        ({"tree_mask": torch.ones(2, 3, 4, dtype=torch.bool)}, "tree_mask must be bool"),
        ({"block_table": torch.zeros(2, 3)}, "block_table must be int32"),
    ],
)
def test_errors(change, message, seed):
    q, k, v, lens = inputs(2, 3, 4, 2, 16, 20, torch.float32)
    given = {"q": q, "k": k, "v": v, "lens": lens} | change
    options = {name: given[name] for name in ("tree_mask", "block_table") if name in given}
    with pytest.raises((TypeError, ValueError), match=message):
        fp.verify_attention(given["q"], given["k"], given["v"], given["lens"], **options)
