"""Random messages and random programs of sends and receives: the same on both ends of a channel."""

from __future__ import annotations

import random

import torch

from ..comm.p2p import P2PChannel
from ..comm.workspace import check

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float64,
)


def random_tensor(rng: random.Random, most: int = 3000) -> torch.Tensor:
    """Any bits (NaNs and infinities among them), any dtype, awkward shapes, views that are not contiguous."""
    dtype = rng.choice(DTYPES)
    shape = [rng.choice((1, 2, 3, 5, 17, 127)) for _ in range(rng.randrange(4))]
    while torch.Size(shape).numel() > most:
        shape.pop()
    if rng.random() < 0.1:
        shape.append(0)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    if rng.random() < 0.3 and len(shape) > 1:
        wide = random_bits([*shape[:-2], shape[-1], 2 * shape[-2] + 1], dtype, generator)
        return wide[..., 1::2].transpose(-1, -2)  # neither contiguous nor aligned
    return random_bits(shape, dtype, generator)


def random_bits(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    numbers = torch.randint(0, 256, [*shape, dtype.itemsize], dtype=torch.uint8, generator=generator)
    return numbers.view(dtype).squeeze(-1) if numbers.numel() else torch.empty(shape, dtype=dtype)


def random_message(rng: random.Random):
    kind = rng.randrange(4)
    if kind == 0:
        return {
            name: random_tensor(rng) for name in rng.sample(["hidden", "ids", "ä", "lens", "x"], rng.randrange(1, 5))
        }
    if kind == 1:
        return tuple(random_tensor(rng) for _ in range(rng.randrange(4)))
    return random_tensor(rng)


def spec_of(message, rng: random.Random):
    """What recv is told: nothing, shapes and dtypes, or tensors like those to come."""
    how = rng.randrange(3)
    if how == 0:
        return None

    def one(x):
        return x if how == 1 else (tuple(x.shape), x.dtype)

    if isinstance(message, dict):
        return {key: one(message[key]) for key in sorted(message, reverse=True)}
    return tuple(map(one, message)) if isinstance(message, tuple) else one(message)


def parts(message) -> list[torch.Tensor]:
    if isinstance(message, dict):
        return [message[key] for key in sorted(message)]
    return list(message) if isinstance(message, tuple) else [message]


def same(got, sent) -> bool:
    """Kind, shapes, dtypes and bits."""
    if type(got) is not type(sent) or (isinstance(sent, dict) and set(got) != set(sent)):
        return False

    def bits(x):
        return torch.empty(x.numel(), dtype=x.dtype).copy_(x.reshape(-1)).view(torch.uint8)

    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(parts(got), parts(sent), strict=True)
    )


def to(message, device):
    if isinstance(message, dict):
        return {key: to(x, device) for key, x in message.items()}
    return tuple(to(x, device) for x in message) if isinstance(message, tuple) else message.to(device)


def schedule(mesh, seed: int, steps: int, slots: int, transport: str = "auto"):
    """A random program of sends, receives and releases on two channels at once, in both directions; every message is
    compared. Both ends draw the same program: a message is sent a few steps before it is received."""
    pg, rank = mesh["pp"], mesh.get_local_rank("pp")
    channels = [P2PChannel(pg, 1 - rank, slots=slots, slot_bytes=1 << 17, transport=transport) for _ in range(2)]
    device = channels[0].device
    rng = random.Random(seed)
    waiting = {(c, d): [] for c in range(2) for d in range(2)}  # sent, to be received
    held = {(c, d): [] for c in range(2) for d in range(2)}  # at the receiver
    received = 0

    def take(key):
        message, how = waiting[key].pop(0)
        spec = spec_of(message, how)
        held[key].append((channels[key[0]].recv(spec) if rank != key[1] else None, message))

    def release(key):
        nonlocal received
        handle, message = held[key].pop(0)
        if rank != key[1]:
            with handle as got:
                assert same(got, message), f"sent {message}, got {got}"
            received += 1

    for _ in range(steps):
        key, act = (rng.randrange(2), rng.randrange(2)), rng.random()
        # The draws are made on both ends, whoever acts on them.
        message, how = random_message(rng), random.Random(rng.randrange(1 << 30))
        if act < 0.45 and len(waiting[key]) + len(held[key]) < slots:
            waiting[key].append((message, how))
            if rank == key[1]:
                channels[key[0]].send(to(message, device))
        elif act < 0.8 and waiting[key]:
            take(key)
        elif held[key]:
            release(key)
    for key in held:
        while waiting[key] or held[key]:
            release(key) if held[key] else take(key)
    check()
    for channel in channels:
        channel.close()
    return received
