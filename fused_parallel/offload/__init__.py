"""Models larger than the GPU: weights in host memory, streamed layer by layer (nn.StreamedLayers)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Offload:
    """How a model's layers are offloaded; `LlamaForCausalLM.from_pretrained(path, mesh=mesh, offload=Offload(...))`.

    resident_bytes: bytes of this rank's layers that stay on the device (spread evenly over the stack), besides
        embedding, head, norms and the KV cache.
    host_bytes: bytes of host memory for this rank's layers; those beyond stay in the safetensors files and are read in
        every pass. None: what the layers need, and an error where there is less.
    cache_dir: a directory of a disk; the layers beyond `host_bytes` are put into a file without a name there while they
        are loaded, as they travel: quantised, converted, this rank's part. Every rank makes its own.
    cpu: compute layers on the CPU from host memory instead of copying them, as many as a measurement says, in passes of
        up to 64 tokens; no tensor parallelism. Products then round as the CPU's do, not as the GPU's.
    slots: device blocks that layers are copied to in turn, each of the largest layer's size.

    Raises ValueError for negative sizes, less than one slot, and cache_dir without host_bytes.
    """

    resident_bytes: int = 0
    slots: int = 2
    host_bytes: int | None = None
    cpu: bool = False
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.resident_bytes, int) or self.resident_bytes < 0:
            raise ValueError(f"Offload: resident_bytes must be an integer of at least 0, got {self.resident_bytes!r}")
        if self.host_bytes is not None and (not isinstance(self.host_bytes, int) or self.host_bytes < 0):
            raise ValueError(f"Offload: host_bytes must be an integer of at least 0 or None, got {self.host_bytes!r}")
        if not isinstance(self.slots, int) or self.slots < 1:
            raise ValueError(f"Offload: slots must be an integer of at least 1, got {self.slots!r}")
        if self.cache_dir is not None and self.host_bytes is None:
            raise ValueError(
                f"Offload: cache_dir={str(self.cache_dir)!r} is for layers beyond host_bytes: give that, too"
            )
