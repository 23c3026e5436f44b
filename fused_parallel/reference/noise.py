"""Counter-based noise: every number is a function of (seed, stream, position, step, token id), and of nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), in int64 tensor operations: the same
bits on CPUs and GPUs, without host synchronisation, capturable in CUDA graphs.

    key      seed, its low and high 32 bits
    counter  token id // 2, position, low 32 bits of step, stream << 30 | bits 32 to 61 of step
    output   four 32-bit words: the first two (low, high) make the 64-bit integer x of the even token id, the last two
             that of the odd one
    uniform  v = (x + 0.5) * 2**-64 in float64, at most 1 - 2**-53; exponential e = -log1p(-v); Gumbel g = -log(e)

64 bits a number: 32 would cut the Gumbel's upper tail at 22, and with 10**5 tokens one draw in 40 000 has a Gumbel
beyond it. The lower tail, which the argmax of a draw does not read, ends at -log(53 log 2).
"""

from __future__ import annotations

import torch

STREAMS = {"draft": 0, "accept": 1, "residual": 2}
MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xCD9E8D57, 0xD2511F53)  # of the counter's words 2 and 0, in the order the round below uses them
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key's two words grow by each round


def _pair(words: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    return torch.stack([like.new_full((1,) * like.dim(), word) for word in words])


def philox(key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four int64 tensors of 32-bit words, from two of key and four of counter, which broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    even, odd = torch.stack((c0, c2)), torch.stack((c1, c3))  # words 0 and 2, words 1 and 3
    key = torch.stack(torch.broadcast_tensors(*key))
    multipliers, weyl = _pair(MULTIPLIERS, c0), _pair(WEYL, key[0])
    for r in range(ROUNDS):
        # 32 x 32 bits into 64: the int64 product wraps, but its bits are right, and the mask drops the sign's copies
        # that the shift brings in.
        product = even.flip(0) * multipliers
        even = (product >> 32 & MASK) ^ odd ^ (key + r * weyl & MASK)
        odd = product & MASK
    return even[0], odd[0], even[1], odd[1]


def _words(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, stream: str, block: torch.Tensor):
    last = STREAMS[stream] << 30 | (step >> 32 & 0x3FFFFFFF)
    return philox((seed & MASK, seed >> 32 & MASK), (block & MASK, position & MASK, step & MASK, last))


def _unit(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    v = (high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32
    return v.clamp_(max=1 - 2.0**-53)  # the float64 sum can round up to 1


def uniform(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, stream: str) -> torch.Tensor:
    """Float64 uniforms in (0, 1), those of token id 0; int64 seed, step and position broadcast."""
    low, high, _, _ = _words(seed, step, position, stream, torch.zeros_like(position))
    return _unit(low, high)


def gumbel(
    seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, stream: str, first: int, count: int
) -> torch.Tensor:
    """Float64 standard Gumbels [B, count] of the token ids first .. first + count - 1; the others int64 [B]."""
    begin, end = first // 2, (first + count + 1) // 2
    block = torch.arange(begin, end, device=seed.device)
    words = _words(seed[:, None], step[:, None], position[:, None], stream, block)
    v = torch.stack((_unit(*words[:2]), _unit(*words[2:])), -1).flatten(1)[:, first - 2 * begin :][:, :count]
    return -torch.log(-torch.log1p(-v))
