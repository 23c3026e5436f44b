"""The generation loop. Plain decoding is speculation with no drafted token, so there is one loop for both."""

from __future__ import annotations

import itertools
import operator
import time
from collections import Counter
from collections.abc import Sequence

import torch

from .._progress import progress_bar
from ..comm import collectives
from ..comm.workspace import check
from ..models.llama import LlamaForCausalLM
from ..ops.verify import METHODS
from ..pipeline.stage_links import SLOTS
from .adaptive import LENGTHS, LENGTHS_OFFLOADED, AdaptiveLength, offloaded_trees
from .ahead import AHEAD, run_ahead
from .generation import Generation, GenerationStats
from .microbatches import MicroBatch, run
from .round import Round
from .tree import Tree


def _per_request(value, batch: int, name: str, dtype: torch.dtype, device, low=None, high=None) -> torch.Tensor | None:
    """An option of each prompt as a tensor [B] on the device; checked here, where the values are still on the host."""
    if value is None:
        return None
    try:
        tensor = torch.as_tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"generate: {name} must be one number or one per prompt ({batch}), got {value!r}") from error
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.numel() != batch):
        raise ValueError(f"generate: {name} must be one number or one per prompt ({batch}), got {value!r}")
    if low is not None and not bool(((tensor >= low) & (tensor <= (float("inf") if high is None else high))).all()):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"generate: {name} must be {limits}, got {value!r}")
    return tensor.expand(batch).to(device).contiguous()


def _check(model, prompts, max_new_tokens, draft, num_draft_tokens, method) -> list[list[int]]:
    """The prompts as lists. Everything is checked on every rank, before any waits for another."""
    for name, value in (("model", model), ("draft", draft)):
        if value is not None and not isinstance(value, LlamaForCausalLM) and (name, value) != ("draft", "ngram"):
            or_ngram = ' or "ngram"' if name == "draft" else ""
            got = repr(value) if isinstance(value, str) else type(value).__name__
            raise TypeError(f"generate: {name} must be an fp.LlamaForCausalLM{or_ngram}, got {got}")
    if isinstance(prompts, str) or any(
        not isinstance(p, (Sequence, torch.Tensor)) or isinstance(p, str) for p in prompts
    ):
        raise TypeError("generate: prompts must be a list of lists of token ids, one for each sequence")
    prompts = [p.tolist() if isinstance(p, torch.Tensor) else list(p) for p in prompts]
    if not prompts:
        raise ValueError("generate: there are no prompts")
    vocab = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {i} is empty; every prompt needs at least one token")
        for j, token in enumerate(prompt):
            try:
                prompt[j] = operator.index(token)
            except TypeError:
                prompt[j] = -1
            if not 0 <= prompt[j] < vocab:
                raise ValueError(f"generate: prompt {i} holds {token!r}; token ids are integers in [0, {vocab})")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    if method not in METHODS:
        raise ValueError(f"generate: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    longest = max(map(len, prompts))
    is_model = isinstance(draft, LlamaForCausalLM)
    for name, config in (("model", model.config), ("draft", draft.config if is_model else model.config)):
        limit = config.max_position_embeddings
        if longest + max_new_tokens > limit:
            raise ValueError(
                f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {name}'s {limit} "
                "positions"
            )
    if is_model:
        if draft.config.vocab_size != vocab:
            raise ValueError(f"generate: the draft has vocabulary {draft.config.vocab_size}, the model {vocab}")
        if draft.tp_group.size() * draft.pp_group.size() != 1:
            raise ValueError("generate: make the draft with mesh=None, every rank runs it whole")
    bad = not isinstance(num_draft_tokens, int) or num_draft_tokens < 1
    if draft is not None and num_draft_tokens != "auto" and bad and not _is_tree(num_draft_tokens):
        raise ValueError(
            'generate: num_draft_tokens must be an integer of at least 1 with a draft, or "auto", or a tree, got '
            f"{num_draft_tokens!r}"
        )
    return prompts


def _is_tree(num_draft_tokens) -> bool:
    return isinstance(num_draft_tokens, Sequence) and not isinstance(num_draft_tokens, str)


def _tree_of(num_draft_tokens, draft, method: str, microbatches: int, vocab: int) -> Tree | None:
    """The tree to draft, None for a chain."""
    if draft is None or not _is_tree(num_draft_tokens):
        return None
    tree = Tree(num_draft_tokens)
    if draft == "ngram":
        raise ValueError("generate: trees are drafted by a model, not by n-grams: give num_draft_tokens as one integer")
    if method != "rejection":
        raise ValueError(f'generate: trees have one rule of verification, method="rejection", got {method!r}')
    if microbatches != 1:
        raise ValueError(f"generate: trees need microbatches=1, got {microbatches!r}")
    widest = max(len(tree.children(node)) for node in range(-1, tree.nodes))
    if widest > vocab:
        raise ValueError(f"generate: a node of the tree has {widest} children, more than the {vocab} tokens there are")
    return tree


def _check_parts(microbatches, prefill_chunk, batch: int, cuda_graph: bool, adaptive, offloaded: bool) -> None:
    if not isinstance(microbatches, int) or not 1 <= microbatches <= min(batch, SLOTS):
        raise ValueError(
            f"generate: microbatches must be an integer from 1 to {min(batch, SLOTS)} for {batch} prompt(s), got "
            f"{microbatches!r}"
        )
    if microbatches > 1 and adaptive is not None:
        raise ValueError('generate: microbatches > 1 needs a fixed num_draft_tokens, not "auto"')
    if microbatches > 1 and cuda_graph and offloaded:
        raise ValueError("generate: microbatches > 1 of a model with offloaded layers needs cuda_graph=False")
    if prefill_chunk is not None and (not isinstance(prefill_chunk, int) or prefill_chunk < 1):
        raise ValueError(f"generate: prefill_chunk must be an integer of at least 1, got {prefill_chunk!r}")


def on_gpus(model) -> bool:
    """Whether its rounds can be captured in CUDA graphs."""
    return model.device.type == "cuda" and model.stage.capturable


def _parts(batch: int, count: int) -> list[range]:
    """Prompts of each micro-batch."""
    bounds = [batch * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


@torch.inference_mode()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    draft=None,
    num_draft_tokens: int | str | Sequence[int] = 4,
    method: str = "rejection",
    temperature: float | Sequence[float] = 0.0,
    top_k=None,
    top_p=None,
    min_p=None,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    cuda_graph: bool = False,
    microbatches: int = 1,
    prefill_chunk: int | None = None,
    progress: bool = False,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens. Every rank of the model calls it with the same arguments.

    Args:
        model: a LlamaForCausalLM; tensor and pipeline parallelism are its own.
        prompts: token ids, one list a sequence, of any lengths; from text by the model's tokenizer
            (`tokenizers.Tokenizer.from_file(path + "/tokenizer.json").encode(text).ids`).
        draft: speculative decoding with a smaller LlamaForCausalLM of the same vocabulary, made with mesh=None, which
            only the last stage's ranks run; or with "ngram", which proposes what followed the last tokens when they
            stood in the sequence before.
        num_draft_tokens: tokens drafted a round; "auto": 0 to 8, chosen each round for the batch by what rounds have
            cost and how often drafts were right (`speculative.adaptive`); where the model's layers are offloaded 0 to
            32 or, with a draft model and method="rejection", one of six trees of 15 to 63 tokens. The time of a round
            is the clock's, so two runs may choose differently; greedy tokens do not depend on it, sampled ones do (not
            their distribution). A sequence of integers is a tree of at most 63 nodes: (4, 2, 1) is 4 tokens for the
            next place, two after each of them and one after each of those; or it begins with -1 and names the node that
            each node follows, -1 for the sequence itself. Siblings are the draft's most likely tokens, or drawn without
            replacement where the temperature is above 0. A tree needs a draft model, method="rejection" and
            microbatches=1.
        method: "rejection" or "block", which leave the model's distribution unchanged, or "greedy", which ignores the
            temperature; as `fp.verify`.
        temperature, top_k, top_p, min_p, seed: one value, or one per prompt; temperature 0 is greedy. With one seed,
            prompt i uses seed + i.
        eos_token_id: token(s) that end a sequence; default: the model's configuration.
        cuda_graph: capture a whole round (draft, model, verification) once and replay it, each pipeline stage its own
            part, of each micro-batch: GPUs only, stages on one host. With num_draft_tokens="auto" each length or tree
            is captured when it is first chosen, by all stages. The tokens are the same; stats then do not know the time
            spent in communication, and count captures as prefill (of micro-batches: as decoding).
        microbatches: parts of the batch that are decoded in turn, so that the stages of a pipeline work at once: about
            as many as stages, or more; at most 8, and one prompt each at least. Needs a fixed num_draft_tokens, and
            with offloaded layers cuda_graph=False.
        prefill_chunk: take in prompts so many tokens at a time, which fills the stages of a pipeline (and bounds the
            memory of activations); None: whole.
        progress: show a progress bar on stderr (rank 0 only).

    Returns:
        Generation(tokens, stats), the same tokens on every rank.

    The host reads the accepted tokens back once a round, and does nothing else in a captured one; captured rounds are
    queued one ahead of that, so that the device need not wait for it. Raises ValueError for bad input and
    PeerTimeoutError when a rank is lost.
    """
    prompts = _check(model, prompts, max_new_tokens, draft, num_draft_tokens, method)
    if cuda_graph and not on_gpus(model):
        raise ValueError(
            "generate: cuda_graph=True needs a model on GPUs, and between pipeline stages GPUs that reach each other's "
            f"memory; this one is on {model.device} with {model.pp_group.size()} stage(s)"
        )
    adaptive = None
    if draft is not None and num_draft_tokens == "auto":
        treeless = not model.offloaded or draft == "ngram" or method != "rejection"
        trees = [] if treeless else offloaded_trees(model.config.vocab_size)
        adaptive = AdaptiveLength(LENGTHS_OFFLOADED if model.offloaded else LENGTHS, trees)
    tree = _tree_of(num_draft_tokens, draft, method, microbatches, model.config.vocab_size)
    k = 0 if draft is None else adaptive.most if adaptive is not None else num_draft_tokens
    k = k if tree is None else tree.nodes
    _check_parts(microbatches, prefill_chunk, len(prompts), cuda_graph, adaptive, model.offloaded)
    batch, device = len(prompts), model.device
    lens = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=device)
    width = int(lens.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    # The round that ends a sequence may take it up to k tokens too far, and later rounds feed k + 1 from there; where
    # rounds are queued ahead there is one more before they stand still.
    capacity = width + max_new_tokens + (k + 1) * (3 if microbatches > 1 or cuda_graph else 2)

    if not isinstance(seed, Sequence) and (not isinstance(seed, torch.Tensor) or seed.dim() == 0):
        seed = [operator.index(seed) + i for i in range(batch)]
    seed_t = _per_request(seed, batch, "seed", torch.int64, device)
    if temperature is None:
        raise TypeError("generate: temperature must be a number or one per prompt, got None; 0 is greedy")
    temperature_t = _per_request(temperature, batch, "temperature", torch.float32, device, 0)
    sampling = {
        "top_k": _per_request(top_k, batch, "top_k", torch.int64, device, 0),
        "top_p": _per_request(top_p, batch, "top_p", torch.float32, device, 0, 1),
        "min_p": _per_request(min_p, batch, "min_p", torch.float32, device, 0, 1),
    }
    ends = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())

    parts = _parts(batch, microbatches)
    rounds = [
        Round(
            model,
            draft,
            k,
            len(part),
            capacity,
            seed=seed_t[part.start : part.stop],
            temperature=temperature_t[part.start : part.stop],
            sampling={name: x if x is None else x[part.start : part.stop] for name, x in sampling.items()},
            method=method,
            tree=tree,
            trees=[] if adaptive is None else adaptive.trees,
        )
        for part in parts
    ]
    round_ = rounds[0]
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * batch
    rounds_by_length: Counter[int] = Counter()
    rounds_by_tree: Counter[tuple[int, int]] = Counter()
    drafted = accepted = 0
    streamed, copying = model.streamed_bytes, model.stream_seconds

    def take(rows: list[list[int]], first: int = 0) -> None:
        """Append each unfinished sequence's tokens of this round, up to its end; `rows` are those from `first` on."""
        for i, row in enumerate(rows, first):
            for token in row:
                if done[i] or token < 0:
                    break
                new[i].append(token)
                done[i] = token in ends or len(new[i]) == max_new_tokens

    with (
        collectives.CommunicationTimer() as timer,
        progress_bar(progress, "generating", batch * max_new_tokens, "tokens") as advance,
    ):
        begin = time.perf_counter()
        for part, of_part in zip(parts, rounds, strict=True):
            at = slice(part.start, part.stop)
            take(of_part.prefill(ids[at], lens[at], prefill_chunk).unsqueeze(1).tolist(), part.start)
        advance(sum(map(len, new)))
        if cuda_graph and microbatches == 1 and adaptive is None and not all(done):
            round_.capture()
        middle = time.perf_counter()
        capturing = 0.0  # after that

        def count(length: int, pairs: list[tuple[int, int]], rows: list[list[int]], first: int = 0) -> None:
            nonlocal drafted, accepted
            before = sum(map(len, new))
            take(rows, first)
            rounds_by_length[length] += 1
            drafted += sum(made for made, _ in pairs)
            accepted += sum(right for _, right in pairs)
            advance(sum(map(len, new)) - before)

        if microbatches > 1:
            batches = [MicroBatch(r) for r in rounds]
            visits = run(batches, lambda m: [not done[i] for i in parts[m]], check, capture=cuda_graph)
            for m, length, known, lived in visits:
                pairs = [(row[-3], row[-2]) for row, lives in zip(known, lived, strict=True) if lives]
                count(length, pairs, [row[:-4] for row in known], parts[m].start)
        else:
            told = run_ahead(
                round_,
                # A round that may not be needed costs more than the wait for the word whether it is.
                lambda most: any(not d and len(n) + most < max_new_tokens for d, n in zip(done, new, strict=True)),
                lambda: [not d for d in done],
                check,
                ahead=AHEAD if cuda_graph else 1,
                adaptive=adaptive,
                capture=cuda_graph,
            )
            for length, drawn, rows, pairs, seconds in told:
                capturing += seconds
                if pairs:
                    count(length, pairs, rows)
                    if drawn is not None:
                        rounds_by_tree[drawn.nodes, drawn.depth] += 1
        end = time.perf_counter()

    stats = GenerationStats(
        sequences=batch,
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(map(len, new)),
        prefill_seconds=middle - begin + capturing,
        decode_seconds=end - middle - capturing,
        rounds=sum(rounds_by_length.values()),
        drafted=drafted,
        accepted=accepted,
        communication_seconds=None if cuda_graph else timer.seconds(),
        rounds_by_length=dict(sorted(rounds_by_length.items())),
        rounds_by_tree=dict(sorted(rounds_by_tree.items())),
        streamed_bytes=model.streamed_bytes - streamed,
        stream_seconds=model.stream_seconds - copying,
        bubble=None if cuda_graph or model.stage.links is None else timer.waiting_seconds() / (end - begin),
    )
    return Generation(new, stats)
