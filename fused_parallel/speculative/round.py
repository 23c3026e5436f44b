"""One round of generation on the device: draft k tokens, run the model on them, verify, move on.

Nothing in a round waits for the host and all its state lies in tensors that keep their place, so that a round can be
captured in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import ops
from ..comm import collectives
from ..nn.linear import gather_last
from .draft import ModelDraft, NgramDraft
from .tree import PlacedTree, Tree

MOST_GRAPHS = 32  # of a Round: lengths and trees chosen while running, each also after a round without a draft


class Snapshot:
    """A small tensor on its way to the host."""

    def __init__(self, x: torch.Tensor) -> None:
        self._event = None
        if not x.is_cuda:
            self._copy = x.clone()
            return
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._copy.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list:
        """Waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


def graph_of(work: Callable[[], None], pool=None) -> Callable[[], None]:
    """A replay of `work`, which has run before, in a CUDA graph; `pool`: its memory, shared with other graphs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def _warmed_graph_of(work: Callable[[], None], pool, side) -> Callable[[], None]:
    """As `graph_of`; first runs `work` on the stream `side`: what is made at first use is made outside the capture."""
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    return graph_of(work, pool)


class Round:
    """State of a batch of sequences, and the step from one round to the next.

    Args:
        model: a LlamaForCausalLM.
        draft: a smaller one, "ngram", or None: k is 0 and a round yields one token.
        k: tokens drafted a round, at most; `draft_next` changes that between rounds.
        tree: the k tokens are its nodes; needs a draft model.
        trees: those that `draft_next` may be given, of at most k nodes.
        capacity: of the KV caches, in tokens.
        seed, temperature, sampling, method: as `fp.verify` takes them, [B] on the model's device.

    Attributes, on the device, B sequences:
        tokens: int64 [B, k + 1] (tree: depth + 1), accepted: int32 [B]: the last round's verdict, the same on every
            rank.
        drafted: int32 [B]: how many tokens were drafted.
        told: int64 [B, columns of tokens + 4]: all of these, and what was heard, in one tensor: tokens, the last
            accepted of the drafts or of the tree's nodes (-1: none), drafted, accepted, heard.
        alive: bool [B]: sequences that go on; the others stand still. `go_on` sets it.
        clock: int64 [1]: a number of this rank that `heard` has after the next round on every rank, from the last
            stage's first rank.
    """

    def __init__(
        self,
        model,
        draft,
        k: int,
        batch: int,
        capacity: int,
        *,
        seed,
        temperature,
        sampling,
        method,
        tree: Tree | None = None,
        trees: Sequence[Tree] = (),
    ) -> None:
        self.tree = None if tree is None else PlacedTree(tree, batch, model.device)
        self._placed = {other: PlacedTree(other, batch, model.device) for other in trees}
        self.model, self.k, self.method, self.sampling = model, k, method, sampling
        self.seed, self.temperature = seed, temperature
        self.greedy = not bool((temperature > 0).any())
        self.tp, self.pp = model.tp_group, model.pp_group
        self.is_last = self.pp.rank() == self.pp.size() - 1
        self.cache = model.make_cache(batch, capacity)
        # Whether a round without a draft is one that the draft must take in later; on every rank, as all capture alike.
        self._misses = draft is not None and draft != "ngram"
        self.drafter: ModelDraft | NgramDraft | None = None
        if draft is not None and self.is_last:
            self.drafter = NgramDraft() if draft == "ngram" else ModelDraft(draft, batch, capacity)
        like = {"dtype": torch.int64, "device": model.device}
        self.step = torch.zeros(batch, **like)
        # All tokens of each sequence; the last of them the model has not seen yet.
        self.history = torch.zeros(batch, capacity + k + 2, **like)
        self.clock, self.heard = torch.zeros(1, **like), torch.zeros(1, **like)
        # Drafted tokens, and how many of them count.
        self.drafts = torch.zeros(batch, k + 1, **like)
        self.drafted = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self.missed = 0  # rounds without a draft since the last one with
        self.told = torch.zeros(batch, (k if tree is None else tree.depth) + 5, **like)
        self.tokens = self.told[:, :-4]
        self.accepted = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=model.device)
        self._going_on = [True] * batch
        # By what is drafted, and what was missed before.
        self._graphs: dict[tuple[int | PlacedTree, int], Callable[[], None]] = {}
        self._pool = self._side = None

    def prefill(self, ids: torch.Tensor, lens: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
        """Take in the prompts, ids [B, S] padded on the right, lens int32 [B], `chunk` tokens at a time (None: all);
        the first new token of each, [B]."""
        last = (lens - 1).long()
        logits = None
        for start in range(0, ids.shape[1], chunk or ids.shape[1]):
            part = ids[:, start : start + (chunk or ids.shape[1])]
            at = last - start
            self.cache.lens.fill_(start)
            self.cache.context = start
            new = self.model(part, self.cache, at.clamp(0, part.shape[1] - 1))
            if new is not None:
                # A prompt's last token is in one of the chunks.
                logits = new if logits is None else torch.where((at >= 0).view(-1, 1, 1), new, logits)
        self.cache.context = None
        first = self.share(self._judge(logits, self.drafts[:, :0], None))[:, 0]
        if self.drafter is not None:
            self.drafter.prefill(ids, lens, chunk)
        self.cache.lens.copy_(lens)
        self.history[:, : ids.shape[1]] = ids
        self.history.scatter_(1, lens.long().unsqueeze(1), first.unsqueeze(1))
        return first

    def go_on(self, alive: list[bool]) -> None:
        """From the next round on only these sequences do; does not wait."""
        if alive == self._going_on:
            return
        self._going_on = alive
        on_host = torch.tensor(alive)
        # From pinned memory: a copy from other memory waits for all that the stream has been given.
        self.alive.copy_(on_host.pin_memory() if self.alive.is_cuda else on_host, non_blocking=True)

    def draft_next(self, shape: int | Tree) -> None:
        """From the next round on draft so many tokens, or this of the `trees`. The same on every rank."""
        self.tree = self._placed[shape] if isinstance(shape, Tree) else None
        self.k = shape.nodes if isinstance(shape, Tree) else shape

    def run(self) -> bool:
        """The next round, on the current stream: eager, or by the graph captured of one like it. Whether it was the
        graph."""
        replay, missed = self._graphs.get(self._kind()), self.missed
        if replay is None:
            self._run()
        else:
            replay()
            self.missed = 0 if self.k else missed + 1  # as `propose` says, which did not run
        return replay is not None

    def _kind(self) -> tuple[int | PlacedTree, int]:
        """What the shapes within the next round follow from; the same on every rank, though the draft is the last
        stage's: messages of a captured round keep the slots that both ends count for them."""
        return self.tree or self.k, self.missed if self.k and self._misses else 0

    def wants_capture(self) -> bool:
        """Whether `capture` would."""
        return self._kind() not in self._graphs and len(self._graphs) < MOST_GRAPHS

    def must_catch_up(self) -> bool:
        """Whether `catch_up` has something to do: a graph for every number of missed rounds would not be worth it."""
        return self._kind()[1] > 1

    def catch_up(self) -> None:
        """The draft takes in what was decoded without it, so that the next round is one like many; waits for it."""
        if not self.must_catch_up():
            return
        if self.drafter is not None:
            self.drafter.catch_up(self.history, self.cache.lens, self.missed)
        self.missed = 0
        if self.step.is_cuda:
            torch.cuda.synchronize()

    def capture(self, replay: bool = False) -> bool:
        """Capture rounds like the next one in a CUDA graph, unless they are, or many others; with `replay`, and replay
        it once, which takes longer than it will again. The state is as before when it returns. Whether it did."""
        if not self.wants_capture():
            return False
        kind, missed = self._kind(), self.missed
        state = [self.step, self.history, self.cache.lens]
        saved = [t.clone() for t in state]

        def work() -> None:
            self.missed = missed
            self._run()

        # One pool for all: graphs of one stream, none of which reads what another left in it.
        if self._pool is None and self.step.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
            # One, too: libraries keep memory for every stream that they have worked on.
            self._side = torch.cuda.Stream(self.step.device)
        self._graphs[kind] = _warmed_graph_of(work, self._pool, self._side)
        if replay:
            self._graphs[kind]()
        self.missed = missed
        for t, value in zip(state, saved, strict=True):
            t.copy_(value)
        if self.step.is_cuda:
            torch.cuda.synchronize()  # copies that an eager pass of offloaded layers started ahead are over
        return True

    def _run(self) -> None:
        weights = self.propose()
        if self.k:
            self.share(self.drafts)
        self.update(self.share(self.judge(weights)))

    def propose(self) -> torch.Tensor | None:
        """Begin the next round: draft into `drafts`, on the last stage, where there is a draft; the log-weights that
        the tokens were sampled from."""
        self.step += 1
        weights = None
        if self.k:
            self.model.prefetch()  # offloaded layers, beside the drafting
        if self.k and self.drafter is not None:
            options = {"missed": self.missed, "seed": self.seed, "step": self.step}
            options |= {"temperature": self.temperature, "greedy": self.greedy}
            if self.tree is not None:
                proposed, weights = self.drafter.propose_tree(self.history, self.cache.lens, self.tree, **options)
                counts = None
            else:
                proposed, weights, counts = self.drafter.propose(self.history, self.cache.lens, self.k, **options)
            self.drafts[:, : self.k] = proposed
            self.drafts[:, -1] = self.k if counts is None else counts
        self.missed = 0 if self.k else self.missed + 1
        return weights

    def judge(self, weights: torch.Tensor | None) -> torch.Tensor:
        """Run the model on the last token and the drafts, which every stage has, and verify on the last stage; what it
        gives counts there only: int64 [B, k + 3], the tokens, how many were accepted, and the clock; of a tree int64
        [B, 2 depth + 3], the accepted path behind them."""
        k = self.k
        drafts = self.drafts[:, :k]
        if k:
            self.drafted.copy_(self.drafts[:, -1])
        else:
            self.drafted.zero_()
        at = self.cache.lens.long().unsqueeze(1)  # of the token that the model has not seen yet
        fed = torch.cat((self.history.gather(1, at), drafts), 1)
        if self.tree is not None:
            return self._judge_tree(self.model(fed, self.cache, tree=self.tree.whole), drafts, weights)
        counts = self.drafted if isinstance(self.drafter, NgramDraft) and k else None
        return self._judge(self.model(fed, self.cache), drafts, weights, counts)

    def update(self, verdict: torch.Tensor) -> None:
        """Take over a verdict, the same on every rank, and end the round."""
        k, at = self.k, self.cache.lens.long().unsqueeze(1)
        path = None
        if self.tree is not None:
            k = self.tree.tree.depth
            path = verdict[:, k + 3 :]
            self.cache.keep_path(path)
            if self.drafter is not None:
                self.drafter.cache.keep_path(path)
        self.tokens.fill_(-1)
        self.tokens[:, : k + 1] = verdict[:, : k + 1]
        self.accepted.copy_(verdict[:, k + 1])
        self.heard.copy_(verdict[0, k + 2])
        self.told[:, -4] = self.accepted - 1 if path is None else path.amax(1)  # nodes follow those with less
        self.told[:, -3], self.told[:, -2], self.told[:, -1] = self.drafted, self.accepted, self.heard
        # A finished sequence stands still, so that it never outgrows the cache.
        self.cache.lens += (self.accepted + 1) * self.alive
        # Of a sequence that stands still, and behind the accepted tokens, this writes what does not count.
        self.history.scatter_(1, at + 1 + torch.arange(k + 1, device=at.device), verdict[:, : k + 1])

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank gets the `x` of the last stage's first rank. Ranks that computed it themselves hold the same bits
        on equal machines; sending it anyway keeps them from drifting apart on unequal ones, where a mismatch would
        hang."""
        if self.is_last:
            self.share_in_stage(x)
        return self.model.stage.share(x)

    def share_in_stage(self, x: torch.Tensor) -> torch.Tensor:
        """As `share`, within the last stage."""
        return collectives.broadcast_(x, 0, self.tp)

    def _judge(self, logits, drafts, weights, counts=None) -> torch.Tensor:
        """Judge `drafts` [B, k], of which the first `counts` of each sequence count, by the model's logits (None on all
        but the last stage, where nothing is judged)."""
        batch, k = drafts.shape
        verdict = torch.empty(batch, k + 3, dtype=torch.int64, device=drafts.device)
        verdict[:, -1] = self.clock
        if logits is not None:
            group = self.tp if self.tp.size() > 1 else None
            if weights is not None and group is not None:
                weights = _shard_of(weights, logits.shape[-1], self.tp.rank())
            result = ops.verify(
                logits,
                drafts,
                weights,
                seed=self.seed,
                step=self.step,
                temperature=self.temperature,
                num_draft_tokens=counts,
                method=self.method,
                vocab_size=self.model.config.vocab_size,
                vocab_group=group,
                **self.sampling,
            )
            verdict[:, :-2], verdict[:, -2] = result.tokens, result.num_accepted
        return verdict

    def _judge_tree(self, logits, drafts, weights) -> torch.Tensor:
        """As `_judge`, a tree. The vocabulary's shards are gathered first, which costs little at the few rows of a
        tree: the kernels of `fp.verify_tree` want it whole."""
        placed, depth = self.tree, self.tree.tree.depth
        verdict = torch.empty(drafts.shape[0], 2 * depth + 3, dtype=torch.int64, device=drafts.device)
        verdict[:, depth + 2] = self.clock
        if logits is not None:
            result = ops.verify_tree(
                gather_last(logits, self.model.config.vocab_size, self.tp),
                drafts,
                placed.parents,
                weights,
                seed=self.seed,
                step=self.step,
                temperature=self.temperature,
                siblings="deterministic" if weights is None else "without_replacement",
                max_depth=depth,
                **self.sampling,
            )
            verdict[:, : depth + 1], verdict[:, depth + 1] = result.tokens, result.num_accepted
            verdict[:, depth + 3 :] = result.path
        return verdict


def _shard_of(weights: torch.Tensor, local: int, rank: int) -> torch.Tensor:
    """This rank's vocabulary shard of the draft's full log-weights, padded with -inf."""
    part = weights[..., rank * local : (rank + 1) * local]
    return torch.nn.functional.pad(part, (0, local - part.shape[-1]), value=-torch.inf)
