"""The planner's two backends, and predictions of whole steps against measurements."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_parallel.ops.quantized_matmul import MOST_ROWS
from fused_parallel.planner import CLUSTERS, Cluster, Workload, load_cluster, load_model, measured, plan, validate
from fused_parallel.planner.apply import Planned
from fused_parallel.planner.cluster import from_profile
from fused_parallel.planner.cost import (
    DEQUANTIZED_BYTES,
    QUANTIZED_ROWS,
    Step,
    all_reduce_us,
    layer_us,
    link_all_reduce_us,
    stage_cost,
    verify_us,
)
from fused_parallel.planner.hardware import GPUS, LINKS, OURS_NVLINK4
from fused_parallel.planner.model import load_config
from fused_parallel.planner.search import DEQUANTIZED_PEAK, Search
from fused_parallel.reference.quantized_matmul import dequantize, quantize
from fused_parallel.testing import results
from fused_parallel.testing.timer import Timing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
M70 = load_model("llama-3-70b")
KB, MB = 1024, 1024 * 1024


def figures(op, gpu, **wanted):
    """All microseconds that a CSV holds for (impl, shape) in graphs on a GPU."""
    with open(RESULTS / f"{op}.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["mode"] == "graph" and gpu in r["gpu"]]
    found = {}
    for r in rows:
        found.setdefault((r["impl"], r["shape"]), set()).add(float(r["us_p50"]))
    return found


def test_constants_are_the_benchmarks_figures():
    """Each is a row of the CSV file that measured.py names."""
    all_reduce = figures("all_reduce", "H100")
    for tokens, (nccl, ours) in measured.H100_ALL_REDUCE_US.items():
        assert nccl in all_reduce["nccl", f"tokens={tokens};hidden=8192"]
        assert ours in all_reduce["fused", f"tokens={tokens};hidden=8192"]
    matmul = figures("matmul_all_reduce", "H100")
    for (m, k, n), (alone, whole) in measured.H100_MATMUL_US.items():
        assert alone in matmul["cublas", f"M={m};K={k};N={n}"] and whole in matmul["fused", f"M={m};K={k};N={n}"]
    decode = figures("decode_step", "H100")
    for impl, by_batch in measured.H100_DECODE_US.items():
        for batch, us in by_batch.items():
            assert us in decode[impl, f"model=llama-3-70b:20;tp=2;pp=1;batch={batch};ctx=1024"]
    verify = figures("verify", "H200")
    for rows, (ours, argmax) in measured.VERIFY_US.items():
        b, k = (64, 7) if rows == 512 else (rows // 5, 4)
        shape = f"B={b};k={k};V=128256;draft=onehot;method=rejection"
        assert ours in verify["fused", shape] and argmax in verify["torch_argmax_only", shape]
    push = figures("p2p", "H100")
    assert all(us in push["fused_push", f"bytes={size}"] for size, us in measured.H100_PUSH_US.items())


def test_memory_rates_have_a_probe():
    """What matmuls read with lies under what the probes of these GPUs saw, and above nine tenths of it."""
    for name, file in (("h100", "probe_h100.json"), ("h200", "probe_h200.json")):
        found = json.loads((RESULTS / file).read_text())["gpus"][0]
        gpu = GPUS[name]
        rate = gpu.hbm_gb_s * gpu.memory_share
        assert 0.9 * found["memory"]["read_gb_per_s"] < rate < found["memory"]["read_gb_per_s"]
        best = max(m["tflop_per_s"] for m in found["matmul"])
        assert 0.8 * best < gpu.bf16_tflops * gpu.compute_share < best


def test_decode_steps_of_both_backends_on_h100():
    for impl, most in (("fused", 0.01), ("torch_nccl", 0.03)):
        fitted, predicted = validate.errors(validate.h100_decode(impl))
        assert fitted == pytest.approx(0, abs=1e-9)  # the constant's own row
        assert abs(predicted) < most
    pair = CLUSTERS["2xh100"]
    assert layer_us(pair.of("ours")) < layer_us(pair) / 2  # fewer, fused kernels
    assert layer_us(dataclasses.replace(pair, layer_us=7.0).of("ours")) == 7.0


def test_our_all_reduce():
    nccl, ours = CLUSTERS["8xh100"], CLUSTERS["8xh100"].of("ours")
    for ranks in (2, 4, 8):
        times = [all_reduce_us(ours, ranks, 2**i) for i in range(14, 28)]
        assert times == sorted(times)
        assert all(t < all_reduce_us(nccl, ranks, 2**i) for i, t in zip(range(14, 22), times, strict=False))
    assert all_reduce_us(ours, 2, 16 * KB) == 2.54 and all_reduce_us(ours, 8, 16 * KB) > 2 * 2.54
    # Behind a matmul less of a large one is left; on more than two ranks nothing is known to be hidden.
    assert all_reduce_us(ours, 2, 32 * MB, after_matmul=True) < 0.8 * all_reduce_us(ours, 2, 32 * MB)
    assert all_reduce_us(ours, 4, 32 * MB, after_matmul=True) == all_reduce_us(ours, 4, 32 * MB)
    assert all_reduce_us(nccl, 2, 32 * MB, after_matmul=True) == all_reduce_us(nccl, 2, 32 * MB)
    # The formula, where there is no table, passes through what it was made from.
    free = dataclasses.replace(OURS_NVLINK4, table={}, behind={})
    for size in (16 * KB, MB, 128 * MB):
        assert link_all_reduce_us(free, 2, size) == pytest.approx(all_reduce_us(ours, 2, size), rel=0.07)


def test_verifying_costs():
    h200 = CLUSTERS["2xh200"]
    for rows, (us, argmax) in measured.VERIFY_US.items():
        size = rows * 128256 * 2
        assert verify_us(h200.of("ours"), size) == pytest.approx(us, rel=0.12)
        assert verify_us(h200, size) == pytest.approx(argmax, rel=0.14)
    step = Step(4, 5, 1024, 5)
    plain, judged = (
        stage_cost(M70, h200, step, tp=2, layers=80, dtype="bf16", head=True, judged=j) for j in (False, True)
    )
    assert judged.us - plain.us == pytest.approx(verify_us(h200, 20 * 64128 * 2))


def test_backends_of_a_plan():
    ask = {"batch": (1, 64), "rank": "throughput"}
    default, ours, nccl, best = (
        plan("llama-3-70b", "8xh100", {**ask, "backend": b}) for b in (None, "ours", "nccl", "best")
    )
    assert default.entries == ours.entries and {c.backend for c in ours.entries} == {"ours"}
    assert {c.backend for c in nccl.entries} == {"nccl"}
    of = [{(c.tp, c.pp, c.dp, c.batch): c for c in p.entries} for p in (ours, nccl, best)]
    for key in set(of[0]) & set(of[1]) & set(of[2]):
        mine, theirs = of[0][key].tpot_ms, of[1][key].tpot_ms
        assert mine < theirs or (mine == theirs and of[0][key].limit == "stream")
        assert of[2][key].tpot_ms == mine
    assert any("FUSED_PARALLEL=reference" in text for text in nccl.best.explanation)
    assert nccl.wall[-1].communication_ms > ours.wall[-1].communication_ms
    assert plan("llama-3-70b", "8xl40s", ask).best.backend == "nccl"  # not measured there
    with pytest.raises(ValueError, match=r"8xl40s.*no costs of this library's kernels on pcie4.*probe"):
        plan("llama-3-70b", "8xl40s", {**ask, "backend": "ours"})
    with pytest.raises(ValueError, match="backend must be one of ours, nccl, best, got 'mpi'"):
        Workload(backend="mpi")


def test_our_kernels_from_a_profile(tmp_path):
    """A profile of two PCIe cards with this library's all-reduce in it, and one of Hopper without."""
    profile = json.loads((RESULTS / "probe_h100.json").read_text())
    file = tmp_path / "two.json"
    pair = load_cluster(RESULTS / "probe_h100.json")
    assert pair.ours is OURS_NVLINK4 and pair.gpus == 2 and pair.gpu.host_gb_s == pytest.approx(47.49, abs=0.01)
    assert pair.intra.table[2][0] == (4096, pytest.approx(7.6, abs=0.1)) and pair.islands == ()
    assert (pair.intra.p2p_us, pair.intra.p2p_gb_s) == (pytest.approx(10.17, abs=0.01), pytest.approx(281.8, abs=0.1))
    for gpu in profile["topology"]["gpus"]:
        gpu["name"] = "NVIDIA L40S"
    profile["topology"]["pairs"][0]["link"] = "PHB"
    file.write_text(json.dumps(profile))
    assert load_cluster(file).ours is None
    points = [{"bytes": 16 * KB, "us": 6.0}, {"bytes": 16 * MB, "us": 900.0}]
    behind = [{"bytes": 16 * KB, "us": 5.0}, {"bytes": 32 * MB, "us": 1500.0}]
    for op, of in (("all_reduce", points), ("matmul_all_reduce", behind)):
        entry = {"op": op, "backend": "fused_parallel", "world_size": 2, "mode": "graph", "points": of}
        profile["collectives"].append(entry)
    file.write_text(json.dumps(profile))
    two = load_cluster(file).of("ours")
    assert two.ours.name.startswith("pcie5, this library") and two.ours.p2p_gb_s == pair.intra.p2p_gb_s
    assert all_reduce_us(two, 2, 16 * KB) == 6.0 and all_reduce_us(two, 2, 16 * KB, after_matmul=True) == 5.0
    assert plan("llama-3-8b", two).best.backend == "ours"


def test_copies_ahead_while_drafting():
    """The draft runs beside the copies of as many layers as there are slots, not beside all of them."""
    one = Cluster("one", GPUS["h100"], 1, LINKS["pcie5"])
    ask = Workload(input=512, draft="llama-3-8b", acceptance=0.8)
    search = Search(M70, one, ask)
    schedule, _, drafts = search.decode_round("bf16", 1, [80], 1, 1, 80, 8)
    layer = M70.layer_bytes(1, "bf16") / one.gpu.host_gb_s / 1e3
    ahead = min(drafts[0], 2 * layer)
    assert ahead > 0 and schedule.period == pytest.approx(80 * layer - ahead + drafts[0])


STEPS = [
    # (impl, shape, us, bytes): real figures, of decode_step.csv
    ("fused", "what=decode;batch=1;ctx=1024", 6812.35, 0),
    ("fused", "what=decode;batch=64;ctx=1024", 8099.46, 0),
    ("torch_nccl", "what=decode;batch=1;ctx=1024", 8164.48, 0),
    ("torch_nccl", "what=decode;batch=64;ctx=1024", 9887.10, 0),
]


def write_steps(folder, rows, gpu="NVIDIA H100 80GB HBM3"):
    about = "model=llama-3-70b:20;tp=2;pp=1;split=20;"
    made = []
    for impl, shape, us, size in rows:
        timing = Timing(us, us, us, 0.0)
        how = {"world_size": 2, "dtype": torch.bfloat16, "mode": "graph", "bytes": size, "floor_us": None}
        row = results.make_row("planner", impl, timing, shape=results.parse_shape(about + shape), device="cpu", **how)
        made.append(row | {"gpu": gpu})
    results.append(made, folder)
    return folder / "planner.csv"


def test_steps_are_compared(tmp_path, capsys):
    path = write_steps(tmp_path, STEPS)
    groups = validate.steps(path)
    assert list(groups) == ["decode, ours", "decode, nccl"]
    for name, most in (("decode, ours", 0.01), ("decode, nccl", 0.03)):
        assert max(map(abs, validate.errors(groups[name]))) < most
    validate.main(["--steps", str(path)])
    out = capsys.readouterr().out
    worst = 100 * max(map(abs, validate.errors(groups["decode, nccl"])))
    assert (
        f"| decode, nccl | 2 | {50 * sum(map(abs, validate.errors(groups['decode, nccl']))):.1f} % | {worst:.1f} %"
        in out
    )
    assert "| all steps | 4 |" in out
    validate.main(["--steps", str(path), "--profile", str(RESULTS / "probe_h100.json")])
    assert "| all steps | 4 |" in capsys.readouterr().out


def test_memory_prefill_and_pipelines_are_compared(tmp_path):
    weights = M70.layer_bytes(2, "bf16") * 20 + (2 * 64128 + 1) * 8192 * 2
    kv = 32 * (1024 + 32 + 2) * M70.kv_bytes_per_token(20, 2)
    rows = [
        ("fused", "what=memory;batch=32;ctx=1024;new=32;micro=1;of=torch;rank=1", 1.0, int(weights + kv)),
        ("fused", "what=prefill;batch=1;ctx=2048;chunk=2048", 1.0, 0),
        ("fused", "what=prefill;batch=1;ctx=2048;chunk=512", 1.0, 0),
        ("fused", "what=offload;batch=1;ctx=1024;streamed=20", 1.0, 0),
        ("fused", "what=speculate;batch=1;ctx=1024;draft=llama-3-8b;k=4", 1.0, 0),
    ]
    groups = validate.steps(write_steps(tmp_path, rows))
    ((_, measured_gb, predicted),) = groups["memory (torch), ours"]
    activations = M70.activation_bytes(8192, 32, 2)
    assert predicted == pytest.approx(measured_gb + activations / 1e9)
    ((_, _, whole),), ((_, _, cut),) = groups["prefill, ours"], groups["prefill (host), ours"]
    assert 2 * 20 * M70.layer_params(2) * 2048 / 989.5e9 < whole < cut  # ms, at the datasheet's rate
    ((_, _, streamed),) = groups["offload, ours"]
    assert streamed == pytest.approx(20 * M70.layer_bytes(2, "bf16") / 47.5e6)
    ((_, _, round_ms),) = groups["speculate, ours"]
    alone = Search(load_model("llama-3-8b"), CLUSTERS["1xh100"].of("ours"), Workload(input=1024))
    draft_ms = alone.decode_round("bf16", 1, [32], 1, 1, 0, 0)[0].period / 1e3
    assert round_ms - 4 * draft_ms == pytest.approx(6.9, abs=0.2)  # a step on five tokens
    with pytest.raises(ValueError, match="measured on 'NVIDIA L4' need a profile"):
        validate.steps(write_steps(tmp_path / "l4", rows, "NVIDIA L4"))


def test_a_profile_tells_chunks_and_groups_apart():
    """Of two H100; the one of two H200 is from before and has one number."""
    new, old = (load_cluster(RESULTS / f"probe_{name}_quick.json").eager_layer_us for name in ("h100", "h200"))
    assert 400 < new.first < new.later < new.tp_first < new.tp_later < 1200
    assert 400 < old < 1200


def test_prefills_that_the_host_may_hold_up_are_apart(tmp_path):
    rows = [("fused", f"what=prefill;batch=1;ctx={n};chunk={n}", 1.0, 0) for n in (64, 512, 8192)]
    groups = validate.steps(write_steps(tmp_path, rows))
    assert [text.split()[-2] for text, _, _ in groups["prefill (host), ours"]] == ["ctx=64", "ctx=512"]
    assert [text.split()[-2] for text, _, _ in groups["prefill, ours"]] == ["ctx=8192"]
    assert groups["prefill (host), ours"][0][2] == pytest.approx(20 * measured.EAGER_LAYER_US / 1e3)


@pytest.mark.skipif(not (RESULTS / "planner.csv").exists(), reason="bench_planner.py has not run on GPUs yet")
def test_the_measured_steps_have_the_errors_that_the_docs_give():
    text = (ROOT / "docs" / "planning.md").read_text()
    for line in validate.summary(validate.steps(RESULTS / "planner.csv")):
        assert line in text, f"docs/planning.md lacks the line that validate --steps prints: {line}"


def test_bench_planner_on_cpu_ranks(tmp_path):
    """The rows that validate reads, of a tiny model on two Gloo ranks."""
    assets = "examples/assets/tiny-"
    sizes = ["--batch", "1", "2", "--context", "12", "--prompts", "16", "--rounds", "1", "--memory-batch", "3"]
    models = ["--models", f"{assets}target", "--offload-model", f"{assets}target", "--draft", f"{assets}draft"]
    script = [sys.executable, "benchmarks/bench_planner.py", "--device", "cpu", "--results", str(tmp_path)]
    done = subprocess.run([*script, *sizes, *models], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    groups = validate.steps(tmp_path / "planner.csv", CLUSTERS["2xh100"])
    counts = {name: len(rows) for name, rows in groups.items()}
    assert counts == {
        "memory (torch), ours": 6,
        "memory (device), ours": 6,
        "decode, ours": 6,
        "decode, nccl": 4,
        "prefill (host), ours": 3,
        "speculate, ours": 2,
        "offload, ours": 3,  # without the one that drafts: plans do so in CUDA graphs
    }
    for name, rows in groups.items():
        assert all(predicted > 0 for _, _, predicted in rows)
        assert name.startswith("memory") or all(took > 0 for _, took, _ in rows)


def test_a_prefill_takes_what_the_host_needs_to_queue_it():
    """Each layer's kernels are queued one by one, which bounds short prompts; stages queue theirs at once, so that a
    later one's are there when its input comes."""
    ours = CLUSTERS["2xh100"].of("ours")
    slow, free = (dataclasses.replace(ours, eager_layer_us=us) for us in (1e4, 0.0))

    def us(cluster, stages, chunks, tokens=512):
        return Search(M70, cluster, Workload(input=tokens, output=1)).prefill_us("bf16", 1, stages, 0, chunks)

    layers = M70.layers
    assert us(slow, [layers], 1)[:2] == (layers * 1e4, layers * 1e4)
    computed = us(free, [layers], 1)[0]
    assert us(dataclasses.replace(ours, eager_layer_us=computed / layers / 2), [layers], 1)[0] == computed
    # Two stages of which the first is bound by the host: the second only computes after it.
    half = [layers // 2, layers - layers // 2]
    first, both = us(slow, half, 1)[0], us(free, half, 1)
    assert layers // 2 * 1e4 < first < layers // 2 * 1e4 + both[1] + 1e3
    assert us(slow, half, 4)[1] == pytest.approx(4 * max(half) * 1e4)
    long = us(dataclasses.replace(ours, eager_layer_us=None), [layers], 1, 8192)
    assert long == us(free, [layers], 1, 8192)  # of a long one the host is far ahead


def test_a_cache_in_fp8_is_half_and_does_not_run(tmp_path):
    plans = {kv: plan("llama-3-70b", "2xh200", Workload(batch=64, input=8192, kv_dtype=kv)) for kv in ("bf16", "fp8")}
    half, whole = (plans[kv].best.memory_gb["kv"] for kv in ("fp8", "bf16"))
    assert half == pytest.approx(whole / 2)
    assert plans["fp8"].best.tpot_ms < plans["bf16"].best.tpot_ms
    with pytest.raises(ValueError, match="kv_dtype must be one of bf16, fp8, got 'int3'"):
        Workload(kv_dtype="int3")
    config = load_config("llama-3-70b")[0]
    with pytest.raises(ValueError, match=r"other shapes: kv_dtype bf16 \(plan: fp8\)"):
        Planned(plans["fp8"], None).model_options(config)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_beyond_the_kernels_rows(kind):
    """Of few rows this library's kernel reads a quantised weight; of more, another makes a bf16 one of it every time:
    it reads values and scales, and writes 2 bytes a weight, which are the peak."""
    n, k = 256, 1024
    values, scales = quantize(torch.randn(n, k), kind, torch.bfloat16)
    out = dequantize(values, scales, k)
    assert sum(t.nbytes for t in (values, scales, out)) / (n * k) == pytest.approx(DEQUANTIZED_BYTES[kind], rel=0.05)
    assert out.nbytes / (n * k) == DEQUANTIZED_PEAK[kind]
    ours = CLUSTERS["2xh100"].of("ours")
    few, many, bf16 = (
        stage_cost(M70, ours, Step(b, 1, 64, 1), tp=2, layers=1, dtype=d, head=False).us
        for b, d in ((16, kind), (17, kind), (17, "bf16"))
    )
    assert few < bf16 < many
    assert MOST_ROWS == QUANTIZED_ROWS
    fit = Search(M70, ours, Workload(dtypes=(kind,)))
    more = fit.memory(kind, 2, [80], 1, 0)[0].activations - fit.memory("bf16", 2, [80], 1, 0)[0].activations
    assert more * 1e9 == pytest.approx(8192 * 28672 * DEQUANTIZED_PEAK[kind])


@pytest.mark.parametrize(
    "name,known",
    [
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
    ],
)
def test_the_gpu_of_a_profile(name, known):
    """By whole words: an L40 is no L4, which has a third of its memory's rate."""
    profile = json.loads((RESULTS / "probe_h100.json").read_text())
    profile["gpus"][0]["matmul"] = []
    for gpu in profile["topology"]["gpus"]:
        gpu["name"] = name
    if known is None:
        with pytest.raises(ValueError, match=f"GPU '{name}' is unknown"):
            from_profile(profile, "this")
    else:
        assert from_profile(profile, "this").gpu.hbm_gb_s == GPUS[known].hbm_gb_s
