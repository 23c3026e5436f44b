"""examples/train_tiny.py: the split, the tokenizer, a run of seconds, and the committed pair when present."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ASSETS = EXAMPLES / "assets"
sys.path.insert(0, str(EXAMPLES))

import _corpus  # noqa: E402
import _pair  # noqa: E402
import train_tiny  # noqa: E402

MEGABYTE = 1_000_000


def run_script(out, *arguments):
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), "--size", "smoke", "--device", "cpu", "--out", str(out)]
    return subprocess.run(
        [*command, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture(scope="module")
def smoke_pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    result = run_script(out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_split_is_deterministic_and_disjoint():
    files = [relative for relative, _ in _corpus.corpus_files()]
    assert files == sorted(set(files)) and files == [relative for relative, _ in _corpus.corpus_files()]
    held_out = {relative for relative in files if _corpus.is_held_out(relative)}
    assert 0.01 < len(held_out) / len(files) < 0.06
    # By path alone: the answers hold for every Python version and must not move, or a committed model would be judged
    # on text it was trained on.
    assert held_out >= {"socket.py", "statistics.py"}
    assert held_out.isdisjoint({"argparse.py", "ast.py", "asyncio/events.py"})


def test_corpus_texts(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not ours")
    (tmp_path / "nul.py").write_bytes(b"a\0b")
    for index in range(200):
        (tmp_path / f"module_{index}.py").write_text(f"number = {index}\n")
    train, held_out = _corpus.load_corpus(tmp_path)
    assert len(train) + len(held_out) == 200 and set(train).isdisjoint(held_out)
    assert _corpus.load_corpus(tmp_path) == (train, held_out)
    packed = bytes(_corpus.pack(train).tolist())
    assert packed.startswith(b"\0") and packed.endswith(b"\0") and packed.strip(b"\0").split(b"\0") == train


def test_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no Python sources"):
        _corpus.load_corpus(tmp_path)


def test_prompts_stay_inside_a_document():
    documents = [bytes([65 + index]) * 100 for index in range(5)]
    prompts = _corpus.held_out_prompts(documents, 10, 32)
    assert prompts.shape == (10, 32) and all(row.unique().numel() == 1 for row in prompts)
    with pytest.raises(ValueError, match="hold 15"):
        _corpus.held_out_prompts(documents, 16, 32)


def test_tokenizer_ids_are_bytes(smoke_pair):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    directory = smoke_pair[0] / "smoke-target"
    texts = [
        "def f(x):\n\treturn x  # 2 spaces\r\n",
        " leading",
        "Ā Ġ\x00\x7f",
        "héllo, 世界 🐍",
        "".join(map(chr, range(0x800))),
    ]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 256
    covered = set()
    for text in texts:
        encoded = tokenizer.encode(text).ids
        assert encoded == list(text.encode()) and tokenizer.decode(encoded) == text
        assert AutoTokenizer.from_pretrained(directory)(text)["input_ids"] == encoded
        covered.update(encoded)
    # UTF-8 text holds no byte above 0xF4 and neither 0xC0 nor 0xC1; those are checked through the vocabulary.
    for byte in set(range(256)) - covered:
        assert _corpus._byte_characters()[byte] == tokenizer.id_to_token(byte)
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_smoke_run_writes_what_transformers_loads(smoke_pair, role):
    from transformers import LlamaForCausalLM

    out, printed = smoke_pair
    directory = out / f"smoke-{role}"
    assert sorted(file.name for file in directory.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (256, 0, 0)
    model, loading = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied is (role == "draft")
    assert f"{role}: took" in printed and "mean accepted / k at k=4" in printed


def test_training_lowers_the_loss(smoke_pair):
    lines = [line for line in smoke_pair[1].splitlines() if line.startswith("target: step")]
    bits = [float(line.split("held-out ")[1].split()[0]) for line in lines]
    assert len(bits) == 10 and bits[-1] < 6.0 < bits[0] <= 8.5


def test_same_seed_same_weights(smoke_pair, tmp_path):
    for seed, same in (("0", True), ("1", False)):
        result = run_script(tmp_path / seed, "--seed", seed)
        assert result.returncode == 0, result.stderr
        for role in ("target", "draft"):
            weights = [base / f"smoke-{role}" / "model.safetensors" for base in (smoke_pair[0], tmp_path / seed)]
            assert (weights[0].read_bytes() == weights[1].read_bytes()) is same


def test_draft_alone_for_a_trained_target(smoke_pair, tmp_path):
    before = (smoke_pair[0] / "smoke-target" / "model.safetensors").read_bytes()
    result = run_script(tmp_path, "--target", str(smoke_pair[0] / "smoke-target"), "--draft-steps", "10")
    assert result.returncode == 0, result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["smoke-draft"]
    assert (smoke_pair[0] / "smoke-target" / "model.safetensors").read_bytes() == before


def test_bad_arguments(tmp_path):
    result = run_script(tmp_path, "--steps", "0")
    assert result.returncode == 2 and "--steps must be positive, not 0" in result.stderr


def test_mask_free_attention_equals_transformers(smoke_pair):
    """The script trains and judges through its own attention hook: it must be the model others load."""
    from transformers import LlamaForCausalLM

    directory = smoke_pair[0] / "smoke-target"
    theirs = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = _pair.load_model(directory)
    tokens = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(_pair.logits_of(ours, tokens), expected, rtol=1e-5, atol=1e-5)
    generated = theirs.generate(tokens, max_new_tokens=20, eos_token_id=None, do_sample=False)[:, 50:]
    assert torch.equal(_pair.greedy(ours, tokens, 20), generated)


def speculative_rounds(target, draft, prompt, new_tokens, k):
    """Greedy speculative decoding of one prompt as it is really run: the accepted counts, a round each."""
    sequence, counts = prompt, []
    while sequence.shape[1] - prompt.shape[1] < new_tokens:
        proposed = _pair.greedy(draft, sequence, k)
        with torch.no_grad():
            choices = target(torch.cat([sequence, proposed], 1)).logits[:, -k - 1 :].argmax(-1)
        agree = (choices[:, :-1] == proposed)[0].tolist()
        kept = agree.index(False) if False in agree else k
        sequence = torch.cat([sequence, choices[:, : kept + 1]], 1)
        counts.append(kept)
    return counts


def test_acceptance_counts_rounds_as_decoding_does():
    """With untrained models that agree now and then, against the loop that drafts and verifies."""
    torch.manual_seed(7)
    target = _pair.build_model(train_tiny.PRESETS["smoke"].target).eval()
    draft = _pair.build_model(train_tiny.PRESETS["smoke"].target).eval()
    draft.load_state_dict(target.state_dict())
    for parameter in draft.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    prompts = torch.randint(256, (4, 16))
    counts = [n for row in prompts for n in speculative_rounds(target, draft, row[None], 24, 4)]
    expected = sum(counts) / (4 * len(counts))
    assert 0.02 < expected < 0.98, f"the models agree always or never, and the test says nothing: {expected}"
    assert _pair.acceptance(target, draft, prompts, new_tokens=24, k=4) == pytest.approx(expected)


committed = pytest.mark.skipif(
    not all((ASSETS / name / "model.safetensors").exists() for name in ("tiny-target", "tiny-draft")),
    reason="no trained pair in examples/assets: run python3 examples/train_tiny.py",
)


@committed
@pytest.mark.parametrize(("role", "limit"), [("target", 8 * MEGABYTE), ("draft", MEGABYTE)])
def test_committed_weights_are_small_and_of_the_preset_shape(role, limit):
    directory = ASSETS / f"tiny-{role}"
    assert _pair.disk_bytes(directory) <= limit
    shape = getattr(train_tiny.PRESETS["tiny"], role)
    config = _pair.load_model(directory).config
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (
        shape.hidden, shape.layers, shape.tied,
    )  # fmt: skip


@committed
def test_committed_pair_agrees_on_held_out_files():
    target, draft = (_pair.load_model(ASSETS / f"tiny-{role}") for role in ("target", "draft"))
    prompts = _corpus.held_out_prompts(_corpus.load_corpus()[1], 48, 256)
    rate = _pair.acceptance(target, draft, prompts)
    assert rate >= 0.6, f"mean accepted / k is {rate:.4f}"
