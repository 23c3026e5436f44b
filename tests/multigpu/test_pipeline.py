"""Models cut into two stages on two GPUs: tokens equal one GPU's, eager, in micro-batches and in graphs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fused_parallel as fp
from fused_parallel.testing.spawn import run_ranks

ASSETS = Path(__file__).resolve().parents[2] / "examples" / "assets"
PROMPTS = [[5, 17, 100, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52], list(range(20, 57))]
NEW = 40


def generated(mesh, draft, **options):
    model = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-target", mesh=mesh, dtype=torch.float32)
    drafter = draft
    if draft not in (None, "ngram"):
        drafter = fp.LlamaForCausalLM.from_pretrained(ASSETS / draft, mesh=None, dtype=torch.float32)
    results = [fp.generate(model, PROMPTS, NEW, draft=drafter, **options).tokens for _ in range(2)]
    assert results[0] == results[1]  # the channels go on where the first left them
    transports = {c.transport for c in model.stage.links.channels.values()} if model.stage.links else set()
    return results[0], transports


@pytest.fixture(scope="module")
def expected():
    ((tokens, _),) = run_ranks(generated, 1, None, device="cuda")
    return tokens


@pytest.mark.parametrize("draft", [None, "tiny-draft", "ngram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cuda_graph": True},
        {"microbatches": 2, "prefill_chunk": 8},
        {"microbatches": 4},
        {"microbatches": 2, "cuda_graph": True},
        {"microbatches": 4, "cuda_graph": True},
        {"num_draft_tokens": "auto", "cuda_graph": True},
    ],
    ids=["eager", "graph", "2 micro-batches", "4 micro-batches", "2 in graphs", "4 in graphs", "auto in graphs"],
)
def test_two_stages_give_the_same_tokens(expected, draft, options):
    for tokens, transports in run_ranks(generated, 2, draft, device="cuda", pp=2, **options):
        assert tokens == expected and transports == {"memory"}


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}])
@pytest.mark.parametrize("graph", [False, True])
def test_trees_on_two_ranks(expected, mesh, graph):
    for tree in ((3, 2, 1), (-1, -1, 0, 0, 2, 4)):
        options = {"num_draft_tokens": tree, "cuda_graph": graph}
        for tokens, _ in run_ranks(generated, 2, "tiny-draft", device="cuda", **mesh, **options):
            assert tokens == expected


def by_library(mesh):
    with fp.use("reference"):
        return generated(mesh, None)


def test_two_stages_over_nccl(expected):
    for tokens, transports in run_ranks(by_library, 2, device="cuda", pp=2):
        assert tokens == expected and transports == {"distributed"}


def step(mesh):
    """A stage's step as one graph, replayed 200 times: what the last stage gets is what the first computes eagerly."""
    rank, layers = mesh.get_local_rank("pp"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layers.append(torch.nn.Linear(512, 512, device="cuda").requires_grad_(False))
    stage = fp.nn.PipelineStage(layers[rank], group=mesh["pp"])
    assert stage.capturable
    x, count = torch.zeros(4, 512, device="cuda"), torch.zeros(4, device="cuda")
    history = torch.zeros(256, 4, device="cuda")
    place = torch.zeros(1, dtype=torch.int64, device="cuda")

    def body():
        count.add_(1)
        x.copy_(count.unsqueeze(1).expand(4, 512) / 100)
        out = stage(x, (4, 512), torch.float32)
        back = out.sum(1) if out is not None else torch.zeros_like(count)
        stage.share(back)
        history.index_copy_(0, place, back.unsqueeze(0))
        place.add_(1)

    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    dist.barrier()
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    fp.check()
    values = torch.arange(1, 202, device="cuda")[:, None, None].expand(201, 4, 512) / 100
    eager = torch.stack([layers[1](layers[0](v)).sum(1) for v in values])
    return (history[:201] - eager).abs().max().item() / eager.abs().max().item()


def test_a_step_is_one_graph():
    assert max(run_ranks(step, 2, device="cuda", pp=2)) < 1e-4
