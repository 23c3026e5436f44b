"""fp.init and the mesh, dispatch, debug mode, and what happens when ranks fail: clear messages, no hang."""

import datetime
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fused_parallel as fp
from fused_parallel.comm import groups
from fused_parallel.comm.collectives import CommunicationTimer
from fused_parallel.comm.launch import RankPool, free_port, launch
from fused_parallel.ops._dispatch import choose_fused
from fused_parallel.testing.spawn import run_ranks


def rank_mesh(mesh):
    return mesh.mesh_dim_names, tuple(mesh.shape), tuple(mesh.get_local_rank(n) for n in ("dp", "pp", "tp"))


def test_mesh_dimensions():
    results = run_ranks(rank_mesh, 4, tp=2, pp=2)
    assert [r[2] for r in results] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert results[0][:2] == (("dp", "pp", "tp"), (1, 2, 2))
    assert run_ranks(rank_mesh, 4, dp=2)[3] == (("dp", "pp", "tp"), (2, 1, 2), (1, 0, 1))


def test_world_of_one():
    mesh = fp.init(device="cpu")
    assert tuple(mesh.shape) == (1, 1, 1) and fp.init(tp=1, device="cpu")["tp"].size() == 1


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tp": 3}, r"tp \* pp \* dp = 3 \* 1 \* 1 = 3, but the world has 1 rank\(s\); start that many: torchrun"),
        ({"pp": 2}, r"the world of 1 rank\(s\) is not divisible by pp \* dp = 2 \* 1; start a multiple of 2: torchrun"),
        ({"tp": 0}, "tp must be a positive integer, got 0"),
        ({"tp": 1.5}, "tp must be a positive integer, got 1.5"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        fp.init(**({"device": "cpu"} | options))


def run_script(code: str, timeout: float = 60, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def test_port_in_use():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_script(
            "import fused_parallel as fp; fp.init(device='cpu', timeout=20)",
            RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    assert done.returncode != 0
    assert "that port is in use: choose another (torchrun --master-port N, or MASTER_PORT=N)" in done.stderr


def test_ranks_that_never_come():
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run_script("import fused_parallel as fp; fp.init(device='cpu', timeout=2)", **environment)
    assert done.returncode != 0 and "check that all 2 ranks were started" in done.stderr
    done = run_script("import fused_parallel as fp; fp.init(device='cpu')", RANK="x", WORLD_SIZE="2")
    assert done.returncode != 0 and "RANK and WORLD_SIZE must both be set to integers" in done.stderr


def rank_lost(how: str, timeout: float):
    """Rank 1 leaves; the others' next all-reduce must raise. Returns (seconds, error type, text) on the others."""
    mesh = fp.init(device="cpu", timeout=timeout)
    x = torch.ones(4)
    fp.all_reduce(x, group=mesh["tp"])
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(timeout + 3)  # silent for longer than the others wait
        return None
    begin = time.monotonic()
    try:
        fp.all_reduce(x, group=mesh["tp"])
    except Exception as error:
        return time.monotonic() - begin, type(error).__name__, str(error)


def test_silent_rank_is_reported_within_the_timeout():
    seconds, kind, text = launch(rank_lost, 2, "silent", 3.0, timeout=60)[0]
    assert kind == "PeerTimeoutError" and 2 < seconds < 8
    assert "all_reduce on rank 0 got no answer from rank 1; rank 1 said nothing since" in text
    assert "end this job on all ranks" in text


def test_killed_rank_is_reported():
    with pytest.raises(fp.PeerTimeoutError, match=r"rank 1 \(exit code -9\) died"):
        launch(rank_lost, 2, "killed", 20.0, timeout=60)


def rank_survivor(path: str):
    result = rank_lost("killed", 20.0)
    with open(path, "w") as file:
        file.write(f"{result[0]:.1f} {result[1]} {result[2]}")


def test_survivors_of_a_killed_rank_raise(tmp_path):
    """The surviving rank itself, not only its launcher, hears of the death, at once."""
    pool = RankPool(2)
    pool._calls[0].put(pickle.dumps((rank_survivor, (str(tmp_path / "told"),), {})))
    pool._calls[1].put(pickle.dumps((rank_lost, ("killed", 20.0), {})))
    deadline = time.monotonic() + 40
    while not (tmp_path / "told").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)
    seconds, kind, text = (tmp_path / "told").read_text().split(" ", 2)
    pool.kill()
    assert kind == "PeerTimeoutError" and float(seconds) < 10 and "rank 1 said nothing since" in text


def rank_told(path: str):
    result = rank_lost("killed", 20.0)
    with open(f"{path}{os.environ['RANK']}", "w") as file:
        file.write(result[2])


def test_the_dead_rank_of_three_is_named(tmp_path):
    """Rank 1 dies; connections of the ring break between the living, too, but nobody blames them."""
    pool = RankPool(3)
    for calls in pool._calls:
        calls.put(pickle.dumps((rank_told, (str(tmp_path / "told"),), {})))
    told = [tmp_path / "told0", tmp_path / "told2"]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in told) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)
    pool.kill()
    for path in told:
        assert "; rank 1 said nothing since: dead, stopped" in path.read_text()


def rank_fails(mesh):
    if mesh.get_local_rank("tp") == 1:
        raise ValueError("on purpose")


def test_an_error_on_one_rank_reaches_the_caller():
    with pytest.raises(RuntimeError, match="rank 1 of 2 raised ValueError: on purpose"):
        run_ranks(rank_fails, 2)
    assert run_ranks(rank_mesh, 2)[1][2] == (0, 0, 1)  # the next call has new ranks


def rank_unpicklable(mesh):
    return lambda: None


def test_what_cannot_be_pickled_is_said_at_once():
    with pytest.raises(TypeError, match="must be picklable, and at module level"):
        run_ranks(lambda mesh: None, 2)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank \d of 2 raised"):
        run_ranks(rank_unpicklable, 2)
    assert time.monotonic() - begin < 30


def rank_after_finalize():
    mesh = fp.init(device="cpu")
    group, x = mesh["tp"], torch.ones(2)
    fp.all_reduce(x, group=group)
    fp.finalize()
    try:
        fp.all_reduce(x, group=group)
    except RuntimeError as error:
        return str(error)


def test_after_finalize():
    (text,) = launch(rank_after_finalize, 1)
    assert "the process group is gone: fp.finalize() was called" in text


def test_out_of_memory_is_not_a_lost_peer():
    from fused_parallel.comm import collectives

    mesh = fp.init(device="cpu")
    with (
        pytest.raises(torch.OutOfMemoryError),
        collectives.measured("all_reduce", torch.ones(1), fp.comm.resolve_group(mesh["tp"])),
    ):
        raise torch.OutOfMemoryError("out of memory")


def test_use_modes():
    x, weight = torch.randn(3, 4), torch.ones(4)
    with fp.use("fused"), pytest.raises(fp.NoFusedKernelError, match=r"rms_norm: .* CUDA tensors only"):
        fp.rms_norm(x, weight, 1e-5)
    with fp.use("fused"):
        with fp.use("reference"):
            fp.rms_norm(x, weight, 1e-5)
        with pytest.raises(fp.NoFusedKernelError):
            fp.rms_norm(x, weight, 1e-5)
    fp.rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match="mode must be one of auto, fused, reference"), fp.use("fast"):
        pass
    done = run_script(
        "import torch, fused_parallel as fp; fp.rms_norm(torch.ones(2), torch.ones(2), 1e-5)", FUSED_PARALLEL="fused"
    )
    assert "NoFusedKernelError" in done.stderr
    done = run_script("from fused_parallel.ops._dispatch import current_mode; current_mode()", FUSED_PARALLEL="x")
    assert "FUSED_PARALLEL='x' in the environment: must be one of" in done.stderr


def rank_fused_mode(mesh):
    x = torch.randn(4, 4)
    messages = []
    for call in (fp.all_reduce, fp.reduce_scatter, fp.all_gather):
        try:
            with fp.use("fused"):
                call(x, group=mesh["tp"])
            messages.append("no error")
        except fp.NoFusedKernelError as error:
            messages.append(str(error))
    return messages


def test_fused_mode_of_collectives():
    messages = run_ranks(rank_fused_mode, 2)[0]
    for name, message in zip(("all_reduce", "reduce_scatter", "all_gather"), messages, strict=True):
        assert message.startswith(f"{name}: ") and "CUDA tensors only" in message
    assert run_ranks(rank_fused_mode, 1)[0] == ["no error"] * 3  # one rank: nothing to communicate


def test_fallback_is_told_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not choose_fused("some_op", "of a reason", on_gpu=True)
    assert len(caught) == 1 and "some_op: using the reference implementation" in str(caught[0].message)
    assert "because of a reason" in str(caught[0].message)
    assert choose_fused("some_op", None, on_gpu=True)


def rank_disagree():
    mesh = fp.init(device="cpu", timeout=30)
    x = torch.ones(3 + mesh.get_local_rank("tp"))
    try:
        fp.all_reduce(x, group=mesh["tp"])
    except ValueError as error:
        return str(error)


def test_debug_mode_names_what_differs():
    for text in launch(rank_disagree, 2, environment={"FUSED_PARALLEL_DEBUG": "1"}):
        assert "the ranks of one group disagree on the call" in text
        assert "rank 0: all_reduce(torch.float32[3])" in text and "rank 1: all_reduce(torch.float32[4])" in text


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device must be 'cuda' or 'cpu', got '{device}'"):
        fp.init(device=device)


def test_a_loopback_address_is_explained(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed: Connection refused, remote=[127.0.0.1]:37274")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(RuntimeError, match=r"loopback address.*set GLOO_SOCKET_IFNAME"):
        groups._start(torch.device("cpu"), 0, 2, datetime.timedelta(seconds=5))


def test_a_timer_keeps_few_events():
    """Of a long eager answer on a GPU: what is over is added up, in order; what runs is kept."""

    class Event:
        def __init__(self, at, over):
            self.at, self.over = at, over

        def query(self):
            return self.over

        def elapsed_time(self, end):
            return end.at - self.at

    timer, most, kept = CommunicationTimer(), 4096, []
    for n in range(3 * most):
        kept.append(Event(n + 0.5, n < 2 * most))
        timer._around(Event(n, True), kept[-1], n % 2 == 1)
    assert len(timer._events) <= most + most  # the last third is not over
    assert timer.host_seconds == pytest.approx(0.5e-3 * (3 * most - len(timer._events)))
    for event in kept:
        event.over = True
    timer._take_in(len(timer._events))
    assert timer.host_seconds == pytest.approx(1.5e-3 * most)
    assert timer.waiting_host_seconds == pytest.approx(0.75e-3 * most) and not timer._events


PARENT = """
import sys, time
from fused_parallel.comm.launch import RankPool

if __name__ == "__main__":
    pool = RankPool(2)
    print(*(process.pid for process in pool.processes), flush=True)
    time.sleep(120)
"""


def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(1.0)
        parent.kill()
    end = time.monotonic() + 30
    while running := [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]:
        assert time.monotonic() < end, f"{running} still run"
        time.sleep(0.1)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_ranks_started_under_torchrun_have_a_store_of_their_own(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with RankPool(2) as pool:
        assert pool.run(_meets, timeout=60) == [1, 1]


def _meets():
    mesh = fp.init(tp=2, device="cpu", timeout=20)
    return sum(dist.get_process_group_ranks(mesh.get_group("tp")))
