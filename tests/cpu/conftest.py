"""What several files of tests on CPUs share."""

import pytest

from fused_parallel import _ext
from fused_parallel.ops import _direct

pytest.register_assert_rewrite("_verify_cases", "_verify_host")  # they compare, and say what differed


@pytest.fixture(scope="session")
def extension(tmp_path_factory):
    """The verification kernels, compiled for the host."""
    import _host_cuda as host

    return host.HostExtension(tmp_path_factory.mktemp("host_cuda"))


@pytest.fixture
def host_kernels(extension, monkeypatch):
    """fused_parallel calls those kernels instead of a GPU's."""
    monkeypatch.setattr(_ext, "extension", lambda: extension)
    monkeypatch.setattr(_direct, "raw_stream", lambda index: 0)
