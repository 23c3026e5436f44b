"""fp.nn.PipelineStage and the links between stages: hidden states whole, sliced and in pieces, tokens on their way
back."""

import itertools
import os
import pickle
import random
import signal
import time
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch
from torch import nn

import fused_parallel as fp
from fused_parallel.comm.launch import RankPool
from fused_parallel.pipeline import split_layers
from fused_parallel.pipeline.stage_links import StageLinks
from fused_parallel.testing.spawn import run_ranks


def stages(mesh, shape, dtype, calls):
    """Each stage adds its number times its rank's input; the first returns what comes back from the last."""
    rank = mesh.get_local_rank("pp")
    module = Affine(rank, added=rank == mesh["pp"].size() - 1)
    stage = fp.nn.PipelineStage(module, group=mesh["pp"], tp_group=mesh["tp"])
    assert not stage.capturable  # over Gloo
    results = []
    for call in range(calls):
        x = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) + call
        out = stage(x if stage.is_first else None, shape, dtype, scale=2)
        assert (out is None) == (not stage.is_last)
        back = torch.full((5,), -1) if out is None else out.flatten()[:5].long()
        results.append(stage.share(back))
    return results


class Affine(nn.Module):
    """`added`: forms the sum itself, instead of leaving it to the send."""

    def __init__(self, number, added=True):
        super().__init__()
        self.number, self.added = number, added

    def forward(self, x, scale):
        parts = x * scale, torch.full_like(x, self.number)
        return parts[0] + parts[1] if self.added else parts


@pytest.mark.parametrize("pp", [2, 3])
def test_stages_in_order_and_tokens_back(pp):
    for results in run_ranks(stages, pp, (3, 5), torch.float32, 6, pp=pp):
        for call, back in enumerate(results):
            x = torch.arange(5) + call
            for number in range(pp):
                x = 2 * x + number
            assert torch.equal(back, x)


def summands(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def passed(mesh, shape, slot_bytes, slice_bytes, seed):
    """What the last stage receives, and the payload of each message that this rank sent."""
    links = StageLinks(mesh.get_group("pp"), mesh.get_group("tp"), slots=2, slot_bytes=slot_bytes)
    links.slice_bytes = dict.fromkeys(links.slice_bytes, slice_bytes)
    sizes = []
    for channel in links.channels.values():
        send = channel._transport.send
        channel._transport.send = lambda slot, layout, x, add, send=send: (
            sizes.append(layout.bytes),
            send(slot, layout, x, add),
        )[1]
    x, add = summands(shape, seed)
    if links.stage == 0:
        for _ in range(3):
            links.send(x.transpose(0, -1).contiguous().transpose(0, -1), add)  # not contiguous
        for channel in links.channels.values():
            channel.close()
        return None, sizes
    got = []
    for _ in range(3):
        received = links.receive(shape, x.dtype)
        got.append(received.tensor.clone())
        received.release()
    return got, sizes


@pytest.mark.parametrize(
    "shape, slot_bytes, slice_bytes, expected",
    [
        ((2, 3, 64), 1 << 16, 1 << 30, [1536]),  # small: whole from every rank
        ((2, 3, 64), 1 << 16, 0, [768]),  # large: half from each
        ((1, 3, 5), 1 << 16, 0, [60]),  # does not divide: whole
        ((7, 3, 64), 1 << 10, 1 << 30, [1024] * 5 + [256]),  # larger than a slot: in pieces
        ((7, 3, 64), 1 << 10, 0, [1024, 1024, 640]),
    ],
)
def test_slices_and_pieces(shape, slot_bytes, slice_bytes, expected, seed):
    results = run_ranks(passed, 4, shape, slot_bytes, slice_bytes, seed, tp=2, pp=2)
    x, add = summands(shape, seed)
    for got, sizes in results[:2]:
        assert got is None and sizes == expected * 3
    for got, _ in results[2:]:
        assert all(torch.equal(g, x + add) for g in got)


def sliced_logits(mesh, path, ids):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32)
    model.stage.links.slice_bytes = dict.fromkeys(model.stage.links.slice_bytes, 0)
    out = model(ids)
    model.stage.links.slice_bytes = dict.fromkeys(model.stage.links.slice_bytes, 1 << 30)
    whole = model(ids)
    return None if out is None else (out, whole)


def test_a_model_gives_the_same_logits_by_slices(tmp_path):
    ranks.save_random_model(tmp_path)
    ids = torch.randint(0, 263, (2, 40), generator=torch.Generator().manual_seed(5))
    for out, whole in run_ranks(sliced_logits, 4, tmp_path, ids, tp=2, pp=2)[2:]:
        assert torch.equal(out, whole)


def cuts(layers, stages, head, embedding):
    """Every cut of the layers, by (slowest, fullest) stage."""
    for bounds in itertools.combinations(range(1, len(layers)), stages - 1):
        bounds = (0, *bounds, len(layers))
        times = [sum(layers[a:b]) for a, b in itertools.pairwise(bounds)]
        times[-1] += head
        yield max(times), max(times[0] + embedding, *times), sum(t * t for t in times), bounds


def test_a_cut_is_the_best_there_is(seed):
    rng = random.Random(seed)
    for _ in range(200):
        layers = [rng.choice((1, 2, 5)) for _ in range(rng.randrange(1, 10))]
        stages = rng.randrange(1, min(4, len(layers)) + 1)
        head, embedding = rng.randrange(6), rng.randrange(6)
        ranges = split_layers(layers, stages, head=head, embedding=embedding)
        assert [i for r in ranges for i in r] == list(range(len(layers))) and all(ranges)
        found = (0, *(r.stop for r in ranges))
        *best, _ = min(cuts(layers, stages, head, embedding))
        assert best == next(list(c[:3]) for c in cuts(layers, stages, head, embedding) if c[3] == found)


def test_cuts():
    def sizes(*args, **kwargs):
        return [len(r) for r in split_layers(*args, **kwargs)]

    assert sizes(80, 2) == [40, 40] and sizes(7, 3) == [3, 2, 2]
    # Llama-3-70B: 0.86 G parameters a layer, 1.05 in the head: the last stage has one layer fewer.
    assert sizes([0.856] * 80, 2, head=1.05, embedding=1.05) == [41, 39]
    assert sizes([1, 1, 1, 9], 2) == [3, 1]
    assert sizes(8, 3, split=(2, 5, 1)) == [2, 5, 1]
    for split in ((4, 4), (8, 0, 0), (3, 3, 3), (2.0, 5, 1)):
        with pytest.raises(ValueError, match="does not fit: it needs a number of layers"):
            split_layers(8, 3, split=split)
    with pytest.raises(ValueError, match="pp=4 does not fit a model of 3 layers"):
        split_layers(3, 4)


def split_logits(mesh, path, ids, split):
    from transformers import AutoModelForCausalLM

    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32, split=split)
    other = fp.parallelize(AutoModelForCausalLM.from_pretrained(path).eval(), mesh, split=split)
    with torch.no_grad():
        return model(ids), other(ids).logits, len(model.layer_range), len(other.model.layers)


def test_an_explicit_split(tmp_path):
    reference = ranks.save_random_model(tmp_path, num_hidden_layers=4)
    ids = torch.randint(0, 263, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = reference(ids).logits
    results = run_ranks(split_logits, 2, tmp_path, ids, (1, 3), pp=2)
    assert [r[2:] for r in results] == [(1, 1), (3, 3)]
    assert (results[1][0] - expected).abs().max() < 1e-4 and (results[0][1] - expected).abs().max() < 1e-4


def stage_that_dies(victim: int, path: str) -> None:
    """Three stages pass messages; `victim` ends in its fourth step. The others write what they were told, and when."""
    mesh = fp.init(pp=3, device="cpu", timeout=6.0)
    rank = mesh.get_local_rank("pp")
    stage = fp.nn.PipelineStage(Affine(rank), group=mesh["pp"])
    torch.distributed.barrier()
    begin, told = time.perf_counter(), "nothing"
    try:
        for step in range(20):
            if rank == victim and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            stage(torch.zeros(2, 3) if rank == 0 else None, (2, 3), torch.float32, scale=1)
            stage.share(torch.zeros(2))
    except fp.PeerTimeoutError as error:
        told = str(error)
    with open(f"{path}{rank}.partial", "w") as file:
        file.write(f"{time.perf_counter() - begin:.1f} {told}")
    os.replace(f"{path}{rank}.partial", f"{path}{rank}")
    time.sleep(30)  # alive, until the test has read it


@pytest.mark.parametrize("victim", [1, 2])
def test_a_stage_that_dies_is_named_by_its_neighbours(victim, tmp_path):
    pool, path = RankPool(3), str(tmp_path / "told")
    try:
        for calls in pool._calls:
            calls.put(pickle.dumps((stage_that_dies, (victim, path), {})))
        others = [rank for rank in range(3) if rank != victim]
        deadline = time.monotonic() + 60
        while not all(os.path.exists(f"{path}{rank}") for rank in others) and time.monotonic() < deadline:
            time.sleep(0.05)
        for rank in others:
            seconds, told = Path(f"{path}{rank}").read_text().split(" ", 1)
            assert f"rank {victim} said nothing since: dead, stopped" in told, told
            assert float(seconds) < 12
    finally:
        pool.kill()
