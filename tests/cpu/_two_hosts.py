"""Two hosts on this machine: network namespaces, joined by a pair of virtual Ethernet devices."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


class TwoHosts:
    """`names` are the namespaces, `devices` their ends of the link."""

    def __init__(self, tag: str) -> None:
        self.names = [f"fp{tag}h{i}" for i in range(2)]
        self.devices = [f"fp{tag}e{i}" for i in range(2)]

    def start(self) -> None:
        for name in self.names:
            sh("ip", "netns", "add", name)
        sh("ip", "link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, ADDRESSES, strict=True):
            sh("ip", "link", "set", device, "netns", name)
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            sh("ip", "-n", name, "link", "set", device, "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")

    def stop(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # and the link with them

    def limit(self, *discipline: str) -> None:
        """A queueing discipline of tc in both directions: delay and bandwidth."""
        for name, device in zip(self.names, self.devices, strict=True):
            sh("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *discipline)

    def torchrun(self, node: int, per_node: int, *what: str) -> subprocess.Popen:
        """torchrun on host `node`, as the README has it, with what namespaces of one machine need besides."""
        command = ["ip", "netns", "exec", self.names[node], sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(per_node)]
        command += ["--master-addr", ADDRESSES[0], "--master-port", "29500", *what]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # The namespaces share a host name and /dev/shm; a rank's address is that of its end of the link.
            "FUSED_PARALLEL_HOST": self.names[node],
            "GLOO_SOCKET_IFNAME": self.devices[node],
            "TP_SOCKET_IFNAME": self.devices[node],
        }
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def why_not() -> str | None:
    """Why there are no namespaces here; None if there are."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (iproute2)"
    probe = TwoHosts(f"{os.getpid() % 10000}p")
    try:
        probe.start()
    except OSError as error:
        return f"network namespaces are not permitted: {error}"
    finally:
        probe.stop()
    return None


@contextlib.contextmanager
def two_hosts():
    hosts = TwoHosts(str(os.getpid() % 10000))
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def finish(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """What each printed; raises if one fails or the time runs out."""
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, texts, strict=True):
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}:\n{text[-4000:]}")
    return texts
