"""Verification of whatever Hypothesis makes up: token for token what plain Python gives, and in range whatever comes.

Hypothesis chooses the sizes and, of up to four requests of each round, lengths, placeholders and which rows are of
which awkward kind; the other requests are cases.case's. The logits come from torch's generator at a seed that it
chooses, too, so that thresholds are not met by a hair.
"""

import _verify_cases as cases
import _verify_wrong as wrong
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fused_parallel.ops.verify import METHODS, verify
from fused_parallel.ops.verify_tree import SIBLINGS, verify_tree

NAN, INF = float("nan"), float("inf")
# The same examples in every run, and none kept; a slow machine is no failure.
properties = settings(
    derandomize=True, database=None, deadline=None, max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

TARGET_KINDS = ("usual", "flat", "nan", "none", "some_nan", "some_none", "infinite", "equal", "impossible")
DRAFT_KINDS = ("usual", "flat", "nan", "none", "some_nan", "some_none", "certain")


def change(row, kind, token, draft=None):
    """Makes a row [V] of logits of that kind, in place; `token` is the one drafted there, or None."""
    if kind == "flat":
        row[:] = 0.5
    elif kind in ("nan", "none"):
        row[:] = NAN if kind == "nan" else -INF
    elif kind in ("some_nan", "some_none"):
        row[torch.rand(row.shape) < 0.4] = NAN if kind == "some_nan" else -INF
    elif kind == "infinite":
        row[torch.randint(len(row), (2,))] = INF
    elif kind == "equal" and draft is not None:
        row[:] = draft
    elif kind == "impossible" and token is not None:
        row[token] = -INF
    elif kind == "certain" and token is not None:
        row[token] = INF


def kinds_of(kinds, count):
    """A kind for each row of a request: most are usual, so that the others are reached and what follows them, too."""
    awkward = st.lists(st.one_of(st.just("usual"), st.sampled_from(kinds)), min_size=count, max_size=count)
    return st.one_of(st.just(["usual"] * count), awkward)


@st.composite
def rounds(draw, siblings=None, draft_kinds=DRAFT_KINDS):
    """(a case of verify, or of verify_tree with `siblings`, its vocab_size)."""
    awkward, usual = draw(st.integers(0, 4)), draw(st.sampled_from((1, 10)))
    batch, k = awkward + usual, draw(st.sampled_from((0, 1, 3, 4, 6 if siblings else 5)))
    vocab, padding = draw(st.sampled_from((1, 2, 3, 5, 6, 8, 11, 17, 33, 127))), draw(st.sampled_from((0, 1, 7)))
    options = {name: draw(st.booleans()) for name in ("filters", "mixed", "invalid", "ragged")}
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    torch.manual_seed(int.from_bytes(draw(st.binary(min_size=4, max_size=4)), "little"))
    if siblings:
        case = cases.tree_case(batch, k, vocab + padding, siblings, dtype, **options)
    else:
        full_q = draw(st.booleans())
        case = cases.case(batch, k, vocab + padding, dtype=dtype, full_q=full_q, **options)
    target, draft, tokens = case["target_logits"], case["draft_logits"], case["draft_tokens"]
    for b in range(awkward):
        if "num_draft_tokens" in case:
            case["num_draft_tokens"][b] = draw(st.integers(-1, k + 1))
        kinds = draw(kinds_of(TARGET_KINDS, k + 1))
        drafted = draw(kinds_of(draft_kinds, k))
        if k and draw(st.booleans()):
            tokens[b, draw(st.integers(0, k - 1))] = -1
        if "equal" in kinds and draw(st.booleans()):
            case["temperature"][b] = 1.0
        for i in range(k):
            token = tokens[b, i].item() if 0 <= tokens[b, i] < vocab else None
            # A tree's target row of the position where node i is tried is its parent's; siblings share a draft row.
            at = case["parents"][b, i].item() + 1 if siblings else i
            if draft is not None:
                elder = next((j for j in range(i) if siblings and case["parents"][b, j] == at - 1), None)
                if elder is None:
                    change(draft[b, i], drafted[i], token)
                else:
                    draft[b, i] = draft[b, elder]
            change(target[b, at], kinds[i], token, None if draft is None else draft[b, i])
        change(target[b, k], kinds[k], None)
    if padding:  # never read
        for logits in (target, draft):
            if logits is not None:
                logits[..., vocab:] = draw(st.sampled_from((NAN, INF, -INF, 3e4)))
    return case, vocab


def well_formed(case, result, vocab, chain):
    """Drafts, then one token of the vocabulary, then -1."""
    for b, n in enumerate(result.num_accepted.tolist()):
        tokens, drafts = result.tokens[b].tolist(), case["draft_tokens"][b].tolist()
        path = list(range(n)) if chain else result.path[b, :n].tolist()
        assert 0 <= n < len(tokens)
        assert tokens[:n] == [drafts[i] for i in path]
        assert all(0 <= t < vocab for t in tokens[: n + 1])
        assert set(tokens[n + 1 :]) <= {-1}
        assert not result.logprobs[b].isnan().any()
        if "num_draft_tokens" in case:
            assert all(i < case["num_draft_tokens"][b] for i in path)


@pytest.mark.parametrize("method", METHODS)
@properties
@given(rounds())
def test_chains_equal_plain_python(method, example):
    case, vocab = example
    cases.check(case, method, vocab)


@pytest.mark.parametrize("siblings", SIBLINGS)
@properties
@given(st.data())
def test_trees_equal_plain_python(siblings, data):
    # Nothing is certain in a draft: what is left without that token underflows in plain Python, which has no logs.
    case, vocab = data.draw(rounds(siblings, DRAFT_KINDS[:-1]))
    cases.check_tree(case, vocab)


@pytest.mark.parametrize("siblings", [None, *SIBLINGS])
@properties
@given(st.data())
def test_any_logits_give_tokens_in_range(siblings, data):
    """+inf anywhere in the draft, too, where plain Python underflows."""
    case, vocab = data.draw(rounds(siblings, (*DRAFT_KINDS, "infinite")))
    if siblings:
        well_formed(case, verify_tree(**case, vocab_size=vocab, return_logprobs=True), vocab, chain=False)
        return
    for method in METHODS:
        result = verify(**case, method=method, vocab_size=vocab, return_logprobs=True)
        well_formed(case, result, vocab, chain=True)


@pytest.mark.parametrize(
    ("mistake", "method"),
    [
        (wrong.residual_p, "rejection"),
        (wrong.residual_p, "block"),
        (wrong.residual_unscaled, "block"),
        (wrong.thresholds_of_rejection, "block"),
        (wrong.residual_p, None),
        (wrong.siblings_left_in_q, None),
    ],
)
def test_mistakes_are_found(mistake, method, monkeypatch):
    @settings(properties, phases=[Phase.generate], report_multiple_bugs=False)
    @given(rounds(None if method else "without_replacement", DRAFT_KINDS[:-1]))
    def compare(example):
        case, vocab = example
        if method:
            cases.check(case, method, vocab)
        else:
            cases.check_tree(case, vocab)

    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        compare()
