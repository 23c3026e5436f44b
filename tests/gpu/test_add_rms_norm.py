"""The add_rms_norm kernel on one GPU: values, determinism, streams, graphs, compilation."""

import pytest
import torch

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.ops.add_rms_norm import add_rms_norm, rms_norm
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One warp a row, one CTA a row with 1, 4 or 8 vectors a thread, and rows read by elements, in each with full and partly
# used warps; few rows, and more than a GPU holds at once.
SHAPES = [(1, 1), (3, 127), (2, 3, 2880), (0, 64), (4, 4097), (7168,), (1000, 128), (7, 1024), (3, 1032), (1, 8192)]
SHAPES += [(300, 8192), (200, 2880), (1100, 7168), (2, 12288), (150, 16384), (3, 32768), (2, 40000), (150, 4097)]
EPS = 1e-5


@pytest.fixture(autouse=True)
def _fused_or_fail():
    with fp.use("fused"), torch.no_grad():
        yield


def oracle(x, residual, weight):
    """(normed, new_residual) in float64, from the sum rounded to x's dtype as the definition says."""
    new_residual = (x.double() + residual.double()).to(x.dtype).double()
    scale = (new_residual.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return new_residual * scale * weight.double(), new_residual


def random_inputs(shape, dtype, device="cuda"):
    def draw(*size):
        return torch.randn(size, dtype=dtype, device=device)

    return draw(*shape), 3 * draw(*shape), draw(shape[-1])


def misaligned(tensor):
    """The same values, one element past an address that is a multiple of 16."""
    out = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return out.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, seed):
    x, residual, weight = random_inputs(shape, dtype)
    poison = [torch.full_like(x, float("nan")) for _ in range(3)]  # what the outputs are then allocated over
    del poison
    outputs = add_rms_norm(x, residual, weight, EPS)
    expected = oracle(x, residual, weight)
    assert torch.equal(outputs[1].double(), expected[1])
    assert_close(outputs[0], expected[0])
    assert_close(rms_norm(x, weight, EPS), oracle(x, torch.zeros_like(x), weight)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 127), (5, 2880), (200, 8192), (2, 40000)])
def test_writes_its_outputs_and_nothing_else(shape, dtype, seed):
    rows, hidden = shape
    margin = 256
    x, residual, weight = random_inputs(shape, dtype)
    buffers = [torch.full((rows * hidden + 2 * margin,), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    out, new_residual = (buffer[margin:-margin].view(shape) for buffer in buffers)
    _ext.extension().add_rms_norm(
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        new_residual=new_residual.data_ptr(),
        rows=rows,
        hidden=hidden,
        x_row_stride=hidden,
        eps=EPS,
        dtype=_ext.DTYPE_CODES[dtype],
        device=x.device.index,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    for value, expected in zip((out, new_residual), oracle(x, residual, weight), strict=True):
        assert_close(value, expected)
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_misaligned_tensors(dtype, seed):
    wide = torch.randn(6, 9000, dtype=dtype, device="cuda")
    for x in (
        wide[:, :4096],
        wide[:, 3:4099],
        wide[::2, 8:4104],
        wide[:1, :4096].expand(4, 4096),
        torch.randn(4096, 5, dtype=dtype, device="cuda").t(),
        misaligned(wide[:, :4096]),
    ):
        residual, weight = misaligned(torch.randn_like(x)), torch.randn(4096, dtype=dtype, device="cuda")
        normed, new_residual = add_rms_norm(x, residual, weight, EPS)
        assert normed.is_contiguous() and new_residual.is_contiguous()
        for out, expected in zip((normed, new_residual), oracle(x, residual, weight), strict=True):
            assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 1024, 2880, 7168, 8192, 16384, 32768])
def test_bits_depend_on_the_row_alone(hidden, dtype, seed):
    """Two runs, a row alone (another launch shape) and misaligned rows (another kernel) give the same bits."""
    x, residual, weight = random_inputs((1100, hidden), dtype)
    together = add_rms_norm(x, residual, weight, EPS)
    again = add_rms_norm(x, residual, weight, EPS)
    elsewhere = add_rms_norm(misaligned(x), residual, weight, EPS)
    for other in (again, elsewhere):
        assert torch.equal(together[0], other[0]) and torch.equal(together[1], other[1])
    for row in (0, 17, 1099):
        alone = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, EPS)
        assert torch.equal(together[0][row : row + 1], alone[0])
        assert torch.equal(together[1][row : row + 1], alone[1])


def test_graph_replays_with_changed_inputs(seed):
    x, residual, weight = random_inputs((8, 4096), torch.bfloat16)
    add_rms_norm(x, residual, weight, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed, new_residual = add_rms_norm(x, residual, weight, EPS)
    for _ in range(3):
        for tensor in (x, residual, weight):
            tensor.normal_()
        normed.fill_(float("nan"))
        new_residual.fill_(float("nan"))
        graph.replay()
        expected = add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(normed, expected[0]) and torch.equal(new_residual, expected[1])


def test_runs_on_the_current_stream(seed):
    values, residual, weight = random_inputs((64, 4096), torch.bfloat16)
    expected = add_rms_norm(values, residual, weight, EPS)
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on another stream, the kernel would read x before it is written
        x.copy_(values)
        outputs = add_rms_norm(x, residual, weight, EPS)
    stream.synchronize()
    assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])


@pytest.mark.multigpu
def test_device_that_is_not_current(seed):
    inputs = random_inputs((4, 4096), torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        outputs = add_rms_norm(*inputs, EPS)
        assert torch.cuda.current_device() == 0
    for out, expected in zip(outputs, oracle(*inputs), strict=True):
        assert_close(out, expected)


def test_opcheck():
    x, residual, weight = random_inputs((2, 3, 40), torch.bfloat16)
    torch.library.opcheck(torch.ops.fused_parallel.add_rms_norm.default, (x, residual, weight, EPS))
    torch.library.opcheck(torch.ops.fused_parallel.rms_norm.default, (x.transpose(0, 1), weight, EPS))


def test_compiles_without_graph_breaks(seed):
    def layer(x, residual, weight):
        normed, residual = add_rms_norm(x * 2, residual, weight, EPS)
        return rms_norm(normed, weight, EPS) + residual

    inputs = random_inputs((3, 512), torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs))


def test_launcher_reports_bad_arguments():
    names = ("x", "residual", "weight", "out", "new_residual", "rows", "hidden", "x_row_stride", "device", "stream")
    good = dict.fromkeys(names, 0) | {"rows": 1, "hidden": 8, "x_row_stride": 8, "eps": EPS, "dtype": 0}
    launch = _ext.extension().add_rms_norm
    for change, message in (
        ({"dtype": 9}, "dtype code 9"),
        ({"hidden": 0}, "hidden=0"),
        ({"residual": 16}, "must be given together"),
        ({"device": 4096}, r"device\.h:\d+: .*cudaErrorInvalidDevice"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch(**(good | change))
