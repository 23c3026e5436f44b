"""Trees of drafts in fp.generate: plain decoding's tokens in every arrangement, their distribution, what is cached."""

import _llama_ranks as ranks
import pytest
import torch
from _verify_rounds import p_value as chi_square

import fused_parallel as fp
from fused_parallel.speculative.round import Round
from fused_parallel.speculative.tree import Tree
from fused_parallel.testing.spawn import run_ranks

PROMPTS = ranks.OFFLOAD_PROMPTS
NEW = 24
SKEWED = (-1, -1, -1, 0, 0, 1, 3, 3, 6)
TREES = ((3, 2, 1), (4,), (1, 1, 1), SKEWED)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target directory, draft directory): the draft is the target with noise on its weights."""
    path, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    ranks.save_noisy_pair(path, draft)
    return path, draft


def test_shapes():
    tree = Tree((2, 2, 1))
    assert tree.parents == [-1, -1, 0, 0, 1, 1, 2, 3, 4, 5] and tree.depth == 3 and tree.nodes == 10
    assert [list(tree.level(d)) for d in (1, 2, 3)] == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    assert Tree(SKEWED).depths == [1, 1, 1, 2, 2, 2, 3, 3, 4] and list(Tree(SKEWED).children(3)) == [6, 7]
    assert Tree((1, 1, 1)).parents == Tree((-1, 0, 1)).parents
    for row, ancestors in ((0, {0}), (1, {0, 1}), (5, {0, 5, 1}), (9, {0, 9, 7, 4, 1})):
        assert set(Tree(SKEWED).sees[row].nonzero().flatten().tolist()) == ancestors


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_greedy_equals_plain_decoding(pair, tp, pp):
    path, draft = pair
    ((expected, _),) = run_ranks(ranks.generated, 1, path, None, PROMPTS, NEW)
    for tree in TREES:
        for tokens, stats in run_ranks(
            ranks.generated, tp * pp, path, draft, PROMPTS, NEW, tp=tp, pp=pp, num_draft_tokens=tree
        ):
            assert tokens == expected
            assert stats["accepted"] > 0 and stats["rounds"] < NEW - 1
            assert set(stats["rounds_by_length"]) == {Tree(tree).nodes}


@pytest.mark.parametrize("tp", [1, 2])
def test_offloaded(pair, tp):
    path, draft = pair
    expected = run_ranks(ranks.offloaded, tp, path, None, None, tp=tp)[0][0]
    for tokens, stats, host, _ in run_ranks(
        ranks.offloaded, tp, path, draft, fp.Offload(), tp=tp, num_draft_tokens=(3, 2, 1)
    ):
        assert tokens == expected and stats["streamed_bytes"] == (stats["rounds"] + 1) * host


def test_a_perfect_draft_fills_every_path(pair):
    path, _ = pair
    ((tokens, stats),) = run_ranks(ranks.generated, 1, path, path, PROMPTS, 21, num_draft_tokens=SKEWED)
    ((expected, _),) = run_ranks(ranks.generated, 1, path, None, PROMPTS, 21)
    # Both 0, 3, 6 and 8: the most likely child of each. 20 tokens after the first, 5 a round.
    assert tokens == expected and stats["rounds"] == 4


@pytest.mark.parametrize("draft", ["tiny", "shared"])
def test_a_chain_and_its_tree_are_the_same(pair, draft):
    """Widths of one are a chain: the same tokens, drafts and rounds, sampled or not."""
    path, noisy = pair
    for options in ({}, {"temperature": 0.8, "seed": [4, 5, 6]}, {"temperature": [0.0, 1.0, 0.5], "top_p": 0.9}):
        args = (ranks.generated, 1, path, noisy if draft == "tiny" else path, PROMPTS, NEW)
        ((tokens, stats),) = run_ranks(*args, num_draft_tokens=(1, 1, 1), **options)
        ((chain, of_chain),) = run_ranks(*args, num_draft_tokens=3, **options)
        assert tokens == chain
        assert [stats[n] for n in ("rounds", "accepted")] == [of_chain[n] for n in ("rounds", "accepted")]


def test_sampling_does_not_depend_on_batch_or_ranks(pair):
    path, draft = pair
    options = {"temperature": 0.8, "top_p": 0.95, "num_draft_tokens": (3, 2)}
    args = (path, draft, PROMPTS, NEW)
    ((whole, _),) = run_ranks(ranks.generated, 1, *args, seed=[11, 12, 13], **options)
    for tp, pp in ((2, 1), (1, 2)):
        for tokens, _ in run_ranks(ranks.generated, 2, *args, tp=tp, pp=pp, seed=[11, 12, 13], **options):
            assert tokens == whole
    ((alone, _),) = run_ranks(ranks.generated, 1, path, draft, PROMPTS[1:2], NEW, seed=12, **options)
    assert alone == whole[1:2]


def test_mixed_temperatures(pair):
    path, draft = pair
    ((plain, _),) = run_ranks(ranks.generated, 1, path, None, PROMPTS, NEW)
    options = {"temperature": [0.0, 1.0, 0.0], "num_draft_tokens": (3, 2, 1)}
    ((tokens, _),) = run_ranks(ranks.generated, 1, path, draft, PROMPTS, NEW, **options)
    assert tokens[0] == plain[0] and tokens[2] == plain[2] and tokens[1] != plain[1]


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """A random pair over 16 tokens, of which the draft is another model altogether."""
    paths = [tmp_path_factory.mktemp(name) for name in ("target16", "draft16")]
    for i, path in enumerate(paths):
        ranks.save_random_model(path, seed=i, scale=1.5, vocab_size=16, num_hidden_layers=1 + (i == 0))
    return paths


@pytest.mark.parametrize(("tree", "filters"), [((3, 2), {}), ((-1, -1, 0, 0, 0, 2), {"top_k": 6})])
def test_trees_keep_the_distribution(sixteen, tree, filters):
    """The two tokens after the first, which a tree's round gives, or two rounds: jointly, against the target's exact
    law. Most likely siblings that pass for drawn ones must fail it."""
    target = fp.LlamaForCausalLM.from_pretrained(sixteen[0], mesh=fp.init(device="cpu"))
    draft = fp.LlamaForCausalLM.from_pretrained(sixteen[1], mesh=None)
    count, prompt = 10_000, [3, 1, 4]
    law = _joint_law(target, prompt, 3, filters.get("top_k")).view(16, 256).sum(0)
    options = {"temperature": 1.0, "draft": draft, "num_draft_tokens": tree, "seed": 10**6, **filters}
    result = fp.generate(target, [prompt] * count, 3, **options)
    assert result.stats.accepted > count / 4
    assert chi_square(torch.tensor([row[1:] for row in result.tokens]), law) > 1e-5
    usual = fp.ops.sample
    fp.ops.sample = lambda logits, **given: usual(logits, **given | {"temperature": 0.0})
    try:
        wrong = fp.generate(target, [prompt] * count, 3, **options)
    finally:
        fp.ops.sample = usual
    assert chi_square(torch.tensor([row[1:] for row in wrong.tokens]), law) < 1e-5


def _joint_law(model, prompt, length, top_k):
    """Of the `length` tokens after the prompt, float64 [16 ** length]."""
    prefixes, law = torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    for _ in range(length):
        ids = torch.cat((torch.tensor(prompt).expand(len(prefixes), -1), prefixes), 1)
        logits = model(ids)[:, -1].double()
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        law = (law[:, None] * logits.softmax(-1)).flatten()
        tokens = torch.arange(16).repeat(len(prefixes))[:, None]
        prefixes = torch.cat((prefixes.repeat_interleave(16, 0), tokens), 1)
    return law


def cached(mesh, path, draft, tree, temperature):
    """After rounds with trees: the largest difference of the caches' keys and values from those of the same tokens fed
    in one piece, on this rank, and the draft's."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32)
    drafter = fp.LlamaForCausalLM.from_pretrained(draft, mesh=None, dtype=torch.float32)
    ids = torch.tensor([[5, 17, 200, 3], [9, 8, 7, 6]])
    round_ = Round(
        model, drafter, Tree(tree).nodes, 2, 80, seed=torch.tensor([1, 2]), temperature=torch.tensor(temperature),
        sampling={}, method="rejection", tree=Tree(tree),
    )  # fmt: skip
    with torch.inference_mode():
        round_.prefill(ids, torch.tensor([4, 4], dtype=torch.int32))
        accepted = 0
        for _ in range(6):
            round_.run()
            accepted += int(round_.accepted.sum())
        worst = []
        longest = int(round_.cache.lens.max())
        for owner, cache, behind in ((model, round_.cache, 0), (drafter, round_.drafter and round_.drafter.cache, 1)):
            if cache is None:
                continue
            again = owner.make_cache(2, longest)
            owner(round_.history[:, :longest].clamp(min=0), again)  # -1: behind the shorter ones
            for b, lens in enumerate(round_.cache.lens.tolist()):
                for got, expected in ((cache.k, again.k), (cache.v, again.v)):
                    # The draft has not seen the last accepted token, if that had no children.
                    at = slice(0, lens - behind)
                    worst.append(float((got[:, b, at] - expected[:, b, at]).abs().max()))
    return max(worst), accepted


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_caches_hold_the_accepted_path(pair, tp, pp, temperature):
    path, draft = pair
    for tree in ((3, 2, 1), SKEWED):
        args = (path, draft, tree, [temperature, temperature])
        for worst, accepted in run_ranks(cached, tp * pp, *args, tp=tp, pp=pp):
            assert accepted > 0 and worst < 1e-4


def test_bad_input(pair):
    path, draft = pair
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=fp.init(device="cpu"))
    drafter = fp.LlamaForCausalLM.from_pretrained(draft, mesh=None)
    for tree, options, message in (
        ((), {}, "a tree's widths must be at least 1 each, got \\[\\]"),
        ((2, 0), {}, "widths must be at least 1 each, got \\[2, 0\\]"),
        ((2, 1.5), {}, "a sequence of integers, widths or parents"),
        ((8, 8), {}, "at most 63 nodes, more than that with widths \\[8, 8\\]"),
        ([-1] * 64, {}, "at most 63 nodes, got 64"),
        ((-1, 1), {}, "node 1 of a tree follows 1, which is no node before it"),
        ((-1, 0, -1), {}, "in the order of their parents, got \\[-1, 0, -1\\]"),
        ((2, 2), {"method": "block"}, "trees have one rule of verification"),
        ((2, 2), {"microbatches": 2}, "trees need microbatches=1, got 2"),
        ((2, 2), {"draft": "ngram"}, "trees are drafted by a model, not by n-grams"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fp.generate(model, PROMPTS, 3, **{"draft": drafter, "num_draft_tokens": tree} | options)
