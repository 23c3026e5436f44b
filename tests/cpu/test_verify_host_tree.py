"""The verification kernels, compiled for the host, against the float64 reference: trees."""

import pytest
import torch
from _verify_cases import tree_case
from _verify_host import FILTERS, NEAR, compare

from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.ops.verify_tree import SIBLINGS
from fused_parallel.reference import verify_tree as reference
from fused_parallel.reference.vocab_shard import VocabShard

pytestmark = pytest.mark.usefixtures("host_kernels")


def run_tree(c, vocab, max_depth):
    tensors = [c[name] for name in ("target_logits", "draft_tokens", "draft_logits", "seed", "step", "temperature")]
    filters = [None if c[n] is None else c[n].long() if n == "top_k" else c[n].float() for n in FILTERS]
    part = VocabShard(c["target_logits"].shape[-1], vocab)
    call = kernel.Parts(
        *tensors, c["num_draft_tokens"], filters, "rejection", part, return_logprobs=True,
        parents=c["parents"], max_depth=max_depth,
    )  # fmt: skip
    for t in (call.tokens, call.accepted, call.path):
        t.fill_(-77)
    call.logprobs.fill_(float("nan"))
    call.whole()
    return call.tokens, call.accepted, call.logprobs, call.path


def expected_tree(c, vocab, max_depth):
    names = ("seed", "step", "temperature", "num_draft_tokens")
    part = VocabShard(c["target_logits"].shape[-1], vocab)
    return reference.verify_tree(
        c["target_logits"], c["draft_tokens"], c["parents"].expand_as(c["draft_tokens"]), c["draft_logits"],
        *(c[n] for n in (*names, *FILTERS)), max_depth, part,
    )  # fmt: skip


def near_tie_of_tree(c, request, tokens, vocab, max_depth):
    one = {name: t[request : request + 1] if isinstance(t, torch.Tensor) else t for name, t in c.items()}
    one["parents"] = c["parents"].expand_as(c["draft_tokens"])[request : request + 1]
    for _ in range(64):
        moved = dict(one)
        for name in ("target_logits", "draft_logits"):
            if one[name] is not None:
                moved[name] = one[name].float() + NEAR * (2 * torch.rand(one[name].shape) - 1)
        if torch.equal(expected_tree(moved, vocab, max_depth)[0][0], tokens):
            return True
    return False


def check_tree(c, vocab, max_depth=None):
    """Returns how many accepted nodes are not their parent's first child."""
    c = {**dict.fromkeys((*FILTERS, "num_draft_tokens")), **c}
    max_depth = c["draft_tokens"].shape[1] if max_depth is None else max_depth
    got, want = run_tree(c, vocab, max_depth), expected_tree(c, vocab, max_depth)
    same = compare(got, want, lambda request, tokens: near_tie_of_tree(c, request, tokens, vocab, max_depth))
    assert torch.equal(got[3][same], want[3][same])
    parents = c["parents"].expand_as(c["draft_tokens"]).tolist()
    return sum(parents[b].index(parents[b][n]) != n for b, path in enumerate(got[3].tolist()) for n in path if n >= 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_trees(seed, siblings, dtype):
    others = check_tree(tree_case(40, 8, 11, siblings, dtype), 9)
    others += check_tree(
        tree_case(80, 8, 4, siblings, dtype, filters=False, mixed=False, invalid=False, ragged=False), 4
    )
    assert others > 0  # later siblings are accepted, too
    check_tree(tree_case(20, 6, 5, siblings, dtype), 5, max_depth=2)
    check_tree(tree_case(6, 5, 5003, siblings, dtype), 5000)
    check_tree(tree_case(6, 3, 2500, siblings, dtype, filters=False), 2500, max_depth=0)
    c = tree_case(10, 6, 40, siblings, dtype)
    check_tree(c | {"parents": torch.tensor([-1, -1, 0, 0, 1, 1])}, 40)  # one tree for all
    check_tree(tree_case(5, 0, 30, siblings, dtype), 30)


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_trees_of_odd_rows(seed, siblings):
    """Nearly certain tokens, equal tokens among siblings, rows of one token, NaN, infinities, no logit at all."""
    c = tree_case(24, 6, 50, siblings, invalid=False, ragged=False, mixed=False)
    target, kind = c["target_logits"], torch.arange(24)
    c["parents"][:] = -1  # six siblings each
    target[kind % 8 == 0, 0] *= 20.0
    c["draft_tokens"][kind % 8 == 1] = 7
    target[kind % 8 == 2, :, 1:] = float("-inf")
    target[kind % 8 == 3, :, ::3] = float("nan")
    target[kind % 8 == 4, :, 5] = float("inf")
    target[kind % 8 == 5] = float("-inf")
    c["temperature"][kind % 8 == 6] = float("inf")
    if c["draft_logits"] is not None:
        c["draft_logits"][kind == 7] = float("-inf")
        c["draft_logits"][kind == 15] = target[kind == 15, :1] / c["temperature"][kind == 15, None, None]
    check_tree(c, 50)
    check_tree({**c, **dict.fromkeys(FILTERS)}, 50)


def test_63_nodes(seed):
    for siblings in SIBLINGS:
        check_tree(tree_case(4, 63, 6, siblings), 6)
