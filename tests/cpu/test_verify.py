"""fp.verify against plain Python: token for token, on awkward input, and its errors."""

import _verify_cases as cases
import pytest
import torch
from _verify_cases import check

from fused_parallel.errors import NoFusedKernelError
from fused_parallel.nn.speculative_verifier import SpeculativeVerifier
from fused_parallel.ops._dispatch import use
from fused_parallel.ops.verify import METHODS, VerifyResult, verify

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("full_q", [True, False], ids=["full_q", "point_mass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_equals_plain_python(seed, method, dtype, full_q):
    assert check(cases.case(120, 4, 19, dtype=dtype, full_q=full_q), method, vocab_size=17) > 0.05  # some are accepted
    plain = cases.case(60, 3, 5, dtype=dtype, full_q=full_q, filters=False, ragged=False, mixed=False, invalid=False)
    check(plain, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batch", "k", "vocab"), [(1, 0, 7), (5, 0, 1), (3, 1, 2), (1, 1, 1), (2, 7, 127), (1, 2, 4097)]
)
def test_shapes(seed, batch, k, vocab, method):
    check(cases.case(batch, k, vocab), method)
    check(cases.case(batch, k, vocab, full_q=False), method)


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method):
    none = torch.zeros(0, dtype=torch.int64)
    result = verify(
        torch.zeros(0, 3, 5), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, 5), seed=none, step=none,
        temperature=1.0, top_k=2, method=method, return_logprobs=True,
    )  # fmt: skip
    assert [tuple(x.shape) for x in result[:3]] == [(0, 3), (0,), (0, 3)]


def test_strides_and_dtypes_of_the_inputs_do_not_matter(seed):
    case = cases.case(20, 3, 11)
    expected = verify(**case)
    strided = case | {
        "target_logits": torch.stack((case["target_logits"], torch.zeros_like(case["target_logits"])), -1)[..., 0],
        "draft_logits": case["draft_logits"].transpose(1, 2).contiguous().transpose(1, 2),
        "draft_tokens": case["draft_tokens"].T.contiguous().T,
        "temperature": case["temperature"].double(),
        "top_k": case["top_k"].int(),
        "num_draft_tokens": case["num_draft_tokens"].long(),
    }
    assert not strided["target_logits"].is_contiguous()
    for got, want in zip(verify(**strided), expected, strict=True):
        assert got is want is None or torch.equal(got, want)
    half = case | {"draft_logits": case["draft_logits"].half()}  # another dtype than the target's
    check(half, "rejection")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("full_q", [True, False], ids=["full_q", "point_mass"])
def test_greedy_equals_argmax(seed, method, full_q):
    """At temperature 0, whatever the draft's weights: the longest prefix of argmaxes, then the argmax."""
    case = cases.case(200, 4, 9, filters=False, mixed=False, invalid=False, ragged=False, full_q=full_q)
    argmax = case["target_logits"].argmax(-1)
    right = torch.rand(200, 4) < 0.7
    case["draft_tokens"] = torch.where(right, argmax[:, :4], (argmax[:, :4] + 1) % 9)
    if full_q:
        case["draft_logits"][::3] = torch.randn(67, 4, 9) * 50
        case["draft_logits"][1::3] = NAN
    case["temperature"][:] = torch.rand(200) if method == "greedy" else 0.0
    result = verify(**case, method=method)
    for b in range(200):
        accepted = [*right[b].tolist(), False].index(False)
        assert result.num_accepted[b] == accepted
        assert result.tokens[b].tolist() == argmax[b, : accepted + 1].tolist() + [-1] * (4 - accepted)


def test_equal_laws_accept_everything(seed):
    case = cases.case(100, 5, 13, filters=False, mixed=False, ragged=False, invalid=False)
    case["temperature"][:] = 1.0
    case["target_logits"][:, :5] = case["draft_logits"]
    for method in ("rejection", "block"):
        assert verify(**case, method=method).num_accepted.tolist() == [5] * 100


def test_impossible_draft_accepts_nothing(seed):
    """p = 0 at the drafted token, by the target's logits or by its filter."""
    case = cases.case(50, 3, 8, filters=False, mixed=False, ragged=False, invalid=False)
    case["target_logits"][:, :3].scatter_(2, case["draft_tokens"][..., None], -INF)
    for method in METHODS:
        check(case, method)
        assert verify(**case, method=method).num_accepted.tolist() == [0] * 50


def test_same_in_any_batch(seed):
    """Neither the order, nor the other requests, nor padding drafts change a request's tokens."""
    case = cases.case(30, 4, 21)
    order = torch.randperm(30)[:7]
    part = {name: None if value is None else value[order] for name, value in case.items()}
    for method in METHODS:
        whole, some = verify(**case, method=method), verify(**part, method=method)
        assert torch.equal(whole.tokens[order], some.tokens)
        assert torch.equal(whole.num_accepted[order], some.num_accepted)
        assert torch.equal(whole.tokens, verify(**case, method=method).tokens)
        other = verify(**case | {"step": case["step"] + 1}, method=method)
        assert method == "greedy" or not torch.equal(whole.tokens, other.tokens)


def test_ragged_equals_shorter(seed):
    """num_draft_tokens = n, n drafts and a -1 placeholder after n drafts are the same round."""
    case = cases.case(80, 4, 11, ragged=False, invalid=False)
    for method in METHODS:
        for n in range(5):
            short = case | {
                "target_logits": case["target_logits"][:, : n + 1],
                "draft_tokens": case["draft_tokens"][:, :n],
                "draft_logits": case["draft_logits"][:, :n],
            }
            want = torch.nn.functional.pad(verify(**short, method=method).tokens, (0, 4 - n), value=-1)
            ragged = verify(**case, num_draft_tokens=torch.full((80,), n, dtype=torch.int32), method=method)
            assert torch.equal(ragged.tokens, want)
            if n < 4:
                holes = case["draft_tokens"].clone()
                holes[:, n] = -1
                assert torch.equal(verify(**case | {"draft_tokens": holes}, method=method).tokens, want)


def test_padding_is_never_read_nor_drawn(seed):
    case = cases.case(60, 3, 16, invalid=False)
    small = case | {"target_logits": case["target_logits"][..., :13], "draft_logits": case["draft_logits"][..., :13]}
    small["draft_tokens"] = case["draft_tokens"] = case["draft_tokens"].clamp(max=12)
    for garbage in (1e30, INF, NAN):
        case["target_logits"][..., 13:] = case["draft_logits"][..., 13:] = garbage
        for method in METHODS:
            result = verify(**case, method=method, vocab_size=13)
            assert torch.equal(result.tokens, verify(**small, method=method).tokens)
            assert result.tokens.max() < 13


@pytest.mark.parametrize("full_q", [True, False], ids=["full_q", "point_mass"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinite_logits(seed, method, full_q):
    """Defined as the docstring says: NaN is -inf, +inf the largest float32, a row without a finite logit gives 0."""
    case = cases.case(160, 3, 6, full_q=full_q)
    for name in ("target_logits", "draft_logits"):
        if case[name] is not None:
            kind = torch.rand(case[name].shape)
            # No +inf in the draft: beside it other tokens' probabilities underflow in the oracle, which has no logs.
            for bound, value in ((0.05, NAN), (0.1, -INF), (0.15, INF if name == "target_logits" else -INF)):
                case[name][(kind < bound) & (kind >= bound - 0.05)] = value
            rows = torch.rand(case[name].shape[:2])
            case[name][rows < 0.1] = -INF
            case[name][rows > 0.9] = NAN
    check(case, method)
    if full_q:
        case["draft_logits"][torch.rand(case["draft_logits"].shape) < 0.2] = INF
    result = verify(**case, method=method)
    last = result.tokens.gather(1, result.num_accepted.long()[:, None])
    assert ((last >= 0) & (last < 6)).all()
    nothing = verify(**case | {"target_logits": torch.full_like(case["target_logits"], NAN)}, method=method)
    kept = nothing.tokens[nothing.tokens >= 0]
    assert kept.tolist() == [0] * len(kept)


def test_infinite_temperature_is_uniform_on_what_is_left(seed):
    logits = torch.randn(400, 1, 4) * 10
    logits[..., 2] = -INF
    seeds = torch.arange(400)
    result = verify(
        logits, torch.empty(400, 0, dtype=torch.int64), seed=seeds, step=seeds, temperature=INF, return_logprobs=True
    )
    counts = torch.bincount(result.tokens[:, 0], minlength=4).tolist()
    assert counts[2] == 0
    assert all(80 < counts[i] < 190 for i in (0, 1, 3))
    assert result.logprobs[:, 0].tolist() == pytest.approx([-1.0986123] * 400)


def test_logprobs_only_on_request(seed):
    case = cases.case(4, 2, 5)
    result = verify(**case)
    assert isinstance(result, VerifyResult)
    assert result.logprobs is None
    assert result.path is None


def test_inputs_are_left_alone(seed):
    case = cases.case(10, 3, 7)
    before = {name: value.clone() for name, value in case.items()}
    verify(**case, method="block", return_logprobs=True)
    assert all(torch.equal(value.nan_to_num(), case[name].nan_to_num()) for name, value in before.items())


def test_module(seed):
    case = cases.case(10, 3, 7)
    for method in METHODS:
        module = SpeculativeVerifier(method, vocab_size=6)
        assert torch.equal(module(**case).tokens, verify(**case, method=method, vocab_size=6).tokens)
        assert not list(module.parameters())
        assert repr(method) in repr(module)
    tree = case | {"parents": torch.tensor([-1, 0, 0]), "draft_logits": None, "siblings": "deterministic"}
    assert SpeculativeVerifier()(**tree).path.shape == (10, 3)
    with pytest.raises(ValueError, match="SpeculativeVerifier: method must be one of"):
        SpeculativeVerifier("typical")


def test_fused_mode_says_there_is_no_kernel(seed):
    case = cases.case(1, 1, 3)
    with use("fused"), pytest.raises(NoFusedKernelError, match="verify"):
        verify(**case)


INT = dict(dtype=torch.int64)
BAD = {
    "target_dtype": (dict(target_logits=torch.zeros(2, 4, 5, **INT)), TypeError, "target_logits has dtype torch.int64"),
    "target_shape": (dict(target_logits=torch.zeros(2, 5)), ValueError, r"target_logits must be \[B, k \+ 1, V\], got"),
    "no_row": (dict(target_logits=torch.zeros(2, 0, 5)), ValueError, r"no row, shape \(2, 0, 5\)"),
    "no_vocabulary": (dict(target_logits=torch.zeros(2, 4, 0)), ValueError, "empty vocabulary"),
    "grad": (dict(target_logits=torch.zeros(2, 4, 5, requires_grad=True)), ValueError, "requires a gradient"),
    "tokens_dtype": (dict(draft_tokens=torch.zeros(2, 3).int()), TypeError, "draft_tokens has dtype torch.int32"),
    "tokens_shape": (dict(draft_tokens=torch.zeros(2, 4, **INT)), ValueError, r"shape \(2, 4\), expected \(2, 3\)"),
    "tokens_type": (dict(draft_tokens=[[1]]), TypeError, "draft_tokens must be a tensor on cpu"),
    "draft_shape": (dict(draft_logits=torch.zeros(2, 4, 5)), ValueError, r"\(2, 4, 5\), expected \(2, 3, 5\)"),
    "draft_dims": (dict(draft_logits=torch.zeros(2, 5)), ValueError, r"draft_logits must be \[B, k, V\], got"),
    "draft_dtype": (dict(draft_logits=torch.zeros(2, 3, 5).double()), TypeError, "draft_logits has dtype"),
    "seed": (dict(seed=7), TypeError, "seed must be a tensor on cpu, got 7 of type int; a number would be baked"),
    "step": (dict(step=torch.zeros(2)), TypeError, "step has dtype torch.float32, expected torch.int64"),
    "num_dtype": (dict(num_draft_tokens=torch.zeros(2)), TypeError, "num_draft_tokens has dtype"),
    "num_shape": (dict(num_draft_tokens=torch.zeros(3).int()), ValueError, r"num_draft_tokens has shape \(3,\)"),
    "temperature": (dict(temperature=-1), ValueError, "temperature must be 0 or more, got -1"),
    "temperature_shape": (dict(temperature=torch.ones(2, 1)), ValueError, r"temperature has shape \(2, 1\)"),
    "top_p": (dict(top_p=-0.1), ValueError, "top_p must be between 0 and 1, got -0.1"),
    "method": (dict(method="typical"), ValueError, "one of 'rejection', 'block', 'greedy', got 'typical'"),
    "vocab_size": (dict(vocab_size=0), ValueError, "vocab_size must be between 1 and 5 .*, got 0"),
    "vocab_group": (dict(vocab_group=0), TypeError, "must be a ProcessGroup or a 1-D DeviceMesh"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    change, error, message = BAD[name]
    zeros = torch.zeros(2, **INT)
    arguments = dict(
        target_logits=torch.zeros(2, 4, 5),
        draft_tokens=torch.zeros(2, 3, **INT),
        seed=zeros,
        step=zeros,
        temperature=1.0,
    )
    with pytest.raises(error, match=message):
        verify(**arguments | change)


@pytest.mark.parametrize("method", METHODS)
def test_opcheck(seed, method):
    op = torch.ops.fused_parallel.verify.default
    for case in (cases.case(3, 2, 7), cases.case(3, 2, 7, full_q=False, filters=False, ragged=False)):
        names = ("num_draft_tokens", "top_k", "top_p", "min_p")
        tensors = [
            case[name] for name in ("target_logits", "draft_tokens", "draft_logits", "seed", "step", "temperature")
        ]
        tensors += [case.get(name) for name in names]
        torch.library.opcheck(op, (*tensors, method, 6, "", method != "block"))


def test_compile(seed):
    def step(target_logits, draft_logits, **rest):
        result = verify(target_logits * 1.0, draft_logits=draft_logits, method="block", return_logprobs=True, **rest)
        return result.tokens + 1, result.num_accepted * 2, result.logprobs

    case = cases.case(6, 3, 9)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**case), step(**case), strict=True):
        assert torch.equal(got, want)
