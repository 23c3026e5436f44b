"""`fused-parallel demo`: the trained tiny model continues a prompt in every arrangement, and the tokens are
compared."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..comm.groups import finalize, init
from ..comm.launch import launch
from ..models.llama import LlamaForCausalLM
from ..models.tokenizer import load_tokenizer
from ..offload import Offload
from ..speculative import GenerationStats, generate

ASSETS = Path(__file__).resolve().parents[2] / "examples" / "assets"
PROMPT = "class Stack:\n    def __init__(self"


@dataclass(frozen=True)
class Arrangement:
    name: str
    tp: int
    pp: int
    speculation: bool
    offload: bool = False


ARRANGEMENTS = (
    Arrangement("1 process", 1, 1, False),
    Arrangement("TP=2", 2, 1, False),
    Arrangement("PP=2", 1, 2, False),
    Arrangement("TP=2 + speculation", 2, 1, True),
    Arrangement("offload", 1, 1, False, offload=True),
    Arrangement("offload + speculation", 1, 1, True, offload=True),
)


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="generate text as 1 process, TP=2, PP=2, TP=2 + speculation and offloaded, and compare",
        description="The trained tiny model of the checkout continues a prompt in six arrangements, each in its own "
        "ranks: GPUs over NCCL when there are two, else CPU processes over Gloo. Exit code 1 if the tokens differ.",
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="directory with tiny-target and tiny-draft")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda with two GPUs, else cpu")
    parser.set_defaults(run=run)


def _generate(
    assets: Path, ids: list[int], max_new_tokens: int, k: int, arrangement: Arrangement, device: str
) -> tuple[list[int], GenerationStats]:
    """What each rank of an arrangement runs. float32, so that all arrangements can give the same tokens."""
    mesh = init(tp=arrangement.tp, pp=arrangement.pp, device=device, timeout=120)
    options = {"dtype": torch.float32}
    offload = Offload() if arrangement.offload else None
    model = LlamaForCausalLM.from_pretrained(assets / "tiny-target", mesh=mesh, offload=offload, **options)
    draft = None
    if arrangement.speculation:
        draft = LlamaForCausalLM.from_pretrained(assets / "tiny-draft", mesh=None, **options)
    kwargs = {"draft": draft, "num_draft_tokens": k}
    generate(model, [ids], 8, **kwargs)  # warm-up: allocations, first-call costs
    result = generate(model, [ids], max_new_tokens, **kwargs)
    finalize()
    return result.tokens[0], result.stats


def run(args: argparse.Namespace) -> int:
    """Run all arrangements, print the text and the table; 1 if any arrangement's tokens differ."""
    from rich.console import Console
    from rich.table import Table

    if not (args.assets / "tiny-target").is_dir():
        raise FileNotFoundError(
            f"{args.assets} has no tiny-target: the trained models come with the source checkout; run the demo there "
            "(make demo), or train them with examples/train_tiny.py"
        )
    device = args.device or ("cuda" if torch.cuda.device_count() >= 2 else "cpu")
    tokenizer = load_tokenizer(args.assets / "tiny-target")
    ids = tokenizer.encode(args.prompt).ids
    console = Console()
    where = "GPUs over NCCL" if device == "cuda" else "CPU processes over Gloo"
    table = Table(title=f"{args.max_new_tokens} tokens, greedy, float32, {where}")
    table.add_column("arrangement")
    for column in ("tokens/s", "acceptance", "communication", "same tokens"):
        table.add_column(column, justify="right")

    expected: list[int] | None = None
    failed = False
    for arrangement in ARRANGEMENTS:
        with console.status(f"{arrangement.name} ..."):
            ranks = launch(
                _generate,
                arrangement.tp * arrangement.pp,
                args.assets,
                ids,
                args.max_new_tokens,
                args.num_draft_tokens,
                arrangement,
                device,
            )
        tokens, stats = ranks[0]
        if expected is None:
            expected = tokens
            console.print(args.prompt + tokenizer.decode(tokens), style="green", markup=False, highlight=False)
        same = all(rank_tokens == expected for rank_tokens, _ in ranks)
        failed |= not same
        table.add_row(
            arrangement.name,
            f"{stats.tokens_per_second:.1f}",
            "-" if stats.acceptance is None else f"{stats.acceptance:.0%}",
            f"{stats.communication_share:.0%}",
            "yes" if same else "NO",
        )
    console.print(table)
    print(
        "A model this small gains nothing from being split or offloaded: the table shows that the tokens are the same."
    )
    if failed:
        print("demo: some arrangement's tokens differ from the single process's", file=sys.stderr)
    return int(failed)
