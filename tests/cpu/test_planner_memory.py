"""The memory that the planner predicts for a rank against what models of known sizes allocate: every tensor that lives
once a model is loaded, and the KV caches that fp.generate makes."""

import dataclasses
import gc

import pytest
import torch

import fused_parallel as fp
from fused_parallel.planner import Workload, load_cluster, load_model
from fused_parallel.planner.search import SLOTS, Search
from fused_parallel.testing.spawn import run_ranks

CONFIG = fp.LlamaConfig(
    vocab_size=4000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    dtype="bfloat16",
)
DRAFT = dataclasses.replace(CONFIG, hidden_size=256, num_hidden_layers=2, intermediate_size=640)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
REQUESTS, PROMPT, NEW = 6, 8, 300


def _storages() -> dict[int, int]:
    """Bytes of every block of memory that a tensor lives in, by its address."""
    gc.collect()
    # Not those that torch.compile left in this process, for an earlier test: they have no memory.
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [o for o in gc.get_objects() if type(o) in kinds and o.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _fill(model):
    for p in model.parameters():
        p.normal_(0, 0.02) if p.is_floating_point() else p.zero_()
    return model


def rank_allocates(mesh, config, draft_config, drafted, options, offload_layers):
    """(bytes of weights, bytes of KV) on this rank. Offloaded, host memory is left out: it is a CPU's here, too."""
    torch.manual_seed(0)
    before = _storages()
    if offload_layers is not None:
        layer = load_model(config).layer_bytes(mesh["tp"].size(), options["quantize"] or "bf16")
        options = {**options, "offload": fp.Offload(resident_bytes=int((offload_layers + 0.5) * layer))}
    model = _fill(fp.LlamaForCausalLM(config, mesh=mesh, **options))
    draft = draft_config and _fill(fp.LlamaForCausalLM(draft_config, mesh=None))
    after = _storages()
    weights = sum(size for at, size in after.items() if before.get(at) != size)
    if model.offloaded:
        weights -= model.model.layers.host_bytes
    made, make = [], fp.LlamaForCausalLM.make_cache
    fp.LlamaForCausalLM.make_cache = lambda self, *args: made.append(make(self, *args)) or made[-1]
    try:
        # Every token ends its sequence: the caches are made for all of the new ones, the time is not spent.
        ends = list(range(config.vocab_size))
        prompts = [[1 + i] * PROMPT for i in range(REQUESTS)]
        drafting = {"draft": draft, "num_draft_tokens": drafted} if draft else {}
        micro = mesh["pp"].size()
        fp.generate(model, prompts, NEW, eos_token_id=ends, microbatches=micro, **drafting)
    finally:
        fp.LlamaForCausalLM.make_cache = make
    return weights, sum(cache.nbytes for cache in made)


@pytest.mark.parametrize(
    ("tp", "pp", "dtype", "config", "drafted", "streamed"),
    [
        (1, 1, "bf16", CONFIG, 0, 0),
        (2, 1, "bf16", CONFIG, 0, 0),
        (1, 2, "bf16", CONFIG, 0, 0),
        (1, 3, "bf16", TIED, 0, 0),
        (1, 1, "bf16", TIED, 0, 0),
        (2, 2, "bf16", CONFIG, 0, 0),
        (4, 1, "bf16", dataclasses.replace(CONFIG, num_key_value_heads=2), 0, 0),
        (1, 1, "int8", CONFIG, 0, 0),
        (2, 1, "int4", CONFIG, 0, 0),
        (1, 1, "bf16", CONFIG, 4, 0),
        (1, 2, "bf16", CONFIG, 8, 0),
        (1, 1, "bf16", CONFIG, 0, 4),
        (1, 1, "int8", CONFIG, 0, 6),
    ],
)
def test_predicted_memory_is_what_is_allocated(tp, pp, dtype, config, drafted, streamed):
    draft = {"draft": load_model(DRAFT), "acceptance": 0.5} if drafted else {}
    workload = Workload(input=PROMPT, output=NEW, batch=REQUESTS, dtypes=(dtype,), **draft)
    cluster = load_cluster({"gpus_per_host": 4, "gpu": "l4", "intra": "pcie4"})
    search = Search(load_model(config), cluster, workload)
    split = {1: [6], 2: [4, 2], 3: [3, 2, 1]}[pp]
    predicted = search.memory(dtype, tp, split, REQUESTS, drafted, streamed)
    options = {"split": split, "quantize": None if dtype == "bf16" else dtype}
    resident = config.num_hidden_layers - streamed if streamed else None
    arguments = (config, DRAFT if drafted else None, drafted, options, resident)
    for rank, (weights, kv) in enumerate(run_ranks(rank_allocates, tp * pp, *arguments, tp=tp, pp=pp)):
        memory = predicted[rank // tp]
        assert memory.weights * 1e9 == pytest.approx(weights, rel=0.01)
        assert memory.kv * 1e9 == pytest.approx(kv, rel=0.01)
        assert (memory.weights + memory.kv) * 1e9 == pytest.approx(weights + kv, rel=0.01)
    if streamed:
        assert fp.Offload().slots == SLOTS
