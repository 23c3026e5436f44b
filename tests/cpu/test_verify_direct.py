"""The short way of verify, sample and verify_tree to their kernels, compiled for the host: the same results as by the
long way, and the long way for all that is new."""

import _verify_cases as cases
import pytest
import torch

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.ops import _direct, _sampling
from fused_parallel.ops import _verify_kernel as kernel

FILTERS = ("top_k", "top_p", "min_p")
BATCH, VOCAB = 8, 301


@pytest.fixture(autouse=True)
def _on_gpu(host_kernels, monkeypatch):
    """Tensors in host memory that say they are a GPU's, whose kernels run on the host."""
    monkeypatch.setattr(_ext, "why_no_kernels", lambda: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    monkeypatch.setattr(kernel, "_known", {})
    with fp.use("fused"), torch.no_grad():
        yield


class LongWays(torch.overrides.TorchFunctionMode):
    """Counts the library's operations that go through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += "fused_parallel" in str(function)
        return function(*args, **(kwargs or {}))


def long_ways(call):
    with LongWays() as ways:
        result = call()
    return ways.count, result


def equal(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(x is y or (torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()) for x, y in pairs)


def typed(c):
    """With the dtypes that the kernels read as they are."""
    return c | {n: c[n].long() if n == "top_k" else c[n].float() for n in FILTERS if c.get(n) is not None}


def verify_case(filters=True, **options):
    c = typed(cases.case(BATCH, 3, VOCAB, **options))
    return c if filters else {name: t for name, t in c.items() if name not in FILTERS}


def sample_case(position):
    c = verify_case()
    names = ("seed", "step", "temperature", *FILTERS)
    start = 0 if position == "zero" else torch.randint(0, 9, (BATCH,))
    return {"logits": c["target_logits"][:, 1], "position": start} | {name: c[name] for name in names}


CALLS = {
    "verify": lambda: (fp.verify, verify_case(), {}),
    "verify block logprobs": lambda: (fp.verify, verify_case(), {"method": "block", "return_logprobs": True}),
    "verify one-hot": lambda: (fp.verify, verify_case(filters=False, full_q=False), {"vocab_size": VOCAB - 5}),
    "verify no drafts": lambda: (fp.verify, typed(cases.case(BATCH, 0, VOCAB, full_q=False)), {}),
    "sample at 0": lambda: (fp.sample, sample_case("zero"), {}),
    "sample draft": lambda: (fp.sample, sample_case("tensor"), {}),
    "sample residual": lambda: (fp.sample, sample_case("tensor"), {"stream": "residual"}),
    "tree": lambda: (fp.verify_tree, typed(cases.tree_case(BATCH, 5, VOCAB, "without_replacement")), {}),
    "tree of top": lambda: (
        fp.verify_tree,
        typed(cases.tree_case(BATCH, 5, VOCAB, "deterministic")) | {"parents": torch.tensor([-1, -1, 0, 0, 1])},
        {"max_depth": 2, "return_logprobs": True},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_gives_what_the_long_way_does(seed, name):
    op, first, options = CALLS[name]()
    assert long_ways(lambda: op(**first, **options))[0] == 1
    for _ in range(3):
        _, inputs, _ = CALLS[name]()  # other tensors of the same kind
        ways, short = long_ways(lambda c=inputs: op(**c, **options))
        assert ways == 0
        remembered = dict(kernel._known)
        kernel._known.clear()
        ways, long = long_ways(lambda c=inputs: op(**c, **options))
        assert ways == 1 and equal(short, long), (short, long)
        assert kernel._known == remembered


def test_what_is_new_goes_the_long_way(seed):
    c = verify_case()
    fp.verify(**c)
    assert long_ways(lambda: fp.verify(**c))[0] == 0
    plain = fp.verify(**c)
    seed_of_columns = torch.stack((c["seed"], c["step"]), 1)[:, 0]
    twice = c["target_logits"].repeat_interleave(2, -1)[..., ::2]
    same = {  # each twice: a copy of what is no plain tensor is made every time
        "strided seed": {"seed": seed_of_columns},
        "strided logits": {"target_logits": twice},
        "int32 top_k": {"top_k": c["top_k"].int()},
        "float64 top_p": {"top_p": c["top_p"].double()},
        "parameter": {"temperature": torch.nn.Parameter(c["temperature"], requires_grad=False)},
    }
    for name, changed in same.items():
        for _ in range(2):
            ways, got = long_ways(lambda x=changed: fp.verify(**c | x))
            assert ways == 1 and equal(got, plain), name
    assert long_ways(lambda: fp.verify(**c, method="block"))[0] == 1
    assert long_ways(lambda: fp.verify(**c, method="block"))[0] == 0
    assert long_ways(lambda: fp.verify(**c, vocab_size=VOCAB))[0] == 1
    padded = torch.cat((c["target_logits"], torch.full((BATCH, 4, 3), 9.0, dtype=c["target_logits"].dtype)), -1)
    assert long_ways(lambda: fp.verify(**c | {"target_logits": padded[..., :VOCAB]}))[0] == 1  # other strides
    assert equal(fp.verify(**c | {"target_logits": padded[..., :VOCAB]}), plain)
    with fp.use("reference"):
        assert long_ways(lambda: fp.verify(**c))[0] == 1


def test_errors_come_after_the_short_way_was_found(seed):
    c = verify_case()
    for _ in range(2):
        fp.verify(**c, vocab_size=1)
    wrong = [
        (TypeError, "vocab_size must be an integer", {"vocab_size": True}),
        (TypeError, "vocab_size must be an integer", {"vocab_size": 1.0}),
        (ValueError, "vocab_size must be between", {"vocab_size": VOCAB + 1}),
        (ValueError, "method must be one of", {"method": ["rejection"], "vocab_size": 1}),
        (ValueError, "seed has shape", {"seed": c["seed"][1:], "vocab_size": 1}),
        (TypeError, "step has dtype", {"step": c["step"].int(), "vocab_size": 1}),
        (TypeError, "seed must be a tensor", {"seed": 3, "vocab_size": 1}),
        (TypeError, "temperature must be", {"temperature": None, "vocab_size": 1}),
        (TypeError, "draft_logits must be", {"draft_logits": [0.0], "vocab_size": 1}),
    ]
    for error, text, changed in wrong:
        with pytest.raises(error, match=text):
            fp.verify(**c | changed)
    with torch.enable_grad(), pytest.raises(ValueError, match="target_logits requires a gradient"):
        fp.verify(**c | {"target_logits": c["target_logits"].float().requires_grad_()}, vocab_size=1)


def test_a_sharded_call_hands_over_the_same_either_way(seed, extension, monkeypatch):
    """What reaches the extension, recorded instead of run: two shards exchange through memory of GPUs."""

    class Group:
        group_name = "two"

        def size(self):
            return 2

        def rank(self):
            return 1

    class Workspace:
        device_index, native, known, checks = -1, object(), {}, 0

        def check(self):
            self.checks += 1

    group, workspace, launches = Group(), Workspace(), []
    monkeypatch.setattr(_sampling, "resolve_group", lambda given: given)
    monkeypatch.setattr(_sampling, "group_from_name", {"two": group}.get)
    monkeypatch.setattr(kernel, "_why_no_peers", lambda part, records: None)
    for module in (kernel, _direct):
        monkeypatch.setattr(module, "existing_workspace", lambda pg: workspace)
    monkeypatch.setattr(kernel, "workspace_of", lambda pg: workspace)
    monkeypatch.setattr(_direct, "by_group", {})

    def record(*values):
        launches.append(dict(zip(extension.order, values, strict=True)))

    monkeypatch.setattr(extension, "verify", record)
    # Addresses of what a call itself allocates.
    own = ("tokens", "num_accepted", "logprobs", "path", "scratch")
    c = verify_case(mixed=False)
    calls = {
        "verify": lambda: fp.verify(**c, vocab_group=group, return_logprobs=True),
        "sample": lambda: fp.sample(
            c["target_logits"][:, 0], **{n: c[n] for n in ("seed", "step", "temperature")}, vocab_group=group
        ),
    }
    for name, call in calls.items():
        launches.clear()
        checks = workspace.checks
        assert [long_ways(call)[0] for _ in range(2)] == [1, 0], name
        assert workspace.checks == checks + 2
        long, short = launches
        assert long["peers"] is workspace.native and (long["rank"], long["world"]) == (1, 2)
        if name == "sample":
            assert long["position"] != 0 and short["position"] == 0  # zeros, which need not be made
            long["position"] = 0
        assert [bool(long[n]) for n in own] == [bool(short[n]) for n in own], name
        assert {n: v for n, v in long.items() if n not in own} == {n: v for n, v in short.items() if n not in own}
    # Where the ranks cannot reach each other's memory, records travel by torch.distributed: always the long way.
    workspace.known.clear()
    monkeypatch.setattr(kernel, "_why_no_peers", lambda part, records: "the test says so")
    monkeypatch.setattr(kernel.collectives, "all_gather", lambda x, pg: torch.cat((x, x)))
    unfiltered = {name: t for name, t in c.items() if name not in FILTERS}
    for _ in range(2):
        assert long_ways(lambda: fp.verify(**unfiltered, vocab_group=group))[0] == 1
    assert not workspace.known and not kernel._known
