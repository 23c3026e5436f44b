"""The kernels of verify_tree against the float64 reference, token for token but for near ties."""

import _verify_checks
import pytest
import torch
from _verify_cases import tree_case

import fused_parallel as fp
from fused_parallel.ops.verify_tree import SIBLINGS, verify_tree


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def on_gpu(case):
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in case.items()}


def check(case, **options):
    return _verify_checks.check(on_gpu(case), op=verify_tree, **options)


@pytest.mark.parametrize("dtype", _verify_checks.DTYPES)
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_equals_reference(seed, siblings, dtype):
    check(tree_case(150, 8, 11, siblings, dtype), vocab_size=9)
    check(tree_case(150, 8, 4, siblings, dtype, filters=False, mixed=False, invalid=False, ragged=False))
    check(tree_case(60, 6, 5, siblings, dtype), max_depth=2)
    check(tree_case(24, 12, 5003, siblings, dtype))
    check(tree_case(4, 8, 40000, siblings, dtype, filters=False))
    check(tree_case(4, 63, 300, siblings, dtype))
    check(tree_case(5, 3, 100, siblings, dtype), max_depth=0)
    check(tree_case(5, 0, 100, siblings, dtype))
    check(tree_case(0, 3, 100, siblings, dtype))


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_odd_rows(seed, siblings):
    c = tree_case(64, 6, 50, siblings, invalid=False, ragged=False, mixed=False)
    target, kind = c["target_logits"], torch.arange(64) % 8
    c["parents"][:] = -1  # six siblings each
    target[kind == 0, 0] *= 20.0
    c["draft_tokens"][kind == 1] = 7
    target[kind == 2, :, 1:] = float("-inf")
    target[kind == 3, :, ::3] = float("nan")
    target[kind == 4, :, 5] = float("inf")
    target[kind == 5] = float("-inf")
    c["temperature"][kind == 6] = float("inf")
    if c["draft_logits"] is not None:
        c["draft_logits"][kind == 7] = float("-inf")
    result = check(c, most_ties=2)
    inside = (result.tokens >= 0) & (result.tokens < 50)
    assert torch.equal(inside, torch.arange(7, device="cuda") <= result.num_accepted[:, None])


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_graph_and_batch(seed, siblings):
    """Replays with changed inputs; a request's bits are those it has alone."""
    static = on_gpu(tree_case(20, 7, 3000, siblings))
    with fp.use("fused"):
        verify_tree(**static, return_logprobs=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = verify_tree(**static, return_logprobs=True)
        for _ in range(3):
            for name, value in tree_case(20, 7, 3000, siblings).items():
                if isinstance(value, torch.Tensor):
                    static[name].copy_(value)
            graph.replay()
            eager = verify_tree(**static, return_logprobs=True)
            for a, b in zip(captured, eager, strict=True):
                assert torch.equal(a, b)
            one = {n: t[3:4] if isinstance(t, torch.Tensor) else t for n, t in static.items()}
            for a, b in zip(verify_tree(**one, return_logprobs=True), eager, strict=True):
                assert torch.equal(a, b[3:4])


def test_keep_path_is_captured(seed):
    cache = fp.nn.KVCache(3, 4, 32, 2, 8, device="cuda", dtype=torch.bfloat16)
    path = torch.full((4, 3), -1, device="cuda")
    cache.keep_path(path)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.keep_path(path)
    cache.k.normal_()
    cache.v.normal_()
    cache.lens.copy_(torch.tensor([0, 5, 20, 29]))
    path.copy_(torch.tensor([[1, 3, 4], [0, 2, -1], [-1, -1, -1], [1, 2, 3]]))
    same = fp.nn.KVCache(3, 4, 32, 2, 8, dtype=torch.bfloat16)
    for on_cpu, on_device in ((same.k, cache.k), (same.v, cache.v), (same.lens, cache.lens)):
        on_cpu.copy_(on_device)
    before = cache.k.clone()
    same.keep_path(path.cpu())
    graph.replay()
    assert torch.equal(cache.k.cpu(), same.k) and torch.equal(cache.v.cpu(), same.v)
    assert not torch.equal(cache.k, before)


def test_says_what_it_cannot_do(seed):
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match="63 nodes"):
        verify_tree(**on_gpu(tree_case(1, 64, 20, "deterministic")))
