"""The kernels of verify and sample against the float64 reference, token for token, and against the law of the target.

The kernels' sums are in fp32: where the reference's own decision changes when its logits move by `NEAR`, either result
is right. Such requests are counted, and there may be very few of them.
"""

import pytest
import torch
from _virtual_ranks import VirtualRanks

import fused_parallel as fp
from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import METHODS, verify
from fused_parallel.reference.vocab_shard import VocabShard

NEAR = 3e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make_round(batch, k, vocab, dtype=torch.bfloat16, full=True, draft_dtype=None, greedy=0.2, spread=3.0):
    """A round on the GPU: drafts drawn from the draft, ragged lengths, mixed temperatures, some greedy requests."""
    target = (torch.randn(batch, k + 1, vocab, device="cuda") * spread).to(dtype)
    draft = (target[:, :k].float() + torch.randn(batch, k, vocab, device="cuda")).to(draft_dtype or dtype)
    seed = torch.randint(-(2**62), 2**62, (batch,), device="cuda")
    step = torch.randint(0, 2**40, (batch,), device="cuda")
    noise = -torch.log(-torch.log(torch.rand(batch, k, vocab, device="cuda")))
    tokens = (draft.float() + noise).argmax(-1) if k else torch.empty(batch, 0, dtype=torch.int64, device="cuda")
    return dict(
        target_logits=target,
        draft_tokens=tokens,
        draft_logits=draft if full else None,
        seed=seed,
        step=step,
        temperature=(0.3 + torch.rand(batch, device="cuda")) * (torch.rand(batch, device="cuda") >= greedy),
        num_draft_tokens=torch.randint(-1, k + 2, (batch,), device="cuda", dtype=torch.int32),
    )


def both(inputs, **options):
    with fp.use("fused"):
        ours = verify(**inputs, return_logprobs=True, **options)
    with fp.use("reference"):
        reference = verify(**inputs, return_logprobs=True, **options)
    return ours, reference


def near_tie(inputs, request, tokens, options):
    """Whether the reference itself gives `tokens` for logits that are off by NEAR or less."""
    one = {name: None if t is None else t[request : request + 1] for name, t in inputs.items()}
    for _ in range(16):
        moved = dict(one)
        for name in ("target_logits", "draft_logits"):
            if one[name] is not None:
                x = one[name].float()
                # One shift for the row's drafted token against all others is what sums in fp32 amount to.
                moved[name] = x + NEAR * (2 * torch.rand_like(x) - 1)
        moved["temperature"] = one["temperature"] * (1 + NEAR * (2 * torch.rand(1, device="cuda") - 1))
        if one.get("top_p") is not None:
            moved["top_p"] = one["top_p"] * (1 + 1e-6 * (2 * torch.rand(1, device="cuda") - 1))
        with fp.use("reference"):
            if torch.equal(verify(**moved, **options).tokens[0], tokens):
                return True
    return False


def check(inputs, most_ties=1, **options):
    """Raise unless the kernels give the reference's tokens, or a near tie's; returns the result and the ties."""
    ours, reference = both(inputs, **options)
    wrong = (ours.tokens != reference.tokens).any(1).nonzero()[:, 0].tolist()
    assert len(wrong) <= most_ties, f"{len(wrong)} of {len(ours.tokens)} requests differ: {wrong[:20]}"
    for request in wrong:
        assert near_tie(inputs, request, ours.tokens[request], options), (
            f"request {request}: {ours.tokens[request].tolist()} but {reference.tokens[request].tolist()}, no tie"
        )
    same = torch.ones(len(ours.tokens), dtype=torch.bool, device="cuda")
    same[wrong] = False
    assert torch.equal(ours.num_accepted[same], reference.num_accepted[same])
    torch.testing.assert_close(ours.logprobs[same], reference.logprobs[same], rtol=2e-6, atol=2e-5)
    print(f"{len(wrong)} near ties in {len(ours.tokens)} requests")
    return ours


@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 1000, 2049, 4097, 8192, 33000])
def test_equals_reference(seed, vocab, dtype, method, full):
    check(make_round(192, 4, vocab, dtype, full), method=method)


@pytest.mark.parametrize("batch, k, vocab", [(1, 4, 128256), (8, 4, 128256), (24, 3, 128256), (5, 7, 151936)])
@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", ["rejection", "block"])
def test_equals_reference_at_the_measured_vocabularies(seed, batch, k, vocab, method, full):
    for spread in (0.1, 3.0):
        check(make_round(batch, k, vocab, full=full, spread=spread, greedy=0.1), method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 2, 32])
def test_numbers_of_drafts(seed, k, method):
    for full in (True, False):
        check(make_round(64, k, 500, torch.float32, full), method=method)
    inputs = make_round(64, k, 500)
    inputs["num_draft_tokens"] = None
    check(inputs, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_draft_in_float32(seed, method):
    for dtype in (torch.bfloat16, torch.float16):
        check(make_round(128, 3, 5000, dtype, draft_dtype=torch.float32), method=method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", METHODS)
def test_odd_inputs(seed, method, full, dtype):
    """Placeholders, NaN, infinities, rows without a finite logit, masks, p = q, p = 0 at the draft, temperatures."""
    batch, k, vocab = 64, 4, 3000
    inputs = make_round(batch, k, vocab, dtype, full, greedy=0.3)
    target, tokens = inputs["target_logits"], inputs["draft_tokens"]
    kind = torch.arange(batch, device="cuda") % 16
    tokens[kind == 0, 2] = -1
    tokens[kind == 1, 1] = vocab
    tokens[kind == 2, 0] = 2**40
    target[kind == 3, :, ::7] = float("nan")
    target[kind == 4, :, 17] = float("inf")
    target[kind == 5, 1] = float("-inf")
    target[kind == 6] = float("-inf")
    target[kind == 7, :, 40:] = float("-inf")
    target[kind == 8] = float("nan")
    target[kind == 9] = 1.0  # all equal
    inputs["temperature"][kind == 10] = 1e-6
    inputs["temperature"][kind == 11] = float("inf")
    inputs["temperature"][kind == 12] = float("nan")
    at = tokens.clamp(0, vocab - 1)[..., None]
    target[:, :k].scatter_(2, at, torch.where((kind == 13)[:, None, None], float("-inf"), target[:, :k].gather(2, at)))
    if full:
        draft = inputs["draft_logits"]
        draft[kind == 14] = target[kind == 14, :k]
        inputs["temperature"][kind == 14] = 1.0
        draft[kind == 15, 2] = float("-inf")
        draft[kind == 3, :, ::11] = float("nan")
        draft[kind == 4, :, 19] = float("inf")
    result = check(inputs, method=method)
    length = torch.arange(k + 1, device="cuda")
    inside = (result.tokens >= 0) & (result.tokens < vocab)
    assert torch.equal(inside, length <= result.num_accepted[:, None])


@pytest.mark.parametrize("method", METHODS)
def test_padding_views_and_misaligned_rows(seed, method):
    inputs = make_round(32, 3, 1003)
    expected = check(inputs, method=method)
    padded = dict(inputs)
    for name in ("target_logits", "draft_logits"):
        wide = torch.full((*inputs[name].shape[:2], 1100), 50.0, dtype=inputs[name].dtype, device="cuda")
        wide[..., :1003] = inputs[name]
        padded[name] = wide
    with fp.use("fused"):
        masked = verify(**padded, method=method, vocab_size=1003, return_logprobs=True)
        shifted = {**inputs, **{name: padded[name][..., :1003] for name in ("target_logits", "draft_logits")}}
        viewed = verify(**shifted, method=method, return_logprobs=True)
        columns = {**inputs, "target_logits": inputs["target_logits"].transpose(1, 2).contiguous().transpose(1, 2)}
        strided = verify(**columns, method=method, return_logprobs=True)
    for other in (masked, viewed, strided):  # aligned or not, the sums are the same
        for a, b in zip(other[:3], expected[:3], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_the_batch(seed, method, full):
    """A large batch splits the drawn rows otherwise than a request alone."""
    inputs = make_round(100, 4, 20000, full=full)
    with fp.use("fused"):
        together = verify(**inputs, method=method, return_logprobs=True)
        again = verify(**inputs, method=method, return_logprobs=True)
        for a, b in zip(together[:3], again[:3], strict=True):
            assert torch.equal(a, b)
        for request in (0, 1, 33, 69, 70, 99):
            one = {name: None if t is None else t[request : request + 1] for name, t in inputs.items()}
            alone = verify(**one, method=method, return_logprobs=True)
            for a, b in zip(together[:3], alone[:3], strict=True):
                assert torch.equal(a[request : request + 1], b)


@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", METHODS)
def test_graph_replays_with_changed_inputs(seed, method, full):
    static = make_round(20, 4, 9000, full=full)
    with fp.use("fused"):
        verify(**static, method=method, return_logprobs=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = verify(**static, method=method, return_logprobs=True)
        for _ in range(5):
            for name, value in make_round(20, 4, 9000, full=full).items():
                if value is not None:
                    static[name].copy_(value)
            graph.replay()
            eager = verify(**static, method=method, return_logprobs=True)
            for a, b in zip(captured[:3], eager[:3], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("stream", ["draft", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 999, 33000])
def test_sample_equals_reference(seed, vocab, dtype, stream):
    inputs = make_round(300, 0, vocab, dtype)
    position = torch.randint(0, 2**32, (300,), device="cuda")
    call = dict(seed=inputs["seed"], step=inputs["step"], temperature=inputs["temperature"], stream=stream)
    for at in (position, 5):
        tokens = []
        for mode in ("fused", "reference"):
            with fp.use(mode):
                tokens.append(sample(inputs["target_logits"][:, 0], **call, position=at))
        assert (tokens[0] != tokens[1]).sum() <= 1


def test_empty_batch():
    with fp.use("fused"):
        assert verify(**make_round(0, 3, 100)).tokens.shape == (0, 4)


def test_says_what_it_cannot_do(seed):
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match="32 drafts"):
        verify(**make_round(1, 33, 50))
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match="float16"):
        verify(**make_round(1, 2, 50, draft_dtype=torch.float16))


def add_filters(inputs, *names):
    """Filters for most requests: top_k 1 .. V + 2, top_p and min_p of all sizes; 0, which is off, for the others."""
    batch, vocab = inputs["target_logits"].shape[0], inputs["target_logits"].shape[-1]
    on = torch.rand(3, batch, device="cuda") < 0.7
    # Half of the k are small, as users choose them.
    few, any_k = (torch.randint(1, most, (batch,), device="cuda") for most in (65, vocab + 3))
    some = torch.where(torch.rand(batch, device="cuda") < 0.5, few, any_k)
    every = {
        "top_k": some * on[0],
        "top_p": torch.rand(batch, device="cuda") * on[1],
        "min_p": torch.rand(batch, device="cuda") ** 3 * on[2],
    }
    return {**inputs, **{name: every[name] for name in names}}


FILTERS = ("top_k", "top_p", "min_p")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(n,) for n in FILTERS] + [FILTERS], ids="-".join)
@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", ["rejection", "block"])
def test_filters_equal_reference(seed, method, full, names, dtype):
    for vocab, spread in ((1, 3.0), (7, 3.0), (5003, 3.0), (40000, 1.0)):
        inputs = add_filters(make_round(100, 3, vocab, dtype, full, spread=spread), *names)
        check(inputs, most_ties=2, method=method)
    # Nearly equal logits, of which most share an interval of the search; and few values.
    inputs = add_filters(make_round(100, 2, 30000, dtype, full, spread=0.01), *names)
    check(inputs, most_ties=2, method=method)
    inputs["target_logits"] = (inputs["target_logits"] * 200).round() / 2
    check(inputs, most_ties=2, method=method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["rejection", "block"])
def test_filters_on_odd_rows(seed, method, dtype):
    inputs = make_round(64, 3, 3000, dtype)
    target = inputs["target_logits"]
    kind = torch.arange(64, device="cuda") % 8
    target[kind == 1, :, ::7] = float("nan")
    target[kind == 2, :, 17] = float("inf")
    target[kind == 3, 1] = float("-inf")
    target[kind == 4, :, 40:] = float("-inf")
    target[kind == 5] = 1.0
    inputs["temperature"][kind == 6] = 1e-6
    inputs["temperature"][kind == 7] = float("inf")
    result = check(add_filters(inputs, *FILTERS), most_ties=2, method=method)
    inside = (result.tokens >= 0) & (result.tokens < 3000)
    assert torch.equal(inside, torch.arange(4, device="cuda") <= result.num_accepted[:, None])


def test_filters_in_a_graph_and_in_any_batch(seed):
    static = add_filters(make_round(24, 3, 9000), *FILTERS)
    with fp.use("fused"):
        verify(**static, return_logprobs=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = verify(**static, return_logprobs=True)
        for _ in range(3):
            for name, value in add_filters(make_round(24, 3, 9000), *FILTERS).items():
                static[name].copy_(value)
            graph.replay()
            eager = verify(**static, return_logprobs=True)
            for a, b in zip(captured[:3], eager[:3], strict=True):
                assert torch.equal(a, b)
            one = {name: t[7:8] for name, t in static.items()}
            for a, b in zip(verify(**one, return_logprobs=True)[:3], eager[:3], strict=True):
                assert torch.equal(a, b[7:8])


def shard_calls(inputs, world, method):
    """One call for each of `world` shards of the vocabulary, padded with what must not matter."""
    inputs = {**dict.fromkeys(FILTERS), **inputs}
    vocab = inputs["target_logits"].shape[-1]
    width = -(-vocab // world)

    def part(logits, rank):
        if logits is None:
            return None
        wide = torch.full((*logits.shape[:2], width * world), 30.0, dtype=logits.dtype, device="cuda")
        wide[..., ::2] = float("nan")
        wide[..., :vocab] = logits
        return wide[..., rank * width : (rank + 1) * width].contiguous()

    calls = []
    for rank in range(world):
        call = kernel.Parts(
            part(inputs["target_logits"], rank), inputs["draft_tokens"], part(inputs["draft_logits"], rank),
            *(inputs[name] for name in ("seed", "step", "temperature", "num_draft_tokens")),
            [inputs[name] for name in FILTERS], method, VocabShard(width, vocab), return_logprobs=True,
            rank=rank, world=world,
        )  # fmt: skip
        call.tokens.fill_(-77)
        call.accepted.fill_(-77)
        call.logprobs.fill_(float("nan"))
        calls.append(call)
    return calls


def check_shards(inputs, calls, method, ties=1):
    """The same bits on all ranks, and the tokens of the kernels on the whole vocabulary."""
    for call in calls[1:]:
        assert torch.equal(call.tokens, calls[0].tokens)
        assert torch.equal(call.accepted, calls[0].accepted)
        assert torch.equal(call.logprobs, calls[0].logprobs)
    with fp.use("fused"):
        whole = verify(**inputs, method=method, return_logprobs=True)
    same = (calls[0].tokens == whole.tokens).all(1)
    assert (~same).sum() <= ties, f"{(~same).sum()} of {len(same)} requests differ from the unsharded kernels"
    for request in (~same).nonzero()[:, 0].tolist():
        assert near_tie(inputs, request, calls[0].tokens[request], dict(method=method))
    torch.testing.assert_close(calls[0].logprobs[same], whole.logprobs[same], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", METHODS)
def test_shards_that_the_caller_gathers(seed, method, full):
    for vocab, world, dtype in ((3, 4, torch.float32), (5003, 3, torch.bfloat16), (40000, 8, torch.float16)):
        inputs = make_round(100, 4, vocab, dtype, full)
        calls = shard_calls(inputs, world, method)
        steps = (kernel.ROWS, kernel.BEYOND, kernel.DRAW) if calls[0]._sums else (kernel.ROWS, kernel.DRAW)
        received = None
        for step in steps:
            sent = [torch.full((call._records[step], 4), -1, device="cuda") for call in calls]
            for call, mine in zip(calls, sent, strict=True):
                call._run(step, mine, received)
            received = torch.stack(sent)
        for call in calls:
            call._run(kernel.FINISH, None, received)
        check_shards(inputs, calls, method)


@pytest.fixture(scope="module", params=[2, 4])
def virtual(request):
    return VirtualRanks(request.param, slot_bytes=16 << 20)


def run_shards(virtual, calls):
    virtual.start()
    for rank, call in enumerate(calls):
        with torch.cuda.stream(virtual.streams[rank]):
            call.whole(virtual.native[rank])
    virtual.finish()
    virtual.check()


@pytest.mark.parametrize("names", [(), *((n,) for n in FILTERS), FILTERS], ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", METHODS)
def test_shards_through_the_peers_memory(seed, virtual, method, full, names):
    for vocab, dtype in ((3, torch.float32), (5003, torch.bfloat16), (40000, torch.float16)):
        inputs = add_filters(make_round(60, 3, vocab, dtype, full), *names)
        calls = shard_calls(inputs, virtual.world, method)
        for _ in range(4):  # all generations of the slots
            run_shards(virtual, calls)
        check_shards(inputs, calls, method, ties=2)


@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", ["rejection", "block"])
def test_law_of_the_first_two_tokens(seed, method, full):
    """Chi-square of pairs over V = 16 with the draft's tokens drawn by `sample`; p and q depend on the position."""
    count, vocab, k = 200_000, 16, 2
    target = torch.randn(1, k + 1, vocab, device="cuda") * 1.5
    draft = target[:, :k].flip(-1).contiguous()  # adversarial: as wrong as it gets
    seeds = torch.arange(count, device="cuda") * 2654435761 + 12345
    step = torch.full((count,), 7, device="cuda")
    if full:
        drawn = [
            sample(draft[:, i].expand(count, -1), seed=seeds, step=step, temperature=1.0, position=i) for i in range(k)
        ]
    else:
        drawn = [torch.full((count,), int(target[0, i].argmax()), device="cuda") for i in range(k)]
    inputs = dict(
        target_logits=target.expand(count, -1, -1),
        draft_tokens=torch.stack(drawn, 1),
        draft_logits=draft.expand(count, -1, -1) if full else None,
        seed=seeds,
        step=step,
        temperature=0.8,
        method=method,
    )
    with fp.use("fused"):
        tokens = verify(**inputs).tokens
        # What verification leaves open is drawn in the next round, from the target's row 1.
        rest = sample(
            target[:, 1].expand(count, -1), seed=seeds, step=step + 1, temperature=0.8, stream="residual", position=0
        )
    pair = tokens[:, 0] * vocab + torch.where(tokens[:, 1] >= 0, tokens[:, 1], rest)
    p = torch.softmax(target[0].double() / 0.8, -1)
    expected = (p[0][:, None] * p[1]).flatten() * count
    observed = torch.bincount(pair, minlength=vocab * vocab).double()
    big = expected >= 10
    chi = ((observed - expected)[big] ** 2 / expected[big]).sum().item()
    freedom = int(big.sum())
    # 5 standard deviations of the chi-square's normal approximation: below 1e-5 each.
    assert chi < freedom + 5 * (2 * freedom) ** 0.5, f"chi-square {chi:.1f} on {freedom} degrees of freedom"
