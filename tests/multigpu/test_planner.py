"""Two GPUs: plans run and change no token, the planned memory is what is allocated, and the wall is measured."""

import dataclasses
import gc

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel.planner import Workload, load_cluster, load_model
from fused_parallel.planner.layer_wall import NCCL, OURS, measure_wall
from fused_parallel.planner.search import Search
from fused_parallel.testing.spawn import run_ranks

pytestmark = pytest.mark.multigpu

PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52], [7, 7, 7]]
CLUSTER = {"gpus_per_host": 2, "gpu": "h100", "intra": "nvlink4"}
CONFIG = fp.LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    dtype="bfloat16",
)


def rank_runs(mesh, plan, path):
    """(which prompts, their tokens) of what a user writes."""
    mesh = fp.init(plan=plan, device="cuda", timeout=60)
    planned = fp.planned(mesh)
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, **planned.model_options(path))
    mine = planned.replica_prompts(len(PROMPTS))
    options = planned.generate_options(len(mine), None)
    return mine, fp.generate(model, PROMPTS[mine.start : mine.stop], 16, **options).tokens


@pytest.mark.parametrize("tp,pp,dp", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_plan_changes_no_token(tmp_path, tp, pp, dp):
    ranks.save_random_model(tmp_path, scale=6.0, num_hidden_layers=5)
    ((expected, _),) = run_ranks(ranks.generated, 1, tmp_path, None, PROMPTS, 16, device="cuda")
    answer = fp.plan(tmp_path, CLUSTER, {"batch": 4, "output": 16})
    entry = next(c for c in answer.entries if (c.tp, c.pp, c.dp) == (tp, pp, dp))
    plan = dataclasses.replace(answer, entries=(entry,))
    got = {}
    for mine, tokens in run_ranks(rank_runs, 2, plan, tmp_path, device="cuda"):
        got |= dict(zip(mine, tokens, strict=True))
    assert [got[i] for i in range(len(PROMPTS))] == expected


def rank_peaks(mesh, split, quantize, prompts, length, new, chunk):
    """Bytes of torch's at their highest on this rank, over making the model and a generation."""
    gc.collect()
    torch.cuda.empty_cache()
    small = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.nn.functional.linear(small, small)  # cuBLAS's workspace is of the reserve
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = fp.LlamaForCausalLM(CONFIG, mesh=mesh, split=split, quantize=quantize)
    for p in model.parameters():
        p.normal_(0, 0.02) if p.is_floating_point() else p.zero_()
    ids = torch.randint(CONFIG.vocab_size, (prompts, length), generator=torch.Generator().manual_seed(0)).tolist()
    fp.generate(model, ids, new, prefill_chunk=chunk, microbatches=mesh["pp"].size())
    return torch.cuda.max_memory_allocated() - base


@pytest.mark.parametrize("tp,pp,dtype", [(2, 1, "bf16"), (1, 2, "bf16"), (2, 1, "int4")])
def test_planned_memory_is_the_peak(tp, pp, dtype):
    prompts, length, new = 16, 2048, 64
    workload = Workload(input=length, output=new, batch=prompts, dtypes=(dtype,))
    split = [12] if pp == 1 else [7, 5]
    cluster = load_cluster(CLUSTER).of("ours")
    predicted = Search(load_model(CONFIG), cluster, workload).memory(dtype, tp, split, prompts, 0)
    quantize = None if dtype == "bf16" else dtype
    arguments = (split, quantize, prompts, length, new, 8192 // (prompts // pp))
    for rank, peak in enumerate(run_ranks(rank_peaks, 2, *arguments, device="cuda", tp=tp, pp=pp)):
        memory = predicted[rank // tp]
        planned = (memory.total - memory.reserved) * 1e9
        print(f"rank {rank} of tp={tp} pp={pp} {dtype}: planned {planned / 1e9:.3f} GB, peak {peak / 1e9:.3f} GB")
        assert planned == pytest.approx(peak, rel=0.05)


def test_the_wall_is_measured():
    """A half of the layer computes for less long than the whole, and NCCL takes time."""
    wall = measure_wall(CONFIG, "small", (1, 64), 512, device="cuda", rounds=10)
    assert {(r.backend, r.batch, r.tp) for r in wall.rows} == {
        (backend, batch, tp) for backend in (NCCL, OURS) for batch in (1, 64) for tp in (1, 2)
    }
    for batch in (1, 64):
        for backend in (NCCL, OURS):
            one, two = wall.of(backend, batch)
            assert 0 < two.compute_us < one.compute_us and one.communication_us == 0
        assert wall.of(NCCL, batch)[1].communication_us > 2
