"""Layers in a file of their own, as they travel: this rank's part, in its dtype, quantised."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch


class CacheFile:
    """Blocks of bytes in a file without a name, which is gone with the process that made it, however that ends.

    Args:
        sizes: of the blocks, in bytes, by their numbers; none is 0.
        directory: where the file is. Not on a file system in memory (tmpfs): it would take what it is to save.
        what: whose they are, for errors.

    `tensors`: number -> uint8 [size], mapped: values are written there, and `read` reads them back. Raises
    RuntimeError where the directory cannot hold the blocks.
    """

    def __init__(self, sizes: Mapping[int, int], directory: str | Path, what: str) -> None:
        total, offset = sum(sizes.values()), 0
        self.tensors: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[int, int]] = {}
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open for as long as this lives
            os.posix_fallocate(self._file.fileno(), 0, total)  # now, not by SIGBUS when a page is written
        except OSError as error:
            raise RuntimeError(
                f"{what}: a file of {total / 1e9:.2f} GB cannot be made in {directory} ({error.strerror}); give "
                "another cache_dir, or leave more layers on the device (resident_bytes) or in host memory (host_bytes)"
            ) from error
        self._map: mmap.mmap | None = mmap.mmap(self._file.fileno(), total)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._base = whole.data_ptr()
        for number, size in sizes.items():
            self.tensors[number] = whole[offset : offset + size]
            self._places[number] = offset, size
            offset += size

    def read(self, number: int, into: torch.Tensor) -> None:
        """Block `number` to the beginning of `into`, uint8 in host memory."""
        offset, size = self._places[number]
        view, done = memoryview(into.numpy())[:size], 0
        while done < size:  # the system reads 2 GB at once, at most
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise RuntimeError(f"a cache file of layers ends at byte {offset + done}: something has cut it off")
            done += count

    def written(self, tensor: torch.Tensor) -> None:
        """`tensor`, wherever it lies, has been written: its pages need not count as this process's memory any longer;
        they stay in the file."""
        offset = tensor.data_ptr() - self._base
        if 0 <= offset < len(self._map) and tensor.nbytes > 0:
            begin = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, begin, offset + tensor.nbytes - begin)

    def close(self) -> None:
        """Give the space back, as soon as no tensor lies in the file any more."""
        self.tensors.clear()
        self._map = None
        self._file.close()
