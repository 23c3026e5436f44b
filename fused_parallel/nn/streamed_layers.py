"""Layers whose weights stay in host memory and visit the device one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

_ALIGNMENT = 256  # bytes; what CUDA's allocator gives, so that views into a block are aligned like tensors of their own


class StreamedLayers(nn.Module):
    """A stack of layers whose parameters live in host memory, copied to `slots` device blocks while iterating.

    Args:
        layers: name -> layer, in the order they run; names are kept as sub-module names. Parameters are on the CPU (or
            are moved there); on a GPU the host copy is pinned.
        device: where the layers compute.
        slots: device blocks; with 2, one layer is copied while the other computes.

    Iterating yields (name, layer) with the layer's parameters on the device; they are valid until the next step. Copies
    run
    on a stream of their own, ordered by events: a copy into a slot waits for the layer that read it last, a layer for
    its copy. On a CPU device the same happens without streams.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, device: str | torch.device, slots: int = 2) -> None:
        super().__init__()
        if slots < 1 or not layers:
            raise ValueError(f"StreamedLayers: needs at least one layer and one slot, got {len(layers)} and {slots}")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._layers = list(layers.items())  # a layer may stand under two names
        self._iterating = False
        self._blocks: list[torch.Tensor] = []
        self._views: list[list[tuple[nn.Parameter, int, torch.Size, torch.dtype]]] = []
        for name, layer in layers.items():
            self.add_module(name, layer)
            views, size = [], 0
            for parameter in layer.parameters():
                views.append((parameter, size, parameter.shape, parameter.dtype))
                size += -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
            block = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            for parameter, offset, shape, dtype in views:
                host = _view(block, offset, shape, dtype)
                host.copy_(parameter.data)
                parameter.data = host
            for buffer_owner in layer.modules():
                for key, buffer in buffer_owner._buffers.items():
                    if buffer is not None:
                        buffer_owner._buffers[key] = buffer.to(self.device)
            self._blocks.append(block)
            self._views.append(views)
        largest = max(block.numel() for block in self._blocks)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(slots)]
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._copied = [torch.cuda.Event() for _ in range(slots)] if on_gpu else []
        self._read = [torch.cuda.Event() for _ in range(slots)] if on_gpu else []

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(block.numel() for block in self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def _fetch(self, index: int) -> None:
        slot, block = index % len(self._slots), self._blocks[index]
        target = self._slots[slot][: block.numel()]
        if self._stream is None:
            target.copy_(block)
            return
        self._stream.wait_event(self._read[slot])  # the layer that used this slot last has run
        with torch.cuda.stream(self._stream):
            target.copy_(block, non_blocking=True)
            self._copied[slot].record(self._stream)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        if self._iterating:
            raise RuntimeError("StreamedLayers: one pass at a time, its slots are in use")
        self._iterating = True
        try:
            yield from self._pass()
        finally:
            self._iterating = False

    def _pass(self) -> Iterator[tuple[str, nn.Module]]:
        count, slots = len(self._blocks), len(self._slots)
        for event in self._read:
            event.record()  # what ran before on the current stream may still read the slots
        for index in range(min(slots, count)):
            self._fetch(index)
        for index, (name, layer) in enumerate(self._layers):
            slot = index % slots
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
            hosts = []
            for parameter, offset, shape, dtype in self._views[index]:
                hosts.append(parameter.data)
                parameter.data = _view(self._slots[slot], offset, shape, dtype)
            try:
                yield name, layer
            finally:
                for (parameter, *_), host in zip(self._views[index], hosts, strict=True):
                    parameter.data = host
                if self._stream is not None:
                    self._read[slot].record(torch.cuda.current_stream(self.device))
            if index + slots < count:
                self._fetch(index + slots)


def _view(block: torch.Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    size = shape.numel() * dtype.itemsize
    return block[offset : offset + size].view(dtype).view(shape)
