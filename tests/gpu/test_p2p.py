"""The channel through memory, both ends on one GPU: bits, order, credits, graphs, failures."""

import random
import time

import pytest
import torch
from _virtual_channel import virtual_channel

import fused_parallel as fp
from fused_parallel.comm.messages import layout_of
from fused_parallel.testing import messages

PUSH, COPY = 1 << 30, -1  # largest pushed message: all, none


@pytest.mark.parametrize("push_bytes", [PUSH, COPY, 4096])
@pytest.mark.parametrize("slots", [1, 3])
def test_random_messages_both_ways(slots, push_bytes, seed):
    """Any kinds, dtypes, shapes and views; several under way; with a spec, without, and held for a while."""
    rng = random.Random(seed)
    with virtual_channel(slots=slots, slot_bytes=1 << 17, push_bytes=push_bytes) as channel:
        on_way = {0: [], 1: []}
        held = {0: [], 1: []}  # by sender
        count = 0

        def finish(sender):
            nonlocal count
            handle, message = held[sender].pop(0)
            with channel.on(1 - sender):
                with handle as got:
                    copy = messages.to(got, "cpu")
                count += 1
            assert messages.same(copy, message), f"sent {message}, got {copy}"

        for _ in range(250):
            sender, act = rng.randrange(2), rng.random()
            if act < 0.5 and len(on_way[sender]) + len(held[sender]) < slots:
                message = messages.random_message(rng)
                on_way[sender].append(message)
                with channel.on(sender) as end:
                    end.send(messages.to(message, "cuda"))
            elif act < 0.8 and on_way[sender]:
                message = on_way[sender].pop(0)
                spec = messages.spec_of(message, rng)
                with channel.on(1 - sender) as end:
                    held[sender].append((end.recv(spec), message))
            elif held[sender]:
                finish(sender)
        for sender in (0, 1):
            while held[sender]:
                finish(sender)
        torch.cuda.synchronize()
        fp.check()
        assert count > 50


def test_sizes_around_vectors_and_ctas(seed):
    """Tails of every length, one CTA to all of them, sources that are not aligned."""
    sizes = [*range(1, 34), 511, 512, 8191, 8192, 8193, 100_003, 262_144, 262_145, (1 << 20) - 1, 1 << 20]
    with virtual_channel(slots=2) as channel:
        for size in sizes:
            base = torch.randint(0, 256, (size + 3,), dtype=torch.uint8, device="cuda")
            sent = base[3:] if size % 2 else base[:size]
            if size % 3 == 0:
                sent = torch.stack((sent, base[:size]), 1)[:, 0]  # every second byte
            with channel.on(0) as end:
                end.send(sent)
            with channel.on(1) as end, end.recv(((size,), torch.uint8)) as got:
                same = torch.equal(got, sent)
            assert same, size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("push_bytes", [PUSH, COPY])
def test_sums_have_the_bits_of_torch(push_bytes, dtype, seed):
    """send(x, add) of all sizes, unaligned, subnormal, infinite; beside plain messages in the same slots, and in the
    same stream as what writes the summands: the kernel is launched before that has ended."""
    generator = torch.Generator("cuda").manual_seed(seed)
    with virtual_channel(slots=2, slot_bytes=(1 << 21) + 256, push_bytes=push_bytes) as channel:
        for size in (1, 7, 8, 9, 4095, 8192, 16_384, 131_072, 131_073, 262_144):
            for skip in (0, 1):
                exponents = torch.randint(-40, 14, (2, size + skip), device="cuda", generator=generator)
                drawn = torch.randn(2, size + skip, device="cuda", generator=generator) * exponents.exp2()
                drawn[0, -1] = float("inf")
                a, b = torch.full_like(drawn, float("nan"), dtype=dtype).unbind()
                a, b = a[skip:], b[skip:]
                with channel.on(0) as end:
                    torch.cuda._sleep(50_000)
                    a.copy_(drawn[0, skip:]), b.copy_(drawn[1, skip:])
                    end.send(a, b)
                    a.zero_(), b.zero_()  # the sender's again
                    end.send(drawn)
                expected = drawn[0, skip:].to(dtype) + drawn[1, skip:].to(dtype)
                with channel.on(1) as end:
                    with end.recv(expected) as got:
                        same = torch.equal(got, expected)
                    with end.recv(drawn) as got:
                        same &= torch.equal(got, drawn)
                assert same, (size, skip)
        torch.cuda.synchronize()
        fp.check()


def test_a_full_ring_waits_and_loses_nothing():
    with virtual_channel(slots=3) as channel:
        sent = [torch.randn(1000, device="cuda") for _ in range(8)]
        torch.cuda.synchronize()
        with channel.on(0) as end:
            for x in sent[:3]:
                end.send(x)
            free = torch.cuda.Event()
            free.record()
            for x in sent[3:]:
                end.send(x)
            full = torch.cuda.Event()
            full.record()
        free.synchronize()
        time.sleep(0.1)
        assert not full.query()  # the fourth message waits for a slot
        for x in sent:
            with channel.on(1) as end, end.recv(x) as got:
                assert torch.equal(got, x)
        full.synchronize()
        fp.check()


def test_received_tensors_are_the_slot_itself():
    """No staging: the same address in every round; other slots are untouched while a message is held."""
    with virtual_channel(slots=2) as channel:
        seen = []
        for i in range(6):
            with channel.on(0) as end:
                end.send(torch.full((4,), i, device="cuda"))
            with channel.on(1) as end, end.recv() as got:
                seen.append(got.data_ptr())
                assert got.tolist() == [i] * 4
        assert seen[0::2] == seen[:1] * 3 and seen[1::2] == seen[1:2] * 3 and seen[0] != seen[1]


@pytest.mark.parametrize("push_bytes", [PUSH, COPY])
def test_graphs_replay_with_skew(push_bytes, seed):
    """A step of each end, captured once: three messages there, one back, ring of two slots; the values change by what
    the graphs themselves compute, and either end may be late."""
    rng = random.Random(seed)
    with virtual_channel(slots=2, push_bytes=push_bytes) as channel:
        x = torch.zeros(3, 5000, device="cuda")
        answers = torch.zeros(4000, dtype=torch.int64, device="cuda")
        place = torch.zeros(1, dtype=torch.int64, device="cuda")
        state = torch.zeros(5000, device="cuda")

        def first(end):
            x.add_(torch.arange(3, device="cuda").unsqueeze(1) + 1)
            for row in x:
                end.send({"row": row, "twice": row[:17] * 2})
            with end.recv(((1,), torch.int64)) as answer:
                answers.scatter_(0, place, answer)
                place.add_(1)

        def second(end):
            for _ in range(3):
                with end.recv({"row": ((5000,), torch.float32), "twice": ((17,), torch.float32)}) as got:
                    state.add_(got["row"])
                    state[:17] += got["twice"]
            end.send(state.sum(dtype=torch.float64).round().long().reshape(1))

        graphs = []
        for rank, step in enumerate((first, second)):
            with channel.on(rank) as end:
                step(end)  # eager: the streams of both ends are at work together
        torch.cuda.synchronize()
        for rank, step in enumerate((first, second)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=channel.streams[rank]):
                step(channel.ends[rank])
            graphs.append(graph)
        replays = 300
        for _ in range(replays):
            for rank in rng.sample(range(2), 2):
                with torch.cuda.stream(channel.streams[rank]):
                    if rng.random() < 0.1:
                        torch.cuda._sleep(rng.randrange(1_000_000))
                    graphs[rank].replay()
        torch.cuda.synchronize()
        fp.check()
        rounds = replays + 1
        # After n rounds row r is n (r + 1): each round adds 6 n to every element, and 12 n more to the first 17.
        totals, expected = 0, []
        for n in range(1, rounds + 1):
            totals += 6 * n * 5000 + 12 * n * 17
            expected.append(totals)
        got = answers[:rounds].tolist()
        assert all(abs(a - b) <= 1e-6 * b for a, b in zip(got, expected, strict=True))
        assert int(place) == rounds


def test_eager_messages_between_replays(seed):
    """A captured message keeps its slot; eager ones take their turns through all slots, that one too."""
    with virtual_channel(slots=3) as channel:
        value = torch.zeros(100, device="cuda")
        got = torch.empty(100, device="cuda")
        graphs = []
        for rank in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=channel.streams[rank]):
                if rank == 0:
                    value.add_(1)
                    channel.ends[0].send(value)
                else:
                    with channel.ends[1].recv(value) as x:
                        got.copy_(x)
            graphs.append(graph)
        for i in range(40):
            for rank in range(2):
                with channel.on(rank):
                    graphs[rank].replay()
            torch.cuda.synchronize()
            assert got.tolist() == [i + 1.0] * 100
            with channel.on(0) as end:
                end.send(torch.full((7,), i, device="cuda"))
            with channel.on(1) as end, end.recv() as x:
                assert x.tolist() == [i] * 7
        fp.check()


def test_open_writes_straight_into_the_slot(seed):
    with virtual_channel(slots=2) as channel:
        a, b = torch.randn(2, 300, 70, device="cuda")
        torch.cuda.synchronize()
        for _ in range(5):
            with channel.on(0) as end, end.open((a, ((2,), torch.int32))) as (total, mark):
                torch.add(a, b, out=total)
                mark.fill_(7)
            with channel.on(1) as end, end.recv((((300, 70), torch.float32), ((2,), torch.int32))) as (total, mark):
                assert torch.equal(total, a + b) and mark.tolist() == [7, 7]
        fp.check()


def test_what_a_capture_refuses():
    with virtual_channel(slots=2) as channel:
        with channel.on(0) as end:
            end.send(torch.zeros(3, device="cuda"))
            end.send(torch.zeros(3, device="cuda"))
        with channel.on(1) as end:
            handle = end.recv()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=channel.streams[1]):
            with pytest.raises(
                RuntimeError, match="must be released in that capture, one received outside of it outside"
            ):
                handle.release()
            with pytest.raises(RuntimeError, match=r"recv\(\) reads the header on the host"):
                channel.ends[1].recv()
            torch.zeros(1, device="cuda")
        with channel.on(1):
            handle.release()
        torch.cuda.synchronize()
        fp.check()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_another_message_than_expected_is_told_on_both_ends():
    with virtual_channel(slots=1, timeout=1.0) as channel:
        sent = {"b": torch.zeros(2, 3, device="cuda"), "a": torch.zeros(1, dtype=torch.int64, device="cuda")}
        torch.cuda.synchronize()
        with channel.on(0) as end:
            end.send(sent)
            end.send(sent)  # waits for a slot that will not be released
        with channel.on(1) as end:
            end.recv({"a": ((1,), torch.int64), "b": ((3, 2), torch.float32)})
        torch.cuda.synchronize()
        with pytest.raises(fp.MessageMismatchError) as told:
            channel.ends[1].check()
        one, other = (f"{{'a': int64 [1], 'b': float32 {shape}}}" for shape in ([3, 2], [2, 3]))
        assert f"rank 1 expects {one}, rank 0 sent {other}" in str(told.value)
        with pytest.raises(fp.PeerTimeoutError, match="rank 0 was told by rank 1 that the channel failed there"):
            channel.ends[0].check()
        with pytest.raises((fp.MessageMismatchError, fp.PeerTimeoutError)):
            fp.check()


@pytest.mark.parametrize("captured", [False, True])
def test_a_silent_sender(captured):
    with virtual_channel(slots=4, timeout=(20.0, 0.5)) as channel:

        def receive(end):
            for _ in range(20):
                with end.recv(((3,), torch.float32)):
                    pass

        begin = time.monotonic()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=channel.streams[1]):
                receive(channel.ends[1])
            with channel.on(1):
                graph.replay()
        else:
            with channel.on(1) as end:
                receive(end)
        torch.cuda.synchronize()
        assert 0.4 < time.monotonic() - begin < 2.0  # one timeout for all
        with pytest.raises(
            fp.PeerTimeoutError, match=r"waited in vain for a message of rank 0 \(message 0 of its slot\)"
        ):
            fp.check()
        with pytest.raises(fp.PeerTimeoutError), channel.on(1) as end:
            end.send(torch.zeros(1, device="cuda"))
        # The sender hears of it, long before its own timeout.
        begin = time.monotonic()
        with channel.on(0) as end:
            for _ in range(5):
                end.send(torch.zeros(3, device="cuda"))
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 2.0
        with pytest.raises(fp.PeerTimeoutError, match="was told by rank 1"):
            channel.ends[0].check()


@pytest.mark.parametrize("push_bytes", [PUSH, COPY])
def test_a_receiver_that_releases_nothing(push_bytes):
    """The sender gives up. A copy is queued behind its wait and runs all the same: the receiver, which still reads the
    slot, must not take what it then holds for the first message."""
    with virtual_channel(slots=1, timeout=(0.5, 20.0), push_bytes=push_bytes) as channel:
        first, second = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
        torch.cuda.synchronize()
        with channel.on(0) as end:
            end.send(first)
        with channel.on(1) as end:
            handle = end.recv(first)
        with channel.on(0) as end:
            end.send(second)
        channel.streams[0].synchronize()
        with pytest.raises(fp.PeerTimeoutError, match="rank 0 waited in vain for rank 1 to release a slot"):
            channel.ends[0].check()
        with channel.on(1):
            overwritten = handle.tensors.sum().item() != 0
            handle.release()
        torch.cuda.synchronize()
        assert overwritten == (push_bytes == COPY)
        with pytest.raises(fp.PeerTimeoutError, match="rank 1 was told by rank 0 that the channel failed there"):
            channel.ends[1].check()


def test_ends_that_count_differently():
    """One end captured its step and replays it, the other runs it eagerly: messages in slot 0, a wait at slot 1."""
    with virtual_channel(slots=2, timeout=1.0) as channel:
        x = torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=channel.streams[0]):
            channel.ends[0].send(x)
        with channel.on(0):
            graph.replay()
            graph.replay()
        with channel.on(1) as end:
            for _ in range(2):
                with end.recv(x):
                    pass
        torch.cuda.synchronize()
        with pytest.raises(fp.PeerTimeoutError, match="another slot holds one: the two ends count differently"):
            channel.ends[1].check()


def test_header_fits_what_the_kernels_expect():
    from fused_parallel import _ext
    from fused_parallel.comm import messages as layouts

    extension = _ext.extension()
    assert extension.p2p_header_bytes == layouts.HEADER_BYTES
    assert extension.p2p_alignment == layouts.ALIGNMENT
    assert extension.p2p_max_tensors == layouts.MAX_TENSORS
    layout, _ = layout_of(torch.zeros(3))
    assert int.from_bytes(layout.header[:8], "little") == layout.hash
    assert int.from_bytes(layout.header[8:16], "little") == layout.bytes
