"""`fused-parallel wall`: a layer's compute and communication measured on Gloo ranks, predicted by the cost model, and
drawn."""

import dataclasses
import itertools

import pytest
import torch
from test_cli import TARGET

import fused_parallel as fp
from fused_parallel.cli import main
from fused_parallel.models.config import LlamaConfig
from fused_parallel.planner import CLUSTERS, load_model
from fused_parallel.planner.cost import Step, all_reduce_us, layer_us, stage_cost
from fused_parallel.planner.layer_wall import GLOO, NCCL, OURS, LayerTime, LayerWall, _Stack, predict_wall, rank_config
from fused_parallel.planner.layer_wall import measure_wall as measure
from fused_parallel.testing.spawn import run_ranks

M70 = load_model("llama-3-70b")


def test_measured_on_gloo_ranks():
    config = LlamaConfig.from_pretrained(TARGET)
    told = []
    wall = measure(config, "tiny", (1, 32), 16, device="cpu", rounds=5, progress=told.append)
    assert told == ["TP1", "TP2"]
    assert [(r.backend, r.batch, r.tp) for r in wall.rows] == [
        (backend, batch, tp) for tp in (1, 2) for batch in (1, 32) for backend in (GLOO, OURS)
    ]
    for r in wall.rows:
        assert r.compute_us > 5  # a layer of a dozen operations
        # Two all-reduces over sockets and processes take longer than their noise; without peers there are none.
        assert r.communication_us > 20 if r.tp == 2 else r.communication_us == 0
    alone = {r.batch: r.compute_us for r in wall.of(OURS, 1) + wall.of(OURS, 32) if r.tp == 1}
    assert alone[32] > alone[1]
    assert "Batch 1: Gloo: fastest at TP" in wall.sentences()[0] and "noise" in wall.sentences()[-1]


def rank_computes(mesh, config, tp):
    """(the sharded layer's shapes on this rank, those of a layer with a rank's sizes and no peers, both outputs)."""
    from fused_parallel.comm.groups import local_group

    pg = mesh["tp"].get_group()
    whole, own = _Stack(config, pg, "cpu", 3, 5), _Stack(rank_config(config, tp), local_group(), "cpu", 3, 5)
    outputs = [stack(*stack.inputs(0)) for stack in (whole, own)]
    by_torch = _Stack(config, pg, "cpu", 3, 5, by_torch=True)
    torch.testing.assert_close(by_torch(*by_torch.inputs(0)), outputs[0])  # the same layer, added up by others
    shapes = [{name: tuple(p.shape) for name, p in stack.layers[0].named_parameters()} for stack in (whole, own)]
    return shapes, [out.isfinite().all().item() and out.std().item() for out in outputs], outputs[0]


def test_compute_alone_has_a_ranks_sizes():
    config = LlamaConfig.from_pretrained(TARGET)
    ranks = run_ranks(rank_computes, 2, config, 2)
    for (whole, own), spreads, _ in ranks:
        assert whole == own  # the same matmuls and cache, so that the difference is communication
        assert all(0.1 < s < 10 for s in spreads)  # neither zeros, on which time is not to be measured, nor infinities
    assert torch.equal(ranks[0][2], ranks[1][2])  # all ranks had the same input and summed


def test_more_ranks_than_kv_heads():
    config = LlamaConfig.from_pretrained(TARGET)  # 8 heads, 4 of keys and values
    assert rank_config(config, 8).num_key_value_heads == 1
    for (whole, own), *_ in run_ranks(rank_computes, 4, dataclasses.replace(config, num_key_value_heads=2), 4):
        assert whole == own


def test_predictions_are_the_cost_models():
    cluster = CLUSTERS["2x8xh100-eth100"]
    wall = predict_wall(M70, cluster, (1, 256), 1024)
    assert [r.tp for r in wall.of(NCCL, 1)] == [1, 2, 4, 8, 16] and not wall.measured
    ours = cluster.of("ours")
    for r in wall.rows:
        step, costs = Step(r.batch, 1, 1024, 1), ours if r.backend == OURS else cluster
        same = {"tp": r.tp, "layers": 1, "dtype": "bf16", "head": False, "layer_constant": layer_us(ours)}
        assert r.us == pytest.approx(stage_cost(M70, costs, step, **same).busy)
        size = r.batch * 8192 * 2
        assert r.communication_us == pytest.approx(2 * all_reduce_us(costs, r.tp, size, True) if r.tp > 1 else 0)
    for batch, tp in itertools.product((1, 256), (2, 4, 8)):
        nccl, mine = (next(r for r in wall.of(b, batch) if r.tp == tp) for b in (NCCL, OURS))
        assert mine.compute_us == pytest.approx(nccl.compute_us) and mine.communication_us < nccl.communication_us
    across = [next(r for r in wall.of(b, 1) if r.tp == 16) for b in (NCCL, OURS)]
    assert across[0].us == across[1].us  # between hosts the library is NCCL's, too
    text = wall.sentences()
    assert "Batch 256: NCCL: fastest at TP8" in text[1]
    assert "TP16 takes" in text[1] and "from TP16 on it communicates longer than it computes" in text[1]
    assert [r.tp for r in predict_wall(M70, cluster, (1,), 1024, (8, 2)).of(NCCL, 1)] == [2, 8]


def test_degrees_that_are_not_there():
    with pytest.raises(ValueError, match=r"TP3 is not possible for llama-3-70b on 16 GPU\(s\); possible: 1, 2, 4, 8"):
        predict_wall(M70, CLUSTERS["2x8xh100-eth100"], (1,), 1024, (3,))
    config = LlamaConfig.from_pretrained(TARGET)
    with pytest.raises(ValueError, match=r"TP3 is not possible for tiny on this CPU"):
        measure(config, "tiny", (1,), 16, (1, 3), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="nothing to measure on no GPU; --cluster PRESET predicts"):
            measure(config, "tiny", (1,), 16, device="cuda")


def test_wall_of_two_backends():
    rows = tuple(
        LayerTime(backend, 1, tp, 100.0 / tp, 0.0 if tp == 1 else cost * tp)
        for backend, cost in ((NCCL, 12.0), (OURS, 3.0))
        for tp in (1, 2, 4, 8)
    )
    wall = LayerWall("m", "here", 64, True, rows)
    (text,) = wall.sentences()
    # 100, 50 + 24, 25 + 48, 12.5 + 96 against 100, 50 + 6, 25 + 12, 12.5 + 24
    assert "NCCL: fastest at TP4 (73.0 us a layer, 66% communication), TP8 takes 108.5" in text
    assert "from TP4 on it communicates longer" in text
    assert "fused_parallel: fastest at TP8 (36.5 us" in text and text.endswith(
        "from TP8 on it communicates longer than it computes."
    )


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "wall.png"
    options = ["--batch", "1,64,256,512,1024", "--plot", str(picture)]
    assert main(["wall", "--model", "llama-3-70b", "--cluster", "8xl40s", *options]) == 0
    out = capsys.readouterr().out
    assert "predicted for 8xl40s" in out and "Batch 1024" in out and picture.read_bytes().startswith(b"\x89PNG")
    measured = ["wall", "--model", str(TARGET), "--device", "cpu", "--tp", "1,2", "--batch", "2", "--context", "8"]
    picture.unlink()
    assert main([*measured, "--plot", str(picture)]) == 0
    told = capsys.readouterr()
    assert "measured on this CPU (Gloo, float32)" in told.out and "measuring TP2 ..." in told.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*measured, "--cluster", "8xl40s"]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert main(["wall", "--cluster", "8xl40s", "--context", "0"]) == 1
    assert "--context must be at least 1, got 0" in capsys.readouterr().err


def test_plot_without_matplotlib_is_told_before_measuring(monkeypatch, capsys):
    import sys

    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["wall", "--model", str(TARGET), "--device", "cpu", "--plot", "x.png"]) == 1
    told = capsys.readouterr()
    assert "fused-parallel[plot]" in told.err and "measuring" not in told.err
    with pytest.raises(ImportError, match="matplotlib"):
        fp.plan("llama-3-8b", "1xh200").plot("x.png")


def test_bad_input_of_the_command(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for more, said in (
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--plot", str(tmp_path / "no" / "x.png")], f"there is no folder {tmp_path / 'no'}"),
    ):
        assert main(["wall", "--model", "llama-3-8b", "--cluster", "2xh200", *more]) == 1
        assert said in capsys.readouterr().err
