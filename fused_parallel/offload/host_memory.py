"""Host memory for weights: how much there is, and blocks of it that a GPU can copy from at full rate (pinned).

torch's own pinned allocations are rounded up to a power of two (a layer of 1.7 GB takes 2) and made one after the
other; these are anonymous mappings of the size asked for, touched and registered with CUDA by several threads, on the
CPUs beside the GPU where NVML knows which those are.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_THREADS = 16  # that touch and pin; zeroing pages is bound by memory, so more would not help
LESS = "leave more layers on the device (resident_bytes) or on disk (host_bytes), or quantize"
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts of the process


@dataclass(frozen=True)
class Room:
    """Host memory: bytes that can be taken now, bytes in all, and what says so."""

    available: int
    total: int
    where: str


def room() -> list[Room]:
    """Every bound on this process's host memory: the machine's and those of its control groups (containers)."""
    return [*_machine(), *_control_groups()]


def _machine() -> list[Room]:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available, total = (int(lines[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return []
    return [Room(available, total, "MemAvailable in /proc/meminfo")]


def _control_groups() -> list[Room]:
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in groups:
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = root / path.strip("/")
        # Inside a container the path may be the host's, of which only the root is visible.
        for folder in dict.fromkeys((inner, *inner.parents, root)):
            if not folder.is_relative_to(root):
                continue
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # given back when asked for
            found.append(Room(max(0, most - used + cached), most, str(folder / limit)))
    return found


def check_room(needed: int, what: str) -> None:
    """RuntimeError unless `needed` bytes can be taken now, and all ranks of this host can take as many in the end."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for bound in room():
        if needed > bound.available or needed * ranks > bound.total:
            each = f" by each of {ranks} ranks" if ranks > 1 else ""
            raise RuntimeError(
                f"{what}: {_gb(needed)} of host memory are needed{each}, {_gb(bound.available)} of {_gb(bound.total)} "
                f"are available ({bound.where}); {LESS}"
            )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _register(address: int, size: int) -> str | None:
    """Pin; why it failed, or None."""
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(address, size, _PORTABLE)
    return None if int(error) == 0 else runtime.cudaGetErrorString(error)


def _unregister(address: int, device: int) -> None:
    # Copies that still read the pages must end before they are unpinned.
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


class _Pages(mmap.mmap):
    """An anonymous mapping; unpinned before it is unmapped, with the last tensor that lies in it."""

    pinned: tuple[int, int] | None = None  # address, and the GPU that copies from it

    def pin(self, address: int, device: int) -> None:
        # A child of fork() must not get a copy of pinned pages: the kernel would make it at once.
        self.madvise(mmap.MADV_DONTFORK)
        np.frombuffer(self, np.uint8)[:: mmap.PAGESIZE] = 0  # taken by this thread, so beside its CPU
        reason = _register(address, len(self))
        if reason is not None:
            raise RuntimeError(reason)
        self.pinned = address, device

    def unpin(self) -> None:
        pinned, self.pinned = self.pinned, None
        if pinned is not None:
            _unregister(*pinned)

    def __del__(self):
        if not sys.is_finalizing():  # the end of the process gives everything back, and faster
            self.unpin()


class HostBlocks:
    """Blocks of host memory, uint8 tensors [size], pinned for `device` if that is a GPU.

    Args:
        sizes: of the blocks, in bytes; none is 0.
        what: whose they are, for errors.
        advance: called with the bytes of each block that is ready, from the calling thread.

    Raises RuntimeError that tells what is needed and what there is, where memory does not suffice or cannot be pinned.
    Whatever interrupts it, KeyboardInterrupt included, nothing stays pinned.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        what: str,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.tensors: list[torch.Tensor] = []
        self._pages: list[_Pages] = []
        total = sum(sizes)
        check_room(total, what)
        try:
            for size in sizes:
                pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with contextlib.suppress(OSError):  # a kernel without them
                    pages.madvise(mmap.MADV_HUGEPAGE)
                self._pages.append(pages)
                self.tensors.append(torch.frombuffer(pages, dtype=torch.uint8))
            if device.type == "cuda":
                self._pin(device, what, total, advance)
        except BaseException:
            self.release()
            raise

    def _pin(self, device: torch.device, what: str, total: int, advance: Callable[[int], object]) -> None:
        from ..comm.topology import cpus_near

        index = device.index if device.index is not None else torch.cuda.current_device()
        near = cpus_near(index)

        def place() -> None:
            if near:
                os.sched_setaffinity(0, near)  # of this thread alone: pages are taken from the memory beside its CPU
            torch.cuda.set_device(index)

        threads = ThreadPoolExecutor(min(_THREADS, len(near or os.sched_getaffinity(0))), initializer=place)
        try:
            waiting = {
                threads.submit(pages.pin, tensor.data_ptr(), index): len(pages)
                for pages, tensor in zip(self._pages, self.tensors, strict=True)
            }
            done = 0
            for future in as_completed(waiting):
                try:
                    future.result()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"{what}: {_gb(total)} of host memory are needed, and pinning them failed after {_gb(done)} "
                        f"({error}); {LESS}"
                    ) from None
                done += waiting[future]
                advance(waiting[future])
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def release(self) -> None:
        """Unpin the blocks and give the memory back. Tensors in it read zeros from then on."""
        for pages in self._pages:
            pages.unpin()
            pages.madvise(mmap.MADV_DONTNEED)
