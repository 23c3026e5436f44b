"""silu_mul on the CPU: against float64, as an operator, and its errors."""

import pytest
import torch
import torch.nn.functional as F

import fused_parallel as fp
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 2), (3, 254), (2, 3, 2880), (0, 64), (4, 2 * 4097), (14336,), (5, 1, 8)]


def oracle(x):
    gate, up = x.double().chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, seed):
    x = 4 * torch.randn(shape, dtype=dtype)
    before = x.clone()
    out = fp.silu_mul(x)
    assert out.dtype == dtype and out.is_contiguous() and torch.equal(x, before)
    assert_close(out, oracle(x))


def test_rounds_once(seed):
    x = torch.randn(64, 256).bfloat16()
    gate, up = x.float().chunk(2, -1)
    assert torch.equal(fp.silu_mul(x), (F.silu(gate) * up).bfloat16())


def test_large_values():
    gate = torch.tensor([-200.0, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 200.0])
    out = fp.silu_mul(torch.cat((gate, torch.full_like(gate, 2.0))))
    assert_close(out, F.silu(gate.double()) * 2)


@pytest.mark.parametrize("view", ["columns", "transposed", "every second row", "expanded"])
def test_views(view, seed):
    x = {
        "columns": torch.randn(4, 200)[:, 3:131],
        "transposed": torch.randn(128, 4).t(),
        "every second row": torch.randn(2, 8, 128)[:, ::2],
        "expanded": torch.randn(1, 128).expand(4, 128),
    }[view]
    out = fp.silu_mul(x)
    assert out.is_contiguous() and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert_close(out, oracle(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(2, 3, 40, dtype=dtype)
    torch.library.opcheck(torch.ops.fused_parallel.silu_mul.default, (x,))
    torch.library.opcheck(torch.ops.fused_parallel.silu_mul.default, (x.transpose(0, 1),))


def test_compiles_without_graph_breaks(seed):
    def layer(x):
        return fp.silu_mul(x * 2) + 1

    x = torch.randn(3, 48)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), TypeError, "x has dtype torch.float64"),
        (torch.zeros(2, 9), ValueError, r"x must be \[..., 2 \* size\] with size >= 1, got shape \(2, 9\)"),
        (torch.zeros(2, 0), ValueError, r"got shape \(2, 0\)"),
        (torch.tensor(1.0), ValueError, r"got shape \(\)"),
        (torch.zeros(2, 8, requires_grad=True), ValueError, "x requires a gradient"),
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        fp.silu_mul(x)


def test_fused_is_refused_on_a_cpu():
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match=r"silu_mul.*CUDA tensors only"):
        fp.silu_mul(torch.zeros(2, 8))
