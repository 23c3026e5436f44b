"""Sampling and verification again, in plain Python on lists of probabilities: shares no code with the library."""

from __future__ import annotations

import math
from fractions import Fraction

MASK = 2**32 - 1
STREAM = {"draft": 0, "accept": 1, "residual": 2}


def philox(counter, key):
    """Philox4x32-10 on lists of 32-bit integers, as in the paper's Figure 4."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def words(seed, stream, position, step, block):
    seed %= 2**64
    return philox((block, position, step & MASK, STREAM[stream] << 30 | (step >> 32)), (seed & MASK, seed >> 32))


def unit(x):
    """The float64 nearest to (x + 1/2) / 2**64, below 1."""
    return min(float(Fraction(2 * x + 1, 2**65)), 1 - 2**-53)


def uniform(seed, stream, position, step):
    low, high, _, _ = words(seed, stream, position, step, 0)
    return unit(high << 32 | low)


def gumbel(seed, stream, position, step, token):
    low, high = words(seed, stream, position, step, token // 2)[2 * (token % 2) :][:2]
    halves = [half for w in words(seed, stream, position, step, 2**31 + token // 8) for half in (w & 0xFFFF, w >> 16)]
    return -math.log(-math.log1p(-unit(halves[token % 8] << 48 | (high << 32 | low) >> 16)))


def clean(logits, vocab_size):
    out = []
    for token, value in enumerate(logits[:vocab_size]):
        if math.isnan(value) or value == -math.inf:
            continue
        out.append((token, 3.4028234663852886e38 if value == math.inf else value))
    return out  # (token, logit) of the tokens that can be drawn


def softmax(pairs):
    """{token: probability} from (token, logit) pairs."""
    top = max((logit for _, logit in pairs), default=0.0)
    weights = {token: math.exp(logit - top) for token, logit in pairs}
    total = math.fsum(weights.values())
    return {token: w / total for token, w in weights.items()}


class Target:
    """The target distribution of one row: `p` is what is sampled, `report` what logprobs are taken from."""

    def __init__(self, logits, temperature, top_k=0, top_p=0.0, min_p=0.0, vocab_size=None):
        pairs = clean(logits, len(logits) if vocab_size is None else vocab_size)
        self.greedy = not temperature > 0
        if self.greedy:
            top = max((logit for _, logit in pairs), default=0.0)
            self.p = {min((t for t, logit in pairs if logit == top), default=0): 1.0}
            self.report = softmax(pairs)
            return
        pairs = [(token, logit / temperature) for token, logit in pairs]
        if top_k > 0 and pairs:
            least = sorted((logit for _, logit in pairs), reverse=True)[: int(top_k)][-1]
            pairs = [(token, logit) for token, logit in pairs if logit >= least]
        if 0 < top_p < 1 and pairs:
            p, mass, least = softmax(pairs), 0.0, None
            for token, logit in sorted(pairs, key=lambda pair: -pair[1]):
                if mass < top_p:
                    least, mass = logit, mass + p[token]
            pairs = [(token, logit) for token, logit in pairs if logit >= least]
        if min_p > 0 and pairs:
            p = softmax(pairs)
            pairs = [(token, logit) for token, logit in pairs if p[token] >= min(min_p, 1) * max(p.values())]
        self.p = self.report = softmax(pairs)


def draw(weights, greedy, seed, step, position, stream):
    """argmax of log weight + Gumbel; 0 where there is no weight at all."""
    best, chosen = -math.inf, 0
    for token in sorted(weights):
        if weights[token] > 0:
            score = math.log(weights[token]) + (0.0 if greedy else gumbel(seed, stream, position, step, token))
            if score > best:
                best, chosen = score, token
    return chosen


def minus(p, q, scale=1.0):
    """max(scale p - q, 0)."""
    return {t: max(scale * p[t] - q.get(t, 0.0), 0.0) for t in p}


def draft_law(row, token, vocab_size):
    return {token: 1.0} if row is None else softmax(clean(row, vocab_size))


def log(x):
    return math.log(x) if x > 0 else -math.inf


def verify(targets, drafts, draft_rows, seed, step, method, vocab_size):
    """(tokens, number accepted, log-probabilities) of one request; `drafts` is already cut to its length."""
    q = [draft_law(row, x, vocab_size) for row, x in zip(draft_rows, drafts, strict=True)]
    usable = 0
    while usable < len(drafts):
        x = drafts[usable]
        if not (0 <= x < vocab_size and (targets[usable].greedy or q[usable].get(x, 0) > 0)):
            break
        usable += 1
    p = [t.p for t in targets]
    u = [uniform(seed, "accept", i, step) for i in range(usable)]
    if targets[0].greedy:
        accepted = 0
        while accepted < usable and drafts[accepted] in p[accepted]:
            accepted += 1
        rest = p[accepted]
    elif method == "rejection":
        accepted, scale = 0, 1.0
        while accepted < usable:
            x = drafts[accepted]
            if not u[accepted] * q[accepted][x] < p[accepted].get(x, 0.0):
                break
            accepted += 1
        rest = minus(p[accepted], q[accepted]) if accepted < usable else p[accepted]
    else:
        accepted, scale, rest = 0, 1.0, None
        running = 1.0
        for i in range(1, usable + 1):
            x = drafts[i - 1]
            running = min(1.0, running * p[i - 1].get(x, 0.0) / q[i - 1][x])
            if i == usable:
                h = running
            else:
                z = math.fsum(minus(p[i], q[i], running).values())
                h = 1.0 if running == 1.0 else z / (z + 1 - running)
            if u[i - 1] < h:
                accepted, scale = i, running
        rest = minus(p[accepted], q[accepted], scale) if accepted < usable else p[accepted]
    if not any(w > 0 for w in rest.values()):
        rest = p[accepted]
    last = draw(rest, targets[0].greedy, seed, step, accepted, "residual")
    tokens = [*drafts[:accepted], last]
    return tokens, accepted, [log(t.report.get(x, 0.0)) for t, x in zip(targets, tokens, strict=False)]


def verify_tree(targets, drafts, parents, draft_rows, seed, step, vocab_size, max_depth):
    """(tokens, path, log-probabilities) of one request; draft_rows None: deterministic siblings."""
    node, path = -1, []
    while True:
        p = dict(targets[node + 1].p)
        q = None
        chosen = None
        for child, x in enumerate(drafts):
            if parents[child] != node or child <= node or not 0 <= x < vocab_size or len(path) == max_depth:
                continue
            if draft_rows is not None and not targets[0].greedy:
                q = draft_law(draft_rows[child], x, vocab_size) if q is None else q
                if q.get(x, 0.0) <= 0:
                    continue
                accept = uniform(seed, "accept", child, step) * q[x] < p.get(x, 0.0)
                left = minus(p, q)
                others = {t: w for t, w in q.items() if t != x}
                total = math.fsum(others.values())
                q_left = {t: w / total for t, w in others.items()} if total > 0 else {}
            else:
                accept = uniform(seed, "accept", child, step) < p.get(x, 0.0)
                left, q_left = {t: w for t, w in p.items() if t != x}, q
            if accept:
                chosen = child
                break
            total = math.fsum(left.values())
            p = {t: w / total for t, w in left.items()} if total > 0 else p
            q = q_left
        if chosen is None:
            break
        node = chosen
        path.append(chosen)
    last = draw(p, targets[0].greedy, seed, step, len(path), "residual")
    tokens = [*(drafts[n] for n in path), last]
    rows = [0, *(n + 1 for n in path)]
    return tokens, path, [log(targets[r].report.get(x, 0.0)) for r, x in zip(rows, tokens, strict=True)]
