"""linear and linear_silu_mul without a GPU: float64, torch.library's checks, torch.compile, bad input."""

import pytest
import torch
import torch.nn.functional as F

from fused_parallel import ops
from fused_parallel.testing.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 127, 66), (64, 2880, 40), (65, 32, 24), (0, 8, 8)])
def test_equals_float64(shape, dtype, seed):
    m, k, n = shape
    x, weight, bias = torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype)
    product = x.double() @ weight.double().t()
    assert_close(ops.linear(x, weight), product)
    assert_close(ops.linear(x, weight, bias), product + bias.double())
    gate, up = product.chunk(2, -1)
    assert_close(ops.linear_silu_mul(x, weight), F.silu(gate) * up, factor=3)
    if m:
        assert torch.equal(ops.linear_silu_mul(x, weight), ops.silu_mul(ops.linear(x, weight)))
    view = torch.randn(k, 2, 3).to(dtype).permute(2, 1, 0)
    assert_close(ops.linear(view, weight), view.double() @ weight.double().t())


def test_library_and_compile(seed):
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(12, 16), torch.randn(12)
    torch.library.opcheck(torch.ops.fused_parallel.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.fused_parallel.linear_silu_mul.default, (x, weight))

    def both(x):
        return ops.linear(x, weight, bias), ops.linear_silu_mul(x, weight)

    for got, expected in zip(torch.compile(both, fullgraph=True)(x), both(x), strict=True):
        assert_close(got, expected.double())


def test_bad_input():
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    cases = [
        (lambda: ops.linear(x, torch.randn(6, 7)), ValueError, "linear: x [..., K] and weight [N, K] must share K"),
        (lambda: ops.linear(x, weight, torch.randn(5)), ValueError, "linear: bias must have shape (6,), got (5,)"),
        (lambda: ops.linear(x, weight.half()), TypeError, "linear: weight has dtype torch.float16 but x has"),
        (lambda: ops.linear_silu_mul(x, weight[:5]), ValueError, "linear_silu_mul: weight must be [2 * size, K]"),
        (lambda: ops.linear(x.requires_grad_(), weight), ValueError, "linear: x requires a gradient"),
    ]
    for call, kind, start in cases:
        with pytest.raises(kind) as error:
            call()
        assert str(error.value).startswith(start)
