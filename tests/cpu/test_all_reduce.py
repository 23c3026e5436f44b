"""all_reduce, reduce_scatter, all_gather and all_reduce_add_rms_norm on Gloo ranks: against float64, and their
errors."""

import pytest
import torch
from _errors import assert_starts, errors_of

import fused_parallel as fp
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (3, 127), (2, 3, 40), (0, 5), (4, 4097)]


def make(seed: int, rank: int, shape, dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100 + rank)).to(dtype)


def rank_all_reduce(mesh, seed, dtype):
    group, out = mesh["tp"], []
    rank = group.get_local_rank()
    for shape in SHAPES:
        x = make(seed, rank, shape, dtype)
        kept = x.clone()
        fresh = fp.all_reduce(x, group=group)
        given = torch.full_like(x, float("nan"))
        assert fp.all_reduce(x, group=group, out=given) is given
        strided = torch.full((*shape, 2), float("nan"), dtype=dtype)[..., 0]
        fp.all_reduce(x, group=group, out=strided)
        assert torch.equal(x, kept), "the input changed"
        in_place = x.clone()
        fp.all_reduce(in_place, group=group, out=in_place)
        view = torch.stack((x, x), -1)[..., 0]  # not contiguous
        assert all(torch.equal(fresh, t) for t in (given, strided, in_place, fp.all_reduce(view, group=group)))
        out.append(fresh)
    return out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(world, dtype, seed):
    results = run_ranks(rank_all_reduce, world, seed, dtype)
    for i, shape in enumerate(SHAPES):
        expected = sum(make(seed, r, shape, dtype).double() for r in range(world))
        assert_close(results[0][i], expected, factor=2)
        assert all(torch.equal(results[0][i], results[r][i]) for r in range(world))


def rank_scatter_gather(mesh, seed, dtype):
    group = mesh["tp"]
    rank, world = group.get_local_rank(), group.size()
    x = make(seed, rank, (world * 3, 5, 7), dtype)
    return fp.reduce_scatter(x, group=group), fp.all_gather(x[:2], group=group), fp.all_gather(x[:0], group=group)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_all_gather(world, dtype, seed):
    results = run_ranks(rank_scatter_gather, world, seed, dtype)
    inputs = [make(seed, r, (world * 3, 5, 7), dtype) for r in range(world)]
    total = sum(x.double() for x in inputs)
    for rank, (scattered, gathered, empty) in enumerate(results):
        assert_close(scattered, total[rank * 3 : rank * 3 + 3], factor=2)
        assert torch.equal(gathered, torch.cat([x[:2] for x in inputs]))
        assert empty.shape == (0, 5, 7)


def rank_norm(mesh, seed, dtype):
    rank, out = mesh["tp"].get_local_rank(), []
    for shape in SHAPES[1:]:
        x, residual = make(seed, rank, shape, dtype), make(seed, 98, shape, dtype)
        weight = make(seed, 99, shape[-1:], dtype)
        out.append(fp.all_reduce_add_rms_norm(x, residual, weight, 1e-5, group=mesh["tp"]))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_add_rms_norm(dtype, seed):
    results = run_ranks(rank_norm, 2, seed, dtype)
    for i, shape in enumerate(SHAPES[1:]):
        total = sum(make(seed, r, shape, dtype).double() for r in range(2)).to(dtype).double()
        new = total + make(seed, 98, shape, dtype).double()
        normed = new / (new.square().mean(-1, keepdim=True) + 1e-5).sqrt() * make(seed, 99, shape[-1:], dtype).double()
        for rank in range(2):
            assert_close(results[rank][i][1], new)
            assert_close(results[rank][i][0], normed, factor=2)


def rank_library(mesh):
    """opcheck and torch.compile, on two ranks at once, with the same calls on both."""
    group = mesh["tp"]
    name = fp.comm.resolve_group(group).group_name
    ops, x = torch.ops.fused_parallel, torch.randn(4, 6)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.all_reduce.default, (x, name), test_utils=checks)
    torch.library.opcheck(ops.all_reduce_out.default, (x, torch.empty_like(x), name), test_utils=checks)
    torch.library.opcheck(ops.reduce_scatter.default, (x, name), test_utils=checks)
    torch.library.opcheck(ops.all_gather.default, (x, name), test_utils=checks)
    norm = (x, x.clone(), torch.randn(6), 1e-5, name)
    torch.library.opcheck(ops.all_reduce_add_rms_norm.default, norm, test_utils=checks)

    def layer(x, residual, weight):
        y, z = fp.all_reduce_add_rms_norm(x.relu(), residual, weight, 1e-5, group=group)
        return fp.all_gather(fp.reduce_scatter(y + fp.all_reduce(z, group=group), group=group), group=group)

    args = (x, x + 1, torch.randn(6))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    return layer(*args), compiled(*args)


def test_opcheck_and_compile():
    for eager, compiled in run_ranks(rank_library, 2):
        assert torch.equal(eager, compiled)


def test_world_of_one_returns_new_tensors():
    ((same, shared),) = run_ranks(rank_one, 1)
    assert same and not shared


def rank_one(mesh):
    x = torch.randn(3, 4)
    results = [op(x, group=mesh["tp"]) for op in (fp.all_reduce, fp.all_gather, fp.reduce_scatter)]
    return all(torch.equal(x, r) for r in results), any(r.data_ptr() == x.data_ptr() for r in results)


def rank_errors(mesh):
    group, x = mesh["tp"], torch.randn(3, 4)
    calls = [
        lambda: fp.all_reduce(x, group=None),
        lambda: fp.all_reduce(x, group=mesh),
        lambda: fp.all_reduce(x, group="tp"),
        lambda: fp.all_reduce(x.int(), group=group),
        lambda: fp.all_reduce([1.0], group=group),
        lambda: fp.all_reduce(x, group=group, out=torch.empty(4, 3)),
        lambda: fp.all_reduce(x, group=group, out=torch.empty(3, 4, dtype=torch.float16)),
        lambda: fp.all_reduce(x.clone().requires_grad_(), group=group),
        lambda: fp.reduce_scatter(x, group=group),
        lambda: fp.all_gather(torch.tensor(1.0), group=group),
        lambda: fp.all_reduce_add_rms_norm(x, x[:2], torch.ones(4), 1e-5, group=group),
        lambda: fp.all_reduce_add_rms_norm(x, x, torch.ones(3), 1e-5, group=group),
        lambda: fp.all_reduce_add_rms_norm(x, x, torch.ones(4), 0.0, group=group),
    ]
    return errors_of(calls)


def test_errors_say_what_to_do():
    expected = [
        "TypeError: group= must be a ProcessGroup or a 1-D DeviceMesh",
        "ValueError: group= takes a one-dimensional mesh",
        "TypeError: group= must be a ProcessGroup",
        "TypeError: all_reduce: x has dtype torch.int32",
        "TypeError: all_reduce: x must be a torch.Tensor, got list",
        "ValueError: all_reduce: out has shape (4, 3), x has (3, 4)",
        "TypeError: all_reduce: out has dtype torch.float16 but x has torch.float32",
        "ValueError: all_reduce: x requires a gradient",
        "ValueError: reduce_scatter: dim 0 of x must be divisible by the group's 2 ranks, got shape (3, 4)",
        "ValueError: all_gather: x must have at least one dimension",
        "ValueError: all_reduce_add_rms_norm: residual has shape (2, 4), expected (3, 4)",
        "ValueError: all_reduce_add_rms_norm: the norm's weight has shape (3,), expected (4,)",
        "ValueError: all_reduce_add_rms_norm: eps must be positive, got 0.0",
    ]
    assert_starts(run_ranks(rank_errors, 2)[1], expected)
