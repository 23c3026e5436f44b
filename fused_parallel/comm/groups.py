"""Process groups and the device mesh: what `fp.init` makes and every operation takes as `group=`."""

from __future__ import annotations

import atexit
import datetime
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DEFAULT_TIMEOUT_S = 300.0

# Gloo (torch 2.13) connects groups on threads that nobody joins: a process that ends while they run, up to some 0.1 s
# after it made its groups, aborts with "terminate called without an active exception". Short programs live this long.
_SETTLE_S = 0.5
_groups_made_at: float | None = None


def _outlive_connections() -> None:
    if _groups_made_at is not None:
        time.sleep(max(0.0, _groups_made_at + _SETTLE_S - time.monotonic()))


def _environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment; a world of one without it."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))
    except (KeyError, ValueError) as error:
        raise ValueError(
            "fp.init: RANK and WORLD_SIZE must both be set to integers, as torchrun does; "
            f"got RANK={os.environ.get('RANK')!r}, WORLD_SIZE={os.environ.get('WORLD_SIZE')!r}"
        ) from error
    return rank, world, local


def rank_and_world() -> tuple[int, int, int]:
    """(rank, world size, local rank) of torch.distributed where it runs, else of the environment it will start from."""
    rank, world, local = _environment()
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    return rank, world, local


def _choose_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    try:
        kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        kind = "none that torch knows"
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"fp.init: device must be 'cuda' or 'cpu', got {device!r}")
    count = torch.cuda.device_count()
    if local_rank >= count:
        fewer = f"start at most {count} rank(s) a host, or " if count else ""
        raise ValueError(
            f"fp.init: local rank {local_rank} has no GPU, this host shows {count}; {fewer}run on the CPU with "
            "fp.init(device='cpu') (command line: --device cpu)"
        )
    return torch.device("cuda", local_rank)


def _check_sizes(world: int, tp: int | None, pp: int, dp: int) -> int:
    for name, value in (("tp", tp), ("pp", pp), ("dp", dp)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"fp.init: {name} must be a positive integer, got {value!r}")
    if tp is None:
        if world % (pp * dp):
            raise ValueError(
                f"fp.init: the world of {world} rank(s) is not divisible by pp * dp = {pp} * {dp}; start a multiple of "
                f"{pp * dp}: torchrun --nproc-per-node {pp * dp} ..."
            )
        return world // (pp * dp)
    if tp * pp * dp != world:
        raise ValueError(
            f"fp.init: tp * pp * dp = {tp} * {pp} * {dp} = {tp * pp * dp}, but the world has {world} rank(s); "
            f"start that many: torchrun --nproc-per-node {tp * pp * dp} ..."
        )
    return tp


def init(
    tp: int | None = None,
    pp: int = 1,
    dp: int = 1,
    *,
    timeout: float | datetime.timedelta = DEFAULT_TIMEOUT_S,
    device: str | torch.device | None = None,
) -> DeviceMesh:
    """The mesh of these sizes, `tp=None` taking what is left of the world: `fp.init` (planner/apply.py) without a
    plan, where arguments, result and errors are described."""
    rank, world, local_rank = rank_and_world()
    tp = _check_sizes(world, tp, pp, dp)
    if not isinstance(timeout, datetime.timedelta):
        if not timeout > 0:
            raise ValueError(f"fp.init: timeout must be a positive number of seconds, got {timeout!r}")
        timeout = datetime.timedelta(seconds=timeout)
    where = _choose_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        _forget()
        _start(where, rank, world, timeout)
    note_connections()
    mesh = init_device_mesh(where.type, (dp, pp, tp), mesh_dim_names=("dp", "pp", "tp"))
    for name in ("dp", "pp", "tp"):
        # Sub-groups take the backend's default timeout, not the world's: set it, or a dead peer costs 10 to 30 minutes.
        dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))
        _timeouts[mesh.get_group(name).group_name] = timeout.total_seconds()
    return mesh


def note_connections() -> None:
    """Groups or channels over Gloo have just been made: see _SETTLE_S."""
    global _groups_made_at
    if _groups_made_at is None:
        atexit.register(_outlive_connections)
    _groups_made_at = time.monotonic()


_timeouts: dict[str, float] = {}  # group name -> seconds


def timeout_of(pg: dist.ProcessGroup) -> float:
    """Seconds that bound waits in `pg`: what `fp.init` was given for groups of its meshes, else its default."""
    return _timeouts.get(pg.group_name, DEFAULT_TIMEOUT_S)


def _start(where: torch.device, rank: int, world: int, timeout: datetime.timedelta) -> None:
    # Gloo beside NCCL carries Python objects and agreements without touching a GPU stream.
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    kwargs = {"device_id": where} if where.type == "cuda" else {}
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, **kwargs)
        return
    try:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout, **kwargs)
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            advice = "that port is in use: choose another (torchrun --master-port N, or MASTER_PORT=N)"
        else:
            advice = f"check that all {world} ranks were started and can reach that address"
            if "remote=[127." in str(error):
                advice += (
                    "; some rank announced itself at a loopback address, which its host name stands for: set "
                    "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface on every host"
                )
        raise RuntimeError(
            f"fp.init: rank {rank} could not join the group at {address}; {advice}. Cause: {error}"
        ) from error


_local_group: dist.ProcessGroup | None = None


def local_group() -> dist.ProcessGroup:
    """A group of this rank alone, for modules that every rank holds whole (a replicated draft model)."""
    global _local_group
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not running: call fp.init() first")
    if _local_group is None:
        _local_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return _local_group


def finalize() -> None:
    """Leave torch.distributed; safe to call when it never started. All ranks call it before they exit."""
    if dist.is_initialized():
        from .p2p import close_all

        close_all()
        dist.destroy_process_group()
    _forget()


def _forget() -> None:
    """Group names are used again after torch.distributed was shut down; what was agreed under them is void."""
    global _local_group
    _local_group = None
    from . import capabilities, p2p, workspace

    _timeouts.clear()
    p2p.forget()
    capabilities.forget()
    workspace.forget()


def resolve_group(group) -> dist.ProcessGroup:
    """The ProcessGroup behind `group=`, which is a ProcessGroup or a one-dimensional DeviceMesh.

    Raises TypeError for anything else (also None: torch's None means the whole world, ours is never implicit) and
    ValueError for a mesh of several dimensions or a group this rank is not in.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group= takes a one-dimensional mesh, got one with dimensions {group.mesh_dim_names}; "
                'pick a dimension, as in group=mesh["tp"]'
            )
        try:
            return group.get_group()
        except RuntimeError as error:
            raise _gone(error) from error
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group=: this rank is not a member of the group it was given")
    raise TypeError(f'group= must be a ProcessGroup or a 1-D DeviceMesh such as mesh["tp"], got {type(group).__name__}')


def group_from_name(name: str) -> dist.ProcessGroup:
    """The ProcessGroup registered in this process under `name` (operations' schemas carry names)."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)
    except RuntimeError as error:
        raise _gone(error) from error


def _gone(error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        "the process group is gone: fp.finalize() was called, or torch.distributed was shut down; call fp.init() and "
        f"make modules and meshes again. Cause: {error}"
    )
