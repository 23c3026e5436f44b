"""W ranks of the all-reduce on one GPU: W workspaces whose kernels run on W streams, with grids small enough that all
are resident at once. The protocol and the bits are those of W GPUs; only the link is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fused_parallel import _ext
from fused_parallel.comm.workspace import make_native


class VirtualRanks:
    def __init__(
        self, world: int, slot_bytes: int = 1 << 20, timeout_seconds: float = 20.0, max_threads: int | None = None
    ) -> None:
        self.world, self.device = world, torch.device("cuda", torch.cuda.current_device())
        size = _ext.extension().all_reduce_workspace_bytes(world, slot_bytes)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(world)]
        bases = [b.data_ptr() for b in self.buffers]
        if max_threads is None:
            max_threads = torch.cuda.get_device_properties(self.device).multi_processor_count * 512 // world
        made = [
            make_native(rank, bases, slot_bytes, timeout_seconds, self.device, max_threads) for rank in range(world)
        ]
        self.native, self._owned = [m[0] for m in made], [m[1] for m in made]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        for native in self.native:
            native.reset(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()

    def start(self) -> None:
        """Let all streams wait for what the current stream has done."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())

    def finish(self) -> None:
        """Let the current stream wait for all streams."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

    def on_all(self, launch: Callable[[int], object], sleeps: Sequence[int] | None = None) -> None:
        """`launch(rank)`, which uses the rank's stream, for all ranks, each `sleeps[rank]` cycles late; behind what the
        current stream has been given, which then waits for all of them."""
        self.start()
        for rank in range(self.world):
            if sleeps is not None:
                with torch.cuda.stream(self.streams[rank]):
                    torch.cuda._sleep(sleeps[rank])
            launch(rank)
        self.finish()

    def skewed_graphs(
        self, launch: Callable[[int], object], count: int, most_cycles: int
    ) -> list[torch.cuda.CUDAGraph]:
        """CUDA graphs of `on_all`, in each of which the ranks are late by other numbers of cycles."""
        self.on_all(launch)  # what is made at first use
        torch.cuda.synchronize()
        graphs = []
        for sleeps in torch.randint(0, most_cycles, (count, self.world)).tolist():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.on_all(launch, sleeps)
            graphs.append(graph)
        return graphs

    def launch(self, rank: int, x, out, two_shot: bool, threads: int = 0, ctas: int = 0) -> None:
        self.native[rank].all_reduce(
            x=x.data_ptr(),
            out=out.data_ptr(),
            elements=x.numel(),
            two_shot=two_shot,
            threads=threads,
            ctas=ctas,
            dtype=_ext.DTYPE_CODES[x.dtype],
            stream=self.streams[rank].cuda_stream,
        )

    def launch_norm(self, rank, x, residual, weight, normed, new_residual, eps: float, cluster: int = 0) -> None:
        self.native[rank].all_reduce_add_rms_norm(
            x=x.data_ptr(),
            residual=residual.data_ptr(),
            weight=weight.data_ptr(),
            normed=normed.data_ptr(),
            new_residual=new_residual.data_ptr(),
            rows=x.numel() // x.shape[-1],
            hidden=x.shape[-1],
            eps=eps,
            cluster=cluster,
            ctas=0,
            dtype=_ext.DTYPE_CODES[x.dtype],
            stream=self.streams[rank].cuda_stream,
        )

    def launch_part(self, op: str, rank: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """`op`: "reduce_scatter" or "all_gather"."""
        getattr(self.native[rank], op)(
            x=x.data_ptr(),
            out=out.data_ptr(),
            elements=min(x.numel(), out.numel()),
            ctas=0,
            dtype=_ext.DTYPE_CODES[x.dtype],
            stream=self.streams[rank].cuda_stream,
        )

    def all_reduce(self, xs: list[torch.Tensor], two_shot: bool = False, in_place: bool = False) -> list[torch.Tensor]:
        outs = xs if in_place else [torch.full_like(x, float("nan")) for x in xs]
        self.on_all(lambda rank: self.launch(rank, xs[rank], outs[rank], two_shot))
        return outs

    def all_reduce_add_rms_norm(
        self, xs, residual, weight, eps: float, cluster: int = 0
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        outs = [(torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))) for x in xs]
        self.on_all(lambda rank: self.launch_norm(rank, xs[rank], residual, weight, *outs[rank], eps, cluster))
        return outs

    def check(self) -> None:
        torch.cuda.synchronize()
        failures = [native.failure() for native in self.native]
        assert not any(failures), failures
