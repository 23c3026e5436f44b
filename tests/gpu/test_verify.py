"""Sampling and verification on the GPU: the CPU's tokens, and replays of a CUDA graph that follow its inputs."""

import pytest
import torch

import fused_parallel as fp
from fused_parallel.ops import _verify_kernel as kernel
from fused_parallel.ops.sample import sample
from fused_parallel.ops.verify import METHODS, verify
from fused_parallel.ops.verify_tree import verify_tree

BATCH, K, VOCAB = 16, 3, 1000


def make_inputs():
    """A round on the CPU: logits, drafts drawn from the draft, keys, ragged lengths, filters, greedy and sampled."""
    target = torch.randn(BATCH, K + 1, VOCAB) * 3
    draft = target[:, :K] + torch.randn(BATCH, K, VOCAB)
    return dict(
        target_logits=target,
        draft_tokens=torch.distributions.Categorical(logits=draft).sample(),
        draft_logits=draft,
        seed=torch.randint(-(2**62), 2**62, (BATCH,)),
        step=torch.randint(0, 2**40, (BATCH,)),
        temperature=torch.rand(BATCH) * (torch.rand(BATCH) < 0.8),
        num_draft_tokens=torch.randint(0, K + 1, (BATCH,), dtype=torch.int32),
        top_k=torch.randint(0, 100, (BATCH,)),
        top_p=torch.rand(BATCH),
        min_p=torch.rand(BATCH) * 0.1,
    )


def calls():
    def tree(**inputs):
        parents = torch.arange(K, device=inputs["seed"].device) // 2 - 1  # arange: nothing is copied from the host
        return verify_tree(**inputs, parents=parents, return_logprobs=True)

    def draw(target_logits, **inputs):
        rest = {name: inputs[name] for name in ("seed", "step", "temperature", "top_k", "top_p", "min_p")}
        return (sample(target_logits[:, 0], **rest),)

    def chain(method):
        return lambda **inputs: verify(**inputs, method=method, return_logprobs=True)[:3]

    return {"tree": tree, "sample": draw} | {method: chain(method) for method in METHODS}


@pytest.mark.parametrize("name", calls())
@pytest.mark.filterwarnings("ignore:.*using the reference implementation")
def test_equals_cpu_and_replays_in_a_graph(seed, name):
    call = calls()[name]
    static = {key: value.cuda() for key, value in make_inputs().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(**static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(**static)
    for _ in range(5):
        inputs = make_inputs()
        for key, value in inputs.items():
            static[key].copy_(value)
        graph.replay()
        for got, eager, want in zip(captured, call(**static), call(**inputs), strict=True):
            assert torch.equal(got, eager)
            if want.dtype.is_floating_point:
                assert torch.allclose(got.cpu(), want, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("name", calls())
def test_the_short_way_gives_what_the_long_way_does(seed, name):
    """The first call of a signature goes through torch's dispatcher, the next ones do not; also on another stream."""
    call, side = calls()[name], torch.cuda.Stream()
    with torch.no_grad(), fp.use("fused"):
        for _ in range(3):
            inputs = {key: t.cuda() for key, t in make_inputs().items()}
            kernel._known.clear()
            long = call(**inputs)
            assert len(kernel._known) == 1
            short = call(**inputs)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                beside = call(**inputs)
            torch.cuda.synchronize()
            for a, b, c in zip(long, short, beside, strict=True):
                assert a is b is c is None or (torch.equal(a, b) and torch.equal(a, c))
            assert len(kernel._known) == 1
