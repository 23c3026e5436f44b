"""Filters and vocabularies spread over ranks in the kernels of verify: filters against the float64 reference, shards
against the kernels on the whole vocabulary."""

import math

import pytest
import torch
from _verify_checks import DTYPES, check, make_round, near_tie
from _virtual_ranks import VirtualRanks

import fused_parallel as fp
from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.ops.verify import METHODS, verify
from fused_parallel.reference.vocab_shard import VocabShard


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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


WIDE = ("normal", "equal", "nearly equal", "spike", "few", "nan")


def wide_round(batch, vocab, dtype, spread):
    """Rows whose weight lies in the first intervals of the filters' search, in its tail, in one of them; temperatures
    of 0.1 to 100."""
    inputs = make_round(batch, 1, vocab, dtype, greedy=0.0)
    target = inputs["target_logits"]
    if spread == "equal":
        target[:] = 1.25
    elif spread == "nearly equal":
        target *= 0.01
    elif spread == "spike":  # half of the weight, or nearly all, and the rest in equal logits
        target[:] = -3.0
        target[::2, :, vocab // 2] = -3.0 + math.log(vocab)
        target[1::2, :, vocab // 3] = 15.0
    elif spread == "few":
        target[:, :, 3:-2] = float("-inf")
    elif spread == "nan":
        target[..., ::3], target[..., 1::5] = float("nan"), float("-inf")
        target[::4, :, 7] = float("inf")
    at = torch.arange(batch, device="cuda")
    inputs["temperature"] = torch.tensor([1.0, 1.0, 0.1, 100.0], device="cuda")[at % 4]
    # 5 and 3 have no factor in common with 4: all combinations occur.
    inputs["top_p"] = torch.tensor([1e-6, 0.5, 0.9, 0.9999, 1 - 2.0**-24], device="cuda")[at % 5]
    inputs["top_k"] = torch.tensor([1, 50, vocab], device="cuda")[at % 3]
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [8, 1000, 32000, 128256, 128257])
@pytest.mark.parametrize("spread", WIDE)
def test_filters_of_few_rows_and_of_many(seed, spread, vocab, dtype):
    """Batches whose rows are shared by 8, 4, 2 CTAs and by none: each request has the bits that it has alone, and the
    reference's tokens."""
    for name in ("top_p", "top_k"):
        inputs = wide_round(200, vocab, dtype, spread)
        del inputs["top_k" if name == "top_p" else "top_p"]
        with fp.use("fused"):
            many = verify(**inputs, return_logprobs=True)
            for first, count in ((0, 1), (7, 1), (3, 2), (10, 40), (60, 90), (50, 100)):
                some = {n: t if t is None else t[first : first + count] for n, t in inputs.items()}
                few = verify(**some, return_logprobs=True)
                for a, b in zip(few[:3], many[:3], strict=True):
                    assert torch.equal(a, b[first : first + count])
        part = {n: t if t is None else t[:40] for n, t in inputs.items()}  # float64 of all would take long
        check(part, most_ties=2)


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
        # Calls of other inputs in a row, through all generations of the slots: what is left of one would be taken for
        # the next one's.
        made = [add_filters(make_round(60, 3, vocab, dtype, full), *names) for _ in range(4)]
        rounds = [shard_calls(inputs, virtual.world, method) for inputs in made]
        for calls in rounds:
            run_shards(virtual, calls)
        for inputs, calls in zip(made, rounds, strict=True):
            check_shards(inputs, calls, method, ties=2)
