"""What a captured CUDA graph says of its nodes and of the edges between them, by the driver's own functions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

KERNEL, MEMCPY = 0, 1  # CUgraphNodeType
FULL, PROGRAMMATIC = 0, 1  # CUgraphDependencyType


class _EdgeData(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = [
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    ]


@dataclass(frozen=True)
class Edge:
    """`source` and `target` are nodes (handles), `kinds` their types. An edge of type FULL with both ports 0 lets the
    target begin when the source is complete; a programmatic one earlier."""

    source: int
    target: int
    kinds: tuple[int, int]
    type: int
    ports: tuple[int, int]


def edges_of(graph: torch.cuda.CUDAGraph) -> list[Edge]:
    """The edges of a graph made with keep_graph=True."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments) -> None:
        error = getattr(driver, name)(*arguments)
        if error != 0:
            raise RuntimeError(f"{name} failed with CUDA error {error}")

    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
    call("cuGraphGetEdges_v2", handle, None, None, None, ctypes.byref(count))
    sources, targets = ((ctypes.c_void_p * count.value)() for _ in range(2))
    data = (_EdgeData * count.value)()
    call("cuGraphGetEdges_v2", handle, sources, targets, data, ctypes.byref(count))

    def kind(node: int) -> int:
        value = ctypes.c_int(-1)
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(value))
        return value.value

    return [
        Edge(source, target, (kind(source), kind(target)), about.type, (about.from_port, about.to_port))
        for source, target, about in zip(sources, targets, data, strict=True)
    ]
