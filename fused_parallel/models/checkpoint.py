"""Reading of Hugging Face safetensors directories, each rank only the slices its modules hold."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..nn._shards import Shard, fill


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

    def read(self, key: str, dim: int, start: int, stop: int, full: int) -> torch.Tensor:
        """Indices [start, stop) of `key` along dim 0 or 1, whose size along it must be `full`."""
        tensor = self._slice(key)
        shape = tensor.get_shape()
        if dim >= len(shape) or shape[dim] != full:
            raise ValueError(
                f"{self.path}: tensor {key!r} has shape {list(shape)}, but config.json implies size {full} along "
                f"dim {dim}"
            )
        return tensor[start:stop] if dim == 0 else tensor[:, start:stop]

    def read_all(self, key: str, shape: torch.Size) -> torch.Tensor:
        """The whole of `key`, whose shape must be `shape`."""
        tensor = self._slice(key)
        if tuple(tensor.get_shape()) != tuple(shape):
            raise ValueError(
                f"{self.path}: tensor {key!r} has shape {tensor.get_shape()}, but config.json implies {list(shape)}"
            )
        return tensor[:]


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, *, skip: tuple[str, ...] = ()) -> None:
    """Fill every parameter of `model` except those named in `skip`, reading only what this rank holds."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
        for name, parameter in module.named_parameters(recurse=False):
            if prefix + name in skip:
                continue
            shard: Shard | None = getattr(module, "shards", {}).get(name)
            if shard is None:
                parameter.copy_(checkpoint.read_all(prefix + name, parameter.shape))
                continue
            full = {p.source: p.full for p in shard.pieces}

            def read(source, dim, start, stop, full=full, prefix=prefix, parent=parent):
                key = parent + source[3:] if source.startswith("../") else prefix + source
                return checkpoint.read(key, dim, start, stop, full[source])

            fill(parameter, shard, read)
