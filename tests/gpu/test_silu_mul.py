"""The silu_mul kernel on one GPU: values, determinism, streams, graphs, compilation."""

import pytest
import torch
import torch.nn.functional as F

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# By elements and by vectors, rows of less than a warp, of one CTA and of several; few threads, and more than may wait.
SHAPES = [(1, 2), (3, 254), (2, 3, 2880), (0, 64), (4, 2 * 4097), (14336,), (1, 28672), (64, 28672), (1100, 2 * 3584)]
SHAPES += [(70_000, 16), (300, 2 * 1000), (5000, 2 * 127), (2, 2 * 100_000)]


@pytest.fixture(autouse=True)
def _fused_or_fail():
    with fp.use("fused"), torch.no_grad():
        yield


def oracle(x):
    gate, up = x.double().chunk(2, -1)
    return F.silu(gate) * up


def misaligned(tensor):
    """The same values, one element past an address that is a multiple of 16."""
    out = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return out.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, seed):
    x = 4 * torch.randn(shape, dtype=dtype, device="cuda")
    before = x.clone()
    poison = torch.full((*shape[:-1], shape[-1] // 2), float("nan"), dtype=dtype, device="cuda")
    del poison  # what the output is then allocated over
    out = fp.silu_mul(x)
    assert out.is_contiguous() and out.shape == (*shape[:-1], shape[-1] // 2)
    assert_close(out, oracle(x))
    assert torch.equal(fp.silu_mul(x), out) and torch.equal(fp.silu_mul(misaligned(x)), out)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values(dtype):
    gate = torch.tensor([-200.0, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 200.0], dtype=dtype, device="cuda")
    out = fp.silu_mul(torch.cat((gate, torch.full_like(gate, 2.0))))
    assert_close(out, F.silu(gate.double()) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 127), (5, 2880), (2000, 1792)])
def test_writes_its_output_and_nothing_else(shape, dtype, seed):
    rows, size = shape
    margin = 256
    x = torch.randn(rows, 2 * size, dtype=dtype, device="cuda")
    buffer = torch.full((rows * size + 2 * margin,), float("nan"), dtype=dtype, device="cuda")
    out = buffer[margin:-margin].view(shape)
    _ext.extension().silu_mul(
        x=x.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        size=size,
        x_row_stride=2 * size,
        dtype=_ext.DTYPE_CODES[dtype],
        device=x.device.index,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    assert_close(out, oracle(x))
    assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype, seed):
    wide = torch.randn(6, 9000, dtype=dtype, device="cuda")
    for x in (
        wide[:, :4096],
        wide[:, 3:4099],
        wide[::2, 8:4104],
        wide[:1, :4096].expand(4, 4096),
        torch.randn(4096, 5, dtype=dtype, device="cuda").t(),
    ):
        out = fp.silu_mul(x)
        assert out.is_contiguous()
        assert_close(out, oracle(x))


def test_graph_replays_with_changed_inputs(seed):
    x = torch.randn(8, 7168, device="cuda", dtype=torch.bfloat16)
    fp.silu_mul(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp.silu_mul(x)
    for _ in range(3):
        x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, fp.silu_mul(x))


@pytest.mark.parametrize("rows", [1, 4, 37, 512])
def test_chain_of_kernels_that_start_early(rows, seed):
    """Nothing but kernels that may start while the one before still runs, over memory that is used again and again:
    bits as if each had waited for the one before."""
    sizes = [2**n for n in range(13, 4, -1)]
    x = torch.randn(rows, 2 * sizes[0], device="cuda", dtype=torch.bfloat16)
    residuals = [torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    weights = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]

    def chain(after_each=lambda: None):
        y = x
        for residual, weight in zip(residuals, weights, strict=True):
            y = fp.silu_mul(y)
            after_each()
            y, total = fp.add_rms_norm(y, residual, weight, 1e-5)
            after_each()
        return y, total

    def same(a, b):
        return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        assert same(chain(), expected)
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        graph.replay()
        assert same(captured, expected)


def test_runs_on_the_current_stream(seed):
    values = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    expected = fp.silu_mul(values)
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on another stream, the kernel would read x before it is written
        x.copy_(values)
        out = fp.silu_mul(x)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.multigpu
def test_device_that_is_not_current(seed):
    x = torch.randn(4, 4096, device="cuda:1", dtype=torch.bfloat16)
    with torch.cuda.device(0):
        out = fp.silu_mul(x)
        assert torch.cuda.current_device() == 0
    assert_close(out, oracle(x))


def test_opcheck():
    x = torch.randn(2, 3, 40, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fused_parallel.silu_mul.default, (x,))
    torch.library.opcheck(torch.ops.fused_parallel.silu_mul.default, (x.transpose(0, 1),))


def test_compiles_without_graph_breaks(seed):
    def layer(x):
        return fp.silu_mul(x * 2) + 1

    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_launcher_reports_bad_arguments():
    good = {"x": 0, "out": 0, "rows": 1, "size": 8, "x_row_stride": 16, "dtype": 0, "device": 0, "stream": 0}
    launch = _ext.extension().silu_mul
    for change, message in (
        ({"dtype": 9}, "dtype code 9"),
        ({"size": -1}, "size=-1"),
        ({"rows": 2**40}, "silu_mul: a grid of 1099511627776 CTAs is too large"),
        ({"device": 4096}, r"device\.h:\d+: .*cudaErrorInvalidDevice"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch(**(good | change))
