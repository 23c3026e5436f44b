"""fp.LlamaForCausalLM equals transformers' at TP 1, 2, 4 and PP 2, reads only its shard, and refuses bad
checkpoints."""

import json

import _llama_ranks as ranks
import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_parallel as fp
from fused_parallel.models.checkpoint import Checkpoint
from fused_parallel.testing.spawn import run_ranks

# bf16: rounding of activations between ~10 operations a layer and 3 layers; relative to the spread of the logits.
BF16_TOLERANCE = 0.04

VARIANTS = {
    "plain": {},
    "llama3 rope, tied": {"rope_parameters": ranks.LLAMA3_ROPE | {"rope_theta": 500000.0}, "tie_word_embeddings": True},
    "biases, mha": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """variant -> (directory, transformers model)"""
    made = {}
    for name, changes in VARIANTS.items():
        path = tmp_path_factory.mktemp("model")
        made[name] = path, ranks.save_random_model(path, **changes)
    return made


IDS = torch.randint(0, 263, (2, 100), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_logits_equal_transformers_fp32(models, variant, tp, pp):
    path, reference = models[variant]
    with torch.no_grad():
        expected = reference(IDS).logits
    results = run_ranks(ranks.logits, tp * pp, path, IDS, torch.float32, tp=tp, pp=pp)
    assert all(r is None for r in results[: tp * (pp - 1)])
    for got in results[tp * (pp - 1) :]:
        assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_equal_transformers_bf16(models, tp):
    path, reference = models["plain"]
    with torch.no_grad():
        expected = reference(IDS).logits
    got = run_ranks(ranks.logits, tp, path, IDS, torch.bfloat16, tp=tp)[0].float()
    assert (got - expected).norm() / expected.norm() < BF16_TOLERANCE
    # Greedy tokens agree wherever the reference's two best logits are further apart than what bf16 can move them.
    best = expected.topk(2, dim=-1)
    clear = (best.values[..., 0] - best.values[..., 1]) > 2 * (got - expected).abs().amax(-1)
    assert clear.float().mean() > 0.3
    assert torch.equal(got.argmax(-1)[clear], best.indices[..., 0][clear])


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (2, 2)])
def test_cache_and_rollback(models, tp, pp):
    path, reference = models["llama3 rope, tied"]
    with torch.no_grad():
        expected = reference(IDS).logits
    results = run_ranks(ranks.incremental_logits, tp * pp, path, IDS, (60, 61, 66), tp=tp, pp=pp)
    assert (results[-1] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tp", [2, 4])
def test_each_rank_reads_only_its_shard(models, tp):
    path, reference = models["plain"]
    whole = sum(p.numel() for p in reference.parameters())
    for held, touched in run_ranks(ranks.read_bytes, tp, path, tp=tp):
        assert touched <= held < whole / tp * 1.1


def test_heads_that_do_not_divide(tmp_path):
    """Five heads on two ranks are padded; one key-value head on four ranks is replicated."""
    for heads, kv_heads, tp in ((5, 5, 2), (8, 1, 4), (6, 2, 4)):
        path = tmp_path / f"{heads}-{kv_heads}"
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * 12}
        reference = ranks.save_random_model(path, **sizes)
        with torch.no_grad():
            expected = reference(IDS).logits
        got = run_ranks(ranks.logits, tp, path, IDS, torch.float32, tp=tp)[0]
        assert (got - expected).abs().max() < 1e-4


def test_state_dict_of_transformers_loads(models):
    path, reference = models["biases, mha"]
    mesh = fp.init(device="cpu")
    model = fp.LlamaForCausalLM(fp.LlamaConfig.from_pretrained(path), mesh=mesh)
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        assert (model(IDS) - reference(IDS).logits).abs().max() < 1e-4
    copy = fp.LlamaForCausalLM(model.config, mesh=mesh)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(IDS), model(IDS))
    broken = dict(reference.state_dict())
    del broken["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn"):
        copy.load_state_dict(broken)


def copy_of(path, to):
    to.mkdir()
    for file in ("config.json", "model.safetensors"):
        (to / file).write_bytes((path / file).read_bytes())
    return to


def test_shapes_that_would_broadcast_are_refused(models, tmp_path):
    path, _ = models["plain"]
    mesh = fp.init(device="cpu")
    column = fp.nn.ColumnParallelLinear(13, 8, group=mesh["tp"])
    with pytest.raises(ValueError, match=r"weight: has shape \[8, 1\], expected \[8, 13\]"):
        column.load_state_dict({"weight": torch.randn(8, 1)})
    bad = copy_of(path, tmp_path / "narrow")
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name][:, :1].contiguous()}, bad / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.weight' has shape \[128, 1\], but config.json implies \[128, 96\]"):
        fp.LlamaForCausalLM.from_pretrained(bad, mesh=mesh)
    with pytest.raises(ValueError, match="a merged parameter loads the separate full tensors"):
        fp.nn.ParallelMLP(8, 10, group=mesh["tp"]).load_state_dict({"gate_up_proj.weight": torch.randn(19, 8)})


def rank_state_dict(mesh, path, state):
    model = fp.LlamaForCausalLM(fp.LlamaConfig.from_pretrained(path), mesh=mesh)
    model.load_state_dict(state)
    return model(IDS)


def test_whole_state_dict_on_stages(models):
    path, reference = models["plain"]
    with torch.no_grad():
        expected = reference(IDS).logits
    got = run_ranks(rank_state_dict, 2, path, reference.state_dict(), pp=2)[-1]
    assert (got - expected).abs().max() < 1e-4


def test_change_of_dtype(models):
    path, _ = models["llama3 rope, tied"]
    mesh = fp.init(device="cpu")
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    direct = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(model(IDS), direct(IDS))


def test_cache_overflow(models):
    path, _ = models["plain"]
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=fp.init(device="cpu"))
    cache = model.make_cache(2, 110)
    model(IDS, cache)
    cache.lens += 100
    with pytest.raises(ValueError, match="11 more tokens do not fit a KV cache of 110 tokens that holds 100"):
        model(IDS[:, :11], cache)


def test_index_of_several_files(models, tmp_path):
    path, _ = models["plain"]
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, tmp_path / "b.safetensors")
    weight_map = {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    mesh = fp.init(device="cpu")
    one, two = (fp.LlamaForCausalLM.from_pretrained(p, mesh=mesh) for p in (path, tmp_path))
    assert torch.equal(one(IDS), two(IDS))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks b\.safetensors"):
        Checkpoint(tmp_path)


def test_bad_checkpoints_name_the_file(models, tmp_path):
    path, _ = models["plain"]
    mesh = fp.init(device="cpu")

    def load(directory):
        return fp.LlamaForCausalLM.from_pretrained(directory, mesh=mesh)

    with pytest.raises(TypeError, match=r"offload must be an fp\.Offload, got 20"):
        fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, offload=20)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype such as torch\.bfloat16, got 'bf16'"):
        fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype="bf16")
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json not found: expected a Hugging Face"):
        load(tmp_path / "nowhere")
    bad = copy_of(path, tmp_path / "no-weights")
    (bad / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        load(bad)
    bad = copy_of(path, tmp_path / "truncated")
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* copy it again"):
        load(bad)
    bad = copy_of(path, tmp_path / "garbage")
    (bad / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(bad)
    bad = copy_of(path, tmp_path / "no-json")
    (bad / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"no-json/config\.json"):
        load(bad)
    for index, (change, message) in enumerate(
        (
            ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn' is not supported"),
            ({"intermediate_size": 251}, "has shape .* config.json implies"),
            ({"hidden_size": 48}, "has shape .* config.json implies"),
            ({"num_hidden_layers": 2}, "holds tensors for which config.json has no place, such as 'model.layers.2"),
            ({"dtype": "float64"}, r"config\.json: dtype 'float64' is not supported"),
            ({"num_attention_heads": 0}, r"config\.json: num_attention_heads must be a positive integer, got 0"),
            ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, r"config\.json: an entry lacks 'factor'"),
            ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3"),
            ({"vocab_size": None}, "lacks vocab_size"),
        )
    ):
        bad = copy_of(path, tmp_path / str(index))
        config = json.loads((bad / "config.json").read_text()) | change
        (bad / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(bad)


def test_sizes_that_do_not_fit(models, tmp_path):
    path, _ = models["plain"]
    with pytest.raises(RuntimeError, match="pp=4 does not fit a model of 3 layers"):
        run_ranks(ranks.logits, 4, path, IDS, torch.float32, tp=1, pp=4)
    few = tmp_path / "few-heads"
    ranks.save_random_model(few, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(RuntimeError, match="tp=4 does not fit 3 query heads and 3 key-value heads"):
        run_ranks(ranks.logits, 4, few, IDS, torch.float32, tp=4)


def test_a_tied_weight_may_stand_in_a_state_dict_once(models):
    path, _ = models["llama3 rope, tied"]
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=fp.init(device="cpu"))
    state = {k: v.clone() + 0.01 for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.load_state_dict(state)
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])
    assert "lm_head.weight" not in state
