"""How attention heads are laid over the ranks of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

from ._shards import Piece, Shard


@dataclass(frozen=True)
class HeadLayout:
    """This rank's heads: query heads [q_start, q_stop) and key-value heads [kv_start, kv_stop) of the model, padded
    with zero heads to `local_q` and `local_kv`. Every local key-value head serves local_q / local_kv local query heads.
    """

    num_heads: int
    num_kv_heads: int
    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    local_q: int
    local_kv: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, rank: int, world: int) -> HeadLayout:
        """Lay whole groups (a key-value head with its query heads) on the ranks; with more ranks than groups, split
        each group over several ranks, which then hold copies of its key-value head.

        Raises ValueError where a rank would hold nothing but padding.
        """
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} key-value heads")
        group = num_heads // num_kv_heads
        if num_kv_heads >= world:
            per = -(-num_kv_heads // world)
            start, stop = rank * per, min((rank + 1) * per, num_kv_heads)
            idle = (world - 1) * per >= num_kv_heads
            layout = cls(num_heads, num_kv_heads, start * group, stop * group, start, stop, per * group, per)
        else:
            copies = world // num_kv_heads
            per = -(-group // copies)
            kv, part = divmod(rank, copies)
            start, stop = kv * group + part * per, kv * group + min((part + 1) * per, group)
            idle = world % num_kv_heads != 0 or (copies - 1) * per >= group
            layout = cls(num_heads, num_kv_heads, start, stop, kv, kv + 1, per, 1)
        if idle:
            fitting = [
                w for w in range(1, world) if num_kv_heads % w == 0 or (w % num_kv_heads == 0 and num_heads % w == 0)
            ]
            raise ValueError(
                f"tp={world} does not fit {num_heads} query heads and {num_kv_heads} key-value heads: some rank would "
                f"hold only padding; smaller sizes that divide: {', '.join(map(str, fitting))}"
            )
        return layout

    def q_shard(self, dim: int, head_dim: int, source: str = "") -> Shard:
        piece = Piece(source, self.q_start * head_dim, self.q_stop * head_dim, 0, self.num_heads * head_dim)
        return Shard(dim, self.local_q * head_dim, (piece,))

    def kv_shard(self, dim: int, head_dim: int, source: str = "") -> Shard:
        piece = Piece(source, self.kv_start * head_dim, self.kv_stop * head_dim, 0, self.num_kv_heads * head_dim)
        return Shard(dim, self.local_kv * head_dim, (piece,))
