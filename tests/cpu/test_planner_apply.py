"""A plan runs: fp.init(plan=...), its options for the model and fp.generate, and `generate --plan`; the tokens are the
plain run's."""

import dataclasses
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch
from test_cli import COMMON, DRAFT, TARGET, generate

import fused_parallel as fp
from fused_parallel.cli import main
from fused_parallel.planner import load_cluster, load_model
from fused_parallel.testing.spawn import run_ranks

PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52], [7, 7, 7]]
NEW = 16
FOUR = {"gpus_per_host": 4, "gpu": "l4", "intra": "pcie4"}


def plan_of(path, cluster, workload, **wanted) -> fp.Plan:
    """The planner's answer with the entry first that has these fields."""
    answer = fp.plan(path, cluster, workload)
    entry = next(c for c in answer.entries if all(getattr(c, k) == v for k, v in wanted.items()))
    return dataclasses.replace(answer, entries=(entry,))


def small_gpu(path, workload, layers: int) -> dict:
    """A GPU with too little memory for `layers` of the model's layers."""
    alone = {"gpus_per_host": 1, "gpu": "l4"}
    found = fp.plan(path, alone, {**workload, "offload": False}).entries
    entry = next(c for c in found if (c.drafted > 0) == ("draft" in workload))
    layer = load_model(path).layer_bytes(1, "bf16") / 1e9
    # Two more are streamed than are missing: the slots that they pass through.
    return {**alone, "gpu": {"preset": "l4", "memory_gb": entry.memory_gb["total"] - (layers - 2 - 0.5) * layer}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    target = ranks.save_random_model(path, scale=6.0, num_hidden_layers=5)
    ranks.save_random_model(draft, seed=1, num_hidden_layers=1)
    return path, draft, target


def rank_runs(mesh, plan, path, draft_path, prompts, new):
    """What a user writes: (this replica's prompts, tokens, layers of this stage, whether offloaded, streamed layers,
    drafted, options)."""
    mesh = fp.init(plan=plan, device="cpu", timeout=60)
    planned = fp.planned(mesh)
    options = planned.model_options(path)
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, **options)
    draft = draft_path and fp.LlamaForCausalLM.from_pretrained(draft_path, mesh=None)
    mine = planned.replica_prompts(len(prompts))
    generation = planned.generate_options(len(mine), draft)
    result = fp.generate(model, prompts[mine.start : mine.stop], new, draft=draft, **generation)
    streamed = len(model.model.layers.blocks) if model.offloaded else 0
    sizes = {name: mesh[name].size() for name in ("tp", "pp", "dp")}
    return mine, result.tokens, len(model.layer_range), streamed, result.stats.drafted, sizes, generation


def plain(path, prompts=PROMPTS, new=NEW, quantize=None):
    mesh = fp.init(device="cpu")
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, quantize=quantize)
    return fp.generate(model, prompts, new).tokens


@pytest.mark.parametrize("tp,pp,dp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (1, 3, 1), (1, 1, 4)])
def test_a_plan_runs_and_changes_no_token(models, tmp_path, tp, pp, dp):
    path, _, _ = models
    answer = plan_of(path, FOUR, {"batch": 4, "output": NEW}, tp=tp, pp=pp, dp=dp)
    file = tmp_path / "plan.json"
    file.write_text(answer.to_json())
    expected, got = plain(path), {}
    layers = []
    for mine, tokens, count, streamed, drafted, sizes, options in run_ranks(
        rank_runs, tp * pp * dp, file, path, None, PROMPTS, NEW
    ):
        assert sizes == {"tp": tp, "pp": pp, "dp": dp} and streamed == drafted == 0
        assert options["microbatches"] == min(answer.best.microbatches, len(mine))
        for i, row in zip(mine, tokens, strict=True):
            assert got.setdefault(i, row) == row
        layers.append(count)
    assert [got[i] for i in range(len(PROMPTS))] == expected
    # Ranks of a replica are neighbours, its stages in order: the plan's uneven split is what runs.
    assert layers == [n for _ in range(dp) for n in answer.best.stages for _ in range(tp)]


def test_chunks_and_micro_batches_are_the_plans(models, monkeypatch):
    path, _, _ = models
    # Where starting costs nothing, chunks fill the stages; the machine of the test's own making has that.
    monkeypatch.setattr("fused_parallel.planner.cost.verify_us", lambda *_: 0.0)
    cluster = dataclasses.replace(load_cluster(FOUR), layer_us=0.0, eager_layer_us=0.0)
    cluster = dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, matmul_start_us=0.0))
    answer = plan_of(path, cluster, {"batch": 2, "input": 4096}, tp=1, pp=2, dp=1)
    assert answer.best.prefill_chunk is not None and answer.best.prefill_chunk <= 2048
    assert answer.best.microbatches == 2  # of one prompt each
    for plan in (answer, _with(answer, prefill_chunk=4, microbatches=3)):
        for _, tokens, *_, options in run_ranks(rank_runs, 2, plan, path, None, PROMPTS, NEW):
            chunk = min(plan.best.prefill_chunk, 8192 // -(-4 // plan.best.microbatches))
            assert tokens == plain(path)
            assert options == {"microbatches": plan.best.microbatches, "prefill_chunk": chunk}
    # 64 prompts that pass together leave each so much of what the activations were planned for.
    planned = fp.planned(fp.init(plan=plan_of(path, FOUR, {"batch": 64}, tp=1, pp=1, dp=1), device="cpu"))
    assert planned.generate_options(64, None) == {"microbatches": 1, "prefill_chunk": 128}


@pytest.mark.parametrize("streamed", [3, 4, 5])
def test_a_resident_share_is_whole_layers(models, streamed):
    path, _, _ = models
    workload = {"batch": 4, "input": 16, "output": NEW}
    answer = fp.plan(path, small_gpu(path, workload, streamed), workload)
    assert answer.best.resident == pytest.approx(1 - streamed / 5)
    ((_, tokens, _, copied, *_),) = run_ranks(rank_runs, 1, answer, path, None, PROMPTS, NEW)
    assert tokens == plain(path) and copied == streamed


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_plans(models, kind):
    path, _, _ = models
    workload = {"batch": 4, "output": NEW, "dtypes": (kind,)}
    answer = plan_of(path, FOUR, workload, tp=1, pp=2, dp=1)
    for _, tokens, *_ in run_ranks(rank_runs, 2, answer, path, None, PROMPTS, NEW):
        assert tokens == plain(path, quantize=kind) != plain(path)


def test_offload_and_speculation_together(models):
    path, draft, _ = models
    workload = {"batch": 4, "input": 16, "output": NEW, "draft": draft, "acceptance": 0.95}
    answer = fp.plan(path, small_gpu(path, workload, 4), workload)
    entry = next(c for c in answer.entries if c.drafted)
    assert entry.resident <= 2 / 5
    answer = dataclasses.replace(answer, entries=(entry,))
    ((_, tokens, _, copied, drafted, _, options),) = run_ranks(rank_runs, 1, answer, path, draft, PROMPTS, NEW)
    assert (
        tokens == plain(path)
        and copied == round(5 * (1 - entry.resident))
        and drafted > 0
        and options["num_draft_tokens"] == entry.drafted
    )


def test_what_does_not_fit(models, tmp_path):
    path, draft, _ = models
    two = plan_of(path, FOUR, {"batch": 4}, tp=2, pp=1, dp=1)
    with pytest.raises(ValueError, match=r"TP2 PP1 x1 .*is for 2 rank\(s\), but the world has 1"):
        fp.init(plan=two, device="cpu")
    with pytest.raises(ValueError, match=r"fp.init: pp=2 contradicts the plan, which is TP2 PP1"):
        fp.init(plan=two, pp=2, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"plan /nowhere.json: there is no such file"):
        fp.init(plan="/nowhere.json", device="cpu")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x.json: plan_version is None"):
        fp.init(plan=tmp_path / "x.json", device="cpu")
    with pytest.raises(ValueError, match="made without a plan"):
        fp.planned(fp.init(device="cpu"))

    one = plan_of(path, FOUR, {"batch": 4}, tp=1, pp=1, dp=1)
    planned = fp.planned(fp.init(plan=one, device="cpu"))
    with pytest.raises(ValueError, match=r"other shapes: layers 1 \(plan: 5\)"):
        planned.model_options(draft)
    with pytest.raises(ValueError, match="drafts nothing, but there is a draft"):
        planned.generate_options(4, "ngram")
    with pytest.raises(ValueError, match="has 4 replicas"):
        dataclasses.replace(planned, plan=_with(one, dp=4)).replica_prompts(3)
    drafting = dataclasses.replace(planned, plan=_with(one, drafted=3))
    with pytest.raises(ValueError, match="drafts 3 tokens a round"):
        drafting.generate_options(4, None)
    with pytest.raises(ValueError, match=r"12 micro-batches; fp\.generate has at most 8"):
        dataclasses.replace(planned, plan=_with(one, microbatches=12)).generate_options(64, None)
    with pytest.raises(ValueError, match="in fp8, for which there are no layers here"):
        dataclasses.replace(planned, plan=_with(one, dtype="fp8")).model_options(path)


def _with(plan: fp.Plan, **fields) -> fp.Plan:
    return dataclasses.replace(plan, entries=(dataclasses.replace(plan.best, **fields),))


def test_command_runs_plans(tmp_path):
    prompts = (*COMMON, "--prompt", "class Stack:", "--seed", "3", "--temperature", "0.7")
    alone = generate(*prompts)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("import os\n\ndef ") and "\nclass Stack:" in alone.stdout
    workload = {"batch": 2, "output": 40}
    file = tmp_path / "plan.json"
    for wanted in (dict(tp=1, pp=2, dp=1), dict(tp=1, pp=1, dp=2)):
        file.write_text(plan_of(TARGET, FOUR, workload, **wanted).to_json())
        done = generate(*prompts, "--plan", str(file), ranks=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone.stdout and f"plan: TP1 PP{wanted['pp']} x{wanted['dp']}" in done.stderr


def test_command_refuses_contradictions(tmp_path, capsys):
    file = tmp_path / "plan.json"
    draft = {"draft": DRAFT, "acceptance": 0.9}
    plans = {
        "plain": plan_of(TARGET, FOUR, {"batch": 1}, tp=1, pp=1, dp=1),
        "drafted": _with(plan_of(TARGET, FOUR, {"batch": 1, **draft}, tp=1, pp=1, dp=1), drafted=5),
        "int4": plan_of(TARGET, FOUR, {"batch": 1, "dtypes": ("int4",)}, tp=1, pp=1, dp=1),
    }
    for name, options, message in (
        ("plain", ("--tp", "2"), "tp=2 contradicts the plan, which is TP1 PP1 x1"),
        ("plain", ("--offload", "0"), "leave --offload out"),
        ("plain", ("--quantize", "int8"), "--quantize int8 contradicts the plan"),
        ("int4", ("--quantize", "int8"), "--quantize int8 contradicts the plan (TP1 PP1 x1 int4 b1)"),
        ("plain", ("--num-draft-tokens", "3"), "--num-draft-tokens 3 contradicts the plan"),
        ("drafted", (), "give a draft (--draft)"),
        ("drafted", ("--draft", str(DRAFT), "--num-draft-tokens", "auto"), "--num-draft-tokens auto contradicts"),
    ):
        file.write_text(plans[name].to_json())
        common = ["--model", str(TARGET), "--device", "cpu", "--prompt", "x", "--max-new-tokens", "3"]
        assert main(["generate", *common, "--plan", str(file), *options]) == 1
        assert message in capsys.readouterr().err
    for name, options in (("int4", ["--quantize", "int4"]), ("drafted", ["--draft", str(DRAFT), "--tp", "1"])):
        file.write_text(plans[name].to_json())
        assert main(["generate", *common, "--plan", str(file), *options]) == 0
    assert Path(file).exists() and torch.distributed.is_initialized() is False
