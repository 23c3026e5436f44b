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
    """

    def __init__(
        self, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, *, device=None, dtype=None
    ) -> None:
        shape = (num_layers, batch, capacity, num_kv_heads, head_dim)
        # Zeros, not empty memory: masked positions still enter the attention as 0 * value, and 0 * nan is nan.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)

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

    def reset(self) -> None:
        """Forget all sequences."""
        self.lens.zero_()
