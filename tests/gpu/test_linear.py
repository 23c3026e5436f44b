"""The kernel of linear and linear_silu_mul for few rows: tiles of every shape, many for each multiprocessor."""

import pytest
import torch
from _matmul_cases import NEEDS_HOPPER, launch_linear, operands

import fused_parallel as fp
from fused_parallel import ops
from fused_parallel.testing.tolerances import assert_close

pytestmark = NEEDS_HOPPER
ROWS = (1, 3, 8, 9, 16, 17, 32, 33, 64)
GUARD = 4096  # elements before and after a result that nobody may write


def run(x, weight, bias=None, gated=False, fresh_weight=False):
    """The kernel's result, written where there was no number."""
    m, n = x.shape[0], weight.shape[0] // (1 + gated)
    room = torch.full((m * n + 2 * GUARD,), float("nan"), device="cuda", dtype=x.dtype)
    out = room[GUARD:-GUARD].view(m, n)
    launch_linear(x, weight, out, bias, gated, fresh_weight)
    assert room[:GUARD].isnan().all() and room[-GUARD:].isnan().all()
    return out


def gated_from(product, dtype):
    """Rounded in between, as the operation says."""
    gate, up = product.to(dtype).double().chunk(2, -1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", ROWS)
def test_linear(m, dtype, seed):
    for k, n in [(8, 8), (64, 64), (72, 136), (2880, 2880), (4096, 8192), (520, 4104), (1024, 28672)]:
        (x,), (weight,) = operands(1, m, k, n, dtype)
        bias = torch.randn(n, device="cuda").to(dtype)
        torch.cuda.synchronize()
        with fp.use("fused"):
            out = ops.linear(x, weight)
            again = ops.linear(x, weight)
            with_bias = ops.linear(x, weight, bias)
        product = x.double() @ weight.double().t()
        assert_close(out, product)
        assert_close(with_bias, product + bias.double(), factor=2)
        assert torch.equal(out, again)
        apart = torch.empty(k, n, device="cuda", dtype=dtype).t().copy_(weight)
        with fp.use("fused"):
            assert torch.equal(ops.linear(x, apart), out)  # copied first
        if n % 16 == 0:
            with fp.use("fused"):
                gated = ops.linear_silu_mul(x, weight)
                assert torch.equal(gated, ops.linear_silu_mul(x, weight))
            gate, up = product.to(dtype).double().chunk(2, -1)
            assert_close(gated, gate * gate.sigmoid() * up, factor=2)


@pytest.mark.parametrize("k, n", [(8, 128256), (64, 128256), (520, 128256), (4104, 57344), (4096, 28672), (72, 33800)])
def test_more_tiles_than_multiprocessors(k, n, seed):
    """One to eight tiles a CTA, whole and broken ones, of one block to more blocks than there are stages."""
    for m in ROWS:
        dtype = torch.bfloat16 if m % 2 else torch.float16
        (x,), (weight,) = operands(1, m, k, n, dtype)
        bias = torch.randn(n, device="cuda").to(dtype)
        product = x.double() @ weight.double().t()
        torch.cuda.synchronize()
        out = run(x, weight)
        assert_close(out, product)
        assert torch.equal(run(x, weight, fresh_weight=True), out)
        assert_close(run(x, weight, bias), product + bias.double(), factor=2)
        if n % 16 == 0:
            gated = run(x, weight, gated=True)
            assert_close(gated, gated_from(product, dtype), factor=2)
            assert torch.equal(run(x, weight, gated=True, fresh_weight=True), gated)
            with fp.use("fused"):
                # The same sums, rounded in the same places, from tiles of other shapes.
                assert torch.equal(ops.silu_mul(out), gated)
        # The same sums where a CTA has one tile, of 128 columns and, for few rows, of 64.
        for columns in (12800, 5120)[: 2 if m <= 16 else 1]:
            assert torch.equal(run(x, weight[:columns]), out[:, :columns])


def test_signed_zeros_and_what_is_no_number(seed):
    """Of every column's sum, where zeros and infinities meet numbers, and nothing leaks from one token to another."""
    (x,), (weight,) = operands(1, 8, 64, 25608, torch.bfloat16)
    x[1], x[2] = 0.0, -0.0
    x[3, 0], x[4, 0], x[5, 0] = float("nan"), float("inf"), -float("inf")
    weight[:, 0] = 1.0
    out = run(x, weight)
    assert out[3].isnan().all() and (out[4] == float("inf")).all() and (out[5] == -float("inf")).all()
    assert (out[1:3] == 0).all()
    assert_close(out[[0, 6, 7]], x[[0, 6, 7]].double() @ weight.double().t())


def captured(chain) -> torch.cuda.CUDAGraph:
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return graph


@pytest.mark.parametrize("m", [1, 8, 16, 33, 64])
def test_chain_in_a_graph_with_changing_inputs(m, seed):
    """Each kernel is launched while the one before runs, and must read what that one has written in this replay."""
    hidden, size, vocabulary = 1032, 9480, 20488
    (x,), (gate_up,) = operands(1, m, hidden, 2 * size, torch.bfloat16)
    (_,), (down,) = operands(1, m, size, vocabulary, torch.bfloat16)
    (_,), (head,) = operands(1, m, vocabulary, hidden, torch.bfloat16)  # few columns: K is split
    bias = torch.randn(vocabulary, device="cuda").to(torch.bfloat16)
    middle, wide, last = (x.new_empty(m, n) for n in (size, vocabulary, hidden))

    def chain():
        launch_linear(x, gate_up, middle, gated=True)
        launch_linear(middle, down, wide, bias)
        launch_linear(wide, head, last)
        launch_linear(last, gate_up, middle, gated=True)

    graph = captured(chain)
    for _ in range(100):
        x.normal_()
        bias.normal_()
        for t in (middle, wide, last):
            t.fill_(float("nan"))
        graph.replay()
        expected = gated_from(x.double() @ gate_up.double().t(), x.dtype).to(x.dtype)
        # From what the kernels themselves have left: each must be the product of that.
        assert_close(wide, expected.double() @ down.double().t() + bias.double(), factor=3)
        assert_close(last, wide.double() @ head.double().t())
        assert_close(middle, gated_from(last.double() @ gate_up.double().t(), x.dtype), factor=2)


@pytest.mark.parametrize("m", [17, 32, 33, 64])
def test_chain_of_clusters_in_a_graph(m, seed):
    """Tiles so low that two CTAs share the tokens: the next kernel's come to where they were as soon as they end."""
    size, length = 4360, 6  # 109 tiles of 40 rows, and one that lies outside
    (x,), (weight,) = operands(1, m, size, size, torch.bfloat16)
    outs = [torch.empty_like(x) for _ in range(length)]

    def chain():
        for taken, out in zip([x, *outs], outs, strict=False):
            launch_linear(taken, weight, out)

    graph = captured(chain)
    for _ in range(100):
        x.normal_()
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for taken, out in zip([x, *outs], outs, strict=False):
            assert_close(out, taken.double() @ weight.double().t())
