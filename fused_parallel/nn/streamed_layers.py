"""Layers whose weights stay in host memory and visit the device one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

_ALIGNMENT = 256  # bytes; what CUDA's allocator gives, so that views into a block are aligned like tensors of their own


class StreamedLayers(nn.Module):
    """A stack of layers whose matrices live in host memory, copied to `slots` device blocks while iterating.

    Args:
        layers: name -> layer, in the order they run; names are kept as sub-module names. Parameters are on any device;
            on the meta device they get memory and no values, to be loaded. For a GPU the host memory is pinned, one
            block a layer.
        device: where the layers compute.
        slots: device blocks; with 2, one layer is copied while the other computes, a third absorbs jitter.
        resident_bytes: layers of up to so many bytes in all stay on the device, spread evenly over the stack, so that
            the copies of the others have time.

    One-dimensional parameters (norms, biases) and buffers are on the device always. Iterating yields (name, layer) with
    the layer's parameters on the device; they are valid until the next step. Copies run on a stream of their own,
    ordered by events: a copy into a slot waits for the layer that read it last, a layer for its copy. At the end of a
    pass the first layers' copies for the next one are started, behind whatever the caller does meanwhile (drafting);
    not once a pass has been captured in a graph. So weights must not be changed between passes except by
    `load_state_dict`. On a CPU device the same happens without streams.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        device: str | torch.device,
        slots: int = 2,
        resident_bytes: int = 0,
    ) -> None:
        super().__init__()
        if slots < 1 or not layers:
            raise ValueError(f"StreamedLayers: needs at least one layer and one slot, got {len(layers)} and {slots}")
        if resident_bytes < 0:
            raise ValueError(f"StreamedLayers: resident_bytes must not be negative, got {resident_bytes}")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._layers = list(layers.items())  # a layer may stand under two names
        self._iterating = False
        # Of each streamed layer, by its index: the block and the parameters in it.
        self._blocks: dict[int, torch.Tensor] = {}
        self._views: dict[int, list[tuple[nn.Parameter, int, torch.Size, torch.dtype]]] = {}
        sizes = [sum(_padded(p) for p in layer.parameters() if p.dim() > 1) for layer in layers.values()]
        resident = _spread(sizes, resident_bytes)
        for index, (name, layer) in enumerate(layers.items()):
            self.add_module(name, layer)
            for owner in layer.modules():
                for key, buffer in owner._buffers.items():
                    if buffer is not None:
                        owner._buffers[key] = buffer.to(self.device)
            views, size = [], 0
            for parameter in layer.parameters():
                if index in resident or parameter.dim() < 2:
                    _move(parameter, torch.empty_like(parameter, device=self.device))
                    continue
                views.append((parameter, size, parameter.shape, parameter.dtype))
                size += _padded(parameter)
            if not views:
                continue
            block = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            for parameter, offset, shape, dtype in views:
                _move(parameter, _view(block, offset, shape, dtype))
            self._blocks[index], self._views[index] = block, views
        self._order = sorted(self._blocks)
        largest = max((block.numel() for block in self._blocks.values()), default=0)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(slots)]
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._copied = [torch.cuda.Event() for _ in range(slots)] if on_gpu else []
        self._read = [torch.cuda.Event() for _ in range(slots)] if on_gpu else []
        self._ahead = False  # whether the first layers' copies have been started already
        self._captured = False  # a graph's replays write the slots, too, without a word: nothing is copied ahead then
        self.register_load_state_dict_pre_hook(lambda *_: setattr(self, "_ahead", False))
        self.passes = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory, which every pass copies."""
        return sum(block.numel() for block in self._blocks.values())

    def __len__(self) -> int:
        return len(self._layers)

    def values(self) -> list[nn.Module]:
        """The layers, as they are in memory: only what is one-dimensional may be used outside a pass."""
        return [layer for _, layer in self._layers]

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """A pass: the same as iterating."""
        return iter(self)

    def _fetch(self, place: int) -> None:
        """Start the copy of the streamed layer that is number `place` among them."""
        slot, block = place % len(self._slots), self._blocks[self._order[place]]
        target = self._slots[slot][: block.numel()]
        if self._stream is None:
            target.copy_(block)
            return
        self._stream.wait_event(self._read[slot])  # the layer that used this slot last has run
        with torch.cuda.stream(self._stream):
            target.copy_(block, non_blocking=True)
            self._copied[slot].record(self._stream)

    def _fetch_first(self) -> None:
        for event in self._read:
            event.record()  # what ran before on the current stream may still read the slots
        for place in range(min(len(self._slots), len(self._order))):
            self._fetch(place)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        if self._iterating:
            raise RuntimeError("StreamedLayers: one pass at a time, its slots are in use")
        self._iterating = True
        try:
            yield from self._pass()
        finally:
            self._iterating = False

    def _pass(self) -> Iterator[tuple[str, nn.Module]]:
        capturing = self._stream is not None and torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        if capturing or not self._ahead:
            self._fetch_first()
        self._ahead = False
        self.passes += 1
        place = {index: number for number, index in enumerate(self._order)}
        for index, (name, layer) in enumerate(self._layers):
            if index not in place:
                yield name, layer
                continue
            slot = place[index] % len(self._slots)
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
            if place[index] + len(self._slots) < len(self._order):
                self._fetch(place[index] + len(self._slots))
        if not self._captured:
            self._fetch_first()
            self._ahead = True


def _move(parameter: nn.Parameter, to: torch.Tensor) -> None:
    """Let the parameter's values live in `to`. A parameter on the meta device has none: its values are loaded later,
    straight into their place."""
    if parameter.is_meta:
        torch.utils.swap_tensors(parameter, nn.Parameter(to, requires_grad=parameter.requires_grad))
    else:
        parameter.data = to.copy_(parameter.data)


def _padded(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT


def _spread(sizes: list[int], budget: int) -> set[int]:
    """Indices of as many layers as fit `budget` bytes, evenly over the stack."""
    count = 0
    for count in range(len(sizes), -1, -1):
        chosen = {(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)}
        if sum(sizes[i] for i in chosen) <= budget:
            break
    return chosen


def _view(block: torch.Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    size = shape.numel() * dtype.itemsize
    return block[offset : offset + size].view(dtype).view(shape)
