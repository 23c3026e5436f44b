"""Top-k, top-p and min-p of the verification kernels, compiled for the host, against the reference."""

import math

import pytest
import torch
from _verify_host import (
    FILTERS,
    SETS,
    arguments,
    check,
    make_case,
    prepared,
    run_whole,
    same_on_all_ranks,
)
from _verify_host import shards as cut_into_shards

from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.reference.filters import target_weights
from fused_parallel.reference.vocab_shard import VocabShard

pytestmark = pytest.mark.usefixtures("host_kernels")


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


VALUES = 512  # of csrc/verify_values.cuh: from the greatest logit down so many are counted


def neighbours(value, count):
    """The bfloat16 `count` places below `value`, in the order of numbers, -0 left out."""
    key = torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item()
    order = max((key if key >= 0 else -32768 - key) - count, -0x7F7F)  # that of the least finite value
    key = order if order >= 0 else -32768 - order
    return torch.tensor(key, dtype=torch.int16).view(torch.bfloat16).item()


@pytest.mark.parametrize("spread", ["normal", "flat", "around zero", "negative", "equal", "spike", "nan", "lowest"])
def test_values_counted_one_by_one(seed, extension, spread):
    """top-k, top-p and min-p of rows in bfloat16, by one count of each value, in float64; and where that is not enough
    it says so. Aligned rows and others, lists that suffice and not."""
    width, seen = 5 * 2048 + 3, {"found": 0, "further down": 0}
    rows = {"normal": (9.0, 3.0), "flat": (8.0, 0.02), "around zero": (0.0, 1.0), "negative": (-9.0, 1.0)}
    shift, size = rows.get(spread, (5.0, 3.0))
    for turn in range(24):
        x = shift + size * torch.randn(width)
        if spread == "equal":
            x[:] = 1.25
        elif spread == "spike":
            x[turn * 100] = x.max() + [0.5, 8.0][turn % 2]
        elif spread == "nan":
            x[::3], x[1::5] = math.nan, -math.inf
        elif spread == "lowest":  # a row that is masked with the least value, or next to it: no 512 values are below
            x[:] = torch.finfo(torch.bfloat16).min
            if turn % 2:
                x[turn::7] *= 0.3
        x = x.bfloat16()
        scale = torch.tensor([1.0, 0.7, 2.5][turn % 3] * math.log2(math.e)).item()
        clean = x.float().nan_to_num(-math.inf).double()
        top = clean.max().item()
        weights = ((clean - top) * scale).exp2()
        whole = weights.sum().item()
        likely = clean.topk(width // 20).values[-1].item() if turn % 4 else -torch.finfo(torch.float32).max
        top_k = [0, 1, 40, width // 10, width][turn % 5]
        top_p = [0.0, 0.3, 0.9, 0.99999, 1e-6, 1.0, 0.6][turn % 7]
        if spread == "lowest" and turn < 12:
            top_k, top_p = 0, 0.0
        min_p = [-math.inf, top - 2.0, top][turn % 3]
        if top_k == 0 and not 0 < top_p < 1:
            min_p = torch.tensor(top - 0.5).bfloat16().item()
            likely = min_p
        elif min_p > -math.inf:
            min_p = torch.tensor(min_p).bfloat16().item()
        counted = clean >= max(likely, neighbours(top, VALUES - 1))
        least = -math.inf
        if top_k:
            values = clean[counted].sort(descending=True).values
            least = values[top_k - 1].item() if len(values) >= top_k else math.nan
        if 0 < top_p < 1 and not math.isnan(least):
            values = clean[counted & (clean >= least)].sort(descending=True).values.unique_consecutive()
            down_to = torch.stack([weights[clean >= v].sum() for v in values])
            goal = torch.tensor(top_p, dtype=torch.float32).double() * (down_to[-1] if top_k else whole)
            assert ((down_to / goal - 1).abs() > 3e-6).all(), "a near tie: another seed"
            least = values[(down_to < goal).sum()].item() if down_to[-1] >= goal else math.nan
        got = extension.selected(x, turn % 2, scale, whole, likely, top_k, top_p, min_p)
        seen["further down" if got is None else "found"] += 1
        if math.isnan(least) or (top_k == 0 and not 0 < top_p < 1 and min_p < neighbours(top, VALUES - 1)):
            assert got is None, turn
            continue
        least = max(least, min_p)
        assert got is not None and got[0] == least, (turn, got, least)
        assert abs(got[1] / weights[clean >= least].sum().item() - 1) < 1e-6
    if spread != "around zero":
        assert seen["found"] > 4
    if spread not in ("spike", "equal", "lowest"):
        assert seen["further down"] > 2


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("which", ["top_k", "top_p", "min_p", "all"])
def test_counting_values_keeps_what_rounds_keep(seed, extension, which, shards):
    """The same logits in bfloat16, whose values are counted, and in float32, which are not: the same tokens."""
    batch, vocab = 40, 6000
    c = make_case(batch, 2, vocab, SETS[which], mixed=False)
    for name in ("target_logits", "draft_logits"):
        c[name] = (c[name] * 3).bfloat16()
    wide = {**c, **{name: c[name].float() for name in ("target_logits", "draft_logits")}}
    both = []
    for case in (c, wide):
        if shards == 1:
            both.append(run_whole(case, "rejection", vocab))
        else:
            calls = cut_into_shards(case, shards, vocab, "rejection")
            extension.verify_ranks([extension.arguments(*call.arguments(kernel.ALL)) for call in calls])
            both.append(same_on_all_ranks(calls))
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
    torch.testing.assert_close(both[0][2], both[1][2], rtol=2e-6, atol=2e-5)
    check(c, both[0], "rejection", vocab)


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
