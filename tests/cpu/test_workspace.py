"""What a group's workspace makes at first use: not within a graph capture, and once."""

from types import SimpleNamespace

import pytest
import torch

from fused_parallel import _ext
from fused_parallel.comm import capabilities, workspace
from fused_parallel.comm.workspace import GATHER_BYTES, MATMUL_TILES, AllReduceWorkspace

ONCE = "run the operation once before the capture"


def group(size: int):
    return SimpleNamespace(size=lambda: size, rank=lambda: 0, group_name="a group that nothing has been done with")


@pytest.fixture
def capture(monkeypatch):
    """Whether the current stream is captured, to be set; true at first."""
    state = SimpleNamespace(on=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.on)
    return state


def test_a_group_does_not_agree_within_a_capture(capture):
    with pytest.raises(RuntimeError, match=f"first operation of a group agrees .*: {ONCE}"):
        capabilities.agree(group(2))
    assert group(2).group_name not in capabilities._agreed


def test_the_first_operation_within_a_capture_is_refused_where_it_would_exchange(capture, monkeypatch):
    monkeypatch.setattr(workspace, "agree", lambda pg: SimpleNamespace(cuda_kernels=True))
    for function in (workspace.why_no_workspace, workspace.workspace_of):
        with pytest.raises(RuntimeError, match=f"first fused operation of a group makes its workspace, .*: {ONCE}"):
            function(group(2))
    assert group(2).group_name not in workspace._why_not.keys() | workspace._workspaces.keys()
    # Where there are no kernels nothing is made, and the operation can be captured.
    monkeypatch.setattr(workspace, "_why_not", {})
    monkeypatch.setattr(_ext, "why_no_kernels", lambda: "not built")
    assert "9 ranks" in workspace.why_no_workspace(group(9))
    workspace._why_not.clear()
    monkeypatch.setattr(workspace, "agree", lambda pg: SimpleNamespace(cuda_kernels=False))
    assert "no CUDA kernels" in workspace.why_no_workspace(group(2))


class Made(AllReduceWorkspace):
    """Without the part that all operations share; notes what is made, and when the ranks meet."""

    def __init__(self):
        self.device, self.native, self.pg = torch.device("cpu"), object(), group(2)
        self._matmul, self._gather, self._owned, self.log = None, None, (), []

    def _symmetric(self, size: int):
        self.buffer = torch.full((64,), 7, dtype=torch.uint8)
        self.log.append(size)
        return self.buffer, [1, 2]

    def _meet(self):
        assert not self.buffer.any()  # a peer may set a flag from here on
        self.log.append("met")


@pytest.mark.parametrize(
    "name,ops", [("matmul", "matmul_all_reduce or matmul_reduce_scatter"), ("gather", "all_gather_matmul")]
)
def test_memory_of_many_rows_is_made_once_and_not_within_a_capture(name, ops, capture, monkeypatch):
    native = SimpleNamespace(
        matmul_workspace_bytes=lambda tiles: ("bytes of", tiles),
        gather_workspace_bytes=lambda bytes: ("bytes of", bytes),
        MatmulWorkspace=lambda *arguments: arguments,
        GatherWorkspace=lambda *arguments: arguments,
    )
    monkeypatch.setattr(_ext, "extension", lambda: native)
    made = Made()
    with pytest.raises(RuntimeError, match=f"first {ops} of many rows makes its workspace, .*: {ONCE}"):
        getattr(made, name)()
    assert made.log == [] and made._owned == ()
    capture.on = False
    got, size = getattr(made, name)(), {"matmul": MATMUL_TILES, "gather": GATHER_BYTES}[name]
    assert got[:3] == (made.native, [1, 2], size) and made.log == [("bytes of", size), "met"]
    capture.on = True  # what is there may be captured
    assert getattr(made, name)() is got and len(made.log) == 2
    other = {"matmul": made._gather, "gather": made._matmul}[name]
    assert other is None  # each has its own first use
