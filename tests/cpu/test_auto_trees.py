"""Trees among what "auto" drafts of an offloaded model: the same tokens whatever is chosen, what rounds tell of trees,
and whether the choice finds the best of them on simulated machines."""

import random
from pathlib import Path

import _llama_ranks as ranks
import pytest
import torch

import fused_parallel as fp
from fused_parallel.speculative import adaptive as module
from fused_parallel.speculative.adaptive import LENGTHS_OFFLOADED, AdaptiveLength, offloaded_trees
from fused_parallel.speculative.ahead import _Queued
from fused_parallel.speculative.tree import Tree, likely_tree
from fused_parallel.testing.spawn import run_ranks

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
PROMPTS = ranks.OFFLOAD_PROMPTS
NEW = 40
SIX = offloaded_trees(1000)
# Trees and chains of every kind after each other, and after rounds without a draft.
IN_TURN = (4, -1, 0, -2, -3, 0, 0, -4, 2, -5, -5, 1, -6, 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target directory, draft directory): the draft is the target with noise on its weights."""
    path, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    ranks.save_noisy_pair(path, draft)
    return path, draft


def test_likely_trees():
    assert likely_tree(3, 9, (0.9, 0.1)).parents == [-1, 0, 1]  # 0.9, 0.81, 0.73 before 0.01
    assert likely_tree(3, 9, (0.5, 0.8)).parents == [-1, -1, 0]  # 0.5, 0.4, 0.25 before 0.2
    assert likely_tree(9, 1, (0.5, 0.4, 0.3)).parents == [-1, -1, -1]  # no more children than acceptances
    assert likely_tree(2, 1, (1.0, 0.3)).parents == [-1, -1]
    # No other tree of so few nodes yields more: all of them, by adding nodes to those with one node less.
    acceptances, most = (0.6, 0.5, 0.3), 6
    trees = {()}
    for nodes in range(1, most + 1):
        trees = {tuple(sorted({*paths, path})) for paths in trees for path in _additions(paths, len(acceptances))}
        best = max(_by_paths(paths, acceptances) for paths in trees)
        assert _expected(likely_tree(nodes, most, acceptances), acceptances) == pytest.approx(best)


def _additions(paths, places):
    """Paths by which a tree, given as its nodes' paths of places, may grow."""
    for above in [(), *paths]:
        used = sum(len(p) == len(above) + 1 and p[:-1] == above for p in paths)
        if used < places:
            yield (*above, used)


def _by_paths(paths, acceptances) -> float:
    total = 1.0
    for path in paths:
        chance = 1.0
        for place in path:
            for before in acceptances[:place]:
                chance *= 1 - before
            chance *= acceptances[place]
        total += chance
    return total


def _expected(tree: Tree, acceptances, node: int = -1) -> float:
    """Tokens of a round, from the definition: down the tree by recursion."""
    total, left = 1.0, 1.0
    for place, child in enumerate(tree.children(node)):
        total += left * acceptances[place] * _expected(tree, acceptances, child)
        left *= 1 - acceptances[place]
    return total


def test_the_trees_to_choose_from():
    assert [(tree.nodes, tree.depth) for tree in SIX] == [(15, 2), (31, 6), (63, 3), (63, 5), (63, 9), (63, 14)]
    for vocab in (1, 2, 4):
        assert max(len(t.children(n)) for t in offloaded_trees(vocab) for n in range(-1, t.nodes)) <= vocab


def test_what_an_accepted_path_says():
    tree = Tree((-1, -1, -1, 0, 0, 1, 3, 3, 6))
    assert tree.places == [0, 1, 2, 0, 1, 0, 0, 1, 0]
    no, yes = False, True
    assert tree.judged[0] == [(0, no), (1, no), (2, no)]
    assert tree.judged[2 + 1] == [(0, no), (1, no), (2, yes)]  # no children
    assert tree.judged[1 + 1] == [(0, no), (1, yes), (0, no)]
    assert tree.judged[7 + 1] == [(0, yes), (0, yes), (0, no), (1, yes)]
    assert tree.judged[8 + 1] == [(0, yes)] * 4
    queued = _Queued(9, tree, None, (), 0.0, True)
    rows = [[-1] * 5 + [last, 9, depth, 0] for last, depth in ((-1, 0), (7, 3), (8, 4))]
    assert queued.outcome(rows) == (tree, 27, 6, 2, [[1, 1], [0, 1]]) and queued.most == 5
    assert queued.outcome([]) == (tree, 0, 0, 0, [[0, 0], [0, 0]])


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2)])
def test_chains_and_trees_in_turn_change_nothing(pair, tp, pp):
    path, draft = pair
    ((expected, _),) = run_ranks(ranks.generated, 1, path, None, PROMPTS, NEW)
    for tokens, stats in run_ranks(ranks.generated_in_turn, tp * pp, path, draft, PROMPTS, NEW, IN_TURN, tp=tp, pp=pp):
        assert tokens == expected and stats["accepted"] > 0
        assert set(stats["rounds_by_tree"]) == {(t.nodes, t.depth) for t in SIX}
        assert sum(stats["rounds_by_tree"].values()) < stats["rounds"] == sum(stats["rounds_by_length"].values())


def test_a_perfect_draft_is_accepted_whole(pair):
    """Of a draft that is the target every first sibling is right, whatever was drafted before, or nothing."""
    path, _ = pair
    ((tokens, stats),) = run_ranks(ranks.generated_in_turn, 1, path, path, PROMPTS[:1], 61, IN_TURN)
    ((expected, _),) = run_ranks(ranks.generated, 1, path, None, PROMPTS[:1], 61)
    made, rounds = 1, 0
    while made < 61:
        shape = IN_TURN[rounds % len(IN_TURN)]
        made, rounds = made + 1 + (shape if shape >= 0 else SIX[-1 - shape].depth), rounds + 1
    assert tokens == expected and stats["rounds"] == rounds and stats["accepted"] == made - 1 - rounds


@pytest.mark.parametrize("tp", [1, 2])
def test_captured_rounds_of_trees_give_the_same_tokens(pair, tp):
    path, draft = pair
    ((expected, _),) = run_ranks(ranks.generated, 1, path, None, PROMPTS, NEW)
    args = path, draft, PROMPTS, NEW, (4, -1, 0, -5, -1, -2, 0, 4), 24
    options = {"tp": tp, "num_draft_tokens": "auto", "offload": fp.Offload()}
    for tokens, stats, captured, replayed, *_ in run_ranks(ranks.generated_by_kept_rounds, tp, *args, **options):
        assert tokens == expected and len(stats["rounds_by_tree"]) == 3
        assert captured[:7] == [(4, 0), (15, 0), (0, 0), (63, 1), (31, 0), (4, 1)][: len(captured)] + captured[6:7]
        assert replayed >= stats["rounds"] + len(captured)


def test_automatic_choice_with_the_committed_pair():
    """Greedy: plain decoding's tokens, with trees among what was drafted; sampled: trees, too. Where trees are not
    allowed, and where nothing is streamed, none are."""
    mesh = fp.init(device="cpu")
    load = {"mesh": mesh, "dtype": torch.float32}
    plain = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-target", **load)
    model = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-target", **load, offload=fp.Offload())
    draft = fp.LlamaForCausalLM.from_pretrained(ASSETS / "tiny-draft", mesh=None, dtype=torch.float32)
    prompts = [[5, 17, 200, 3], [9], list(range(40, 60))]
    expected = fp.generate(plain, prompts, 60).tokens
    auto = {"draft": draft, "num_draft_tokens": "auto"}
    for batch in (prompts, prompts[2:]):
        result = fp.generate(model, batch, 60, **auto)
        assert result.tokens == expected[-len(batch) :] and (15, 2) in result.stats.rounds_by_tree
    assert (15, 2) in fp.generate(model, prompts, 60, **auto, temperature=0.8).stats.rounds_by_tree
    for of, options in ((plain, {}), (model, {"draft": "ngram"}), (model, {"method": "block"})):
        result = fp.generate(of, prompts, 60, **auto | options)
        assert result.tokens == expected and result.stats.rounds_by_tree == {}


class Machine:
    """A simulated one: a round takes 1000 us to stream, `draft_us` for each pass of the draft and `row_us` for each
    drafted token, and 3 % of noise. A sibling tried i-th is accepted with probability acceptances(round)[i]."""

    def __init__(self, acceptances, draft_us: float, row_us: float = 0.0, batch: int = 1) -> None:
        self.acceptances, self.draft_us, self.row_us, self.batch = acceptances, draft_us, row_us, batch

    def time(self, shape) -> float:
        nodes, depth = (shape.nodes, shape.depth) if isinstance(shape, Tree) else (shape, shape)
        return 1000.0 + self.draft_us * depth + self.row_us * nodes

    def rate(self, shape, number: int = 0) -> float:
        acceptances = self.acceptances(number)
        if isinstance(shape, Tree):
            return _expected(shape, acceptances) / self.time(shape)
        return sum(acceptances[0] ** i for i in range(shape + 1)) / self.time(shape)

    def run(self, adaptive: AdaptiveLength, rounds: int, seed: int) -> tuple[float, list]:
        """(tokens a microsecond, what was chosen)."""
        draw = random.Random(seed)
        told, chosen, tokens, us = None, [], 0.0, 0.0
        for number in range(rounds):
            shape = adaptive.choose()
            tree = shape if isinstance(shape, Tree) else Tree((1,) * shape) if shape else None
            lasts = [self.accept(tree, self.acceptances(number), draw) for _ in range(self.batch)]
            if told is not None:  # as in `run_ahead`: a round later
                adaptive.record(*told)
            nodes = tree.nodes if tree is not None else 0
            counts = [0 if last < 0 else tree.depths[last] for last in lasts]
            rows = [[last, nodes, count, 0] for last, count in zip(lasts, counts, strict=True)]
            took = self.time(shape) * draw.uniform(0.97, 1.03)
            queued = _Queued(nodes, shape if isinstance(shape, Tree) else None, None, (), 0.0, True)
            kind, *outcome = queued.outcome(rows)
            told = (kind, took, *outcome)
            tokens, us = tokens + 1 + sum(counts) / self.batch, us + took
            chosen.append(shape)
        return tokens / us, chosen

    @staticmethod
    def accept(tree, acceptances, draw) -> int:
        """The last node of a path."""
        node, going = -1, tree is not None
        while going:
            going = False
            for place, child in enumerate(tree.children(node)):
                if draw.random() < acceptances[place]:
                    node, going = child, True
                    break
        return node


def constant(first: float, second: float):
    later = (second, 0.7 * second, 0.6 * second, 0.5 * second, 0.5 * second)
    return lambda _: (first, *later)


def options():
    return AdaptiveLength(LENGTHS_OFFLOADED, SIX)


ALL = (*LENGTHS_OFFLOADED, *SIX)


@pytest.mark.parametrize("draft_us", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("first,second", [(0.5, 0.35), (0.7, 0.35), (0.8, 0.2)])
def test_a_tree_that_is_best_is_found_and_kept(first, second, draft_us):
    machine = Machine(constant(first, second), draft_us)
    best, chain = max(map(machine.rate, ALL)), max(map(machine.rate, LENGTHS_OFFLOADED))
    assert best > 1.1 * chain
    found = [machine.run(options(), 2000, seed) for seed in range(3)]
    for rate, chosen in found:
        assert rate > 1.05 * chain
        assert sum(isinstance(shape, Tree) for shape in chosen[100:]) > 0.9 * 1900
    assert sum(rate for rate, _ in found) / 3 > 0.96 * best


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "acceptances,draft_us,row_us",
    [((0.9, 0.0), 10.0, 0.0), ((0.95, 0.05), 10.0, 0.0), ((0.8, 0.35), 30.0, 50.0), ((0.6, 0.35), 10.0, 100.0)],
)
def test_where_a_chain_is_best_trees_cost_little(acceptances, draft_us, row_us, batch):
    """Siblings that are never right, or tokens that each take time: at most 5 % less than the best chain, 4 % in the
    mean of three, and at most 3 % less than what chooses among chains only."""
    machine = Machine(constant(*acceptances), draft_us, row_us, batch)
    best = max(map(machine.rate, ALL))
    assert best == max(map(machine.rate, LENGTHS_OFFLOADED))
    rates = [machine.run(options(), 2000, seed)[0] for seed in range(3)]
    chains = [machine.run(AdaptiveLength(LENGTHS_OFFLOADED), 2000, seed)[0] for seed in range(3)]
    assert min(rates) > 0.95 * best and sum(rates) / 3 > 0.96 * best
    assert sum(rates) > 0.97 * sum(chains)


@pytest.mark.parametrize("draft_us,row_us", [(30.0, 0.0), (100.0, 0.0), (400.0, 0.0), (100.0, 50.0), (400.0, 200.0)])
def test_where_nothing_pays_little_is_lost(draft_us, row_us):
    machine = Machine(constant(0.0, 0.0), draft_us, row_us)
    for seed in range(3):
        rate, chosen = machine.run(options(), 3000, seed)
        assert rate > 0.97 * machine.rate(0)
        assert sum(isinstance(shape, Tree) for shape in chosen) < 3000 / 64 + 2


def test_a_tree_that_has_lost_is_not_taken_again_and_again():
    """Siblings are never right and a node takes a 20th of a pass: after the first rounds a tree is only looked at."""
    machine = Machine(constant(0.6, 0.0), 30.0, 50.0)
    _, chosen = machine.run(options(), 2000, 0)
    at = [number for number, shape in enumerate(chosen) if isinstance(shape, Tree)]
    assert len(at) <= 2 + 2000 // 64 + 1 and sum(number < 20 for number in at) <= 4


def test_a_change_is_noticed():
    """Second siblings begin to be right after 1000 rounds: a chain at first, a tree later; and the other way round."""
    early, late = constant(0.8, 0.0), constant(0.4, 0.6)
    for of in (lambda n: early(n) if n < 1000 else late(n), lambda n: late(n) if n < 1000 else early(n)):
        machine = Machine(of, 30.0, 10.0)
        _, chosen = machine.run(options(), 3000, 1)
        for at, number in ((slice(500, 1000), 0), (slice(2000, 3000), 2000)):
            mean = [machine.rate(shape, number) for shape in chosen[at]]
            assert sum(mean) / len(mean) > 0.93 * max(machine.rate(shape, number) for shape in ALL)


def test_the_same_numbers_give_the_same_choices():
    one, other, draw = options(), options(), random.Random(1)
    seen = set()
    for _ in range(400):
        shape = one.choose()
        assert other.choose() is shape
        seen.add(shape)
        later = [(draw.randint(0, 2), draw.randint(0, 2)) for _ in range(2)] if isinstance(shape, Tree) else ()
        numbers = (shape, draw.uniform(500, 2000), 4, draw.randint(0, 4), draw.randint(0, 4), later)
        one.record(*numbers), other.record(*numbers)
    assert len(seen) > 6 and module.LENGTHS_OFFLOADED[-1] < one.most == 63
