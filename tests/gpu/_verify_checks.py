"""Rounds of verification on the GPU, and the comparison of the kernels' tokens with the float64 reference's.

The kernels' sums are in fp32: where the reference's own decision changes when its logits move by `NEAR`, either result
is right. Such requests are counted, and there may be very few of them.
"""

import torch

import fused_parallel as fp
from fused_parallel.ops.verify import verify

NEAR = 3e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


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


def both(inputs, op=verify, **options):
    with fp.use("fused"):
        ours = op(**inputs, return_logprobs=True, **options)
    with fp.use("reference"):
        reference = op(**inputs, return_logprobs=True, **options)
    return ours, reference


def near_tie(inputs, request, tokens, options, op=verify):
    """Whether the reference itself gives `tokens` for logits that are off by NEAR or less."""
    one = {name: t[request : request + 1] if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    for _ in range(16 if op is verify else 32):  # trees decide more often
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
            if torch.equal(op(**moved, **options).tokens[0], tokens):
                return True
    return False


def check(inputs, most_ties=1, op=verify, **options):
    """Raise unless the kernels of `op`, verify or verify_tree, give the reference's tokens, or a near tie's; the
    kernels' result."""
    ours, reference = both(inputs, op, **options)
    wrong = (ours.tokens != reference.tokens).any(1).nonzero()[:, 0].tolist()
    assert len(wrong) <= most_ties, f"{len(wrong)} of {len(ours.tokens)} requests differ: {wrong[:20]}"
    for request in wrong:
        assert near_tie(inputs, request, ours.tokens[request], options, op), (
            f"request {request}: {ours.tokens[request].tolist()} but {reference.tokens[request].tolist()}, no tie"
        )
    same = torch.ones(len(ours.tokens), dtype=torch.bool, device="cuda")
    same[wrong] = False
    assert torch.equal(ours.num_accepted[same], reference.num_accepted[same])
    assert ours.path is None or torch.equal(ours.path[same], reference.path[same])
    torch.testing.assert_close(ours.logprobs[same], reference.logprobs[same], rtol=2e-6, atol=2e-5)
    print(f"{len(wrong)} near ties in {len(ours.tokens)} requests")
    return ours
