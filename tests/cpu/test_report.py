"""The tables and plots of benchmarks/README.md, and the benchmark scripts on CPU ranks."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_parallel.cli.bench import find_benchmarks
from fused_parallel.testing import results
from fused_parallel.testing.timer import Timing

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("benchmarks_report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)

README = f"# Figures\n\nBefore.\n\n{report.BEGIN}\n\nold figures 99.99\n\n{report.END}\n\nAfter.\n"


def row(impl, us, tokens=8, mode="graph", op="all_reduce", floor=1.5):
    timing = Timing(us * 0.9, us, us * 1.1, 0.0)
    return results.make_row(
        op, impl, timing, world_size=2, dtype=torch.bfloat16, mode=mode, shape={"tokens": tokens, "hidden": 8192},
        bytes=16384 * tokens, floor_us=floor, device="cpu",
    )  # fmt: skip


def lines_of(rows):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table(rows).splitlines()]


def test_a_table_has_a_line_per_shape_and_a_column_per_implementation():
    rows = [row("nccl", 12.0, 64), row("nccl", 9.0, 8), row("torch_one_shot", 6.0, 8), row("fused", 5.0, 64)]
    head, _, *body = lines_of(rows)
    assert head == ["tokens", "hidden", "fused", "nccl", "torch_one_shot", "floor"]
    assert body == [
        ["8", "8192", "", "9.00", "**6.00**", "1.50"],
        ["64", "8192", "**5.00**", "12.00", "", "1.50"],
    ]


def test_a_part_of_the_operation_is_not_its_fastest_implementation():
    rows = [row("cublas", 1.0, floor=1.0), row("matmul_only", 2.0), row("cublas_nccl", 9.0), row("torch_fused", 7.0)]
    assert lines_of(rows)[2] == ["8", "8192", "1.00", "2.00", "9.00", "**7.00**", "1.50"]


def test_only_what_is_between_the_markers_changes(tmp_path):
    results.append([row("nccl", 12.0), row("nccl", 11.0), row("nccl", 30.0, mode="eager")], tmp_path)
    new = report.updated(README, report.load(tmp_path))
    assert new.startswith("# Figures\n\nBefore.\n\n") and new.endswith("\n\nAfter.\n")
    assert "old figures" not in new
    assert "11.00" in new and "12.00" not in new, "the latest row of a key counts"
    assert new.index("graph;") < new.index("eager;")
    assert report.updated(new, report.load(tmp_path)) == new


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.BEGIN}", README + report.BEGIN])
def test_missing_markers_are_an_error(text):
    with pytest.raises(ValueError, match="once each"):
        report.updated(text, {})


def test_report_writes_tables_and_plots_and_checks_them(tmp_path, capsys):
    readme, csvs = tmp_path / "README.md", tmp_path / "csv"
    readme.write_text(README)
    arguments = ["--results", str(csvs), "--readme", str(readme)]
    timings = [row(impl, us * t, t) for impl, us in (("fused", 1.0), ("nccl", 2.0)) for t in (1, 8, 64)]
    results.append([*timings, row("nccl", 3.0, op="p2p")], csvs)
    assert report.main([*arguments, "--check"]) == 1
    assert "run python benchmarks/report.py" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    plots = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert sorted(plots) == ["all_reduce.svg", "p2p.svg"]
    assert b"nccl" in plots["all_reduce.svg"] and b"floor" in plots["all_reduce.svg"]
    assert report.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()} == plots, "reproducible"


def test_a_panel_s_lines():
    """Options are lines of the panel without them, and so is what holds for any value; single points are in no plot."""

    def of(impl, us, op="verify", **shape):
        return {**row(impl, us, op=op), "shape": results.shape_key(**shape)}

    rows = [of("fused", 3.0 + b, B=b, k=4) for b in (1, 8)] + [
        of("fused", 6.0 + b, B=b, k=4, top_p=0.9) for b in (1, 8)
    ]
    x_key, found = report.panels("verify", [*rows, of("fused", 9.0, B=64, k=7)])
    assert x_key == "B"
    ((key, lines),) = found.items()
    assert key[-1] == "k=4" and {name: len(of) for name, of in lines.items()} == {"fused": 2, "fused top_p=0.9": 2}

    rows = [
        of(impl, 5.0, op="speculation", k=4, acceptance=a) for impl in ("chain", "predicted_only") for a in (0.0, 0.8)
    ]
    any_of = [of(impl, 7.0, op="speculation", k=0, acceptance="any") for impl in ("plain", "target_only")]
    x_key, found = report.panels("speculation", rows + any_of)
    assert x_key == "acceptance"
    (lines,) = found.values()
    assert list(lines) == ["chain k=4", "predicted_only k=4", "plain k=0"]
    assert list(report.panels("p2p", [of("nccl", 1.0, tokens=1)])[1].values()) != [], "better a point than nothing"


def test_the_committed_readme_is_what_the_figures_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def bench(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fused_parallel", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
        cwd=ROOT,
    )


def test_bench_lists_the_benchmarks():
    done = bench()
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(find_benchmarks(ROOT))
    assert {"all_reduce", "matmul_all_reduce"} <= set(find_benchmarks(ROOT))


def test_bench_refuses_an_unknown_name():
    done = bench("all_reduced")
    assert done.returncode == 2 and "no benchmark all_reduced; there are" in done.stderr


def test_no_checkout_means_no_benchmarks(tmp_path, monkeypatch, capsys):
    from fused_parallel.cli import bench as command

    assert find_benchmarks(tmp_path) == {}
    monkeypatch.setattr(command, "find_benchmarks", dict)
    assert command.run(None) == 1
    assert "source checkout" in capsys.readouterr().err


def test_all_reduce_on_cpu_ranks(tmp_path):
    done = bench(
        "all_reduce", "--", "--device", "cpu", "--tokens", "1", "3", "--hidden", "48", "--results", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(tmp_path / "all_reduce.csv")
    assert [(r["impl"], r["shape"], r["world_size"]) for r in rows] == [
        ("gloo", "tokens=1;hidden=48", "2"),
        ("gloo", "tokens=3;hidden=48", "2"),
    ]
    with_norm = results.read(tmp_path / "all_reduce_add_rms_norm.csv")
    assert [r["impl"] for r in with_norm] == ["gloo_add_rms_norm"] * 2
    assert all(float(r["us_p20"]) <= float(r["us_p50"]) <= float(r["us_p80"]) for r in rows + with_norm)


def test_matmul_all_reduce_on_cpu_ranks(tmp_path):
    sizes = ["--M", "3", "130", "--K", "32", "--N", "48"]
    done = bench("matmul_all_reduce", "--", "--device", "cpu", *sizes, "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    shapes = {p.stem: sorted({r["shape"] for r in results.read(p)}) for p in tmp_path.iterdir()}
    even, odd = "M=130;K=32;N=48", "M=3;K=32;N=48"
    assert shapes == {
        "matmul_all_reduce": [even, odd],
        "matmul_all_reduce_add_rms_norm": [even, odd],
        "matmul_reduce_scatter": [even],
        "all_gather_matmul": [even],
    }
    assert "not measured: matmul_reduce_scatter torch_fused" in done.stdout


def test_without_two_gpus_a_benchmark_says_so():
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        pytest.skip("this machine has two")
    done = bench("all_reduce")
    assert done.returncode != 0 and "needs two or more GPUs" in done.stderr


def test_a_wrong_result_fails_the_benchmark(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(
        "import bench_all_reduce as b, _common\n"
        "b.collectives.all_reduce_ = lambda x, pg: x\n"  # the sum is left out
        "if __name__ == '__main__':\n"
        "    p = _common.parser('wrong')\n"
        "    p.add_argument('--tokens', type=int, nargs='+', default=[2])\n"
        "    p.add_argument('--hidden', type=int, default=48)\n"
        "    _common.main(b.run, p)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(script), "--device", "cpu", "--results", str(tmp_path / "csv")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
    )
    assert done.returncode != 0
    assert "WRONG all_reduce gloo tokens=2;hidden=48: relative error" in done.stderr
    assert not (tmp_path / "csv").exists(), "a wrong result leaves no figure"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_starts(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
