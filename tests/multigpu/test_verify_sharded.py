"""Verification of a vocabulary spread over real GPUs: the unsharded kernels' tokens, the same bits on all ranks, in
graphs, between other collectives, and through torch.distributed where the peers' memory is not to be had."""

import warnings

import pytest
import torch
from _llama_ranks import save_random_model

import fused_parallel as fp
from fused_parallel.ops import _dispatch
from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.testing.spawn import run_ranks

VOCAB = 40_001  # the last shard has padding, and the second begins with an odd id


def make_round(seed, batch, k, vocab, full, filters, dtype=torch.bfloat16):
    """A round over the whole vocabulary, the same on every rank: drawn on the CPU."""
    g = torch.Generator().manual_seed(seed)
    target = (torch.randn(batch, k + 1, vocab, generator=g) * 3).to(dtype)
    draft = (target[:, :k].float() + torch.randn(batch, k, vocab, generator=g)).to(dtype)
    noise = -torch.log(-torch.log(torch.rand(batch, k, vocab, generator=g)))
    on = torch.rand(4, batch, generator=g)
    out = dict(
        target_logits=target,
        draft_tokens=(draft.float() + noise).argmax(-1),
        draft_logits=draft if full else None,
        seed=torch.randint(0, 2**62, (batch,), generator=g),
        step=torch.randint(0, 2**40, (batch,), generator=g),
        temperature=(0.3 + torch.rand(batch, generator=g)) * (on[0] > 0.2),
        num_draft_tokens=torch.randint(-1, k + 2, (batch,), generator=g, dtype=torch.int32),
    )
    if filters:
        out |= dict(
            top_k=torch.randint(1, 100, (batch,), generator=g) * (on[1] > 0.5),
            top_p=torch.rand(batch, generator=g) * (on[2] > 0.3),
            min_p=torch.rand(batch, generator=g) ** 3 * (on[3] > 0.5),
        )
    return {name: t if t is None else t.cuda() for name, t in out.items()}


def share(inputs, rank, world):
    width = -(-VOCAB // world)

    def part(x):
        wide = torch.full((*x.shape[:2], width * world), 30.0, dtype=x.dtype, device=x.device)
        wide[..., :VOCAB] = x
        return wide[..., rank * width : (rank + 1) * width].contiguous()

    return inputs | {n: part(inputs[n]) for n in ("target_logits", "draft_logits") if inputs[n] is not None}


def compare(mesh, peers: bool):
    """Every method, eager and replayed; (differing requests, all requests) and the tokens."""
    group = mesh["tp"]
    rank, world = group.get_local_rank(), group.size()
    why_no_peers = kernel._why_no_peers
    if not peers:
        kernel._why_no_peers = lambda part, records: "the test says so"
    differ, count, tokens = 0, 0, []
    try:
        with torch.no_grad(), fp.use("fused"):
            for call, (method, full, filters) in enumerate(
                (m, f, x) for m in kernel.METHODS for f in (True, False) for x in ((False, True) if peers else (False,))
            ):
                static = make_round(call, 48, 4, VOCAB, full, filters)
                mine = share(static, rank, world)
                options = dict(method=method, vocab_size=VOCAB, vocab_group=group, return_logprobs=True)
                eager = fp.verify(**mine, **options)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = fp.verify(**mine, **options)
                for step in range(4):
                    inputs = make_round(1000 + 10 * call + step, 48, 4, VOCAB, full, filters)
                    for name, value in share(inputs, rank, world).items():
                        if value is not None:
                            mine[name].copy_(value)
                    for t in captured[:3]:
                        t.fill_(-77)
                    torch.cuda._sleep(200_000 * ((step + rank) % 2))  # one rank is late
                    fp.all_reduce(torch.ones(100, device="cuda"), group=group)  # of the same counters
                    graph.replay()
                    eager = fp.verify(**mine, **options)
                    for a, b in zip(captured[:3], eager[:3], strict=True):
                        assert torch.equal(a, b), (method, full, filters, step)
                    whole = fp.verify(**inputs, method=method, return_logprobs=True)
                    same = (whole.tokens == eager.tokens).all(1)
                    differ, count = differ + int((~same).sum()), count + len(same)
                    torch.testing.assert_close(eager.logprobs[same], whole.logprobs[same], rtol=2e-6, atol=2e-5)
                    tokens.append(torch.stack((eager.tokens, eager.logprobs.view(torch.int32).long())).cpu())
            row = make_round(7, 48, 0, VOCAB, False, False)
            rest = {n: row[n] for n in ("seed", "step", "temperature")}
            logits = share(row, rank, world)["target_logits"][:, 0]
            drawn = fp.sample(logits, **rest, vocab_size=VOCAB, vocab_group=group)
            differ += int((drawn != fp.sample(row["target_logits"][:, 0], **rest)).sum())
            tokens.append(drawn.cpu())
        fp.check()
    finally:
        kernel._why_no_peers = why_no_peers
    return differ, count, tokens


@pytest.mark.parametrize("peers", [True, False], ids=["peers", "torch.distributed"])
def test_equals_the_unsharded_kernels(peers):
    results = run_ranks(compare, 2, peers, device="cuda")
    differ, count, tokens = results[0]
    assert differ <= 1 + count // 500, f"{differ} of {count} requests differ"  # near ties
    for a, b in zip(tokens, results[1][2], strict=True):
        assert torch.equal(a, b)


def trees(mesh):
    """(differing requests, all) of trees over shards against the whole vocabulary, and the tokens and paths."""
    group, differ, count, results = mesh["tp"], 0, 0, []
    rank, world = group.get_local_rank(), group.size()
    parents = torch.tensor([-1, -1, 0, 0, 1], device="cuda")
    with torch.no_grad(), fp.use("fused"):
        for call, full in enumerate((True, False)):
            inputs = make_round(50 + call, 40, 5, VOCAB, full, False)
            inputs |= {"draft_logits": inputs["draft_logits"][:, :1].expand(-1, 5, -1).contiguous()} if full else {}
            options = {"siblings": "without_replacement" if full else "deterministic", "max_depth": 2}
            whole = fp.verify_tree(**inputs, parents=parents, **options)
            mine = share(inputs, rank, world)
            got = fp.verify_tree(**mine, parents=parents, vocab_size=VOCAB, vocab_group=group, **options)
            differ += int((~((whole.tokens == got.tokens).all(1) & (whole.path == got.path).all(1))).sum())
            count += len(got.tokens)
            results += [got.tokens.cpu(), got.path.cpu()]
    fp.check()
    return differ, count, results


def test_trees_over_shards():
    results = run_ranks(trees, 2, device="cuda")
    differ, count, _ = results[0]
    assert differ == 0 and count == 80  # the same kernel on the same logits
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(a, b)


def generation(mesh, path, options):
    """Speculative generation over shards, and what it warned of verification."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.bfloat16)
    prompts = [[5, 17, 200, 3, 17, 200], [9, 9, 9]]
    _dispatch._told.clear()  # a reason is told once a process, and earlier tests may have asked for one
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = fp.generate(model, prompts, 40, draft="ngram", num_draft_tokens=3, temperature=0.8, seed=11, **options)
    return out.tokens, [str(w.message) for w in told if str(w.message).startswith(("verify:", "sample:"))]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"cuda_graph": True}], ids=["plain", "top_p", "graph"])
def test_generation_verifies_in_the_kernels(options, tmp_path):
    pytest.importorskip("transformers")
    save_random_model(tmp_path, scale=3.0)
    results = run_ranks(generation, 2, str(tmp_path), options, device="cuda")
    assert results[0] == results[1]
    tokens, told = results[0]
    assert told == []
    assert all(0 <= t < 263 for sequence in tokens for t in sequence)
