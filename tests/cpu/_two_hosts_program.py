"""Run under torchrun in two namespaces by test_two_hosts.py: messages of a known size between two hosts of two ranks
each, the bytes that the link counts for them, and how long they took."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fused_parallel as fp
from fused_parallel.pipeline.stage_links import StageLinks


def sent_bytes() -> int:
    device = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


def main() -> None:
    elements, messages = int(sys.argv[1]), int(sys.argv[2])
    mesh = fp.init(tp=2, pp=2, device="cpu", timeout=60)
    links = StageLinks(mesh.get_group("pp"), mesh.get_group("tp"), slot_bytes=4 * elements)
    x = torch.arange(elements, dtype=torch.float32)
    tokens = torch.full((3,), 5)
    dist.barrier()
    before, begin = sent_bytes(), time.perf_counter()
    for number in range(messages):
        if links.stage == 0:
            links.send(x + number)
        else:
            received = links.receive((elements,), torch.float32)
            assert torch.equal(received.tensor, x + number)
            received.release()
        links.share(tokens)
    seconds = time.perf_counter() - begin
    after = sent_bytes()
    dist.barrier()
    told = {"rank": dist.get_rank(), "stage": links.stage, "tx": after - before, "seconds": seconds}
    told |= {"host": os.environ["FUSED_PARALLEL_HOST"], "name": socket.gethostname()}
    print("told " + json.dumps(told), flush=True)
    fp.finalize()


main()
