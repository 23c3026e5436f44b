"""The noise: Philox against its published vectors and a plain Python one, its keys, its tails."""

import math
import random

import _verify_oracle as oracle
import pytest
import torch

from fused_parallel.reference import noise

ONES = 2**32 - 1
# The known answers published with the generator (Random123): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter, key):
    out = noise.philox(tuple(torch.tensor([w]) for w in key), tuple(torch.tensor([w]) for w in counter))
    return tuple(int(w) for w in out)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert words(counter, key) == expected
    assert tuple(oracle.philox(counter, key)) == expected


def test_philox_equals_plain_python(seed):
    draw = random.Random(seed)
    for _ in range(50):
        counter, key = [draw.getrandbits(32) for _ in range(4)], [draw.getrandbits(32) for _ in range(2)]
        assert words(counter, key) == tuple(oracle.philox(counter, key))


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 8), (3, 5), (3, 6), (128255, 1)])
def test_gumbel_of_any_range_of_ids(seed, first, count):
    draw = random.Random(seed)
    seeds = [draw.getrandbits(64) - 2**63 for _ in range(3)]
    steps = [0, 2**32 + 5, draw.getrandbits(62)]
    positions = [0, 1, 2**32 - 1]
    got = noise.gumbel(torch.tensor(seeds), torch.tensor(steps), torch.tensor(positions), "residual", first, count)
    assert got.shape == (3, count)
    for b in range(3):
        for i in range(count):
            expected = oracle.gumbel(seeds[b], "residual", positions[b], steps[b], first + i)
            assert math.isclose(got[b, i].item(), expected, rel_tol=1e-12, abs_tol=1e-12)


def test_uniforms_are_those_of_token_0(seed):
    seeds, steps, positions = torch.tensor([[seed], [-seed]]), torch.tensor([[3], [4]]), torch.arange(3)
    got = noise.uniform(seeds, steps, positions, "accept")
    expected = [[oracle.uniform(s, "accept", i, t) for i in range(3)] for s, t in ((seed, 3), (-seed, 4))]
    assert got.tolist() == expected


def test_every_part_of_the_key_counts():
    base = dict(seed=1, step=1, position=1, stream="draft", first=2)
    variants = [base] + [base | change for change in (
        dict(seed=2), dict(seed=1 + 2**32), dict(step=2), dict(step=1 + 2**32), dict(position=2),
        dict(position=1 + 2**16), dict(stream="accept"), dict(stream="residual"), dict(first=3), dict(first=4),
    )]  # fmt: skip
    values = set()
    for v in variants:
        key = [torch.tensor([v[name]]) for name in ("seed", "step", "position")]
        values.add(noise.gumbel(*key, v["stream"], v["first"], 1).item())
    assert len(values) == len(variants)


def test_tails_are_not_truncated():
    v = noise._unit(torch.tensor([0, 0, ONES]), torch.tensor([0, 1, ONES]))
    assert v.tolist() == [2.0**-65, (2**32 + 0.5) * 2.0**-64, 1 - 2.0**-53]
    g = -torch.log(-torch.log1p(-v))
    assert g[0].item() == pytest.approx(65 * math.log(2))  # 32-bit uniforms end at 22
    assert torch.isfinite(g).all()


def test_gumbels_are_gumbels(seed):
    requests, count = 2000, 64
    seeds = torch.randint(-(2**62), 2**62, (requests,))
    zeros = torch.zeros_like(seeds)
    g = noise.gumbel(seeds, zeros, zeros, "draft", 0, count).flatten()
    n = g.numel()
    # exp(-exp(-g)) is uniform: mean 1/2, variance 1/12, and its Kolmogorov-Smirnov distance is below 3 / sqrt(n)
    # but for one run in 10**7.
    u = torch.exp(-torch.exp(-g)).sort().values
    distance = (u - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max().item()
    assert distance < 3 / math.sqrt(n)
    table = torch.exp(-torch.exp(-g)).view(requests, count)
    correlation = torch.corrcoef(table.T) - torch.eye(count)
    assert correlation.abs().max() < 7 / math.sqrt(requests)  # neighbouring ids, also of one block, are independent
