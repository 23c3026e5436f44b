"""The verify_attention kernels on one GPU: values, memory they must not touch, determinism, streams, graphs."""

import math

import pytest
import torch

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.ops.verify_attention import verify_attention
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.bfloat16, torch.float16]
HEADS = [(32, 4), (8, 8), (64, 8), (4, 1), (6, 3), (64, 4)]  # the last: 256 rows at 16 new tokens, in two CTAs
NAN = float("nan")


@pytest.fixture(autouse=True)
def _fused_or_fail():
    with fp.use("fused"), torch.no_grad():
        yield


def oracle(q, k, v, lens, tree_mask=None, scale=None):
    """Sequence by sequence in float64, over the keys that count: k and v [B, C, Hkv, D]."""
    new, heads, dim = q.shape[1:]
    kv_heads = k.shape[2]
    causal = torch.ones(new, new, dtype=torch.bool, device=q.device).tril()
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b, length in enumerate(lens.tolist()):
        start = length - new
        visible = torch.ones(new, length, dtype=torch.bool, device=q.device)
        visible[:, start:] = causal if tree_mask is None else tree_mask[b]
        queries = q[b].double().reshape(new, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("shgd,nhd->hgsn", queries, k[b, :length].double())
        scores = scores * (1 / math.sqrt(dim) if scale is None else scale)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)  # of a token that sees nothing
        out[b] = torch.einsum("hgsn,nhd->shgd", weights, v[b, :length].double()).flatten(1, 2)
    return out


def randn(*shape, dtype):
    return torch.randn(shape, dtype=dtype, device="cuda")


def ragged(batch, new, capacity):
    """Lengths: the least, the most, and what lies between."""
    lens = torch.randint(new, capacity + 1, (batch,), dtype=torch.int32)
    lens[0] = capacity
    if batch > 1:
        lens[1] = new
    return lens.cuda()


def poison_unused(k, v, lens):
    for b, length in enumerate(lens.tolist()):
        k[b, length:], v[b, length:] = NAN, NAN


def random_inputs(batch, new, heads, dim, capacity, dtype):
    """q as it comes from a projection of q, k and v together; NaN wherever nothing may be read."""
    q_heads, kv_heads = heads
    qkv = randn(batch, new, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    q = qkv[..., : q_heads * dim].view(batch, new, q_heads, dim)
    k, v = (randn(batch, capacity, kv_heads, dim, dtype=dtype) for _ in range(2))
    lens = ragged(batch, new, capacity)
    poison_unused(k, v, lens)
    return q, k, v, lens


def random_tree(batch, new, density=0.3):
    """Every token sees itself and some of the others."""
    mask = torch.rand(batch, new, new, device="cuda") < density
    return mask | torch.eye(new, dtype=torch.bool, device="cuda")


def paged(k, v, lens, page):
    """The same cache in shuffled pages, with NaN in pages of no sequence, which entries past the end name."""
    batch, capacity, kv_heads, dim = k.shape
    per_sequence = -(-capacity // page)
    spare = 5
    table = torch.randperm(batch * per_sequence + spare, device="cuda")[: batch * per_sequence]
    unused = sorted(set(range(batch * per_sequence + spare)) - set(table.tolist()))[0]
    table = table.view(batch, per_sequence).to(torch.int32)
    pages = [torch.full((batch * per_sequence + spare, page, kv_heads, dim), NAN, dtype=k.dtype, device="cuda")
             for _ in range(2)]  # fmt: skip
    for values, target in zip((k, v), pages, strict=True):
        padded = torch.full((batch, per_sequence * page, kv_heads, dim), NAN, dtype=k.dtype, device="cuda")
        padded[:, :capacity] = values
        target[table.long().flatten()] = padded.view(-1, page, kv_heads, dim)
    for b, length in enumerate(lens.tolist()):
        table[b, -(-length // page) :] = unused
    return *pages, table


def poison_free_memory(*like):
    """Leaves NaN in the memory that outputs and scratch are then allocated over."""
    held = [torch.full_like(t, NAN, memory_format=torch.contiguous_format) for t in like for _ in range(3)]
    held.append(torch.full((1 << 22,), NAN, device="cuda"))
    del held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_matches_float64(heads, dim, dtype, seed):
    for new in (1, 2, 5, 8, 16):
        for batch, capacity in ((1, 1000), (3, 700)):
            q, k, v, lens = random_inputs(batch, new, heads, dim, capacity, dtype)
            poison_free_memory(q)
            assert_close(verify_attention(q, k, v, lens), oracle(q, k, v, lens))


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 127, 128, 129, 257, 1000, 8193])
def test_contexts(capacity, batch, seed):
    for new, heads, dim in ((1, (8, 8), 64), (1, (4, 1), 128), (5, (32, 4), 128), (16, (6, 3), 64)):
        if new <= capacity:
            q, k, v, lens = random_inputs(batch, new, heads, dim, capacity, torch.bfloat16)
            assert_close(verify_attention(q, k, v, lens), oracle(q, k, v, lens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 37])
def test_prefill(context, dtype, seed):
    """Beyond what the kernels take, where the host knows the context: torch's, over no more than the keys there are."""
    for heads, dim in (((8, 1), 128), ((4, 4), 64), ((32, 8), 128)):
        q, _, _, lens = random_inputs(2, 300, heads, dim, 400, dtype)
        k, v = (randn(2, 400, heads[1], dim, dtype=dtype) for _ in range(2))
        lens.fill_(context + 300)
        expected = oracle(q, k, v, lens)
        poison_unused(k, v, lens)
        assert_close(verify_attention(q, k, v, lens, context=context), expected)


@pytest.mark.parametrize("new", [17, 33, 64])
def test_many_new_tokens(new, seed):
    for heads, dim in (((8, 1), 128), ((4, 4), 64)):
        q, k, v, lens = random_inputs(3, new, heads, dim, 300, torch.bfloat16)
        assert_close(verify_attention(q, k, v, lens), oracle(q, k, v, lens))


@pytest.mark.parametrize("capacity", [20000, 40000])
def test_one_sequence_over_the_whole_gpu(capacity, seed):
    """More shares than one warp adds up."""
    for new, heads in ((1, (8, 1)), (5, (32, 4))):
        q, k, v, lens = random_inputs(1, new, heads, 128, capacity, torch.float16)
        for length in (capacity, capacity // 2, 300, 127, new):
            lens.fill_(length)
            poison_unused(k, v, lens)
            assert_close(verify_attention(q, k, v, lens), oracle(q, k, v, lens))


@pytest.mark.parametrize("scale", [0.5, -0.1, 1e-3])
def test_scales(scale, seed):
    q, k, v, lens = random_inputs(3, 5, (8, 2), 128, 900, torch.bfloat16)
    assert_close(verify_attention(q, k, v, lens, scale=scale), oracle(q, k, v, lens, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [1, 16, 24, 64, 256])
def test_pages_give_the_bits_of_a_contiguous_cache(page, dtype, seed):
    for batch, new, heads, dim, pages in ((3, 5, (32, 4), 128, 40), (1, 1, (8, 8), 64, 300), (32, 2, (4, 1), 64, 9)):
        q, k, v, lens = random_inputs(batch, new, heads, dim, pages * page, dtype)
        k_pages, v_pages, table = paged(k, v, lens, page)
        out = verify_attention(q, k_pages, v_pages, lens, block_table=table)
        assert torch.equal(out, verify_attention(q, k, v, lens))
        assert_close(out, oracle(q, k, v, lens))


@pytest.mark.parametrize("new", [1, 2, 5, 16, 40])
def test_tree_masks(new, seed):
    for batch, heads, dim, capacity in (
        (3, (32, 4), 128, 1000),
        (2, (8, 8), 64, 64),
        (1, (4, 1), 128, 5000),
        (16, (32, 4), 128, 600),
    ):
        q, k, v, lens = random_inputs(batch, new, heads, dim, capacity, torch.bfloat16)
        mask = random_tree(batch, new)
        assert_close(verify_attention(q, k, v, lens, tree_mask=mask), oracle(q, k, v, lens, mask))
        mask = mask.transpose(1, 2)  # not contiguous
        assert_close(verify_attention(q, k, v, lens, tree_mask=mask), oracle(q, k, v, lens, mask))
        causal = torch.ones(new, new, dtype=torch.bool, device="cuda").tril().expand(batch, new, new)
        assert torch.equal(verify_attention(q, k, v, lens, tree_mask=causal), verify_attention(q, k, v, lens))


def test_zeros_where_nothing_is_visible(seed):
    q, k, v, lens = random_inputs(3, 4, (8, 2), 64, 600, torch.bfloat16)
    mask = random_tree(3, 4)
    mask[:, 2] = False
    lens.copy_(torch.tensor([600, 4, 0]))  # a length of 0: a place in the batch that is not in use
    poison_unused(k, v, lens)
    poison_free_memory(q)
    out = verify_attention(q, k, v, lens, tree_mask=mask)
    assert_close(out[:2], oracle(q[:2], k[:2], v[:2], lens[:2], mask[:2]))
    assert (out[1, 2] == 0).all() and (out[2] == 0).all()


def test_strides_are_read_in_place(seed):
    batch, new, kv_heads, dim, capacity = 3, 5, 2, 128, 700
    q, k, v, lens = random_inputs(batch, new, (8, kv_heads), dim, capacity, torch.bfloat16)
    expected = verify_attention(q, k, v, lens)
    head_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    together = torch.stack((k, v), 2)  # [B, C, 2, Hkv, D]
    wide = torch.full((batch + 1, capacity + 3, kv_heads, dim + 8), NAN, dtype=k.dtype, device="cuda")
    wide[1:, :capacity, :, 8:] = v
    for other_k, other_v in ((head_first, v), (together[:, :, 0], together[:, :, 1]), (k, wide[1:, :capacity, :, 8:])):
        assert torch.equal(verify_attention(q, other_k, other_v, lens), expected)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape).copy_(q)  # off by 2 bytes
    for other_q in (q.contiguous(), odd, q.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)):
        assert torch.equal(verify_attention(other_q, k, v, lens), expected)
    every_second = torch.stack((lens, lens), 1)[:, 0]
    assert torch.equal(verify_attention(q, k, v, every_second), expected)


def test_writes_its_output_and_nothing_else(seed):
    batch, new, heads, kv_heads, dim, capacity, margin = 2, 3, 8, 2, 64, 2000, 512
    q, k, v, lens = random_inputs(batch, new, (heads, kv_heads), dim, capacity, torch.bfloat16)
    q = q.contiguous()
    shape = dict(batch=batch, new_tokens=new, heads=heads, kv_heads=kv_heads, head_dim=dim, capacity=capacity, device=0)
    scratch_bytes = _ext.extension().verify_attention_scratch_bytes(**shape)
    assert scratch_bytes > 0
    buffer = torch.full((q.numel() + 2 * margin,), NAN, dtype=q.dtype, device="cuda")
    scratch = torch.full((scratch_bytes + 2 * margin,), 255, dtype=torch.uint8, device="cuda")
    _ext.extension().verify_attention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cache_lens=lens.data_ptr(),
        block_table=0,
        tree_mask=0,
        out=buffer[margin:].data_ptr(),
        scratch=scratch[margin:].data_ptr(),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        block_table_stride=0,
        page=0,
        scale=dim**-0.5,
        dtype=_ext.DTYPE_CODES[q.dtype],
        stream=torch.cuda.current_stream().cuda_stream,
        **shape,
    )
    assert_close(buffer[margin:-margin].view(q.shape), oracle(q, k, v, lens))
    assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()
    assert (scratch[:margin] == 255).all() and (scratch[-margin:] == 255).all()


@pytest.mark.parametrize("batch, new, heads, dim, capacity", [(4, 5, (32, 4), 128, 3000), (32, 1, (8, 1), 64, 1500)])
def test_bits_depend_on_the_sequence_alone(batch, new, heads, dim, capacity, seed):
    """Two runs give the same bits, and so do a sequence's data beside other sequences."""
    q, k, v, lens = random_inputs(batch, new, heads, dim, capacity, torch.bfloat16)
    lens[2] = 2 * capacity // 3
    k[2], v[2] = torch.randn_like(k[2]), torch.randn_like(v[2])
    first = verify_attention(q, k, v, lens)
    for _ in range(5):
        assert torch.equal(verify_attention(q, k, v, lens), first)
    others = [b for b in range(batch) if b != 2]
    q, k, v = q.clone(), k.clone(), v.clone()
    for t in (q, k, v):
        t[others] = torch.randn_like(t[others])
    lens[others] = torch.randint(new, capacity + 1, (batch - 1,), dtype=torch.int32, device="cuda")
    assert torch.equal(verify_attention(q, k, v, lens)[2], first[2])


def test_graph_replays_with_changed_inputs(seed):
    batch, new, heads, dim, page, capacity = 3, 4, (16, 2), 128, 16, 2048
    q, k, v, lens = random_inputs(batch, new, heads, dim, capacity, torch.bfloat16)
    k_pages, v_pages, table = paged(k, v, lens, page)
    mask = random_tree(batch, new)

    def call():
        return (
            verify_attention(q, k, v, lens, tree_mask=mask),
            verify_attention(q, k_pages, v_pages, lens, block_table=table),
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for lengths in ([2048, 4, 700], [4, 5, 6], [130, 2000, 64], [2048, 2048, 2048]):
        lens.copy_(torch.tensor(lengths))
        q.normal_()
        k.normal_()
        v.normal_()
        poison_unused(k, v, lens)
        for old, fresh in zip((k_pages, v_pages, table), paged(k, v, lens, page), strict=True):
            old.copy_(fresh)
        mask.copy_(random_tree(batch, new))
        for out in outputs:
            out.fill_(NAN)
        graph.replay()
        assert_close(outputs[0], oracle(q, k, v, lens, mask))
        assert_close(outputs[1], oracle(q, k, v, lens))
        for out, expected in zip(outputs, call(), strict=True):
            assert torch.equal(out, expected)


def test_chains_of_calls(seed):
    """Each call's queries are the results of the one before: what starts early must wait. In a graph and without."""
    for batch, capacity in ((1, 300), (1, 9000), (32, 1000)):
        q, k, v, lens = random_inputs(batch, 2, (8, 2), 128, capacity, torch.bfloat16)
        weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")

        def steps(after_each=lambda: None, q=q, k=k, v=v, lens=lens, weight=weight):
            x = q
            for _ in range(8):
                x = verify_attention(x, k, v, lens)
                after_each()
                x = fp.rms_norm(x, weight, 1e-5)
                after_each()
            return x

        expected = steps(torch.cuda.synchronize)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = steps()
        for _ in range(10):
            assert torch.equal(steps(), expected)
            captured.fill_(NAN)
            graph.replay()
            assert torch.equal(captured, expected)


def test_streams_share_nothing(seed):
    sets = [random_inputs(2, 5, (8, 2), 128, 4000, torch.bfloat16) for _ in range(2)]
    expected = [verify_attention(*inputs) for inputs in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for stream, inputs, found in zip(streams, sets, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(verify_attention(*inputs))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in found)


def test_runs_on_the_current_stream(seed):
    values, k, v, lens = random_inputs(2, 3, (8, 2), 128, 1000, torch.bfloat16)
    expected = verify_attention(values, k, v, lens)
    q = torch.zeros(values.shape, dtype=values.dtype, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on another stream, the kernel would read q before it is written
        q.copy_(values)
        out = verify_attention(q, k, v, lens)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.multigpu
def test_device_that_is_not_current(seed):
    inputs = [t.to("cuda:1") for t in random_inputs(2, 3, (8, 2), 128, 1000, torch.bfloat16)]
    with torch.cuda.device(0):
        out = verify_attention(*inputs)
        assert torch.cuda.current_device() == 0
    assert_close(out, oracle(*inputs))


def test_empty():
    empty = randn(0, 2, 4, 64, dtype=torch.bfloat16)
    lens = torch.empty(0, dtype=torch.int32, device="cuda")
    assert verify_attention(empty, empty, empty, lens).shape == empty.shape


def test_opcheck(seed):
    q, k, v, lens = random_inputs(2, 3, (4, 2), 64, 300, torch.bfloat16)
    op = torch.ops.fused_parallel.verify_attention.default
    torch.library.opcheck(op, (q, k, v, lens, None, None, 0.125, None))
    k_pages, v_pages, table = paged(k, v, lens, 16)
    torch.library.opcheck(op, (q, k_pages, v_pages, lens, table, random_tree(2, 3), 0.125, None))


def test_compiles_without_graph_breaks(seed):
    q, k, v, lens = random_inputs(2, 3, (8, 2), 64, 300, torch.bfloat16)

    def layer(q, k, v, lens):
        return verify_attention(q, k, v, lens).relu()

    assert torch.equal(torch.compile(layer, fullgraph=True)(q, k, v, lens), layer(q, k, v, lens))


def test_what_the_kernel_cannot_do_is_said():
    def call(new=1, dim=64, dtype=torch.bfloat16, offset=0):
        q = randn(1, new, 4, dim, dtype=dtype)
        size = 100 * 2 * dim
        k = randn(size + offset, dtype=dtype)[offset:].view(1, 100, 2, dim)
        return verify_attention(q, k, k, torch.full((1,), 100, dtype=torch.int32, device="cuda"))

    for options, reason in (
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"dim": 80}, "heads of 64 or 128, not of 80"),
        ({"new": 65}, "up to 64 new tokens"),
        ({"offset": 1}, "multiples of 16 bytes"),
    ):
        with pytest.raises(fp.NoFusedKernelError, match=reason):
            call(**options)
        with fp.use("reference"):
            assert not call(**options).isnan().any()
    lens = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_lens is on cpu but q is on cuda"):
        verify_attention(*[randn(1, 1, 2, 64, dtype=torch.bfloat16)] * 3, lens)


def test_launcher_reports_bad_arguments():
    addresses = (
        "q",
        "k",
        "v",
        "cache_lens",
        "block_table",
        "tree_mask",
        "out",
        "scratch",
        "block_table_stride",
        "stream",
    )
    good = dict.fromkeys(addresses, 0) | dict.fromkeys(("q_strides", "k_strides", "v_strides"), (64, 64, 64))
    good |= {"batch": 1, "new_tokens": 1, "heads": 2, "kv_heads": 1, "head_dim": 64, "capacity": 1}
    good |= {"page": 0, "scale": 1.0, "dtype": 2, "device": 0}
    launch = _ext.extension().verify_attention
    for change, message in (
        ({"dtype": 9}, "dtype code 9"),
        ({"dtype": 0}, "float16 and bfloat16 only"),
        ({"head_dim": 96}, "head_dim=96"),
        ({"new_tokens": 65}, "new_tokens=65"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"heads": 3, "kv_heads": 2}, "heads=3, kv_heads=2"),
        ({"capacity": -1}, "capacity=-1"),
        ({"block_table": 16}, "pages of 0 tokens"),
        ({"k_strides": (64, 2**31, 64)}, "too far from each other"),
        ({"batch": 2**30, "kv_heads": 2, "new_tokens": 2}, "batch=1073741824"),
        ({"device": 4096}, r"device\.h:\d+: .*cudaErrorInvalidDevice"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch(**(good | change))
