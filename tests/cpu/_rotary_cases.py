"""Inputs for rotary_cache_write, and what comes out in float64."""

import torch


def oracle(q, k, v, cos, sin, k_cache, v_cache, positions):
    """(rotated q, k cache, v cache) in float64, token by token."""
    cos, sin = cos.double().unsqueeze(2), sin.double().unsqueeze(2)

    def rotate(x):
        first, second = x.double().chunk(2, -1)
        return x.double() * cos + torch.cat((-second, first), -1) * sin

    keys, k_cache, v_cache = rotate(k), k_cache.double(), v_cache.double()
    for b in range(q.shape[0]):
        for s, position in enumerate(positions[b].tolist()):
            if 0 <= position < k_cache.shape[1]:
                k_cache[b, position], v_cache[b, position] = keys[b, s], v[b, s].double()
    return rotate(q), k_cache, v_cache


def draw_positions(batch, new, capacity, beyond=0):
    """Different ones for each token of a sequence, from -beyond to capacity + beyond."""
    count = max(new, capacity + 2 * beyond)
    return torch.rand(batch, count).argsort(1)[:, :new] - beyond


def random_inputs(shape, dtype, beyond=0, device="cpu"):
    """q, k and v as views of a merged projection's output; caches that hold something."""
    batch, new, q_heads, kv_heads, dim, capacity = shape

    def draw(*size):
        return torch.randn(size, dtype=dtype).to(device)

    merged = draw(batch, new, (q_heads + 2 * kv_heads) * dim).unflatten(-1, (-1, dim))
    q, k, v = merged.split((q_heads, kv_heads, kv_heads), 2)
    cos, sin = draw(batch, new, dim).cos(), draw(batch, new, dim).sin()  # not of one angle: each must be used rightly
    k_cache, v_cache = (draw(batch, capacity, kv_heads, dim) for _ in range(2))
    positions = draw_positions(batch, new, capacity, beyond)
    return q, k, v, cos, sin, k_cache, v_cache, positions.to(device)
