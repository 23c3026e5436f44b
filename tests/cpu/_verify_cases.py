"""Random rounds of verification for the tests, the plain Python result of each request, and their comparison."""

from __future__ import annotations

import _verify_oracle as oracle
import pytest
import torch

from fused_parallel.ops._dispatch import use
from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import verify
from fused_parallel.ops.verify_tree import verify_tree


def case(batch, k, vocab, *, dtype=torch.float32, filters=True, ragged=True, mixed=True, invalid=True, full_q=True):
    """Keyword arguments of `verify` for a round whose drafts come from a draft near the target (torch's seed)."""
    shape = (batch, k + 1, vocab)
    target = (torch.randn(shape) * 2).to(dtype)
    draft = (target[:, :k].float() + torch.randn(batch, k, vocab)).to(dtype)
    draft[torch.rand(draft.shape) < 0.05] = float("-inf")
    seed = torch.randint(-(2**63), 2**63 - 1, (batch,))
    step = torch.randint(0, 2**40, (batch,))
    with use("reference"):  # on the CPU, whatever the caller asks for
        tokens = [sample(draft[:, i], seed=seed, step=step, temperature=1.0, position=i) for i in range(k)]
    tokens = torch.stack(tokens, 1) if k else torch.empty(batch, 0, dtype=torch.int64)
    if invalid:
        bad = torch.tensor([-1, vocab, vocab + 7, -(2**40), 2**40])[torch.randint(5, tokens.shape)]
        tokens = torch.where(torch.rand(tokens.shape) < 0.05, bad, tokens)
    temperature = torch.rand(batch) * 1.5 + 0.2
    if mixed:
        temperature[torch.rand(batch) < 0.25] = 0.0
        greedy = temperature == 0
        tokens[greedy] = torch.where(torch.rand(tokens.shape) < 0.7, target[:, :k].argmax(-1), tokens)[greedy]
    out = dict(
        target_logits=target, draft_tokens=tokens, draft_logits=draft if full_q else None,
        seed=seed, step=step, temperature=temperature,
    )  # fmt: skip
    if ragged:
        out["num_draft_tokens"] = torch.randint(-1, k + 2, (batch,), dtype=torch.int32)
    if filters:
        some = torch.rand(3, batch) < 0.6
        out["top_k"] = torch.randint(1, vocab + 3, (batch,)) * some[0]
        out["top_p"] = torch.rand(batch) * some[1]
        out["min_p"] = torch.rand(batch) * 0.3 * some[2]
    return out


def tree_case(batch, nodes, vocab, siblings, dtype=torch.float32, **options):
    """Like `case`, with random parents per request; siblings share their draft row."""
    c = case(batch, nodes, vocab, dtype=dtype, **options)
    parents = torch.stack([torch.randint(-1, j, (batch,)) for j in range(nodes)], 1) if nodes else c["draft_tokens"]
    if siblings == "deterministic":
        return c | {"draft_logits": None, "parents": parents, "siblings": siblings}
    by_parent = (c["target_logits"].float() + torch.randn(batch, nodes + 1, vocab)).to(dtype)
    by_parent[torch.rand(by_parent.shape) < 0.3] = float("-inf")  # some siblings have nothing left to be drawn from
    draft = by_parent.take_along_dim(parents[..., None] + 1, 1)
    drawn = (draft.float() - torch.empty(draft.shape).exponential_().log()).argmax(-1)
    tokens = torch.where(torch.rand(drawn.shape) < 0.8, drawn, c["draft_tokens"])
    return c | {"draft_logits": draft, "draft_tokens": tokens, "parents": parents, "siblings": siblings}


def targets(c, b, rows, vocab_size):
    """The oracle's target distributions of request b of a case."""
    options = [c[name][b].item() if name in c else 0 for name in ("top_k", "top_p", "min_p")]
    logits = c["target_logits"][b].float().tolist()
    return [oracle.Target(logits[i], c["temperature"][b].item(), *options, vocab_size) for i in range(rows)]


def expected(c, b, method, vocab_size):
    """The oracle's (tokens, accepted, logprobs) of request b of a case."""
    drafts = c["draft_tokens"][b].tolist()
    k = len(drafts)
    if "num_draft_tokens" in c:
        k = min(max(c["num_draft_tokens"][b].item(), 0), k)
    rows = [None] * k if c["draft_logits"] is None else c["draft_logits"][b].float().tolist()[:k]
    if method == "greedy":
        c = c | {"temperature": torch.zeros_like(c["temperature"])}
    return oracle.verify(
        targets(c, b, k + 1, vocab_size), drafts[:k], rows, c["seed"][b].item(), c["step"][b].item(), method, vocab_size
    )


def check(case, method, vocab_size=None):
    """All of the result equals the oracle's; returns the mean number accepted."""
    result = verify(**case, method=method, vocab_size=vocab_size, return_logprobs=True)
    batch, rows, width = case["target_logits"].shape
    assert result.tokens.shape == result.logprobs.shape == (batch, rows)
    assert (result.tokens.dtype, result.num_accepted.dtype) == (torch.int64, torch.int32)
    assert result.logprobs.dtype == torch.float32
    for b in range(batch):
        tokens, accepted, logprobs = expected(case, b, method, vocab_size or width)
        empty = rows - len(tokens)
        assert result.tokens[b].tolist() == tokens + [-1] * empty, b
        assert result.num_accepted[b] == accepted, b
        assert result.logprobs[b].tolist() == pytest.approx(logprobs + [0.0] * empty, rel=1e-6, abs=1e-6), b
    return result.num_accepted.double().mean().item()


def check_tree(case, vocab_size=None, max_depth=None):
    """All of the result equals the oracle's; returns how many accepted paths leave the first children."""
    result = verify_tree(**case, vocab_size=vocab_size, max_depth=max_depth, return_logprobs=True)
    batch, nodes = case["draft_tokens"].shape
    width = case["target_logits"].shape[2]
    depth = nodes if max_depth is None else max_depth
    assert result.tokens.shape == result.logprobs.shape == (batch, depth + 1)
    assert result.path.shape == (batch, depth)
    assert (result.num_accepted.dtype, result.path.dtype) == (torch.int32, torch.int64)
    others = 0
    for b in range(batch):
        drafts = case["draft_tokens"][b].tolist()
        if "num_draft_tokens" in case:
            n = min(max(case["num_draft_tokens"][b].item(), 0), nodes)
            drafts[n:] = [-1] * (nodes - n)
        parents = case["parents"].expand(batch, nodes)[b].tolist()
        rows = None if case["draft_logits"] is None else case["draft_logits"][b].float().tolist()
        tokens, path, logprobs = oracle.verify_tree(
            targets(case, b, nodes + 1, vocab_size or width), drafts, parents, rows, case["seed"][b].item(),
            case["step"][b].item(), vocab_size or width, depth,
        )  # fmt: skip
        empty = depth - len(path)
        assert result.path[b].tolist() == path + [-1] * empty, b
        assert result.tokens[b].tolist() == tokens + [-1] * empty, b
        assert result.num_accepted[b] == len(path), b
        assert result.logprobs[b].tolist() == pytest.approx(logprobs + [0.0] * empty, rel=1e-6, abs=1e-6), b
        others += any(parents.index(parents[node]) != node for node in path)
    return others
