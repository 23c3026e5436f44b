"""The matmuls with a collective on Gloo ranks: against float64, as operators, and their errors."""

import pytest
import torch
from _errors import assert_starts, errors_of

import fused_parallel as fp
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (leading dimensions of x, K of all ranks, N)
SHAPES = [((1,), 8, 1), ((3,), 12, 127), ((2, 3), 4 * 97, 40), ((0,), 8, 5), ((4,), 2880, 33)]


def make(seed: int, index: int, shape, dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100 + index)).to(dtype)


def problem(seed, lead, k, n, dtype):
    """Whole x [..., K], weight [N, K], bias [N], residual [..., N], norm weight [N]."""
    shapes = (*lead, k), (n, k), (n,), (*lead, n), (n,)
    return [make(seed, i, shape, dtype) for i, shape in enumerate(shapes)]


def rank_matmul(mesh, seed, dtype):
    group = mesh["tp"]
    rank, world, out = group.get_local_rank(), group.size(), []
    for lead, k, n in SHAPES:
        x, weight, bias, residual, norm = problem(seed, lead, k, n, dtype)
        x, weight = x.chunk(world, -1)[rank], weight.chunk(world, -1)[rank]
        plain = fp.matmul_all_reduce(x, weight, group=group)
        biased = fp.matmul_all_reduce(x, weight, bias, group=group)
        out.append(
            (plain, biased, *fp.matmul_all_reduce_add_rms_norm(x, weight, residual, norm, 1e-5, bias, group=group))
        )
    return out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_all_reduce(world, dtype, seed):
    results = run_ranks(rank_matmul, world, seed, dtype)
    for i, (lead, k, n) in enumerate(SHAPES):
        x, weight, bias, residual, norm = (t.double() for t in problem(seed, lead, k, n, dtype))
        product = x @ weight.T
        new = product + bias + residual
        inverse = 1 / (new.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        # Sums may cancel (there is a 1 x 1 shape): errors are measured against the terms' magnitudes.
        terms = x.abs() @ weight.abs().T + bias.abs()
        whole = terms + residual.abs()
        oracles = (
            (product, terms),
            (product + bias, terms),
            (new * inverse * norm, whole * inverse * norm),
            (new, whole),
        )
        for rank in range(world):
            for got, (expected, scale) in zip(results[rank][i], oracles, strict=True):
                assert got.dtype == dtype
                assert_close(got, expected, scale=scale)
            assert all(torch.equal(a, b) for a, b in zip(results[rank][i], results[0][i], strict=True))


def rank_sequence(mesh, seed, dtype):
    group = mesh["tp"]
    rank, world, out = group.get_local_rank(), group.size(), []
    for m, k, n in ((4, 8, 12), (8, 2880, 4), (0, 8, 4)):
        x, weight = make(seed, 0, (m, k), dtype), make(seed, 1, (n, k), dtype)
        scattered = fp.matmul_reduce_scatter(x.chunk(world, 1)[rank], weight.chunk(world, 1)[rank], group=group)
        rows = x[rank * (m // world) : (rank + 1) * (m // world)]
        out.append((scattered, fp.all_gather_matmul(rows, weight.chunk(world, 0)[rank], group=group)))
    return out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_parallel_forms(world, dtype, seed):
    results = run_ranks(rank_sequence, world, seed, dtype)
    for i, (m, k, n) in enumerate(((4, 8, 12), (8, 2880, 4), (0, 8, 4))):
        product = make(seed, 0, (m, k), dtype).double() @ make(seed, 1, (n, k), dtype).double().T
        assert_close(torch.cat([r[i][0] for r in results], 0), product, factor=3)
        assert_close(torch.cat([r[i][1] for r in results], 1), product, factor=3)


def rank_library(mesh):
    group = mesh["tp"]
    name = fp.comm.resolve_group(group).group_name
    ops = torch.ops.fused_parallel
    x, weight, bias, residual, norm = problem(3, (4,), 6, 8, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.matmul_all_reduce.default, (x, weight, bias, name), test_utils=checks)
    arguments = (x, weight, residual, norm, 1e-5, None, name)
    torch.library.opcheck(ops.matmul_all_reduce_add_rms_norm.default, arguments, test_utils=checks)
    torch.library.opcheck(ops.matmul_reduce_scatter.default, (x, weight, name), test_utils=checks)
    torch.library.opcheck(ops.all_gather_matmul.default, (x, weight, name), test_utils=checks)

    def layer(x):
        y, z = fp.matmul_all_reduce_add_rms_norm(x, weight, residual, norm, 1e-5, group=group)
        part = fp.matmul_reduce_scatter(y @ weight + x, weight, group=group)
        return fp.all_gather_matmul(part, weight.T.contiguous(), group=group), z

    return layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


def test_opcheck_and_compile():
    for eager, compiled in run_ranks(rank_library, 2):
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def rank_errors(mesh):
    group, x, w = mesh["tp"], torch.randn(3, 4), torch.randn(5, 4)
    calls = [
        lambda: fp.matmul_all_reduce(x, torch.randn(5, 3), group=group),
        lambda: fp.matmul_all_reduce(x, w.half(), group=group),
        lambda: fp.matmul_all_reduce(x, w, torch.randn(4), group=group),
        lambda: fp.matmul_all_reduce(x, torch.nn.Parameter(w), group=group),
        lambda: fp.matmul_all_reduce_add_rms_norm(x, w, x, torch.ones(5), 1e-5, group=group),
        lambda: fp.matmul_reduce_scatter(x, w, group=group),
        lambda: fp.all_gather_matmul(x[None], w, group=group),
    ]
    return errors_of(calls)


def test_errors_say_what_to_do():
    expected = [
        "ValueError: matmul_all_reduce: x [..., K] and weight [N, K] must share K, got (3, 4) and (5, 3)",
        "TypeError: matmul_all_reduce: weight has dtype torch.float16 but x has torch.float32",
        "ValueError: matmul_all_reduce: bias must have shape (5,), got (4,)",
        "ValueError: matmul_all_reduce: weight requires a gradient",
        "ValueError: matmul_all_reduce_add_rms_norm: residual has shape (3, 4), expected (3, 5)",
        "ValueError: matmul_reduce_scatter: dim 0 of x must be divisible",
        "ValueError: all_gather_matmul: x must have two dimensions, got shape (1, 3, 4)",
    ]
    assert_starts(run_ranks(rank_errors, 2)[0], expected)


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_launches_of_the_kernel_hold_rows_for_every_rank_or_it_is_not_taken(world):
    """Rows of tiles of each launch: all of them, none above what fits, and as alike as can be."""
    from fused_parallel import _ext
    from fused_parallel.ops.matmul_all_reduce import _launches

    if _ext.extension() is None or not _ext.extension().cuda_built:
        pytest.skip("the extension has no CUDA kernels here")
    for most in (128 * world, 256 * world, 1024 * world):
        for m in [*range(1, 5000, 37), 100_000]:
            parts = _launches(m, most)
            assert sum(parts) == -(-m // 128) and max(parts) * 128 <= most and max(parts) - min(parts) <= 1
