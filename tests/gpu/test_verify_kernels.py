"""The kernels of verify and sample against the float64 reference, token for token, and against the law of the target;
filters and shards are in test_verify_sharded.py."""

import math

import pytest
import torch
from _verify_checks import DTYPES, check, make_round

import fused_parallel as fp
from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import METHODS, verify


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize("batch", [1, 6, 500])
def test_what_is_left_is_a_small_part(seed, batch):
    """All tokens but the draft's keep 1e-4 of their weight, near what fp32 is allowed to be wrong by: so many may be
    the best that more are handed in than fit."""
    kept, rounds, vocab = 0, max(1, 300 // batch), 30000
    for _ in range(rounds):
        inputs = make_round(batch, 1, vocab, torch.float32, greedy=0.0)
        row, token = inputs["target_logits"][:, 0], torch.randint(vocab, (batch, 1), device="cuda")
        others = row.scatter(1, token, -math.inf).logsumexp(-1, keepdim=True)
        row.scatter_(1, token, others - math.log(1e4))
        draft = row.scatter_add(1, token, torch.full_like(others, math.log(2.0)))
        inputs |= {"draft_logits": draft[:, None], "draft_tokens": token, "num_draft_tokens": None}
        inputs["temperature"].fill_(1.0)
        kept += check(inputs).num_accepted.sum().item()
    assert 0.3 < kept / (batch * rounds) < 0.7  # p / q = 1 / 2


@pytest.mark.parametrize("temperature,factor", [(1e-7, 1), (3e-9, 1), (1e-10, 1), (1.0, 1e8), (1.0, 1e9), (1.0, 1e10)])
def test_logits_far_apart_for_their_temperature(seed, temperature, factor):
    """Exponents far beyond where fp32 counts in ones: the greatest logit has all of the weight, and its log is 0."""
    inputs = make_round(200, 2, 5000, torch.float32, full=False, greedy=0.0)
    inputs["target_logits"] *= factor
    inputs["draft_tokens"] = inputs["target_logits"][:, :2].argmax(-1)
    inputs |= {"temperature": torch.full_like(inputs["temperature"], temperature), "num_draft_tokens": None}
    with fp.use("fused"):
        result = verify(**inputs, return_logprobs=True)
    assert torch.equal(result.tokens, inputs["target_logits"].argmax(-1)) and result.logprobs.abs().max() < 1e-5
