"""Reading of Hugging Face safetensors directories, each rank only the slices its modules hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..nn._shards import Piece, Shard, fill, full_shape


class Checkpoint:
    """The tensors of a directory with model.safetensors, or model.safetensors.index.json and its parts.

    Files are memory-mapped and read slice by slice. Raises FileNotFoundError for missing files and ValueError for
    corrupt ones, naming the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened: dict[str, object] = {}
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
            self._file_of = dict.fromkeys(self._open(single.name).keys(), single.name)
        else:
            raise FileNotFoundError(
                f"{self.path} holds neither model.safetensors nor model.safetensors.index.json; expected a Hugging "
                "Face model directory"
            )

    def _open(self, name: str):
        if name not in self._opened:
            file = self.path / name
            try:
                self._opened[name] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read as safetensors ({error}); it is truncated or corrupt: copy it again"
                ) from error
        return self._opened[name]

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def keys(self) -> set[str]:
        return set(self._file_of)

    def _slice(self, key: str):
        if key not in self._file_of:
            raise ValueError(f"{self.path} has no tensor {key!r}; it is not a checkpoint of this model")
        try:
            return self._open(self._file_of[key]).get_slice(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path / self._file_of[key]}: tensor {key!r} cannot be read ({error})") from error

    def read(self, key: str, shape: list[int], dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices [start, stop) along dim 0 or 1 of `key`, whose whole shape must be `shape`."""
        tensor = self._slice(key)
        if list(tensor.get_shape()) != list(shape):
            raise ValueError(
                f"{self.path}: tensor {key!r} has shape {tensor.get_shape()}, but config.json implies {list(shape)}"
            )
        return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, *, renamed: Mapping[str, str] | None = None) -> set[str]:
    """Fill every parameter of `model`, reading only what this rank holds; the names of the tensors that were read.

    `renamed`: name -> name of the tensor to read in its place (tied weights).
    """
    used: set[str] = set()
    renamed = renamed or {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
        for name, parameter in module.named_parameters(recurse=False):
            shard: Shard | None = getattr(module, "shards", {}).get(name)
            if shard is None:
                whole = list(parameter.shape)
                shard = Shard(0, whole[0], (Piece(name, 0, whole[0], 0, whole[0]),))
            shapes = {p.source: full_shape(parameter, shard, p) for p in shard.pieces}

            keys = {s: parent + s[3:] if s.startswith("../") else prefix + s for s in shapes}
            keys = {source: renamed.get(key, key) for source, key in keys.items()}
            used |= set(keys.values())

            def read(source, dim, start, stop, shapes=shapes, keys=keys):
                return checkpoint.read(keys[source], shapes[source], dim, start, stop)

            fill(parameter, shard, read)
    return used
