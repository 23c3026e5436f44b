"""Greedy tokens of models in bf16 over two GPUs: with the matmuls' kernels as with torch and torch.distributed."""

import contextlib
from pathlib import Path

import pytest
import torch
from _llama_ranks import save_random_model
from _matmul_ranks import matmul, use_table

import fused_parallel as fp
from fused_parallel.comm.tuning import DECODE, Choice
from fused_parallel.nn.linear import gather_last
from fused_parallel.testing.spawn import run_ranks

ASSETS = Path(__file__).resolve().parents[2] / "examples" / "assets"
# In standard deviations of the logits: where the reference's first token leads the second by so much, the kernels must
# choose it, too. Of two ways to round in bf16 (one CPU rank against two, of the models and prompts here) the logits
# differed by up to 0.05, so a lead by up to 0.1.
TOLERANCE = 0.15
BATCH, PROMPT, NEW = 2, 200, 40
OP = "matmul_all_reduce_add_rms_norm"  # what the row-parallel layers of a model on one stage call
FEW = (100 << 10, DECODE)  # 400 rows of the models here are more
TABLES = {
    "default": {},
    "kernels": {OP: [FEW, (None, Choice("persistent"))]},
    # Rows that are verified together are too many for the weights of models as small as these.
    "any weight": {OP: [(FEW[0], Choice("decode")), (None, Choice("persistent"))]},
}


@contextlib.contextmanager
def recorded():
    """The set of (operation, rows, how it was done) of the matmuls within."""
    chosen, usual = set(), matmul.algorithm

    def algorithm(op, x, weight, pg):
        found = usual(op, x, weight, pg)
        if pg.size() > 1:  # a draft has no one to exchange with
            chosen.add((op, x.numel() // x.shape[-1], found))
        return found

    matmul.algorithm = algorithm
    try:
        yield chosen
    finally:
        matmul.algorithm = usual


def forced(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, NEW, V] on the CPU of each token after the prompt: the prompt at once, then one token at a time."""
    cache, parts = model.make_cache(*ids.shape), []
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.shape[1] - 1))]:
        out = model(ids[:, start:stop], cache)[:, -1:]
        parts.append(gather_last(out, model.config.vocab_size, model.tp_group).float().cpu())
        cache.lens += stop - start
    return torch.cat(parts, 1)


def generations(mesh, path, draft, prompts, table, options):
    """Of the reference and of the kernels: tokens of a generation, and logits where the reference's tokens are given;
    and what the kernels' matmuls chose."""
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.bfloat16)
    if isinstance(draft, Path):
        draft = fp.LlamaForCausalLM.from_pretrained(draft, mesh=None, dtype=torch.bfloat16)
    if model.device.type == "cuda":
        use_table(mesh["tp"], table)
    with fp.use("reference"):
        expected = fp.generate(model, prompts, NEW, eos_token_id=[]).tokens
        ids = torch.tensor([p + t for p, t in zip(prompts, expected, strict=True)], device=model.device)
        reference = forced(model, ids)
    with fp.use("auto"), recorded() as chosen:
        tokens = fp.generate(model, prompts, NEW, draft=draft, eos_token_id=[], **options).tokens
        logits = forced(model, ids)
    return expected, reference, tokens, logits, chosen


def check(expected, reference, tokens, logits) -> None:
    lead, best = reference.topk(2)
    lead, best = lead[..., 0] - lead[..., 1], best[..., 0]
    clear = lead >= TOLERANCE * reference.std()
    assert clear.float().mean() > 0.4  # else this test says nothing
    assert (logits.argmax(-1) == best)[clear].all(), (lead / reference.std(), logits.argmax(-1), best)
    for row, (want, got) in enumerate(zip(expected, tokens, strict=True)):
        assert len(want) == len(got) == NEW
        differ = next((i for i in range(NEW) if want[i] != got[i]), None)
        assert differ is None or not clear[row, differ], (row, differ, want, got)


def run(path, draft, table, options) -> None:
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(1, 256, (BATCH, PROMPT), generator=generator).tolist()
    results = run_ranks(generations, 2, path, draft, prompts, TABLES[table], options, device="cuda")
    assert results[0][2] == results[1][2]  # tokens are the same on both ranks
    for *compared, chosen in results:
        check(*compared)
        for op, rows, how in chosen:
            many = "whole" if table == "default" else "persistent"
            assert op == OP and how == ("decode" if rows <= 64 else many), chosen
        assert {rows for _, rows, _ in chosen} >= {BATCH, BATCH * PROMPT}


OPTIONS = [
    ("default", None, {}),
    ("kernels", None, {}),
    ("kernels", None, {"cuda_graph": True}),
    ("any weight", "ngram", {"num_draft_tokens": 4}),
]


@pytest.mark.parametrize("table,draft,options", OPTIONS, ids=["default", "kernels", "graph", "drafts"])
def test_random_model(table, draft, options, tmp_path):
    pytest.importorskip("transformers")
    sizes = dict(hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=512, num_hidden_layers=3)
    save_random_model(tmp_path, scale=2.0, **sizes)
    run(tmp_path, draft, table, options)


@pytest.mark.parametrize("table,draft,options", OPTIONS, ids=["default", "kernels", "graph", "drafts"])
def test_trained_pair(table, draft, options):
    """The committed models: a rank's weights of 128 and 288 columns and 256 rows, which the kernel for few rows takes
    for two rows (by the default table), and the persistent one for a prompt."""
    run(ASSETS / "tiny-target", draft and ASSETS / "tiny-draft", table, options)
