"""add_rms_norm and rms_norm on the CPU: against float64, as operators, and their errors."""

import pytest
import torch

import fused_parallel as fp
from fused_parallel.nn.rms_norm import RMSNorm
from fused_parallel.ops.add_rms_norm import add_rms_norm, rms_norm
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 127), (2, 3, 2880), (0, 64), (4, 4097), (7168,), (5, 1, 8)]
EPS = 1e-5


def oracle(x, residual, weight, eps=EPS):
    """(normed, new_residual) in float64, from the sum rounded to x's dtype as the definition says."""
    new_residual = (x.double() + residual.double()).to(x.dtype).double()
    normed = new_residual / (new_residual.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return normed, new_residual


def random_inputs(shape, dtype):
    return torch.randn(shape, dtype=dtype), 3 * torch.randn(shape, dtype=dtype), torch.randn(shape[-1:], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, seed):
    x, residual, weight = random_inputs(shape, dtype)
    before = [t.clone() for t in (x, residual, weight)]
    normed, new_residual = add_rms_norm(x, residual, weight, EPS)
    expected_normed, expected_residual = oracle(x, residual, weight)
    assert normed.dtype == new_residual.dtype == dtype
    assert torch.equal(new_residual.double(), expected_residual)  # one rounding of an exact sum: no tolerance
    assert_close(normed, expected_normed)
    assert_close(rms_norm(x, weight, EPS), oracle(x, torch.zeros_like(x), weight)[0])
    for tensor, copy in zip((x, residual, weight), before, strict=True):
        assert torch.equal(tensor, copy)


def test_norms_the_rounded_sum(seed):
    """Where the sum loses bits, the norm must be that of the stored residual, as the layers after it see it."""
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(64).bfloat16()
    residual = torch.zeros_like(x)
    x[0, 0], residual[0, 0] = 256.0, 0.99  # the sum rounds to 256; unrounded, it would lower all else by 0.4 %
    normed, new_residual = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(new_residual, x)
    assert torch.equal(normed, rms_norm(x, weight, EPS))


@pytest.mark.parametrize("view", ["columns", "transposed", "every second row", "expanded"])
def test_views(view, seed):
    x = {
        "columns": torch.randn(4, 200)[:, 3:131],
        "transposed": torch.randn(128, 4).t(),
        "every second row": torch.randn(2, 8, 128)[:, ::2],
        "expanded": torch.randn(1, 128).expand(4, 128),
    }[view]
    residual, weight = torch.randn(x.shape), torch.randn(256)[::2]
    normed, new_residual = add_rms_norm(x, residual, weight, EPS)
    assert normed.is_contiguous() and new_residual.is_contiguous()
    for out, expected in zip((normed, new_residual), oracle(x, residual, weight), strict=True):
        assert_close(out, expected)


def test_outputs_do_not_alias():
    x, residual, weight = random_inputs((2, 64), torch.float32)
    normed, new_residual = add_rms_norm(x, residual, weight, EPS)
    addresses = {t.untyped_storage().data_ptr() for t in (x, residual, weight, normed, new_residual)}
    assert len(addresses) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, residual, weight = random_inputs((2, 3, 40), dtype)
    torch.library.opcheck(torch.ops.fused_parallel.add_rms_norm.default, (x, residual, weight, EPS))
    torch.library.opcheck(torch.ops.fused_parallel.rms_norm.default, (x.transpose(0, 1), weight, EPS))


def test_compiles_without_graph_breaks(seed):
    def layer(x, residual, weight):
        normed, residual = add_rms_norm(x * 2, residual, weight, EPS)
        return rms_norm(normed, weight, EPS) + residual

    inputs = random_inputs((3, 48), torch.float32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), layer(*inputs))


def test_module_is_a_drop_in(seed):
    transformers = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = transformers.LlamaRMSNorm(96, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours = RMSNorm(96, eps=1e-5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.variance_epsilon == ours.eps == theirs.variance_epsilon
    assert not ours.weight.requires_grad
    x, residual = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        normed, new_residual = ours(x, residual)
        torch.testing.assert_close(normed, theirs(x + residual))
        torch.testing.assert_close(new_residual, x + residual)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.float64)), TypeError, "x has dtype torch.float64"),
        (dict(residual=torch.zeros(2, 8, dtype=torch.float16)), TypeError, "residual has dtype torch.float16"),
        (dict(residual=torch.zeros(2, 9)), ValueError, r"residual has shape \(2, 9\), expected \(2, 8\)"),
        (dict(residual=torch.zeros(8)), ValueError, r"residual has shape \(8,\)"),
        (dict(weight=torch.zeros(9)), ValueError, r"weight has shape \(9,\), expected \(8,\)"),
        (dict(weight=torch.zeros(8, device="meta")), ValueError, "weight is on meta but x is on cpu"),
        (dict(weight=torch.zeros(8, requires_grad=True)), ValueError, "weight requires a gradient"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must be \[..., hidden\]"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"got shape \(2, 0\)"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(eps=0.0), ValueError, "eps must be positive, got 0.0"),
        (dict(eps=float("nan")), ValueError, "eps must be positive, got nan"),
    ],
)
def test_bad_input(change, error, message):
    good = dict(x=torch.zeros(2, 8), residual=torch.zeros(2, 8), weight=torch.zeros(8), eps=EPS)
    with pytest.raises(error, match=message):
        add_rms_norm(**(good | change))
    if "residual" not in change:
        with pytest.raises(error, match=message):
            rms_norm(**{name: value for name, value in (good | change).items() if name != "residual"})


def test_gradients_are_refused_only_where_they_would_be_recorded():
    weight = torch.ones(8, requires_grad=True)
    with torch.no_grad():
        add_rms_norm(torch.ones(2, 8), torch.ones(2, 8), weight, EPS)


def test_fused_is_refused_on_a_cpu():
    x, residual, weight = random_inputs((2, 8), torch.float32)
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match=r"add_rms_norm.*CUDA tensors only"):
        add_rms_norm(x, residual, weight, EPS)
