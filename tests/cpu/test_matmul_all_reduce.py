"""The matmuls with a collective on Gloo ranks: against float64, as operators, and their errors."""

import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from _errors import assert_starts, errors_of

import fused_parallel as fp
from fused_parallel.comm.tuning import DECODE, LIBRARY, ONE, PERSISTENT, Choice
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


def rank_fused(mesh):
    """What fp.use("fused") says of each operation on a group without kernels."""
    group, x, w = mesh["tp"], torch.randn(4, 8), torch.randn(8, 8)
    calls = [
        lambda: fp.matmul_all_reduce(x, w, group=group),
        lambda: fp.matmul_all_reduce_add_rms_norm(x, w, x, torch.ones(8), 1e-5, group=group),
        lambda: fp.matmul_reduce_scatter(x, w, group=group),
        lambda: fp.all_gather_matmul(x, w, group=group),
    ]
    told = []
    for call in calls:
        with fp.use("fused"), pytest.raises(fp.NoFusedKernelError) as error:
            call()
        told.append(str(error.value))
    return told


def test_fused_is_refused_where_the_group_has_no_kernels():
    ops = ("matmul_all_reduce", "matmul_all_reduce_add_rms_norm", "matmul_reduce_scatter", "all_gather_matmul")
    for told in run_ranks(rank_fused, 2):
        for op, message in zip(ops, told, strict=True):
            assert message.startswith(f"{op}: fused kernels are asked for") and "CUDA tensors only" in message


# Not the functions of these names that the package has.
all_reduce, all_reduce_norm, matmul, scatter = (
    importlib.import_module(f"fused_parallel.ops.{name}")
    for name in ("all_reduce", "all_reduce_add_rms_norm", "matmul_all_reduce", "matmul_reduce_scatter")
)


@pytest.fixture
def kernels(monkeypatch):
    """As if the tensors were on GPUs with kernels: (workspace, whose table has `chosen` for all, group)."""
    workspace = SimpleNamespace(hopper=True, slot_bytes=1024, takes_decode=lambda m, n: True)
    workspace.takes_rows = lambda bytes: False
    workspace.choice = lambda op, bytes: workspace.chosen
    for module in (all_reduce, all_reduce_norm, matmul, scatter):
        monkeypatch.setattr(module, "why_not_fused", lambda x, pg: None)
        monkeypatch.setattr(module, "workspace_of", lambda pg: workspace)
    return workspace, SimpleNamespace(size=lambda: 2)


@pytest.mark.parametrize("mode", ["auto", "fused"])
@pytest.mark.parametrize(
    "m,k,n,dtype,taken",
    [
        (4, 64, 64, torch.bfloat16, True),
        (4, 64, 64, torch.float16, True),
        (4, 64, 64, torch.float32, False),
        (4, 60, 64, torch.bfloat16, False),
        (4, 64, 60, torch.bfloat16, False),
        (0, 64, 64, torch.bfloat16, False),
        (4, 0, 64, torch.bfloat16, False),
    ],
)
def test_what_no_kernel_takes_is_matmul_and_collective_without_a_word(mode, m, k, n, dtype, taken, kernels):
    workspace, pg = kernels
    x, weight = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
    with fp.use(mode), warnings.catch_warnings():
        warnings.simplefilter("error")
        workspace.chosen = DECODE._replace(depth=0)
        for op in ("matmul_all_reduce", "matmul_all_reduce_add_rms_norm"):
            assert matmul.algorithm(op, x, weight, pg) == ("decode" if taken else "whole")
        workspace.chosen = PERSISTENT
        assert scatter._gathers_beside(x, weight, pg) == taken
        workspace.hopper = False
        assert matmul.algorithm("matmul_all_reduce", x, weight, pg) == "whole"
        assert not scatter._gathers_beside(x, weight, pg)
    with fp.use("reference"):
        workspace.hopper, workspace.chosen = True, Choice("decode")
        assert matmul.algorithm("matmul_all_reduce", x, weight, pg) == "whole"


def test_what_the_collective_behind_the_matmul_refuses(kernels):
    """Under fp.use("fused"): parts that are no multiple of 16 bytes or do not fit a slot, and rows that the kernel with
    the norm does not take; an all-reduce of anything goes, also where the table prefers torch.distributed."""
    workspace, pg = kernels
    workspace.chosen = LIBRARY

    def chosen(op, size, dtype, why_not):
        return all_reduce.kernel_choice(op, torch.empty(1, size, dtype=dtype), pg, why_not)

    with fp.use("fused"):
        for size in (1, 10, 5000):
            assert chosen("all_reduce", size, torch.float32, all_reduce.why_not_fused) == ONE
        for op in ("reduce_scatter", "all_gather"):
            assert chosen(op, 8, torch.bfloat16, all_reduce._why_no_part) == ONE
            for size in (9, 520):
                with pytest.raises(fp.NoFusedKernelError, match=f"{op}: .* a multiple of 16 up to 1024 bytes"):
                    chosen(op, size, torch.bfloat16, all_reduce._why_no_part)


def test_the_norm_behind_the_matmul_is_refused_for_rows_that_its_kernel_does_not_take(kernels, monkeypatch):
    workspace, pg = kernels
    workspace.chosen = ONE
    native = SimpleNamespace(all_reduce_max_norm_row_bytes=65536)
    monkeypatch.setattr(all_reduce_norm._ext, "extension", lambda: native)
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    residual, norm = torch.randn(3, 5), torch.ones(5)
    monkeypatch.setattr(matmul, "group_from_name", lambda name: pg)
    monkeypatch.setattr(matmul, "check_agreement", lambda *_: None)
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match="multiple of 16 up to 65536 bytes, not of 20"):
        matmul._impl_norm(x, weight, residual, norm, 1e-5, None, "")
