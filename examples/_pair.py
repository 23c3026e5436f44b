"""The byte-level Llama models that `train_tiny.py` trains: shape, files, and how well draft and target agree."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _corpus import SEPARATOR, byte_tokenizer
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 256
MAX_POSITIONS = 2048
DRAFT_TOKENS = 4


@dataclass(frozen=True)
class Shape:
    """One model: `heads` query heads and `kv_heads` key/value heads of `head_dim`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool


def causal_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention hook without a mask tensor, so that SDPA may take its flash kernel when compiled too.

    Right for a prompt into an empty cache and for one token at a time, which is all this script does.
    """
    out = F.scaled_dot_product_attention(
        query.to(value.dtype), key.to(value.dtype), value, scale=scaling, is_causal=query.shape[2] > 1, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register("causal_without_mask", causal_attention)


def build_model(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=shape.tied,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        pad_token_id=SEPARATOR,
        tokenizer_class="PreTrainedTokenizerFast",  # AutoTokenizer then reads tokenizer.json as it is
    )
    model = LlamaForCausalLM(config)
    model.config._attn_implementation = "causal_without_mask"
    return model


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Write the weights as bf16 with config, generation config and tokenizer; each file appears whole or not at all."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=SEPARATOR, eos_token_id=SEPARATOR, pad_token_id=SEPARATOR, do_sample=False
    )
    partial = directory / ".partial"
    copy.save_pretrained(partial)
    byte_tokenizer().save(str(partial / "tokenizer.json"))
    for file in partial.iterdir():
        os.replace(file, directory / file.name)
    partial.rmdir()


def load_model(directory: str | Path, device="cpu", dtype=torch.float32) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval().requires_grad_(False)
    model.config._attn_implementation = "causal_without_mask"
    return model


def disk_bytes(directory: Path) -> int:
    """Size of the weights file in bytes."""
    return (Path(directory) / "model.safetensors").stat().st_size


def logits_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, vocab] of int64 `tokens` [batch, length].

    The lookup is a product with one-hot rows: with 256 rows and a batch of many thousand bytes, the gradient of an
    indexed lookup would be added by contended atomics, slow and in no fixed order.
    """
    one_hot = F.one_hot(tokens, VOCAB_SIZE).to(torch.bfloat16 if tokens.is_cuda else torch.float32)
    embedded = one_hot @ model.get_input_embeddings().weight.to(one_hot.dtype)
    return model(inputs_embeds=embedded.to(model.dtype), use_cache=False).logits


def next_byte_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of `tokens[:, 1:]` given what precedes."""
    return F.cross_entropy(logits_of(model, tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """int64 [batch, new_tokens]: each prompt's most likely continuation, going on past the end of a document."""
    cache, tokens, out = None, prompts, []
    for _ in range(new_tokens):
        result = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = result.past_key_values, result.logits[:, -1:].argmax(-1)
        out.append(tokens)
    return torch.cat(out, 1)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, windows: torch.Tensor, batch: int = 16) -> float:
    """Mean bits per byte over int64 `windows` [n, length], each predicted from its own beginning."""
    losses = [next_byte_loss(model, part) * len(part) for part in windows.split(batch)]
    return (torch.stack(losses).sum() / len(windows) / math.log(2)).item()


@torch.no_grad()
def acceptance(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: torch.Tensor,
    new_tokens: int = 128,
    k: int = DRAFT_TOKENS,
) -> float:
    """Mean accepted / k over the rounds of greedy speculative decoding of `new_tokens` bytes after each prompt.

    A round drafts k tokens, keeps those that agree with the target up to the first that does not, and adds one of the
    target's. What is kept is thus always the target's own continuation, and the draft's proposals up to its first error
    are what it predicts on that continuation: one pass over it gives every round's outcome exactly.
    """
    continuation = greedy(target, prompts, new_tokens + k)  # every round that starts in new_tokens drafts all k
    sequence = torch.cat([prompts, continuation], 1)
    proposed = draft(input_ids=sequence[:, :-1], use_cache=False).logits[:, prompts.shape[1] - 1 :].argmax(-1)
    accepted = rounds = 0
    for agrees in (proposed == continuation).tolist():
        position = 0
        while position < new_tokens:
            window = agrees[position : position + k]
            kept = window.index(False) if False in window else k
            accepted, rounds, position = accepted + kept, rounds + 1, position + kept + 1
    return accepted / (rounds * k)
