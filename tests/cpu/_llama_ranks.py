"""What ranks run in test_llama.py, test_parallelize.py and test_generate.py, and the random models they use."""

from __future__ import annotations

import contextlib
import itertools
import sys

import torch

import fused_parallel as fp
from fused_parallel.nn.linear import gather_last

OFFLOAD_PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52]]
OFFLOAD_NEW = 16
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save_random_model(path, *, seed: int = 0, model_type: str = "llama", scale: float = 1.0, **changes):
    """A random transformers model with awkward sizes, saved to `path`; returns it. `scale` spreads the logits, so that
    greedy choices are no near-ties."""
    import transformers

    config_class = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}[model_type]
    model_class = config_class.replace("Config", "ForCausalLM")
    options = dict(
        vocab_size=263,
        hidden_size=96,
        intermediate_size=250,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(options | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases that are not all alike
            elif "embed" not in name:
                parameter.mul_(scale)
    model.save_pretrained(path)
    return model


def save_noisy_pair(target, draft):
    """A random target, and a draft that is the same with noise on its weights: some drafts are accepted and some are
    not, and branches of a tree are taken. The target, as `save_random_model` returns it."""
    from transformers import AutoModelForCausalLM

    model = save_random_model(target, scale=6.0)
    noisy = AutoModelForCausalLM.from_pretrained(target)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.12)
    noisy.save_pretrained(draft)
    return model


def logits(mesh, path, ids, dtype):
    """Whole logits [B, S, V] of the library's model on this mesh; None on all but the last stage."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=dtype)
    out = model(ids)
    return None if out is None else gather_last(out, model.config.vocab_size, model.tp_group)


def incremental_logits(mesh, path, ids, cuts):
    """As `logits` in fp32, the sequence fed in pieces through a cache, with a rollback in between."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    cache, parts = model.make_cache(ids.shape[0], ids.shape[1] + 4), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        model(ids[:, start:stop].flip(1), cache)  # rejected: overwritten because lens stays
        out = model(ids[:, start:stop], cache)
        parts.append(None if out is None else gather_last(out, model.config.vocab_size, model.tp_group))
        cache.lens += stop - start
    return None if parts[0] is None else torch.cat(parts, 1)


def read_bytes(mesh, path):
    """Bytes of parameters this rank holds, and the elements its reader touched."""
    from fused_parallel.models.checkpoint import Checkpoint

    touched = []
    read = Checkpoint.read

    def counted(self, *args):
        out = read(self, *args)
        touched.append(out.numel())
        return out

    Checkpoint.read = counted
    try:
        model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    finally:
        Checkpoint.read = read
    return sum(p.numel() for p in model.parameters()), sum(touched)


def parallelized_logits(mesh, path, ids, steps):
    """Whole logits of a transformers model after fp.parallelize: of the prompt, then of `steps` greedy tokens with its
    own cache, one at a time."""
    from transformers import AutoModelForCausalLM

    model = fp.parallelize(AutoModelForCausalLM.from_pretrained(path).eval(), mesh)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        parts = [out.logits]
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        generated = model.generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=0)
    return torch.cat(parts, 1), generated, sum(p.numel() for p in model.parameters())


def generated(mesh, path, draft_path, prompts, max_new_tokens, offload=None, **options):
    """(tokens, stats as dict) of fp.generate on this mesh, fp32."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32, offload=offload)
    draft = draft_path
    if draft_path not in (None, "ngram"):
        draft = fp.LlamaForCausalLM.from_pretrained(draft_path, mesh=None, dtype=torch.float32)
    result = fp.generate(model, prompts, max_new_tokens, draft=draft, **options)
    return result.tokens, vars(result.stats) | {"acceptance": result.stats.acceptance}


def generated_by_replays(mesh, path, draft_path, prompts, max_new_tokens, **options):
    """As `generated` in captured micro-batches, with a stand-in for CUDA graphs: work runs when it is replayed and not
    when it is captured. Gives the tokens, how much was captured, and of every other stage the messages that had been
    sent to and received from it when the first work was."""
    from fused_parallel.speculative import microbatches

    generate, counts, captured = sys.modules["fused_parallel.speculative.generate"], {}, 0
    usual = generate.run, microbatches.graph_of

    def graph_of(work):
        nonlocal captured
        if not captured and model.stage.links is not None:
            counts.update({peer: (c._sent, c._received) for peer, c in model.stage.links.channels.items()})
        captured += 1
        return work

    def run(batches, alive, check, capture):
        return usual[0](batches, alive, check, capture=True)

    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32)
    draft = draft_path
    if draft_path not in (None, "ngram"):
        draft = fp.LlamaForCausalLM.from_pretrained(draft_path, mesh=None, dtype=torch.float32)
    generate.run, microbatches.graph_of = run, graph_of
    try:
        tokens = fp.generate(model, prompts, max_new_tokens, draft=draft, **options).tokens
    finally:
        generate.run, microbatches.graph_of = usual
    return tokens, captured, mesh.get_local_rank("pp"), counts


@contextlib.contextmanager
def drafts_in_turn(shapes):
    """ "auto" drafts these lengths in turn; -1 is the first of the trees that it may choose, -2 the second, ..."""
    from fused_parallel.speculative.adaptive import AdaptiveLength

    chosen, usual = itertools.cycle(shapes), AdaptiveLength.choose

    def choose(self):
        shape = next(chosen)
        return shape if shape >= 0 else self.trees[-1 - shape]

    AdaptiveLength.choose = choose
    try:
        yield
    finally:
        AdaptiveLength.choose = usual


def generated_in_turn(mesh, path, draft_path, prompts, max_new_tokens, shapes, **options):
    """As `generated`, of an offloaded model whose rounds draft `shapes` in turn."""
    with drafts_in_turn(shapes):
        options |= {"num_draft_tokens": "auto", "offload": fp.Offload()}
        return generated(mesh, path, draft_path, prompts, max_new_tokens, **options)


def generated_by_kept_rounds(mesh, path, draft_path, prompts, max_new_tokens, lengths, most, **options):
    """As `generated` with captured rounds of the given lengths (`drafts_in_turn`), and a stand-in for CUDA graphs that
    keeps the captured work to run it when it is replayed. Gives the tokens, the statistics, which rounds were captured
    (how many tokens, and what was missed before) and how many replayed; its stage, and of every other stage the
    messages sent to it and received from it before each capture."""
    from fused_parallel.speculative import round as module

    captured, counts, replayed = [], [], 0
    usual = module._warmed_graph_of, module.MOST_GRAPHS

    def warmed_graph_of(work, pool, side):
        shape, missed = rounds[-1]._kind()
        captured.append((shape if isinstance(shape, int) else shape.tree.nodes, missed))
        links = rounds[-1].model.stage.links
        if links is not None:
            counts.append({peer: (c._sent, c._received) for peer, c in links.channels.items()})
        work()

        def replay():
            nonlocal replayed
            replayed += 1
            work()

        return replay

    rounds = []
    generate = sys.modules["fused_parallel.speculative.generate"]

    class Kept(generate.Round):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            rounds.append(self)

    own = generate.Round, generate.on_gpus
    module._warmed_graph_of, module.MOST_GRAPHS = warmed_graph_of, most
    generate.Round, generate.on_gpus = Kept, lambda model: True
    try:
        with drafts_in_turn(lengths):
            tokens, stats = generated(mesh, path, draft_path, prompts, max_new_tokens, cuda_graph=True, **options)
    finally:
        module._warmed_graph_of, module.MOST_GRAPHS = usual
        generate.Round, generate.on_gpus = own
    return tokens, stats, captured, replayed, mesh.get_local_rank("pp"), counts


def offloaded(mesh, path, draft_path, offload, **options):
    """(tokens, stats, bytes in host memory, whether the model is offloaded) of a generation."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32, offload=offload)
    draft = draft_path
    if draft_path not in (None, "ngram"):
        draft = fp.LlamaForCausalLM.from_pretrained(draft_path, mesh=None, dtype=torch.float32)
    result = fp.generate(model, OFFLOAD_PROMPTS, OFFLOAD_NEW, draft=draft, **options)
    host = model.model.layers.host_bytes if model.offloaded else 0
    return result.tokens, vars(result.stats), host, model.offloaded


def generated_with_half_a_draft(mesh, path, prompts, max_new_tokens, **options):
    """As `generated` with the model as its own draft, whose proposals are spoilt for all sequences but the longest."""
    from fused_parallel.speculative.draft import ModelDraft

    propose = ModelDraft.propose

    def spoilt(self, history, lens, k, **kwargs):
        tokens, weights, counts = propose(self, history, lens, k, **kwargs)
        short = (lens < lens.max()).unsqueeze(1) if lens.numel() > 1 else (lens < 30).unsqueeze(1)
        return torch.where(short, (tokens + 1) % self.vocab_size, tokens), weights, counts

    ModelDraft.propose = spoilt
    try:
        return generated(mesh, path, path, prompts, max_new_tokens, **options)
    finally:
        ModelDraft.propose = propose
