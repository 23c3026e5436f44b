"""Ranks on this host without torchrun: a pool of processes that run functions as one group (demo, tests,
benchmarks)."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable

import torch

from ..errors import PeerTimeoutError


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RankFailedError(RuntimeError):
    """A rank raised; `headline` is the message without its traceback."""

    def __init__(self, headline: str, trace: str) -> None:
        super().__init__(f"{headline}\n{trace}")
        self.headline = headline


def _end_with_parent() -> None:
    """A rank whose parent is gone, killed or not, ends, also while it waits for others or computes."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _rank_main(rank: int, world: int, environment: dict[str, str], calls, results) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # of a torchrun around this process: its agent would have to hold these ranks' store
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun: ranks that all take every core stand in each other's way
    while True:
        call = calls.get()
        if call is None:
            break
        function, args, kwargs = pickle.loads(call)
        try:
            results.put(pickle.dumps((rank, True, function(*args, **kwargs))))
        except BaseException as error:  # also SystemExit: the parent must hear of every end
            told = type(error).__name__, str(error), traceback.format_exc()
            results.put(pickle.dumps((rank, False, told)))
    from .groups import finalize

    finalize()


class RankPool:
    """`world_size` processes on this host, with torchrun's environment, that run a function together again and again.

    Args:
        world_size: number of processes.
        environment: extra environment variables of the ranks.

    Each rank computes with one CPU thread, as under torchrun, unless OMP_NUM_THREADS says otherwise. The ranks start
    without a process group; the functions they run call `fp.init`. Processes are started by forkserver,
    so functions must be importable (module level) and arguments picklable; results too (CPU tensors are fine).
    """

    def __init__(self, world_size: int, environment: dict[str, str] | None = None):
        self.world_size = world_size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "fused_parallel"])
        rendezvous = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self._results = context.Queue()
        self._calls = [context.Queue() for _ in range(world_size)]
        self.processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, rendezvous | (environment or {}), calls, self._results),
                daemon=True,
            )
            for rank, calls in enumerate(self._calls)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *args, timeout: float = 300.0, **kwargs) -> list:
        """Run `function(*args, **kwargs)` on every rank; the list of their results in rank order.

        Raises RankFailedError with the failing rank's traceback, or PeerTimeoutError if a rank died or the time ran
        out; in both cases the pool is ended, because its ranks may be stuck in a collective.
        """
        # Pickled here and not in the queue's thread, which would lose the error and leave the caller waiting.
        try:
            call = pickle.dumps((function, args, kwargs))
        except Exception as error:
            raise TypeError(
                f"{function!r} and its arguments must be picklable, and at module level: {error}"
            ) from error
        for calls in self._calls:
            calls.put(call)
        got: dict[int, object] = {}
        deadline = time.monotonic() + timeout
        while len(got) < self.world_size:
            try:
                rank, fine, value = pickle.loads(self._results.get(timeout=0.2))
            except queue.Empty:
                dead = [r for r, p in enumerate(self.processes) if not p.is_alive() and r not in got]
                if dead:
                    codes = ", ".join(f"rank {r} (exit code {self.processes[r].exitcode})" for r in dead)
                    self.kill()
                    raise PeerTimeoutError(f"{function.__name__}: {codes} died") from None
                if time.monotonic() > deadline:
                    missing = [r for r in range(self.world_size) if r not in got]
                    self.kill()
                    raise PeerTimeoutError(
                        f"{function.__name__}: rank(s) {missing} did not finish within {timeout:g} s"
                    ) from None
                continue
            if not fine:
                self.kill()
                kind, message, trace = value
                raise RankFailedError(f"rank {rank} of {self.world_size} raised {kind}: {message}", trace)
            got[rank] = value
        return [got[rank] for rank in range(self.world_size)]

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self.processes)

    def kill(self) -> None:
        """End all ranks at once, whatever they do."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(timeout=10)

    def close(self) -> None:
        """Let the ranks leave their group and end; kills those that do not within 10 s."""
        for calls, process in zip(self._calls, self.processes, strict=True):
            if process.is_alive():
                calls.put(None)
        end = time.monotonic() + 10
        for process in self.processes:
            process.join(timeout=max(0.0, end - time.monotonic()))
        self.kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def launch(function: Callable, world_size: int, *args, timeout: float = 300.0, environment=None, **kwargs) -> list:
    """Run `function` once on `world_size` new local ranks and return their results in rank order; see RankPool."""
    with RankPool(world_size, environment) as pool:
        return pool.run(function, *args, timeout=timeout, **kwargs)
