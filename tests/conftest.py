"""Shared by all tests: what is skipped without GPUs, the seed, and the end of the rank pools."""

import os
import zlib

import pytest

# Before CUDA starts: virtual ranks need a hardware queue for each of their streams, or one rank's kernel waits in line
# behind another's that waits for it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# And kernels that are there: the first launch of one that is loaded lazily waits for all that runs on the GPU, which on
# virtual ranks is a kernel that waits for the rank whose kernel is being loaded.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

# And as many threads as each of several processes has cores, also in the ranks that tests spawn, which sleep where they
# wait for each other: threads that spin take the cores from those they wait for. (Two workers of 2 threads on 2 cores:
# 170 s for what takes 43 asleep; on 32 cores four workers took a minute for what takes seconds.)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(2, min(8, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))))
)

# Workers of pytest-xdist (make gpu-test) have a GPU each, of those that the caller lets them see.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    number, visible = int(worker.removeprefix("gw")), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(number)] * (number + 1)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number] if number < len(gpus) else ""

import torch

from fused_parallel.testing.spawn import close_pools


def pytest_collection_modifyitems(items):
    # A folder implies its marker, so that no test in it can forget it.
    gpus = torch.cuda.device_count()
    of_worker = f" in worker {worker}; start no more workers than there are GPUs" if worker and not gpus else ""
    for item in items:
        parts = item.path.parts
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if marker in parts:
                item.add_marker(marker)
            # Of more ranks: pytest.mark.multigpu(<GPUs>).
            needed = max([needed, *(m.args[0] for m in item.iter_markers(marker) if m.args)])
            if item.get_closest_marker(marker) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), torch sees {gpus}{of_worker}"))


@pytest.fixture
def seed(request):
    """The seed of a randomised test, printed where the test fails: its own, the same in every run, or TEST_SEED=<n>."""
    value = int(os.environ.get("TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session", autouse=True)
def _rank_pools():
    yield
    close_pools()
