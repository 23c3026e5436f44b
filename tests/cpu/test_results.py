"""The CSV of figures: what is written is read back, the latest row of a key counts, the commit is told."""

import subprocess

import pytest
import torch

from fused_parallel.testing import results
from fused_parallel.testing.timer import Timing


def row(impl="fused", us=10.0, **changed):
    made = results.make_row(
        "all_reduce",
        impl,
        Timing(us * 0.9, us, us * 1.1, 3.2),
        world_size=2,
        dtype=torch.bfloat16,
        mode="graph",
        shape={"tokens": 1, "hidden": 8192},
        bytes=16384,
        floor_us=1.25,
        device="cpu",
    )
    return made | changed


def test_the_columns_are_the_design_s():
    wanted = (
        "op,impl,world_size,dtype,mode,shape,us_p20,us_p50,us_p80,skew_pct,bytes,floor_us,gpu,link,torch,triton,cuda,"
        "commit,date"
    )
    assert ",".join(results.COLUMNS) == wanted
    assert set(row()) == set(results.COLUMNS)


def test_round_trip(tmp_path):
    first, second = row(), row(impl="nccl", us=12.345)
    assert results.append([first], tmp_path) == [tmp_path / "all_reduce.csv"]
    results.append([second], tmp_path)
    assert results.read(tmp_path / "all_reduce.csv") == [first, second]
    assert second["us_p50"] == "12.35" or second["us_p50"] == "12.34"
    assert (first["dtype"], first["shape"], first["gpu"], first["link"]) == (
        "bfloat16",
        "tokens=1;hidden=8192",
        "cpu",
        "none",
    )
    assert (tmp_path / "all_reduce.csv").read_text().count("op,impl") == 1


def test_each_operation_has_its_file(tmp_path):
    results.append([row(), row(op="verify")], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all_reduce.csv", "verify.csv"]


def test_the_latest_row_of_a_key_counts():
    old, other, new = row(us=10), row(impl="nccl", us=20), row(us=11, commit="abc", torch="9.9")
    assert results.latest([old, other, new]) == [new, other]


def test_other_machines_shapes_and_modes_are_other_keys():
    rows = [row()] + [row(**{key: "other"}) for key in ("gpu", "link", "mode", "shape", "dtype", "world_size")]
    assert results.latest(rows) == rows


def test_an_unknown_floor_is_empty():
    made = results.make_row(
        "p2p", "nccl", Timing(1, 1, 1, 0), world_size=1, dtype=torch.float32, mode="eager", shape={"bytes": 4},
        bytes=4, floor_us=None, device="cpu",
    )  # fmt: skip
    assert made["floor_us"] == ""


def test_shape_keys():
    shape = {"B": 64, "k": 4, "draft": "full"}
    assert results.shape_key(**shape) == "B=64;k=4;draft=full"
    assert results.parse_shape("B=64;k=4;draft=full") == {"B": "64", "k": "4", "draft": "full"}
    with pytest.raises(ValueError, match="draft='a;b'"):
        results.shape_key(draft="a;b")


def test_a_row_with_other_columns_is_refused(tmp_path):
    wrong = row()
    del wrong["link"]
    with pytest.raises(ValueError, match="a row has columns"):
        results.append([wrong], tmp_path)


def test_a_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "all_reduce.csv"
    path.write_text("op,us\nall_reduce,3\n")
    with pytest.raises(ValueError, match="the columns are"):
        results.append([row()], tmp_path)
    assert path.read_text() == "op,us\nall_reduce,3\n"


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def commit_of(monkeypatch, root):
    monkeypatch.setattr(results, "CHECKOUT", root)
    return results.commit.__wrapped__()


def test_commit_of_a_clean_and_a_changed_tree(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.csv").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "c")
    clean = commit_of(monkeypatch, tmp_path)
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "benchmarks" / "results" / "a.csv").write_text("2\n")
    assert commit_of(monkeypatch, tmp_path) == clean, "figures appended by one benchmark must not mark the next dirty"
    (tmp_path / "code.py").write_text("2\n")
    assert commit_of(monkeypatch, tmp_path) == f"{clean}-dirty"


def test_commit_without_git_is_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FP_COMMIT", "0123456789ab")
    assert commit_of(monkeypatch, tmp_path) == "0123456789ab"
    monkeypatch.delenv("FP_COMMIT")
    assert commit_of(monkeypatch, tmp_path) == "unknown"


def test_show_prints_every_row(capsys):
    results.show([row(), row(impl="nccl", us=12.5)])
    out = capsys.readouterr().out
    assert "12.50" in out and "tokens=1;hidden=8192" in out and "2 x cpu" in out
