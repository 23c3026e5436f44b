"""A rank that is killed while another is in a matmul with communication: named, within one timeout."""

import os
import pickle
import queue
import signal
import time

import pytest
import torch
import torch.distributed as dist
from _matmul_ranks import Layer, use_kernels
from _worlds import WORLDS

import fused_parallel as fp
from fused_parallel.comm.launch import RankPool
from fused_parallel.comm.workspace import workspace_of

# What runs, and how the record of a wait in vain calls it.
KINDS = {
    "few rows": "matmul_all_reduce_decode",
    "persistent": "matmul_all_reduce",
    "reduce-scatter": "matmul_all_reduce",
    "gather": "all_gather_matmul",
}


def lose_a_peer(kind: str, mode: str, timeout: float):
    """Rank 1 is killed in the middle; the others say what they got and when."""
    mesh = fp.init(device="cuda", timeout=timeout)
    group = mesh["tp"]
    use_kernels(group, few=100 << 10)
    layer = Layer(group, 8 if kind == "few rows" else 512, 1024)  # of four ranks a row of tiles each
    algorithms = layer.algorithms_of_few() if kind == "few rows" else layer.algorithms()
    assert algorithms == {"decode" if kind == "few rows" else "persistent"}

    def one():
        if kind == "gather":
            return [layer.gathered()]
        if kind == "reduce-scatter":
            return [layer.scattered()]
        return layer.few()

    def body():
        for _ in range(10):
            one()

    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    dist.barrier()
    if dist.get_rank() == 1:
        for _ in range(3):
            graph.replay() if mode == "graph" else body()
        torch.cuda.synchronize()
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        for _ in range(6):
            graph.replay() if mode == "graph" else body()
        torch.cuda.synchronize()
        fp.check()
    except fp.PeerTimeoutError as error:
        told = str(error), time.monotonic() - begin
    else:
        return "nothing was raised", 0.0
    # The group stays failed, and says so at once.
    begin = time.monotonic()
    with pytest.raises(fp.PeerTimeoutError):
        one()
    graph.replay()
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 0.5
    assert workspace_of(group.get_group()).native.failed_rank() == 1
    return told


@WORLDS
@pytest.mark.parametrize(
    "kind,mode", [*((kind, "eager") for kind in KINDS), ("few rows", "graph"), ("gather", "graph")]
)
def test_killed_peer_is_named_within_one_timeout(kind, mode, world):
    timeout, pool = 3.0, RankPool(world)
    try:
        for calls in pool._calls:
            calls.put(pickle.dumps((lose_a_peer, (kind, mode, timeout), {})))
        deadline = time.monotonic() + 60
        told = {}
        while len(told) < world - 1:
            try:
                rank, fine, value = pickle.loads(pool._results.get(timeout=1))
            except queue.Empty:
                assert time.monotonic() < deadline, f"of {world} ranks only {sorted(told)} have ended"
                continue
            assert rank != 1 and fine, value
            told[rank] = value
        for rank, (message, seconds) in told.items():
            assert message.startswith(f"{KINDS[kind]} on rank {rank} waited in vain for rank 1"), message
            assert "global rank 1" in message
            assert timeout - 0.5 < seconds < timeout + 5, seconds
    finally:
        pool.kill()
