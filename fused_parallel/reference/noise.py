"""Counter-based noise: every number is a function of (seed, stream, position, step, token id), and of nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), in int64 tensor operations: the same
bits on CPUs and GPUs, without host synchronisation, capturable in CUDA graphs.

    key      seed, its low and high 32 bits
    counter  block, position, low 32 bits of step, stream << 30 | bits 32 to 61 of step
    output   four 32-bit words: the first two (low, high) make a 64-bit integer y of the even token id 2 * block, the
             last two that of the odd one; of block 2**31 | g the halves of the words (low half first) are the first 16
             bits of the token ids 8 g to 8 g + 7
    uniform  v = (x + 0.5) * 2**-64 in float64, at most 1 - 2**-53, where x is y; exponential e = -log1p(-v);
             Gumbel g = -log(e), where x is the first 16 bits and then the upper 48 of y

A draw that compares first bits needs a block for eight tokens, and for the few tokens that may win another.
64 bits a number: 32 would cut the Gumbel's upper tail at 22, and with 10**5 tokens one draw in 40 000 has a Gumbel
beyond it. The lower tail, which the argmax of a draw does not read, ends at -log(53 log 2).
"""

from __future__ import annotations

import torch

STREAMS = {"draft": 0, "accept": 1, "residual": 2}
MASK = 0xFFFFFFFF
ROUNDS = 10
FIRST_BITS = 1 << 31  # of the counter's word 0, where ids are below 2**30
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
    last = first + count - 1
    key = seed[:, None], step[:, None], position[:, None], stream
    words = _words(*key, torch.arange(first // 2, last // 2 + 1, device=seed.device))
    low, high = (torch.stack((words[i], words[i + 2]), -1).flatten(1)[:, first % 2 :][:, :count] for i in (0, 1))
    words = torch.stack(_words(*key, FIRST_BITS | torch.arange(first // 8, last // 8 + 1, device=seed.device)), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, first % 8 :][:, :count]
    v = _unit((high << 16 | low >> 16) & MASK, bits << 16 | high >> 16)
    return -torch.log(-torch.log1p(-v))
