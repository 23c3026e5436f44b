"""`fused-parallel probe` on a CPU machine, and the fit of its cost model."""

import dataclasses
import json
import random
import subprocess
import sys
import time

import pytest
import torch

from fused_parallel.cli.probe import tables
from fused_parallel.comm import topology
from fused_parallel.comm.alpha_beta import fit_alpha_beta
from fused_parallel.comm.probe import SCHEMA_VERSION, load_profile, write_profile
from fused_parallel.comm.probe_collectives import rank_environment, world_sizes
from fused_parallel.comm.probe_layer import eager_layer_us
from fused_parallel.planner import cost
from fused_parallel.planner.cluster import CLUSTERS, EagerLayer

SIZES = [4 << 10 << 2 * i for i in range(8)]


def test_fit_recovers_known_constants():
    fit = fit_alpha_beta(SIZES, [12.5 + size / 345e3 for size in SIZES])  # 345 GB/s = 345e3 bytes/us
    assert fit.alpha_us == pytest.approx(12.5, rel=1e-9)
    assert fit.beta_gb_per_s == pytest.approx(345, rel=1e-9)
    assert fit.relative_residual < 1e-9
    assert fit.us(345e3) == pytest.approx(13.5)


def test_fit_under_noise(seed):
    rng = random.Random(seed)
    times = [(5.0 + size / 50e3) * rng.uniform(0.97, 1.03) for size in SIZES]
    fit = fit_alpha_beta(SIZES, times)
    assert fit.alpha_us == pytest.approx(5, rel=0.05)
    assert fit.beta_gb_per_s == pytest.approx(50, rel=0.05)
    assert 0 < fit.relative_residual < 0.03


def test_fit_tells_when_the_model_does_not_hold():
    assert fit_alpha_beta([1, 10, 100], [1.0, 20.0, 1.0]).relative_residual > 0.3


def test_fit_has_no_negative_parameters():
    assert fit_alpha_beta([100, 1000], [5.0, 500.0]).alpha_us == 0  # the line's own would be -50
    falling = fit_alpha_beta([100, 1000, 10000], [5.0, 5.0, 4.0])
    assert falling.beta_gb_per_s is None
    assert 4 <= falling.alpha_us <= 5
    assert falling.us(10**9) == falling.alpha_us


@pytest.mark.parametrize(
    ("sizes", "times"), [([1], [1.0]), ([8, 8], [1.0, 2.0]), ([1, 2], [0.0, 1.0]), ([1, 2], [1.0])]
)
def test_fit_refuses_too_few_points(sizes, times):
    with pytest.raises(ValueError, match="fit_alpha_beta"):
        fit_alpha_beta(sizes, times)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """(profile written by the command, its standard output, seconds it took)."""
    path = tmp_path_factory.mktemp("probe") / "profile.json"
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fused_parallel", "probe", "--quick", "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return load_profile(path), done.stdout, time.perf_counter() - begin


def test_quick_probe_is_quick(profile):
    if torch.cuda.is_available():
        pytest.skip("the bound is for CPU machines")
    assert profile[2] < 30


def test_quick_probe_measures_the_cpu(profile):
    found = profile[0]
    assert found["schema_version"] == SCHEMA_VERSION and found["quick"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["host_memory"]["copy_gb_per_s"] > 0.1
    assert {m["dtype"] for m in found["cpu_matmul"]} == {"float32", "bfloat16"}
    for m in found["cpu_matmul"]:
        assert m["tflop_per_s"] == pytest.approx(2e-6 * m["m"] * m["k"] * m["n"] / m["us"])
    gloo = {c["op"]: c for c in found["collectives"] if c["backend"] == "gloo"}
    assert set(gloo) == {"all_reduce", "send_recv"}
    for c in gloo.values():
        assert c["alpha_us"] >= 0 and c["relative_residual"] >= 0
        assert len(c["points"]) == 3 and all(p["us"] > 1 for p in c["points"])


def test_quick_probe_says_what_it_left_out_and_prints_it(profile):
    found, out, _ = profile
    if not torch.cuda.is_available():
        left_out = {m["what"] for m in found["not_measured"]}
        assert {"GPU matmul", "copies between GPUs", "NCCL all-reduce and send/recv"} <= left_out
        assert "not measured" in out
    assert all(m["why"] for m in found["not_measured"])
    assert "all_reduce" in out and "host" in out and "profile written to" in out


def test_a_gpu_profile_is_tabled():
    """The tables of a machine this test does not run on, from a profile as docs/probe.md describes it."""
    points = [{"bytes": 4096, "us": 2.0}, {"bytes": 1 << 20, "us": 5.0}]
    fit = {"alpha_us": 2.0, "beta_gb_per_s": 350.0, "relative_residual": 0.01, "points": points}
    matmul = {"m": 1, "k": 8, "n": 8, "dtype": "bfloat16", "us": 1.0, "tflop_per_s": 0.5, "weight_gb_per_s": 3999.0}
    gpus = [{"index": i, "name": "GPU model", "memory_bytes": 1e11} for i in range(2)]
    rates = {"to_device_gb_per_s_each": 55.0, "from_device_gb_per_s_each": 54.0, "both_ways_gb_per_s_each_way": 50.0}
    found = {
        "host": {"cpu": "cpu", "cpus": 2, "memory_bytes": 1e9},
        "host_memory": None,
        "cpu_matmul": [],
        "topology": {"gpus": gpus, "pairs": [{"a": 0, "b": 1, "link": "NV18", "peer_access": True}]},
        "gpus": [{"name": "GPU model", "index": 0, "memory": None, "matmul": [matmul]}],
        "host_device": [{"gpus": [0, 1], **rates}],
        "peer_copies": [{"src": 0, "dst": 1, "direction": "both_ways", **fit}],
        "collectives": [{"op": "all_reduce", "backend": "nccl", "world_size": 2, "mode": "graph", **fit}],
        "not_measured": [{"what": "memory of GPU 0", "why": "OutOfMemoryError: full"}],
    }
    text = {title.split(":")[0].split(" (")[0]: rows for title, _, rows in tables(found)}
    assert [row[:3] for row in text["memory"]] == [["GPU 0", "GPU model", "NV18"], ["GPU 1", "GPU model", "NV18"]]
    assert text["matmul"][0][-1] == "3999.0"
    assert text["copies"][0] == ["host to GPU 0, 1", "", "55.0", ""]
    assert text["copies"][-1] == ["GPU 0 to GPU 1, both ways", "2.0", "350.0", "1.0"]
    assert text["collectives"][0][-1] == "1048576 B: 5.0"
    assert text["not measured"] == [["memory of GPU 0", "OutOfMemoryError: full"]]


def test_an_unwritable_file_is_told_before_measuring(tmp_path):
    path = tmp_path / "no" / "profile.json"
    done = subprocess.run(
        [sys.executable, "-m", "fused_parallel", "probe", "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert f"cannot write {path}" in done.stderr and "Traceback" not in done.stderr
    assert "measuring" not in done.stderr


def test_profiles_are_checked_when_read(tmp_path):
    path = tmp_path / "p.json"
    write_profile({"schema_version": SCHEMA_VERSION, "x": 1.5}, path)
    assert load_profile(path)["x"] == 1.5
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_profile(path)
    for other in ({"schema_version": 0}, {}, []):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="schema_version is"):
            load_profile(path)
    with pytest.raises(ValueError, match="Out of range float"):
        write_profile({"x": float("nan")}, path)


def test_nccl_ranks_use_no_multicast_unless_asked(monkeypatch):
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    assert rank_environment() == {"NCCL_NVLS_ENABLE": "0"}
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
    assert rank_environment() == {"NCCL_NVLS_ENABLE": "2"}


def test_world_sizes():
    assert world_sizes(1) == []
    assert world_sizes(2) == [2]
    assert world_sizes(6) == [2, 4, 6]
    assert world_sizes(8) == [2, 4, 8]


def test_the_slowest_link_names_the_machine(monkeypatch):
    links = {(0, 1): "NV18", (0, 2): "NV4", (1, 2): "PIX"}
    monkeypatch.setattr(topology, "pair_link", lambda a, b: links[a, b])
    assert topology.link_name.__wrapped__((0,)) == "none"
    assert topology.link_name.__wrapped__((0, 1)) == "NV18"
    links[1, 2] = "NV12"
    assert topology.link_name.__wrapped__((0, 1, 2)) == "NV4"
    links[0, 2] = "SYS"
    assert topology.link_name.__wrapped__((0, 1, 2)) == "SYS"


def test_layers_are_queued_in_a_process_for_each_gpu(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on a CPU they compute, and would keep each other waiting
    found = eager_layer_us(2, "cpu")
    assert set(found) == {"first", "later", "tp_first", "tp_later"} and all(us > 1 for us in found.values()), found
    # As a profile's they bound short prompts: in a tensor-parallel group by its own figures.
    ours = dataclasses.replace(CLUSTERS["2xh100"], eager_layer_us=EagerLayer(**found))
    for tp, of_tp in ((1, ""), (2, "tp_")):
        first, later = found[of_tp + "first"], found[of_tp + "later"]
        assert cost.eager_layer_us(ours, tp, True) == first
        assert cost.eager_layer_us(ours, tp, False) == later
    assert cost.eager_layer_us(dataclasses.replace(ours, eager_layer_us=EagerLayer(3.0, 5.0)), 2, False) == 5.0
