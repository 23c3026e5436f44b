"""The command line as a user runs it: generate alone and under torchrun, the demo, errors and exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import _llama_ranks as ranks
import pytest

from fused_parallel.cli import main

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
TARGET, DRAFT = ASSETS / "tiny-target", ASSETS / "tiny-draft"
ROOT = Path(__file__).parents[2]


def run(*command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def generate(*options: str, ranks: int = 1) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "fused_parallel"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start += ["-m", "fused_parallel"]
    return run(*start, "generate", "--device", "cpu", "--model", str(TARGET), *options)


COMMON = ("--prompt", "import os\n\ndef ", "--max-new-tokens", "40", "--dtype", "float32")


def test_generate_alone_and_on_two_ranks():
    alone = generate(*COMMON)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("import os\n\ndef ") and len(alone.stdout) > 40
    assert "40 tokens," in alone.stderr and "tokens/s" in alone.stderr
    together = generate(*COMMON, "--draft", str(DRAFT), ranks=2)
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout
    assert "acceptance" in together.stderr
    staged = generate(*COMMON, "--pp", "2", ranks=2)
    assert staged.stdout == alone.stdout


@pytest.mark.parametrize(
    "options,message",
    [
        (("--model", "/nowhere", "--prompt", "x"), "config.json not found: expected a Hugging Face model directory"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x", "--tp", "3"), "but the world has 1 rank(s); start that many: torchrun --nproc-per-node 3"),
        (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens must be an integer of at least 1"),
        (("--prompt-file", "/nowhere.txt"), "/nowhere.txt"),
        (("--prompt", "x", "--device", "cuda"), "has no GPU"),
        (("--prompt", "x", "--host-memory", "1"), "give --offload GB, too"),
        (("--prompt", "x", "--offload", "0", "--cache-dir", "/"), "is for layers beyond host_bytes: give that, too"),
        (("--prompt", "x", "--num-draft-tokens", "auto"), "give --draft DIR or --draft ngram, too"),
        (("--prompt", "x", "--offload", "0", "--host-memory", "-1"), "--host-memory must be GB, at least 0, got -1"),
        (("--prompt", "x", "--offload", "nan"), "--offload must be GB, at least 0, got nan"),
    ],
)
def test_generate_errors(options, message, capsys):
    import torch

    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here, so asking for one is no error")
    code = main(["generate", "--model", str(TARGET), "--device", "cpu", *options])
    assert code == 1
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text


def test_generate_with_a_tree(capsys):
    options = ["generate", "--model", str(TARGET), "--device", "cpu", "--prompt", "import os", "--max-new-tokens", "20"]
    texts = []
    for more in ([], ["--draft", str(TARGET.parent / "tiny-draft"), "--num-draft-tokens", "3,2,1"]):
        assert main([*options, *more]) == 0
        told = capsys.readouterr()
        texts.append(told.out)
    assert texts[0] == texts[1] and "acceptance" in told.err
    with pytest.raises(SystemExit):
        main([*options, "--num-draft-tokens", "3,x"])
    assert "numbers with commas between them, got '3,x'" in capsys.readouterr().err


def test_generate_offloaded_and_quantised(capsys, tmp_path):
    options = ["--device", "cpu", "--prompt", "import os", "--max-new-tokens", "12", "--offload", "0"]
    cached = ["--quantize", "int4", "--host-memory", "0", "--cache-dir", str(tmp_path)]
    for more in (["--quantize", "int8"], ["--quantize", "int4"], ["--host-memory", "0.01"], cached):
        assert main(["generate", "--model", str(TARGET), *options, *more]) == 0
        told = capsys.readouterr()
        assert told.out.startswith("import os") and "MB streamed a token at" in told.err


def test_checkpoint_without_tokenizer(tmp_path, capsys):
    ranks.save_random_model(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--device", "cpu", "--prompt", "x"]) == 1
    assert "tokenizer.json not found" in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys):
    for argv in ([], ["nonsense"], ["generate", "--model", "x", "--prompt", "y", "--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
    assert "usage: fused-parallel" in capsys.readouterr().err


def test_demo_prints_text_and_table():
    done = run(sys.executable, "-m", "fused_parallel", "demo", "--device", "cpu", "--max-new-tokens", "48")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "class Stack:" in done.stdout
    for row in ("1 process", "TP=2", "PP=2", "TP=2 + speculation", "offload", "offload + speculation"):
        assert row in done.stdout
    assert done.stdout.count("yes") == 6 and "NO" not in done.stdout


def test_demo_without_models(tmp_path, capsys):
    assert main(["demo", "--assets", str(tmp_path)]) == 1
    assert "has no tiny-target" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["wall"], ["probe", "--quick"]])
def test_commands_with_ranks_of_their_own_refuse_torchrun(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 1
    assert f"{command[0]} starts its own ranks: run it without torchrun" in capsys.readouterr().err


def test_a_failed_rank_is_one_line(capsys):
    assert main(["demo", "--device", "cpu", "--max-new-tokens", "0"]) == 1
    told = capsys.readouterr().err
    assert "max_new_tokens" in told and "Traceback" not in told


def test_what_is_wrong_is_named_as_it_was_given(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"hidden_size":')
    for command, said in (
        (["plan", "--model", str(tmp_path / "config.json"), "--cluster", "2xh200"], "config.json: no JSON"),
        (["generate", "--model", str(TARGET), "--prompt", "x", "--offload", "-1"], "--offload must be GB"),
    ):
        assert main(command) == 1
        assert said in capsys.readouterr().err
