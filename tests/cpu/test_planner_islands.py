"""The planner on hosts whose GPUs are joined in islands: from profiles, from YAML, and what it does with them."""

import dataclasses
import json
from pathlib import Path

import pytest

from fused_parallel.planner import CLUSTERS, Cluster, Workload, load_cluster, load_model, plan
from fused_parallel.planner.cost import all_reduce_us, link_all_reduce_us
from fused_parallel.planner.hardware import GPUS, LINKS
from fused_parallel.planner.search import Search

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
M70 = load_model("llama-3-70b")
MB = 1024 * 1024
FOUR = """\
gpus_per_host: 4
gpu: rtx3090
intra: nvlink-bridge
islands: [[0, 1], [2, 3]]
between: pcie4-no-peer
"""


def test_islands_of_a_profile(tmp_path):
    """Four GPUs in two NVLink pairs: what was measured on two ranks is the pair's, on four what joins the pairs."""
    profile = json.loads((RESULTS / "probe_h100.json").read_text())
    gpu = {**profile["topology"]["gpus"][0], "name": "NVIDIA GeForce RTX 3090", "compute_capability": [8, 6]}
    profile["topology"]["gpus"] = [{**gpu, "index": i} for i in range(4)]
    profile["topology"]["pairs"] = [
        {"a": a, "b": b, "link": "NV4" if (a, b) in ((0, 2), (1, 3)) else "PHB", "peer_access": (a, b) != (0, 1)}
        for a in range(4)
        for b in range(a + 1, 4)
    ]
    four = next(c for c in profile["collectives"] if c["backend"] == "nccl" and c["mode"] == "graph")
    profile["collectives"].append({**four, "world_size": 4})
    file = tmp_path / "four.json"
    file.write_text(json.dumps(profile))
    cluster = load_cluster(file)
    assert cluster.islands == ((0, 2), (1, 3)) and cluster.island == 2
    assert cluster.between.name == "pcie5-no-peer" and list(cluster.between.table) == [4]
    # NCCL's two ranks were GPUs 0 and 1, which lie in different pairs here: no figure of the bridge.
    assert cluster.intra.table == {} and cluster.intra.p2p_us == LINKS["nvlink3"].p2p_us
    assert cluster.between.p2p_us == pytest.approx(10.17, abs=0.01)
    assert any("order 0,2,1,3" in text for text in plan("llama-3-8b", cluster).best.explanation)
    profile["topology"]["pairs"][5]["link"] = "NV4"  # 2 and 3 as well: all four hang together
    file.write_text(json.dumps(profile))
    assert load_cluster(file).islands == ()


def test_islands_from_yaml(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "four.yaml"
    file.write_text(FOUR)
    cluster = load_cluster(file)
    assert cluster.islands == ((0, 1), (2, 3)) and cluster.between == LINKS["pcie4-no-peer"]
    file.write_text(FOUR.replace("between: pcie4-no-peer", "between: {preset: pcie4, hop_us: 9}"))
    assert load_cluster(file).between.hop_us == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[2, 3]]", "[2]]"), r"four\.yaml:4: islands must be lists of equally many"),
        (("[2, 3]]", "[2, 2]]"), r"four\.yaml:4: islands must hold each GPU of a host, 0 to 3, once"),
        (("[[0, 1], [2, 3]]", "2"), r"four\.yaml:4: islands must be lists of equally many .* got 2"),
        (("[[0, 1], [2, 3]]", "[[0, one], [2, 3]]"), r"four\.yaml:4: islands must hold each GPU"),
        (("islands: [[0, 1], [2, 3]]\n", ""), r"four\.yaml:4: between is given, .* but islands names no two"),
        (("between: pcie4-no-peer\n", ""), r"four\.yaml:4: the key between is missing"),
        (("between: pcie4-no-peer", "between: pcie9"), r"four\.yaml:5: between 'pcie9' is unknown"),
        (("gpus_per_host: 4", "gpus_per_host: many"), r"four\.yaml:1: gpus_per_host must be a positive integer"),
    ],
)
def test_contradictory_islands(tmp_path, change, message):
    pytest.importorskip("yaml")
    assert change[0] in FOUR
    (tmp_path / "four.yaml").write_text(FOUR.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_cluster(tmp_path / "four.yaml")


def test_groups_stay_in_islands():
    eight = Cluster(
        "eight", GPUS["a100"], 8, LINKS["nvlink3"], islands=((0, 1, 2, 3), (4, 5, 6, 7)), between=LINKS["pcie4"]
    )
    search = Search(M70, eight, Workload(batch=64))
    assert [search._groups(tp) for tp in (1, 2, 3, 4, 8)] == [(4, 8), (2, 4), (1, 2), (1, 2), (0, 1)]
    assert search._room(4, 2) == 1 and search._room(2, 2) == 2
    bridge, pcie = search._hops(2, [20] * 4, 64)[:2]  # stages 0 and 1 share an island, 2 is on the next
    assert bridge < pcie
    inside, across = (all_reduce_us(eight, tp, MB) for tp in (4, 8))
    assert across > 4 * inside
    # Two islands send as one GPU each: more of the link is left than where all eight have only that.
    assert across < link_all_reduce_us(LINKS["pcie4"], 8, MB)


def test_pairs_with_a_bridge_get_tp_inside_and_stages_or_replicas_between():
    four = CLUSTERS["4xrtx3090-nvlink"]
    loaded = {"batch": 16, "rank": "throughput", "input": 512}
    large = plan("llama-3-70b", four, {**loaded, "dtypes": ("int4",)}).best
    assert large.tp == 2 and large.pp * large.dp == 2
    assert any("stays in an island" in text for text in large.explanation)
    small = plan("llama-3-8b", four, {**loaded, "batch": 64}).best
    assert (small.tp, small.pp, small.dp) == (2, 1, 2)
    # No rule: it leaves the pair where that wins, alone at batch 1, and under load over a fast enough link.
    alone = plan("llama-3-70b", four, {"batch": 1, "dtypes": ("int4",)}).best
    assert alone.tp == 4 and any("spans islands over pcie4-no-peer" in text for text in alone.explanation)
    fast = dataclasses.replace(four, between=LINKS["nvlink3"])
    assert plan("llama-3-70b", fast, {**loaded, "dtypes": ("int4",)}).best.tp == 4
