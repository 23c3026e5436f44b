"""fp.verify_tree against plain Python, against fp.verify on chains, and its errors."""

import _verify_cases as cases
import pytest
import torch
from _verify_cases import check_tree as check
from _verify_cases import tree_case

from fused_parallel.ops.verify import verify
from fused_parallel.ops.verify_tree import SIBLINGS, verify_tree

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_equals_plain_python(seed, siblings, dtype):
    others = check(tree_case(150, 8, 11, siblings, dtype), vocab_size=9)
    others += check(tree_case(150, 8, 4, siblings, dtype, filters=False, mixed=False, invalid=False, ragged=False))
    assert others > 10  # paths through later siblings do occur
    check(tree_case(60, 6, 5, siblings, dtype), max_depth=2)


@pytest.mark.parametrize("siblings", SIBLINGS)
@pytest.mark.parametrize(("batch", "nodes", "vocab"), [(0, 3, 5), (3, 0, 5), (2, 1, 1), (1, 20, 3), (2, 3, 1025)])
def test_shapes(seed, siblings, batch, nodes, vocab):
    check(tree_case(batch, nodes, vocab, siblings))


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_chain_is_verify(seed, siblings):
    case = cases.case(200, 4, 13, invalid=False, full_q=siblings == "without_replacement")
    chain = verify(**case, return_logprobs=True)
    tree = verify_tree(**case, parents=torch.arange(4) - 1, siblings=siblings, return_logprobs=True)
    assert torch.equal(tree.tokens, chain.tokens)
    assert torch.equal(tree.num_accepted, chain.num_accepted)
    assert torch.allclose(tree.logprobs, chain.logprobs)
    length = torch.arange(4)
    assert torch.equal(tree.path, torch.where(length < chain.num_accepted[:, None], length, -1))


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_greedy_follows_argmaxes(seed, siblings):
    """At temperature 0 the path is the one along argmaxes, whichever sibling it goes through and whatever the draft."""
    vocab, parents = 6, torch.tensor([-1, -1, 0, 0, 1, 1])
    target = torch.randn(100, 7, vocab)
    tokens = torch.stack([torch.randperm(vocab)[:2] for _ in range(300)]).view(100, 6)
    draft = torch.full((100, 6, vocab), NAN) if siblings == "without_replacement" else None
    keys = torch.arange(100)
    got = verify_tree(target, tokens, parents, draft, seed=keys, step=keys, temperature=0.0, siblings=siblings)
    assert got.num_accepted.max() == 2
    for b in range(100):
        node, path, out = -1, [], []
        while True:
            best = target[b, node + 1].argmax().item()
            out.append(best)
            node = next((j for j in range(6) if parents[j] == node and tokens[b, j] == best), None)
            if node is None:
                break
            path.append(node)
        assert got.path[b].tolist() == path + [-1] * (6 - len(path))
        assert got.tokens[b].tolist() == out + [-1] * (7 - len(out))


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_same_in_any_batch_and_for_shared_parents(seed, siblings):
    case = tree_case(20, 5, 9, siblings)
    case["parents"] = torch.tensor([-1, -1, 0, 1, 2])
    whole = verify_tree(**case)
    order = torch.randperm(20)[:6]
    part = {
        name: value[order] if torch.is_tensor(value) and name != "parents" else value for name, value in case.items()
    }
    assert torch.equal(verify_tree(**part).tokens, whole.tokens[order])
    rows = verify_tree(**case | {"parents": case["parents"].expand(20, 5)})
    assert torch.equal(rows.tokens, whole.tokens)
    assert torch.equal(rows.path, whole.path)


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_nodes_out_of_order_are_never_reached(seed, siblings):
    case = tree_case(40, 4, 5, siblings)
    for parents in ([3, -2, 5, -7], [0, 1, 2, 3]):
        got = verify_tree(**case | {"parents": torch.tensor(parents)})
        assert got.num_accepted.tolist() == [0] * 40
        assert ((got.tokens[:, 0] >= 0) & (got.tokens[:, 0] < 5)).all()


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_nan_and_infinite_logits_stay_in_the_vocabulary(seed, siblings):
    case = tree_case(100, 5, 6, siblings)
    for name in ("target_logits", "draft_logits"):
        if case[name] is not None:
            for value in (NAN, -INF, INF):
                case[name][torch.rand(case[name].shape) < 0.1] = value
            case[name][torch.rand(case[name].shape[:2]) < 0.2] = NAN
    got = verify_tree(**case)
    kept = torch.arange(6) <= got.num_accepted[:, None]
    assert ((got.tokens >= 0) == kept).all()
    assert got.tokens.max() < 6


INT = dict(dtype=torch.int64)
Q = torch.zeros(2, 3, 5)
BAD = {
    "parents_shape": (dict(parents=torch.zeros(4, **INT)), ValueError, r"parents has shape \(4,\), expected \(3,\)"),
    "parents_batch": (dict(parents=torch.zeros(3, 3, **INT)), ValueError, r"parents has shape \(3, 3\), expected"),
    "parents_dtype": (dict(parents=torch.zeros(3).int()), TypeError, "parents has dtype torch.int32"),
    "parents_list": (dict(parents=[-1, 0, 1]), TypeError, "parents must be a tensor on cpu"),
    "siblings": (dict(siblings="top_k"), ValueError, "one of 'without_replacement', 'deterministic', got 'top_k'"),
    "no_draft": (dict(draft_logits=None), ValueError, "without_replacement.* needs draft_logits"),
    "draft": (dict(siblings="deterministic"), ValueError, r"takes no draft_logits, got shape \(2, 3, 5\)"),
    "depth": (dict(max_depth=4), ValueError, "max_depth must be between 0 and the tree's 3 nodes, got 4"),
    "depth_type": (dict(max_depth=1.5), TypeError, "max_depth must be an integer, got 1.5"),
    "target": (dict(target_logits=torch.zeros(2, 3, 5)), ValueError, r"draft_tokens has shape \(2, 3\), expected"),
    "seed": (dict(seed=1), TypeError, "verify_tree: seed must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    change, error, message = BAD[name]
    zeros = torch.zeros(2, **INT)
    arguments = dict(
        target_logits=torch.zeros(2, 4, 5), draft_tokens=torch.zeros(2, 3, **INT), parents=torch.arange(3) - 1,
        draft_logits=Q, seed=zeros, step=zeros, temperature=1.0,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        verify_tree(**arguments | change)


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_opcheck_and_compile(seed, siblings):
    case = tree_case(3, 4, 7, siblings)
    names = ("target_logits", "draft_tokens", "parents", "draft_logits", "seed", "step", "temperature")
    tensors = [case[name] for name in (*names, "num_draft_tokens", "top_k", "top_p", "min_p")]
    for options in ((4, 7, "", True), (2, 6, "", False)):
        torch.library.opcheck(torch.ops.fused_parallel.verify_tree.default, (*tensors, *options))

    def step(target_logits, **rest):
        result = verify_tree(target_logits * 1.0, max_depth=3, **rest)
        return result.tokens + 1, result.num_accepted, result.path

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**case), step(**case), strict=True):
        assert torch.equal(got, want)
