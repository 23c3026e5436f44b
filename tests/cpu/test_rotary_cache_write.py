"""rotary_cache_write on the CPU: against float64, as an operator, and its errors."""

import pytest
import torch
from _rotary_cases import oracle, random_inputs

import fused_parallel as fp
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, S, Hq, Hkv, D, C
SHAPES = [(1, 1, 8, 1, 128, 16), (3, 5, 4, 2, 64, 9), (2, 3, 3, 3, 6, 7), (2, 1, 1, 1, 2, 1), (0, 2, 4, 2, 8, 4)]
SHAPES += [(2, 0, 4, 2, 8, 4), (2, 2, 4, 2, 8, 0), (1, 127, 5, 1, 80, 127)]


@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, beyond, seed):
    inputs = random_inputs(shape, dtype, beyond)
    before = [t.clone() for t in inputs]
    q, k_cache, v_cache = fp.rotary_cache_write(*inputs), *inputs[5:7]
    expected = oracle(*before)
    assert q.is_contiguous() and q.dtype == dtype
    scale = before[0].double().abs() * 1.5  # sums cancel
    assert_close(q, expected[0], scale=scale)
    assert_close(k_cache, expected[1])
    assert torch.equal(v_cache.double(), expected[2])
    for i in (0, 1, 2, 3, 4, 7):
        assert torch.equal(inputs[i], before[i])
    untouched = torch.ones(k_cache.shape[:2], dtype=torch.bool)
    for b, row in enumerate(inputs[7].tolist()):
        untouched[b, [p for p in row if 0 <= p < k_cache.shape[1]]] = False
    assert torch.equal(k_cache[untouched], before[5][untouched])


def test_rounds_once(seed):
    inputs = random_inputs((2, 3, 4, 2, 32, 8), torch.bfloat16)
    in_fp32 = [t.float() if t.is_floating_point() else t for t in inputs]
    q, q32 = fp.rotary_cache_write(*inputs), fp.rotary_cache_write(*in_fp32)
    assert torch.equal(q, q32.bfloat16())
    for i in (5, 6):
        assert torch.equal(inputs[i], in_fp32[i].bfloat16())


def test_is_what_transformers_does(seed):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    cos, sin = fp.nn.RotaryEmbedding(16, 1e4)(positions, torch.float32)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    k_cache, v_cache = torch.zeros(2, 2, 8, 2, 16)
    rotated = fp.rotary_cache_write(q, k, v, cos, sin, k_cache, v_cache, positions)
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotated, theirs[0].transpose(1, 2))
    for b, start in enumerate((0, 5)):
        torch.testing.assert_close(k_cache[b, start : start + 3], theirs[1][b].transpose(0, 1))
        assert torch.equal(v_cache[b, start : start + 3], v[b])
    assert v_cache[0, 3:].abs().sum() == 0 and v_cache[1, :5].abs().sum() == 0


def test_positions_outside_the_cache_are_not_written(seed):
    inputs = random_inputs((3, 3, 2, 1, 4, 5), torch.float32)
    positions = torch.tensor([[4, 5, 6], [-1, 7, 2**62], [-(2**62), 0, -2]])
    inputs = [*inputs[:7], positions]
    before = [t.clone() for t in inputs]
    fp.rotary_cache_write(*inputs)
    _, k_cache, v_cache = oracle(*before)
    assert_close(inputs[5], k_cache)
    assert torch.equal(inputs[6].double(), v_cache)
    assert torch.equal(inputs[5][1], before[5][1])


def test_cache_of_a_layer_and_other_strides(seed):
    """The cache is one layer's view, cut to fewer sequences; q is not contiguous in a head."""
    shape = (2, 3, 4, 2, 8, 6)
    inputs = list(random_inputs(shape, torch.float32))
    inputs[0] = torch.randn(2, 3, 8, 4).transpose(2, 3)
    caches = torch.randn(2, 3, 5, 9, 2, 8)  # k or v, layer, sequences, capacity
    inputs[5], inputs[6] = caches[0, 1, 1:3, :6], caches[1, 1, 1:3, :6]
    before, all_before = [t.clone() for t in inputs], caches.clone()
    q = fp.rotary_cache_write(*inputs)
    for out, expected in zip((q, inputs[5], inputs[6]), oracle(*before), strict=True):
        assert_close(out, expected, factor=2)
    caches[:, 1, 1:3, :6] = all_before[:, 1, 1:3, :6]
    assert torch.equal(caches, all_before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, seed):
    inputs = random_inputs((2, 3, 4, 2, 8, 6), dtype)
    torch.library.opcheck(torch.ops.fused_parallel.rotary_cache_write.default, inputs)


def test_compiles_without_graph_breaks(seed):
    def layer(q, k, v, cos, sin, k_cache, v_cache, positions):
        q = fp.rotary_cache_write(q * 2, k, v, cos, sin, k_cache, v_cache, positions)
        return q + k_cache.sum()

    inputs = random_inputs((2, 3, 4, 2, 8, 6), torch.float32)
    again = [t.clone() for t in inputs]
    out, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), layer(*again)
    torch.testing.assert_close(out, expected)
    for a, b in zip(inputs, again, strict=True):
        assert torch.equal(a, b)


def test_inference_mode(seed):
    inputs = random_inputs((2, 3, 4, 2, 8, 6), torch.float32)
    expected = oracle(*inputs)
    with torch.inference_mode():
        inputs = [t.clone() for t in inputs]
        outputs = fp.rotary_cache_write(*inputs), *inputs[5:7]
    for out, value in zip(outputs, expected, strict=True):
        assert_close(out, value, factor=2)


NAMES = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "positions")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(2, 3, 4, 8, dtype=torch.float64)), TypeError, "q has dtype torch.float64"),
        (dict(cos=torch.zeros(2, 3, 8).half()), TypeError, "cos has dtype torch.float16 but q has torch.float32"),
        (dict(q=torch.zeros(2, 3, 8)), ValueError, r"q must be \[B, S, Hq, D\].*got shape \(2, 3, 8\)"),
        (dict(q=torch.zeros(2, 3, 4, 7)), ValueError, r"D even.*got shape \(2, 3, 4, 7\)"),
        (dict(k=torch.zeros(2, 2, 2, 8)), ValueError, r"k and v must be \[2, 3, Hkv, 8\].*k \(2, 2, 2, 8\)"),
        (dict(v=torch.zeros(2, 3, 1, 8)), ValueError, r"v \(2, 3, 1, 8\)"),
        (dict(sin=torch.zeros(2, 3, 4)), ValueError, r"sin has shape \(2, 3, 4\), expected \(2, 3, 8\)"),
        (dict(k_cache=torch.zeros(1, 6, 2, 8)), ValueError, r"\[2, C, 2, 8\], got k_cache \(1, 6, 2, 8\)"),
        (dict(v_cache=torch.zeros(2, 5, 2, 8)), ValueError, r"got v_cache \(2, 5, 2, 8\)"),
        (dict(v_cache=torch.zeros(2, 6, 8, 2).transpose(2, 3)), ValueError, "contiguous, v_cache has strides"),
        (dict(k_cache=torch.zeros(2, 6, 2, 8, requires_grad=True)), ValueError, "k_cache requires a gradient"),
        (dict(positions=torch.zeros(2, 3, dtype=torch.int32)), TypeError, r"int64 \[2, 3\], got torch.int32 \(2, 3\)"),
        (dict(positions=torch.zeros(2, 2).long()), TypeError, r"got torch.int64 \(2, 2\)"),
        (dict(positions=torch.zeros(2, 3, device="meta").long()), ValueError, "positions is on meta but q is on cpu"),
        (dict(positions=[0]), TypeError, "positions must be a tensor int64.*got list"),
    ],
)
def test_bad_input(change, error, message):
    good = dict(zip(NAMES, random_inputs((2, 3, 4, 2, 8, 6), torch.float32), strict=True))
    with pytest.raises(error, match=message):
        fp.rotary_cache_write(**(good | change))


def test_fused_is_refused_on_a_cpu():
    inputs = random_inputs((2, 3, 4, 2, 8, 6), torch.float32)
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match=r"rotary_cache_write.*CUDA tensors only"):
        fp.rotary_cache_write(*inputs)
