"""Descriptions of clusters, plans as JSON, plots, the command line, and what the planner refuses."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest

import fused_parallel as fp
from fused_parallel.cli import main
from fused_parallel.cli import plan as command
from fused_parallel.models.config import LlamaConfig
from fused_parallel.planner import Plan, Workload, load_cluster, load_model, plan
from fused_parallel.planner.model import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PROFILE = RESULTS / "probe_h200.json"
YAML = """\
hosts: 2
gpus_per_host: 4
gpu: {preset: h100, memory_gb: 94}
intra: nvlink4
inter: ib-ndr
nics: 4
host_memory_gb: 1000
"""


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *options])
    return args.run(args)


def test_models_from_all_sources(tmp_path):
    config = dict(PRESETS["llama-3-70b"], vocab_size=128256, num_key_value_heads=8, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = [load_model(s) for s in ("llama-3-70b", config, LlamaConfig.from_dict(config), tmp_path)]
    shapes.append(load_model(tmp_path / "config.json"))
    assert {s.params() for s in shapes} == {70_553_706_496}
    with pytest.raises(ValueError, match=r"'gpt-9' is neither .* presets: llama-3-8b"):
        load_model("gpt-9")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"config\.json.*mamba"):
        load_model(tmp_path / "config.json")


def test_cluster_from_yaml_and_json(tmp_path):
    yaml = pytest.importorskip("yaml")
    file = tmp_path / "two.yaml"
    file.write_text(YAML)
    cluster = load_cluster(file)
    assert (cluster.gpus, cluster.nics, cluster.gpu.memory_gb, cluster.gpu.name) == (8, 4, 94, "h100")
    assert (cluster.intra.name, cluster.inter.name, cluster.name) == ("nvlink4", "ib-ndr", "two")
    as_json = tmp_path / "two.json"
    as_json.write_text(json.dumps(yaml.safe_load(YAML)))
    assert load_cluster(as_json) == cluster
    assert plan("llama-3-70b", file).best.gpus <= 8
    file.write_text("hosts: [1\n")
    with pytest.raises(ValueError, match=r"two\.yaml.*\n?.*line"):
        load_cluster(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nics: 4", "nics: none"), r"two\.yaml:6: nics must be a positive integer, got 'none'"),
        (("nics: 4", "hosts: 4"), r"two\.yaml:6: the key hosts stands on line 1 already"),
        (
            ("gpu: {preset: h100, memory_gb: 94}", "gpu:\n  preset: h100\n  memory: 94"),
            r"two\.yaml:5: gpu: unknown key mem",
        ),
        (("memory_gb: 94", "memory_gb: many"), r"two\.yaml:3: gpu: memory_gb must be a number"),
        (("intra: nvlink4", "intra: nvlink"), r"two\.yaml:4: intra 'nvlink' is unknown"),
        (("inter: ib-ndr\n", ""), r"two\.yaml:1: 2 hosts need an inter link"),
        (("hosts: 2\n", ""), r"two\.yaml:4: inter is given, the link between hosts, but hosts is 1"),
        (("nics: 4", "nic: 4"), r"two\.yaml:6: unknown keys nic"),
        (("gpus_per_host: 4\n", ""), r"two\.yaml: the key gpus_per_host is missing"),
    ],
)
def test_yaml_errors_name_the_line(tmp_path, change, message):
    pytest.importorskip("yaml")
    assert change[0] in YAML
    (tmp_path / "two.yaml").write_text(YAML.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_cluster(tmp_path / "two.yaml")


def test_yaml_without_pyyaml(tmp_path, monkeypatch):
    file = tmp_path / "two.yaml"
    file.write_text(YAML)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pyyaml"):
        load_cluster(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "h900"}, "gpu 'h900' is unknown; known: a100"),
        ({"intra": "nvlink9"}, "intra 'nvlink9' is unknown"),
        ({"gpu": {"preset": "h100", "memory": 1}}, "unknown key memory"),
        ({"gpu": {"preset": "h100", "memory_gb": "much"}}, "memory_gb must be a number"),
        ({"gpus": 4}, "unknown keys gpus"),
        ({"gpus_per_host": 0}, "gpus_per_host must be a positive integer, got 0"),
        ({"hosts": 2}, "2 hosts need an inter link"),
        ({"inter": "eth100"}, "but hosts is 1"),
        ({"host_memory_gb": -1}, "host_memory_gb"),
    ],
)
def test_contradictory_descriptions(change, message):
    with pytest.raises(ValueError, match=message):
        load_cluster({"gpus_per_host": 4, "gpu": "h100", "intra": "nvlink4", **change})


def test_incomplete_descriptions(tmp_path):
    with pytest.raises(ValueError, match="intra is missing"):
        load_cluster({"gpus_per_host": 4, "gpu": "h100"})
    with pytest.raises(ValueError, match="gpu is missing"):
        load_cluster({"gpus_per_host": 4})
    with pytest.raises(ValueError, match=r"'9xh100' is neither .*8xh100"):
        load_cluster("9xh100")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_cluster(tmp_path / "list.json")
    (tmp_path / "text.json").write_text("hosts: 1")
    with pytest.raises(ValueError, match="is not JSON"):
        load_cluster(tmp_path / "text.json")


def test_probe_profiles(tmp_path):
    profile = json.loads(PROFILE.read_text())
    one = load_cluster(PROFILE)
    assert one.gpus == 1 and one.gpu.name == "h200"
    assert one.gpu.host_gb_s == profile["host_device"][0]["to_device_gb_per_s_each"]
    assert one.gpu.memory_gb == pytest.approx(profile["topology"]["gpus"][0]["memory_bytes"] / 1e9)
    assert 0.8 < one.gpu.memory_share < 1 and 0.6 < one.gpu.compute_share < 0.9
    file = tmp_path / "two.json"
    gpu = profile["topology"]["gpus"][0]
    profile["topology"]["gpus"] = [gpu, {**gpu, "index": 1}]
    profile["topology"]["pairs"] = [{"a": 0, "b": 1, "link": "NV18", "peer_access": True}]
    points = [{"bytes": 16384, "us": 12.0}, {"bytes": 1 << 20, "us": 20.0}]
    measured = {"op": "all_reduce", "backend": "nccl", "world_size": 2, "mode": "graph", "points": points}
    profile["collectives"].append(measured)
    file.write_text(json.dumps(profile))
    two = load_cluster(file)
    assert two.gpus == 2 and two.intra.name.startswith("nvlink4") and two.intra.table[2][0] == (16384, 12.0)
    assert plan("llama-3-70b", two).best.tp == 2
    profile["topology"]["gpus"][1]["name"] = "NVIDIA L4"
    file.write_text(json.dumps(profile))
    with pytest.raises(ValueError, match="GPUs differ"):
        load_cluster(file)
    file.write_text(json.dumps({**profile, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version is 99"):
        load_cluster(file)
    file.write_text(json.dumps({**profile, "gpus": []}))
    with pytest.raises(ValueError, match="found no GPU"):
        load_cluster(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be a positive integer, got 0"),
        ({"batch": (1, -2)}, "got -2"),
        ({"batch": ()}, "at least one number"),
        ({"input": 1.5}, "input must be"),
        ({"rank": "fame"}, "rank must be one of latency, throughput, cost, got 'fame'"),
        ({"dtypes": ("fp4",)}, "dtypes must be out of bf16, fp8, int8, int4"),
        ({"slo_tpot_ms": 0}, "slo_tpot_ms"),
        ({"acceptance": 0.5}, "belong together"),
        ({"draft": "llama-3-8b", "acceptance": 2}, "between 0 and 1, got 2"),
    ],
)
def test_contradictory_workloads(change, message):
    with pytest.raises(ValueError, match=message):
        Workload(**change)


def test_a_model_that_fits_nowhere_says_what_is_missing():
    lacking = r"under no plan.*lacks ([\d.]+) GB.*first: int4 weights, offload, 32 such GPUs"
    with pytest.raises(ValueError, match=lacking) as error:
        plan("llama-3-405b", "8xl40s", {"offload": False})
    lacks = float(str(error.value).split("lacks ")[1].split()[0])
    assert 405.85e9 * 2 / 8 / 1e9 - 48 < lacks < 405.85e9 * 2 / 8 / 1e9 - 48 + 10
    with pytest.raises(ValueError, match=r"offload"):
        plan("llama-3-70b", "1xl4", {"offload": False, "dtypes": ("int4",)})
    with pytest.raises(ValueError, match=r"every layer streamed.*first: a batch of 16, 128 such"):
        plan("llama-3-70b", "1xl4", {"batch": 4096})
    # What is named has been tried, and what is smaller does not do.
    with pytest.raises(ValueError, match=r"first: fp8 weights, int4 weights, offload, 2 such GPUs$"):
        plan("llama-3-70b", "1xh100", {"offload": False})
    assert plan("llama-3-70b", "1xh100", {"offload": False, "dtypes": ("fp8",)}).best.gpus == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": {"preset": "h100", "hbm_gb_s": 0}}, "hbm_gb_s must be a number above 0, got 0"),
        ({"gpu": {"preset": "h100", "memory_gb": float("nan")}}, "memory_gb must be a number above 0, got nan"),
        ({"gpu": {"preset": "h100", "memory_gb": float("inf")}}, "memory_gb must be a number above 0, got inf"),
        ({"gpu": {"preset": "h100", "name": "h100-94gb"}}, "unknown key name"),
        ({"intra": {"preset": "nvlink4", "bus_gb_s": 0}}, "bus_gb_s must be a number above 0"),
        ({"nics": 8}, "nics is given"),
        ({"layer_us": float("nan")}, "layer_us must be a number of at least 0, got nan"),
    ],
)
def test_rates_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        load_cluster({"gpu": "h100", "gpus_per_host": 2, "intra": "nvlink4", **change})


def test_profiles_that_are_not_whole_or_old(tmp_path):
    whole = json.loads((RESULTS / "probe_h100_quick.json").read_text())
    file = tmp_path / "profile.json"
    for broken in (
        {"schema_version": 1},
        {**whole, "host": {}},
        {**whole, "collectives": "x"},
        {**whole, "gpus": [{}]},
        {key: value for key, value in whole.items() if key != "versions"},
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"{file} is no whole probe profile .*fused-parallel probe --out"):
            load_cluster(file)
    for old in (
        {"date": "2020-01-01T00:00:00Z"},
        {"versions": {**whole["versions"], "fused_parallel": "0.0.1"}},
    ):
        file.write_text(json.dumps({**whole, **old}))
        with pytest.warns(UserWarning, match=rf"{file} was measured by fused_parallel .* days ago"):
            assert load_cluster(file).gpus == 2


def test_small_mistakes_on_the_command_line(tmp_path, capsys):
    model, there = ["plan", "--model", "llama-3-8b"], ["--cluster", "1xh100"]
    for rows in ("0", "-3", "x"):
        with pytest.raises(SystemExit):
            main([*model, *there, "--rows", rows])
        assert "no whole number of at least 1" in capsys.readouterr().err
    assert main([*model, *there, "--plot", str(tmp_path / "none" / "x.png")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[1]")
    assert main(["plan", "--model", str(tmp_path / "config.json"), *there]) == 1
    assert "must be a mapping, got list" in capsys.readouterr().err


def test_a_cluster_that_is_probed_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plan", "--model", "llama-3-8b", "--cluster", "this"]) == 1
    assert "run it without torchrun" in capsys.readouterr().err


def test_a_plan_without_entries_is_refused():
    answer = plan("llama-3-8b", "1xh100")
    with pytest.raises(ValueError, match="entries is empty"):
        Plan.from_json(json.dumps({**json.loads(answer.to_json()), "entries": []}))


def test_json_round_trip():
    answer = plan("llama-3-70b", "8xh100", {"batch": (1, 64), "draft": "llama-3-8b", "acceptance": 0.8})
    again = Plan.from_json(answer.to_json())
    assert again.by_tp == answer.by_tp and again.shape == answer.shape
    assert again.entries == answer.entries and again.frontier == answer.frontier and again.wall == answer.wall
    assert again.to_json() == answer.to_json()
    with pytest.raises(ValueError, match="must be JSON"):
        Plan.from_json("{")
    with pytest.raises(ValueError, match="plan_version is 7"):
        Plan.from_json('{"plan_version": 7}')
    with pytest.raises(ValueError, match="incomplete"):
        Plan.from_json('{"plan_version": 3}')


def test_command_prints_a_table(capsys):
    assert run("--model", "llama-3-70b", "--cluster", "2xh200", "--batch", "1..6") == 0
    out = capsys.readouterr().out
    assert "TPOT ms" in out and "Wall at batch 1" in out and "Wall at batch 6" in out and "limited by" in out


def test_command_prints_json_and_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    options = ["--batch", "1,32", "--rank", "throughput", "--dtype", "bf16,int4", "--json", "--plot", str(picture)]
    options += ["--draft", "llama-3-8b", "--acceptance", "0.8", "--slo-tpot", "50", "--slo-ttft", "5000"]
    assert run("--model", "llama-3-70b", "--cluster", "8xrtxpro6000", *options) == 0
    answer = Plan.from_json(capsys.readouterr().out)
    assert answer.rank == "throughput" and answer.request["batch"] == [1, 32]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_plan(tmp_path):
    """What is drawn, read back from matplotlib: the frontier's labels, the bars' parts and heights, the timeline."""
    pytest.importorskip("matplotlib")
    from fused_parallel.planner import plot

    answer = plan("llama-3-405b", "2x8xh100-eth100", {"batch": (1, 64), "dtypes": ("int4",), "rank": "throughput"})
    drawn = []
    figure = plot._figure
    try:
        plot._figure = lambda *args: drawn.append(figure(*args)) or drawn[-1]
        answer.plot(tmp_path / "plan.png")
    finally:
        plot._figure = figure
    frontier, by_tp, *walls, timeline = drawn[0].axes
    assert len(walls) == 2
    texts = [text.get_text() for text in frontier.get_legend().get_texts()]
    assert texts[-1] == f"best by throughput: {answer.best.label}"
    assert {text.split("  ")[1] for text in texts[1:-1]} <= {c.label for c in answer.frontier}
    assert {c.tp for c in answer.by_tp} == {1, 2, 4, 8, 16}
    tops = {}
    for bar in by_tp.patches:
        x = round(bar.get_x() + bar.get_width() / 2)
        tops[x] = tops.get(x, 0) + bar.get_height()
    assert [tops[i] for i in range(5)] == pytest.approx([c.tpot_ms for c in sorted(answer.by_tp, key=lambda c: c.tp)])
    assert max(c.microbatches for c in answer.entries) <= 8 < max(c.pp for c in answer.entries)  # fp.generate's most
    piped = next(c for c in answer.entries if c.pp > 1)
    assert piped.label in timeline.get_title()
    spans = sorted((bar.get_y(), bar.get_x(), bar.get_width()) for bar in timeline.patches)
    assert len(spans) == 3 * piped.pp * piped.microbatches
    for (row, start, width), (next_row, next_start, _) in itertools.pairwise(spans):
        assert row != next_row or start + width <= next_start + 1e-9  # a stage does one thing at a time


def test_errors_are_one_line_of_the_command(capsys):
    assert main(["plan", "--model", "gpt-9", "--cluster", "8xh100"]) == 1
    assert "fused-parallel: model 'gpt-9'" in capsys.readouterr().err
    assert main(["plan", "--model", "llama-3-70b", "--cluster", "8xh100", "--slo-tpot", "0.1"]) == 1
    assert "the least TPOT is" in capsys.readouterr().err


def test_public_names():
    assert fp.plan("llama-3-8b", "1xh200", fp.Workload(batch=4)).best.batch == 4
    assert fp.Plan is Plan


def test_batches():
    assert command.batches("8") == (8,) and command.batches("1,8,64") == (1, 8, 64)
    assert command.batches("1..256") == tuple(2**i for i in range(9))
    assert command.batches("3..10") == (3, 4, 8, 10)
    for wrong in ("", "x", "4..2", "0..4", "1,"):
        with pytest.raises(argparse.ArgumentTypeError):
            command.batches(wrong)
