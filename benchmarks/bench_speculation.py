"""Speculative decoding through `fp.generate`, end to end on all ranks: what it yields against what its parts cost.

    torchrun --nproc-per-node 2 benchmarks/bench_speculation.py [--parallel tp pp] [--layers 20] [--batch 1 8 64]

Without torchrun it starts one rank a GPU. Target and draft are random, so their agreement means nothing: it is forced
to each `--acceptance` (fused_parallel/testing/acceptance.py), after all of the work of verifying has been done. By
default two minutes on two H100s: 20 of the 70B's layers, and a draft of two of the 8B's.
Rows, microseconds a new token of each sequence, whole runs of `--tokens` tokens by the clock, prefill left out:

    plain             without a draft; measured before and after the others of its batch
    chain             k drafted tokens a round
    adaptive          num_draft_tokens="auto", its learning included, captures left out. One run before it is not
                      counted: what lengths need at first use is no part of decoding
    predicted_only    what the parts below, each measured alone, predict for the chain's rounds, and for the adaptive's
    target_only, draft_only, verify_only
                      parts, microseconds a round: the target's pass of k + 1 tokens, k of the draft's, verification

A predicted round is target + draft + verify + what plain decoding takes beyond its pass and its verification (the
loop). Printed beside them: measured over predicted, adaptive over plain, and the share of verification in a target
pass, also of one with all of the model's layers (its head apart, a pass is proportional to them). `bytes` is 0: nothing
is moved by one operation.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import time

import torch
import torch.distributed as dist
from _common import Bench, captured, main, parser
from bench_decode_step import MODELS, _config, _fill

import fused_parallel as fp
from fused_parallel.speculative.adaptive import LENGTHS
from fused_parallel.speculative.round import Round
from fused_parallel.testing.acceptance import forced_acceptance
from fused_parallel.testing.timer import quantile

TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8)
TINY_VOCABULARY = 512
OP = "speculation"


def _shape(name: str, layers: int):
    if name != "tiny":
        return _config(name, layers)
    MODELS.setdefault("tiny", TINY)
    return dataclasses.replace(_config(name, layers), vocab_size=TINY_VOCABULARY)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Parts:
    """The parts of a round, each alone, on the state of a `Round` of random tokens."""

    def __init__(self, bench: Bench, target, draft, batch: int, k: int, arguments: argparse.Namespace) -> None:
        self.bench, self.k = bench, k
        device, context = bench.device, arguments.context
        temperature = torch.full((batch,), arguments.temperature, device=device)
        seed = torch.arange(batch, device=device)
        sampling = dict.fromkeys(("top_k", "top_p", "min_p"))
        about = {"seed": seed, "temperature": temperature, "sampling": sampling, "method": "rejection"}
        self.round = Round(target, draft if k else None, k, batch, context + 2 * k + 2, **about)
        ids = torch.randint(target.config.vocab_size, (batch, context), device=device)
        dist.broadcast(ids, 0, group=bench.pg)
        self.round.prefill(ids, torch.full((batch,), context, dtype=torch.int32, device=device))
        self.weights = self.round.propose()
        if k:
            self.round.share(self.round.drafts)
        at = self.round.cache.lens.long().unsqueeze(1)
        self.fed = torch.cat((self.round.history.gather(1, at), self.round.drafts[:, :k]), 1)
        self.logits = target(self.fed, self.round.cache)
        self.verdict = self.round._judge(self.logits, self.round.drafts[:, :k], self.weights)

    def target(self) -> None:
        """A pass, and the word of the last stage, without which the others would run ahead."""
        self.round.model(self.fed, self.round.cache)
        if self.round.pp.size() > 1:
            self.round.share(self.verdict)

    def draft(self) -> None:
        r = self.round
        if r.drafter is not None:
            options = {"seed": r.seed, "step": r.step, "temperature": r.temperature, "greedy": r.greedy}
            r.drafter.propose(r.history, r.cache.lens, self.k, missed=0, **options)
        r.share(r.drafts)

    def verify(self) -> None:
        self.round._judge(self.logits, self.round.drafts[:, : self.k], self.weights)

    def head(self) -> None:
        if self.round.is_last:
            hidden = self.round.model.config.hidden_size
            x = torch.ones(*self.fed.shape, hidden, device=self.bench.device, dtype=self.bench.dtype)
            self.round.model.lm_head(x)

    def time(self, name: str, graph: bool, rounds: int, calls: int = 1) -> float:
        """Microseconds of the slowest rank, waited for as the loop waits after each round."""
        fn = getattr(self, name)
        fn()
        step = captured(fn) if graph else fn
        times = []
        for _ in range(rounds):
            _sync(self.bench.device)
            dist.barrier(group=self.bench.pg)
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            _sync(self.bench.device)
            times.append(1e6 * (time.perf_counter() - begin) / calls)
        return max(self.bench.everyone(quantile(times, 0.5)))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Microseconds of one length's parts."""

    target: float
    draft: float
    verify: float
    head: float

    @property
    def round(self) -> float:
        return self.target + self.draft + self.verify


class Case:
    """One model on one mesh, at one batch."""

    def __init__(self, bench: Bench, target, draft, parallel: str, batch: int, arguments: argparse.Namespace) -> None:
        self.bench, self.target, self.draft, self.arguments = bench, target, draft, arguments
        self.shape = {"model": arguments.name, "parallel": f"{parallel}{bench.world}", "batch": batch}
        generator = torch.Generator().manual_seed(batch)
        size = (batch, arguments.context)
        self.prompts = torch.randint(target.config.vocab_size, size, generator=generator).tolist()
        self.loop: dict[str, float] = {}  # mode -> microseconds of a plain round that are neither pass nor verification
        self.plain: dict[str, list[float]] = {}  # mode -> microseconds a token

    def generate(self, k: int | str, mode: str, tokens: int):
        options = {"draft": self.draft, "num_draft_tokens": k} if k else {}
        options |= {"temperature": self.arguments.temperature, "cuda_graph": mode == "graph", "eos_token_id": []}
        return fp.generate(self.target, self.prompts, tokens, **options).stats

    def us_a_token(self, stats) -> float:
        return 1e6 * stats.decode_seconds / (self.arguments.tokens - 1)

    def write(self, impl: str, mode: str, us: list[float], k: int | str, acceptance: float | str) -> float:
        shape = self.shape | {"k": k, "acceptance": acceptance}
        return self.bench.record(OP, impl, mode, us, shape=shape, bytes=0).us_p50

    def costs(self, k: int, mode: str) -> Costs:
        parts = Parts(self.bench, self.target, self.draft, self.shape["batch"], k, self.arguments)
        graph, rounds = mode == "graph", self.arguments.repeats
        found = Costs(
            target=parts.time("target", graph, rounds),
            draft=parts.time("draft", graph, rounds) if k else 0.0,
            verify=parts.time("verify", graph, rounds, calls=10),
            head=parts.time("head", graph, rounds, calls=10),
        )
        for name in ("target", "draft", "verify") if k else ("target", "verify"):
            self.write(f"{name}_only", mode, [getattr(found, name)], k, "any")
        whole = found.head + (found.target - found.head) * self.arguments.all_layers / self.arguments.layers
        self.bench.say(
            f"  verification of k = {k} takes {found.verify / found.target:.2%} of a target pass of "
            f"{found.target:.0f} us, {found.verify / whole:.2%} of one of {self.arguments.all_layers} layers "
            f"({whole:.0f} us)"
        )
        return found

    def run_plain(self, mode: str) -> None:
        us = self.us_a_token(self.generate(0, mode, self.arguments.tokens))
        self.plain.setdefault(mode, []).append(max(self.bench.everyone(us)))

    def predict(self, stats, of: dict[int, Costs], mode: str) -> float:
        """Microseconds a token of these rounds; lengths that were not measured are between their neighbours."""
        total = sum(count * (_between(of, k) + self.loop[mode]) for k, count in stats.rounds_by_length.items())
        return total / (self.arguments.tokens - 1)

    def run(self, mode: str) -> None:
        arguments, say = self.arguments, self.bench.say
        lengths = sorted({0, 1, *arguments.k, LENGTHS[-1]})
        for k in sorted({*LENGTHS, *lengths} if mode == "eager" else lengths):  # what is made at first use
            self.generate(k, mode, k + 3)
        with forced_acceptance(arguments.acceptance[0], seed=arguments.seed):
            self.generate("auto", mode, arguments.tokens)
        of = {k: self.costs(k, mode) for k in lengths}
        self.run_plain(mode)
        self.loop[mode] = max(0.0, self.plain[mode][0] - of[0].round)  # below: noise of a busy machine
        say(f"  the loop around a plain round takes {self.loop[mode]:.0f} us")
        adaptive: dict[float, float] = {}
        for acceptance in arguments.acceptance:
            with forced_acceptance(acceptance, seed=arguments.seed):
                for k in (*arguments.k, "auto"):
                    stats = self.generate(k, mode, arguments.tokens)
                    impl = "adaptive" if k == "auto" else "chain"
                    us = self.write(impl, mode, [self.us_a_token(stats)], k, acceptance)
                    predicted = self.write("predicted_only", mode, [self.predict(stats, of, mode)], k, acceptance)
                    say(
                        f"  measured / predicted {us / predicted:.3f}; {self.shape['batch'] * 1e6 / us:.1f} tokens/s, "
                        f"{arguments.tokens / (stats.rounds + 1):.2f} tokens a round, lengths {stats.rounds_by_length}"
                    )
                    if k == "auto":
                        adaptive[acceptance] = us
        self.run_plain(mode)
        plain = self.write("plain", mode, self.plain[mode], 0, "any")
        for acceptance, us in adaptive.items():
            say(f"  adaptive at acceptance {acceptance}: {plain / us:.3f} of plain decoding's tokens/s")


def _between(of: dict[int, Costs], k: int) -> float:
    """The parts of a round of length k, together."""
    if k in of:
        return of[k].round
    below, above = max(x for x in of if x < k), min(x for x in of if x > k)
    share = (k - below) / (above - below)
    return of[below].round * (1 - share) + of[above].round * share


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    if arguments.model is None:
        arguments.model = "llama-3-70b" if bench.device.type == "cuda" else "tiny"
    tiny = arguments.model == "tiny"
    config = _shape(arguments.model, arguments.layers)
    arguments.name = f"{arguments.model}:{arguments.layers}"
    arguments.all_layers = (TINY if tiny else MODELS[arguments.model])["num_hidden_layers"]
    with torch.no_grad():
        draft = fp.LlamaForCausalLM(
            _shape("tiny" if tiny else "llama-3-8b", arguments.draft_layers),
            mesh=None,
            device=bench.device,
            dtype=bench.dtype,
        )
        _fill(draft, 1000)  # alike on all ranks, each of which runs the whole
        for parallel in arguments.parallel:
            mesh = fp.init(**{parallel: bench.world}, device=bench.device.type, timeout=120)
            target = fp.LlamaForCausalLM(config, mesh=mesh, dtype=bench.dtype)
            _fill(target, bench.pg.rank())
            bench.say(f"{arguments.name} on {parallel} = {bench.world}")
            for batch in arguments.batch:
                case = Case(bench, target, draft, parallel, batch, arguments)
                for mode in bench.modes:
                    bench.attempt(f"{parallel} batch {batch} {mode}", functools.partial(case.run, mode))
            del case, target
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--model", choices=(*MODELS, "tiny"), help="default llama-3-70b; with --device cpu tiny")
    p.add_argument("--layers", type=int, default=20, help="of the target")
    p.add_argument("--draft-layers", type=int, default=2, help="of a draft with the 8B's sizes")
    p.add_argument("--parallel", choices=("tp", "pp"), nargs="+", default=("tp", "pp"))
    p.add_argument("--batch", type=int, nargs="+", default=(1, 8, 64))
    p.add_argument("--k", type=int, nargs="+", default=(4,), help="drafted tokens of the rounds of fixed length")
    p.add_argument("--acceptance", type=float, nargs="+", default=(0.0, 0.5, 0.8, 0.95))
    p.add_argument("--tokens", type=int, default=160, help="new tokens of each sequence")
    p.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    p.add_argument("--temperature", type=float, default=1.0, help="above 0 verification reads the draft's logits, too")
    p.add_argument("--repeats", type=int, default=10, help="measurements of each part")
    p.add_argument("--seed", type=int, default=0, help="of the forced acceptance")
    main(run, p)
