"""The modules on Gloo ranks: equal to the torch modules they replace, state dicts, padding, head layouts, streaming."""

import pytest
import torch
import torch.nn.functional as F
from _errors import assert_starts, errors_of
from torch import nn

import fused_parallel as fp
from fused_parallel.nn import HeadLayout
from fused_parallel.testing.spawn import run_ranks
from fused_parallel.testing.tolerances import assert_close


def full_modules():
    """The torch modules, alike on every rank, with sizes that 2 and 4 do not divide."""
    torch.manual_seed(1)
    return nn.Linear(10, 7), nn.Linear(10, 7, bias=False), nn.Embedding(13, 6), nn.Linear(6, 13, bias=False)


def rank_linear(mesh):
    group = mesh["tp"]
    biased, plain, embedding, head = full_modules()
    x, ids = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)), torch.tensor([[0, 12, 5], [7, 6, 1]])
    with torch.no_grad():
        for linear in (biased, plain):
            expected = linear(x)
            bias = linear.bias is not None
            column = fp.nn.ColumnParallelLinear(10, 7, bias, group=group, gather_output=True)
            column.load_state_dict(linear.state_dict())
            row = fp.nn.RowParallelLinear(10, 7, bias, group=group, input_is_parallel=False)
            row.load_state_dict(linear.state_dict())
            assert_close(column(x), expected)
            assert_close(row(x), expected)
            assert not any(p.requires_grad for p in [*column.parameters(), *row.parameters()])
            again = fp.nn.RowParallelLinear(10, 7, bias, group=group, input_is_parallel=False)
            again.load_state_dict(row.state_dict())  # this rank's own shards load too
            assert torch.equal(again(x), row(x))
        local = fp.nn.VocabParallelEmbedding(13, 6, group=group)
        local.load_state_dict(embedding.state_dict())
        assert torch.equal(local(ids), embedding(ids))
        lm_head = fp.nn.ParallelLMHead(6, 13, group=group, gather_output=True)
        lm_head.load_state_dict(head.state_dict())
        assert_close(lm_head(embedding(ids)), head(embedding(ids)))
        lm_head.tie(local)
        assert_close(lm_head(embedding(ids)), F.linear(embedding(ids), embedding.weight))
    return [tuple(m.weight.shape) for m in (column, row, local, lm_head)]


def test_linear_embedding_head():
    assert run_ranks(rank_linear, 2)[1] == [(4, 10), (7, 5), (7, 6), (7, 6)]
    assert run_ranks(rank_linear, 4)[3] == [(2, 10), (7, 3), (4, 6), (4, 6)]


def rank_mlp(mesh):
    torch.manual_seed(3)
    gate, up, down = nn.Linear(8, 11), nn.Linear(8, 11), nn.Linear(11, 8)
    named = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    state = {f"{n}.{key}": t for n, m in named.items() for key, t in m.state_dict().items()}
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    with torch.no_grad():
        expected = down(F.silu(gate(x)) * up(x))
        mlp = fp.nn.ParallelMLP(8, 11, bias=True, group=mesh["tp"])
        mlp.load_state_dict(state)
        assert_close(mlp(x), expected)
        norm = fp.nn.RMSNorm(8, 1e-5)
        normed, new = mlp(x, residual, norm)
        assert_close(new, expected + residual)
        assert torch.equal(normed, norm(new))
        assert_close(mlp(x, residual), expected + residual)
        # The same, every rank holding its rows.
        world, rank = mesh["tp"].size(), mesh["tp"].get_local_rank()
        rows = torch.randn(2 * world, 8, generator=torch.Generator().manual_seed(4))
        mine = slice(2 * rank, 2 * rank + 2)
        split = fp.nn.ParallelMLP(8, 11, bias=True, group=mesh["tp"], sequence_parallel=True)
        split.load_state_dict(state)
        assert_close(split(rows[mine]), mlp(rows)[mine])
        normed, new = split(rows[mine], rows[mine], norm)
        assert_close(new, (mlp(rows) + rows)[mine])
        assert torch.equal(normed, norm(new))
        assert_close(split(rows[mine], rows[mine]), new)
    try:
        mlp.load_state_dict(state | {"gate_proj.weight": torch.randn(10, 8)})
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_mlp(world):
    assert "gate_proj.weight: has shape [10, 8], expected [11, 8] (the full tensor)" in run_ranks(rank_mlp, world)[0]


@pytest.mark.parametrize(
    "heads,kv_heads,world",
    [(8, 8, 4), (8, 2, 2), (8, 2, 4), (6, 2, 4), (5, 5, 2), (12, 3, 2), (7, 1, 4), (64, 8, 8), (10, 5, 3), (9, 3, 6)],
)
def test_head_layout_covers_every_head_once(heads, kv_heads, world):
    layouts = [HeadLayout.of(heads, kv_heads, rank, world) for rank in range(world)]
    held = [h for layout in layouts for h in range(layout.q_start, layout.q_stop)]
    assert held == list(range(heads))
    for layout in layouts:
        per = layout.local_q // layout.local_kv
        for local, head in enumerate(range(layout.q_start, layout.q_stop)):
            assert layout.kv_start + local // per == head // (heads // kv_heads)
        assert layout.local_q == layouts[0].local_q and layout.local_kv == layouts[0].local_kv


@pytest.mark.parametrize("heads,kv_heads,world", [(4, 4, 8), (6, 3, 4), (2, 1, 4), (5, 5, 4)])
def test_head_layout_refuses_idle_ranks(heads, kv_heads, world):
    with pytest.raises(ValueError, match=f"tp={world} does not fit {heads} query heads and {kv_heads} key-value heads"):
        HeadLayout.of(heads, kv_heads, 0, world)


def test_streamed_layers_equal_resident_ones(seed):
    layers = {str(i): nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for i in range(5)}
    x = torch.randn(2, 6)
    with torch.no_grad():
        expected = x
        for layer in layers.values():
            expected = layer(expected)
        for slots in (1, 2, 3):
            streamed = fp.nn.StreamedLayers(layers, device="cpu", slots=slots)
            for _ in range(2):
                y, names = x, []
                for name, layer in streamed:
                    names.append(name)
                    y = layer(y)
                assert torch.equal(y, expected) and names == list(layers)
    assert streamed.host_bytes >= 5 * 4 * (36 + 6 + 12) and len(streamed) == 5
    state = streamed.state_dict()
    assert torch.equal(state["3.0.weight"], layers["3"][0].weight)


def test_streamed_layers_survive_an_interrupted_pass(seed):
    layers = {str(i): nn.Linear(4, 4) for i in range(3)}
    weights = [layer.weight.clone() for layer in layers.values()]
    streamed = fp.nn.StreamedLayers(layers, device="cpu")
    for _ in streamed:
        break
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers.values(), weights, strict=True))
    with pytest.raises(ValueError, match="at least one layer"):
        fp.nn.StreamedLayers({}, device="cpu")


def test_kv_cache_lengths(seed):
    cache = fp.nn.KVCache(2, 3, 8, 2, 4, dtype=torch.float32)
    cache.lens.copy_(torch.tensor([0, 2, 5]))
    assert cache.positions(2).tolist() == [[0, 1], [2, 3], [5, 6]]
    assert cache.capacity == 8 and cache.batch == 3 and cache.nbytes == 2 * 2 * 3 * 8 * 2 * 4 * 4
    cache.check_room(3)
    with pytest.raises(ValueError, match="4 more tokens do not fit"):
        cache.check_room(4)
    cache.context = 3
    cache.reset()
    assert cache.context is None
    assert cache.lens.tolist() == [0, 0, 0]


def test_kv_cache_keeps_a_path(seed):
    layers, capacity, depth = 2, 12, 4
    cache = fp.nn.KVCache(layers, 5, capacity, 2, 4, dtype=torch.float32)
    cache.k.normal_()
    cache.v.normal_()
    lens = [0, 3, 6, 9, 12]  # the last two have no room for all of the tree, and stand still
    cache.lens.copy_(torch.tensor(lens))
    path = torch.tensor([[1, 2, 5, 7], [0, 1, -1, -1], [2, 3, 4, -1], [1, 5, 6, 7], [0, 2, -1, -1]])
    before = cache.k.clone(), cache.v.clone()
    cache.keep_path(path)
    assert cache.lens.tolist() == lens
    for was, now in zip(before, (cache.k, cache.v), strict=True):
        expected = was.clone()
        for b in range(5):
            for i in range(depth):
                node = int(path[b, i])
                if node >= 0 and lens[b] + 1 + node < capacity:
                    expected[:, b, lens[b] + 1 + i] = was[:, b, lens[b] + 1 + node]
        assert torch.equal(now, expected)
    cache.keep_path(path[:, :0])
    with pytest.raises(TypeError, match="int32"):
        cache.keep_path(path.int())
    with pytest.raises(ValueError, match=r"expected \[5, depth\]"):
        cache.keep_path(path[:3])


def rank_attention(mesh):
    torch.manual_seed(5)
    attention = fp.nn.ParallelAttention(12, 4, 2, 6, group=mesh["tp"])
    for parameter in attention.parameters():
        parameter.normal_()
    rotary, found = fp.nn.RotaryEmbedding(6, 1e4), []
    x, positions = torch.randn(2, 3, 12), torch.tensor([[0, 1, 2], [4, 5, 6]])
    for lens in (None, torch.tensor([3, 7], dtype=torch.int32)):
        cache = fp.nn.KVCache(1, 2, 8, 2, 6, dtype=torch.float32)
        out = attention(x, *rotary(positions, x.dtype), cache, positions, lens=lens)
        found.append((out, cache.k, cache.v))
    return found


def test_attention_computes_lengths_that_are_not_given():
    of_none, of_given = run_ranks(rank_attention, 1)[0]
    assert all(torch.equal(a, b) for a, b in zip(of_none, of_given, strict=True))


def rank_compiled(mesh):
    torch.manual_seed(4)
    group = mesh["tp"]
    mlp = fp.nn.ParallelMLP(8, 12, group=group)
    embedding = fp.nn.VocabParallelEmbedding(13, 8, group=group)
    head = fp.nn.ParallelLMHead(8, 13, group=group, gather_output=True)
    for parameter in (*mlp.parameters(), *embedding.parameters(), *head.parameters()):
        parameter.normal_()
    norm, ids = fp.nn.RMSNorm(8), torch.arange(13)

    def step(ids):
        x = embedding(ids)
        normed, x = mlp(norm(x), x, norm)
        return head(normed), x

    with torch.no_grad():
        return step(ids), torch.compile(step, fullgraph=True, backend="aot_eager")(ids)


@pytest.mark.parametrize("world", [1, 2])
def test_modules_compile_without_breaks(world):
    for eager, compiled in run_ranks(rank_compiled, world):
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def rank_wrong_input(mesh):
    column = fp.nn.ColumnParallelLinear(8, 6, group=mesh["tp"])
    row = fp.nn.RowParallelLinear(8, 6, group=mesh["tp"])
    x = torch.randn(2, 8)
    return errors_of(
        [
            lambda: column(torch.randn(2, 7)),
            lambda: row(torch.randn(2, 7)),
            lambda: row(x[:, : row.weight.shape[1]], norm=fp.nn.RMSNorm(6)),
            lambda: fp.nn.RowParallelLinear(-4, 4, group=mesh["tp"]),
            lambda: fp.nn.ColumnParallelLinear(0, 4, group=mesh["tp"]),
            lambda: fp.nn.ColumnParallelLinear(8, 4, group=mesh["tp"], gather_output=True, sequence_parallel=True),
            lambda: fp.nn.quantize_(fp.nn.ParallelMLP(8, 8, group=mesh["tp"], sequence_parallel=True), "int8"),
        ]
    )


def test_wrong_input():
    expected = [
        "ValueError: linear: x [..., K] and weight [N, K] must share K, got (2, 7)",
        "ValueError: matmul_all_reduce: x [..., K] and weight [N, K] must share K, got (2, 7)",
        "ValueError: RowParallelLinear: norm needs a residual to add to",
        "ValueError: RowParallelLinear: sizes must be positive, got -4 and 4",
        "ValueError: ColumnParallelLinear: sizes must be positive, got 0 and 4",
        "ValueError: ColumnParallelLinear: sequence_parallel leaves the outputs split; not with gather_output",
        "ValueError: quantize_: there is no quantised form of sequence-parallel layers",
    ]
    assert_starts(run_ranks(rank_wrong_input, 2)[1], expected)
