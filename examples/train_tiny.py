"""Train a byte-level Llama target and a draft for it on the Python standard library's sources.

    python3 examples/train_tiny.py                       # the pair in examples/assets, on a GPU if there is one
    python3 examples/train_tiny.py --minutes 6.5         # fewer steps, so that training ends within 6.5 minutes
    python3 examples/train_tiny.py --size large --minutes 2 --out /tmp/pair      # 300M and 9M, for examples/offload.py
    python3 examples/train_tiny.py --size smoke --out /tmp/pair --device cpu     # seconds; the models are useless

Writes Hugging Face-format directories `<out>/<size>-target` and `<out>/<size>-draft`. The target learns the next byte.
The draft is distilled from the target: speculative decoding accepts a drafted token when the two agree, so it learns
the target's distribution and its first choice, half on corpus text and half on the target's own greedy continuations,
which are what it will meet. The same machine kind, seed and steps give the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: bitwise repeatable matmuls

import torch
import torch.nn.functional as F
from _corpus import held_out_prompts, load_corpus, pack
from _pair import (
    DRAFT_TOKENS,
    Shape,
    acceptance,
    bits_per_byte,
    build_model,
    disk_bytes,
    greedy,
    load_model,
    logits_of,
    next_byte_loss,
    save_model,
)
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

SAMPLE_PROMPTS = ("def fibonacci(n):\n", "class Stack:\n    def __init__(self")


@dataclass(frozen=True)
class Preset:
    """A pair and how it is trained. `context` and `draft_context` are bytes, `batch` and `draft_batch` sequences."""

    target: Shape
    draft: Shape
    context: int
    batch: int
    steps: int
    lr: float
    draft_context: int
    draft_batch: int
    draft_steps: int
    draft_lr: float
    rollouts: int  # greedy continuations of the target that the draft trains on
    warmup: int
    prompts: int  # held-out prompts in the acceptance figure
    saves: int = 10  # while each model trains
    reports: int = 10  # and lines that say how it does
    by_layer: bool = False  # compile a layer, once for all of them, instead of the whole: slower steps, begun sooner
    dropout: float = 0.0  # on the target's residual branches: the corpus is read many times over


# Target heads divide by 2 and 4 (tensor parallel), layers by 2 and 3 (pipeline). The draft is shallow and wide because
# it runs k times a round; its heads * head_dim differs from its hidden size, and its embedding is tied, so that a
# loader meets both cases.
PRESETS = {
    "smoke": Preset(
        target=Shape(64, 96, 2, 4, 2, 16, tied=False), draft=Shape(32, 48, 1, 2, 1, 16, tied=True),
        context=64, batch=8, steps=30, lr=3e-3, draft_context=64, draft_batch=8, draft_steps=20, draft_lr=3e-3,
        rollouts=8, warmup=5, prompts=8,
    ),
    "tiny": Preset(
        target=Shape(256, 576, 6, 8, 4, 32, tied=False), draft=Shape(192, 256, 2, 4, 2, 32, tied=True),
        context=1024, batch=64, steps=3000, lr=2.5e-3,
        draft_context=512, draft_batch=128, draft_steps=9000, draft_lr=3e-3,
        rollouts=16384, warmup=200, prompts=512, dropout=0.1,
    ),
    "small": Preset(
        target=Shape(512, 1408, 12, 8, 4, 64, tied=False), draft=Shape(256, 576, 3, 8, 4, 32, tied=True),
        context=1024, batch=64, steps=10000, lr=1.2e-3,
        draft_context=512, draft_batch=128, draft_steps=8000, draft_lr=2.5e-3,
        rollouts=16384, warmup=400, prompts=512, dropout=0.1,
    ),
    # 300M and 9M parameters: for examples/offload.py, where a pass over the target must cost something. For one H100
    # with --minutes 2, of which compiling all layers in one would take half.
    "large": Preset(
        target=Shape(1536, 4096, 12, 12, 4, 128, tied=False), draft=Shape(512, 1408, 3, 8, 4, 64, tied=True),
        context=1024, batch=32, steps=4000, lr=8e-4,
        draft_context=512, draft_batch=128, draft_steps=4000, draft_lr=2e-3,
        rollouts=512, warmup=60, prompts=64, saves=1, reports=4, by_layer=True,
    ),
}  # fmt: skip


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """KL(target || draft) plus cross-entropy on the target's first choice: the second is greedy agreement itself."""
    with torch.no_grad():
        target_logits = logits_of(target, tokens).float().flatten(0, 1)
    draft_log_probs = logits_of(draft, tokens).float().log_softmax(-1).flatten(0, 1)
    kl = F.kl_div(draft_log_probs, target_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    return kl + 0.5 * F.nll_loss(draft_log_probs, target_logits.argmax(-1))


def random_windows(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [count, length] on the device of `text` (uint8), starting anywhere; the offsets are drawn on the CPU."""
    starts = torch.randint(text.numel() - length + 1, (count, 1), generator=generator).to(text.device)
    return text[starts + torch.arange(length, device=text.device)].long()


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine to nearly zero. During the warm-up `steps` plays no part (see `train`)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    name, model, loss_of, next_batch, report, *, steps, lr, warmup, directory, saves, reports, by_layer, deadline=None
) -> int:
    """Minimise `loss_of(next_batch())` over the model's parameters; returns the number of steps taken.

    With `deadline` (time.monotonic seconds) the steps are cut, once their pace is known and still within the warm-up,
    to what fits: the run then equals one given that number with --steps / --draft-steps. Reports and saves as often as
    asked. On a GPU the loss is compiled, or only the layers of the models in `by_layer`.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=on_gpu)
    directory.mkdir(parents=True, exist_ok=True)

    def backward(loss_fn, batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = loss_fn(batch)
        loss.backward()
        return loss

    def tell() -> str:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # other shapes: not worth compiling for
            text = report()
        model.train()
        return text

    model.train()
    step_loss = loss_of
    layers = [layer for one in by_layer for layer in one.model.layers]
    if on_gpu:  # these models are small enough that unfused kernels and their launches would dominate
        if layers:
            for layer in layers:
                layer.compile(dynamic=False)  # the graphs are shared, but for what is trained and what is not
        else:
            step_loss = torch.compile(loss_of)
        try:
            backward(step_loss, next_batch.example())
        except Exception as error:  # any compiler failure leaves the slow path, which is correct
            print(f"{name}: torch.compile failed, training without it: {type(error).__name__}: {error}", flush=True)
            step_loss = loss_of
            for layer in layers:
                layer._compiled_call_impl = None
        optimizer.zero_grad(set_to_none=True)

    started = pace_from = time.monotonic()
    for step in range(10**9):
        if deadline and (step == 5 or (step > 5 and step % 5 == 0)):
            if on_gpu:
                torch.cuda.synchronize()
            now = time.monotonic()
            if step == 5:
                pace_from = now
            elif now - pace_from > 3 or step + 5 >= warmup:
                tell()
                telling = reports * (time.monotonic() - now)
                fitting = step + int((deadline - now - telling) / ((now - pace_from) / (step - 5)))
                steps, deadline = max(step + 1, min(steps, fitting)), None
                print(f"{name}: {steps} steps fit the time given", flush=True)
        if step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, lr)
        loss = backward(step_loss, next_batch())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // reports) == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            print(f"{name}: step {step + 1}/{steps}  loss {loss.item():.4f}  {tell()}  {seconds:.1f} s", flush=True)
            if (step + 1) % max(1, steps // saves) == 0 or step + 1 == steps:
                save_model(model, directory)
    model.eval()
    return steps


class Batches:
    """Calling it gives the next int64 batch [sequences, length]: corpus windows, half of them `rollouts` if given."""

    def __init__(self, text, count, length, seed, rollouts=None):
        self.text, self.count, self.length, self.rollouts = text, count, length, rollouts
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self):
        own = 0 if self.rollouts is None else self.count // 2
        batch = random_windows(self.text, self.count - own, self.length, self.generator)
        if own:
            rows = torch.randint(len(self.rollouts), (own,), generator=self.generator).to(self.text.device)
            batch = torch.cat([batch, self.rollouts[rows].long()])
        return batch

    def example(self):
        """A batch of the right shape that leaves the random state alone."""
        return torch.zeros(self.count, self.length, dtype=torch.int64, device=self.text.device)


def add_residual_dropout(model: LlamaForCausalLM, probability: float) -> None:
    def drop(module, inputs, output):
        return F.dropout(output, probability, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def evaluate(target_dir: Path, draft_dir: Path, preset: Preset, held_out: list[bytes], device: torch.device) -> None:
    """Print what the stored pair does on the held-out files, in fp32."""
    pair = {"target": (target_dir, load_model(target_dir, device)), "draft": (draft_dir, load_model(draft_dir, device))}
    text = pack(held_out).to(device)
    length = preset.context + 1
    windows = text[: text.numel() // length * length].view(-1, length).long()
    if device.type == "cpu":
        windows = windows[:: max(1, len(windows) // 32)]
    for role, (directory, model) in pair.items():
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{role}: {parameters} parameters, {disk_bytes(directory)} bytes on disk, "
            f"held-out {bits_per_byte(model, windows):.4f} bits per byte ({directory})"
        )
    target, draft = pair["target"][1], pair["draft"][1]
    count = min(preset.prompts, 32) if device.type == "cpu" else preset.prompts
    prompts = held_out_prompts(held_out, count, 256).to(device)
    rate = acceptance(target, draft, prompts)
    print(f"mean accepted / k at k={DRAFT_TOKENS}, greedy, {count} held-out prompts: {rate:.4f}")
    for prompt in SAMPLE_PROMPTS:
        tokens = torch.tensor([list(prompt.encode())], device=device)
        continuation = bytes(greedy(target, tokens, 300)[0].tolist()).decode(errors="replace")
        print(f"--- {prompt!r} continued greedily:\n{prompt}{continuation}\n---")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=PRESETS, default="tiny", help="which pair (default: tiny)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets", help="where the directories go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of the target (default: the size's)")
    parser.add_argument("--draft-steps", type=int, help="steps of the draft (default: the size's)")
    parser.add_argument(
        "--minutes", type=float, help="cut both so that training ends in about this time, compiling included"
    )
    parser.add_argument("--batch", type=int, help="sequences a step, for both (default: the size's)")
    parser.add_argument("--target", type=Path, help="train only a draft, for the trained target in this directory")
    args = parser.parse_args(argv)
    for name in ("steps", "draft_steps", "minutes", "batch"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    return args


def main(argv=None) -> None:
    args = parse_arguments(argv)
    preset, device, started = PRESETS[args.size], torch.device(args.device), time.monotonic()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every output
    transformers_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    documents, held_out = load_corpus()
    text = pack(documents).to(device)
    print(f"{len(documents)} files ({text.numel()} bytes) to train on, {len(held_out)} held out", flush=True)
    watched = held_out_prompts(held_out, 64 if device.type == "cuda" else 4, preset.draft_context).to(device)

    target_dir, draft_dir = args.target, args.out / f"{args.size}-draft"
    if target_dir is None:
        target_dir = args.out / f"{args.size}-target"
        target = build_model(preset.target).to(device)
        if preset.dropout:
            add_residual_dropout(target, preset.dropout)
        taken = train(
            "target",
            target,
            lambda tokens: next_byte_loss(target, tokens),
            Batches(text, args.batch or preset.batch, preset.context + 1, args.seed + 1),
            lambda: f"held-out {bits_per_byte(target, watched):.4f} bits per byte",
            steps=args.steps or preset.steps,
            lr=preset.lr,
            warmup=preset.warmup,
            directory=target_dir,
            saves=preset.saves,
            reports=preset.reports,
            by_layer=[target] if preset.by_layer else [],
            deadline=args.minutes and started + 60 * args.minutes * 0.5,
        )
        print(f"target: took {taken} steps, batch {args.batch or preset.batch}", flush=True)

    # The teacher is the model as stored, rounding included: the draft has to agree with that one.
    teacher = load_model(target_dir, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    generator = torch.Generator().manual_seed(args.seed + 2)
    half = preset.draft_context // 2
    prompts = random_windows(text, min(preset.rollouts, 64 * (args.batch or preset.rollouts)), half, generator)
    rollouts = torch.cat([torch.cat([p, greedy(teacher, p, half)], 1).to(torch.uint8) for p in prompts.split(4096)])
    print(f"target: continued {len(rollouts)} prompts by {half} bytes, {time.monotonic() - started:.1f} s", flush=True)

    draft = build_model(preset.draft).to(device)
    probe = held_out_prompts(held_out, 64 if device.type == "cuda" else 4, 256).to(device)
    taken = train(
        "draft",
        draft,
        lambda tokens: distillation_loss(draft, teacher, tokens),
        Batches(text, args.batch or preset.draft_batch, preset.draft_context, args.seed + 3, rollouts),
        lambda: f"held-out acceptance {acceptance(teacher, draft, probe, 64):.4f}",
        steps=args.draft_steps or preset.draft_steps,
        lr=preset.draft_lr,
        warmup=preset.warmup,
        directory=draft_dir,
        saves=preset.saves,
        reports=preset.reports,
        by_layer=[draft, teacher] if preset.by_layer else [],
        deadline=args.minutes and started + 60 * args.minutes,
    )
    print(f"draft: took {taken} steps, batch {args.batch or preset.draft_batch}", flush=True)
    evaluate(target_dir, draft_dir, preset, held_out, device)
    print(f"{time.monotonic() - started:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
