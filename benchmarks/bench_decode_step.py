"""A whole decode step of a Llama model on all ranks as one CUDA graph: what the parts are worth together.

    torchrun --nproc-per-node 2 benchmarks/bench_decode_step.py [--model llama-3-70b] [--layers 80] [--batch 1 8 32 64]

Without torchrun it starts one rank a GPU. Random weights, `--context` tokens in the cache of every sequence, the logits
of one new token each. Rows:

    fused                      the model as `fp.use("auto")` runs it: by the tuning table
    decode_kernels             the kernels for few rows in row- and column-parallel layers, whatever the table says
    row_decode_kernels         the same, but cuBLAS in the column-parallel layers
    linear_allreduce           the kernel for few rows in the column-parallel layers alone; in the row-parallel ones
                               cuBLAS, then this library's all-reduce + residual + RMSNorm
    cublas_allreduce           the same, but cuBLAS in the column-parallel layers, too
    nccl_add_rms_norm          as that, but NCCL and then the add_rms_norm kernel after every row-parallel matmul
    flashinfer_trtllm[_early]  as that, but FlashInfer's all-reduce + residual + RMSNorm there (pip: the extra `peers`)
    no_all_reduce_only         as that, but add_rms_norm alone there: wrong sums, what the communication costs
    torch_nccl                 plain torch: F.linear, F.rms_norm, scaled_dot_product_attention, dist.all_reduce

With fewer layers than the model has, the model's name carries their number. `bytes`: weights and keys and values of one
rank; `floor_us`: launch + reading them once.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable

import _flashinfer
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _common import Bench, main, parser, relative

import fused_parallel as fp
from fused_parallel.models.config import LlamaConfig
from fused_parallel.ops.add_rms_norm import add_norm

MODELS = {
    "llama-3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "llama-3-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}
TOLERANCE = 0.05  # of the logits against plain torch's: roundings of all layers in bf16


def _config(name: str, layers: int | None) -> LlamaConfig:
    sizes = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0, rms_norm_eps=1e-5, model_type="llama")
    sizes |= MODELS[name] | ({"num_hidden_layers": layers} if layers else {})
    return LlamaConfig.from_dict(sizes | {"torch_dtype": "bfloat16"})


def _fill(model: fp.LlamaForCausalLM, rank: int) -> None:
    """Random weights at a scale that keeps activations of order one; norms alike on all ranks, as they must be."""
    generator = torch.Generator(model.device).manual_seed(rank)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0)
        else:
            p.normal_(0, 0.5 * p.shape[1] ** -0.5 if "embed" not in name else 1.0, generator=generator)


@contextlib.contextmanager
def _instead(reduce: Callable | None = None, row: str | None = None, column: bool = True):
    """`reduce(x, residual, weight, eps, pg)` in the place of the all-reduce with residual and norm; in row-parallel
    layers the algorithm `row` instead of the table's; cuBLAS in column-parallel layers, where False."""
    # By name: the modules' functions hide them.
    of_rows, of_columns = (sys.modules[f"fused_parallel.ops.{name}"] for name in ("matmul_all_reduce", "linear"))
    usual = of_rows.reduce_add_norm, of_rows.algorithm, of_columns._takes_kernel
    if reduce is not None:
        of_rows.reduce_add_norm = reduce
    if reduce is not None or row is not None:
        of_rows.algorithm = lambda *_: row or "whole"
    if reduce is not None or not column:
        of_columns._takes_kernel = lambda *_: False
    try:
        yield
    finally:
        of_rows.reduce_add_norm, of_rows.algorithm, of_columns._takes_kernel = usual


def _plain(model: fp.LlamaForCausalLM, pg: dist.ProcessGroup, context: int) -> Callable:
    """The step in plain torch on the model's own weights and cache."""
    c, layers = model.config, list(model.model.layers.values())

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def step(ids: torch.Tensor, cache: fp.nn.KVCache) -> torch.Tensor:
        batch = ids.shape[0]
        x = model.model.embed_tokens(ids).view(batch, -1)
        positions = cache.positions(1)
        cos, sin = (t.unsqueeze(2) for t in model.model.rotary_emb(positions, x.dtype))
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            h = F.rms_norm(x, (c.hidden_size,), layer.input_layernorm.weight, c.rms_norm_eps)
            heads = F.linear(h, attention.qkv_proj.weight).view(batch, 1, -1, c.head_dim)
            layout = attention.qkv_proj.layout
            q, k, v = heads.split((layout.local_q, layout.local_kv, layout.local_kv), 2)
            cache.k[i][:, context - 1], cache.v[i][:, context - 1] = rotate(k, cos, sin)[:, 0], v[:, 0]
            keys, values = cache.k[i][:, :context].transpose(1, 2), cache.v[i][:, :context].transpose(1, 2)
            q = rotate(q, cos, sin).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            out = F.linear(out.transpose(1, 2).reshape(batch, -1), attention.o_proj.weight)
            dist.all_reduce(out, group=pg)
            x = x + out
            h = F.rms_norm(x, (c.hidden_size,), layer.post_attention_layernorm.weight, c.rms_norm_eps)
            gate, up = F.linear(h, layer.mlp.gate_up_proj.weight).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
            dist.all_reduce(out, group=pg)
            x = x + out
        return model.lm_head(F.rms_norm(x, (c.hidden_size,), model.model.norm.weight, c.rms_norm_eps))

    return step


def _variants(bench: Bench, model: fp.LlamaForCausalLM, context: int, peers) -> dict[str, tuple[Callable, dict]]:
    """impl -> (the step, arguments of _instead)."""

    def nccl(x, residual, weight, eps, pg):
        dist.all_reduce(x, group=pg)
        return add_norm(x, residual, weight, eps)

    def model_step(ids, cache):
        return model(ids, cache)

    def flashinfer(**options):
        def reduce(x, residual, weight, eps, pg):
            flat = x.view(-1, x.shape[-1])
            return tuple(
                t.view_as(x)
                for t in peers.trtllm.all_reduce_add_rms_norm(flat, residual.view_as(flat), weight, eps, **options)
            )

        return reduce

    found = {
        "torch_nccl": (_plain(model, bench.pg, context), {}),
        "fused": (model_step, {}),
        "decode_kernels": (model_step, {"row": "decode"}),
        "row_decode_kernels": (model_step, {"row": "decode", "column": False}),
        "linear_allreduce": (model_step, {"row": "whole"}),
        "cublas_allreduce": (model_step, {"row": "whole", "column": False}),
        "nccl_add_rms_norm": (model_step, {"reduce": nccl}),
        "no_all_reduce_only": (
            model_step,
            {"reduce": lambda x, residual, weight, eps, pg: add_norm(x, residual, weight, eps)},
        ),
    }
    if peers.trtllm is not None:
        found["flashinfer_trtllm"] = (model_step, {"reduce": flashinfer()})
        found["flashinfer_trtllm_early"] = (model_step, {"reduce": flashinfer(early=True)})
    return found


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    with torch.no_grad():
        return _run(bench, arguments)


def _run(bench: Bench, arguments: argparse.Namespace) -> int:
    config = _config(arguments.model, arguments.layers)
    mesh = fp.init(tp=bench.world, device=bench.device.type, timeout=120)
    model = fp.LlamaForCausalLM(config, mesh=mesh, dtype=bench.dtype)
    _fill(model, bench.pg.rank())
    name = arguments.model + (f":{arguments.layers}" if arguments.layers else "")
    context = arguments.context
    peers = _flashinfer.peers(bench, config.hidden_size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.model.embed_tokens.weight.nbytes  # of which a few rows are read
    for batch in arguments.batch:
        cache = model.make_cache(batch, context)
        cache.k.normal_(), cache.v.normal_()
        cache.lens.fill_(context - 1)
        bytes = weights + cache.nbytes
        floor = bench.ceilings and bench.ceilings.launch_us + bench.ceilings.memory_us(bytes)

        def inputs(i: int, batch=batch, cache=cache):
            generator = torch.Generator(bench.device).manual_seed(i)
            return torch.randint(config.vocab_size, (batch, 1), device=bench.device, generator=generator), cache

        expected = None
        for impl, (step, instead) in _variants(bench, model, context, peers).items():
            with _instead(**instead):
                logits = step(*inputs(0)).view(batch, -1)
                if expected is None:
                    expected = logits.clone()
                error = 0.0 if impl.endswith("_only") else relative(logits, expected)
                bench.measure(
                    "decode_step",
                    impl,
                    step,
                    inputs,
                    shape={"model": name, "tp": bench.world, "pp": 1, "batch": batch, "ctx": context},
                    bytes=bytes,
                    floor_us=floor,
                    check=lambda _, error=error: error,
                    tolerance=TOLERANCE,
                    calls=2,
                    rounds=12,
                )
        del cache
        torch.cuda.empty_cache()
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="llama-3-70b")
    p.add_argument("--layers", type=int, help="fewer than the model has, where memory does not suffice")
    p.add_argument("--batch", type=int, nargs="+", default=(1, 8, 32, 64))
    p.add_argument("--context", type=int, default=1024)
    main(run, p)
