"""Offloaded and quantised models on two GPUs: each rank streams its own part over its own link, the tokens are those of
one GPU with everything on it."""

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel.nn.linear import gather_last
from fused_parallel.testing.spawn import run_ranks

IDS = torch.randint(0, 263, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tp,pp", [(2, 1), (1, 2)])
def test_offloaded_equals_resident(tmp_path, tp, pp):
    ranks.save_random_model(tmp_path / "target", scale=6.0, num_hidden_layers=8)
    ranks.save_random_model(tmp_path / "draft", scale=6.0, num_hidden_layers=1)
    args = tmp_path / "target", tmp_path / "draft"
    expected = run_ranks(ranks.offloaded, 1, *args, None, device="cuda")[0][0]
    layer = 4 * (96 * (128 + 2 * 64) + 96 * 128 + 3 * 96 * 250) // tp
    options = [{}, {"num_draft_tokens": "auto"}, {"num_draft_tokens": (3, 2, 1)}] + (
        [{"cuda_graph": True}] if pp == 1 else []
    )
    for offload in (fp.Offload(), fp.Offload(resident_bytes=2 * layer + 8192), fp.Offload(host_bytes=7 * layer // 2)):
        for more in options:
            if offload.host_bytes is not None and "cuda_graph" in more:
                continue
            for tokens, stats, host, _ in run_ranks(
                ranks.offloaded, 2, *args, offload, device="cuda", tp=tp, pp=pp, **more
            ):
                assert tokens == expected and host > 0 and stats["streamed_bytes"] > 0


def quantized_logits(mesh, path, kind, offload):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, quantize=kind, offload=offload)
    out = model(IDS.cuda())
    return None if out is None else gather_last(out, model.config.vocab_size, model.tp_group).cpu()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tp,pp", [(2, 1), (1, 2)])
def test_quantised_model(tmp_path, kind, tp, pp):
    """Slices that are whole groups of int4, so that the ranks hold the integers of one GPU."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    ranks.save_random_model(tmp_path, **sizes)
    (expected,) = run_ranks(quantized_logits, 1, tmp_path, kind, None, device="cuda")
    for offload in (None, fp.Offload()):
        got = run_ranks(quantized_logits, 2, tmp_path, kind, offload, device="cuda", tp=tp, pp=pp)[-1]
        bound = 1e-4 if kind == "int4" or tp == 1 else 0.05
        assert (got - expected).norm() / expected.norm() < bound
