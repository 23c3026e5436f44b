"""The kernels of csrc/verify.cu behind `verify` and `sample`: what they cannot do, and their launch."""

from __future__ import annotations

import torch

from .. import _ext
from ..reference.noise import STREAMS

METHODS = ("rejection", "block", "greedy")  # in the order of enum VerifyMethod of csrc/verify.h


def why_not_fused(target_logits, draft_tokens, draft_logits, top_k, top_p, min_p, group_name: str) -> str | None:
    """Why the reference must do this call; None if the kernels can. Target [B, k + 1, V], the rest as in `verify`."""
    if not target_logits.is_cuda:
        return f"there are kernels for CUDA tensors only, not for {target_logits.device.type}"
    if (why := _ext.why_no_kernels()) is not None:
        return why
    if group_name:
        return "the kernels need the whole vocabulary on one GPU, and vocab_group is given"
    for name, option in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        if option is not None:
            return f"the kernels know no filters, and {name} is given"
    most = _ext.extension().verify_max_draft_tokens
    if draft_tokens.shape[1] > most:
        return f"the kernels verify up to {most} drafts a request, not {draft_tokens.shape[1]}"
    if draft_logits is not None and draft_logits.dtype not in (target_logits.dtype, torch.float32):
        return f"the kernels read draft_logits in {target_logits.dtype} or float32, not in {draft_logits.dtype}"
    if target_logits.shape[-1] > 2**30:
        return f"the kernels know vocabularies up to 2**30, not {target_logits.shape[-1]}"
    return None


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """Rows of contiguous elements: the kernels read any row and batch strides in place."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def launch(
    target_logits,
    draft_tokens,
    draft_logits,
    seed,
    step,
    temperature,
    num_draft_tokens,
    method: str,
    vocab_size: int,
    position: torch.Tensor | None = None,
    stream: str = "residual",
    *,
    return_logprobs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, num_accepted and logprobs ([B, 0] unless asked for) as of `verify`, on the current stream.

    `position` int64 [B] is that of row 0 in the noise (None: 0), `stream` that of the last token.
    """
    batch, rows, _ = target_logits.shape
    extension = _ext.extension()
    # Kept in names until after the launch: a temporary would give its memory back before the kernels are queued.
    target_logits = _readable(target_logits)
    has_draft = draft_logits is not None and rows > 1
    draft_logits = _readable(draft_logits) if has_draft else None
    small = [t if t is None else t.contiguous() for t in (draft_tokens, seed, step, position, temperature)]
    draft_tokens, seed, step, position, temperature = small
    num_draft_tokens = None if num_draft_tokens is None else num_draft_tokens.contiguous()
    tokens = seed.new_empty((batch, rows))
    accepted = seed.new_empty((batch,), dtype=torch.int32)
    logprobs = temperature.new_empty((batch, rows if return_logprobs else 0))
    scratch_bytes = extension.verify_scratch_bytes(batch, rows - 1, vocab_size, has_draft)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=seed.device)

    def address(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    extension.verify(
        target=target_logits.data_ptr(),
        draft=address(draft_logits),
        draft_tokens=draft_tokens.data_ptr(),
        seed=seed.data_ptr(),
        step=step.data_ptr(),
        position=address(position),
        temperature=temperature.data_ptr(),
        num_draft_tokens=address(num_draft_tokens),
        tokens=tokens.data_ptr(),
        num_accepted=accepted.data_ptr(),
        logprobs=logprobs.data_ptr() if return_logprobs else 0,
        scratch=scratch.data_ptr(),
        target_batch_stride=target_logits.stride(0),
        target_row_stride=target_logits.stride(1),
        draft_batch_stride=draft_logits.stride(0) if has_draft else 0,
        draft_row_stride=draft_logits.stride(1) if has_draft else 0,
        num_draft_tokens_bytes=0 if num_draft_tokens is None else num_draft_tokens.element_size(),
        batch=batch,
        k=rows - 1,
        width=vocab_size,
        method=METHODS.index(method),
        noise_stream=STREAMS[stream],
        target_dtype=_ext.DTYPE_CODES[target_logits.dtype],
        draft_dtype=_ext.DTYPE_CODES[draft_logits.dtype] if has_draft else 0,
        device=seed.device.index,
        stream=torch.cuda.current_stream(seed.device).cuda_stream,
    )
    return tokens, accepted, logprobs
