"""Weight-only quantisation: the format, accuracy against float64, layers and models on one and more ranks, errors."""

import json

import _llama_ranks as ranks
import pytest
import torch
from _errors import assert_starts, errors_of

import fused_parallel as fp
from fused_parallel.nn.linear import gather_last
from fused_parallel.reference.quantized_matmul import GROUP, dequantize, quantize, quantized_shapes
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import RELATIVE_ERROR

KINDS = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 127), (5, 128), (8, 129), (2, 250), (64, 2880), (7, 4097)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", SHAPES)
def test_nearest_value_is_taken(kind, dtype, n, k, seed):
    weight = torch.randn(n, k) * torch.rand(n, 1) * 3
    weight[0, 0] = 0
    values, scales = quantize(weight, kind, dtype)
    shape, integers, of_scales = quantized_shapes(kind, n, k)
    assert (values.shape, values.dtype) == (shape, integers) and (scales.shape, scales.dtype) == (of_scales, dtype)
    step = scales.double().repeat_interleave(k if kind == "int8" else GROUP, 1)[:, :k]
    most = 127 if kind == "int8" else 7
    # Half a step, and what the largest value is off where its scale was rounded down.
    exact = dequantize(values, scales.double(), k)
    slack = most * step * torch.finfo(dtype).eps
    assert ((weight.double() - exact).abs() <= step / 2 + slack).all()
    assert ((weight.double() - exact).abs() > step / 3).any() or k < 3  # no finer than it says
    rounded = dequantize(values, scales, k)
    assert rounded.dtype == dtype and torch.equal(rounded, exact.to(dtype)) and rounded[0, 0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_tiny_weights(kind):
    weight = torch.zeros(2, 300)
    weight[1] = 1e-30  # its scale is nothing in fp16
    values, scales = quantize(weight, kind, torch.float16)
    assert torch.equal(dequantize(values, scales, 300), torch.zeros(2, 300, dtype=torch.float16))
    assert not scales.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", SHAPES)
def test_matmul_against_float64(kind, dtype, n, k, seed):
    for lead in ((), (3,), (2, 0), (2, 5)):
        x = torch.randn(*lead, 2 * k, dtype=dtype)[..., ::2]  # not contiguous
        weight = torch.randn(n, k)
        values, scales = quantize(weight, kind, dtype)
        out = fp.quantized_matmul(x, values, scales)
        assert out.shape == (*lead, n) and out.dtype == dtype
        if not out.numel():
            continue
        exact = x.double() @ dequantize(values, scales.double(), k).T
        size = x.double().abs() @ dequantize(values, scales.double(), k).abs().T  # what rounding is relative to
        assert ((out.double() - exact).abs() <= 2 * RELATIVE_ERROR[dtype] * size + 1e-12).all()


@pytest.mark.parametrize("kind,error", [("int8", 0.012), ("int4", 0.12)])
def test_error_of_quantisation(kind, error, seed):
    """What normal weights lose: an eighth of the largest of 128 values a step, so about 0.1 for int4."""
    x, weight = torch.randn(16, 1024), torch.randn(512, 1024)
    exact = x.double() @ weight.double().T
    out = fp.quantized_matmul(x, *quantize(weight, kind, torch.float32))
    relative = ((out.double() - exact).norm() / exact.norm()).item()
    assert error / 3 < relative < error


@pytest.mark.parametrize("kind", KINDS)
def test_operator(kind, seed):
    x, weight = torch.randn(3, 130), torch.randn(5, 130)
    arguments = x, *quantize(weight, kind, torch.float32)
    torch.library.opcheck(torch.ops.fused_parallel.quantized_matmul.default, arguments)
    compiled = torch.compile(fp.quantized_matmul, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), fp.quantized_matmul(*arguments))


def test_errors():
    x, (values, scales) = torch.randn(3, 130), quantize(torch.randn(5, 130), "int4", torch.float32)
    calls = [
        lambda: fp.quantized_matmul(x, values.float(), scales),
        lambda: fp.quantized_matmul(x, values, scales.half()),
        lambda: fp.quantized_matmul(x[:, :100], values, scales),
        lambda: fp.quantized_matmul(x, values.to(torch.int8), scales),
        lambda: fp.quantized_matmul(x, values[0], scales),
        lambda: fp.quantized_matmul(x.clone().requires_grad_(), values, scales),
        lambda: fp.nn.quantize_(torch.nn.Linear(2, 2), "int2"),
    ]
    expected = [
        "TypeError: quantized_matmul: values must be int8, or uint8 that hold int4, got torch.float32",
        "TypeError: quantized_matmul: scales has dtype torch.float16 but x has torch.float32",
        "ValueError: quantized_matmul: x (3, 100) needs int4 values (5, 50) and scales (5, 1) (one for 128 columns of",
        "ValueError: quantized_matmul: x (3, 130) needs int8 values (5, 130) and scales (5, 1) (one for a row), got",
        "ValueError: quantized_matmul: x is (3, 130) and values (65,)",
        "ValueError: quantized_matmul: x requires a gradient",
        "ValueError: quantize: must be one of 'int8', 'int4', got 'int2'",
    ]
    assert_starts(errors_of(calls), expected)


def layers_on_ranks(mesh, kind, dtype, with_bias):
    """A quantised MLP and attention's projections on this rank, against the same layers with dequantised weights."""
    group = mesh["tp"]
    torch.manual_seed(group.get_local_rank())
    found = []
    for layer in (
        fp.nn.ColumnParallelLinear(96, 250, with_bias, group=group, dtype=dtype),
        fp.nn.ColumnParallelLinear(96, (250, 13), with_bias, group=group, names=("a", "b"), dtype=dtype),
        fp.nn.RowParallelLinear(515, 40, with_bias, group=group, dtype=dtype),
        fp.nn.RowParallelLinear(515, 40, with_bias, group=group, input_is_parallel=False, dtype=dtype),
    ):
        for p in layer.parameters():
            p.normal_(0, 0.1)
        row = isinstance(layer, fp.nn.RowParallelLinear)
        if with_bias and row:  # whole on every rank
            layer.bias.copy_(torch.linspace(-1, 1, 40).to(dtype))
        k = layer.weight.shape[1]
        if row and not layer.input_is_parallel:
            k = layer.in_features
            torch.manual_seed(7)
        x = torch.randn(2, 3, k, dtype=dtype)
        values, scales = quantize(layer.weight, kind, dtype)
        layer.weight.copy_(dequantize(values, scales, layer.weight.shape[1]))
        torch.manual_seed(8)
        residual, norm = torch.randn(2, 3, 40, dtype=dtype), fp.nn.RMSNorm(40, 1e-5, dtype=dtype)
        norm.weight.data.normal_()
        ways = [(), (residual,), (residual, norm)] if row else [()]
        expected = [layer(x, *way) for way in ways]
        fp.nn.quantize_(layer, kind)
        assert torch.equal(layer.scales, scales) and not hasattr(layer, "weight") and layer.quantized == kind
        for way, e in zip(ways, expected, strict=True):
            got = layer(x, *way)
            pairs = zip(got, e, strict=True) if isinstance(e, tuple) else [(got, e)]
            found += [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_layers_equal_dequantised_ones(kind, dtype, tp):
    for with_bias in (False, True):
        for errors in run_ranks(layers_on_ranks, tp, kind, dtype, with_bias):
            assert max(errors) < 4 * RELATIVE_ERROR[dtype]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose row-parallel slices on two ranks are whole groups of int4: same integers in every arrangement."""
    path = tmp_path_factory.mktemp("quantized")
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    ranks.save_random_model(path, **sizes)
    return path


IDS = torch.randint(0, 263, (2, 40), generator=torch.Generator().manual_seed(5))


def quantized_logits(mesh, path, kind, offload=None):
    """(whole logits on the last stage, bytes of the layers' matrices on this rank, streamed bytes a pass)."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, quantize=kind, offload=offload)
    assert model.dtype == torch.float32
    out = model(IDS)
    held = sum(p.nbytes for layer in model.model.layers.values() for p in layer.parameters() if p.dim() > 1)
    out = None if out is None else gather_last(out, model.config.vocab_size, model.tp_group)
    return out, held, model.model.layers.host_bytes if model.offloaded else 0


@pytest.mark.parametrize("kind", KINDS)
def test_model(model, kind):
    mesh = fp.init(device="cpu")
    plain, whole, _ = quantized_logits(mesh, model, None)
    expected, held, _ = quantized_logits(mesh, model, kind)
    assert held < whole * (0.27 if kind == "int8" else 0.165)  # fp32 before; int4: 4.25 bits of 32 with fp32 scales
    error = (expected - plain).norm() / plain.norm()
    assert 1e-3 < error < (0.05 if kind == "int8" else 0.5)
    # Quantised while it is read, or afterwards: the same integers.
    after = fp.nn.quantize_(fp.LlamaForCausalLM.from_pretrained(model, mesh=mesh), kind)
    assert torch.equal(after(IDS), expected)
    again = fp.LlamaForCausalLM(after.config, mesh=mesh, quantize=kind)
    again.load_state_dict(after.state_dict())
    assert torch.equal(again(IDS), expected)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*values.*Unexpected key.*weight"):
        again.load_state_dict(fp.LlamaForCausalLM.from_pretrained(model, mesh=mesh).state_dict())
    with pytest.raises(ValueError, match=r"a layer is quantised already"):
        fp.nn.quantize_(again, "int4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp,pp", [(2, 1), (1, 2), (2, 2)])
def test_model_on_ranks(model, kind, tp, pp):
    """The integers of int4 are the same on all arrangements here; int8's row-parallel rows are scaled by rank."""
    (expected, whole, _) = run_ranks(quantized_logits, 1, model, kind)[0]
    for offload in (None, fp.Offload(), fp.Offload(resident_bytes=whole // (4 * tp * pp))):
        results = run_ranks(quantized_logits, tp * pp, model, kind, offload, tp=tp, pp=pp)
        for got, held, streamed in results[-tp:]:
            bound = 1e-4 if kind == "int4" or tp == 1 else 0.05
            assert (got - expected).norm() / expected.norm() < bound
            assert (streamed > 0) == (offload is not None) and streamed < held * 1.05
        assert sum(held for _, held, _ in results) < whole * 1.05


def test_in_files_and_quantised_is_refused(model):
    mesh = fp.init(device="cpu")
    with pytest.raises(ValueError, match=r"host_bytes=1000\) leaves layers in their files, which hold no quantised"):
        fp.LlamaForCausalLM.from_pretrained(model, mesh=mesh, quantize="int8", offload=fp.Offload(host_bytes=1000))
    offload = fp.Offload(host_bytes=10**9)  # enough for all: nothing is left in files
    assert fp.LlamaForCausalLM.from_pretrained(model, mesh=mesh, quantize="int8", offload=offload).offloaded


def test_padded_shards(tmp_path):
    """Heads and features that ranks do not divide: padding dequantises to zeros, in float or as integers."""
    ranks.save_random_model(tmp_path, scale=4.0, num_attention_heads=6, num_key_value_heads=3)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] % 4
    for kind in KINDS:
        (expected, *_) = run_ranks(quantized_logits, 1, tmp_path, kind)[0]
        for got, *_ in run_ranks(quantized_logits, 2, tmp_path, kind, tp=2):
            assert (got - expected).norm() / expected.norm() < (0.05 if kind == "int8" else 0.6)
            assert not got.isnan().any()
