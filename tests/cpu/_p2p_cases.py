"""What ranks run in tests/cpu/test_p2p.py."""

from __future__ import annotations

import os
import signal
import time

import torch

import fused_parallel as fp
from fused_parallel.comm import p2p_distributed


def back_pressure(mesh, slots: int):
    """(seconds that each of 2 * slots sends took, on rank 0; the messages received after a pause, on rank 1)."""
    rank = mesh.get_local_rank("pp")
    channel = fp.comm.P2PChannel(mesh["pp"], 1 - rank, slots=slots, slot_bytes=1 << 10)
    if rank == 0:
        times = []
        for i in range(2 * slots):
            begin = time.perf_counter()
            channel.send(torch.full((3,), i))
            times.append(time.perf_counter() - begin)
        channel.close()
        return times
    time.sleep(1.0)
    got = []
    for _ in range(2 * slots):
        with channel.recv(((3,), torch.int64)) as x:
            got.append(x.tolist())
    return got


def messages_of(calls) -> list[str]:
    """The error of each call, or what it gave."""
    texts = []
    for call in calls:
        try:
            texts.append(repr(call()))
        except (ValueError, TypeError, RuntimeError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def refusals(mesh):
    rank, pg = mesh.get_local_rank("pp"), mesh["pp"]
    texts = messages_of(
        [
            lambda: fp.comm.P2PChannel(pg, rank),
            lambda: fp.comm.P2PChannel(pg, 2),
            lambda: fp.comm.P2PChannel(pg, 1 - rank, slots=0),
            lambda: fp.comm.P2PChannel(pg, 1 - rank, transport="mpi"),
            lambda: fp.comm.P2PChannel(pg, 1 - rank, slots=3 + rank),
            lambda: fp.comm.P2PChannel(pg, 1 - rank, transport="memory"),
        ]
    )
    channel = fp.comm.P2PChannel(pg, 1 - rank, slots=2, slot_bytes=1000)
    if rank == 0:
        texts += messages_of(
            [
                lambda: channel.send(torch.zeros(257, dtype=torch.float32)),
                lambda: channel.send("tokens"),
                lambda: channel.send({1: torch.zeros(1)}),
                lambda: channel.send((torch.zeros(1), None)),
                lambda: channel.send(tuple(torch.zeros(1) for _ in range(33))),
                lambda: channel.send({"k" * 2000: torch.zeros(1)}),
                lambda: channel.send(torch.zeros(1, device="meta")),
                lambda: channel.send(torch.zeros(1, requires_grad=True)),
                lambda: channel.recv("tokens"),
                lambda: channel.recv(((-1,), torch.int64)),
                lambda: channel.recv(((1000,), torch.int64)),
            ]
        )
        for i in range(4):
            channel.send(torch.tensor([i]))
        channel.close()
        return texts
    first, second = channel.recv(), channel.recv()
    texts += messages_of([channel.recv])
    second.release()
    texts += messages_of([channel.recv, second.release])
    first.release()
    with channel.recv() as x:
        texts.append(repr(x))
    with channel.recv() as x:
        texts.append(repr(x))
    return texts


def mismatch(mesh, sent, spec):
    rank = mesh.get_local_rank("pp")
    channel = fp.comm.P2PChannel(mesh["pp"], 1 - rank)
    if rank == 0:
        channel.send(sent)
        return None
    told = messages_of([lambda: channel.recv(spec), lambda: channel.recv(spec)])
    channel.close()  # or fp.check() in this process would go on telling of it
    return told


STEPS = ("before", "header", "payload", "received", "released")


def dies_at(role: str, step: str, path: str) -> None:
    """A stream of messages in which the sender or the receiver ends at `step` of the fourth; the other writes what it
    was told, and after how many seconds and messages, to `path`."""
    mesh = fp.init(pp=2, device="cpu", timeout=20.0)
    rank = mesh.get_local_rank("pp")
    channel = fp.comm.P2PChannel(mesh["pp"], 1 - rank, slots=2)
    victim = rank == ("sender", "receiver").index(role)
    if victim:
        transport, count = channel._transport, 0
        of_backend = transport._out if role == "sender" else transport._in

        class Dying:
            """The communicator, of which the call after `step` of message 3 is never made."""

            def send(self, *args):
                return self.call(of_backend.send, *args)

            def recv(self, *args):
                return self.call(of_backend.recv, *args)

            def call(self, function, tensors, other, tag):
                at = {"before": p2p_distributed._HEADER_TAG, "header": p2p_distributed._PAYLOAD_TAG}.get(step)
                if count == 3 and tag == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(tensors, other, tag)

        setattr(transport, "_out" if role == "sender" else "_in", Dying())
    begin, told, done = time.perf_counter(), "nothing", 0
    try:
        for count in range(12):
            if rank == 0:
                channel.send(torch.full((50,), count))
            else:
                handle = channel.recv()
                assert handle.tensors.tolist() == [count] * 50
                if victim and count == 3 and step in ("payload", "received"):
                    os.kill(os.getpid(), signal.SIGKILL)
                handle.release()
            if victim and count == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
        channel.close()
    except fp.PeerTimeoutError as error:
        told = str(error)
    with open(path + ".partial", "w") as file:
        file.write(f"{time.perf_counter() - begin:.2f} {done} {told}")
    os.replace(path + ".partial", path)
