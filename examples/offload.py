"""A model whose layers stay in host memory, plain and with a draft: what one streamed pass that verifies many drafted
tokens is worth, on the CPU (where "streaming" copies within the same memory) or on one GPU.

    python examples/offload.py [--device cuda]

A GPU shows it with a pair for which a pass costs something; trained and measured in about four minutes:

    python examples/train_tiny.py --size large --minutes 2 --out /tmp/pair
    python examples/offload.py --target /tmp/pair/large-target --draft /tmp/pair/large-draft \\
        --lengths 4 8 16 24 --cuda-graph

Greedy, so that every row but the quantised ones gives the same tokens. "predicted": tokens a round over (time of a
plain offloaded pass + k times that of a draft's pass, of a tree as many as it is deep; both measured), against the
plain offloaded model. "chosen": --num-draft-tokens auto, which takes as many tokens, or the tree of them, as pay; what
it took is listed below the table.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
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

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--target", type=Path, default=ASSETS / "tiny-target", help="directory of the model")
parser.add_argument("--draft", type=Path, default=ASSETS / "tiny-draft", help="directory of the smaller model")
parser.add_argument("--lengths", type=int, nargs="+", default=[4], help="draft lengths, beside the automatic choice")
parser.add_argument(
    "--tree", nargs="+", default=[], metavar="WIDTHS", help="trees, too: such as 2,2,1 or, by parents, --tree=-1,-1,0"
)
parser.add_argument("--prompts", type=int, default=1, help=f"how many prompts, one at a time (1 to {len(PROMPTS)})")
parser.add_argument("--max-new-tokens", type=int, default=200)
parser.add_argument("--cuda-graph", action="store_true", help="rounds in CUDA graphs, too")
arguments = parser.parse_args()
DTYPE = torch.float32  # so that rows of different lengths give the same tokens


@dataclass
class Row:
    name: str
    load: dict = field(default_factory=dict)
    generate: dict = field(default_factory=dict)


mesh = fp.init(device=arguments.device)
draft = fp.LlamaForCausalLM.from_pretrained(arguments.draft, mesh=None, dtype=DTYPE)
tokenizer = load_tokenizer(arguments.target)
prompts = [tokenizer.encode(text).ids for text in PROMPTS[: arguments.prompts]]
models: dict[str, fp.LlamaForCausalLM] = {}


def model_of(load: dict) -> fp.LlamaForCausalLM:
    """Loaded once, and kept while rows that follow use it."""
    if repr(load) not in models:
        for old in models.values():
            if old.offloaded:
                old.model.layers.release()
        models.clear()
        models[repr(load)] = fp.LlamaForCausalLM.from_pretrained(arguments.target, mesh=mesh, dtype=DTYPE, **load)
    return models[repr(load)]


def measure(model: fp.LlamaForCausalLM, **options) -> tuple[list, list]:
    """(tokens, statistics) of the prompts, one at a time, after what is made at first use."""
    fp.generate(model, prompts[:1], 24, **options)
    results = [fp.generate(model, [ids], arguments.max_new_tokens, **options) for ids in prompts]
    return [r.tokens[0] for r in results], [r.stats for r in results]


def shapes(stats: list) -> Counter[tuple[int, int]]:
    """How many rounds drafted so many tokens, so deep."""
    trees = sum((Counter(s.rounds_by_tree) for s in stats), Counter())
    found = Counter(trees)
    for s in stats:
        found.update({(k, k): count for k, count in s.rounds_by_length.items()})  # those in trees, too
    for (nodes, _), count in trees.items():
        found[nodes, nodes] -= count
    return +found


def seconds_a_token(stats: list) -> float:
    return sum(s.decode_seconds for s in stats) / sum(s.new_tokens - 1 for s in stats)


offloaded = {"offload": fp.Offload()}
half = model_of(offloaded).model.layers.host_bytes // 2
rows = [
    Row("on the device"),
    Row("on the device + draft, k chosen", {}, {"draft": draft, "num_draft_tokens": "auto"}),
    Row("offloaded", offloaded),
]
for k in arguments.lengths:
    rows.append(Row(f"offloaded + draft, k = {k}", offloaded, {"draft": draft, "num_draft_tokens": k}))
for tree in arguments.tree:
    options = {"draft": draft, "num_draft_tokens": tuple(map(int, tree.split(",")))}
    rows.append(Row(f"offloaded + draft, tree {tree}", offloaded, options))
rows.append(Row("offloaded + draft, chosen", offloaded, {"draft": draft, "num_draft_tokens": "auto"}))
rows.append(Row("offloaded + n-grams, k chosen", offloaded, {"draft": "ngram", "num_draft_tokens": "auto"}))
if arguments.cuda_graph:  # last on this model: after a capture nothing is copied ahead between passes
    for k in arguments.lengths:
        options = {"draft": draft, "num_draft_tokens": k, "cuda_graph": True}
        rows.append(Row(f"offloaded + draft, k = {k}, graph", offloaded, options))
    for tree in arguments.tree:
        options = {"draft": draft, "num_draft_tokens": tuple(map(int, tree.split(","))), "cuda_graph": True}
        rows.append(Row(f"offloaded + draft, tree {tree}, graph", offloaded, options))
    options = {"draft": draft, "num_draft_tokens": "auto", "cuda_graph": True}
    rows.append(Row("offloaded + draft, chosen, graph", offloaded, options))
rows.append(Row("offloaded, half resident", {"offload": fp.Offload(resident_bytes=half)}))
rows.append(Row("offloaded, int8", offloaded | {"quantize": "int8"}))
rows.append(Row("offloaded, int4", offloaded | {"quantize": "int4"}))
rows.append(
    Row(
        "offloaded, int4 + draft, chosen",
        offloaded | {"quantize": "int4"},
        {"draft": draft, "num_draft_tokens": "auto"},
    )
)

of_draft = {}
for graph in (False, True) if arguments.cuda_graph else (False,):
    of_draft[graph] = seconds_a_token(measure(draft, cuda_graph=graph)[1])
table, first, plain, wrong, chosen = [], None, None, False, []
for row in rows:
    tokens, stats = measure(model_of(row.load), **row.generate)
    took, made = seconds_a_token(stats), sum(s.new_tokens for s in stats)
    first = first or tokens
    print(f"measured {row.name}: {1 / took:.1f} tokens/s", file=sys.stderr, flush=True)
    if row.name == "offloaded":
        plain = took
    exact = "quantize" not in row.load
    wrong |= exact and tokens != first
    rounds, drafted = sum(s.rounds for s in stats), sum(s.drafted for s in stats)
    predicted = ""
    if plain and row.load == offloaded and row.generate.get("draft") is draft:
        # The draft passes once for each depth, not for each node.
        passes = sum(depth * count for (_, depth), count in shapes(stats).items()) / rounds
        predicted = plain / (plain + passes * of_draft[row.generate.get("cuda_graph", False)])
        predicted = f"{predicted * sum(s.new_tokens - 1 for s in stats) / rounds:.2f}"
    if row.generate.get("num_draft_tokens") == "auto":
        parts = [
            f"{count} x {k if k == depth else f'a tree of {k}, {depth} deep'}"
            for (k, depth), count in shapes(stats).most_common()
        ]
        chosen.append(f"{row.name}: {', '.join(parts)}")
    shares = [s.link_utilisation for s in stats if s.link_utilisation is not None]
    captured = row.generate.get("cuda_graph")  # whose copies nobody counts
    table.append(
        [
            row.name,
            f"{1 / took:.1f}",
            f"{plain / took:.2f}" if plain else "",
            predicted,
            f"{sum(s.accepted for s in stats) / drafted:.0%}" if drafted else "",
            f"{made / rounds:.2f}",
            "" if captured else f"{sum(s.streamed_bytes for s in stats) / made / 1e6:.2f}",
            f"{sum(shares) / len(shares):.0%}" if shares and not captured else "",
            ("yes" if tokens == first else "NO") if exact else "",
        ]
    )
columns = [
    "model",
    "tokens/s",
    "x offloaded",
    "predicted",
    "acceptance",
    "tokens a round",
    "MB a token",
    "link",
    "same",
]
print_table(f"{arguments.max_new_tokens} tokens, greedy, float32, {arguments.device}", columns, table)
print("rounds by what was chosen:", *chosen, sep="\n  ")
print(f"a draft's pass takes {', '.join(f'{1e3 * t:.2f} ms' for t in of_draft.values())} (eager, then in a graph)")
fp.finalize()
raise SystemExit(int(wrong))
