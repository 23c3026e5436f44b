"""fp.parallelize on transformers' models, and the ParallelStyles in torch's parallelize_module."""

import functools

import _llama_ranks as ranks
import pytest
import torch
from _errors import assert_starts, errors_of
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import fused_parallel as fp
from fused_parallel.integrations.parallel_style import FusedColwiseParallel, FusedRowwiseParallel
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close

IDS = torch.randint(0, 263, (2, 40), generator=torch.Generator().manual_seed(5))
STEPS = 6


def expected_of(model):
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        return model(tokens).logits, tokens


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tp,pp", [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_same_logits_in_place(model_type, tp, pp, tmp_path):
    changes = {"sliding_window": None} if model_type == "mistral" else {}
    reference = ranks.save_random_model(tmp_path, model_type=model_type, scale=4.0, **changes)
    logits, tokens = expected_of(reference)
    results = run_ranks(ranks.parallelized_logits, tp * pp, tmp_path, IDS, STEPS, tp=tp, pp=pp)
    whole = sum(p.numel() for p in reference.parameters())
    for got, generated, held in results:
        assert (got - logits).abs().max() < 1e-4 * max(1.0, logits.abs().max())
        assert torch.equal(generated, tokens)
        assert held < whole / tp * (0.7 if pp == 2 else 1.15)  # of three layers, a stage holds two at most


def test_tied_embeddings(tmp_path):
    reference = ranks.save_random_model(tmp_path, tie_word_embeddings=True)
    logits, _ = expected_of(reference)
    for tp, pp in ((2, 1), (1, 2)):
        for got, _, _ in run_ranks(ranks.parallelized_logits, tp * pp, tmp_path, IDS, STEPS, tp=tp, pp=pp):
            assert (got - logits).abs().max() < 1e-4


def mlp():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"emb": nn.Embedding(11, 6), "up": nn.Linear(6, 9), "down": nn.Linear(9, 6), "head": nn.Linear(6, 11)}
    )


def run(model, ids):
    with torch.no_grad():
        return model["head"](model["down"](model["up"](model["emb"](ids)).relu()))


def rank_styles(mesh, how):
    model, ids = mlp(), torch.arange(11)
    calls = []
    model["up"].register_forward_hook(lambda *_: calls.append("hook"))
    if how == "torch":
        plan = {
            "emb": FusedRowwiseParallel(),
            "up": FusedColwiseParallel(),
            "down": FusedRowwiseParallel(),
            "head": FusedColwiseParallel(gather_output=True),
        }
        parallelize_module(model, mesh["tp"], plan)
    else:
        plan = {"emb": "rowwise", "up": "colwise", "down": "rowwise", "head": "colwise_gather_output"}
        fp.parallelize(model, mesh, plan)
    return run(model, ids), calls, tuple(model["up"].weight.shape), type(model["down"]).__name__


@pytest.mark.parametrize("how", ["torch", "fp.parallelize"])
def test_styles(how):
    expected = run(mlp(), torch.arange(11))
    for got, calls, shape, name in run_ranks(rank_styles, 2, how):
        assert_close(got, expected)
        assert calls == ["hook"] and shape == (5, 6) and name == "RowParallelLinear"


class Scaled(nn.Linear):
    """What in-place conversion would lose."""

    def forward(self, x):
        return 10 * super().forward(x)


def rank_stages(mesh, path):
    """What a model cut into stages refuses, and that it follows a change of dtype."""
    from transformers import AutoModelForCausalLM

    model = fp.parallelize(AutoModelForCausalLM.from_pretrained(path).eval(), mesh)
    messages = []
    for call in (lambda: fp.parallelize(model, mesh), lambda: model(inputs_embeds=torch.zeros(1, 2, 96))):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    with torch.no_grad():
        return messages, model.to(torch.bfloat16)(IDS).logits


def test_stages_refuse_and_follow(tmp_path):
    reference = ranks.save_random_model(tmp_path)
    for messages, logits in run_ranks(rank_stages, 2, tmp_path, pp=2):
        assert messages[0] == "fp.parallelize: this model has been parallelized already"
        assert messages[1] == "a model cut into pipeline stages takes input_ids, not inputs_embeds"
        with torch.no_grad():
            assert torch.equal(logits, reference.to(torch.bfloat16)(IDS).logits)


def rank_errors(mesh):
    cases = (
        (mlp(), "auto", mesh),
        (mlp(), {"up": "diagonal"}, mesh),
        (mlp(), ["up"], mesh),
        (mlp(), {"up": "colwise"}, mesh["tp"]),
        (nn.ModuleDict({"norm": nn.LayerNorm(4)}), {"norm": "colwise"}, mesh),
        (mlp(), {"pu": "colwise"}, mesh),
        (mlp(), {}, mesh),
        (nn.ModuleDict({"up": Scaled(4, 4)}), {"up": "colwise"}, mesh),
        (nn.ModuleDict({"emb": nn.Embedding(4, 4, max_norm=1.0)}), {"emb": "rowwise"}, mesh),
        (nn.ModuleDict({"up": nn.Linear(4, 4, device="meta")}), {"up": "colwise"}, mesh),
    )
    return errors_of(functools.partial(fp.parallelize, model, where, plan) for model, plan, where in cases)


def test_errors():
    expected = [
        "ValueError: fp.parallelize: 'auto' knows the causal language models of llama, mistral, qwen2, not 'Modu",
        "ValueError: fp.parallelize: unknown style 'diagonal' for 'up'",
        "TypeError: fp.parallelize: parallelize_plan must be \"auto\" or a mapping with entries, got ['up']",
        "TypeError: fp.parallelize: mesh must be the DeviceMesh of fp.init",
        "TypeError: cannot shard a LayerNorm: expected torch.nn.Linear",
        "ValueError: fp.parallelize: the plan names 'pu', but the model has no such module",
        "TypeError: fp.parallelize: parallelize_plan must be",
        "TypeError: cannot shard a Scaled: expected torch.nn.Linear itself, not a subclass",
        "TypeError: cannot shard a Embedding: expected torch.nn.Embedding itself, without max_norm",
        "ValueError: cannot shard a layer on the meta device: load the weights first",
    ]
    assert_starts(run_ranks(rank_errors, 2)[0], expected)


def rank_plan_with_stages(mesh):
    fp.parallelize(mlp(), mesh, {"up": "colwise"})


def test_plan_refuses_stages():
    with pytest.raises(RuntimeError, match="a plan covers tensor parallelism only"):
        run_ranks(rank_plan_with_stages, 2, pp=2)
