"""fp.sample against plain Python, its filters, its noise and its errors."""

import math

import _verify_oracle as oracle
import pytest
import torch

from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import verify
from fused_parallel.reference.filters import target_weights
from fused_parallel.reference.vocab_shard import VocabShard


def keys(batch):
    return dict(seed=torch.randint(-(2**63), 2**63 - 1, (batch,)), step=torch.randint(0, 2**40, (batch,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", ["draft", "residual"])
def test_equals_plain_python(seed, dtype, stream):
    batch, vocab, vocab_size = 60, 23, 21
    logits = (torch.randn(batch, vocab) * 3).to(dtype)
    temperature = torch.rand(batch) * 2 * (torch.rand(batch) < 0.8)
    position = torch.randint(0, 9, (batch,))
    k = keys(batch)
    options = dict(top_k=torch.randint(0, vocab, (batch,)), top_p=torch.rand(batch), min_p=torch.rand(batch) * 0.2)
    got = sample(
        logits, **k, temperature=temperature, position=position, stream=stream, vocab_size=vocab_size, **options
    )
    assert got.dtype == torch.int64
    for b in range(batch):
        filters = [options[name][b].item() for name in ("top_k", "top_p", "min_p")]
        law = oracle.Target(logits[b].tolist(), temperature[b].item(), *filters, vocab_size)
        expected = oracle.draw(law.p, law.greedy, k["seed"][b].item(), k["step"][b].item(), position[b].item(), stream)
        assert got[b] == expected, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", [{"top_k"}, {"top_p"}, {"min_p"}, {"top_k", "top_p"}, {"top_k", "top_p", "min_p"}])
def test_filters_equal_plain_python(seed, dtype, on):
    batch, vocab, vocab_size = 64, 37, 33
    logits = (torch.randn(batch, 1, vocab) * 3).to(dtype)
    if dtype == torch.bfloat16:
        logits = logits.round()  # many ties
    logits[0] = -0.0
    logits[1, 0, ::2] = float("-inf")
    logits[2, 0, 3], logits[2, 0, 5] = math.inf, math.nan
    temperature = torch.rand(batch) + 0.3
    options = {
        "top_k": torch.randint(0, vocab + 5, (batch,)), "top_p": torch.rand(batch), "min_p": torch.rand(batch) * 0.5
    }  # fmt: skip
    options["top_p"][3:6] = torch.tensor([0.0, 1.0, 1e-9])
    given = [value if name in on else None for name, value in options.items()]
    weights, _ = target_weights(logits, temperature, *given, VocabShard(vocab, vocab_size))
    got = torch.softmax(weights[:, 0], -1)
    for b in range(batch):
        filters = [value[b].item() if name in on else 0 for name, value in options.items()]
        law = oracle.Target(logits[b, 0].tolist(), temperature[b].item(), *filters, vocab_size)
        kept = {t for t, p in enumerate(got[b].tolist()) if p > 0}
        assert kept == {t for t, p in law.p.items() if p > 0}, (b, filters)
        assert got[b].tolist() == pytest.approx([law.p.get(t, 0.0) for t in range(vocab)], rel=1e-12, abs=1e-300), b


def test_filters_by_hand():
    p = torch.tensor([[[0.5, 0.2, 0.2, 0.07, 0.03]]])
    shard, one = VocabShard(5, 5), torch.ones(1)

    def kept(top_k=None, top_p=None, min_p=None):
        options = [None if x is None else torch.tensor([x]) for x in (top_k, top_p, min_p)]
        return (target_weights(p.log(), one, *options, shard)[0] > -math.inf)[0, 0].tolist()

    assert kept(top_k=1) == [True, False, False, False, False]
    assert kept(top_k=2) == [True, True, True, False, False]  # ties of the last are kept
    assert kept(top_p=0.4) == [True, False, False, False, False]
    assert kept(top_p=0.6) == [True, True, True, False, False]
    assert kept(top_p=0.95) == [True, True, True, True, False]
    assert kept(top_k=4, top_p=0.95) == [True, True, True, True, False]  # 0.9 / 0.97 < 0.95
    assert kept(top_k=4, top_p=0.92) == [True, True, True, False, False]  # 0.9 / 0.97 >= 0.92: renormalised
    assert kept(min_p=0.39) == [True, True, True, False, False]
    assert kept(min_p=0.41) == [True, False, False, False, False]
    assert kept(top_k=0, top_p=0.0, min_p=0.0) == [True] * 5
    assert kept(top_k=9, top_p=1.0) == [True] * 5


def test_law(seed):
    """The frequencies of drawn tokens against the softmax."""
    n, logits = 50_000, torch.tensor([0.3, -1.0, 1.2, 0.0])
    got = sample(logits.expand(n, 4), **keys(n), temperature=0.7)
    expected = torch.softmax(logits.double() / 0.7, -1) * n
    chi2 = ((torch.bincount(got, minlength=4) - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(1.5, dtype=torch.float64), chi2 / 2) > 1e-6


def test_zero_temperature_is_argmax_lowest_on_ties(seed):
    logits = torch.randn(40, 50).round()  # ties in most rows
    expected = [row.index(max(row)) for row in logits.tolist()]
    for temperature in (0.0, torch.zeros(40), torch.full((40,), float("nan")), torch.full((40,), -1.0)):
        assert sample(logits, **keys(40), temperature=temperature).tolist() == expected


def test_same_in_any_batch(seed):
    logits, k, temperature = torch.randn(9, 31), keys(9), torch.rand(9) + 0.5
    whole = sample(logits, **k, temperature=temperature, position=2)
    order = torch.randperm(9)[:5]
    part = sample(
        logits[order], seed=k["seed"][order], step=k["step"][order], temperature=temperature[order], position=2
    )
    assert part.tolist() == whole[order].tolist()
    assert whole.tolist() == sample(logits, **k, temperature=temperature, position=2).tolist()


def test_plain_decoding_is_verification_of_nothing(seed):
    logits, k = torch.randn(200, 17), keys(200)
    options = dict(temperature=torch.rand(200), top_k=9, top_p=0.9, min_p=0.01)
    got = verify(logits[:, None], torch.empty(200, 0, dtype=torch.int64), **k, **options)
    assert got.tokens[:, 0].tolist() == sample(logits, **k, stream="residual", **options).tolist()
    assert got.num_accepted.tolist() == [0] * 200


def test_numbers_for_all_are_tensors_of_it(seed):
    logits, k = torch.randn(64, 29), keys(64)
    numbers = dict(temperature=0.7, top_k=7, top_p=0.8, min_p=0.02, position=3)
    tensors = {name: torch.full((64,), value) for name, value in numbers.items()}
    assert sample(logits, **k, **numbers).tolist() == sample(logits, **k, **tensors).tolist()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 127), (2, 4097)])
def test_shapes(seed, shape):
    base = torch.randn(shape[0], 2 * shape[1])
    logits = base[:, ::2]  # not contiguous
    got = sample(logits, **keys(shape[0]), temperature=1.0)
    assert got.shape == shape[:1]
    assert ((got >= 0) & (got < shape[1])).all()
    again = sample(logits.contiguous(), **keys(shape[0]), temperature=0.0)
    assert again.tolist() == logits.argmax(-1).tolist() if shape[0] else True


BAD = {
    "logits_type": (dict(logits=[[1.0]]), TypeError, "logits must be a torch.Tensor, got list"),
    "logits_dtype": (dict(logits=torch.zeros(2, 4, dtype=torch.float64)), TypeError, "float64"),
    "logits_shape": (dict(logits=torch.zeros(2, 1, 4)), ValueError, r"logits must be \[B, V\], got shape \(2, 1, 4\)"),
    "logits_empty": (dict(logits=torch.zeros(2, 0)), ValueError, "empty vocabulary"),
    "logits_grad": (dict(logits=torch.zeros(2, 4, requires_grad=True)), ValueError, "requires a gradient"),
    "seed_number": (dict(seed=3), TypeError, "seed must be a tensor on cpu, got 3 of type int; a number"),
    "seed_dtype": (dict(seed=torch.zeros(2, dtype=torch.int32)), TypeError, "seed has dtype torch.int32, expected"),
    "step_shape": (dict(step=torch.zeros(3, dtype=torch.int64)), ValueError, r"step has shape \(3,\), expected \(2,\)"),
    "step_device": (dict(step=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "step is on meta"),
    "temperature_none": (dict(temperature=None), TypeError, "temperature must be a float tensor"),
    "temperature_number": (dict(temperature=-0.5), ValueError, "temperature must be 0 or more, got -0.5"),
    "temperature_nan": (dict(temperature=math.nan), ValueError, "temperature must be 0 or more, got nan"),
    "temperature_dtype": (dict(temperature=torch.zeros(2, dtype=torch.int64)), TypeError, "temperature has dtype"),
    "top_k_number": (dict(top_k=-1), ValueError, "top_k must be 0 or more, got -1"),
    "top_k_type": (dict(top_k=2.5), TypeError, "top_k must be an integer, got 2.5"),
    "top_k_dtype": (dict(top_k=torch.ones(2)), TypeError, "top_k has dtype torch.float32"),
    "top_p": (dict(top_p=1.5), ValueError, "top_p must be between 0 and 1, got 1.5"),
    "min_p": (dict(min_p=-0.1), ValueError, "min_p must be between 0 and 1, got -0.1"),
    "position": (dict(position=-1), ValueError, r"position must be between 0 and 2\*\*32 - 1, got -1"),
    "position_shape": (dict(position=torch.zeros(1, dtype=torch.int64)), ValueError, r"position has shape \(1,\)"),
    "stream": (dict(stream="accept"), ValueError, "stream must be one of 'draft', 'residual', got 'accept'"),
    "vocab_size": (dict(vocab_size=5), ValueError, r"between 1 and 4 \(1 shard\(s\) of 4 columns\), got 5"),
    "vocab_size_type": (dict(vocab_size=3.0), TypeError, "vocab_size must be an integer, got 3.0"),
    "vocab_group": (dict(vocab_group="tp"), TypeError, "group= must be a ProcessGroup or a 1-D DeviceMesh"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    change, error, message = BAD[name]
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = dict(logits=torch.zeros(2, 4), seed=zeros, step=zeros, temperature=1.0) | change
    with pytest.raises(error, match=message):
        sample(arguments.pop("logits"), **arguments)


def test_opcheck_and_compile(seed):
    logits, k = torch.randn(5, 33), keys(5)
    tensors = (torch.rand(5), torch.arange(5), torch.tensor([0, 3, 9, 1, 0]), torch.rand(5), None)
    op = torch.ops.fused_parallel.sample.default
    torch.library.opcheck(op, (logits, k["seed"], k["step"], *tensors, "draft", 33, ""))

    def draw(logits, seed, step):
        return sample(logits * 1.0, seed=seed, step=step, temperature=0.8, top_k=5, position=1) + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert compiled(logits, **k).tolist() == draw(logits, **k).tolist()
