"""GPUs and links the planner knows by name. Every constant with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import measured
from .measured import PAIR_ALL_REDUCE_US, fit_link


@dataclass(frozen=True)
class GPU:
    """One GPU. GB are 10^9 bytes; rates in GB/s and dense TFLOP/s as the datasheet gives them.

    `memory_share`, `compute_share` and `matmul_start_us` turn them into what matmuls reach; by default what was
    measured on an H200 (measured.py), which is an assumption for every other GPU but the H100, which has its own.
    """

    name: str
    memory_gb: float
    hbm_gb_s: float
    bf16_tflops: float
    fp8_tflops: float | None  # None: no fp8 matmul; fp8 weights are widened and computed in bf16
    host_gb_s: float  # host memory to GPU, pinned, one direction
    memory_share: float = field(default_factory=lambda: measured.h200_constants()["memory_share"])
    compute_share: float = field(default_factory=lambda: measured.h200_constants()["compute_share"])
    matmul_start_us: float = field(default_factory=lambda: measured.h200_constants()["matmul_start_us"])
    # Of the tensor cores' rate in attention: published forward rates of FlashAttention lie between 35 % (version 2) and
    # 75 % (version 3) of an H100's; the middle is an assumption.
    attention_share: float = 0.5


@dataclass(frozen=True)
class Link:
    """What joins the GPUs of a host, or hosts.

    An all-reduce over n GPUs of `bytes` each takes start_us + hop_us (n-1) + 2(n-1)/n bytes / bus with
    bus = bus_gb_s (n/2)^-sharing; sending takes p2p_us + bytes / p2p_gb_s. `table` gives measured all-reduces instead,
    number of ranks -> ((bytes, us), ...), interpolated; where it has no entry the formula holds. `behind`, alike, is
    what an all-reduce adds to the matmul before it where kernels hide a part of it; without an entry, all of it.
    """

    name: str
    start_us: float
    hop_us: float
    bus_gb_s: float
    sharing: float
    p2p_us: float
    p2p_gb_s: float
    table: Mapping[int, measured.Points] = field(default_factory=dict, hash=False)
    behind: Mapping[int, measured.Points] = field(default_factory=dict, hash=False)


# Host to GPU: 55.5 GB/s measured on the H200 pair over PCIe 5 x16; PCIe 4 half of it (half the lane rate).
_PCIE5, _PCIE4 = 55.5, 27.7

# NVIDIA datasheets: memory, bandwidth, dense (not sparse) tensor rates with fp32 accumulation.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # A100 datasheet (80GB SXM): 2039 GB/s, 312 TFLOP/s bf16
        GPU("a100", 80, 2039, 312, None, _PCIE4),
        # H100 datasheet (SXM5): 3.35 TB/s, 989.5 bf16, 1979 fp8; shares of our own (cuBLAS reads weights at 3.02 TB/s,
        # and benchmarks/results/probe_h100.json saw 3.10 TB/s in a reduction, 721 to 807 TFLOP/s from 512 rows on, and
        # 47.5 GB/s from the host to each of two at once, 51.9 to one alone)
        GPU("h100", 80, measured.H100_HBM_GB_S, 989.5, 1979, 47.5, **measured.h100_constants()),
        # H200 datasheet (SXM): 141 GB, 4.8 TB/s, tensor rates of the H100 (cuBLAS reads weights at 4.22 TB/s;
        # benchmarks/results/probe_h200.json: 4.50 in a matrix-vector product, 4.29 copying)
        GPU("h200", 141, measured.H200_HBM_GB_S, 989.5, 1979, _PCIE5),
        # HGX B200: 180 GB, 8 TB/s, 2250 bf16, 4500 fp8 dense
        GPU("b200", 180, 8000, 2250, 4500, _PCIE5),
        # L40S datasheet: 48 GB, 864 GB/s, 362 bf16, 733 fp8
        GPU("l40s", 48, 864, 362, 733, _PCIE4),
        # L4 datasheet: 24 GB, 300 GB/s, 121 bf16, 242.5 fp8
        GPU("l4", 24, 300, 121, 242.5, _PCIE4),
        # GA102 white paper, RTX 3090: 936 GB/s, 71 bf16 with fp32 accumulation
        GPU("rtx3090", 24, 936, 71, None, _PCIE4),
        # Ada white paper, RTX 4090: 1008 GB/s, 165.2 bf16 and 330.3 fp8 with fp32 accumulation
        GPU("rtx4090", 24, 1008, 165.2, 330.3, _PCIE4),
        # RTX PRO 6000 Blackwell Workstation Edition (600 W): 96 GB, 1792 GB/s, 503.8 bf16, 1007.6 fp8 dense
        GPU("rtxpro6000", 96, 1792, 503.8, 1007.6, _PCIE5),
    )
}


def _survey(name: str, survey: str, scale: float, p2p_us: float, p2p_gb_s: float) -> Link:
    """A link fitted to the survey's row, its rate times `scale`."""
    fit = dict(fit_link(survey))
    fit["bus_gb_s"] *= scale
    return Link(name=name, p2p_us=p2p_us, p2p_gb_s=p2p_gb_s, **fit)


def _network(name: str, gbit: float, share: float, us: float) -> Link:
    """A network: every hop of an all-reduce between hosts takes `us`; `share` of the line rate (in Gbit/s) arrives.
    start_us is 0: inside the host the collective's start is counted already."""
    rate = gbit / 8 * share
    return Link(name=name, start_us=0.0, hop_us=us, bus_gb_s=rate, sharing=0.0, p2p_us=us, p2p_gb_s=rate)


_NV, _P5, _P4 = "H200 NVLink4", "RTX PRO 6000 PCIe5", "L40S PCIe4"
LINKS = {
    link.name: link
    for link in (
        # NVLink 4: survey for the all-reduce; the pair's NCCL send/recv, 14.7 us in a graph and 333 GB/s. Others scale
        # its rate by the datasheets' rate each way (NVLink 3: 300, 4: 450, 5: 900 GB/s; the bridge of an RTX 3090:
        # 56.25). A100 send/recv: 13 us, 228 GB/s published.
        _survey("nvlink3", _NV, 300 / 450, 13.0, 228),
        _survey("nvlink4", _NV, 1.0, 14.7, 333),
        _survey("nvlink5", _NV, 2.0, 14.7, 666),
        _survey("nvlink-bridge", _NV, 56.25 / 450, 14.7, 333 * 56.25 / 450),
        # PCIe with peer access: survey; send 4-6 us and 53-57 GB/s published for PCIe 5, lanes of 4 and 3 half and a
        # quarter of that.
        _survey("pcie5", _P5, 1.0, 5.0, 55),
        _survey("pcie4", _P4, 1.0, 5.0, 27.5),
        _survey("pcie3", _P4, 0.5, 5.0, 13.7),
        # Without peer access every byte goes through host memory, in and out: assumed half the rate, twice the time.
        _survey("pcie5-no-peer", _P5, 0.5, 10.0, 27.5),
        _survey("pcie4-no-peer", _P4, 0.5, 10.0, 13.7),
        _survey("pcie3-no-peer", _P4, 0.25, 10.0, 6.8),
        # InfiniBand: 18 us cross-node send/recv and 46-48 of NDR's 50 GB/s published; HDR alike, at half the rate.
        _network("ib-ndr", 400, 47 / 50, 18.0),
        _network("ib-hdr", 200, 47 / 50, 18.0),
        # Ethernet with TCP: 90 % of the line rate and 40 us are assumptions; measure where it matters.
        _network("eth400", 400, 0.9, 40.0),
        _network("eth200", 200, 0.9, 40.0),
        _network("eth100", 100, 0.9, 40.0),
        _network("eth25", 25, 0.9, 40.0),
    )
}

# The pairs: this project's own NCCL all-reduces in place of the survey's; of the H100s the probe's NCCL send/recv, too
# (benchmarks/results/probe_h100.json: 10.2 us, 282 GB/s).
H200_PAIR_LINK = Link(
    **{
        **vars(LINKS["nvlink4"]),
        "name": "nvlink4-measured-pair",
        "table": {2: tuple((tokens * 8192 * 2, us) for tokens, us in PAIR_ALL_REDUCE_US.items())},
    }
)
H100_PAIR_LINK = Link(
    **{
        **vars(LINKS["nvlink4"]),
        "name": "nvlink4-measured-h100",
        "p2p_us": 10.2,
        "p2p_gb_s": 282,
        "table": {2: measured.h100_all_reduce(ours=False)},
    }
)
LINKS |= {link.name: link for link in (H200_PAIR_LINK, H100_PAIR_LINK)}


def _ours() -> Link:
    """This library's kernels over NVLink 4: measured on two H100, an assumption for H200 and for more GPUs. There the
    start is taken to grow with the ranks as NCCL's does in the survey, in proportion, the rate to stay, and nothing to
    be hidden behind the matmul."""
    start, rate = measured.ours_all_reduce()
    nccl, (push_us, push_gb_s) = LINKS["nvlink4"], measured.push()
    grows = nccl.hop_us / (nccl.start_us + nccl.hop_us)
    return Link(
        name="nvlink4, this library's kernels",
        start_us=start * (1 - grows),
        hop_us=start * grows,
        bus_gb_s=rate,
        sharing=0.0,
        p2p_us=push_us,
        p2p_gb_s=push_gb_s,
        table={2: measured.h100_all_reduce(ours=True)},
        behind={2: measured.h100_behind()},
    )


OURS_NVLINK4 = _ours()
