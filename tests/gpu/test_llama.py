"""The model, generation, verification and streaming on one GPU: the same results as on the CPU, and in CUDA graphs."""

import itertools
import sys

import _llama_ranks as ranks
import pytest
import torch
from torch import nn

import fused_parallel as fp
from fused_parallel.offload import host_memory
from fused_parallel.offload.host_memory import HostBlocks
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close

IDS = torch.randint(0, 263, (2, 100), generator=torch.Generator().manual_seed(5))
PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52]]


def gpu_logits(mesh, path, ids, dtype):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=dtype)
    assert model.device.type == "cuda"
    return model(ids.cuda()).cpu()


def test_logits_equal_transformers(tmp_path):
    reference = ranks.save_random_model(tmp_path, rope_parameters=ranks.LLAMA3_ROPE | {"rope_theta": 500000.0})
    with torch.no_grad():
        expected = reference(IDS).logits
    (got,) = run_ranks(gpu_logits, 1, tmp_path, IDS, torch.float32, device="cuda")
    assert (got - expected).abs().max() < 1e-4
    (got,) = run_ranks(gpu_logits, 1, tmp_path, IDS, torch.bfloat16, device="cuda")
    assert (got.float() - expected).norm() / expected.norm() < 0.04


def test_generate_equals_cpu(tmp_path):
    ranks.save_random_model(tmp_path / "target", scale=6.0)
    ranks.save_random_model(tmp_path / "draft", scale=6.0, num_hidden_layers=1)
    for draft in (None, tmp_path / "draft"):
        for options in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}):
            args = tmp_path / "target", draft, PROMPTS, 20
            ((on_gpu, _),) = run_ranks(ranks.generated, 1, *args, device="cuda", **options)
            ((on_cpu, _),) = run_ranks(ranks.generated, 1, *args, device="cpu", **options)
            assert on_gpu == on_cpu
            ((captured, stats),) = run_ranks(ranks.generated, 1, *args, device="cuda", cuda_graph=True, **options)
            assert captured == on_cpu and stats["communication_seconds"] is None
            parts = options | {"cuda_graph": True, "microbatches": 2}
            ((captured, _),) = run_ranks(ranks.generated, 1, *args, device="cuda", **parts)
            assert captured == on_cpu


@pytest.mark.parametrize("offload", [False, True])
def test_captured_rounds_of_chosen_lengths(tmp_path, offload):
    """Several graphs, of which now one, now another is replayed, and rounds without a draft between them."""
    ranks.save_random_model(tmp_path / "target", scale=6.0)
    ranks.save_random_model(tmp_path / "draft", scale=6.0, num_hidden_layers=1)
    args = tmp_path / "target", None, PROMPTS, 60
    ((expected, _),) = run_ranks(ranks.generated, 1, *args, device="cpu")
    for draft in (tmp_path / "draft", "ngram"):
        args = tmp_path / "target", draft, PROMPTS, 60, (4, 0, 4, 4, 0, 0, 2, 1, 1)
        options = {"num_draft_tokens": "auto", "offload": fp.Offload() if offload else None}
        ((tokens, stats, kinds),) = run_ranks(chosen_lengths, 1, *args, device="cuda", **options)
        assert (
            tokens == expected and len(stats["rounds_by_length"]) == 4 and len(kinds) == (4 if draft == "ngram" else 5)
        )


def chosen_lengths(mesh, path, draft, prompts, new, lengths, offload, **options):
    """(tokens, statistics, what was captured) of rounds of the given lengths in turn, in CUDA graphs, fp32."""
    from fused_parallel.speculative.adaptive import AdaptiveLength

    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.float32, offload=offload)
    if draft != "ngram":
        draft = fp.LlamaForCausalLM.from_pretrained(draft, mesh=None, dtype=torch.float32)
    generate = sys.modules["fused_parallel.speculative.generate"]
    chosen, rounds, usual, own = itertools.cycle(lengths), [], AdaptiveLength.choose, generate.Round

    class Kept(own):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            rounds.append(self)

    AdaptiveLength.choose, generate.Round = lambda self: next(chosen), Kept
    try:
        result = fp.generate(model, prompts, new, draft=draft, cuda_graph=True, **options)
    finally:
        AdaptiveLength.choose, generate.Round = usual, own
    return result.tokens, vars(result.stats), sorted(rounds[0]._graphs)


@pytest.mark.parametrize("tree", [(3, 2, 1), (-1, -1, -1, 0, 0, 1, 3, 3, 6)])
def test_trees_equal_cpu(tmp_path, tree):
    """The same tokens eagerly and in a graph; the draft is the target with noise, so that branches are taken."""
    ranks.save_noisy_pair(tmp_path / "target", tmp_path / "draft")
    args = tmp_path / "target", tmp_path / "draft", PROMPTS, 24
    for options in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}, {"temperature": [0.0, 1.0, 0.0]}):
        options = options | {"num_draft_tokens": tree}
        ((on_cpu, _),) = run_ranks(ranks.generated, 1, *args, device="cpu", **options)
        for graph in (False, True):
            ((tokens, stats),) = run_ranks(ranks.generated, 1, *args, device="cuda", cuda_graph=graph, **options)
            assert tokens == on_cpu and stats["accepted"] > 0


@pytest.mark.parametrize("offload", [None, fp.Offload()])
def test_trees_in_bfloat16(tmp_path, offload):
    """With the kernels for 16 bits, tree attention's and tree verification's among them: a perfect draft's favourites
    are accepted as deep as the tree is, but for near ties."""
    ranks.save_random_model(
        tmp_path, scale=6.0, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1
    )
    ((tokens, stats),) = run_ranks(half_precision, 1, tmp_path, offload, device="cuda")
    assert all(len(row) == 41 for row in tokens)
    assert stats["accepted"] / stats["rounds"] / len(PROMPTS) > 2.3  # 2.79 on a CPU; the last round overshoots


def half_precision(mesh, path, offload):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, dtype=torch.bfloat16, offload=offload)
    draft = fp.LlamaForCausalLM.from_pretrained(path, mesh=None, dtype=torch.bfloat16)
    result = fp.generate(model, PROMPTS, 41, draft=draft, num_draft_tokens=(2, 2, 1), eos_token_id=[])
    return result.tokens, vars(result.stats)


@pytest.mark.parametrize("method", ["rejection", "block", "greedy"])
@pytest.mark.parametrize("full_q", [True, False])
def test_verify_in_a_graph_equals_cpu(method, full_q, seed):
    batch, k, vocab = 8, 4, 1000

    def inputs():
        target = torch.randn(batch, k + 1, vocab, device="cuda") * 3
        draft = target[:, :k] + torch.randn(batch, k, vocab, device="cuda")
        tokens = draft.softmax(-1).flatten(0, 1).multinomial(1).view(batch, k)
        # A third of the drafts are likely ones, so that point-mass drafts are accepted now and then, too.
        likely = torch.rand(batch, k, device="cuda") < 1 / 3
        tokens = torch.where(likely, target[:, :k].argmax(-1), tokens)
        return target, tokens, draft

    target, tokens, draft = inputs()
    options = {
        "seed": torch.arange(batch, device="cuda"),
        "step": torch.zeros(batch, dtype=torch.int64, device="cuda"),
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3] * 2, device="cuda"),
        "method": method,
        "top_k": torch.tensor([0, 50] * 4, device="cuda", dtype=torch.int32),
        "return_logprobs": True,
    }

    def call():
        return fp.verify(target, tokens, draft if full_q else None, **options)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    counts = set()
    for step in range(3):
        for old, new in zip((target, tokens, draft), inputs(), strict=True):
            old.copy_(new)
        options["step"].fill_(step)
        graph.replay()
        on_cpu = fp.verify(
            target.cpu(),
            tokens.cpu(),
            draft.cpu() if full_q else None,
            **{n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in options.items()},
        )
        assert torch.equal(result.tokens.cpu(), on_cpu.tokens)
        assert torch.equal(result.num_accepted.cpu(), on_cpu.num_accepted)
        assert torch.allclose(result.logprobs.cpu(), on_cpu.logprobs, atol=1e-4)
        counts.update(result.num_accepted.tolist())
    assert len(counts) > 1


def test_verify_attention_in_a_graph(seed):
    q = torch.randn(3, 4, 8, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(3, 50, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lens = torch.tensor([4, 20, 50], dtype=torch.int32, device="cuda")
    fp.verify_attention(q, k, v, lens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp.verify_attention(q, k, v, lens)
    for values in ([4, 20, 50], [9, 50, 5]):
        lens.copy_(torch.tensor(values))
        q.copy_(torch.randn_like(q))
        graph.replay()
        on_cpu = [t.double().cpu() for t in (q, k, v)]
        expected = fp.verify_attention(*(t.float() for t in on_cpu), lens.cpu())
        assert_close(out, expected, factor=2)


def test_streamed_layers(seed):
    layers = {str(i): nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512)) for i in range(6)}
    x = torch.randn(4, 512)
    with torch.no_grad():
        expected = x
        for layer in layers.values():
            expected = layer(expected)
        for slots in (1, 2, 3):
            streamed = fp.nn.StreamedLayers(layers, device="cuda", slots=slots)
            # Norms and biases live on the device, matrices in pinned host memory.
            assert all(p.is_pinned() if p.dim() > 1 else p.is_cuda for p in streamed.parameters())
            for _ in range(20):
                y = x.cuda()
                for _, layer in streamed:
                    y = layer(y)
                assert torch.allclose(y.cpu(), expected, atol=1e-4)


def pinned(tensor: torch.Tensor) -> bool:
    """By CUDA itself, not by what torch remembers."""
    return tensor.is_pinned()


def test_blocks_are_pinned_and_given_back():
    """At their own size, by several threads; released memory is not pinned any longer, and may be pinned again."""
    device = torch.device("cuda", 0)
    sizes = [100_000_000 + 4096 * i + 17 for i in range(8)]
    for _ in range(2):
        blocks = HostBlocks(sizes, device, "test")
        assert all(pinned(t) and pinned(t[-17:]) for t in blocks.tensors)
        for t in blocks.tensors:
            t[:1000].random_(256)
        copies = [torch.empty_like(t, device=device).copy_(t, non_blocking=True) for t in blocks.tensors]
        torch.cuda.synchronize()
        assert all(torch.equal(a.cpu()[:1000], b[:1000]) for a, b in zip(copies, blocks.tensors, strict=True))
        blocks.release()
        assert not any(pinned(t) for t in blocks.tensors)


def test_no_room_to_pin_is_told(monkeypatch):
    """The driver refuses: what was pinned until then is given back."""
    kept = []

    def register(address, size, real=host_memory._register):
        if len(kept) >= 3:
            return "out of memory"
        kept.append(address)
        return real(address, size)

    monkeypatch.setattr(host_memory, "_register", register)
    released = []
    release = HostBlocks.release
    monkeypatch.setattr(HostBlocks, "release", lambda self: (released.append(self), release(self)))
    with pytest.raises(RuntimeError, match=r"mine: .* of host memory are needed, and pinning them failed"):
        HostBlocks([10_000_000] * 8, torch.device("cuda", 0), "mine")
    assert len(released[0].tensors) == 8 and not any(pinned(t) for t in released[0].tensors)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_offloaded_equals_resident(tmp_path, slots):
    """With layers on the device, in host memory, in files and in one of their own; eager and in CUDA graphs."""
    ranks.save_random_model(tmp_path / "target", scale=6.0, num_hidden_layers=8)
    ranks.save_random_model(tmp_path / "draft", scale=6.0, num_hidden_layers=1)
    args = tmp_path / "target", tmp_path / "draft"
    (expected, *_) = run_ranks(ranks.offloaded, 1, *args, None, device="cuda")[0]
    layer = 4 * (96 * (128 + 2 * 64) + 96 * 128 + 3 * 96 * 250)
    for offload in (
        fp.Offload(slots=slots),
        fp.Offload(slots=slots, resident_bytes=3 * layer + 8192),
        fp.Offload(slots=slots, host_bytes=5 * layer),
        fp.Offload(slots=slots, host_bytes=5 * layer, cache_dir=tmp_path),
    ):
        options = [{}, {"num_draft_tokens": "auto"}, {"num_draft_tokens": 6}]
        if offload.host_bytes is None:
            options.append({"cuda_graph": True})
        for more in options:
            (tokens, stats, host, _) = run_ranks(ranks.offloaded, 1, *args, offload, device="cuda", **more)[0]
            assert tokens == expected
            assert host > 0 and stats["streamed_bytes"] > 0


def test_streaming_in_a_graph_equals_eager(seed):
    """Replays with inputs that change, between eager passes; the first copies begin before the pass (`prefetch`)."""
    layers = {str(i): nn.Linear(1024, 1024, bias=False) for i in range(7)}
    with torch.no_grad():
        streamed = fp.nn.StreamedLayers(layers, device="cuda", slots=2)
        x = torch.randn(4, 1024, device="cuda")

        def run(y):
            streamed.prefetch()
            for _, layer in streamed:
                y = torch.tanh(layer(y))
            return y

        weights = [layer.weight.double().cuda() for layer in streamed.values()]

        def expected():
            y = x.double()
            for weight in weights:
                y = torch.tanh(y @ weight.T)
            return y

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x)
        torch.cuda.synchronize()
        for turn in range(12):
            x.copy_(torch.randn_like(x))
            out.fill_(float("nan"))
            graph.replay()
            if turn % 3 == 0:
                assert torch.allclose(run(x).double(), expected(), atol=1e-4)
            assert torch.allclose(out.double(), expected(), atol=1e-4)
        assert streamed.copy_seconds > 0


def test_layers_computed_on_the_cpu(tmp_path):
    """Half the layers' products on the CPU, whatever it costs: the same tokens, plain and drafted."""
    ranks.save_random_model(tmp_path / "target", scale=6.0, num_hidden_layers=8)
    ranks.save_random_model(tmp_path / "draft", scale=6.0, num_hidden_layers=1)
    for draft in (None, tmp_path / "draft"):
        args = tmp_path / "target", draft
        expected = run_ranks(ranks.offloaded, 1, *args, None, device="cuda")[0][0]
        for more in ({}, {"quantize": "int8"}):
            reference = expected if not more else run_ranks(half_on_cpu, 1, *args, False, device="cuda", **more)[0][0]
            tokens, streamed, whole = run_ranks(half_on_cpu, 1, *args, True, device="cuda", **more)[0]
            assert tokens == reference and 0.3 * whole < streamed < 0.8 * whole


def half_on_cpu(mesh, path, draft_path, cpu, quantize=None):
    """(tokens, bytes streamed, bytes that passes without the CPU would have streamed)."""
    load = {"dtype": torch.float32}
    offload = fp.Offload(cpu=cpu)
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, offload=offload, quantize=quantize, **load)
    draft = draft_path and fp.LlamaForCausalLM.from_pretrained(draft_path, mesh=None, **load)
    layers = model.model.layers
    if cpu:
        assert layers.on_cpu(1) <= set(range(8))  # what is measured here
        layers._time_copy = layers._time_on_cpu = lambda *_: 1.0
        layers._on_cpu.clear()
    result = fp.generate(model, ranks.OFFLOAD_PROMPTS, ranks.OFFLOAD_NEW, draft=draft)
    return result.tokens, result.stats.streamed_bytes, (result.stats.rounds + 1) * layers.host_bytes


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_model(tmp_path, kind):
    """Quantised on the GPU or the CPU, streamed or on the device: the same integers, so the same logits."""
    ranks.save_random_model(tmp_path)
    (expected,) = run_ranks(quantized_logits, 1, tmp_path, kind, None, device="cpu")
    on_disk = fp.Offload(host_bytes=0, cache_dir=tmp_path)
    for offload in (None, fp.Offload(), fp.Offload(resident_bytes=60_000), on_disk):
        (got,) = run_ranks(quantized_logits, 1, tmp_path, kind, offload, device="cuda")
        assert (got - expected).norm() / expected.norm() < 1e-4


def quantized_logits(mesh, path, kind, offload):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, quantize=kind, offload=offload)
    return model(IDS.to(model.device)).cpu()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", [0, 2])
def test_copies_wait_for_slow_readers(slots, resident, seed):
    """Each layer reads its weights late, so that a copy that does not wait overwrites them, within a pass and from one
    to the next."""
    layers = {str(i): nn.Linear(1024, 1024, bias=False) for i in range(7)}
    weights = [layer.weight.detach().double().cuda() for layer in layers.values()]
    bytes_of_one = 4 * 1024 * 1024
    with torch.no_grad():
        streamed = fp.nn.StreamedLayers(layers, device="cuda", slots=slots, resident_bytes=resident * bytes_of_one)
        assert streamed.host_bytes == (7 - resident) * bytes_of_one
        outputs, inputs = [], []
        for _ in range(6):  # enqueued without a wait of the host in between
            y = torch.randn(4, 1024, device="cuda")
            inputs.append(y)
            for _, layer in streamed:
                torch.cuda._sleep(1_000_000)  # about half a millisecond; a copy takes a fraction of it
                y = torch.tanh(layer(y))
            outputs.append(y)
        for x, y in zip(inputs, outputs, strict=True):
            expected = x.double()
            for weight in weights:
                expected = torch.tanh(expected @ weight.T)
            assert torch.allclose(y.double(), expected, atol=1e-4)


def interrupted_load(mesh, path):
    """Whether blocks were pinned when a load was interrupted, and whether any is afterwards."""
    from fused_parallel.models.checkpoint import Checkpoint

    made, seen = [], []
    init, read = HostBlocks.__init__, Checkpoint.read

    def keep(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    def interrupt(self, *args):
        seen.extend(pinned(t) for t in made[0].tensors)
        raise KeyboardInterrupt

    HostBlocks.__init__, Checkpoint.read = keep, interrupt
    try:
        fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, offload=fp.Offload())
    except KeyboardInterrupt:
        return all(seen) and len(seen) > 0, any(pinned(t) for t in made[0].tensors)
    finally:
        HostBlocks.__init__, Checkpoint.read = init, read


def test_interrupted_load_leaves_nothing_pinned(tmp_path):
    ranks.save_random_model(tmp_path)
    assert run_ranks(interrupted_load, 1, tmp_path, device="cuda") == [(True, False)]
