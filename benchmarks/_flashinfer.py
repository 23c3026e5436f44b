"""FlashInfer's all-reduces as peers: TensorRT-LLM's fused kernels and vLLM's custom all-reduce, as FlashInfer 0.6.6
packages both (`pip install flashinfer-python==0.6.6`).

Both keep buffers that the ranks open in each other's memory by CUDA IPC: one host, peer access between all GPUs. They
are made for at most MAX_TOKENS tokens. At the first use FlashInfer compiles its kernels, for minutes, with nvcc.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from _common import Bench

MAX_TOKENS = 1024
VLLM_CTAS = 36  # the most that vLLM's kernel takes, and what vLLM itself launches
# What the kernel takes for one pattern or the other; its function has no defaults.
_LEFT_OUT = dict.fromkeys(["allreduce_out", "residual_in", "residual_out", "norm_out", "rms_gamma", "rms_eps"])


class Trtllm:
    """TensorRT-LLM's all-reduce, alone or with residual addition and RMSNorm; launched with programmatic dependent
    launch (PDL), sums in float32. Made by all ranks together.

    Args:
        bench: its group (2, 4, 8 or 16 ranks), dtype and device are used.
        hidden: of all inputs, in whole 16-byte vectors.
        module: from `load("trtllm_ar")`.
    """

    def __init__(self, bench: Bench, hidden: int, module: ModuleType):
        _check(bench, hidden, (2, 4, 8, 16))
        self.module = module
        # Every buffer's size but one follows from the dtype; the two-shot kernel's is always that of 16-bit elements.
        tokens = MAX_TOKENS * max(1, bench.dtype.itemsize // 2)
        # The first value, buffers by name, is needed only to free them before the process ends.
        _, self.workspace = module.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            bench.pg.rank(), bench.world, tokens, hidden, bench.dtype == torch.float32, bench.pg
        )
        self.fixed = {"world_size": bench.world, "world_rank": bench.pg.rank(), "hidden_dim": hidden}

    def variants(self, tokens: int) -> dict[str, dict[str, bool]]:
        """impl -> the keyword arguments of the methods below, for those that take inputs of this many tokens.

        `flashinfer_trtllm` is the Lamport one-shot kernel that lets the next kernel start (PDL) at its end, `_early`
        the same as soon as its own inputs are there; `_two_shot` reduces between barriers and has no early variant.
        """
        if tokens > MAX_TOKENS:
            return {}
        found = {"flashinfer_trtllm": {}, "flashinfer_trtllm_early": {"early": True}}
        if tokens > self.fixed["world_size"]:  # FlashInfer's own condition
            found["flashinfer_trtllm_two_shot"] = {"one_shot": False}
        return found

    def all_reduce(self, x: torch.Tensor, *, one_shot: bool = True, early: bool = False) -> torch.Tensor:
        """The sum over ranks of `x`, [tokens, hidden] and contiguous, in a new tensor."""
        out = torch.empty_like(x)
        pattern = self.module.AllReduceFusionPattern.kAllReduce
        self._launch(x, pattern, one_shot, early, allreduce_out=out)
        return out

    def all_reduce_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        one_shot: bool = True,
        early: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The results of `fp.all_reduce_add_rms_norm`, normed and new residual, in new tensors."""
        normed, added = torch.empty_like(x), torch.empty_like(x)
        self._launch(
            x,
            self.module.AllReduceFusionPattern.kARResidualRMSNorm,
            one_shot,
            early,
            residual_in=residual,
            residual_out=added,
            norm_out=normed,
            rms_gamma=weight,
            rms_eps=eps,
        )
        return normed, added

    def _launch(self, x: torch.Tensor, pattern: int, one_shot: bool, early: bool, **tensors) -> None:
        # The function below `trtllm_allreduce_fusion`: that one warns of its deprecation at every call, which costs it
        # time in eager mode.
        self.module.get_trtllm_comm_module().trtllm_allreduce_fusion(
            allreduce_in=x,
            token_num=x.shape[0],
            workspace_ptrs=self.workspace,
            launch_with_pdl=True,
            use_oneshot=one_shot,
            trigger_completion_at_end=not early,
            fp32_acc=True,
            pattern_code=pattern,
            quant_out=None,
            scale_out=None,
            scale_factor=None,
            layout_code=None,
            **self.fixed,
            **(_LEFT_OUT | tensors),
        )


class Vllm:
    """vLLM's custom all-reduce: ranks meet, then read each other's inputs. Made by all ranks together.

    Outside a capture `x` is copied into a buffer that the ranks share first, as vLLM does. In a capture `x` itself is
    read; the ranks open each other's inputs in `register_captured`, once the capture is over: the `after_capture` of
    the timer. Arguments as of `Trtllm`, with 2, 4, 6 or 8 ranks and `load("vllm_ar")`.
    """

    def __init__(self, bench: Bench, hidden: int, module: ModuleType):
        from flashinfer.comm.cuda_ipc import create_shared_buffer

        _check(bench, hidden, (2, 4, 6, 8))
        self.bench, self.module = bench, module
        self.bytes = MAX_TOKENS * hidden * bench.dtype.itemsize
        # Signals, and behind them what each rank has summed up, when there are more than two.
        signals = create_shared_buffer(module.meta_size() + self.bytes, bench.pg)
        self.staging = create_shared_buffer(self.bytes, bench.pg)
        # 64 bytes for every all-reduce in any graph: room for some ten thousands.
        self.addresses = torch.empty(8 << 20, dtype=torch.uint8, device=bench.device)
        self.handle = module.init_custom_ar(signals, self.addresses, bench.pg.rank(), True)
        module.register_buffer(self.handle, self.staging)
        dist.barrier(group=bench.pg)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of `x`, contiguous and at most MAX_TOKENS tokens, in a new tensor."""
        out = torch.empty_like(x)
        staging = 0 if torch.cuda.is_current_stream_capturing() else self.staging[self.bench.pg.rank()]
        self.module.all_reduce(self.handle, x, out, staging, self.bytes, VLLM_CTAS)
        return out

    def register_captured(self) -> None:
        """Exchange the addresses of the inputs captured since the last call. All ranks together."""
        handles, offsets = zip(*self.bench.everyone(self.module.get_graph_buffer_ipc_meta(self.handle)), strict=True)
        self.module.register_graph_buffers(self.handle, [list(h) for h in handles], [list(o) for o in offsets])


def peers(bench: Bench, hidden: int) -> SimpleNamespace:
    """`.trtllm` and `.vllm`, None where one cannot run here; the reason is printed. All ranks together."""
    made = {}
    for name, kind, module_name in (("trtllm", Trtllm, "trtllm_ar"), ("vllm", Vllm, "vllm_ar")):
        impl = f"flashinfer_{name}"
        # First what each rank does for itself: the constructor waits for the others.
        module = bench.attempt(impl, lambda name=module_name: load(bench.device, name))
        made[name] = module and bench.attempt(impl, lambda kind=kind, module=module: kind(bench, hidden, module))
    return SimpleNamespace(**made)


def load(device: torch.device, name: str) -> ModuleType:
    """The module `flashinfer.comm.<name>` with its kernels compiled and loaded; RuntimeError or ImportError if not."""
    if device.type != "cuda":
        raise RuntimeError("FlashInfer's kernels are for GPUs")
    try:
        if name == "trtllm_ar":
            from flashinfer.comm import trtllm_ar as module

            module.get_trtllm_comm_module()
        else:
            from flashinfer.comm import vllm_ar as module

            module.get_vllm_comm_module()
    except (AssertionError, OSError) as error:  # FlashInfer asserts that it finds the CUDA runtime
        raise RuntimeError(f"FlashInfer does not load: {error}") from error
    return module


def _check(bench: Bench, hidden: int, worlds: tuple[int, ...]) -> None:
    if bench.world not in worlds:
        raise ValueError(f"made for {', '.join(map(str, worlds))} ranks, there are {bench.world}")
    if hidden * bench.dtype.itemsize % 16:
        raise ValueError(f"hidden={hidden} in {bench.dtype} is not whole 16-byte vectors")
    gpus = range(torch.cuda.device_count())
    mine = bench.device.index
    if not all(torch.cuda.can_device_access_peer(mine, gpu) for gpu in gpus if gpu != mine):
        raise RuntimeError("these GPUs have no access to each other's memory")
