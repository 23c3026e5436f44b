"""Cached keys and values of a batch of sequences."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of `batch` sequences in `num_layers` layers, each up to `capacity` tokens, contiguous; written by
    `fp.rotary_cache_write`, read by `fp.verify_attention`.

    Args:
        num_layers, batch, capacity: sizes; this rank's layers only.
        num_kv_heads, head_dim: this rank's key-value heads.

    Attributes:
        k, v: [num_layers, batch, capacity, num_kv_heads, head_dim].
        lens: int32 [batch] on the device: tokens that count. Setting it back is the rollback of rejected tokens: their
            keys and values stay behind and are overwritten later.
        context: what all of `lens` are, where the host knows: set while prompts are taken in (`fp.verify_attention`),
            by whoever sets `lens`; else None. Not known any more as soon as `lens` are changed without it.
    """

    def __init__(
        self, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, *, device=None, dtype=None
    ) -> None:
        shape = (num_layers, batch, capacity, num_kv_heads, head_dim)
        # Zeros, not empty memory: masked positions still enter the attention as 0 * value, and 0 * nan is nan.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.context: int | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def positions(self, new: int) -> torch.Tensor:
        """int64 [batch, new]: the positions that the next `new` tokens of each sequence take."""
        return self.lens.long().unsqueeze(1) + torch.arange(new, device=self.lens.device)

    def check_room(self, new: int) -> None:
        """Raise ValueError unless `new` more tokens fit every sequence. On a GPU the lengths are not read back: there
        only the capacity as a whole is checked, and the caller counts."""
        most = 0 if self.lens.is_cuda else int(self.lens.max()) if self.batch else 0
        if most + new > self.capacity:
            raise ValueError(
                f"{new} more tokens do not fit a KV cache of {self.capacity} tokens that holds {most}; make it larger"
            )

    def keep_path(self, path: torch.Tensor) -> None:
        """Move the keys and values of an accepted path through a tree to where a chain's would be, in all layers.

        Before a tree's verification the root's token lies at `lens` of its sequence and node j of the tree at
        lens + 1 + j; afterwards the i-th accepted node lies at lens + 1 + i. Nodes that were not accepted are left
        behind, or overwritten. `lens` stays: the caller adds the accepted nodes and the root. Keys are not rotated
        again: node i of a path was rotated for the position lens + 1 + i, if the positions in the model were those of
        the tree's depths.

        Args:
            path: int64 [batch, depth] of `fp.verify_tree`: nodes, each after the one before; -1 after the last.

        On the current stream, without host synchronisation; can be captured in CUDA graphs. Positions beyond the
        capacity are left out, so that a sequence that stands still may lie at its end.

        Raises TypeError, ValueError: another dtype, shape or device.
        """
        if path.dtype != torch.int64:
            raise TypeError(f"keep_path: path has dtype {path.dtype}, expected torch.int64")
        if path.dim() != 2 or path.shape[0] != self.batch or path.device != self.k.device:
            raise ValueError(
                f"keep_path: path has shape {tuple(path.shape)} on {path.device}, expected [{self.batch}, depth] on "
                f"{self.k.device}"
            )
        if path.shape[1] == 0:
            return
        root = self.lens.long().unsqueeze(1)
        to, source = self.positions(path.shape[1]) + 1, root + 1 + path
        # Where there is no node, or no room, the root's slot is copied onto itself, which nothing else writes.
        moves = (path >= 0) & (source < self.capacity)
        root = root.clamp(max=self.capacity - 1)
        to, source = torch.where(moves, to, root), torch.where(moves, source, root)
        sequence = torch.arange(self.batch, device=path.device).unsqueeze(1)
        for cached in (self.k, self.v):
            cached[:, sequence, to] = cached[:, sequence, source]  # all are read before any is written

    def reset(self) -> None:
        """Forget all sequences."""
        self.lens.zero_()
        self.context = None
