"""Functions that ranks run in test_llama.py and test_parallelize.py (they must be importable by name)."""

from __future__ import annotations

import torch

import fused_parallel as fp
from fused_parallel.nn.linear import gather_last


def logits(mesh, path, ids, dtype):
    """Full logits [B, S, V] of the library's model on this mesh; None on all but the last stage."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=dtype)
    out = model(ids)
    return None if out is None else gather_last(out, model.config.vocab_size, model.tp_group)
