"""Layers on disk in a file of their own: the same tokens quantised or not, weights that change, space given back."""

import errno
import os
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch
from torch import nn

import fused_parallel as fp
from fused_parallel.offload.cache_file import CacheFile
from fused_parallel.reference.quantized_matmul import KINDS
from fused_parallel.testing.spawn import run_ranks


def held(directory) -> int:
    """How often this process has a file of `directory` open or mapped."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if os.path.islink(entry)]
    return sum(str(directory) in line for line in [*links, *Path("/proc/self/maps").read_text().splitlines()])


def generated(mesh, path, kind, offload):
    """(tokens, bytes in host memory, on disk, in a layer; whether the cache was there, and is gone)."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32, quantize=kind, offload=offload)
    layers, directory = model.model.layers, offload.cache_dir
    tokens = fp.generate(model, ranks.OFFLOAD_PROMPTS, ranks.OFFLOAD_NEW, draft="ngram", num_draft_tokens=3).tokens
    sizes = layers.host_bytes, layers.disk_bytes, (layers.host_bytes + layers.disk_bytes) // len(layers)
    there = directory is not None and held(directory) > 0 and not any(Path(directory).iterdir())
    state = {name: p.clone() for name, p in model.state_dict().items()} if directory is not None else {}
    if state:  # what is on disk can be read and loaded like all else
        model.load_state_dict(state)
        assert fp.generate(model, ranks.OFFLOAD_PROMPTS, 4).tokens == [t[:4] for t in tokens]
    layers.release()
    return tokens, *sizes, there, directory is not None and held(directory) == 0


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    ranks.save_random_model(path, scale=6.0, num_hidden_layers=8)
    return path


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_same_tokens(target, tmp_path, kind, tp, pp):
    arrangement = {"tp": tp, "pp": pp}
    expected = run_ranks(generated, tp * pp, target, kind, fp.Offload(), **arrangement)
    layer = expected[0][3]
    for share in (0, 7 * layer // 2):  # nothing in host memory but the two blocks that are read into, and one or two
        offload = fp.Offload(host_bytes=share, cache_dir=tmp_path)
        found = run_ranks(generated, tp * pp, target, kind, offload, **arrangement)
        for (tokens, host, disk, _, there, gone), (same, whole, *_) in zip(found, expected, strict=True):
            assert tokens == same and there and gone
            assert host + disk == whole and disk > 0 and (host > 0) == (share > 0)


@pytest.mark.parametrize("slots", [2, 5])  # with a slot for each layer, the first of the next pass is read ahead
def test_layers_that_have_values(tmp_path, slots):
    """From memory to the file; broken off and loaded anew between passes, what was read ahead is not used."""
    torch.manual_seed(1)
    layers = {str(i): nn.Linear(64, 64) for i in range(5)}
    state = {f"{name}.{key}": p.clone() for name, layer in layers.items() for key, p in layer.state_dict().items()}
    streamed = fp.nn.StreamedLayers(layers, device="cpu", slots=slots, host_bytes=0, cache_dir=tmp_path)
    x = torch.randn(3, 64)

    def expected(state):
        y = x
        for i in range(5):
            y = torch.nn.functional.linear(y, state[f"{i}.weight"], state[f"{i}.bias"])
        return y

    def run():
        y = x
        for _, layer in streamed:
            y = layer(y)
        return y

    with torch.no_grad():
        assert torch.equal(run(), expected(state)) and streamed.disk_bytes == 5 * 4 * 64 * 64
        for factor in (2.0, 0.5, 3.0):
            changed = {name: factor * p for name, p in state.items()}
            streamed.load_state_dict(changed)
            assert torch.equal(run(), expected(changed))
            assert all(torch.equal(p, changed[name]) for name, p in streamed.state_dict().items())
            broken_off = iter(streamed)
            next(broken_off), next(broken_off)
            broken_off.close()
    streamed.release()
    assert held(tmp_path) == 0


def test_blocks_come_back(tmp_path):
    sizes = {3: 5000, 0: 17, 8: 4096}
    cache = CacheFile(sizes, tmp_path, "test")
    values = {n: torch.randint(256, (size,), dtype=torch.uint8) for n, size in sizes.items()}
    for number, tensor in cache.tensors.items():
        tensor.copy_(values[number])
        cache.written(tensor)
    cache.written(torch.zeros(5))  # lies elsewhere
    block = torch.full((6000,), 7, dtype=torch.uint8)
    for number in (8, 3, 0, 3):
        block.fill_(7)
        cache.read(number, block)
        assert torch.equal(block[: sizes[number]], values[number]) and (block[sizes[number] :] == 7).all()
    del tensor
    cache.close()
    assert held(tmp_path) == 0


def test_errors(target, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cache_dir='/x' is for layers beyond host_bytes: give that, too"):
        fp.Offload(cache_dir="/x")
    mesh = fp.init(device="cpu")
    load = {"mesh": mesh, "quantize": "int4"}
    with pytest.raises(ValueError, match=r"hold no quantised weights; name a directory .* \(cache_dir\)"):
        fp.LlamaForCausalLM.from_pretrained(target, **load, offload=fp.Offload(host_bytes=0))
    nowhere = fp.Offload(host_bytes=0, cache_dir=tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match=r"8 of 8 layers on disk: a file of 0\.00 GB cannot be made in .*/nowhere"):
        fp.LlamaForCausalLM.from_pretrained(target, **load, offload=nowhere)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"cannot be made in .* \(No space left on device\); give another cache_dir"):
        fp.LlamaForCausalLM.from_pretrained(target, **load, offload=fp.Offload(host_bytes=0, cache_dir=tmp_path))
    assert held(tmp_path) == 0
