"""`fused-parallel doctor`: its report and its exit code."""

import subprocess
import sys

import pytest
import torch

from fused_parallel.cli import doctor


def run(**environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "fused_parallel", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_the_report_names_what_is_there_and_what_falls_back():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("Python", "torch", "Gloo", "NCCL", "GPUs", "extension", "CUDA kernels", "nvcc", "triton", "pynvml"):
        assert what in done.stdout
    assert torch.__version__ in done.stdout
    if not torch.cuda.is_available():
        assert "Everything works, on the reference implementations" in done.stdout
        assert "operations use their reference implementations" in done.stdout


def states():
    return {check.name: check for check in doctor.checks()}


def test_without_the_extension_it_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(doctor._ext, "extension", lambda: None)
    monkeypatch.setattr(doctor._ext, "why_no_extension", lambda: "no compiler was found")
    monkeypatch.setattr(doctor._ext, "why_no_kernels", lambda: "no compiler was found")
    found = states()
    assert (found["extension"].state, found["extension"].found) == (doctor.ABSENT, "no compiler was found")
    assert found["CUDA kernels"].state == doctor.ABSENT
    assert not [c for c in found.values() if c.state == doctor.BROKEN]


def test_an_absent_package_is_told_with_its_consequence(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = states()
    for package in ("triton", "transformers", "tokenizers", "pynvml", "matplotlib"):
        assert found[package].state == doctor.ABSENT and found[package].consequence


@pytest.mark.parametrize("version", ["2.7.1", "1.13.0+cu117"])
def test_a_torch_too_old_is_an_error(monkeypatch, capsys, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor.run(None) == 1
    out = capsys.readouterr().out
    assert "needs 2.8 or newer" in out and "fused_parallel cannot work here: torch" in out


@pytest.mark.parametrize("version", ["2.8.0", "2.11.0+cu130", "3.0.0a0+git12"])
def test_a_torch_new_enough_is_none(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert states()["torch"].state == doctor.OK


def test_without_any_backend_it_cannot_work(monkeypatch, capsys):
    monkeypatch.setattr(doctor.dist, "is_gloo_available", lambda: False)
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: False)
    assert doctor.run(None) == 1
    assert "cannot work here: Gloo" in capsys.readouterr().out


def test_a_bad_environment_is_told():
    done = run(FUSED_PARALLEL="fastest")
    assert done.returncode == 1
    assert "FUSED_PARALLEL='fastest'" in done.stdout and "Traceback" not in done.stderr


def test_gpus_and_their_access_to_each_other(monkeypatch):
    gpu = {"name": "GPU model", "compute_capability": [9, 0]}
    here = {
        "driver": "580.1",
        "gpus": [gpu, gpu],
        "pairs": [{"a": 0, "b": 1, "link": "SYS", "peer_access": False}],
    }
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "topology", lambda: here)
    found = {check.name: check for check in doctor._gpus()}
    assert found["GPUs"].found == "2 x GPU model (capability 9.0)"
    assert found["peer access"].state == doctor.ABSENT and "none between GPUs 0-1" in found["peer access"].found
    here["pairs"][0].update(link="NV18", peer_access=True)
    found = {check.name: check for check in doctor._gpus()}
    assert found["peer access"].state == doctor.OK and "NV18" in found["peer access"].found
    assert "not used" in found["NVLink multicast"].found
