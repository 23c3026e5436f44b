"""The matmul kernel for few rows with its exchange, between virtual ranks of one GPU."""

import time

import pytest
import torch
from _matmul_cases import NEEDS_HOPPER, launch_linear, operands, summed_products
from _virtual_ranks import VirtualRanks

from fused_parallel import _ext
from fused_parallel.testing.tolerances import assert_close

pytestmark = NEEDS_HOPPER
EPS = 1e-5
ROWS = (1, 3, 8, 9, 16, 17, 32, 33, 64)


class Layer:
    """A row-parallel layer of virtual ranks: its operands, and what follows them."""

    def __init__(self, ranks: VirtualRanks, m: int, k: int, n: int, dtype, norm: bool = True, bias: bool = True):
        self.ranks, self.norm, self.fresh_weight = ranks, norm, bool(m % 2)
        self.xs, self.weights = operands(ranks.world, m, k, n, dtype)
        self.residual, self.gain, self.bias = (torch.randn(s, device="cuda").to(dtype) for s in ((m, n), n, n))
        if not bias:
            self.bias = None
        self.outs = [[x.new_empty(m, n) for _ in range(2)] for x in self.xs]

    def launch(self, rank: int) -> None:
        x, weight = self.xs[rank], self.weights[rank]
        out, new = self.outs[rank]
        _ext.extension().matmul_all_reduce_decode(
            self.ranks.native[rank],
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=0 if self.bias is None else self.bias.data_ptr(),
            residual=self.residual.data_ptr() if self.norm else 0,
            norm_weight=self.gain.data_ptr() if self.norm else 0,
            out=out.data_ptr(),
            new_residual=new.data_ptr() if self.norm else 0,
            m=x.shape[0],
            n=weight.shape[0],
            k=x.shape[1],
            eps=EPS,
            fresh_weight=self.fresh_weight,
            dtype=_ext.DTYPE_CODES[x.dtype],
            stream=self.ranks.streams[rank].cuda_stream,
        )

    def poison(self) -> None:
        for out in self.outs:
            for t in out:
                t.fill_(float("nan"))

    def run(self):
        self.poison()
        self.ranks.on_all(self.launch)
        return [[t.clone() for t in out[: 1 + self.norm]] for out in self.outs]

    def expected(self):
        """Each partial rounded to the dtype, as it travels, then float64."""
        total = summed_products(self.xs, self.weights)
        if self.bias is not None:
            total = total + self.bias.double()
        if not self.norm:
            return [total]
        new = total + self.residual.double()
        return [new * (new.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.gain.double(), new]

    def check(self, got) -> None:
        for out, expected in zip(got[0], self.expected(), strict=True):
            assert_close(out, expected, factor=4)
        for out in got[1:]:
            assert all(torch.equal(a, b) for a, b in zip(out, got[0], strict=True))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("m", ROWS)
def test_sums(world, m, seed):
    """Sizes for every way to split the work, given the room that virtual ranks have, with and without norm and bias."""
    ranks = VirtualRanks(world, slot_bytes=2 << 20)
    for k, n in [(64, 128), (72, 1032), (2880, 2880), (520, 2048), (512, 4096)]:
        for dtype, norm, bias in (
            (torch.bfloat16, True, False),
            (torch.float16, False, True),
            (torch.bfloat16, True, True),
        ):
            if not _ext.extension().takes_matmul_decode(ranks.native[0], m, n):
                continue
            layer = Layer(ranks, m, k, n, dtype, norm, bias)
            got = layer.run()
            layer.check(got)
            again = layer.run()
            assert all(torch.equal(a, b) for a, b in zip(got[0], again[0], strict=True))
    ranks.check()


def test_full_size(seed):
    """The sizes of a 70B model, whose grids are a CTA a multiprocessor, on two ranks that share the GPU."""
    # Both kernels of 128 CTAs fit one GPU at once, two a multiprocessor.
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    ranks = VirtualRanks(2, slot_bytes=2 << 20, max_threads=multiprocessors * 512)
    for m in (1, 16, 32, 64):
        for k in (4096, 14336):
            layer = Layer(ranks, m, k, 8192, torch.bfloat16)
            layer.check(layer.run())
    ranks.check()


def test_graph_with_changing_inputs_and_skew(seed):
    """Chains of layers of several shapes with all-reduces between, replayed with other inputs, ranks delayed."""
    ranks = VirtualRanks(2, slot_bytes=2 << 20)
    layers = [Layer(ranks, 4, 256, 1024, torch.bfloat16), Layer(ranks, 40, 512, 512, torch.bfloat16, norm=False)]
    layers.append(Layer(ranks, 16, 136, 2048, torch.float16))
    summed = [torch.empty_like(layers[0].outs[0][0]) for _ in range(2)]

    def chain(rank):
        for layer in (*layers, layers[0]):
            layer.launch(rank)
            ranks.launch(rank, layers[0].outs[rank][0], summed[rank], two_shot=False)

    graphs = ranks.skewed_graphs(chain, 8, 100_000)
    for replay in range(200):
        for layer in layers:
            for x in (*layer.xs, layer.residual):
                x.normal_()
            layer.poison()
        graphs[replay % len(graphs)].replay()
        for layer in layers:
            layer.check([out[: 1 + layer.norm] for out in layer.outs])
        assert torch.equal(summed[0], layers[0].outs[0][0] * 2) and torch.equal(summed[0], summed[1])
    ranks.check()


@pytest.mark.parametrize("m", [1, 8, 16, 64])
def test_around_a_local_kernel(m, seed):
    """A decoding layer's second half: sum and norm, gate and up in more tiles than there are multiprocessors, sum and
    norm. Each kernel is launched while the one before runs; what it reads differs in every replay."""
    hidden, size = 2048, 9480
    ranks = VirtualRanks(2, slot_bytes=2 << 20)
    before = Layer(ranks, m, 512, hidden, torch.bfloat16, bias=False)
    after = Layer(ranks, m, size, hidden, torch.bfloat16, bias=False)
    before.fresh_weight = after.fresh_weight = False
    gates = [torch.randn(2 * size, hidden, device="cuda").mul_(hidden**-0.5).to(torch.bfloat16) for _ in range(2)]

    def chain(rank):
        before.launch(rank)
        launch_linear(before.outs[rank][0], gates[rank], after.xs[rank], gated=True, stream=ranks.streams[rank])
        after.launch(rank)

    graphs = ranks.skewed_graphs(chain, 8, 50_000)
    for replay in range(100):
        for x in (*before.xs, before.residual, after.residual):
            x.normal_()
        before.poison()
        after.poison()
        for x in after.xs:
            x.fill_(float("nan"))
        graphs[replay % len(graphs)].replay()
        for layer in (before, after):
            layer.check(layer.outs)
        for rank in range(2):
            product = before.outs[rank][0].double() @ gates[rank].double().t()
            gate, up = product.to(torch.bfloat16).double().chunk(2, -1)
            assert_close(after.xs[rank], gate * gate.sigmoid() * up, factor=2)
    ranks.check()


def test_signed_zeros_and_what_is_no_number(seed):
    ranks = VirtualRanks(2)
    layer = Layer(ranks, 8, 64, 128, torch.bfloat16, norm=False, bias=False)
    for x in layer.xs:
        x.zero_()
        x[1].fill_(-0.0)
        x[2, 0], x[3, 0], x[4, 0] = float("nan"), float("inf"), -float("inf")
    got = layer.run()
    (expected,) = layer.expected()
    assert torch.equal(got[0][0].nan_to_num(7), expected.to(torch.bfloat16).nan_to_num(7))
    assert torch.equal(got[0][0].view(torch.int16), got[1][0].view(torch.int16))
    ranks.check()


def test_missing_rank_is_named_within_the_timeout():
    ranks = VirtualRanks(2, timeout_seconds=0.5)
    layer = Layer(ranks, 8, 512, 1024, torch.bfloat16)
    torch.cuda.synchronize()
    begin = time.monotonic()
    ranks.start()
    layer.launch(0)
    torch.cuda.synchronize()
    assert 0.4 < time.monotonic() - begin < 1.5
    assert ranks.native[0].failure() == "matmul_all_reduce_decode on rank 0 waited in vain for rank 1 (call 0)"
    with pytest.raises(RuntimeError, match="waited in vain for rank 1"):
        layer.launch(0)


def test_errors():
    ranks = VirtualRanks(2)
    for m, k, n in ((65, 64, 64), (4, 60, 64), (4, 64, 60), (4, 64, 1 << 20)):
        with pytest.raises(RuntimeError, match=f"m={m}, n={n}, k={k}"):
            Layer(ranks, m, k, n, torch.bfloat16).launch(0)
    with pytest.raises(RuntimeError, match="only float16 and bfloat16"):
        Layer(ranks, 4, 64, 64, torch.float32).launch(0)
