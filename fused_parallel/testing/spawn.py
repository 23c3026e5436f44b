"""Rank pools shared by the tests of one session, so that most tests do not pay for starting processes."""

from __future__ import annotations

from collections.abc import Callable

from ..comm.groups import init
from ..comm.launch import RankPool

_pools: dict[tuple[int, str], RankPool] = {}


def _call(function: Callable, device: str, mesh_sizes: dict, args, kwargs):
    return function(_mesh(device, **mesh_sizes), *args, **kwargs)


_meshes: dict = {}


def _mesh(device: str, **sizes):
    key = (device, tuple(sorted(sizes.items())))
    if key not in _meshes:
        _meshes[key] = init(device=device, timeout=60, **sizes)
    return _meshes[key]


def run_ranks(
    function: Callable,
    world_size: int,
    *args,
    device: str = "cpu",
    timeout: float = 120.0,
    tp=None,
    pp=1,
    dp=1,
    **kwargs,
) -> list:
    """Run `function(mesh, *args, **kwargs)` on `world_size` ranks; results in rank order.

    `function` must be at module level of an importable module. The processes and meshes are kept for later calls; a
    failure ends them and the next call starts new ones.
    """
    key = (world_size, device)
    pool = _pools.get(key)
    if pool is None or not pool.alive:
        pool = _pools[key] = RankPool(world_size)
    return pool.run(_call, function, device, dict(tp=tp, pp=pp, dp=dp), args, kwargs, timeout=timeout)


def close_pools() -> None:
    """End all kept processes (the test session's last act)."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()
