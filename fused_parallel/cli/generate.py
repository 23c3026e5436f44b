"""`fused-parallel generate`: continue a prompt with a Llama checkpoint, alone or under torchrun."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ..comm.groups import finalize
from ..models.config import DTYPES, LlamaConfig
from ..models.llama import LlamaForCausalLM
from ..models.tokenizer import load_tokenizer
from ..offload import Offload
from ..planner.apply import Planned, init, planned, read_plan
from ..planner.result import Plan
from ..reference.quantized_matmul import KINDS
from ..speculative import generate


def add_parser(subparsers) -> None:
    """Add this sub-command to the command line's parser."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a model",
        description="Continue a prompt with a Llama checkpoint. On several ranks: "
        "torchrun --nproc-per-node 2 -m fused_parallel generate ...",
    )
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face directory of the model")
    parser.add_argument(
        "--draft", help='directory of a smaller model, or "ngram" (the text itself): speculative decoding'
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue; several times: several texts at once")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--num-draft-tokens",
        type=_length,
        help='tokens drafted a round (default 4), "auto": as many as pay, with --offload and a draft model in trees, '
        "too, or a tree: 4,2,1 are its widths",
    )
    parser.add_argument("--method", choices=("rejection", "block"), default="rejection", help="rule of verification")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="run the best plan in this file (fused-parallel plan --json): tp, pp and its split, replicas, offload, "
        "quantisation, drafted tokens, micro-batches, chunks of the prompt",
    )
    parser.add_argument("--tp", type=int, help="tensor parallel size (default: the ranks that pp leaves)")
    parser.add_argument("--pp", type=int, help="pipeline stages (default 1)")
    parser.add_argument("--cuda-graph", action="store_true", help="capture a round in a CUDA graph (GPUs of one host)")
    parser.add_argument(
        "--offload",
        type=float,
        metavar="GB",
        help="keep the layers in host memory and stream them, except this many GB (10^9 bytes) on each device",
    )
    parser.add_argument(
        "--host-memory",
        type=float,
        metavar="GB",
        help="with --offload: GB of host memory for each rank's layers; those beyond are read from the files each pass",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="with --host-memory: keep the layers beyond in a file in this directory of a disk, quantised if they are",
    )
    parser.add_argument(
        "--offload-cpu",
        action="store_true",
        help="with --offload: compute layers on the CPU instead of streaming them, as many as a measurement says",
    )
    parser.add_argument("--quantize", choices=KINDS, help="quantise the layers' matrices while they are read")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the checkpoint's")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that bound every wait for another rank")
    parser.set_defaults(run=run)


def _length(text: str) -> int | str | tuple[int, ...]:
    if text == "auto":
        return text
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens, auto or numbers with commas between them, got {text!r}"
        ) from None
    return numbers if "," in text else numbers[0]


def run(args: argparse.Namespace) -> int:
    """Load, generate, print text and statistics on rank 0."""
    LlamaConfig.from_pretrained(args.model)  # a wrong path is told before ranks are joined
    if args.draft not in (None, "ngram") and not Path(args.draft).is_dir():
        raise FileNotFoundError(f"--draft {args.draft}: there is no such directory (or --draft ngram, without a model)")
    if args.prompt_file is not None and not args.prompt_file.is_file():
        raise FileNotFoundError(f"--prompt-file {args.prompt_file}: there is no such file")
    prompts = args.prompt if args.prompt is not None else [args.prompt_file.read_text()]
    for flag, gb in (("--offload", args.offload), ("--host-memory", args.host_memory)):
        if gb is not None and not 0 <= gb < math.inf:  # nan, too
            raise ValueError(f"{flag} must be GB, at least 0, got {gb:g}")
    of_offload = args.host_memory is not None or args.cache_dir is not None or args.offload_cpu
    if of_offload and args.plan is not None:
        raise ValueError("--plan says what is offloaded: leave --host-memory, --cache-dir and --offload-cpu out")
    if of_offload and args.offload is None:
        raise ValueError("--host-memory, --cache-dir and --offload-cpu say what --offload does: give --offload GB, too")
    if args.plan is None and args.num_draft_tokens is not None and args.draft is None:
        raise ValueError("--num-draft-tokens says how much --draft drafts: give --draft DIR or --draft ngram, too")
    plan = None if args.plan is None else read_plan(args.plan)
    mesh = init(tp=args.tp, pp=args.pp, plan=plan, timeout=args.timeout, device=args.device)
    dtype = DTYPES[args.dtype] if args.dtype else None
    tokenizer = load_tokenizer(args.model)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    if not all(ids):
        raise ValueError("the prompt is empty: give at least one token")
    mine, shown = range(len(ids)), sys.stderr.isatty()
    if plan is None:
        offload = None
        if args.offload is not None:
            host = None if args.host_memory is None else int(args.host_memory * 1e9)
            resident, where = int(args.offload * 1e9), {"host_bytes": host, "cache_dir": args.cache_dir}
            offload = Offload(resident_bytes=resident, cpu=args.offload_cpu, **where)
        model_options: dict[str, object] = {"offload": offload, "quantize": args.quantize}
        options: dict[str, object] = {"num_draft_tokens": 4 if args.num_draft_tokens is None else args.num_draft_tokens}
    else:
        mine = planned(mesh).replica_prompts(len(ids))
        model_options, options = _of_plan(args, planned(mesh), dtype, len(mine))
    model = LlamaForCausalLM.from_pretrained(args.model, mesh=mesh, dtype=dtype, progress=shown, **model_options)
    draft = args.draft
    if draft is not None and draft != "ngram":
        draft = LlamaForCausalLM.from_pretrained(draft, mesh=None, dtype=dtype)
    result = generate(
        model,
        ids[mine.start : mine.stop],
        args.max_new_tokens,
        draft=draft,
        method=args.method,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=[args.seed + i for i in mine],  # the same noise for a prompt whichever replica it is on
        cuda_graph=args.cuda_graph,
        progress=shown,
        **options,
    )
    tokens = result.tokens
    if len(mine) < len(ids):
        replicas: list = [None] * plan.best.dp
        dist.all_gather_object(replicas, tokens, group=mesh.get_group("dp"))
        tokens = [row for rows in replicas for row in rows]
    peaks = [None] * dist.get_world_size()
    if model.device.type == "cuda":
        dist.all_gather_object(peaks, torch.cuda.max_memory_allocated() / 2**30)
    if dist.get_rank() == 0:
        for prompt, row in zip(prompts, tokens, strict=True):
            print(prompt + tokenizer.decode(row))
        if plan is not None:
            print(f"plan: {plan.best.label}, rank 0 of {plan.best.gpus}", file=sys.stderr)
        print(describe(result.stats), file=sys.stderr)
        for line in _peaks(peaks, plan):
            print(line, file=sys.stderr)
    finalize()
    return 0


def _peaks(peaks: list[float | None], plan: Plan | None) -> list[str]:
    """A line a rank on a GPU: what tensors took of it at most, GiB, beside what the plan said."""
    lines = []
    for rank, gib in enumerate(peaks):
        if gib is None:
            continue
        planned_gib = ""
        if plan is not None:  # what CUDA and NCCL take is not torch's
            stage = rank // plan.best.tp % plan.best.pp
            of_plan = (plan.best.stage_gb[stage] - plan.best.memory_gb["reserved"]) * 1e9 / 2**30
            planned_gib = f", planned for {plan.best.batch} request(s): {of_plan:.2f} GiB"
        lines.append(f"GPU memory at its highest on rank {rank}: {gib:.2f} GiB{planned_gib}")
    return lines


def _of_plan(args: argparse.Namespace, run: Planned, dtype: torch.dtype | None, prompts: int) -> tuple[dict, dict]:
    """Options of the model and of the generation as the plan has them; ValueError for flags that say otherwise."""
    model_options = run.model_options(args.model, dtype)
    options = run.generate_options(prompts, args.draft)
    if args.offload is not None:
        raise ValueError("--plan says what stays on the device: leave --offload out")
    given = {
        "--quantize": (args.quantize, model_options["quantize"]),
        "--num-draft-tokens": (args.num_draft_tokens, options.get("num_draft_tokens")),
    }
    for flag, (value, of_plan) in given.items():
        if value is not None and value != of_plan:
            raise ValueError(f"{flag} {value} contradicts the plan ({run.entry.label}): leave it out, or plan anew")
    return model_options, options


def describe(stats) -> str:
    """One line of statistics."""
    acceptance = "" if stats.acceptance is None else f", acceptance {stats.acceptance:.0%} in {stats.rounds} rounds"
    share = stats.communication_share
    communication = "" if share is None else f", {share:.0%} of the time in communication"
    streamed = ""
    if stats.streamed_bytes:
        streamed = f", {stats.streamed_bytes / stats.new_tokens / 1e6:.1f} MB streamed a token"
    if stats.link_utilisation is not None:
        streamed += f" at {stats.stream_gb_per_second:.1f} GB/s in {stats.link_utilisation:.0%} of the time"
    return f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{acceptance}{communication}{streamed}"
