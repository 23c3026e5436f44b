"""The tuning table: defaults, the file, its errors; and `fused-parallel probe --tune` without GPUs."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_parallel import _ext
from fused_parallel.cli import main
from fused_parallel.comm import tuning
from fused_parallel.comm.tuning import Choice
from fused_parallel.ops import tune_matmul
from fused_parallel.ops.tune import candidates, rows_tried, steps

ALGORITHMS = {"one_shot", "two_shot", "library", "whole", "persistent", "decode"}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_PARALLEL_TUNING", str(tmp_path / "deep" / "tuning.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    return tmp_path / "deep" / "tuning.json"


@pytest.mark.parametrize("world", range(2, 9))
def test_defaults_cover_every_size(world):
    for op, rows in tuning.default_table(world).items():
        limits = [most for most, _ in rows]
        assert limits[-1] is None and limits[:-1] == sorted(set(limits[:-1])), op
        for bytes in (0, 1, 16 << 10, 1 << 20, 1 << 40):
            assert tuning.choose(tuning.default_table(world), op, bytes).algorithm in ALGORITHMS


def test_a_limit_belongs_to_the_choice_before_it():
    table = {"op": [(10, Choice("one_shot")), (None, Choice("library"))]}
    assert tuning.choose(table, "op", 10).algorithm == "one_shot"
    assert tuning.choose(table, "op", 11).algorithm == "library"


def test_saved_tables_are_loaded_for_their_machine_only(file):
    assert tuning.load(2) == tuning.default_table(2)  # there is no file
    measured = {"all_reduce": [(100, Choice("one_shot", 128, 7)), (None, Choice("library"))]}
    assert tuning.save(measured, 2) == file
    tuning.save({"all_reduce": [(None, Choice("two_shot"))]}, 4)
    assert tuning.load(2) == tuning.default_table(2) | measured
    assert tuning.load(4)["all_reduce"] == [(None, Choice("two_shot"))]
    assert tuning.load(3) == tuning.default_table(3)
    assert len(json.loads(file.read_text())) == 2 and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"A GPU x2 fused_parallel %s": {"all_reduce": [[1, 2, 3]]}}'])
def test_a_file_that_is_no_table_is_named(file, text):
    file.parent.mkdir()
    file.write_text(text % tuning.__version__ if "%s" in text else text)
    with pytest.raises(ValueError, match=r"tuning\.json"):
        tuning.load(2)


def teststeps_lie_between_the_sizes_measured():
    a, b = Choice("one_shot"), Choice("two_shot")
    assert steps([(100, a), (400, a), (1600, b)]) == [(800, a), (None, b)]
    assert steps([(100, a)]) == [(None, a)]


def test_candidates():
    for op in ("all_reduce", "all_reduce_add_rms_norm"):
        for rows in rows_tried(quick=False):
            for world in (2, 3, 8):
                found = candidates(op, world, rows, 132)
                assert len(set(found)) == len(found) > 3 and tuning.LIBRARY in found


def test_matmul_candidates():
    for op in tune_matmul.OPS:
        for world in (2, 3, 7, 8):
            for rows in tune_matmul.rows_tried(op, False, world):
                assert op.startswith("matmul_all_reduce") or rows % world == 0
                found = tune_matmul.candidates(op, world, rows)
                assert tuning.WHOLE in found and len(set(found)) == len(found)
    assert tuning.DECODE in tune_matmul.candidates("matmul_all_reduce", 2, 64)
    assert tuning.DECODE not in tune_matmul.candidates("matmul_all_reduce", 2, 128)
    assert tuning.PERSISTENT in tune_matmul.candidates("all_gather_matmul", 2, 256)


def test_limits_are_those_of_the_kernels():
    root = Path(__file__).parents[2]
    constants = {
        "matmul_decode_max_rows": ("matmul_all_reduce.h", "kDecodeMaxRows"),
        "matmul_tile_rows": ("matmul_all_reduce.h", "kTileRows"),
        "verify_attention_max_new_tokens": ("verify_attention.h", "kAttentionMaxNewTokens"),
    }
    assert _ext.LIMITS.keys() == constants.keys()
    for name, (header, constant) in constants.items():
        text = (root / "csrc" / header).read_text()
        assert _ext.LIMITS[name] == int(re.search(rf"\b{constant} = (\d+)", text).group(1)) == _ext.limit(name)
    sources = "".join(path.read_text() for path in (root / "fused_parallel").rglob("*.py"))
    assert set(re.findall(r'_ext\.limit\("(\w+)"\)', sources)) == _ext.LIMITS.keys()


def test_tune_without_gpus_says_so(capsys):
    if torch.cuda.device_count() >= 2:
        pytest.skip("this machine has two GPUs")
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main(["probe", "--tune"]))
    assert end.value.code == 1
    assert "needs two or more GPUs, torch sees" in capsys.readouterr().err


def test_few_rows_go_with_the_exchange_only_where_the_weight_is_deep(monkeypatch):
    op = importlib.import_module("fused_parallel.ops.matmul_all_reduce")  # the name in the package is the function

    workspace = SimpleNamespace(hopper=True, choice=lambda *_: tuning.DECODE, takes_decode=lambda m, n: m <= 64)
    monkeypatch.setattr(op, "workspace_of", lambda pg: workspace)
    monkeypatch.setattr(op, "choose_fused", lambda *_, **__: True)

    def chosen(m, k, n=8192):
        x, weight = torch.empty(m, k, dtype=torch.float16), torch.empty(n, k, dtype=torch.float16)
        return op.algorithm("matmul_all_reduce", x, weight, SimpleNamespace(size=lambda: 2))

    found = [chosen(*shape) for shape in ((64, 4096), (32, 2048), (64, 2048), (33, 2048), (64, 8192, 4096))]
    assert found == ["decode", "decode", "whole", "whole", "whole"]


def test_defaults_by_the_shapes_that_were_measured():
    """benchmarks/results: what wins, of H200 and H100, in bf16."""

    def suits(op: str, m: int, k: int, n: int) -> str:
        # The payload: a rank's rows of the input, or the result.
        payload = 2 * (m // 2) * k if op == "all_gather_matmul" else 2 * m * n
        choice = tuning.choose(tuning.default_table(2), op, payload)
        return choice.algorithm if choice.suits(m, k, n) else "whole"

    for m, k, n, best in (
        (64, 4096, 8192, "decode"), (64, 7168, 4096, "whole"), (64, 2048, 4096, "whole"), (1, 2048, 4096, "decode"),
        (512, 14336, 8192, "whole"), (512, 8192, 16384, "whole"), (2048, 8192, 16384, "persistent"),
        (2048, 2048, 4096, "persistent"), (32, 7168, 4096, "whole"), (8, 7168, 4096, "decode"),
        (32, 4096, 8192, "decode"),
    ):  # fmt: skip
        assert suits("matmul_all_reduce", m, k, n) == best, (m, k, n)
    for m, k, n, best in (
        (512, 14336, 8192, "whole"), (1024, 2048, 4096, "whole"), (1024, 7168, 4096, "persistent"),
        (1024, 4096, 8192, "persistent"), (2048, 14336, 8192, "persistent"),
    ):  # fmt: skip
        assert suits("all_gather_matmul", m, k, n) == best, (m, k, n)
    assert suits("matmul_reduce_scatter", 512, 14336, 8192) == "persistent"
