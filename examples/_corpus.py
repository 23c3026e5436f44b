"""The text, its held-out split and the byte tokenizer that `train_tiny.py` and the tests share.

The text is the Python standard library's own sources: every machine that can run the script has them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch

SEPARATOR = 0  # NUL never occurs in the text: it is BOS, EOS, padding and what stands between two files
HELD_OUT_PER_MILLE = 30

# Installed packages are not the standard library; tests are missing from many distributions; code-page tables and the
# pydoc topics are data in .py files, which would teach little and flatter the held-out figures.
_EXCLUDED = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data",
    "_bundled", "lib-dynload",
}  # fmt: skip


def corpus_files(root: str | Path | None = None) -> list[tuple[str, Path]]:
    """(relative POSIX path, path) of every source file under `root` (default: the standard library), sorted by path."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        machine_specific = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if not _EXCLUDED.intersection(relative.parts) and not machine_specific:
            found.append((relative.as_posix(), path))
    if not found:
        raise ValueError(f"no Python sources under {root}: this Python is installed without its standard library")
    return sorted(found)


def is_held_out(relative_path: str) -> bool:
    """Whether a file is kept out of training: by a hash of its path alone, so that Python versions agree."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def load_corpus(root: str | Path | None = None) -> tuple[list[bytes], list[bytes]]:
    """The documents to train on and the held-out ones, each in path order."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    for relative, path in corpus_files(root):
        text = path.read_bytes()
        if text and SEPARATOR not in text:
            (held_out if is_held_out(relative) else train).append(text)
    if not train or not held_out:
        raise ValueError(f"{len(train)} files to train on and {len(held_out)} held out: both sides need at least one")
    return train, held_out


def pack(documents: list[bytes]) -> torch.Tensor:
    """One uint8 tensor: the separator, then each document followed by the separator."""
    separator = bytes([SEPARATOR])
    joined = separator + separator.join(documents) + separator
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def held_out_prompts(documents: list[bytes], count: int, length: int) -> torch.Tensor:
    """int64 [count, length]: windows spread evenly over the documents, none of which crosses a document's end."""
    windows = [
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    ]
    if len(windows) < count:
        raise ValueError(f"{count} prompts of {length} bytes asked for, the held-out files hold {len(windows)}")
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    return torch.tensor([list(window) for window in chosen], dtype=torch.int64)


def byte_tokenizer():
    """A `tokenizers.Tokenizer` whose token id is the byte's value: no merges, nothing added or stripped."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that the byte-level pre-tokenizer writes for each byte.

    Printable Latin-1 characters stand for themselves; the other bytes take code points from 256 upward, in byte order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, spare = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(spare))
            spare += 1
    return characters
