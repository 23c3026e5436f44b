"""sample: draw one token per request, for drafting and for plain decoding."""

from __future__ import annotations

import functools

import torch

from ..reference import sample as reference
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import register
from ._sampling import check_logits, check_seed, check_tensor, options, shard, vocabulary
from ._verify_kernel import launch, launch_known, remember, why_not_fused

STREAMS = ("draft", "residual")


def _sample_impl(
    logits, seed, step, temperature, position, top_k, top_p, min_p, stream: str, vocab_size: int, group_name: str
) -> torch.Tensor:
    part = shard(logits, vocab_size, group_name)
    if part.pg:
        check_agreement("sample", part.pg, logits, temperature, top_k, top_p, min_p)
    rows, filters = logits[:, None], (top_k, top_p, min_p)
    no_drafts = seed.new_empty(seed.shape[0], 0)
    unsupported = functools.partial(why_not_fused, rows, no_drafts, None, filters, part)
    if choose_fused("sample", unsupported, on_gpu=logits.is_cuda):
        tokens, _, _ = launch(
            rows, no_drafts, None, seed, step, temperature, None, filters, "rejection", part, position, stream
        )
        return tokens[:, 0]
    return reference.sample(logits, seed, step, temperature, position, stream, top_k, top_p, min_p, part)


def _sample_fake(logits, seed, step, temperature, position, top_k, top_p, min_p, stream, vocab_size, group_name):
    return torch.empty_like(seed)


_sample = register(
    "sample(Tensor logits, Tensor seed, Tensor step, Tensor temperature, Tensor position, Tensor? top_k, "
    "Tensor? top_p, Tensor? min_p, str stream, SymInt vocab_size, str group_name) -> Tensor",
    _sample_impl,
    _sample_fake,
)


def sample(
    logits: torch.Tensor,
    *,
    seed: torch.Tensor,
    step: torch.Tensor,
    temperature: torch.Tensor | float,
    position: torch.Tensor | int = 0,
    stream: str = "draft",
    top_k: torch.Tensor | int | None = None,
    top_p: torch.Tensor | float | None = None,
    min_p: torch.Tensor | float | None = None,
    vocab_size: int | None = None,
    vocab_group=None,
) -> torch.Tensor:
    """Draw one token per request from softmax(logits / temperature), filtered.

    The draw is the argmax of log-probability + Gumbel noise, and the noise a function of (seed, step, position,
    stream, token id) alone: a request gets the same token in any batch, on any number of ranks, in a graph or not.

    Drafting for `fp.verify`: the i-th token of a round is drawn with stream="draft", position=i and that round's seed
    and step. `draft_logits` of `fp.verify` must then be the log-weights drawn from: logits / temperature, with -inf
    where a filter removed a token (None where the temperature is 0). Plain decoding: stream="residual", position=0, and
    a step that grows with each token; it equals `fp.verify` with k = 0.

    Args:
        logits: [B, V], float16, bfloat16 or float32, any strides; with `vocab_group` this rank's shard [B, V / world].
        seed, step: int64 [B] tensors on the device of the logits; step below 2**62.
        temperature: float [B] tensor or one number for all; 0 (and negative, and NaN) is greedy: the argmax, the
            lowest id where several are equal.
        position: int64 [B] tensor or int, below 2**32.
        stream: "draft" or "residual".
        top_k, top_p, min_p: as in `fp.verify`.
        vocab_size: ids at or above it are padding and never drawn; default: none are.
        vocab_group: ProcessGroup or 1-D DeviceMesh whose ranks hold the vocabulary's equal shards in rank order; the
            other arguments are the same on all its ranks. One exchange of three numbers per request (filters: more).

    Returns:
        Tokens, int64 [B], the same on all ranks. NaN and infinite logits: as in `fp.verify`.

    Runs on the current stream without host synchronisation; can be captured in CUDA graphs (seed and step are read at
    replay) and traced by torch.compile(fullgraph=True). In float64; the CUDA kernels differ as docs/verify.md says.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, numbers or names that do not fit; logits that want a gradient.
        PeerTimeoutError: a rank of vocab_group died or did not answer within the group's timeout.

    Sources: Salmon et al. 2011 (noise); the Gumbel-max trick, see Maddison et al. 2014, "A* Sampling".
    """
    signature = None
    if stream in STREAMS:
        # The kernels take no position for 0, which saves making a tensor of zeros.
        start = None if type(position) is int and position == 0 else position
        inputs = (logits, None, None, seed, step, start, temperature, None, top_k, top_p, min_p, None)
        signed = ("sample", stream, type(vocab_size), vocab_size)
        outputs, signature = launch_known(vocab_group, inputs, signed)
        if outputs is not None:
            return outputs[0]
    check_logits("sample", "logits", logits, ("B", "V"))
    check_seed("sample", seed, step, logits)
    if stream not in STREAMS:
        raise ValueError(f"sample: stream must be one of {', '.join(map(repr, STREAMS))}, got {stream!r}")
    if isinstance(position, int):
        if not 0 <= position < 2**32:
            raise ValueError(f"sample: position must be between 0 and 2**32 - 1, got {position}")
        position = torch.full_like(seed, position)
    check_tensor("sample", "position", position, seed.shape, (torch.int64,), logits)
    temperature, top_k, top_p, min_p = options("sample", logits, temperature, top_k, top_p, min_p)
    vocab_size, group_name = vocabulary("sample", logits, vocab_size, vocab_group)
    tokens = _sample(logits, seed, step, temperature, position, top_k, top_p, min_p, stream, vocab_size, group_name)
    if signature is not None:
        remember(
            vocab_group, signature, inputs, logits[:, None], seed.new_empty(seed.shape[0], 0), None, seed, step,
            temperature, None, (top_k, top_p, min_p), "rejection", shard(logits, vocab_size, group_name), start, stream,
            flat=True,
        )  # fmt: skip
    return tokens
