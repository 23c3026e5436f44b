"""Calls of the verification kernels compiled for the host, and what they are compared with."""

import _verify_cases as cases
import _verify_ranks as ranks
import torch

from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.reference import verify as reference
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


def compare(got, want, is_tie, most_ties=1):
    """Tokens, accepted and logprobs against the reference's; `most_ties` requests may differ where is_tie(request,
    tokens) says so. Which requests are the same."""
    differ = (got[0] != want[0]).any(1).nonzero()[:, 0].tolist()
    assert len(differ) <= most_ties, f"{len(differ)} of {len(got[0])} requests differ: {differ[:20]}"
    for request in differ:
        assert is_tie(request, got[0][request]), (
            f"request {request}: {got[0][request].tolist()}, expected {want[0][request].tolist()}"
        )
    same = torch.ones(len(got[0]), dtype=torch.bool)
    same[differ] = False
    assert torch.equal(got[1][same], want[1][same])
    torch.testing.assert_close(got[2][same], want[2][same], rtol=2e-6, atol=2e-5)
    return same


def check(c, got, method, vocab, most_ties=1):
    want = expected(c, method, vocab)
    compare(got, want, lambda request, tokens: near_tie(c, request, tokens, method, vocab), most_ties)


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


def prepared(extension, call):
    return extension.arguments(*call.arguments(kernel.ALL))
