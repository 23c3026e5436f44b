"""What a message between two ranks is made of: its layout in a slot, and the header that tells it to the other end."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

HEADER_BYTES = 1024  # csrc/p2p.h: kP2PHeaderBytes
ALIGNMENT = 256  # of every tensor in its slot: kP2PAlignment
MAX_TENSORS = 32  # kP2PMaxTensors

# The order is part of the header: append only.
_DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.complex64,
    torch.complex128,
    *(
        getattr(torch, name)
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
        if hasattr(torch, name)
    ),
]
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

_TENSOR, _TUPLE, _DICT = range(3)
_PREFIX = struct.Struct("<QQQ")  # hash, bytes of the payload, bytes of the description


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a message lie in its slot. Equal messages have equal headers on both ends.

    kind: one tensor, a tuple or a dict; keys: of a dict, sorted. sizes: bytes of each tensor, offsets: in the payload.
    bytes: of the payload, padding between tensors included. hash: of the description, never 0.
    """

    kind: int
    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    bytes: int
    header: bytes = field(repr=False)
    hash: int = field(repr=False)

    def __str__(self) -> str:
        parts = [f"{str(d).removeprefix('torch.')} {list(s)}" for s, d in zip(self.shapes, self.dtypes, strict=True)]
        if self.kind == _DICT:
            parts = [f"{key!r}: {part}" for key, part in zip(self.keys, parts, strict=True)]
            return "{" + ", ".join(parts) + "}"
        return parts[0] if self.kind == _TENSOR else f"({', '.join(parts)})"

    def views(self, payload: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in `payload`, uint8, at least `bytes` long."""
        return [
            payload[offset : offset + size].view(dtype).view(shape) if size else payload.new_empty(shape, dtype=dtype)
            for shape, dtype, size, offset in zip(self.shapes, self.dtypes, self.sizes, self.offsets, strict=True)
        ]

    def packed(self, tensors: list[torch.Tensor]):
        """The message as it was given: a tensor, a tuple or a dict."""
        if self.kind == _TENSOR:
            return tensors[0]
        return tuple(tensors) if self.kind == _TUPLE else dict(zip(self.keys, tensors, strict=True))


@functools.lru_cache(maxsize=4096)
def _layout(kind: int, keys: tuple, shapes: tuple, dtypes: tuple) -> Layout:
    if len(shapes) > MAX_TENSORS:
        raise ValueError(f"p2p: a message holds at most {MAX_TENSORS} tensors, got {len(shapes)}")
    description, sizes, offsets, end = struct.pack("<BB", kind, len(shapes)), [], [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        if dtype not in _CODES:
            raise ValueError(f"p2p: tensors of dtype {dtype} cannot be sent")
        description += struct.pack(f"<BB{len(shape)}q", _CODES[dtype], len(shape), *shape)
        sizes.append(math.prod(shape) * dtype.itemsize)
        offsets.append(end)
        end += -(-sizes[-1] // ALIGNMENT) * ALIGNMENT
    for key in keys:
        encoded = key.encode()
        description += struct.pack("<H", len(encoded)) + encoded
    if len(description) > HEADER_BYTES - _PREFIX.size:
        raise ValueError(
            f"p2p: the shapes and keys of a message take {len(description)} bytes, of which a header has room for "
            f"{HEADER_BYTES - _PREFIX.size}; send fewer tensors, or shorter keys"
        )
    total = offsets[-1] + sizes[-1] if sizes else 0
    digest = int.from_bytes(hashlib.blake2b(description, digest_size=8).digest(), "little") or 1
    header = _PREFIX.pack(digest, total, len(description)) + description
    return Layout(kind, keys, shapes, dtypes, tuple(sizes), tuple(offsets), total, header, digest)


def _of(message, entry) -> tuple[Layout, list]:
    """Layout of a message or a spec, whose parts `entry` turns into (shape, dtype); and the parts in its order."""
    if isinstance(message, Mapping):
        bad = next((key for key in message if not isinstance(key, str)), None)
        if bad is not None:
            raise TypeError(f"p2p: the keys of a message must be strings, got {bad!r}")
        keys = tuple(sorted(message))  # both ends may name them in any order
        parts, kind = [message[key] for key in keys], _DICT
    else:
        keys, parts, kind = (), list(message), _TUPLE
    pairs = [entry(part) for part in parts]
    return _layout(kind, keys, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)), parts


def _tensor_entry(part) -> tuple[tuple[int, ...], torch.dtype]:
    if not isinstance(part, torch.Tensor):
        raise TypeError(
            f"p2p: a message is a tensor, or a tuple, list or dict of tensors; it holds {type(part).__name__}"
        )
    return tuple(part.shape), part.dtype


def _is_pair(spec) -> bool:
    return isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[1], torch.dtype)


def _spec_entry(part) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(part, torch.Tensor):
        return tuple(part.shape), part.dtype
    if not _is_pair(part):
        raise TypeError(
            "p2p: a spec is (shape, dtype) or a tensor like the one to come, or a tuple, list or dict of such; got "
            f"{part!r}"
        )
    shape = (part[0],) if isinstance(part[0], int) else tuple(part[0])
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"p2p: a shape holds integers of at least 0, got {shape!r}")
    return shape, part[1]


def layout_of(message) -> tuple[Layout, list[torch.Tensor]]:
    """Layout of `message`, a tensor or a tuple, list or dict of tensors, and its tensors in that order."""
    if isinstance(message, torch.Tensor):
        return _layout(_TENSOR, (), (tuple(message.shape),), (message.dtype,)), [message]
    if not isinstance(message, (Mapping, Sequence)) or isinstance(message, str):
        raise TypeError(
            f"p2p: a message is a tensor, or a tuple, list or dict of tensors, got {type(message).__name__}"
        )
    return _of(message, _tensor_entry)


def layout_of_spec(spec) -> Layout:
    """Layout of what `spec` describes: (shape, dtype) or a tensor, or a tuple, list or dict of such."""
    if isinstance(spec, torch.Tensor) or _is_pair(spec):
        shape, dtype = _spec_entry(spec)
        return _layout(_TENSOR, (), (shape,), (dtype,))
    if not isinstance(spec, (Mapping, Sequence)) or isinstance(spec, str):
        _spec_entry(spec)  # raises
    return _of(spec, _spec_entry)[0]


def layout_of_header(header: bytes) -> Layout:
    """The layout that the other end sent."""
    digest, _, length = _PREFIX.unpack_from(header)
    description, at = header[_PREFIX.size : _PREFIX.size + length], 2
    kind, count = description[0], description[1]
    shapes, dtypes, keys = [], [], []
    for _ in range(count):
        code, ndim = description[at], description[at + 1]
        shapes.append(struct.unpack_from(f"<{ndim}q", description, at + 2))
        dtypes.append(_DTYPES[code])
        at += 2 + 8 * ndim
    while at < len(description):
        (size,) = struct.unpack_from("<H", description, at)
        keys.append(description[at + 2 : at + 2 + size].decode())
        at += 2 + size
    layout = _layout(kind, tuple(keys), tuple(shapes), tuple(dtypes))
    if layout.hash != digest:
        raise RuntimeError("p2p: a header's description does not match its hash: the message was damaged on its way")
    return layout
