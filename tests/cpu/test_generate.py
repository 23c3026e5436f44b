"""fp.generate: greedy tokens equal transformers' in every arrangement, with and without a draft; sampling; bad
input."""

import collections

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel.testing.spawn import run_ranks

PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50, 51, 52]]
NEW = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target directory, draft directory, transformers target)."""
    path, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    return path, draft, ranks.save_noisy_pair(path, draft)


def greedy(model, prompts=PROMPTS, new=NEW):
    out = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
        out.append(tokens[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_greedy_equals_transformers(pair, tp, pp):
    path, draft, target = pair
    expected = greedy(target)
    for draft_path in (None, draft):
        options = {"tp": tp, "pp": pp, "temperature": 0.0}
        for tokens, stats in run_ranks(ranks.generated, tp * pp, path, draft_path, PROMPTS, NEW, **options):
            assert tokens == expected
            assert stats["new_tokens"] == 3 * NEW and stats["sequences"] == 3 and stats["prompt_tokens"] == 14
            if draft_path is None:
                assert stats["drafted"] == 0 and stats["acceptance"] is None and stats["rounds"] == NEW - 1
            else:
                assert 0.05 < stats["acceptance"] < 0.999, "the draft must be neither perfect nor useless"
                assert stats["rounds"] < NEW - 1
            assert (stats["communication_seconds"] > 0) == (tp * pp > 1)


@pytest.mark.parametrize("tp,pp,microbatches", [(1, 2, 2), (1, 2, 5), (1, 3, 3), (2, 2, 2), (1, 1, 2)])
def test_micro_batches_and_chunks_give_the_same_tokens(pair, tp, pp, microbatches):
    path, draft, target = pair
    prompts = [*PROMPTS, [7, 7, 7], list(range(20, 57))]
    expected = greedy(target, prompts, 15)
    end = expected[1][6]  # one sequence of the middle ends early
    expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    assert len({len(row) for row in expected}) > 1
    for draft_path in (None, draft, "ngram"):
        options = {"tp": tp, "pp": pp, "microbatches": microbatches, "prefill_chunk": 8, "eos_token_id": end}
        for tokens, stats in run_ranks(ranks.generated, tp * pp, path, draft_path, prompts, 15, **options):
            assert tokens == expected
            assert (stats["drafted"] > 0) == (draft_path is not None)
            assert stats["bubble"] is None if pp == 1 else 0 <= stats["bubble"] < 1


@pytest.mark.parametrize("tp,pp,microbatches", [(1, 1, 2), (1, 2, 2), (1, 2, 5), (1, 3, 3), (2, 2, 2)])
def test_captured_micro_batches_give_the_same_tokens(pair, tp, pp, microbatches):
    path, draft, target = pair
    prompts = [*PROMPTS, [7, 7, 7], list(range(20, 57))]
    expected = greedy(target, prompts, 15)
    end = expected[1][6]
    expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    for draft_path, options in ((None, {}), (draft, {}), (draft, {"temperature": 0.8, "seed": 3}), ("ngram", {})):
        options |= {"eos_token_id": end}
        if "temperature" in options:
            ((want, _),) = run_ranks(ranks.generated, 1, path, draft_path, prompts, 15, **options)
        else:
            want = expected
        options |= {"tp": tp, "pp": pp, "microbatches": microbatches}
        results = run_ranks(ranks.generated_by_replays, tp * pp, path, draft_path, prompts, 15, **options)
        for tokens, captured, stage, counts in results:
            assert tokens == want
            assert captured == microbatches * (1 if stage == pp - 1 else 2)
            # A captured message keeps the slot it is counted for, so both ends count alike when they capture.
            for peer, (sent, received) in counts.items():
                theirs = next(of for _, _, number, of in results if number == peer)[stage]
                assert (sent, received) == theirs[::-1] and sent + received > 0


@pytest.mark.parametrize("tp,pp,most", [(1, 1, 24), (2, 1, 24), (1, 1, 2), (1, 2, 24), (1, 3, 2)])
def test_captured_rounds_of_several_lengths_give_the_same_tokens(pair, tp, pp, most):
    """A graph for each length, and one more if the draft has missed a round; no more than there may be. What it misses
    beyond that it takes in before. Stages capture the same rounds, though the draft is the last one's."""
    path, draft, target = pair
    expected = greedy(target, new=40)
    lengths = (4, 0, 4, 4, 0, 0, 2, 1, 1)
    for draft_path in (draft, "ngram"):
        args = path, draft_path, PROMPTS, 40, lengths, most
        options = {"tp": tp, "pp": pp, "num_draft_tokens": "auto"}
        results = run_ranks(ranks.generated_by_kept_rounds, tp * pp, *args, **options)
        for tokens, stats, captured, replayed, stage, counts in results:
            assert tokens == expected and stats["rounds"] > len(lengths) + 3
            in_order, missed = [], 0
            for k in lengths * 2:
                in_order.append((k, 1 if k and missed == 1 and draft_path == draft else 0))
                missed = 0 if k else missed + 1
            seen = list(dict.fromkeys(in_order[: stats["rounds"]]))
            assert captured == seen[:most]
            # Each once more when it is captured. No sequence ends but by its length: no round was queued in vain.
            assert (replayed == stats["rounds"] + len(captured)) == (most == 24) and replayed > 2
            # A captured message keeps the slot it is counted for, so both ends count alike when they capture.
            assert len(counts) == (len(captured) if pp > 1 else 0)
            for i, of_capture in enumerate(counts):
                for peer, (sent, received) in of_capture.items():
                    theirs = next(of[i] for *_, number, of in results if number == peer)[stage]
                    assert (sent, received) == theirs[::-1] and sent + received > 0


def test_a_short_sequence_that_has_ended(pair):
    """The others go on for more rounds without a draft than it has tokens; then all draft."""
    path, draft, target = pair
    expected = greedy(target, new=40)
    end = next(token for token in expected[1] if token not in expected[0] + expected[2])
    expected[1] = expected[1][: expected[1].index(end) + 1]
    args = path, draft, PROMPTS, 40, (*[0] * 16, 1), 24
    options = {"num_draft_tokens": "auto", "eos_token_id": end}
    ((tokens, stats, *_),) = run_ranks(ranks.generated_by_kept_rounds, 1, *args, **options)
    assert tokens == expected and len(expected[1]) < 14 and stats["rounds_by_length"][1] >= 2


@pytest.mark.parametrize("microbatches", [1, 3])
def test_sampled_tokens_do_not_depend_on_stages(pair, microbatches):
    path, draft, _ = pair
    options = {"temperature": 0.8, "top_p": 0.95, "seed": [11, 12, 13]}
    for draft_path in (None, draft):
        ((whole, _),) = run_ranks(ranks.generated, 1, path, draft_path, PROMPTS, NEW, **options)
        for tokens, _ in run_ranks(
            ranks.generated, 2, path, draft_path, PROMPTS, NEW, pp=2, microbatches=microbatches, **options
        ):
            assert tokens == whole


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_longest_prompt_may_end_first(pair, microbatches):
    """Its sequence stands still, up to k tokens too far, while rounds go on for others: the cache has room for that."""
    path, _, target = pair
    prompts = [list(range(20, 57)), [9]]
    expected = greedy(target, prompts, 9)
    # The draft is perfect for the long one only, which thus overshoots in its last round.
    for k in (1, 4, 7):
        options = {"num_draft_tokens": k, "microbatches": microbatches}
        ((tokens, _),) = run_ranks(ranks.generated_with_half_a_draft, 1, path, prompts, 9, **options)
        assert tokens == expected


@pytest.mark.parametrize("k", [1, 2, 7])
def test_any_draft_length(pair, k):
    path, draft, target = pair
    ((tokens, _),) = run_ranks(ranks.generated, 1, path, draft, PROMPTS, NEW, num_draft_tokens=k)
    assert tokens == greedy(target)


def test_perfect_draft_accepts_everything(pair):
    path, _, target = pair
    ((tokens, stats),) = run_ranks(ranks.generated, 1, path, path, PROMPTS[:1], 21, num_draft_tokens=4)
    assert tokens == greedy(target, PROMPTS[:1], 21)
    assert stats["acceptance"] == 1.0 and stats["rounds"] == 4


def test_end_of_sequence(pair):
    path, draft, target = pair
    expected = greedy(target)
    end = expected[0][5]
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    for draft_path in (None, draft):
        ((tokens, _),) = run_ranks(ranks.generated, 1, path, draft_path, PROMPTS, NEW, eos_token_id=end)
        assert tokens == cut


def test_sampling_does_not_depend_on_batch_or_ranks(pair):
    path, draft, _ = pair
    options = {"temperature": 0.8, "top_p": 0.95, "seed": [11, 12, 13]}
    for draft_path in (None, draft):
        ((whole, _),) = run_ranks(ranks.generated, 1, path, draft_path, PROMPTS, NEW, **options)
        for tokens, _ in run_ranks(ranks.generated, 2, path, draft_path, PROMPTS, NEW, tp=2, **options):
            assert tokens == whole
        ((alone, _),) = run_ranks(
            ranks.generated, 1, path, draft_path, PROMPTS[1:2], NEW, temperature=0.8, top_p=0.95, seed=12
        )
        assert alone == whole[1:2]
        ((other, _),) = run_ranks(ranks.generated, 1, path, draft_path, PROMPTS, NEW, temperature=0.8, seed=[1, 2, 3])
        assert other != whole


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_speculation_keeps_the_distribution(pair, method):
    """The second and third sampled tokens, with and without the draft, from many seeds: a chi-square test on both."""
    from scipy.stats import chi2_contingency

    path, draft, _ = pair
    mesh = fp.init(device="cpu")
    target = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    drafter = fp.LlamaForCausalLM.from_pretrained(draft, mesh=None)
    count = 3000
    options = {"temperature": 1.0, "top_k": 4}
    prompts = [PROMPTS[0]] * count
    plain = fp.generate(target, prompts, 3, seed=10**6, **options)
    spec = fp.generate(target, prompts, 3, seed=2 * 10**6, draft=drafter, num_draft_tokens=2, method=method, **options)
    assert 0.05 < spec.stats.acceptance < 0.999
    counts = [collections.Counter(map(tuple, g.tokens)) for g in (plain, spec)]
    kinds = [k for k in counts[0] | counts[1] if counts[0][k] + counts[1][k] >= 20]
    assert len(kinds) >= 4
    table = [[c[k] for k in kinds] for c in counts]
    assert chi2_contingency(table).pvalue > 1e-5


def test_mixed_temperatures(pair):
    path, draft, target = pair
    ((tokens, _),) = run_ranks(ranks.generated, 1, path, draft, PROMPTS, NEW, temperature=[0.0, 1.0, 0.0], seed=3)
    expected = greedy(target)
    assert tokens[0] == expected[0] and tokens[2] == expected[2] and tokens[1] != expected[1]


def rank_bad_method(mesh, path):
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    try:
        fp.generate(model, [[1]], 3, method="bogus")
    except ValueError as error:
        return str(error)


def test_every_stage_finds_bad_input_itself(pair):
    for text in run_ranks(rank_bad_method, 2, pair[0], pp=2, timeout=30):
        assert "method must be one of" in text


def test_bad_input(pair, tmp_path):
    path, _, _ = pair
    mesh = fp.init(device="cpu")
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    ranks.save_random_model(tmp_path, vocab_size=100)
    other = fp.LlamaForCausalLM.from_pretrained(tmp_path, mesh=None)
    for args, options, message in (
        (([], 3), {}, "there are no prompts"),
        (([[1], []], 3), {}, "prompt 1 is empty; every prompt needs at least one token"),
        (([1, 2], 3), {}, "prompts must be a list of lists"),
        (("text", 3), {}, "prompts must be a list of lists"),
        (([[1]], 2.5), {}, "max_new_tokens must be an integer of at least 1, got 2.5"),
        (([[1]], 3), {"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        (([[1]], 3), {"temperature": float("nan")}, "temperature must be at least 0"),
        (([[1]], 3), {"temperature": None}, "temperature must be a number or one per prompt"),
        (([[1]], 3), {"top_p": 5.0}, "top_p must be between 0 and 1, got 5.0"),
        (([[1]], 3), {"min_p": -0.1}, "min_p must be between 0 and 1, got -0.1"),
        (([[1]], 3), {"top_k": -3}, "top_k must be at least 0, got -3"),
        (([[1, 263]], 3), {}, r"prompt 0 holds 263; token ids are integers in \[0, 263\)"),
        (([["a"]], 3), {}, "prompt 0 holds 'a'"),
        (([[1]], 0), {}, "max_new_tokens must be an integer of at least 1, got 0"),
        (([[1] * 500], 13), {}, "exceed the model's 512 positions"),
        (([[1]], 3), {"draft": other}, "the draft has vocabulary 100, the model 263"),
        (([[1]], 3), {"temperature": [1.0, 2.0]}, "temperature must be one number or one per prompt"),
        (([[1]], 3), {"method": "typical"}, "method must be one of"),
        (([[1]], 3), {"cuda_graph": True}, "cuda_graph=True needs a model on GPUs, and between pipeline stages"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fp.generate(model, *args, **options)
    with pytest.raises(TypeError, match=r"model must be an fp\.LlamaForCausalLM, got Linear"):
        fp.generate(torch.nn.Linear(2, 2), [[1]], 3)
    import numpy as np

    with_numpy = fp.generate(model, [np.array([1, 2]).tolist(), [np.int64(3)]], 4, temperature=1.0, seed=np.int64(5))
    assert with_numpy.tokens == fp.generate(model, [[1, 2], [3]], 4, temperature=1.0, seed=[5, 6]).tokens


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("options", [{"num_draft_tokens": 3}, {"num_draft_tokens": "auto"}])
def test_ngram_drafts_change_nothing(pair, tp, pp, options):
    path, _, target = pair
    prompts = [[5, 17, 200, 5, 17, 200, 5, 17], [9], [44, 45, 44, 45, 44]]
    expected = greedy(target, prompts)
    for tokens, stats in run_ranks(ranks.generated, tp * pp, path, "ngram", prompts, NEW, tp=tp, pp=pp, **options):
        assert tokens == expected
        assert stats["drafted"] > 0 and sum(stats["rounds_by_length"].values()) == stats["rounds"]


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
def test_auto_drafts_change_nothing(pair, tp, pp):
    path, draft, target = pair
    expected = greedy(target)
    options = {"tp": tp, "pp": pp, "num_draft_tokens": "auto"}
    for tokens, stats in run_ranks(ranks.generated, tp * pp, path, draft, PROMPTS, NEW, **options):
        assert tokens == expected and {0, 4} <= set(stats["rounds_by_length"])


def scheduled(mesh, path, prompts, new):
    """The target drafts for itself, by a schedule with pauses: every drafted token must be right."""
    from fused_parallel.speculative.adaptive import AdaptiveLength

    schedule = iter([0, 3, 0, 0, 2, 8, 0, 1] * 10)
    usual, AdaptiveLength.choose = AdaptiveLength.choose, lambda self: next(schedule)
    try:
        return ranks.generated(mesh, path, path, prompts, new, num_draft_tokens="auto")
    finally:
        AdaptiveLength.choose = usual


def test_a_draft_catches_up_after_rounds_without(pair):
    path, _, target = pair
    ((tokens, stats),) = run_ranks(scheduled, 1, path, PROMPTS, 40)
    assert tokens == greedy(target, new=40)
    assert stats["drafted"] > 0
    # The last round may draft beyond the end.
    assert stats["acceptance"] > 0.99


@pytest.mark.parametrize("value", [0, "few", 2.5])
def test_bad_draft_length(pair, value):
    path, _, _ = pair
    with pytest.raises(RuntimeError, match='must be an integer of at least 1 with a draft, or "auto"'):
        run_ranks(ranks.generated, 1, path, "ngram", PROMPTS, 4, num_draft_tokens=value)


def test_chunks_bound_the_passes_of_the_draft_too(pair):
    mesh, (path, draft, target) = fp.init(device="cpu"), pair
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh)
    drafter = fp.LlamaForCausalLM.from_pretrained(draft, mesh=None)
    rows = []
    for each in (model, drafter):
        first = next(iter(each.model.layers.values()))
        first.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0] * given[0].shape[1]))
    prompts = [[7, 8, 9] * 20, [5, 17, 200, 3] * 10]
    result = fp.generate(model, prompts, 12, draft=drafter, num_draft_tokens=3, prefill_chunk=16)
    assert max(rows) == 32 and result.tokens == greedy(target, prompts, 12) and result.stats.accepted > 0


def test_one_seed_and_ends_as_tensors(pair):
    model = fp.LlamaForCausalLM.from_pretrained(pair[0], mesh=fp.init(device="cpu"))
    same = [PROMPTS[0]] * 3
    plain = fp.generate(model, same, 8, temperature=1.0, seed=7).tokens
    assert fp.generate(model, same, 8, temperature=1.0, seed=torch.tensor(7)).tokens == plain
    assert len({tuple(row) for row in plain}) > 1
    end = plain[0][2]
    for ends in (torch.tensor(end), torch.tensor([end]), [end], end):
        row = fp.generate(model, same[:1], 8, temperature=1.0, seed=7, eos_token_id=ends).tokens[0]
        assert row == plain[0][: plain[0].index(end) + 1]
