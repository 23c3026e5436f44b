"""Reading of Hugging Face safetensors directories, each rank only the slices its modules hold.

Files are mapped, and values go from the page cache straight into their place: no copy of the weights is made besides.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .._progress import progress_bar
from ..nn._shards import Piece, Shard, fill, full_shape
from ..nn.quantize import fill_quantized

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_THREADS = 8  # that read at once: disks want several requests, and ranks under torchrun compute with one thread


class _File:
    """A mapped safetensors file; the library checks it, the header gives the places."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with safe_open(file, framework="pt"):
                pass  # header complete and consistent, file as long as it says
            with open(file, "rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            size = int.from_bytes(self._map[:8], "little")
            self.entries = json.loads(self._map[8 : 8 + size])
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors ({error}); it is truncated or corrupt: copy it again"
            ) from error
        self.entries.pop("__metadata__", None)
        self._data = 8 + size
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # it is only read
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def _range(self, key: str) -> tuple[int, int]:
        begin, end = self.entries[key]["data_offsets"]
        return self._data + begin, self._data + end

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, in the mapped file; ValueError unless it is floating."""
        name = self.entries[key]["dtype"]
        dtype = _FLOATS.get(name)
        if dtype is None:
            raise ValueError(f"{self.file}: tensor {key!r} has dtype {name}; supported are {', '.join(_FLOATS)}")
        begin, end = self._range(key)
        flat = self._bytes[begin:end]
        if begin % dtype.itemsize:
            flat = flat.clone()  # a file that some other program wrote; the library aligns
        return flat.view(dtype).view(self.entries[key]["shape"])

    def forget(self, key: str) -> None:
        """Take the tensor's pages out of this process (they stay in the page cache)."""
        begin, end = self._range(key)
        begin -= begin % mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Checkpoint:
    """The tensors of a directory with model.safetensors, or model.safetensors.index.json and its parts.

    Files are memory-mapped and read slice by slice. Raises FileNotFoundError for missing files and ValueError for
    corrupt ones, naming the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened: dict[str, _File] = {}
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not a safetensors index ({error}); copy the model again") from error
            missing = sorted({f for f in self._file_of.values() if not (self.path / f).is_file()})
            if missing:
                raise FileNotFoundError(f"{self.path} lacks {', '.join(missing)}, named in {index.name}; copy them too")
        elif single.is_file():
            self._file_of = dict.fromkeys(self._open(single.name).entries, single.name)
        else:
            raise FileNotFoundError(
                f"{self.path} holds neither model.safetensors nor model.safetensors.index.json; expected a Hugging "
                "Face model directory"
            )

    def _open(self, name: str) -> _File:
        if name not in self._opened:
            self._opened[name] = _File(self.path / name)
        return self._opened[name]

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def keys(self) -> set[str]:
        return set(self._file_of)

    def tensor(self, key: str, shape: list[int]) -> torch.Tensor:
        """The whole tensor `key`, in its mapped file (not to be written); its shape must be `shape`."""
        if key not in self._file_of:
            raise ValueError(f"{self.path} has no tensor {key!r}; it is not a checkpoint of this model")
        file = self._open(self._file_of[key])
        if key not in file.entries:
            raise ValueError(f"{file.file} has no tensor {key!r}, which the index places there; copy the model again")
        found = file.entries[key]["shape"]
        if list(found) != list(shape):
            raise ValueError(f"{self.path}: tensor {key!r} has shape {found}, but config.json implies {list(shape)}")
        return file.tensor(key)

    def read(self, key: str, shape: list[int], dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices [start, stop) along dim 0 or 1 of `key`, whose whole shape must be `shape`: a view of the file."""
        return self.tensor(key, shape).narrow(dim, start, stop - start)

    def forget(self, key: str) -> None:
        """`key` has been read: its pages need not count as this process's memory any longer."""
        self._open(self._file_of[key]).forget(key)


@torch.no_grad()
def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    renamed: Mapping[str, str] | None = None,
    from_files: Callable[[nn.Parameter, Callable[[torch.Tensor], None]], bool] | None = None,
    written: Callable[[nn.Parameter], None] = lambda parameter: None,
    device: torch.device | None = None,
    progress: bool = False,
) -> set[str]:
    """Fill every parameter of `model`, reading only what this rank holds; the names of the tensors that were read.

    Args:
        renamed: name -> name of the tensor to read in its place (tied weights).
        from_files: from_files(parameter, fill) tells whether a parameter stays in its file: it is checked, but not
            read; `fill(tensor)` reads it whenever it is wanted.
        written: called with each parameter that has been filled.
        device: where weights are quantised (default: the CPU).
        progress: show a bar.

    Several threads read at once. Raises ValueError, before anything is read, where the checkpoint does not match.
    """
    used: set[str] = set()
    renamed, device = renamed or {}, device or torch.device("cpu")
    fillers: list[tuple[int, Callable[[], None]]] = []  # bytes to fill, and what fills them
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
        quantized = getattr(module, "quantized", None)
        parameters = dict(module.named_parameters(recurse=False))
        if quantized is not None:
            values, scales = parameters.pop("values"), parameters.pop("scales")
            # Stands for the weight that the checkpoint holds.
            parameters["weight"] = torch.empty(module.weight_shape, dtype=scales.dtype, device="meta")
        for name, parameter in parameters.items():
            shard: Shard | None = getattr(module, "shards", {}).get(name)
            if quantized is not None and name == "weight":
                shard = module.weight_shard
            if shard is None:
                whole = list(parameter.shape)
                shard = Shard(0, whole[0], (Piece(name, 0, whole[0], 0, whole[0]),))
            shapes = {p.source: full_shape(parameter, shard, p) for p in shard.pieces}

            keys = {s: parent + s[3:] if s.startswith("../") else prefix + s for s in shapes}
            keys = {source: renamed.get(key, key) for source, key in keys.items()}
            for source, key in keys.items():
                checkpoint.tensor(key, shapes[source])
            used |= set(keys.values())

            def read(source, dim, start, stop, shapes=shapes, keys=keys):
                return checkpoint.read(keys[source], shapes[source], dim, start, stop)

            def fill_from_file(to, shard=shard, read=read, keys=keys):
                fill(to, shard, read)
                for key in keys.values():
                    checkpoint.forget(key)

            def quantize_from_file(module=module, shard=shard, read=read, keys=keys):
                fill_quantized(
                    module.values.data, module.scales.data, module.quantized, module.weight_shape, shard, read, device
                )
                for key in keys.values():
                    checkpoint.forget(key)
                written(module.values), written(module.scales)

            def fill_parameter(fill_from_file=fill_from_file, parameter=parameter):
                fill_from_file(parameter.data)
                written(parameter)

            if quantized is not None and name == "weight":
                fillers.append((values.nbytes + scales.nbytes, quantize_from_file))
            elif from_files is None or not from_files(parameter, fill_from_file):
                fillers.append((parameter.nbytes, fill_parameter))

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = ThreadPoolExecutor(max(1, min(_THREADS, len(os.sched_getaffinity(0)) // ranks)))
    try:
        with progress_bar(progress, "loading", sum(size for size, _ in fillers), "GB") as advance:
            reading = {threads.submit(read_one): size for size, read_one in fillers}
            for future in as_completed(reading):
                future.result()
                advance(reading[future])
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
    return used
