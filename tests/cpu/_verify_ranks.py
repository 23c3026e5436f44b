"""Functions that ranks run in test_verify_sharded.py and _statistics.py (they must be importable by name)."""

from __future__ import annotations

import _verify_cases as cases
import _verify_rounds as rounds
import torch
import torch.distributed as dist

from fused_parallel.comm.collectives import CommunicationTimer
from fused_parallel.nn.speculative_verifier import SpeculativeVerifier
from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import verify
from fused_parallel.ops.verify_tree import verify_tree

_groups: dict = {}


def group_of(ranks):
    """The group of the first `ranks` ranks (None on the others), made once."""
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(range(ranks)))
    return _groups[ranks] if dist.get_rank() < ranks else None


def part(logits, world, rank, vocab):
    """A rank's equal share of [..., vocab], the last ones filled up with what must not matter."""
    if logits is None:
        return None
    width = -(-vocab // world)
    padding = torch.full((*logits.shape[:-1], width * world - vocab), 30.0, dtype=logits.dtype)
    padding[..., ::2] = float("nan")
    return torch.cat((logits[..., :vocab], padding), -1)[..., rank * width : (rank + 1) * width]


def share(case, world, rank, vocab):
    """A rank's arguments of a sharded call, for a case over the whole vocabulary."""
    shards = {name: part(case[name], world, rank, vocab) for name in ("target_logits", "draft_logits")}
    return case | shards | {"vocab_size": vocab}


def compare(mesh, seed, vocab):
    """verify, verify_tree and sample over 1 to 4 shards; per call and number of shards the outputs on this rank."""
    torch.manual_seed(seed)
    rank, out = dist.get_rank(), {}
    for full_q in (True, False):
        case = cases.case(24, 3, vocab, full_q=full_q)
        unfiltered = {name: value for name, value in case.items() if name not in ("top_k", "top_p", "min_p")}
        tree = case | {"parents": torch.tensor([-1, -1, 0])}
        tree["siblings"] = "without_replacement" if full_q else "deterministic"
        row = {name: case[name] for name in ("seed", "step", "temperature", "top_k", "top_p", "min_p")}
        for world in (0, 1, 2, 3, 4):  # 0: without a group
            group = group_of(world) if world else None
            if world and group is None:
                continue

            def shared(arguments, world=world, group=group):
                if not world:
                    return arguments | {"vocab_size": vocab}
                return share(arguments, world, rank, vocab) | {"vocab_group": group}

            for method in ("rejection", "block", "greedy"):
                for name, arguments in (("filtered", case), ("plain", unfiltered)):
                    result = verify(**shared(arguments), method=method, return_logprobs=True)
                    out[method, name, full_q, world] = result[:3]
            out["tree", full_q, world] = verify_tree(**shared(tree), return_logprobs=True)
            arguments = shared(case)
            logits = arguments["target_logits"][:, 0]
            rest = {name: arguments[name] for name in ("vocab_size", "vocab_group") if name in arguments}
            out["sample", full_q, world] = (sample(logits, **row, **rest),)
    return out


def traffic(mesh, vocab):
    """(calls, bytes) of the collectives of one round, by method and filter."""
    torch.manual_seed(0)
    group, out = mesh["tp"], {}
    case = cases.case(8, 2, vocab, filters=False)
    case = share(case, 2, dist.get_rank(), vocab) | {"vocab_group": group}
    for method in ("rejection", "block", "greedy"):
        for name, options in (
            ("none", {}),
            ("min_p", {"min_p": 0.1}),
            ("top_k", {"top_k": 3}),
            ("top_p", {"top_p": 0.9}),
        ):
            with CommunicationTimer() as timer:
                verify(**case, **options, method=method)
            out[method, name] = (timer.calls, timer.bytes)
    return out


def module(mesh, seed):
    """SpeculativeVerifier on the mesh, eager and compiled, and without shards."""
    torch.manual_seed(seed)
    case = cases.case(12, 3, 21)
    whole = SpeculativeVerifier("block")(**case)
    case = share(case, 2, dist.get_rank(), 21)
    vocab_size = case.pop("vocab_size")
    verifier = SpeculativeVerifier("block", vocab_size, mesh["tp"])
    compiled = torch.compile(lambda **arguments: verifier(**arguments).tokens + 1, fullgraph=True, backend="aot_eager")
    return whole.tokens, verifier(**case).tokens, compiled(**case) - 1


def bad_vocab_size(mesh):
    """The message of a vocab_size beyond the shards."""
    zeros = torch.zeros(1, dtype=torch.int64)
    try:
        verify(
            torch.zeros(1, 1, 4), zeros[:, None][:, :0], seed=zeros, step=zeros, temperature=1.0, vocab_size=9,
            vocab_group=mesh["tp"],
        )  # fmt: skip
    except ValueError as error:
        return str(error)


def positions(mesh, name, requests):
    """The p-value of every position over shards, and a checksum of the tokens."""
    p, tokens = rounds.run_positions(rounds.CHAINS[name], requests, group=mesh["tp"].get_group())
    return p, hash(tuple(tokens.flatten().tolist()))
