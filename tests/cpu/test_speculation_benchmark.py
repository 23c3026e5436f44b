"""Acceptance forced to a rate, alone and through fp.generate, and the benchmark that uses it on CPU ranks."""

import os
import subprocess
import sys
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel import ops
from fused_parallel.testing import results
from fused_parallel.testing.acceptance import forced_acceptance
from fused_parallel.testing.spawn import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.95, 1.0])
def test_only_the_decision_is_forced(seed, rate):
    batch, k, vocab, rounds = 3, 4, 11, 2000
    usual, accepted = ops.verify, []
    counts = torch.tensor([4, 2, 0], dtype=torch.int32)
    with forced_acceptance(rate):
        for number in range(rounds):
            target, drafts = torch.randn(batch, k + 1, vocab), torch.randint(vocab, (batch, k))
            options = {"seed": torch.arange(batch), "step": torch.full((batch,), number), "temperature": 1.0}
            got = ops.verify(target, drafts, num_draft_tokens=counts, **options)
            n = got.num_accepted.tolist()
            assert n[1] == min(n[0], 2) and n[2] == 0  # one draw for the batch, as far as each draft goes
            accepted.append(n[0])
            if number % 100:
                continue
            honest = usual(target, drafts, num_draft_tokens=counts, **options)
            for b in range(batch):
                last = honest.tokens[b, honest.num_accepted[b]].item()
                assert got.tokens[b].tolist() == [*drafts[b, : n[b]].tolist(), last] + [-1] * (k - n[b])
            plain = ops.verify(target[:, :1], drafts[:, :0], **options)
            assert torch.equal(plain.tokens, usual(target[:, :1], drafts[:, :0], **options).tokens)
    assert ops.verify is usual
    for i in range(1, k + 1):
        share = sum(n >= i for n in accepted) / rounds
        assert abs(share - rate**i) <= 5 * (rate**i * (1 - rate**i) / rounds) ** 0.5
    with pytest.raises(ValueError, match="rate must be between 0 and 1, got 1"), forced_acceptance(1.5):
        pass


def forced(mesh, path, rate, **options):
    with forced_acceptance(rate):
        return ranks.generated(mesh, path, path, [[5, 17, 200, 3], [9]], 40, eos_token_id=[], **options)


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
def test_generation_goes_as_forced(tmp_path, tp, pp):
    ranks.save_random_model(tmp_path)
    for rate, rounds in ((0.0, 39), (1.0, 13)):
        for tokens, stats in run_ranks(forced, tp * pp, tmp_path, rate, tp=tp, pp=pp, num_draft_tokens=2):
            assert stats["rounds"] == rounds and [len(row) for row in tokens] == [40, 40]
            assert stats["acceptance"] == rate


def test_benchmark_runs_on_ranks(tmp_path):
    script = ["benchmarks/bench_speculation.py", "--device", "cpu", "--dtype", "float32", "--results", str(tmp_path)]
    sizes = ["--layers", "2", "--batch", "2", "--acceptance", "0", "0.8", "--tokens", "24", "--context", "5"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*start, *script, *sizes, "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0 and "not measured" not in done.stdout, done.stdout + done.stderr
    rows = results.read(tmp_path / "speculation.csv")
    for parallel in ("tp2", "pp2"):
        of = [r for r in rows if f"parallel={parallel};batch=2" in r["shape"]]
        at = {(r["impl"], *r["shape"].split(";")[-2:]): float(r["us_p50"]) for r in of}
        assert len(at) == len(of) and all(us > 0 for us in at.values())
        for k in ("k=4", "k=auto"):
            for acceptance in ("acceptance=0.0", "acceptance=0.8"):
                assert ("predicted_only", k, acceptance) in at
        assert ("plain", "k=0", "acceptance=any") in at and ("adaptive", "k=auto", "acceptance=0.8") in at
        assert {("verify_only", k, "acceptance=any") for k in ("k=0", "k=1", "k=4", "k=8")} <= set(at)
    assert done.stdout.count("of plain decoding's tokens/s") == 4 and "of one of 4 layers" in done.stdout


def test_fp_verify_itself_is_not_forced(seed):
    target = torch.full((1, 2, 5), -9.0).index_fill_(2, torch.tensor([3]), 9.0)
    step = torch.zeros(1, dtype=torch.int64)
    with forced_acceptance(1.0):
        result = fp.verify(target, torch.tensor([[2]]), seed=step, step=step, temperature=0.0)
    assert result.num_accepted.item() == 0
