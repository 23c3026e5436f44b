"""fp.comm.P2PChannel over Gloo: bits, order, back-pressure, errors, and ends that die at every step."""

import pickle
import random
import time

import _p2p_cases as cases
import pytest
import torch

from fused_parallel.comm.launch import RankPool
from fused_parallel.comm.messages import ALIGNMENT, HEADER_BYTES, layout_of, layout_of_header, layout_of_spec
from fused_parallel.testing import messages
from fused_parallel.testing.spawn import run_ranks


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("run", range(2))
def test_random_schedules_on_two_channels(slots, run, seed):
    received = run_ranks(messages.schedule, 2, seed + run, 300, slots, pp=2)
    assert all(isinstance(count, int) for count in received), received
    assert min(received) > 20


def test_between_two_of_three(seed):
    received = run_ranks(ends_of_three, 3, seed, pp=3)
    assert min(received) > 10, received


def ends_of_three(mesh, seed):
    """Every pair of three ranks has a channel; the pairs are made in one order everywhere."""
    import fused_parallel as fp

    rank, rng, received = mesh.get_local_rank("pp"), random.Random(seed), 0
    channels = {
        pair: fp.comm.P2PChannel(mesh["pp"], sum(pair) - rank) for pair in ((0, 1), (0, 2), (1, 2)) if rank in pair
    }
    for _ in range(60):
        source, target = rng.sample(range(3), 2)
        message = messages.random_message(rng)
        pair = (min(source, target), max(source, target))
        if rank == source:
            channels[pair].send(message)
        elif rank == target:
            with channels[pair].recv() as got:
                assert messages.same(got, message)
                received += 1
    for channel in channels.values():
        channel.close()
    return received


@pytest.mark.parametrize("slots", [1, 3])
def test_no_slot_is_pressure_and_not_loss(slots):
    times, got = run_ranks(cases.back_pressure, 2, slots, pp=2)
    assert got == [[i] * 3 for i in range(2 * slots)]
    assert max(times[:slots]) < 0.5 < times[slots]  # the receiver came after a second


def test_refusals():
    first, second = run_ranks(cases.refusals, 2, pp=2)
    expected = [
        "ValueError: P2PChannel: peer must be another rank of the group of 2, got 0 on rank 0",
        "ValueError: P2PChannel: peer must be another rank of the group of 2, got 2 on rank 0",
        "ValueError: P2PChannel: slots must be an integer from 1 to 64, got 0",
        "ValueError: P2PChannel: transport must be one of auto, memory, distributed, got 'mpi'",
        "ValueError: P2PChannel: (slots, slot_bytes, transport, device) must be alike on both ends, got (3,",
        "RuntimeError: P2PChannel: transport='memory' is asked for, but one of the ranks has no CUDA kernels",
        "ValueError: P2PChannel: the message float32 [257] takes 1028 bytes, more than the channel's slot_bytes=1024",
        "TypeError: p2p: a message is a tensor, or a tuple, list or dict of tensors, got str",
        "TypeError: p2p: the keys of a message must be strings, got 1",
        "TypeError: p2p: a message is a tensor, or a tuple, list or dict of tensors; it holds NoneType",
        "ValueError: p2p: a message holds at most 32 tensors, got 33",
        "ValueError: p2p: the shapes and keys of a message take 2014 bytes",
        "ValueError: P2PChannel: a tensor is on meta, the channel on cpu",
        "ValueError: P2PChannel: inference only, a tensor requires grad",
        "TypeError: p2p: a spec is (shape, dtype)",
        "ValueError: p2p: a shape holds integers of at least 0, got (-1,)",
        "ValueError: P2PChannel: the message int64 [1000] takes 8000 bytes",
    ]
    for text, start in zip(first, expected, strict=True):
        assert text.startswith(start), text
    assert second[:6] != first[:6] and "on rank 1" in second[0]
    held, still, twice, third, fourth = second[6:]
    # Slot 0 is held; releasing slot 1 does not help, because the next message goes to slot 0.
    assert "the message before it in slot 0 of 2 has not been released" in held and held == still
    assert "this message has been released already" in twice
    assert (third, fourth) == ("tensor([2])", "tensor([3])")


@pytest.mark.parametrize(
    "sent, spec, text",
    [
        (torch.zeros(2, 3), ((3, 2), torch.float32), "expects float32 [3, 2], rank 0 sent float32 [2, 3]"),
        (torch.zeros(2), ((2,), torch.int32), "expects int32 [2], rank 0 sent float32 [2]"),
        (torch.zeros(2), (((2,), torch.float32),), "expects (float32 [2]), rank 0 sent float32 [2]"),
        ({"a": torch.zeros(2)}, {"b": ((2,), torch.float32)}, "expects {'b': float32 [2]}, rank 0 sent {'a': float32"),
    ],
)
def test_another_message_than_expected(sent, spec, text):
    _, (first, second) = run_ranks(cases.mismatch, 2, sent, spec, pp=2)
    assert first.startswith(f"MessageMismatchError: p2p: rank 1 {text}"), first
    assert "has failed before" in second


@pytest.mark.parametrize("step", cases.STEPS)
@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_an_end_that_dies_is_named(role, step, tmp_path):
    pool, path = RankPool(2), tmp_path / "told"
    for calls in pool._calls:
        calls.put(pickle.dumps((cases.dies_at, (role, step, str(path)), {})))
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pool.kill()
    seconds, done, told = path.read_text().split(" ", 2)
    victim = ("sender", "receiver").index(role)
    # Rank 0 also holds the store, where the living would say that they live.
    verdict = "it is dead or stopped, or" if victim == 0 else "rank 1 said nothing since: dead, stopped"
    assert f"got no answer from rank {victim}; {verdict}" in told, told
    # Over torch.distributed a message waits at its sender: what is on its way (two at most, the slots) dies with it.
    assert float(seconds) < 15 and 1 <= int(done) <= 6


def test_layouts(seed):
    """What is sent and what is expected have one header if and only if they are alike; a header gives the layout."""
    rng, seen = random.Random(seed), {}
    for _ in range(300):
        message = messages.random_message(rng)
        layout, tensors = layout_of(message)
        assert layout == layout_of_header(layout.header.ljust(HEADER_BYTES, b"\0"))
        for _ in range(3):
            spec = messages.spec_of(message, rng)
            assert spec is None or layout_of_spec(spec) == layout
        assert seen.setdefault(layout.hash, str(layout)) == str(layout)
        payload = torch.full((layout.bytes,), 255, dtype=torch.uint8)
        for x, view, offset in zip(tensors, layout.views(payload), layout.offsets, strict=True):
            assert offset % ALIGNMENT == 0
            view.copy_(x)
        assert messages.same(layout.packed(layout.views(payload)), message)
    damaged = bytearray(layout_of(torch.zeros(3))[0].header.ljust(HEADER_BYTES, b"\0"))
    damaged[28] ^= 1
    with pytest.raises(RuntimeError, match="damaged"):
        layout_of_header(bytes(damaged))
