"""Speculative generation over several rounds with a Markov target and draft, and the chi-square test of its law."""

from __future__ import annotations

import functools
import itertools
import os

import _verify_oracle as oracle
import torch

from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import verify
from fused_parallel.ops.verify_tree import verify_tree
from fused_parallel.reference import noise

MASTER_SEED = int(os.environ.get("TEST_SEED", 20240317))  # of the requests' noise
MODEL_SEED = 20240317  # of target and draft: fixed, since how visible a mistake is depends on them
ALPHA = 1e-6  # a right implementation fails once in 10**6 tests
FAMILY_ALPHA = 1e-4  # and one of the tests of each position fails once in 10**4 runs of all of them
LENGTH, VOCAB, K = 4, 3, 3

# root's children 0, 1, 2; node 0's 3, 4; node 1's 5; node 3's 6, 7
PARENTS = (-1, -1, -1, 0, 0, 1, 3, 3)


class Markov:
    """Target and draft whose next token depends on the last two: logits [V, V, V], the draft's leaning the wrong way.

    `options` (temperature, top_k, top_p, min_p) apply to the target. With `backwards` the draft's law is the target's
    over the vocabulary in reverse. With a `group` target and draft are this rank's shard, and p and q still whole.
    """

    def __init__(self, vocab, generator, device="cpu", backwards=False, group=None, **options):
        self.vocab, self.options = vocab, {"temperature": 0.8} | options
        shape = (vocab, vocab, vocab)
        self.target = torch.randn(shape, generator=generator)
        if backwards:
            self.draft = self.target.flip(-1) / self.options["temperature"]
        else:
            self.draft = 0.5 * torch.randn(shape, generator=generator) - 0.3 * self.target
        self.p = torch.zeros(shape, dtype=torch.float64)
        for a, b in itertools.product(range(vocab), repeat=2):
            law = oracle.Target(self.target[a, b].tolist(), **self.options)
            for token, p in law.p.items():
                self.p[a, b, token] = p
        self.q = torch.softmax(self.draft.double(), -1)
        self.sharding = {}
        if group:
            self.sharding = {"vocab_size": vocab, "vocab_group": group}
            self.target, self.draft = (x.chunk(group.size(), -1)[group.rank()] for x in (self.target, self.draft))
        self.target, self.draft = self.target.to(device), self.draft.to(device)

    def windows(self, length, width):
        """Law of each `width` (1 or 2) consecutive ones of the first `length` tokens, float64 [V ** width] each."""
        context = torch.zeros(self.vocab, self.vocab, dtype=torch.float64)
        context[0, 0] = 1
        out = []
        for _ in range(length - width + 1):
            after = context[..., None] * self.p
            out.append(after.sum((0, 1)) if width == 1 else torch.einsum("abt,bts->ts", after, self.p).flatten())
            context = after.sum(0)
        return out

    def joint(self, length):
        """Law of the first `length` tokens after the context (0, 0), float64 [V ** length]."""
        out = []
        for tokens in itertools.product(range(self.vocab), repeat=length):
            a, b, p = 0, 0, 1.0
            for t in tokens:
                p *= self.p[a, b, t].item()
                a, b = b, t
            out.append(p)
        return torch.tensor(out, dtype=torch.float64)


def shift(context, token):
    return torch.stack((context[:, 1], token), 1)


def chain_round(model, context, seed, step, k, method, full_q):
    """Draft k tokens (a fifth of the requests k - 1) and verify them.

    The point-mass draft proposes the draft's favourite, and for a third of the requests a token at random.
    """
    requests = torch.arange(context.shape[0], device=context.device)
    targets, drafts, tokens = [model.target[context[:, 0], context[:, 1]]], [], []
    for i in range(k):
        weights = model.draft[context[:, 0], context[:, 1]]
        token = sample(weights, seed=seed, step=step, temperature=1.0, position=i, **model.sharding)
        if not full_q:
            token = torch.where(requests % 3 == 0, token, weights.argmax(-1))
        context = shift(context, token)
        tokens.append(token)
        drafts.append(weights)
        targets.append(model.target[context[:, 0], context[:, 1]])
    ragged = torch.where(requests % 5 == 0, k - 1, k).int()
    return verify(
        torch.stack(targets, 1), torch.stack(tokens, 1), torch.stack(drafts, 1) if full_q else None, seed=seed,
        step=step, num_draft_tokens=ragged, method=method, **model.options, **model.sharding,
    )  # fmt: skip


def tree_round(model, context, seed, step, siblings, proposal):
    """Draft a tree and verify it; `proposal` is how siblings are chosen: "drawn" without replacement, or "top"."""
    nodes = len(PARENTS)
    contexts, rows, tokens = [context], [], [None] * nodes
    for parent in range(-1, nodes):
        children = [j for j in range(nodes) if PARENTS[j] == parent]
        if parent >= 0:
            contexts.append(shift(contexts[PARENTS[parent] + 1], tokens[parent]))
        weights = model.draft[contexts[-1][:, 0], contexts[-1][:, 1]]
        score = torch.log_softmax(weights.double(), -1)
        if proposal == "drawn":  # descending log-weight + Gumbel: one after the other, without replacement
            position = torch.full_like(seed, parent + 1)
            score = score + noise.gumbel(seed, step, position, "draft", 0, model.vocab)
        order = score.argsort(-1, descending=True)
        for rank, child in enumerate(children):
            tokens[child] = order[:, rank]
        rows.append(weights)
    targets = torch.stack([model.target[c[:, 0], c[:, 1]] for c in contexts], 1)
    draft = torch.stack([rows[p + 1] for p in PARENTS], 1) if siblings == "without_replacement" else None
    return verify_tree(
        targets, torch.stack(tokens, 1), torch.tensor(PARENTS, device=seed.device), draft, seed=seed, step=step,
        siblings=siblings, max_depth=3, **model.options,
    )  # fmt: skip


CHAINS = {
    f"{method}-{'full_q' if full_q else 'point_mass'}": functools.partial(
        chain_round, k=K, method=method, full_q=full_q
    )
    for method in ("rejection", "block")
    for full_q in (True, False)
}
TREES = {
    "tree-drawn": functools.partial(tree_round, siblings="without_replacement", proposal="drawn"),
    "tree-top": functools.partial(tree_round, siblings="deterministic", proposal="top"),
}
ROUNDS = CHAINS | TREES


def generate(model, play, requests, length, generator, key=lambda done, step: step):
    """`length` tokens of each request after the context (0, 0), by as many rounds as that takes.

    Returns (tokens [requests, length], the first round's num_accepted). `key` gives the noise's step from the tokens
    done so far and the round's number, both [requests].
    """
    seed = torch.randint(-(2**62), 2**62, (requests,), generator=generator).to(model.target.device)
    history = seed.new_zeros(requests, length + 2 + 8)
    done, first = torch.zeros_like(seed), None
    for number in range(length):
        context = torch.stack([history.gather(1, (done + i)[:, None])[:, 0] for i in (0, 1)], 1)
        result = play(model, context, seed, key(done, torch.full_like(done, number)))
        first = result.num_accepted if first is None else first
        for i in range(result.tokens.shape[1]):
            at = torch.where(result.tokens[:, i] >= 0, (done + 2 + i).clamp(max=history.shape[1] - 1), 0)
            history.scatter_(1, at[:, None], result.tokens[:, i : i + 1].clamp(min=0))
            history[:, :2] = 0
        done = (done + result.num_accepted + 1).clamp(max=length)
        if (done >= length).all():
            break
    return history[:, 2 : length + 2].cpu(), first.cpu()


def p_value(tokens, law):
    """Chi-square test that rows [n, length] follow `law` over all combinations; 0 if an impossible one occurs."""
    n, length = tokens.shape
    vocab = round(len(law) ** (1 / length))
    cell = torch.zeros(n, dtype=torch.int64)
    for i in range(length):
        cell = cell * vocab + tokens[:, i]
    counts = torch.bincount(cell, minlength=len(law)).double()
    possible = law > 0
    if counts[~possible].any():
        return 0.0
    expected = law[possible] * n
    # Rare cells are put together, so that the chi-square distribution holds.
    rare = expected < 10
    observed, expected = counts[possible], expected
    if rare.any():
        observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    chi2 = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, chi2 / 2).item()


def run(play, requests, vocab=VOCAB, key=lambda done, step: step, length=LENGTH, **options):
    """(p-value of the law of `length` tokens, model, how many each request accepted in its first round)."""
    print(f"TEST_SEED={MASTER_SEED}")
    model = Markov(vocab, torch.Generator().manual_seed(MODEL_SEED), **options)
    generator = torch.Generator().manual_seed(MASTER_SEED)
    tokens, first = generate(model, play, requests, length, generator, key)
    p = p_value(tokens, model.joint(length))
    print(f"p-value {p:.3g}, accepted in the first round {first.double().mean():.3f}")
    return p, model, first.double()


def run_positions(play, requests, group=None, key=lambda done, step: step, vocab=16, chunk=15_000):
    """Like `run` for a draft that is the target backwards: (p-value, tokens).

    The p-value is the least of those of every token's law and every two consecutive tokens', times their number. The
    requests go in chunks, which caches like and which tell `chain_round`'s kinds of requests apart as one batch does.
    """
    print(f"TEST_SEED={MASTER_SEED}")
    model = Markov(vocab, torch.Generator().manual_seed(MODEL_SEED), backwards=True, group=group)
    generator = torch.Generator().manual_seed(MASTER_SEED)
    sizes = [min(chunk, requests - begin) for begin in range(0, requests, chunk)]
    tokens = torch.cat([generate(model, play, n, LENGTH, generator, key)[0] for n in sizes])
    found = [
        p_value(tokens[:, i : i + width], law) for width in (1, 2) for i, law in enumerate(model.windows(LENGTH, width))
    ]
    print("p-values", *(f"{p:.3g}" for p in found))
    return min(found) * len(found), tokens


def acceptance(model, k, full_q, block):
    """P(at least i accepted), i = 1..k, by enumeration of the drafts: E of prod min(1, p / q), or of block's p_i."""
    out = []
    for length in range(1, k + 1):
        total = 0.0
        for tokens in itertools.product(range(model.vocab), repeat=length):
            a, b, drawn, kept = 0, 0, 1.0, 1.0
            for t in tokens:
                p, q = model.p[a, b, t].item(), model.q[a, b, t].item()
                drawn *= q
                kept = min(1.0, kept * p / q) if block else kept * min(1.0, p / q)
                a, b = b, t
            total += drawn * kept
        out.append(total)
    return out


def check_acceptance(model, first, method):
    """As many are accepted as the algorithm promises: refusing all and drawing from p would pass tests of the law."""
    full = first[torch.arange(len(first)) % 5 != 0]  # the others' drafts are shorter
    for i, rate in enumerate(acceptance(model, K, True, method == "block"), 1):
        measured = (full >= i).double().mean().item()
        assert abs(measured - rate) < 5 * (rate * (1 - rate) / len(full)) ** 0.5, (i, measured, rate)
