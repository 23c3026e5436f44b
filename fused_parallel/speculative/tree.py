"""The shape of a tree of drafted tokens: the same for every sequence and every round."""

from __future__ import annotations

import functools
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
