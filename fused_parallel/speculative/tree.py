"""The shape of a tree of drafted tokens: the same for every sequence and every round."""

from __future__ import annotations

import functools
import heapq
import itertools
import operator
from collections.abc import Sequence

import torch

MOST_NODES = 63  # what the kernels of fp.verify_tree take


class Tree:
    """Nodes in the order of their depth, siblings side by side in the order in which they are tried.

    Args:
        shape: how many children each node of a depth has, such as (4, 2, 1): 4 nodes, two below each of them, one below
            each of those; or, where it begins with -1, the node that each node follows (-1: the root), parents before
            children and depths in order.

    Raises TypeError, ValueError: no such shape, or more than 63 nodes.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        try:
            shape = [operator.index(x) for x in shape]
        except TypeError as error:
            raise TypeError(f"generate: a tree is a sequence of integers, widths or parents, got {shape!r}") from error
        if not shape or (shape[0] != -1 and min(shape) < 1):
            raise ValueError(f"generate: a tree's widths must be at least 1 each, got {shape!r}")
        self.parents = shape if shape[0] == -1 else _parents_of(shape)
        if len(self.parents) > MOST_NODES:
            raise ValueError(f"generate: a tree has at most {MOST_NODES} nodes, got {len(self.parents)} of {shape!r}")
        self.depths: list[int] = []  # 1 for the root's children
        for j, parent in enumerate(self.parents):
            if not -1 <= parent < j:
                raise ValueError(f"generate: node {j} of a tree follows {parent}, which is no node before it")
            self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        # A node's children side by side and, below one depth, in their parents' order.
        if any(a > b for a, b in itertools.pairwise(self.parents)):
            raise ValueError(f"generate: a tree's nodes must be in the order of their parents, got {self.parents}")

    @property
    def nodes(self) -> int:
        return len(self.parents)

    @property
    def depth(self) -> int:
        """The longest path."""
        return self.depths[-1]

    def level(self, depth: int) -> range:
        """The nodes of a depth."""
        return range(self.depths.index(depth), self.nodes - self.depths[::-1].index(depth))

    def children(self, node: int) -> range:
        """Of a node, or of the root (-1); they are side by side."""
        count = self.parents.count(node)
        return range(self.parents.index(node), self.parents.index(node) + count) if count else range(0)

    @functools.cached_property
    def places(self) -> list[int]:
        """Of each node among its siblings: 0 for the one that is tried first."""
        return [j - self.parents.index(parent) for j, parent in enumerate(self.parents)]

    @functools.cached_property
    def judged(self) -> list[list[tuple[int, bool]]]:
        """What an accepted path says, by its last node (0 for none, j + 1 for node j): of each sibling that was tried
        its place, and whether it was accepted."""
        told: list[list[tuple[int, bool]]] = [[]]
        for j, parent in enumerate(self.parents):
            told.append([*told[parent + 1], *((i, False) for i in range(self.places[j])), (self.places[j], True)])
        return [of + [(i, False) for i in range(len(self.children(j - 1)))] for j, of in enumerate(told)]

    @functools.cached_property
    def sees(self) -> torch.Tensor:
        """bool [N + 1, N + 1]: row 0 is the root, row j + 1 node j; a node sees itself and those it follows."""
        mask = torch.eye(self.nodes + 1, dtype=torch.bool)
        for j, parent in enumerate(self.parents):
            mask[j + 1] |= mask[parent + 1]
        return mask


def _parents_of(widths: list[int]) -> list[int]:
    parents: list[int] = []
    above = [-1]
    for width in widths:
        if len(parents) + len(above) * width > MOST_NODES:
            raise ValueError(f"generate: a tree has at most {MOST_NODES} nodes, more than that with widths {widths}")
        begin = len(parents)
        parents += [parent for parent in above for _ in range(width)]
        above = list(range(begin, len(parents)))
    return parents


def likely_tree(nodes: int, depth: int, acceptances: Sequence[float]) -> Tree:
    """The tree of so many nodes, at most so deep, that yields the most tokens where the sibling tried first is accepted
    with probability acceptances[0] and, all before it rejected, the one tried next with acceptances[1], and so on: the
    nodes that are reached and accepted most often. No node has more children than there are acceptances.

    Source: Chen et al. 2024, "Sequoia" (there by dynamic programming; without a cost by node the most likely are best).
    """
    share = []  # of a node's children, by place: how often it is the one that is accepted, where the node is
    left = 1.0
    for acceptance in acceptances:
        share.append(left * acceptance)
        left *= 1 - acceptance
    # A path is the places of its nodes; a node's next sibling and its first child come up once it has been taken.
    taken: list[tuple[int, ...]] = []
    ready = [(-share[0], (0,), -1.0)]  # least first: minus the chances of the node and of the one above
    while ready and len(taken) < nodes:
        chance, path, above = heapq.heappop(ready)
        taken.append(path)
        place = path[-1] + 1
        if place < len(share):
            heapq.heappush(ready, (above * share[place], (*path[:-1], place), above))
        if len(path) < depth:
            heapq.heappush(ready, (chance * share[0], (*path, 0), chance))
    taken.sort(key=lambda path: (len(path), path))
    at = {path: j for j, path in enumerate(taken)}
    return Tree([at.get(path[:-1], -1) for path in taken])


class PlacedTree:
    """What a model needs to run on a tree's tokens: `LlamaForCausalLM.forward(tree=...)`, for a batch on a device."""

    def __init__(self, tree: Tree, batch: int, device: torch.device) -> None:
        self.tree = tree
        self.parents = torch.tensor(tree.parents, device=device)
        self.offsets = torch.tensor([0, *tree.depths], device=device)
        mask = tree.sees.to(device)
        self.whole = (self.offsets, mask.expand(batch, -1, -1).contiguous())
        # For the draft, which has the root behind it: the nodes down to a depth, as far as others follow.
        self.down_to = []
        for depth in range(1, tree.depth):
            end = tree.level(depth).stop
            part = mask[1 : end + 1, 1 : end + 1].expand(batch, -1, -1).contiguous()
            self.down_to.append((self.offsets[1 : end + 1] - 1, part))
