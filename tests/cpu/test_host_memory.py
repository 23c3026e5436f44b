"""Memory for offloaded weights: refusals that tell what is needed, pinning that leaves nothing behind, loading without
a second copy, layers that stay in files. CUDA's registration is a stand-in here; the real one is tested on GPUs."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fused_parallel as fp
from fused_parallel.models import llama
from fused_parallel.models.checkpoint import Checkpoint
from fused_parallel.nn.streamed_layers import _beyond
from fused_parallel.offload import host_memory
from fused_parallel.offload.disk_reader import DiskReader
from fused_parallel.offload.host_memory import HostBlocks, Room, check_room, room
from fused_parallel.testing.spawn import run_ranks

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


class Registrar:
    """Stands for the CUDA driver: what is pinned now, and a call that fails or does something else first."""

    def __init__(self, monkeypatch, at: int = -1, action=None):
        self.pinned: dict[int, int] = {}
        self.calls, self.most = 0, 0
        self.lock = threading.Lock()
        self.at, self.action = at, action
        monkeypatch.setattr(host_memory, "_register", self.register)
        monkeypatch.setattr(host_memory, "_unregister", lambda address, device: self.pinned.pop(address))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def register(self, address: int, size: int) -> str | None:
        with self.lock:
            number, self.calls = self.calls, self.calls + 1
        if self.at >= 0 and number > self.at:
            time.sleep(0.05)  # the main thread hears of what happens before the others are all done
        if number == self.at:
            reason = self.action()
            if reason is not None:
                return reason
        with self.lock:
            self.pinned[address] = size
            self.most = max(self.most, len(self.pinned))
        return None


def test_blocks_are_pinned_at_their_size(monkeypatch):
    registrar, told = Registrar(monkeypatch), []
    sizes = [3_000_000, 4096, 1_234_567, 1]  # no powers of two, no multiples of pages
    blocks = HostBlocks(sizes, GPU, "test", told.append)
    assert sorted(registrar.pinned.values()) == sorted(sizes) and sorted(told) == sorted(sizes)
    assert [t.numel() for t in blocks.tensors] == sizes
    assert {t.data_ptr() for t in blocks.tensors} == set(registrar.pinned)
    for value, t in enumerate(blocks.tensors):
        t.fill_(value)
    assert all(bool((t == value).all()) for value, t in enumerate(blocks.tensors))
    kept = blocks.tensors[0]
    del blocks, t
    gc.collect()
    assert list(registrar.pinned) == [kept.data_ptr()]  # a block lives as long as a tensor in it
    del kept
    gc.collect()
    assert not registrar.pinned


def test_a_failure_to_pin_leaves_nothing_pinned(monkeypatch):
    registrar = Registrar(monkeypatch, at=5, action=lambda: "out of memory")
    with pytest.raises(RuntimeError, match=r"mine: 0\.01 GB of host .* pinning them .*out of memory"):
        HostBlocks([1_000_000] * 12, GPU, "mine")
    assert registrar.most > 0 and not registrar.pinned


def test_an_interrupt_leaves_nothing_pinned(monkeypatch):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    # A worker of pytest-xdist ignores interrupts, which are its parent's to handle.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()  # Python swallows an interrupt that finds it deleting something, as other tests' blocks
    registrar = Registrar(monkeypatch, at=3, action=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            HostBlocks([1_000_000] * 40, GPU, "mine")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert registrar.most > 0 and not registrar.pinned and registrar.calls < 40


def test_interrupted_load_gives_memory_back(tmp_path, monkeypatch):
    ranks.save_random_model(tmp_path)
    released = []
    monkeypatch.setattr(fp.nn.StreamedLayers, "release", lambda self: released.append(self))

    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp.LlamaForCausalLM.from_pretrained(tmp_path, mesh=fp.init(device="cpu"), offload=fp.Offload())
    assert len(released) == 1


def test_release_gives_pages_back():
    size = 64 << 20
    blocks = HostBlocks([size], torch.device("cpu"), "test")
    blocks.tensors[0].fill_(7)

    def resident() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) << 10

    before = resident()
    blocks.release()
    assert before - resident() > size * 0.9 and int(blocks.tensors[0].sum()) == 0


def test_room_of_this_machine():
    bounds = room()
    assert bounds and all(b.available > 0 and b.where for b in bounds)
    assert any("meminfo" in b.where for b in bounds)
    with pytest.raises(RuntimeError, match=r"x: 1000000\.00 GB .* are needed, .* available \(.*\); leave"):
        check_room(10**15, "x")


def test_room_of_a_container(tmp_path, monkeypatch):
    """Limits of both versions of control groups, the tightest of the path counts; page cache counts as free."""
    two = tmp_path / "sys/fs/cgroup/a/b"
    two.mkdir(parents=True)
    (two / "memory.max").write_text("max\n")
    (two.parent / "memory.max").write_text("1000\n")
    (two.parent / "memory.current").write_text("700\n")
    (two.parent / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    one = tmp_path / "sys/fs/cgroup/memory"
    one.mkdir()
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "100"), ("stat", "total_inactive_file 50\n")):
        (one / f"memory.{name}").write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n3:cpu:/\n4:memory:/elsewhere/on/the/host\n")
    monkeypatch.setattr(host_memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert {(b.available, b.total) for b in host_memory._control_groups()} == {(450, 1000), (850, 900)}


def test_ranks_of_a_host_need_room_together(monkeypatch):
    monkeypatch.setattr(host_memory, "room", lambda: [Room(100, 120, "here")])
    check_room(60, "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_room(60, "x")
    with pytest.raises(RuntimeError, match="are needed by each of 2 ranks"):
        check_room(61, "x")


def test_model_larger_than_host_memory_is_refused(tmp_path, monkeypatch):
    ranks.save_random_model(tmp_path)
    monkeypatch.setattr(host_memory, "room", lambda: [Room(1000, 2000, "a small machine")])
    with pytest.raises(RuntimeError, match=r"3 of 3 layers in host memory: .*are needed.*\(a small machine\)"):
        fp.LlamaForCausalLM.from_pretrained(tmp_path, mesh=fp.init(device="cpu"), offload=fp.Offload())


PEAK = """
import json, sys, torch
import fused_parallel as fp

def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return int(lines["VmHWM"].split()[0]) << 10

mesh = fp.init(device="cpu")
before = peak()
model = fp.LlamaForCausalLM.from_pretrained(sys.argv[1], mesh=mesh, offload=eval(sys.argv[2]))
streamed = model.model.layers.host_bytes, model.model.layers.disk_bytes
print(json.dumps([peak() - before, sum(p.nbytes for p in model.parameters()), *streamed]))
fp.finalize()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random checkpoint of 400 MB, bf16, in four files."""
    path = tmp_path_factory.mktemp("large")
    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16)
    shape |= dict(num_key_value_heads=8, vocab_size=512, model_type="llama", torch_dtype="bfloat16")
    (path / "config.json").write_text(json.dumps(shape))
    with torch.device("meta"):
        model = fp.LlamaForCausalLM(fp.LlamaConfig.from_dict(shape), mesh=fp.init(device="cpu"), device="meta")
    tensors = {}
    for name, parameter in model.named_parameters():
        names, rows = [name], [parameter.shape[0]]
        if "qkv_proj" in name:
            names, rows = [name.replace("qkv_proj", x) for x in ("q_proj", "k_proj", "v_proj")], [1024, 512, 512]
        elif "gate_up_proj" in name:
            names, rows = [name.replace("gate_up_proj", x) for x in ("gate_proj", "up_proj")], [4096, 4096]
        for key, count in zip(names, rows, strict=True):
            tensors[key] = torch.randn(count, *parameter.shape[1:], dtype=torch.bfloat16)
    names = list(tensors)
    for i in range(4):
        save_file({n: tensors[n] for n in names[i::4]}, path / f"{i}.safetensors")
    weight_map = {n: f"{i % 4}.safetensors" for i, n in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def peak_of(path, offload: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), offload], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_needs_no_second_copy(large):
    taken, weights, host, disk = peak_of(large, "fp.Offload()")
    assert weights > 350_000_000 and host > 0.95 * weights and disk == 0
    # Weights, two slots of a layer (33 MB each), what threads read at the moment (8 MB each), allocator and libraries.
    print(f"{taken} bytes at the peak for {weights} of weights")
    assert weights < taken < 1.4 * weights, f"{taken / 1e6:.0f} MB for {weights / 1e6:.0f} MB"


def test_layers_in_files_need_no_memory(large):
    taken, weights, host, disk = peak_of(large, "fp.Offload(host_bytes=100_000_000)")
    assert host <= 100_000_000 - 2 * disk // 12 and host + disk > 300_000_000
    # Nothing is loaded but one layer's worth, the two blocks and the slots are not touched before a pass.
    print(f"{taken} bytes at the peak for {weights} of weights, {host} of them in host memory")
    assert taken < 0.5 * weights, f"{taken / 1e6:.0f} MB for {weights / 1e6:.0f} MB"


def test_layers_in_a_cache_file_need_no_memory(large, tmp_path):
    taken, weights, host, disk = peak_of(large, f"fp.Offload(host_bytes=0, cache_dir={str(tmp_path)!r})")
    assert host == 0 and disk > 300_000_000
    # What the threads write at the moment, two matrices of 17 MB, and read.
    print(f"{taken} bytes at the peak for {weights} of weights")
    assert taken < 0.5 * weights, f"{taken / 1e6:.0f} MB for {weights / 1e6:.0f} MB"


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
def test_same_tokens_from_files(tmp_path, tp, pp):
    path = tmp_path / "model"
    path.mkdir()
    ranks.save_random_model(path, scale=6.0, num_hidden_layers=8)
    expected = run_ranks(ranks.offloaded, tp * pp, path, None, None, tp=tp, pp=pp)[0][0]
    layer = 4 * (96 * (128 + 2 * 64) + 96 * 128 + 3 * 96 * 250) // tp
    for offload in (
        fp.Offload(host_bytes=0),
        fp.Offload(host_bytes=0, slots=1),
        fp.Offload(host_bytes=7 * layer // 2, slots=3),
        fp.Offload(host_bytes=5 * layer // 2, resident_bytes=layer + 4096),
    ):
        for tokens, stats, host, _ in run_ranks(ranks.offloaded, tp * pp, path, None, offload, tp=tp, pp=pp):
            assert tokens == expected
            assert stats["streamed_bytes"] > (stats["rounds"] + 1) * host  # more than what host memory holds


def test_passes_broken_off_and_files_changed_places():
    """A reader that is asked for another layer than it read ahead; a read that fails tells, and the next works."""
    read: list[int] = []
    fail = {3}

    def fill(layer: int, block: torch.Tensor) -> None:
        read.append(layer)
        if layer in fail:
            fail.remove(layer)
            raise OSError("the disk is gone")
        block.fill_(layer)

    reader = DiskReader([1, 3, 5], fill, [torch.empty(4), torch.empty(4)])
    block = reader.take(1)
    assert (block == 1).all()
    reader.give_back(block, None)
    with pytest.raises(OSError, match="the disk is gone"):
        reader.take(3)
    for layer in (1, 3, 5, 1, 5, 5, 3):
        block = reader.take(layer)
        assert (block == layer).all()
        reader.give_back(block, None)
    reader.close()


def test_layers_in_files_say_what_they_cannot():
    layers = {str(i): nn.Linear(64, 64) for i in range(4)}
    with pytest.raises(ValueError, match="host_bytes is for layers on the meta device"):
        fp.nn.StreamedLayers(layers, device="cpu", host_bytes=1000)
    with torch.device("meta"):
        layers = {str(i): nn.Linear(64, 64) for i in range(4)}
    streamed = fp.nn.StreamedLayers(layers, device="cpu", host_bytes=1000)
    with pytest.raises(RuntimeError, match=r"layer '0' stays in files and is not loaded"):
        next(iter(streamed))
    with pytest.raises(RuntimeError, match="have no state dict"):
        streamed.state_dict()
    assert _beyond([10] * 6, None) == _beyond([10] * 6, 60) == set()
    assert _beyond([10] * 6, 59) == set(range(6)) - {1, 3, 5} and _beyond([10] * 6, 0) == set(range(6))
    for value in (-1, 1.5):
        with pytest.raises(ValueError, match="host_bytes must be an integer of at least 0 or None"):
            fp.Offload(host_bytes=value)


def test_reads_are_views_of_the_file(tmp_path):
    ranks.save_random_model(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    key, shape = "model.layers.0.mlp.up_proj.weight", [250, 96]
    whole = checkpoint.tensor(key, shape)
    part = checkpoint.read(key, shape, 1, 10, 20)
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    kept = part.clone()
    with ThreadPoolExecutor(4) as threads:  # pages that are forgotten come back when read again
        list(threads.map(lambda _: checkpoint.forget(key), range(20)))
    assert torch.equal(part, kept)
    index = {"weight_map": {key: "model.safetensors", "missing": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no tensor 'missing', which the index places there"):
        Checkpoint(tmp_path).tensor("missing", [1])
    save_file({"ints": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"tensor 'ints' has dtype I32; supported are"):
        Checkpoint(tmp_path).tensor("ints", [2])


@pytest.mark.parametrize("in_files", [False, True])
def test_memory_goes_with_the_model(tmp_path, in_files):
    """Not only once cycles are collected: the next model may need what this one had pinned."""
    ranks.save_random_model(tmp_path)
    gc.collect()
    gc.disable()
    try:
        offload = fp.Offload(host_bytes=0 if in_files else None)
        model = fp.LlamaForCausalLM.from_pretrained(tmp_path, mesh=fp.init(device="cpu"), offload=offload)
        fp.generate(model, [[1, 2, 3]], 3)
        layers = weakref.ref(model.model.layers)
        assert layers()._host.tensors
        del model
        # A read ahead that runs holds them until it is over.
        deadline = time.monotonic() + 10
        while layers() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert layers() is None
    finally:
        gc.enable()


def test_a_failure_beside_the_layers_gives_memory_back(tmp_path, monkeypatch):
    ranks.save_random_model(tmp_path)
    released, release = [], fp.nn.StreamedLayers.release
    monkeypatch.setattr(fp.nn.StreamedLayers, "release", lambda self: (released.append(self), release(self)))

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(llama, "ParallelLMHead", fails)
    with pytest.raises(torch.OutOfMemoryError):
        fp.LlamaForCausalLM.from_pretrained(tmp_path, mesh=fp.init(device="cpu"), offload=fp.Offload())
    assert len(released) == 1


def test_a_layer_under_two_names_is_refused():
    layer = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="stands under two of the names first, second"):
        fp.nn.StreamedLayers({"first": layer, "second": layer}, device="cpu")
