"""`fused-parallel probe --quick` where there is a GPU: everything it has is measured, and plausible."""

import json

import pytest
import torch

from fused_parallel.cli.probe import tables
from fused_parallel.comm.probe import probe
from fused_parallel.comm.topology import link_name, topology, why_no_nvml


@pytest.fixture(scope="module")
def profile():
    return probe(quick=True)


def test_nothing_fails(profile):
    expected = {"NVLink, PCIe and NUMA of the GPUs"} if why_no_nvml() else set()
    if torch.cuda.device_count() < 2:
        expected |= {"copies between GPUs", "NCCL all-reduce and send/recv"}
    assert {m["what"] for m in profile["not_measured"]} == expected, profile["not_measured"]


def test_memory_and_matmuls_are_plausible(profile):
    queueing = profile["host"]["eager_layer_us_of"]
    assert profile["host"]["eager_layer_us"] == queueing["first"]
    assert len(queueing) == (4 if torch.cuda.device_count() > 1 else 2)
    assert all(20 < us < 5000 for us in queueing.values()), queueing
    for gpu in profile["gpus"]:
        assert 0.1 < gpu["graph_kernel_us"] < 20
        assert 100 < gpu["memory"]["copy_gb_per_s"] < 12000
        assert 100 < gpu["memory"]["read_gb_per_s"] < 12000
        rates = [m["tflop_per_s"] for m in gpu["matmul"]]
        assert 10 < max(rates) < 5000
        skinny = next(m for m in gpu["matmul"] if m["m"] == 1)
        # Weights come from memory, not from the L2.
        assert skinny["weight_gb_per_s"] < 1.1 * max(gpu["memory"]["copy_gb_per_s"], gpu["memory"]["read_gb_per_s"])


def test_host_device_is_plausible(profile):
    first = profile["host_device"][0]
    assert first["gpus"] == [0]
    for key in ("to_device_gb_per_s_each", "from_device_gb_per_s_each", "both_ways_gb_per_s_each_way"):
        assert 0.5 < first[key] < 500


@pytest.mark.multigpu
def test_links(profile):
    directions = [p["direction"] for p in profile["peer_copies"] if p["dst"] in (0, 1) and p["src"] in (0, 1)]
    assert directions == ["one_way", "one_way", "both_ways"]
    assert all(1 < p["beta_gb_per_s"] < 2000 for p in profile["peer_copies"])
    nccl = {(c["op"], c["world_size"], c["mode"]) for c in profile["collectives"] if c["backend"] == "nccl"}
    assert nccl >= {(op, 2, mode) for op in ("all_reduce", "send_recv") for mode in ("graph", "eager")}
    assert all(0 < c["alpha_us"] < 10000 for c in profile["collectives"])


def test_topology_agrees_with_torch():
    here = topology()
    assert [g["name"] for g in here["gpus"]] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    if len(here["gpus"]) > 1 and why_no_nvml() is None:
        assert here["gpus"][0]["nvlinks"] is not None
        assert {p["link"] for p in here["pairs"]} >= {link_name()}
    assert link_name((0,)) == "none"


def test_the_profile_is_json_and_has_tables(profile):
    assert json.loads(json.dumps(profile, allow_nan=False)) == profile
    assert {title.split(":")[0].split(" (")[0] for title, _, _ in tables(profile)} >= {"memory", "matmul", "copies"}
