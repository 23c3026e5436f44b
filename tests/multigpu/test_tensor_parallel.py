"""Two GPUs over NCCL: the operations against float64, in CUDA graphs, and the whole model against transformers."""

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close

IDS = torch.randint(0, 263, (2, 100), generator=torch.Generator().manual_seed(5))
PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52]]
LEAD, K, N = (6,), 2880, 130


def make(seed: int, index: int, shape, dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100 + index)).to(dtype)


def problem(seed, dtype):
    shapes = (*LEAD, K), (N, K), (N,), (*LEAD, N), (N,)
    return [make(seed, i, shape, dtype) for i, shape in enumerate(shapes)]


def operations(mesh, seed, dtype):
    """Every operation of tensor parallelism on this rank's part of the problem, results on the CPU."""
    group = mesh["tp"]
    rank = group.get_local_rank()
    x, weight, bias, residual, norm = (t.cuda() for t in problem(seed, dtype))
    xk, wk = x.chunk(2, -1)[rank].contiguous(), weight.chunk(2, -1)[rank].contiguous()

    def all_of_them():
        summed = fp.all_reduce(xk, group=group)
        normed = fp.all_reduce_add_rms_norm(xk[:, :N], residual, norm, 1e-5, group=group)
        product = fp.matmul_all_reduce(xk, wk, bias, group=group)
        product_normed = fp.matmul_all_reduce_add_rms_norm(xk, wk, residual, norm, 1e-5, bias, group=group)
        scattered = fp.matmul_reduce_scatter(xk, wk, group=group)
        gathered = fp.all_gather_matmul(x.chunk(2, 0)[rank], weight.chunk(2, 0)[rank], group=group)
        parts = fp.reduce_scatter(xk, group=group), fp.all_gather(xk, group=group)
        return summed, *normed, product, *product_normed, scattered, gathered, *parts

    eager = all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_of_them()
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    return [t.cpu() for t in eager]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operations(dtype, seed):
    results = run_ranks(operations, 2, seed, dtype, device="cuda")
    x, weight, bias, residual, norm = (t.double() for t in problem(seed, dtype))

    def normed(new):
        return new / (new.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm

    halves = x.chunk(2, -1)
    summed = halves[0] + halves[1]
    new, product = summed[:, :N] + residual, x @ weight.T
    with_bias = product + bias + residual
    whole = [summed, normed(new), new, product + bias, normed(with_bias), with_bias]
    for rank, got in enumerate(results):
        for out, expected in zip(got[:6], whole, strict=True):
            assert_close(out, expected, factor=4)
        rows = slice(rank * 3, rank * 3 + 3)
        assert_close(got[6], product[rows], factor=4)
        assert_close(got[7], product.chunk(2, -1)[rank], factor=4)
        assert_close(got[8], summed[rows], factor=4)
        assert torch.equal(got[9].double(), torch.cat(halves))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:6], results[1][:6], strict=True))


def gpu_logits(mesh, path, ids):
    out = ranks.logits(mesh, path, ids.cuda(), torch.float32)
    return None if out is None else out.cpu()


@pytest.mark.parametrize("tp,pp", [(2, 1), (1, 2)])
def test_model(tp, pp, tmp_path):
    reference = ranks.save_random_model(tmp_path)
    with torch.no_grad():
        expected = reference(IDS).logits
    got = run_ranks(gpu_logits, 2, tmp_path, IDS, device="cuda", tp=tp, pp=pp)[-1]
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tp,pp", [(2, 1), (1, 2)])
def test_generate(tp, pp, tmp_path):
    ranks.save_random_model(tmp_path / "target", scale=6.0)
    ranks.save_random_model(tmp_path / "draft", scale=6.0, num_hidden_layers=1)
    for draft in (None, tmp_path / "draft"):
        args = tmp_path / "target", draft, PROMPTS, 20
        ((expected, _),) = run_ranks(ranks.generated, 1, *args, device="cpu")
        for tokens, _ in run_ranks(ranks.generated, 2, *args, device="cuda", tp=tp, pp=pp):
            assert tokens == expected
        if pp == 1:
            for tokens, _ in run_ranks(ranks.generated, 2, *args, device="cuda", tp=tp, cuda_graph=True):
                assert tokens == expected
