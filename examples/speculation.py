"""What drafting is worth: acceptance and speed of the trained pair by draft length, on the CPU or on one GPU.

    python examples/speculation.py [--device cuda] [--plot speculation.png]

Greedy, so that every row gives the same tokens; "auto" chooses the length itself, "ngram" drafts from the text, `--tree
2,1,1` adds a tree with these widths. Half a minute on two idle cores.
"""

import argparse
import sys
from pathlib import Path

import torch

import fused_parallel as fp
from fused_parallel._table import print_table
from fused_parallel.models.tokenizer import load_tokenizer

ASSETS = Path(__file__).parent / "assets"
PROMPTS = (
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
    "    for name, value in sorted(self.items()):\n        if ",
    'def read(path):\n    """Read the',
)

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
arguments.add_argument("--max-new-tokens", type=int, default=200)
arguments.add_argument("--lengths", type=int, nargs="+", default=range(9), help="draft lengths, default 0 to 8")
arguments.add_argument(
    "--tree", nargs="+", default=[], metavar="WIDTHS", help="trees, too: such as 2,2,1 or, by parents, --tree=-1,-1,0"
)
arguments.add_argument("--plot", type=Path, help="write a plot (needs matplotlib)")
arguments = arguments.parse_args()

mesh = fp.init(device=arguments.device)
load = {"dtype": torch.float32}
model = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-target", mesh=mesh, **load)
draft = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-draft", mesh=None, **load)
tokenizer = load_tokenizer(ASSETS / "tiny-target")
prompts = [tokenizer.encode(text).ids for text in PROMPTS]

rows = [(f"k = {k}", draft if k else None, k or 4) for k in arguments.lengths]
rows += [(f"tree {tree}", draft, tuple(map(int, tree.split(",")))) for tree in arguments.tree]
rows += [("auto", draft, "auto"), ("ngram, k = 4", "ngram", 4), ("ngram, auto", "ngram", "auto")]
fp.generate(model, prompts[:1], 20, draft=draft)  # what is made at first use
table, plain = [], None
for name, drafter, length in rows:
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    tokens, rates, stats = [], [], []
    for prompt in prompts:
        result = fp.generate(model, [prompt], arguments.max_new_tokens, draft=drafter, num_draft_tokens=length)
        tokens += result.tokens
        stats.append(result.stats)
    seconds = sum(s.decode_seconds for s in stats)
    made, drafted = sum(s.new_tokens - 1 for s in stats), sum(s.drafted for s in stats)
    plain = plain or (tokens, made / seconds)
    table.append(
        [
            name,
            f"{made / seconds:.1f}",
            f"{made / seconds / plain[1]:.2f}",
            f"{sum(s.accepted for s in stats) / drafted:.0%}" if drafted else "",
            f"{made / sum(s.rounds for s in stats):.2f}",
            "yes" if tokens == plain[0] else "NO",
        ]
    )
columns = ["draft", "tokens/s", "against the first", "acceptance", "tokens a round", "same tokens"]
print_table(f"{len(prompts)} prompts, one at a time, {arguments.max_new_tokens} tokens each, greedy", columns, table)

if arguments.plot:
    from matplotlib import pyplot

    pyplot.figure(figsize=(7, 4))
    pyplot.bar([row[0] for row in table], [float(row[1]) for row in table])
    pyplot.ylabel("tokens/s"), pyplot.xticks(rotation=45, ha="right"), pyplot.tight_layout()
    pyplot.savefig(arguments.plot)
fp.finalize()
raise SystemExit(0 if all(row[-1] == "yes" for row in table) else 1)
