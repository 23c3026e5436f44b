"""The verification kernels, compiled for the host, against the float64 reference: filters, shards, exchanges."""

import math

import _verify_cases as cases
import _verify_ranks as ranks
import pytest
import torch

from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.reference import verify as reference
from fused_parallel.reference.filters import target_weights
from fused_parallel.reference.vocab_shard import VocabShard

FILTERS = ("top_k", "top_p", "min_p")
NEAR = 3e-5
SETS = {
    "none": (),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "all": FILTERS,
}


pytestmark = pytest.mark.usefixtures("host_kernels")


def make_case(batch, k, vocab, filters=FILTERS, **options):
    c = cases.case(batch, k, vocab, **options)
    c["num_draft_tokens"] = c.get("num_draft_tokens")
    for name in FILTERS:
        if name not in filters:
            c[name] = None
    return c


def arguments(c, method, part, **options):
    tensors = [c[name] for name in ("target_logits", "draft_tokens", "draft_logits", "seed", "step", "temperature")]
    filters = [None if c[n] is None else c[n].long() if n == "top_k" else c[n].float() for n in FILTERS]
    return kernel.Parts(
        *tensors, c["num_draft_tokens"], filters, method, part, return_logprobs=True, **options
    )  # fmt: skip


def results(parts):
    return parts.tokens, parts.accepted, parts.logprobs


def expected(c, method, vocab):
    names = ("target_logits", "draft_tokens", "draft_logits", "seed", "step", "temperature", "num_draft_tokens")
    part = VocabShard(c["target_logits"].shape[-1], vocab)
    return reference.verify(*(c[n] for n in (*names, *FILTERS)), method, part)


def near_tie(c, request, tokens, method, vocab):
    """Whether the reference itself gives `tokens` for logits and filters that are off by NEAR or less."""
    one = {name: t if t is None else t[request : request + 1] for name, t in c.items()}
    for _ in range(64):
        moved = dict(one)
        for name in ("target_logits", "draft_logits"):
            if one[name] is not None:
                moved[name] = one[name].float() + NEAR * (2 * torch.rand(one[name].shape) - 1)
        if one["top_p"] is not None:
            moved["top_p"] = one["top_p"] * (1 + 1e-6 * (2 * torch.rand(1) - 1))
        if torch.equal(expected(moved, method, vocab)[0][0], tokens):
            return True
    return False


def check(c, got, method, vocab, most_ties=1):
    want = expected(c, method, vocab)
    differ = (got[0] != want[0]).any(1).nonzero()[:, 0].tolist()
    assert len(differ) <= most_ties, f"{len(differ)} of {len(got[0])} requests differ: {differ[:20]}"
    for request in differ:
        assert near_tie(c, request, got[0][request], method, vocab), (
            f"request {request}: {got[0][request].tolist()}, expected {want[0][request].tolist()}"
        )
    same = torch.ones(len(got[0]), dtype=torch.bool)
    same[differ] = False
    assert torch.equal(got[1][same], want[1][same])
    torch.testing.assert_close(got[2][same], want[2][same], rtol=2e-6, atol=2e-5)


def run_whole(c, method, vocab):
    part = VocabShard(c["target_logits"].shape[-1], vocab)
    parts = arguments(c, method, part)
    for t in results(parts):
        t.fill_(-77)
    parts.whole()
    return results(parts)


def shards(c, world, vocab, method):
    """The ranks' calls: of a vocabulary padded to equal shards, with what must not matter in the padding."""
    calls = []
    for rank in range(world):
        mine = ranks.share(c, world, rank, vocab)
        mine.pop("vocab_size")
        part = VocabShard(mine["target_logits"].shape[-1], vocab)
        calls.append(arguments(mine, method, part, rank=rank, world=world))
        for t in results(calls[-1]):
            t.fill_(-77)
    return calls


def same_on_all_ranks(calls):
    for call in calls[1:]:
        for a, b in zip(results(call), results(calls[0]), strict=True):
            assert torch.equal(a, b)
    return results(calls[0])


@pytest.mark.parametrize("filters", SETS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", ["rejection", "block", "greedy"])
def test_one_rank(seed, method, full, filters):
    for vocab, dtype in ((5, torch.float32), (1003, torch.bfloat16), (4999, torch.float32), (2048, torch.float16)):
        c = make_case(12, 3, vocab, SETS[filters], dtype=dtype, full_q=full)
        check(c, run_whole(c, method, vocab), method, vocab)


@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", ["rejection", "block", "greedy"])
def test_shards_that_the_caller_gathers(seed, method, full):
    # Shards of odd widths, of one and a half tiles, and of padding alone (9 over 4: the last holds ids 9 to 11).
    for vocab, world, dtype in ((9, 4, torch.float32), (1003, 3, torch.bfloat16), (6151, 2, torch.float16)):
        c = make_case(10, 3, vocab, (), dtype=dtype, full_q=full)
        calls = shards(c, world, vocab, method)
        gather_all(calls)
        check(c, same_on_all_ranks(calls), method, vocab)


def gather_all(calls):
    """What `Parts.gathered` does on every rank, in step: all send, then all receive."""
    steps = (kernel.ROWS, kernel.BEYOND, kernel.DRAW) if calls[0]._sums else (kernel.ROWS, kernel.DRAW)
    received = None
    for step in steps:
        sent = [torch.full((call._records[step], 4), -1) for call in calls]
        for call, mine in zip(calls, sent, strict=True):
            call._run(step, mine, received)
        received = torch.stack(sent)
    for call in calls:
        call._run(kernel.FINISH, None, received)


def prepared(extension, call):
    return extension.arguments(*call.arguments(kernel.ALL))


# Each filter for itself concerns the target's rows alone, whatever the draft and the method are.
@pytest.mark.parametrize(
    ("method", "full", "filters"),
    [("rejection", True, filters) for filters in SETS if filters not in ("none", "all")]
    + [
        (method, full, filters)
        for method in ("rejection", "block", "greedy")
        for full in (True, False)
        for filters in ("none", "all")
    ],
    ids=str,
)
def test_shards_through_the_peers_memory(seed, extension, method, full, filters):
    for vocab, world, dtype in ((9, 4, torch.float32), (1003, 2, torch.bfloat16)):
        # Calls of other inputs in a row: what is left of one in the slots would be taken for the next one's.
        made = [make_case(6, 3, vocab, SETS[filters], dtype=dtype, full_q=full) for _ in range(3)]
        rounds = [shards(c, world, vocab, method) for c in made]
        extension.verify_ranks(*([prepared(extension, call) for call in calls] for calls in rounds))
        for c, calls in zip(made, rounds, strict=True):
            check(c, same_on_all_ranks(calls), method, vocab)


def test_shards_where_no_row_filters(seed, extension):
    """Greedy requests with filters given: that launch has nothing to find, and the calls around it must not meet."""
    for vocab, world in ((9, 4), (1003, 2)):
        made = [make_case(6, 3, vocab, SETS["top_p"], full_q=True) for _ in range(3)]
        for c in made:
            c["temperature"].zero_()
        rounds = [shards(c, world, vocab, "rejection") for c in made]
        extension.verify_ranks(*([prepared(extension, call) for call in calls] for calls in rounds))
        for c, calls in zip(made, rounds, strict=True):
            check(c, same_on_all_ranks(calls), "rejection", vocab)


def odd_case(k, vocab, full, dtype=torch.float32):
    """Rows that only care survives; the drafts are mostly the argmax, so that later rows matter."""
    c = make_case(18, k, vocab, full_q=full, mixed=False, invalid=False, ragged=False, dtype=dtype)
    target, kind = c["target_logits"], torch.arange(18)
    c["draft_tokens"][:, 0] = target[:, 0].argmax(-1)
    target[0, :, ::7] = float("nan")
    target[1, :, 3] = float("inf")
    target[2, 1] = float("-inf")
    target[3] = float("-inf")
    target[4, :, 4:] = float("-inf")
    target[5] = float("nan")
    target[6] = 1.0
    c["temperature"][kind == 7] = 1e-6
    c["temperature"][kind == 8] = float("inf")
    c["temperature"][kind == 9] = float("nan")
    target[10] = target[10].round()  # ties
    target[11] = (target[11] * 3).round() / 64
    c["top_p"][kind == 11], c["top_k"][kind == 11], c["min_p"][kind == 11] = 0.5, 0, 0.0
    c["top_k"][kind == 12], c["top_k"][kind == 13] = 1, vocab + 5
    c["top_p"][kind == 14] = 1e-30
    c["min_p"][kind == 15] = 1.0
    target[16] = torch.where(target[16] > 0, 0.0, -0.0)  # equal
    target[17] *= 1e30
    return c


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("temperature,factor", [(1e-7, 1), (3e-9, 1), (1e-10, 1), (1.0, 1e8), (1.0, 1e9), (1.0, 1e10)])
def test_logits_far_apart_for_their_temperature(seed, extension, temperature, factor, world):
    """Exponents far beyond where fp32 counts in ones: the greatest logit has all of the weight, and its log is 0."""
    vocab = 64
    c = make_case(60, 2, vocab, (), full_q=False, mixed=False, invalid=False, ragged=False)
    c["target_logits"] = torch.randn(60, 3, vocab) * 6 * factor
    c["draft_tokens"] = c["target_logits"][:, :2].argmax(-1)
    c["temperature"][:] = temperature
    if world == 1:
        got = run_whole(c, "rejection", vocab)
    else:
        calls = shards(c, world, vocab, "rejection")
        extension.verify_ranks([prepared(extension, call) for call in calls])
        got = same_on_all_ranks(calls)
    check(c, got, "rejection", vocab)
    assert torch.equal(got[0], c["target_logits"].argmax(-1)) and got[2].abs().max() < 1e-5


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("full", [True, False], ids=["full", "onehot"])
@pytest.mark.parametrize("method", ["rejection", "block", "greedy"])
def test_odd_rows(seed, extension, method, full, world):
    vocab = 301
    c = odd_case(2, vocab, full)
    if world == 1:
        got = run_whole(c, method, vocab)
    else:
        calls = shards(c, world, vocab, method)
        extension.verify_ranks(*[[prepared(extension, call) for call in calls]] * 3)
        got = same_on_all_ranks(calls)
    check(c, got, method, vocab)
    length = torch.arange(3)
    assert torch.equal((got[0] >= 0) & (got[0] < vocab), length <= got[1][:, None])


def test_the_sentinel_of_the_exchange_is_a_maximum(seed, extension):
    """The one word that no rank may send, as the maximum, as the draft's logit, and in a sum's low half."""
    vocab = 64
    sentinel = torch.tensor([-0x7FFF8000], dtype=torch.int32).view(torch.float32).item()
    c = make_case(8, 2, vocab, (), full_q=False, mixed=False, invalid=False, ragged=False)
    c["target_logits"][:] = float("-inf")
    c["target_logits"][:, :, 5] = sentinel
    c["target_logits"][:, :, 40] = sentinel
    c["draft_tokens"][:] = 5
    calls = shards(c, 2, vocab, "rejection")
    extension.verify_ranks(*[[prepared(extension, call) for call in calls]] * 2)
    check(c, same_on_all_ranks(calls), "rejection", vocab)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_infinity_beside_the_largest_bfloat16(seed, extension, top_k):
    """Their weights are far from each other and their keys are one: the search ends, and keeps both."""
    c = make_case(2, 0, 512, (), full_q=False, mixed=False, invalid=False, ragged=False)
    x = torch.full((2, 1, 512), float("-inf"), dtype=torch.bfloat16)
    x[..., 3], x[..., 5], x[1, :, 9] = float("inf"), torch.finfo(torch.bfloat16).max, 3.0
    c["target_logits"], c["top_k"] = x, torch.full((2,), top_k)
    call = arguments(c, "rejection", VocabShard(512, 512))
    call.whole()
    assert (call.tokens == 3).all()
    for b in range(2):
        threshold, log2_sum = extension.row(prepared(extension, call), b)
        assert threshold <= torch.finfo(torch.bfloat16).max and log2_sum == 0


@pytest.mark.parametrize("spread", ["distinct", "ties", "flat"])
def test_filters_keep_the_reference_s_set(seed, extension, spread):
    """The least logit kept, and the normaliser, of each row; only where the mass is a near tie may the sets differ."""
    batch, vocab = 60, 2500
    c = make_case(batch, 0, vocab, full_q=False, mixed=False, ragged=False)
    if spread == "ties":
        c["target_logits"] = c["target_logits"].bfloat16().float()
    elif spread == "flat":  # thousands of tokens in an interval: its sum needs more than 32 bits
        c["target_logits"] *= 0.02
    got = arguments(c, "rejection", VocabShard(vocab, vocab))
    got.whole()
    filters = [c[n] for n in FILTERS]
    weights, _ = target_weights(c["target_logits"], c["temperature"], *filters, VocabShard(vocab, vocab))
    for b in range(batch):
        threshold, log2_sum = extension.row(prepared(extension, got), b)
        x, kept = c["target_logits"][b, 0], weights[b, 0] > float("-inf")
        least = x[kept].min()
        if not torch.equal(x >= threshold, kept):
            mass = (weights[b, 0] - weights[b, 0].max()).exp()
            edge = x == min(least, x[x >= threshold].min())
            assert mass[edge].sum() / mass.sum() < 1e-2 and (c["top_p"][b] > 0), (b, threshold, least)
            before = mass[x > x[edge].max()].sum()
            assert abs(before / (c["top_p"][b] * mass.sum()) - 1) < 3e-6
            continue
        top = weights[b, 0].max()
        assert abs(log2_sum - (weights[b, 0] - top).exp().sum().log2().item()) < 2e-6


SPREADS = ("normal", "wide", "nearly equal", "equal", "spike", "few", "nan")


def spread_rows(batch, vocab, spread, dtype):
    """Rows whose weight lies in the search's first intervals, in its tail, in one of them, or in next to none."""
    x = torch.randn(batch, 1, vocab) * {"wide": 12.0, "nearly equal": 0.01}.get(spread, 2.0)
    if spread == "equal":
        x[:] = 1.25
    elif spread == "spike":  # half of the weight, or next to nothing, is in equal logits: more in one sum than 32 bits
        x[:] = -3.0
        x[::2, 0, vocab // 2] = -3.0 + math.log(vocab)
        x[1::2, 0, vocab // 3] = 15.0
    elif spread == "few":
        x[..., 3:-2] = float("-inf")
    elif spread == "nan":
        x[..., ::3], x[..., 1::5] = float("nan"), float("-inf")
        x[::4, 0, 7] = float("inf")
    return x.to(dtype)


TOP_P = (1e-6, 0.5, 0.9, 0.9999, 1 - 2.0**-24)


def wide_case(vocab, spread, dtype, which):
    c = make_case(12, 0, vocab, FILTERS if which == "all" else (which,), full_q=False, mixed=False, ragged=False)
    c["target_logits"] = spread_rows(12, vocab, spread, dtype)
    c["temperature"] = torch.tensor([1.0, 1.0, 0.1, 100.0]).repeat(3)
    if which == "top_p":
        c["top_p"] = torch.tensor(TOP_P).repeat(3)[:12]
    elif which == "top_k":
        c["top_k"] = torch.tensor([1, 50, vocab, vocab - 1, vocab // 2]).repeat(3)[:12]
    elif which == "all":
        c["top_k"] = torch.tensor([50, vocab // 3, 0, vocab // 64]).repeat_interleave(3)
        c["top_p"] = torch.tensor([0.9, 0.999, 0.0, 0.5, 0.95]).repeat(3)[:12]
        c["min_p"] = torch.tensor([1e-3, 0.0, 0.3, 1e-9, 0.0, 0.05, 1e-5]).repeat(2)[:12]
    return c


@pytest.mark.parametrize(
    ("dtype", "which"),
    [(dtype, which) for dtype in (torch.float32, torch.bfloat16) for which in ("top_k", "top_p", "all")]
    + [(torch.float16, "all")],
    ids=str,
)
@pytest.mark.parametrize("spread", SPREADS)
def test_clusters_keep_the_same(seed, extension, dtype, spread, which):
    """The bits of a call in which a CTA, or two, four or eight, share a row: and the reference's tokens."""
    # A vector for each thread of eight CTAs; aligned rows and others.
    vocab = 8 * 512 * (4 if dtype == torch.float32 else 8) + (1 if which == "top_k" else 8)
    c = wide_case(vocab, spread, dtype, which)
    seen = []
    try:
        for wanted, multiprocessors in ((1, 1), (2, 6), (4, 12), (8, 24)):
            extension.set_multiprocessors(multiprocessors)
            got = run_whole(c, "rejection", vocab)
            assert extension.set_multiprocessors(3) == wanted
            seen.append(got)
            for a, b in zip(got, seen[0], strict=True):
                assert torch.equal(a, b)
    finally:
        extension.set_multiprocessors(3)
    check(c, seen[0], "rejection", vocab)


THREADS, LIST_VECTORS = 256, 7  # of csrc/verify_sums.cuh
CODES = kernel._ext.DTYPE_CODES


def lists_are_full(x, begin, end, least, size):
    """Whether a thread meets a vector with something to list when there is no room for a whole one, and from where on
    what is listed matters: x of a row, in the order in which threads take vectors of `size`."""
    part = torch.full((-(-(end - begin) // (THREADS * size)) * THREADS * size,), -math.inf)
    part[: end - begin] = x[begin:end]
    for mine in (part >= least).view(-1, THREADS, size).sum(-1).T.tolist():  # of a thread's vectors
        before = 0
        for n in mine:
            if n and before > (LIST_VECTORS - 1) * size:
                return True
            before += n
    return False


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lists_have_what_they_are_asked_for(seed, extension, dtype, aligned):
    """Lists that suffice, and rows that fill one thread's to the last place, beyond it, or all threads'."""
    size = 128 // torch.finfo(dtype).bits
    stride, greatest = THREADS * size, torch.finfo(dtype).max
    width, begin = 9 * stride + 5 * size + 3, 16 * size
    kinds = {"few": 0.02, "half": 0.5, "exact": 0, "beyond": 0, "flat": 1, "special": 0.1, "none": 0}
    seen = set()
    for kind, share in kinds.items():
        x = torch.where(torch.rand(width) < share, 1.0 + torch.rand(width), -3.0 * torch.rand(width) - 1.0).to(dtype)
        if kind in ("exact", "beyond"):  # a thread's first vectors, 7 of which fit
            for i in range(LIST_VECTORS + (kind == "beyond")):
                x[begin + 5 * size + i * stride :][:size] = 1.0 + 0.125 * i
        elif kind == "flat":
            x[:] = 1.25
        elif kind == "special":
            x[::5], x[1::7], x[2::11], x[3::13] = math.nan, -math.inf, math.inf, -0.0
        for end in (width, 9 * stride):
            clean = torch.where(x.isnan(), -math.inf, x.float().clamp(max=torch.finfo(torch.float32).max))
            for least in (0.5, 1.25 + 2.0**-10, 0.0, -torch.finfo(torch.float32).max, greatest):
                full = lists_are_full(clean, begin, end, least, size)
                for ask in (least, (least + 2.0) / 2, -2.0):
                    got, listed_from = extension.gathered(x, CODES[dtype], aligned, begin, end, least, ask)
                    expected = clean[begin:end]
                    expected = expected[(expected >= ask) & (expected > -math.inf)]
                    assert torch.equal(got.sort()[0], expected.sort()[0]), (kind, end, least, ask)
                    if dtype == torch.float32 or least in (0.5, 0.0):  # else rounded down: more may be listed
                        assert math.isinf(listed_from) == full and (full or listed_from == least), (kind, end, least)
                seen.add((kind, math.isinf(listed_from)))
    assert {(k, False) for k in ("few", "exact", "special", "none")} <= seen
    assert {("half", True), ("beyond", True), ("flat", True)} <= seen


@pytest.mark.parametrize("filters", ["none", "top_p"])
def test_block_sums_however_chunks_are_shared(seed, extension, filters):
    """Block verification sums chunks of 12288 tokens: the bits of a call in which a CTA takes one, two, or all of a
    row; and the sums are those of max(p_i p - q, 0)."""
    vocab = 3 * 12288 + 5
    c = make_case(4, 3, vocab, SETS[filters], full_q=True, mixed=False, ragged=False, invalid=False)
    c["draft_logits"][:2] = c["target_logits"][:2, :3] + 0.3 * torch.randn(2, 3, vocab)  # long prefixes are kept
    for name, rows in (("target_logits", 4), ("draft_logits", 3)):
        c[name][1, :, ::7], c[name][1, :, 3::7] = float("nan"), float("-inf")
        c[name][3, rows - 1, 11] = float("inf")
    call = arguments(c, "block", VocabShard(vocab, vocab))
    seen, splits = [], set()
    try:
        for multiprocessors in (1, 2, 3, 16):
            extension.set_multiprocessors(multiprocessors)
            call.whole()
            sums, spread = extension.beyond(prepared(extension, call))
            splits.add(spread)
            seen.append((*(t.clone() for t in results(call)), sums[:, 1:]))
            for a, b in zip(seen[-1], seen[0], strict=True):
                assert torch.equal(a, b)
    finally:
        extension.set_multiprocessors(3)
    assert splits == {1, 2, 4}
    check(c, seen[0][:3], "block", vocab)
    filter_options = (c["temperature"], *(c[n] for n in FILTERS), VocabShard(vocab, vocab))
    p = target_weights(c["target_logits"], *filter_options)[0].softmax(-1).nan_to_num(0.0)
    q = torch.where(c["draft_logits"].isnan(), -math.inf, c["draft_logits"].clamp(max=3.4028234663852886e38))
    q = q.double().softmax(-1).nan_to_num(0.0)
    ratio = (p[:, :3] / q).gather(-1, c["draft_tokens"][..., None])[..., 0].nan_to_num(0.0)
    scale = torch.ones(4, dtype=torch.float64)
    for row in (1, 2):
        scale = (scale * ratio[:, row - 1]).clamp(max=1.0)
        z = (scale[:, None] * p[:, row] - q[:, row]).clamp(min=0.0)
        expected = torch.nn.functional.pad(z, (0, 4 * 12288 - vocab)).view(4, 4, 12288).sum(-1)
        assert (seen[0][3][:, row - 1] - expected).abs().max() < 3e-6


@pytest.mark.parametrize("k,vocab", [(1, 300), (1, 2048), (0, 2048)])
def test_a_bound_is_a_bound(seed, extension, k, vocab):
    """Thousands of draws from what nearly cancels, or is flat, where candidates are close and their first bits few."""
    c = make_case(1500, k, vocab, (), full_q=k > 0, mixed=False, ragged=False, invalid=False)
    c["temperature"][:] = 1.0
    if k:
        c["draft_logits"] = c["target_logits"][:, :k] + 0.02 * torch.randn(1500, k, vocab)
        c["draft_tokens"] = (c["draft_logits"] - torch.empty(1500, k, vocab).exponential_().log()).argmax(-1)
    else:
        c["target_logits"] = 0.02 * torch.randn(1500, 1, vocab)
    check(c, run_whole(c, "rejection", vocab), "rejection", vocab, most_ties=0)


@pytest.mark.parametrize("spread", SPREADS)
def test_the_least_logit_kept_of_odd_rows(seed, extension, spread):
    """Threshold and normaliser, of rows in one CTA and in clusters, with what is wanted in the tail and above it."""
    vocab = 8 * 512 * 4 + 3
    for which in ("top_k", "top_p"):
        c = wide_case(vocab, spread, torch.float32, which)
        call = arguments(c, "rejection", VocabShard(vocab, vocab))
        weights, _ = target_weights(
            c["target_logits"], c["temperature"], *(c[n] for n in FILTERS), VocabShard(vocab, vocab)
        )
        try:
            for multiprocessors in (1, 20):
                extension.set_multiprocessors(multiprocessors)
                call.whole()
                for b in range(12):
                    threshold, log2_sum = extension.row(prepared(extension, call), b)
                    x, kept = c["target_logits"][b, 0], weights[b, 0] > float("-inf")
                    x = torch.where(x.isnan(), float("-inf"), x.clamp(max=torch.finfo(x.dtype).max)).double()
                    ours = (x >= threshold) & (x > float("-inf"))
                    if not torch.equal(ours, kept):  # only where the mass down to either is the mass wanted
                        assert which == "top_p", (b, threshold, x[kept].min())
                        mass = ((x - x.max()) / c["temperature"][b].double()).exp()
                        bounds = x[ours].min(), x[kept].min()
                        for down_to in (mass[x >= max(bounds)].sum(), mass[x > min(bounds)].sum()):
                            assert abs(down_to / (c["top_p"][b].double() * mass.sum()) - 1) < 3e-6, (b, bounds)
                    else:
                        top = weights[b, 0].max()
                        assert abs(log2_sum - (weights[b, 0] - top).exp().sum().log2().item()) < 2e-6, b
        finally:
            extension.set_multiprocessors(3)


@pytest.mark.parametrize("which", ["top_k", "top_p"])
def test_sums_that_fill_their_words(seed, extension, which):
    """A row of equal logits, long enough for 32 bits of a lane's sum to overflow if nobody took it before."""
    vocab = 8 * 512 * 128 + 1
    c = wide_case(vocab, "equal", torch.float32, which)
    c = {name: t if t is None else t[1:2].clone() for name, t in c.items()}
    c["target_logits"][0, 0, ::2] = 1.5
    call = arguments(c, "rejection", VocabShard(vocab, vocab))
    extension.set_multiprocessors(0)  # a cluster only because the row is long
    try:
        call.whole()
    finally:
        assert extension.set_multiprocessors(3) == 8
    threshold, log2_sum = extension.row(prepared(extension, call), 0)
    share = math.exp(0.25) / (1 + math.exp(0.25))
    assert 0.5 < share < 0.6 and (c["top_p"] is None or c["top_p"] == 0.5)
    assert threshold == 1.5 and abs(log2_sum - math.log2(vocab // 2 + 1)) < 2e-6


def test_a_rank_that_never_comes_ends_the_call(seed, extension):
    c = make_case(4, 2, 100, ("top_p",), mixed=False)
    calls = shards(c, 2, 100, "rejection")
    with pytest.raises(RuntimeError, match="waited in vain for rank 1"):
        extension.verify_ranks(*[[prepared(extension, call) for call in calls]] * 2, absent=1)
    assert ((calls[0].tokens >= -1) & (calls[0].tokens < 100)).all()  # nothing that is no token
