"""A model whose layers stay in host memory, plain and with a draft: what one streamed pass that verifies many drafted
tokens is worth, on the CPU (where "streaming" copies within the same memory) or on one GPU.

    python examples/offload.py [--device cuda]
"""

import argparse
from pathlib import Path

import torch

import fused_parallel as fp
from fused_parallel._table import print_table
from fused_parallel.models.tokenizer import load_tokenizer

ASSETS = Path(__file__).parent / "assets"
PROMPT = "class Stack:\n    def __init__(self"

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
arguments.add_argument("--max-new-tokens", type=int, default=200)
arguments = arguments.parse_args()

mesh = fp.init(device=arguments.device)
draft = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-draft", mesh=None, dtype=torch.float32)
ids = load_tokenizer(ASSETS / "tiny-target").encode(PROMPT).ids
table, first = [], None
for name, offload, options in (
    ("on the device", None, {}),
    ("offloaded", fp.Offload(), {}),
    ("offloaded, half resident", fp.Offload(resident_bytes=7_500_000), {}),
    ("offloaded + draft, k = 4", fp.Offload(), {"draft": draft, "num_draft_tokens": 4}),
    ("offloaded + draft, k chosen", fp.Offload(), {"draft": draft, "num_draft_tokens": "auto"}),
):
    model = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-target", mesh=mesh, dtype=torch.float32, offload=offload)
    fp.generate(model, [ids], 8, **options)  # what is made at first use
    result = fp.generate(model, [ids], arguments.max_new_tokens, **options)
    first = first or result.tokens
    stats = result.stats
    table.append(
        [
            name,
            f"{stats.tokens_per_second:.1f}",
            f"{stats.streamed_bytes / stats.new_tokens / 1e6:.2f}",
            f"{stats.acceptance:.0%}" if stats.acceptance is not None else "",
            "yes" if result.tokens == first else "NO",
        ]
    )
columns = ["model", "tokens/s", "MB streamed a token", "acceptance", "same tokens"]
print_table(f"{arguments.max_new_tokens} tokens, greedy, {arguments.device}", columns, table)
fp.finalize()
raise SystemExit(0 if all(row[-1] == "yes" for row in table) else 1)
