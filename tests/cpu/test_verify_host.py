"""The verification kernels, compiled for the host, against the float64 reference: filters, shards, exchanges."""

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
    results,
    run_whole,
    same_on_all_ranks,
    shards,
)

from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.reference.filters import target_weights
from fused_parallel.reference.vocab_shard import VocabShard

pytestmark = pytest.mark.usefixtures("host_kernels")


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


@pytest.mark.parametrize("batch,vocab,rounds", [(500, 2048, 1), (2, 6000, 60)])
def test_what_is_left_is_a_small_part(seed, extension, batch, vocab, rounds):
    """All tokens but the draft's keep 1e-4 of their weight, near what fp32 is allowed to be wrong by: so many may be
    the best that more are handed in than fit, by a CTA that has the row and by three that share it."""
    kept = 0
    for _ in range(rounds):
        c = make_case(batch, 1, vocab, (), mixed=False, ragged=False, invalid=False)
        c["temperature"][:] = 1.0
        row, token = c["target_logits"][:, 0], torch.randint(vocab, (batch, 1))
        others = row.scatter(1, token, -math.inf).logsumexp(-1, keepdim=True)
        row.scatter_(1, token, others - math.log(1e4))
        c["draft_logits"] = row.scatter_add(1, token, torch.full((batch, 1), math.log(2.0)))[:, None]
        c["draft_tokens"] = token
        got = run_whole(c, "rejection", vocab)
        check(c, got, "rejection", vocab)
        kept += got[1].sum().item()
    assert 0.3 < kept / (batch * rounds) < 0.7  # p / q = 1 / 2


def test_a_rank_that_never_comes_ends_the_call(seed, extension):
    c = make_case(4, 2, 100, ("top_p",), mixed=False)
    calls = shards(c, 2, 100, "rejection")
    with pytest.raises(RuntimeError, match="waited in vain for rank 1"):
        extension.verify_ranks(*[[prepared(extension, call) for call in calls]] * 2, absent=1)
    assert ((calls[0].tokens >= -1) & (calls[0].tokens < 100)).all()  # nothing that is no token
