"""Offloaded models: the same tokens as on the device, in every arrangement, with drafts; what stays where; errors."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch
from torch import nn

import fused_parallel as fp
from fused_parallel.cli.generate import describe
from fused_parallel.nn.streamed_layers import _spread
from fused_parallel.testing import results
from fused_parallel.testing.spawn import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target directory, draft directory): a random target, and itself with fewer layers."""
    path, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    ranks.save_random_model(path, scale=6.0)
    ranks.save_random_model(draft, scale=6.0, num_hidden_layers=1)
    return path, draft


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
def test_same_tokens(pair, tp, pp):
    path, draft = pair
    expected = run_ranks(ranks.offloaded, tp * pp, path, None, None, tp=tp, pp=pp)[0][0]
    every = 1 << 40
    for offload in (fp.Offload(), fp.Offload(slots=1), fp.Offload(resident_bytes=40_000, slots=3), fp.Offload(every)):
        for drafter, options in ((None, {}), (draft, {}), ("ngram", {}), (draft, {"num_draft_tokens": "auto"})):
            for tokens, stats, host, streams in run_ranks(
                ranks.offloaded, tp * pp, path, drafter, offload, tp=tp, pp=pp, **options
            ):
                assert tokens == expected and streams
                passes = stats["rounds"] + 1  # the prompts' and the rounds'
                assert stats["streamed_bytes"] == passes * host
                assert (host == 0) == (offload.resident_bytes == every)


@pytest.mark.parametrize(
    "options", [{}, {"num_draft_tokens": (2, 1)}, {"method": "block"}], ids=["chain", "tree", "block"]
)
def test_same_tokens_when_sampled(pair, options):
    """Of the same seeds, drafted for or not: what is sampled has the law of the model on the device."""
    path, draft = pair
    sampled = {"temperature": 0.8, "top_p": 0.95, "seed": [3, 1, 2]}
    for drafter, of_draft in ((None, {}), (draft, options)):
        expected, other = (
            run_ranks(ranks.offloaded, 1, path, drafter, None, **{**sampled, **of_draft, "seed": seeds})[0][0]
            for seeds in ([3, 1, 2], [4, 5, 6])
        )
        assert expected != other
        for offload in (fp.Offload(), fp.Offload(resident_bytes=40_000, slots=3)):
            tokens, *_, streams = run_ranks(ranks.offloaded, 1, path, drafter, offload, **sampled, **of_draft)[0]
            assert tokens == expected and streams


def test_statistics_of_streaming(pair):
    path, _ = pair
    mesh = fp.init(device="cpu")
    for offload in (None, fp.Offload(), fp.Offload(host_bytes=0), fp.Offload(1 << 40)):
        model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, offload=offload)
        stats = fp.generate(model, ranks.OFFLOAD_PROMPTS, 8).stats
        if offload is None or offload.resident_bytes:
            assert stats.streamed_bytes == 0 and stats.link_utilisation is None and stats.stream_gb_per_second is None
            assert "streamed" not in describe(stats)
        else:
            assert 0 < stats.link_utilisation < 1 and 0.01 < stats.stream_gb_per_second < 1000
            assert "GB/s in" in describe(stats)


def test_layers_computed_on_the_cpu(tmp_path, monkeypatch):
    """As many as the measured times say, other ones for other numbers of rows; the same tokens."""
    ranks.save_random_model(tmp_path, scale=6.0, num_hidden_layers=8)
    mesh = fp.init(device="cpu")
    load = {"mesh": mesh, "dtype": torch.float32}
    plain = fp.LlamaForCausalLM.from_pretrained(tmp_path, **load)
    model = fp.LlamaForCausalLM.from_pretrained(tmp_path, **load, offload=fp.Offload(cpu=True))
    layers = model.model.layers
    found = layers.on_cpu(1)  # measured
    assert found <= set(range(8)) and layers.on_cpu(65) == frozenset()
    measured = []

    def on_cpu(self, index, rows):
        measured.append(rows)
        return rows

    monkeypatch.setattr(fp.nn.StreamedLayers, "_time_copy", lambda self, index: 9.0)
    monkeypatch.setattr(fp.nn.StreamedLayers, "_time_on_cpu", on_cpu)
    layers._on_cpu.clear()
    assert [len(layers.on_cpu(rows)) for rows in (1, 9, 27, 64)] == [7, 4, 2, 0]  # 9 / (9 + 64) of 8 is less than one
    assert layers.on_cpu(9) == {1, 3, 5, 7} and measured == [1, 9, 27, 64]  # once for each
    prompts = ranks.OFFLOAD_PROMPTS
    for options in ({}, {"draft": "ngram", "num_draft_tokens": "auto"}, {"draft": "ngram", "num_draft_tokens": 8}):
        expected = fp.generate(plain, prompts, 24, **options).tokens
        result = fp.generate(model, prompts, 24, **options)
        assert result.tokens == expected
        assert 0 < result.stats.streamed_bytes < 0.9 * (result.stats.rounds + 1) * layers.host_bytes
    with pytest.raises(RuntimeError, match=r"Offload\(cpu=True\) is for one tensor-parallel rank, not for 2"):
        run_ranks(ranks.offloaded, 2, tmp_path, None, fp.Offload(cpu=True), tp=2)


def test_weights_left_in_host_memory():
    """A linear layer that may takes its input to where its weight is; the meta device stands for another device."""
    group = fp.init(device="cpu")["tp"]
    for kind in (fp.nn.ColumnParallelLinear, fp.nn.RowParallelLinear):
        layer = kind(8, 8, group=group, device="meta")
        layer.on_cpu = True
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # the result, on its way back
            layer(torch.randn(2, 8))


def places(mesh, path, resident):
    """Which tensors of which layers are in blocks of host memory, and whether a pass leaves them there."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, offload=fp.Offload(resident_bytes=resident))
    layers = model.model.layers
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    model(torch.tensor([[1, 2, 3]]))
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert set(model.state_dict()) == set(fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh).state_dict())
    streamed = [[p.dim() for p, *_ in layers._views[i]] for i in layers._order]
    return layers._order, streamed, layers.host_bytes


def test_matrices_are_streamed_and_norms_are_not(pair):
    path, _ = pair
    ((order, streamed, host),) = run_ranks(places, 1, path, 0)
    assert order == list(range(len(order))) and len(order) > 1
    assert all(dims and set(dims) == {2} for dims in streamed)
    ((fewer, _, less),) = run_ranks(places, 1, path, host // 2)
    assert 0 < len(fewer) < len(order) and less <= host - host // 2 + host // len(order)


def test_residents_are_spread_evenly():
    assert _spread([10] * 8, 0) == set() and _spread([10] * 8, 9) == set()
    assert _spread([10] * 8, 80) == set(range(8)) and _spread([10] * 8, 1000) == set(range(8))
    assert _spread([10] * 8, 25) == {2, 6}
    gaps = sorted(_spread([1] * 80, 20))
    assert len(gaps) == 20 and {b - a for a, b in itertools.pairwise(gaps)} == {4}


def test_weights_loaded_between_passes_are_used():
    layers = {str(i): nn.Linear(4, 4) for i in range(4)}
    streamed = fp.nn.StreamedLayers(layers, device="cpu")
    x = torch.randn(2, 4)

    def run():
        y = x
        with torch.no_grad():
            for _, layer in streamed:
                y = layer(y)
        return y

    first = run()
    assert torch.equal(run(), first) and streamed.passes == 2
    streamed.load_state_dict({name: 2 * value for name, value in streamed.state_dict().items()})
    assert not torch.equal(run(), first)


@pytest.mark.parametrize("options", [{"resident_bytes": -1}, {"resident_bytes": 1.5}, {"slots": 0}, {"slots": "2"}])
def test_bad_input(options):
    with pytest.raises(ValueError, match=r"Offload: .* must be an integer of at least"):
        fp.Offload(**options)


def test_truncated_file(pair, tmp_path):
    path, _ = pair
    for file in path.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:-1000] if file.suffix == ".safetensors" else data)
    with pytest.raises(RuntimeError, match=r"raised ValueError: .*safetensors"):
        run_ranks(ranks.offloaded, 1, tmp_path, None, fp.Offload())


def test_a_checkpoint_of_another_shape(pair, tmp_path):
    path, _ = pair
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 252}))
    with pytest.raises(RuntimeError, match=r"raised ValueError: .*\[250, 96\].*\[252, 96\]|.*\[252, 96\].*\[250, 96\]"):
        run_ranks(ranks.offloaded, 1, tmp_path, None, fp.Offload())


def test_benchmark_runs_on_ranks(tmp_path):
    """bench_weight_stream on two CPU ranks: the rows that the report expects, and peers that compute the same."""
    script = ["benchmarks/bench_weight_stream.py", "--device", "cpu", "--results", str(tmp_path), "--passes", "1"]
    sizes = ["--gb", "0.004", "--hidden", "256", "--intermediate", "600", "--vocabulary", "64", "--tokens", "1", "3"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*start, *script, *sizes], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(tmp_path / "weight_stream.csv")
    impls = {"copy_only", "fused", "fused_first_token", "sync_loop"}
    assert {row["impl"] for row in rows} - {"accelerate"} == impls
    sizes_of = {row["shape"].split(";")[2]: int(row["bytes"]) for row in rows}
    assert all(row["world_size"] == "2" and float(row["us_p50"]) > 0 for row in rows)
    quantized = [*script, *sizes, "--quantize", "int4", "--resident", "0"]
    done = subprocess.run([*start, *quantized], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    last = results.read(tmp_path / "weight_stream.csv")[-1]
    assert last["impl"] == "fused_int4_first_token"
    assert 0.25 < int(last["bytes"]) / sizes_of["resident=0"] < 0.3
    assert 0.35 < sizes_of["resident=0.5"] / sizes_of["resident=0"] < 0.65
