"""The examples, and the README's first program, as a user runs them: on two CPU ranks under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*start, *command], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensor_parallel():
    out = torchrun(str(ROOT / "examples" / "tensor_parallel.py"))
    assert len(set(re.findall(r"result ([\d.]+)", out))) == 1 and out.count("holds 6291456 weights") == 2


def test_parallelize_transformers():
    assert torchrun(str(ROOT / "examples" / "parallelize_transformers.py")).startswith("import os\n\ndef ")


def test_speculation():
    command = [sys.executable, str(ROOT / "examples" / "speculation.py"), "--device", "cpu", "--max-new-tokens", "24"]
    command += ["--lengths", "0", "3", "--tree", "2,1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("│")[1:] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["k = 0", "k = 3", "tree 2,1", "auto", "ngram, k = 4", "ngram, auto"]
    assert all(row[5].strip() == "yes" for row in rows)


def test_readme_program(tmp_path):
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert "torchrun" in program.splitlines()[0]
    (tmp_path / "example.py").write_text(program)
    norms = re.findall(r"rank [01]: 6291456 weights, ([\d.]+)", torchrun(str(tmp_path / "example.py")))
    assert len(norms) == 2 and norms[0] == norms[1]


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FOLDERS = "ops|reference|nn|models|comm|cli|csrc|speculative|integrations|tests|benchmarks|examples"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./]+\.\w+)`", text):
        inside = (ROOT / path).exists() or (ROOT / "fused_parallel" / path).exists()
        assert inside, f"{document} names {path}"


def test_offload():
    command = [sys.executable, str(ROOT / "examples" / "offload.py"), "--device", "cpu", "--max-new-tokens", "24"]
    command += ["--tree", "2,1,1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:]] for line in done.stdout.splitlines() if line.startswith("│")]
    rows = {row[0]: row[1:] for row in rows}
    assert len(rows) == 11 and [row[7] for name, row in rows.items() if "int" not in name] == ["yes"] * 8
    streamed = {name: float(row[5]) for name, row in rows.items()}
    assert streamed["on the device"] == 0 < streamed["offloaded, half resident"] < streamed["offloaded"]
    assert 0 < streamed["offloaded + draft, k = 4"] < streamed["offloaded"] / 2
    assert 0 < streamed["offloaded, int4"] < streamed["offloaded, int8"] < streamed["offloaded"] / 3
    assert re.search(r"offloaded \+ draft, chosen: .*\d x a tree of 15, 2 deep", done.stdout)
    for name in ("k = 4", "tree 2,1,1", "chosen"):
        assert float(rows[f"offloaded + draft, {name}"][2]) > 0  # predicted
