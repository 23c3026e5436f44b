"""The rotary_cache_write kernel on one GPU: values, nothing else written, determinism, streams, graphs, compilation."""

import pytest
import torch
from _rotary_cases import draw_positions, oracle, random_inputs

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, S, Hq, Hkv, D, C. By vectors and by elements, one CTA a token and several, few threads and more than may wait.
SHAPES = [(1, 1, 8, 1, 128, 16), (3, 5, 4, 2, 64, 9), (2, 3, 3, 3, 6, 7), (2, 1, 1, 1, 2, 1), (0, 2, 4, 2, 8, 4)]
SHAPES += [(2, 0, 4, 2, 8, 4), (2, 2, 4, 2, 8, 0), (1, 127, 5, 1, 80, 127), (64, 1, 8, 1, 128, 33)]
SHAPES += [(2, 300, 32, 8, 128, 311), (3, 1, 64, 8, 128, 20), (2, 3, 4, 2, 40, 7), (1, 2, 1, 1, 256, 3)]
SMALL = (2, 3, 8, 2, 64, 11)


@pytest.fixture(autouse=True)
def _fused_or_fail():
    with fp.use("fused"), torch.no_grad():
        yield


def on_gpu(shape, dtype, beyond=0):
    return list(random_inputs(shape, dtype, beyond, device="cuda"))


def run(inputs):
    """(rotated q, the caches afterwards), leaving `inputs` as they are."""
    inputs = [*inputs[:5], inputs[5].clone(), inputs[6].clone(), inputs[7]]
    poison = torch.full(inputs[0].shape, float("nan"), dtype=inputs[0].dtype, device="cuda")
    del poison  # what the output is then allocated over
    return fp.rotary_cache_write(*inputs), inputs[5], inputs[6]


def misaligned(tensor):
    """The same values, one element past an address that is a multiple of 16."""
    out = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return out.copy_(tensor)


def check(outputs, inputs):
    q, k_cache, v_cache = outputs
    expected = oracle(*(t.cpu() for t in inputs))
    assert q.is_contiguous()
    assert_close(q, expected[0], scale=inputs[0].double().abs() * 1.5)  # sums cancel
    assert_close(k_cache, expected[1])
    assert torch.equal(v_cache.double().cpu(), expected[2])
    untouched = torch.ones(k_cache.shape[:2], dtype=torch.bool)
    for b, row in enumerate(inputs[7].tolist()):
        untouched[b, [p for p in row if 0 <= p < k_cache.shape[1]]] = False
    assert torch.equal(k_cache.cpu()[untouched], inputs[5].cpu()[untouched])


@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, beyond, seed):
    inputs = on_gpu(shape, dtype, beyond)
    before = [t.clone() for t in inputs]
    outputs = run(inputs)
    check(outputs, inputs)
    for again in (run(inputs), run([*map(misaligned, inputs[:3]), *inputs[3:]])):
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(dtype, seed):
    inputs = on_gpu((4, 5, 8, 2, 128, 20), dtype, beyond=2)
    with fp.use("reference"):
        expected = run(inputs)
    for out, value in zip(run(inputs), expected, strict=True):
        assert_close(out, value.double(), factor=0.5)  # seldom another rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 64])
def test_writes_nothing_outside(dim, dtype, seed):
    """The caches are in the middle of larger memory; positions lie before, in and behind them."""
    margin, (batch, new, capacity) = 4096, (2, 5, 6)
    inputs = on_gpu((batch, new, 4, 2, dim, capacity), dtype)
    inputs[7] = torch.tensor([[-1, 0, 5, 6, 7], [-(2**62), 2**62, 2**32, -(2**32) + 1, 3]], device="cuda")
    size = inputs[5].numel()
    buffers = [torch.full((size + 2 * margin,), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    inside = [buffer[margin:-margin].view(inputs[5].shape) for buffer in buffers]
    for cache, values in zip(inside, inputs[5:7], strict=True):
        cache.copy_(values)
    q = fp.rotary_cache_write(*inputs[:5], *inside, inputs[7])
    check((q, *inside), inputs)
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_of_a_layer_and_other_strides(dtype, seed):
    for dim, transposed in ((64, False), (64, True), (10, False)):
        inputs = on_gpu((2, 3, 4, 2, dim, 6), dtype)
        if transposed:
            inputs[0] = torch.randn(2, 3, dim, 4, device="cuda").to(dtype).transpose(2, 3)
            inputs[3] = torch.randn(2, dim, 3, device="cuda").to(dtype).transpose(1, 2)
            inputs[7] = inputs[7].t().contiguous().t()
        caches = torch.randn(2, 3, 5, 9, 2, dim, device="cuda").to(dtype)  # k or v, layer, sequences, capacity
        inputs[5], inputs[6] = caches[0, 1, 1:3, :6], caches[1, 1, 1:3, :6]
        before, all_before = [t.clone() for t in inputs], caches.clone()
        q = fp.rotary_cache_write(*inputs)
        check((q, inputs[5], inputs[6]), before)
        caches[:, 1, 1:3, :6] = all_before[:, 1, 1:3, :6]
        assert torch.equal(caches, all_before)


def test_offsets_beyond_32_bits(seed):
    """The second sequence's part of the caches begins 2^31 elements behind the first's."""
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of GPU memory")
    capacity = 2**31 // 256
    caches = torch.zeros(2, capacity, 2, 128, dtype=torch.float16, device="cuda")
    inputs = on_gpu((2, 1, 2, 1, 128, 1), torch.float16)
    inputs[5], inputs[6] = caches[:, :, :1], caches[:, :, 1:]
    inputs[7] = torch.tensor([[3], [capacity - 1]], device="cuda")
    fp.rotary_cache_write(*inputs)
    for b, position in ((0, 3), (1, capacity - 1)):
        assert caches[b, position, 0].any() and torch.equal(caches[b, position, 1], inputs[2][b, 0, 0])
        caches[b, position] = 0
    assert not any(part.any() for part in caches.view(64, -1))


def test_graph_replays_with_changed_inputs_and_positions(seed):
    inputs = on_gpu(SMALL, torch.bfloat16)
    fp.rotary_cache_write(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = fp.rotary_cache_write(*inputs)
    for beyond in (0, 2, 4):
        for tensor in inputs[:7]:
            tensor.normal_()
        inputs[7].copy_(draw_positions(2, 3, 11, beyond))
        before = [t.clone() for t in inputs]
        q.fill_(float("nan"))
        graph.replay()
        expected = run(before)
        assert all(torch.equal(a, b) for a, b in zip((q, *inputs[5:7]), expected, strict=True))
        check(expected, before)


def test_decoding_steps_that_follow_each_other(seed):
    """Steps start while the one before still runs, read what it wrote and move on by a token: bits as if each had
    waited for the one before."""
    kv_heads, dim, capacity = 2, 128, 40
    q, k, v, cos, sin, k_cache, v_cache, _ = on_gpu((4, 1, 8, kv_heads, dim, capacity), torch.bfloat16)
    start = torch.zeros(4, 1, dtype=torch.int64, device="cuda")
    weight = torch.ones(dim, device="cuda", dtype=torch.bfloat16)

    def steps(k_cache, v_cache, after_each=lambda: None):
        at, key, value, queries = start.clone(), k, v, q
        for _ in range(capacity + 2):  # the last two are outside
            queries = fp.rotary_cache_write(queries, key, value, cos, sin, k_cache, v_cache, at)
            after_each()
            queries = fp.rms_norm(queries, weight, 1e-5)
            after_each()
            key, value = queries[:, :, :kv_heads], queries[:, :, -kv_heads:]
            at += 1
            after_each()
        return queries, k_cache, v_cache

    expected = steps(k_cache.clone(), v_cache.clone(), torch.cuda.synchronize)
    assert torch.equal(expected[2][:, 0], v[:, 0]) and not torch.equal(expected[2][:, -1], v_cache[:, -1])
    graph, caches = torch.cuda.CUDAGraph(), (k_cache.clone(), v_cache.clone())
    with torch.cuda.graph(graph):
        captured = steps(*caches)
    for _ in range(10):
        found = steps(k_cache.clone(), v_cache.clone())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        caches[0].copy_(k_cache)
        caches[1].copy_(v_cache)
        captured[0].fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_runs_on_the_current_stream(seed):
    inputs = on_gpu((16, 2, 8, 2, 128, 30), torch.bfloat16)
    expected = run(inputs)
    late = [*map(torch.zeros_like, inputs[:3]), *inputs[3:5], inputs[5].clone(), inputs[6].clone(), inputs[7]]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on another stream, the kernel would read q, k and v before they are written
        for tensor, values in zip(late[:3], inputs[:3], strict=True):
            tensor.copy_(values)
        q = fp.rotary_cache_write(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip((q, *late[5:7]), expected, strict=True))


@pytest.mark.multigpu
def test_device_that_is_not_current(seed):
    inputs = random_inputs(SMALL, torch.bfloat16, device="cuda:1")
    before = [t.cpu() for t in inputs]
    with torch.cuda.device(0):
        q = fp.rotary_cache_write(*inputs)
        assert torch.cuda.current_device() == 0
    check((q, *inputs[5:7]), before)


def test_opcheck(seed):
    torch.library.opcheck(torch.ops.fused_parallel.rotary_cache_write.default, on_gpu(SMALL, torch.bfloat16))


def test_compiles_without_graph_breaks(seed):
    def layer(q, k, v, cos, sin, k_cache, v_cache, positions):
        q = fp.rotary_cache_write(q * 2, k, v, cos, sin, k_cache, v_cache, positions)
        return q + k_cache.sum()

    inputs = on_gpu(SMALL, torch.float32)
    again = [t.clone() for t in inputs]
    out, expected = torch.compile(layer, fullgraph=True)(*inputs), layer(*again)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    assert [torch.equal(a, b) for a, b in zip(inputs, again, strict=True)] == [True] * len(inputs)


def test_launcher_reports_bad_arguments():
    addresses = ("q", "k", "v", "cos", "sin", "positions", "q_out", "k_cache", "v_cache", "device", "stream")
    strides = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), (8, 8, 8, 1))
    good = dict.fromkeys(addresses, 0) | {f"{name}_strides": value for name, value in strides.items()}
    good |= {"batch": 1, "tokens": 1, "q_heads": 1, "kv_heads": 1, "dim": 8, "capacity": 1, "dtype": 0}
    launch = _ext.extension().rotary_cache_write
    for change, message in (
        ({"dtype": 9}, "dtype code 9"),
        ({"dim": 7}, "dim=7"),
        ({"tokens": -1}, "tokens=-1"),
        ({"batch": 2**40}, "rotary_cache_write: a grid of 1099511627776 CTAs is too large"),
        ({"device": 4096}, r"device\.h:\d+: .*cudaErrorInvalidDevice"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch(**(good | change))
