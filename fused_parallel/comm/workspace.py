"""The memory that the fused collectives of a group exchange through: symmetric buffers, counters, the record of
failures."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from .. import _ext
from ..errors import PeerTimeoutError
from . import tuning
from .capabilities import agree, refuse_capture
from .collectives import all_gather_object
from .topology import host_identity

# Slots of all ranks together; the largest payload of one kernel, two-shot, is half of it, and larger ones take several.
# Three generations of one slot for each peer: 96 MiB a GPU at two ranks, 168 MiB at eight.
SLOTS_BYTES = 64 << 20


# Slots for tiles of the matmul kernel (csrc/matmul_all_reduce.cu), twice: 256 MiB a GPU, made when a matmul first uses
# it. At two ranks 8192 rows of 8192 columns go in one launch; each launch ends in an exchange that nothing hides.
MATMUL_TILES = 2048

# Room for the rows that all_gather_matmul gathers from the other ranks; made when it is first needed.
GATHER_BYTES = 256 << 20
MOST_CHOICES = 4096  # that a group remembers, by size


def slot_bytes_for(world: int) -> int:
    return SLOTS_BYTES // world // 16 * 16


class AllReduceWorkspace:
    """One rank's workspace of a group whose ranks reach each other's memory. Made once, before graphs are captured: the
    constructor is collective and synchronises; it is never freed or grown while the process lives.

    Args:
        pg: a group of 2 to 8 ranks on one host, one CUDA device each.
        timeout_seconds: bound of every wait for a peer inside a kernel.
    """

    def __init__(self, pg: dist.ProcessGroup, timeout_seconds: float) -> None:
        extension, device = _ext.extension(), torch.device("cuda", torch.cuda.current_device())
        slot_bytes = slot_bytes_for(pg.size())
        self.pg, self.device, self.device_index, self.slot_bytes = pg, device, device.index, slot_bytes
        self._choices: dict[tuple[str, int], tuning.Choice] = {}
        # (op, dtype, elements) -> the launcher's arguments, for ops._direct.
        self.known: dict[tuple, tuple] = {}
        self.hopper = agree(pg).compute_capability[0] == 9
        self._decode = self.hopper and agree(pg).multiprocessors > 0
        self._most_row_bytes = extension.all_reduce_max_norm_row_bytes if self.hopper else 0
        self._handles, self._matmul, self._gather = [], None, None
        buffer, bases = self._symmetric(extension.all_reduce_workspace_bytes(pg.size(), slot_bytes))
        self.native, self._owned = make_native(pg.rank(), bases, slot_bytes, timeout_seconds, device)
        self._owned += (buffer,)
        self.native.reset(torch.cuda.current_stream(device).cuda_stream)
        self._meet()  # no rank may push before every rank's buffer holds the sentinel

    def choice(self, op: str, bytes: int) -> tuning.Choice:
        """What the group's table says of a payload; looked up once for each size."""
        found = self._choices.get((op, bytes))
        if found is None:
            found = tuning.choose(agree(self.pg).tuning, op, bytes)
            if len(self._choices) >= MOST_CHOICES:  # prompts of ever new lengths
                self._choices.clear()
            self._choices[op, bytes] = found
        return found

    def forget_choices(self) -> None:
        """After the group's table has been changed, as tuning and tests do."""
        self._choices.clear()
        self.known.clear()

    def matmul(self):
        """The extension's MatmulWorkspace; made at the first call, which is collective and may not be captured."""
        if self._matmul is None:
            refuse_capture("the first matmul_all_reduce or matmul_reduce_scatter of many rows makes its workspace")
            extension = _ext.extension()
            buffer, bases = self._symmetric(extension.matmul_workspace_bytes(MATMUL_TILES))
            buffer.zero_()
            control = torch.zeros(8, dtype=torch.uint8, device=self.device)
            self._meet()  # no rank may set a flag before every rank's are zero
            self._owned += (buffer, control)
            self._matmul = extension.MatmulWorkspace(self.native, bases, MATMUL_TILES, control.data_ptr())
        return self._matmul

    def gather(self):
        """The extension's GatherWorkspace; as `matmul`."""
        if self._gather is None:
            refuse_capture("the first all_gather_matmul of many rows makes its workspace")
            extension = _ext.extension()
            buffer, bases = self._symmetric(extension.gather_workspace_bytes(GATHER_BYTES))
            buffer.zero_()
            control = torch.tensor([0, 0, 0, 1], dtype=torch.int32, device=self.device)
            self._meet()
            self._owned += (buffer, control)
            self._gather = extension.GatherWorkspace(self.native, bases, GATHER_BYTES, control.data_ptr())
        return self._gather

    def _symmetric(self, size: int) -> tuple[torch.Tensor, list[int]]:
        """A buffer of `size` bytes on every rank, and its addresses here by rank."""
        import torch.distributed._symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        handle = symmetric_memory.rendezvous(buffer, self.pg.group_name)
        self._handles.append(handle)
        return buffer, list(handle.buffer_ptrs)

    def _meet(self) -> None:
        """Return when the GPUs of all ranks have done what they were given before."""
        torch.cuda.synchronize(self.device)
        dist.barrier(group=self.pg, device_ids=[self.device.index])
        torch.cuda.synchronize(self.device)

    def takes_rows(self, bytes: int) -> bool:
        """Whether the kernel with the norm takes rows of `bytes` bytes."""
        return bytes % 16 == 0 and bytes <= self._most_row_bytes

    def takes_decode(self, m: int, n: int) -> bool:
        """Whether the matmul kernel for few rows takes a result [m, n]: its grid, and so the order of its sums, follows
        from the shape and the GPU's size, which all ranks must share."""
        return self._decode and _ext.extension().takes_matmul_decode(self.native, m, n)

    def check(self) -> None:
        """Raise PeerTimeoutError if a kernel has recorded a failed wait; the group stays failed."""
        rank = self.native.failed_rank()
        if rank >= 0:
            peer = dist.get_global_rank(self.pg, rank)
            raise PeerTimeoutError(
                f"{self.native.failure()} of its group, which is global rank {peer}: it died, stopped, or runs another "
                "sequence of operations. The group cannot be used any more: end this job on all ranks, start it again"
            )


_workspaces: dict[str, AllReduceWorkspace] = {}
# id of what callers pass as group=, a ProcessGroup or a mesh -> (that, its workspace), for ops._direct. By identity:
# meshes of the same ranks are equal, though their groups are different ones.
by_group: dict[int, tuple[object, AllReduceWorkspace]] = {}
_why_not: dict[str, str | None] = {}
_FIRST = "the first fused operation of a group makes its workspace"
# Channels, whose failures fp.check() raises, too.
_watched: weakref.WeakSet = weakref.WeakSet()


def watch(channel) -> None:
    """Let `check` call `channel.check()` while it lives."""
    _watched.add(channel)


def unwatch(channel) -> None:
    """Let `check` forget it."""
    _watched.discard(channel)


def why_no_workspace(pg: dist.ProcessGroup) -> str | None:
    """Why the ranks of `pg` cannot exchange through each other's memory; None if they can. The same on every rank;
    collective on its first call for a group."""
    name = pg.group_name
    if name not in _why_not:
        _why_not[name] = _find_reason(pg)
    return _why_not[name]


def _find_reason(pg: dist.ProcessGroup) -> str | None:
    if not 2 <= pg.size() <= 8:
        return f"the group has {pg.size()} ranks and the kernels take 2 to 8"
    if not agree(pg).cuda_kernels:
        return f"some rank has no CUDA kernels (here: {_ext.why_no_kernels() or 'they are there'})"
    refuse_capture(_FIRST)  # the gathering would fail in a way that names no cause
    everyone = all_gather_object((host_identity(), torch.cuda.current_device()), pg)
    if len({host for host, _ in everyone}) > 1:
        return "its ranks are on several hosts"
    devices = [device for _, device in everyone]
    if len(set(devices)) < len(devices):
        return "some of its ranks share a GPU"
    mine = devices[pg.rank()]
    cut_off = any(peer != mine and not torch.cuda.can_device_access_peer(mine, peer) for peer in devices)
    cut_off = any(all_gather_object(cut_off, pg))
    return "some of its GPUs have no access to each other's memory" if cut_off else None


def existing_workspace(pg: dist.ProcessGroup) -> AllReduceWorkspace | None:
    """The workspace of `pg` if it has been made."""
    return _workspaces.get(pg.group_name)


def workspace_of(pg: dist.ProcessGroup) -> AllReduceWorkspace:
    """The workspace of `pg`, made at the first call, which is collective and may not be captured in a graph."""
    name = pg.group_name
    if name not in _workspaces:
        refuse_capture(_FIRST)
        options = getattr(pg._get_backend(torch.device("cuda")), "options", None)
        timeout = getattr(options, "_timeout", None)  # what fp.init set
        _workspaces[name] = AllReduceWorkspace(pg, timeout.total_seconds() if timeout else 300.0)
    return _workspaces[name]


def check() -> None:
    """Raise PeerTimeoutError if a kernel of any group or channel has recorded a failed wait since the process began, or
    MessageMismatchError if a channel received another message than it was told to expect.

    Reads host memory only: no synchronisation, so call it when the work in question is done. fp.generate does.
    """
    for workspace in _workspaces.values():
        workspace.check()
    for watched in list(_watched):
        watched.check()


def forget() -> None:
    """Drop all workspaces, when torch.distributed is shut down: graphs that hold them must not be replayed again."""
    _workspaces.clear()
    by_group.clear()
    _why_not.clear()
    _watched.clear()


def make_native(
    rank: int,
    bases: list[int],
    slot_bytes: int,
    timeout_seconds: float,
    device: torch.device,
    max_threads: int | None = None,
):
    """(extension's workspace over the ranks' buffers at `bases`, the tensors it lives on). `max_threads` threads of a
    kernel must be resident at once; default: half of what a GPU holds, so that two groups at work fit
    (csrc/all_reduce.h, Grid)."""
    extension = _ext.extension()
    control = torch.zeros(extension.all_reduce_control_bytes, dtype=torch.uint8, device=device)
    record = torch.zeros(extension.all_reduce_record_bytes, dtype=torch.uint8, pin_memory=True)
    if max_threads is None:
        max_threads = torch.cuda.get_device_properties(device).multi_processor_count * 512
    native = extension.AllReduceWorkspace(
        rank=rank,
        bases=bases,
        slot_bytes=slot_bytes,
        control=control.data_ptr(),
        record=record.data_ptr(),
        timeout_seconds=timeout_seconds,
        device=device.index,
        max_threads=max_threads,
    )
    return native, (control, record)
