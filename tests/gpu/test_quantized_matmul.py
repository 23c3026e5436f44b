"""The quantized_matmul kernel on one GPU: values against float64, rows independent of each other, graphs, alignment."""

import pytest
import torch

import fused_parallel as fp
from fused_parallel.ops.quantized_matmul import _dequantize as by_kernel
from fused_parallel.reference.quantized_matmul import dequantize, quantize
from fused_parallel.testing.tolerances import RELATIVE_ERROR

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N, K): one row, rows that fill no warp's share, K below, at and beyond what a warp takes at once, odd groups.
SHAPES = [(1, 32), (3, 64), (7, 96), (5, 160), (130, 512), (4, 1024), (33, 1056), (250, 2880), (64, 8192), (9, 28672)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def problem(kind, dtype, n, k, m):
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    return x, *quantize(torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda"), kind, dtype)


def check(out, x, values, scales):
    weight = dequantize(values, scales.double(), x.shape[-1])
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    # One rounding of the result, and fp32 sums, whose error grows with what was added up.
    bound = RELATIVE_ERROR[x.dtype] * exact.abs() + 4e-6 * size
    assert ((out.double() - exact).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", SHAPES)
def test_matches_float64(kind, dtype, n, k, seed):
    for m in (1, 2, 3, 4, 7, 8, 9, 15, 16):
        x, values, scales = problem(kind, dtype, n, k, m)
        poison = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
        del poison  # what the output is then allocated over
        with fp.use("fused"):
            out = fp.quantized_matmul(x, values, scales)
            assert torch.equal(fp.quantized_matmul(x, values, scales), out)
            alone = torch.cat([fp.quantized_matmul(row, values, scales) for row in x.split(1)])
        check(out, x, values, scales)
        assert torch.equal(alone, out)  # so a drafted token's logits are those of plain decoding


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_values(kind, seed):
    """Every integer there is, against one-hot rows: what comes out is the weight itself."""
    k, n = 256, 64
    top = 127 if kind == "int8" else 7
    weight = torch.arange(n * k, device="cuda").view(n, k) % (2 * top + 1) - top
    values, scales = quantize(weight.float(), kind, torch.float32)
    for start in range(0, k, 16):
        x = torch.eye(k, device="cuda")[start : start + 16]
        with fp.use("fused"):
            out = fp.quantized_matmul(x, values, scales)
        assert torch.equal(out, dequantize(values, scales, k).T[start : start + 16])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", SHAPES)
def test_dequantize_has_the_references_bits(kind, dtype, n, k, seed):
    _, values, scales = problem(kind, dtype, n, k, 1)
    expected = dequantize(values, scales, k)
    poison = torch.full((n, k), float("nan"), device="cuda", dtype=dtype)
    del poison  # what the output is then allocated over
    assert torch.equal(by_kernel(values, scales, k), expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_alignment_and_many_rows(kind, dtype, seed):
    x, values, scales = problem(kind, dtype, 40, 320, 6)
    with fp.use("fused"):
        expected = fp.quantized_matmul(x, values, scales)
        odd = torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(x).copy_(x)
        wide = torch.empty(6, 323, device="cuda", dtype=dtype)[:, :320].copy_(x)
        shifted = torch.empty(values.numel() + 1, device="cuda", dtype=values.dtype)[1:].view_as(values).copy_(values)
        for one in (odd, wide, x.T.contiguous().T, x.view(2, 3, 320)):
            assert torch.equal(fp.quantized_matmul(one, values, scales).view(6, -1), expected)
        assert torch.equal(fp.quantized_matmul(x, shifted, scales), expected)
        assert fp.quantized_matmul(x[:0], values, scales).shape == (0, 40)
        many = torch.randn(33, 320, device="cuda", dtype=dtype)
        out = fp.quantized_matmul(many, values, scales)  # dequantised first, not refused
        exact = many.double() @ dequantize(values, scales.double(), 320).T
        assert ((out.double() - exact).norm() / exact.norm()).item() < 2 * RELATIVE_ERROR[dtype]
        with pytest.raises(fp.NoFusedKernelError, match="the kernel takes multiples of"):
            fp.quantized_matmul(*problem(kind, dtype, 4, 130, 1))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_graph_and_streams(kind, seed):
    x, values, scales = problem(kind, torch.bfloat16, 300, 1024, 5)
    with fp.use("fused"):
        fp.quantized_matmul(x, values, scales)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fp.quantized_matmul(x, values, scales)
        side = torch.cuda.Stream()
        for _ in range(20):
            x.copy_(torch.randn_like(x))
            out.fill_(float("nan"))
            graph.replay()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                beside = fp.quantized_matmul(x, values, scales)
            torch.cuda.synchronize()
            assert torch.equal(beside, out)
            check(out, x, values, scales)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_operator(kind, seed):
    arguments = problem(kind, torch.float32, 40, 320, 6)
    torch.library.opcheck(torch.ops.fused_parallel.quantized_matmul.default, arguments)
    compiled = torch.compile(fp.quantized_matmul, fullgraph=True)
    assert torch.equal(compiled(*arguments), fp.quantized_matmul(*arguments))
