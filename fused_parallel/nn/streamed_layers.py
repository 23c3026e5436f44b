"""Layers whose weights stay in host memory and visit the device one after the other."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from .._progress import progress_bar
from ..offload.cache_file import CacheFile
from ..offload.disk_reader import DiskReader
from ..offload.host_memory import HostBlocks
from .linear import ColumnParallelLinear, RowParallelLinear, local_product

_ALIGNMENT = 256  # bytes; what CUDA's allocator gives, so that views into a block are aligned like tensors of their own
_DISK_BLOCKS = 2  # one is read while the other is copied
_MOST_ROWS_ON_CPU = 64
_LEAST_SHARE_ON_CPU = 0.1  # of the layers: what it saves, less is not worth the waits of the host
_LINEARS = (ColumnParallelLinear, RowParallelLinear)


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
        host_bytes: layers of up to so many bytes in all are in host memory, evenly again; those beyond stay in the
            files they are loaded from (`from_files`) and are read in every pass, ahead of their use, through two blocks
            that count here. None: all are in host memory. Only for layers on the meta device, or with `cache_dir`.
        cache_dir: a directory; the layers beyond `host_bytes` are then in a file without a name there, as they travel,
            instead of those they are loaded from: quantised, converted, this rank's part.
        cpu: compute layers of parallel linears on the CPU, from host memory, instead of copying them, as many as a
            measurement says: in passes of up to 64 rows (`items(rows)`), not in captured ones.
        progress: show a bar while memory is pinned.

    One-dimensional parameters (norms, biases) and buffers are on the device always. Iterating yields (name, layer) with
    the layer's parameters on the device; they are valid until the next step. Copies run on a stream of their own,
    ordered by events: a copy into a slot waits for the layer that read it last, a layer for its copy. At the end of a
    pass the first layers' copies for the next one are started, behind whatever the caller does meanwhile (drafting);
    not once a pass has been captured in a graph (there, `prefetch` starts them early). So weights must not be changed
    between passes except by `load_state_dict`. On a CPU device the same happens without streams.

    Raises ValueError for sizes that make no sense, RuntimeError where host memory does not suffice or cannot be pinned;
    then, and when interrupted, what was pinned is given back.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        device: str | torch.device,
        slots: int = 2,
        resident_bytes: int = 0,
        host_bytes: int | None = None,
        cache_dir: str | Path | None = None,
        cpu: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if slots < 1 or not layers:
            raise ValueError(f"StreamedLayers: needs at least one layer and one slot, got {len(layers)} and {slots}")
        for name, size in (("resident_bytes", resident_bytes), ("host_bytes", host_bytes or 0)):
            if size < 0:
                raise ValueError(f"StreamedLayers: {name} must not be negative, got {size}")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._layers = list(layers.items())
        if len({id(layer) for layer in layers.values()}) < len(layers):
            raise ValueError(f"StreamedLayers: a layer stands under two of the names {', '.join(layers)}")
        self._iterating = False
        # Of each streamed layer, by its index: the block, or None for one in files, and the parameters in it.
        self._blocks: dict[int, torch.Tensor | None] = {}
        self._views: dict[int, list[tuple[nn.Parameter, int, torch.Size, torch.dtype]]] = {}
        sizes = [streamed_bytes(layer) for layer in layers.values()]
        resident = _spread(sizes, resident_bytes)
        self._order = [index for index, size in enumerate(sizes) if size and index not in resident]
        in_files = _beyond([sizes[i] for i in self._order], host_bytes)
        in_files = {self._order[place] for place in in_files}
        largest = max((sizes[i] for i in self._order), default=0)
        on_disk = [i for i in self._order if i in in_files]
        self._cache: CacheFile | None = None
        if on_disk and cache_dir is not None:
            what = f"StreamedLayers: {len(on_disk)} of {len(layers)} layers on disk"
            self._cache = CacheFile({i: sizes[i] for i in on_disk}, cache_dir, what)
        wanted = {i: sizes[i] for i in self._order if i not in in_files}
        with progress_bar(progress and on_gpu, "pinning host memory", sum(wanted.values()), "GB") as advance:
            self._host = HostBlocks(
                [*wanted.values(), *[largest] * (_DISK_BLOCKS if on_disk else 0)],
                self.device,
                f"StreamedLayers: {len(wanted)} of {len(layers)} layers in host memory",
                advance,
            )
        try:
            cached = self._cache.tensors if self._cache is not None else {}
            self._fill_tiers(dict(zip(wanted, self._host.tensors, strict=False)), cached, resident)
            self._slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(slots)]
        except BaseException:
            self._host.release()
            raise
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._copied = [torch.cuda.Event() for _ in range(slots)] if on_gpu else []
        self._read = [torch.cuda.Event() for _ in range(slots)] if on_gpu else []
        self._ahead = False  # whether the first layers' copies have been started already
        self._captured = False  # a graph's replays write the slots, too, without a word: nothing is copied ahead then
        self._ahead_in_capture = False
        if self._stream is not None:
            for slot in self._slots:
                slot.record_stream(self._stream)  # not another tensor's memory while a copy into it may be under way
        # No bound methods are kept here: pinned memory would wait for the collector of cycles once the layers are gone.
        self.register_load_state_dict_pre_hook(StreamedLayers._before_loading)
        self._fillers: dict[int, Callable[[torch.Tensor], None]] = {}  # by the parameter's id
        self._disk: DiskReader | None = None
        if on_disk:
            read = weakref.WeakMethod(self._read_from_disk)
            self._disk = DiskReader(on_disk, lambda *what: read()(*what), self._host.tensors[-_DISK_BLOCKS:])
            if self._cache is None:
                self.register_state_dict_pre_hook(_refuse_state_dict)
                self.register_load_state_dict_pre_hook(_refuse_state_dict)
        self.passes = 0
        self.streamed_bytes = 0  # copied to the device by all passes
        self._cpu = cpu
        for linear in [m for layer in layers.values() for m in layer.modules() if isinstance(m, _LINEARS)]:
            linear.on_cpu = cpu
        self._on_cpu: dict[int, frozenset[int]] = {}  # rows of a pass -> the layers that are then computed on the CPU
        self._streaming = self._order  # the layers that this pass copies, or the one to come
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._copy_seconds = 0.0

    def _fill_tiers(self, hosts: dict[int, torch.Tensor], cached: dict[int, torch.Tensor], resident: set[int]) -> None:
        """Give every parameter its place."""
        for index, (name, layer) in enumerate(self._layers):
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
            block = hosts.get(index, cached.get(index))
            for parameter, offset, shape, dtype in views:
                if block is not None:
                    _move(parameter, _view(block, offset, shape, dtype))
                elif parameter.is_meta:
                    _move(parameter, torch.empty(1, dtype=dtype).expand(shape))  # a place without memory
                else:
                    raise ValueError(
                        "StreamedLayers: host_bytes is for layers on the meta device, read from files; others need a "
                        "cache_dir"
                    )
            self._blocks[index], self._views[index] = hosts.get(index), views

    @property
    def blocks(self) -> list[torch.Tensor]:
        """uint8 [bytes] in host memory, one for each layer that is copied from there, in the order of a pass."""
        return [self._blocks[i] for i in self._order if self._blocks[i] is not None]

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory, which every pass copies."""
        return sum(block.numel() for block in self.blocks)

    @property
    def disk_bytes(self) -> int:
        """Bytes of weights that every pass reads from files and copies."""
        return sum(sum(_padded(p) for p, *_ in self._views[i]) for i, b in self._blocks.items() if b is None)

    @property
    def copy_seconds(self) -> float:
        """For how long copies to the device have run, as far as they are over; not those of captured passes."""
        self._take_in_events()
        return self._copy_seconds

    def _take_in_events(self) -> None:
        while self._timed and self._timed[0][1].query():
            start, end = self._timed.popleft()
            self._copy_seconds += start.elapsed_time(end) * 1e-3

    def __len__(self) -> int:
        return len(self._layers)

    def values(self) -> list[nn.Module]:
        """The layers, as they are in memory: only what is one-dimensional may be used outside a pass."""
        return [layer for _, layer in self._layers]

    def items(self, rows: int | None = None) -> Iterator[tuple[str, nn.Module]]:
        """A pass, as iterating is; for `rows` rows of input, by which layers are chosen for the CPU (`cpu`)."""
        if self._iterating:
            raise RuntimeError("StreamedLayers: one pass at a time, its slots are in use")
        self._iterating = True
        try:
            yield from self._pass(rows)
        finally:
            self._iterating = False

    def on_cpu(self, rows: int) -> frozenset[int]:
        """Which layers, by their number, a pass of `rows` rows computes on the CPU; measured at the first call.

        n layers of which m are computed on the CPU, in t_cpu each, while the others are copied, in t_copy each, take
        max(m * t_cpu, (n - m) * t_copy): least at m = n * t_copy / (t_copy + t_cpu).
        """
        if not self._cpu or rows > _MOST_ROWS_ON_CPU:
            return frozenset()
        if rows not in self._on_cpu:
            places = [index for index in self._order if self._blocks[index] is not None]
            share = 0.0
            if places:
                copying, computing = self._time_copy(places[0]), self._time_on_cpu(places[0], rows)
                share = copying / (copying + computing)
            count = int(len(places) * share) if share >= _LEAST_SHARE_ON_CPU else 0
            self._on_cpu[rows] = frozenset(places[i] for i in _spread([1] * len(places), count))
        return self._on_cpu[rows]

    def _time_copy(self, index: int) -> float:
        """Seconds of a layer's copy, the best of three. What was copied ahead is lost."""
        self._ahead, took = False, []
        block = self._blocks[index]
        for _ in range(3):
            self._synchronize()
            begin = time.perf_counter()
            self._slots[0][: block.numel()].copy_(block)
            self._synchronize()
            took.append(time.perf_counter() - begin)
        return min(took)

    def _time_on_cpu(self, index: int, rows: int) -> float:
        """Seconds of a layer's matrix products on the CPU, from and to the device, the best of three."""
        linears = [m for m in self._layers[index][1].modules() if isinstance(m, _LINEARS)]
        inputs = []
        for linear in linears:
            k = linear.weight_shape[1] if linear.quantized else linear.weight.shape[1]
            dtype = (linear.scales if linear.quantized else linear.weight).dtype
            inputs.append(torch.randn(rows, k, device=self.device).to(dtype))
        took = []
        for _ in range(3):
            self._synchronize()
            begin = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                local_product(linear, x)
            self._synchronize()
            took.append(time.perf_counter() - begin)
        return min(took)

    def _before_loading(self, *_) -> None:
        """Copies that are queued, by passes or replays, still read the old weights."""
        self._synchronize()
        self._ahead = False
        if self._disk is not None:
            self._disk.forget()

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def from_files(self, parameter: nn.Parameter, fill: Callable[[torch.Tensor], None]) -> bool:
        """Whether `parameter` is of a layer that stays in files; then `fill(tensor)`, which reads it, is kept for every
        pass. Called by loaders for each parameter."""
        if self._cache is not None or not any(
            p is parameter for i, block in self._blocks.items() if block is None for p, *_ in self._views[i]
        ):
            return False
        self._fillers[id(parameter)] = fill
        return True

    def written(self, parameter: nn.Parameter) -> None:
        """A loader has filled `parameter`, the whole of it."""
        if self._cache is not None:
            self._cache.written(parameter.data)

    def _read_from_disk(self, index: int, block: torch.Tensor) -> None:
        if self._cache is not None:
            self._cache.read(index, block)
            return
        for parameter, offset, shape, dtype in self._views[index]:
            if id(parameter) not in self._fillers:
                raise RuntimeError(f"StreamedLayers: layer {self._layers[index][0]!r} stays in files and is not loaded")
            self._fillers[id(parameter)](_view(block, offset, shape, dtype))

    def release(self) -> None:
        """Give the host memory back. The layers are of no use afterwards."""
        if self._stream is not None:
            self._stream.synchronize()
        if self._disk is not None:
            self._disk.close()
        if self._cache is not None:
            for index in self._cache.tensors:
                for parameter, _, shape, dtype in self._views[index]:
                    parameter.data = torch.empty(1, dtype=dtype).expand(shape)  # out of the file
            self._cache.close()
        self._host.release()

    def _fetch(self, place: int) -> None:
        """Start the copy of the streamed layer that is number `place` among them."""
        index, slot = self._streaming[place], place % len(self._slots)
        block = self._blocks[index]
        source = block if block is not None else self._disk.take(index)
        target = self._slots[slot]
        if self._stream is None:
            begin = time.perf_counter()
            target[: source.numel()].copy_(source[: target.numel()])
            self._copy_seconds += time.perf_counter() - begin
            if block is None:
                self._disk.give_back(source, None)
            return
        capturing = torch.cuda.is_current_stream_capturing()
        self._stream.wait_event(self._read[slot])  # the layer that used this slot last has run
        with torch.cuda.stream(self._stream):
            if not capturing:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(self._stream)
            target[: source.numel()].copy_(source[: target.numel()], non_blocking=True)
            if not capturing:
                end.record(self._stream)
                self._timed.append((start, end))
            self._copied[slot].record(self._stream)
        if block is None:
            self._disk.give_back(source, end)

    def _fetch_first(self) -> None:
        for place in range(min(len(self._slots), len(self._streaming))):
            self._fetch(place)

    def _begin(self) -> None:
        """The first layers' copies, behind all that the current stream was given: it may read the slots."""
        for event in self._read:
            event.record()
        self._fetch_first()

    def _capturing(self) -> bool:
        capturing = self._stream is not None and torch.cuda.is_current_stream_capturing()
        if capturing and self._disk is not None:
            raise RuntimeError("StreamedLayers: layers that stay in files are read by the host: no CUDA graphs")
        self._captured |= capturing
        if not capturing:
            self._ahead_in_capture = False
        return capturing

    def prefetch(self) -> None:
        """Start the first layers' copies of the next pass now, behind what the current stream has been given, where
        they have not been started yet. In a capture, what follows until the pass then runs beside them."""
        if self._capturing():
            if not self._ahead_in_capture:
                self._begin()
            self._ahead_in_capture = True
        elif not self._ahead:
            self._begin()
            self._ahead = True

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return self.items()

    def _pass(self, rows: int | None) -> Iterator[tuple[str, nn.Module]]:
        capturing = self._capturing()
        on_cpu = frozenset() if capturing or rows is None else self.on_cpu(rows)
        streaming = [index for index in self._order if index not in on_cpu]
        if streaming != self._streaming:  # what was copied ahead is not what comes first
            self._streaming, self._ahead, self._ahead_in_capture = streaming, False, False
        self.prefetch()
        self._ahead = self._ahead_in_capture = False
        self.passes += 1
        if not capturing:  # where nothing is copied, and events may not be queried
            self.streamed_bytes += sum(_padded(p) for i in streaming for p, *_ in self._views[i])
            self._take_in_events()
        place = {index: number for number, index in enumerate(streaming)}
        for index, (name, layer) in enumerate(self._layers):
            if index not in place:  # on the device, or computed where it is
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
            if place[index] + len(self._slots) < len(streaming):
                self._fetch(place[index] + len(self._slots))
        if not self._captured:
            # Every slot's last reader has been recorded above: its copy need not wait for the whole pass.
            self._fetch_first()
            self._ahead = True


def _refuse_state_dict(module: nn.Module, *_) -> None:
    raise RuntimeError("StreamedLayers: layers that stay in files (host_bytes) have no state dict; read the files")


def _move(parameter: nn.Parameter, to: torch.Tensor) -> None:
    """Let the parameter's values live in `to`. A parameter on the meta device has none: its values are loaded later,
    straight into their place."""
    if parameter.is_meta:
        torch.utils.swap_tensors(parameter, nn.Parameter(to, requires_grad=parameter.requires_grad))
    else:
        parameter.data = to.copy_(parameter.data)


def streamed_bytes(layer: nn.Module) -> int:
    """Bytes of a block that holds a layer's matrices: what it counts of `resident_bytes` and `host_bytes`."""
    return sum(_padded(p) for p in layer.parameters() if p.dim() > 1)


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


def _beyond(sizes: list[int], host_bytes: int | None) -> set[int]:
    """Indices of the layers that `host_bytes` of host memory have no room for."""
    if host_bytes is None or sum(sizes) <= host_bytes:
        return set()
    return set(range(len(sizes))) - _spread(sizes, max(0, host_bytes - _DISK_BLOCKS * max(sizes)))


def _view(block: torch.Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    size = shape.numel() * dtype.itemsize
    return block[offset : offset + size].view(dtype).view(shape)
