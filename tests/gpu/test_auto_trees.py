"""Trees among what "auto" drafts of an offloaded model, on a GPU: now one, now another, captured or not."""

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel.testing.spawn import run_ranks

PROMPTS = ranks.OFFLOAD_PROMPTS
# Each of the six trees, chains, and rounds without a draft before both.
IN_TURN = (4, -1, 0, -2, -3, 0, 0, -4, 2, -5, -5, 1, -6, 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}])
def test_chains_and_trees_in_turn_equal_cpu(tmp_path, options):
    """The same tokens eagerly and in graphs, of which now one, now another is replayed."""
    ranks.save_noisy_pair(tmp_path / "target", tmp_path / "draft")
    args = tmp_path / "target", tmp_path / "draft", PROMPTS, 60, IN_TURN
    ((expected, _),) = run_ranks(ranks.generated_in_turn, 1, *args, device="cpu", **options)
    for graph in (False, True):
        ((tokens, stats),) = run_ranks(ranks.generated_in_turn, 1, *args, device="cuda", cuda_graph=graph, **options)
        assert tokens == expected and len(stats["rounds_by_tree"]) == 6 and stats["accepted"] > 0


@pytest.mark.parametrize("graph", [False, True])
def test_automatic_choice_in_bfloat16(tmp_path, graph):
    """By the clock, with the kernels for 16 bits. The draft is the target: a tree's path is as long as the tree is
    deep, but for near ties and the last round."""
    ranks.save_random_model(
        tmp_path, scale=6.0, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1
    )
    ((tokens, stats),) = run_ranks(chosen, 1, tmp_path, graph, device="cuda")
    assert all(len(row) == 400 for row in tokens) and (15, 2) in stats["rounds_by_tree"]
    trees = sum(stats["rounds_by_tree"].values())
    depths = sum(depth * count for (_, depth), count in stats["rounds_by_tree"].items())
    lengths = sum(k * count for k, count in stats["rounds_by_length"].items())
    in_trees = sum(nodes * count for (nodes, _), count in stats["rounds_by_tree"].items())
    assert 0 < trees <= stats["rounds"] and stats["accepted"] / len(PROMPTS) > 0.4 * (lengths - in_trees + depths)


def chosen(mesh, path, graph):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.bfloat16, offload=fp.Offload())
    draft = fp.LlamaForCausalLM.from_pretrained(path, mesh=None, dtype=torch.bfloat16)
    options = {"num_draft_tokens": "auto", "eos_token_id": [], "cuda_graph": graph}
    result = fp.generate(model, PROMPTS, 400, draft=draft, **options)
    return result.tokens, vars(result.stats)
