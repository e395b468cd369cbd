"""Quotas: how many of t things each of several takers gets, exactly by weight at every t, by nested rounding down a binary tree.

At each inner node the things are divided between two subtrees in proportion to their weights, rounded to the nearest whole number. What the
rounding of one node moves from left to right changes the sums outside that node not at all; so a tree that separates first what must not be
mixed up (`tree_by_composition`) keeps the sums that matter closest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

Tree = int | tuple["Tree", "Tree"]
"""A leaf is the number of a taker."""

_SEARCHED = 5  # up to so many leaves every tree is tried (105 of them)


class Quota:
    """How many of t things go to each of several takers.

    weights: whole numbers of at least 0, not all 0, with a sum below 2**31. tree: over the numbers of the takers; left out, `tree_by_weight`.
    For every t >= 0: the counts sum to t; each grows by 0 or 1 from t to t + 1; at a multiple of the sum of the weights they are exact; and each is
    within `bound` of t x its share, below 2 where the tree is by weight.
    """

    def __init__(self, weights: Sequence[int], tree: Tree | None = None) -> None:
        self.weights = tuple(int(weight) for weight in weights)
        assert min(self.weights) >= 0
        assert 0 < sum(self.weights) < 2**31
        self.tree = tree_by_weight(self.weights) if tree is None else tree
        self.bound = float(leaf_bounds(self.tree, self.weights).max())
        splits: list[list[tuple[int, int, int, int, int]]] = []  # by depth: node, left, right, weight left, weight
        self._leaves = np.zeros(len(self.weights), dtype=np.int64)
        self._number = 0
        self._lay_out(self.tree, 0, splits)
        self._splits = [np.asarray(level, dtype=np.int64).T for level in splits]

    def _lay_out(self, tree: Tree, depth: int, splits: list[list[tuple[int, int, int, int, int]]]) -> tuple[int, int]:
        """Number the nodes; returns the tree's own number and weight."""
        node, self._number = self._number, self._number + 1
        if isinstance(tree, int):
            self._leaves[tree] = node
            return node, self.weights[tree]
        if depth == len(splits):
            splits.append([])
        left, weight_left = self._lay_out(tree[0], depth + 1, splits)
        right, weight_right = self._lay_out(tree[1], depth + 1, splits)
        splits[depth].append((node, left, right, weight_left, max(weight_left + weight_right, 1)))
        return node, weight_left + weight_right

    def counts(self, t: Integers) -> Integers:
        """Counts after t things, [*t.shape, number of takers]. t: any shape, 0 <= t < 2**62."""
        nodes = np.empty((self._number, t.size), dtype=np.int64)
        nodes[0] = t.ravel()
        for node, left, right, weight, total in self._splits:
            whole, rest = np.divmod(nodes[node], total[:, None])
            nodes[left] = whole * weight[:, None] + (rest * weight[:, None] + total[:, None] // 2) // total[:, None]
            nodes[right] = nodes[node] - nodes[left]
        return nodes[self._leaves].T.reshape(*t.shape, len(self.weights))


def tree_by_weight(weights: Sequence[int]) -> Tree:
    """The tree whose largest error is smallest, of all trees over few leaves; a Huffman tree over many.

    In a Huffman tree an inner node weighs at most 2/3 of its parent, so inner errors stay below 1/2 / (1 - 2/3) and a leaf adds 1/2: below 2.
    """
    leaves = tuple(range(len(weights)))
    if len(leaves) <= _SEARCHED:
        return min(_every_tree(leaves), key=lambda tree: float(leaf_bounds(tree, weights).max()))
    heap: list[tuple[int, int, Tree]] = [(weight, leaf, leaf) for leaf, weight in enumerate(weights)]
    heapify(heap)
    for number in range(len(weights), 2 * len(weights) - 1):
        light, _, left = heappop(heap)
        heavy, _, right = heappop(heap)
        heappush(heap, (light + heavy, number, (left, right)))
    return heap[0][2]


def tree_by_composition(values: Floats, weights: Floats) -> Tree:
    """A tree that keeps sums close: `value_bounds` of it are small.

    values: [takers, sums], what one thing of a taker adds to each sum. weights: [takers], above 0. Of all trees over few takers the best is taken; many
    are divided again and again where that leaves the least variance (as a regression tree is grown), and by weight once they are alike.
    """
    leaves = tuple(range(len(weights)))
    if len(leaves) <= _SEARCHED:
        scale = max(float(np.abs(values).max()), 1e-12)
        return min(_every_tree(leaves), key=lambda tree: max(float(value_bounds(tree, weights, values).max()) / scale, float(leaf_bounds(tree, weights.tolist()).max())))
    return _divided(np.arange(len(weights)), values, weights)


def _divided(takers: Integers, values: Floats, weights: Floats) -> Tree:
    if takers.size == 1:
        return int(takers[0])
    own, weight = values[takers], weights[takers]
    spread = own.max(axis=0) - own.min(axis=0)
    if spread.max() <= 1e-9:
        return renumbered(tree_by_weight(_rounded(weight)), takers.tolist())
    best, chosen = -1.0, (0, 1)
    total, mean = weight.sum(), weight @ own / weight.sum()
    for column in np.flatnonzero(spread > 1e-9).tolist():
        order = np.argsort(own[:, column], kind="stable")
        left = np.cumsum(weight[order])[:-1]
        sums = np.cumsum(weight[order, None] * own[order], axis=0)[:-1]
        # Between-group variance w_l w_r |mean_l - mean_r|^2, for a cut after each taker in this order.
        variance = np.square(sums / left[:, None] - mean).sum(axis=1) * left * total / (total - left)
        variance[np.diff(own[order, column]) <= 1e-12] = -1.0
        place = int(variance.argmax())
        if variance[place] > best:
            best, chosen = float(variance[place]), (column, place + 1)
    order = np.argsort(own[:, chosen[0]], kind="stable")
    return _divided(takers[order[: chosen[1]]], values, weights), _divided(takers[order[chosen[1] :]], values, weights)


def tree_by_group(labels: Sequence[Sequence[object]], weights: Floats) -> Tree:
    """A tree that divides takers first by their first label, then by the second, and so on; by weight each time.

    labels: each [takers]. weights: [takers], above 0.
    """

    def divided(takers: list[int], left: Sequence[Sequence[object]]) -> Tree:
        if not left:
            return renumbered(tree_by_weight(_rounded(weights[takers])), takers)
        groups: dict[object, list[int]] = {}
        for taker in takers:
            groups.setdefault(left[0][taker], []).append(taker)
        top = tree_by_weight(_rounded(np.asarray([weights[group].sum() for group in groups.values()])))
        return grafted(top, [divided(group, left[1:]) for group in groups.values()])

    return divided(list(range(len(weights))), labels)


def _rounded(weights: Floats) -> list[int]:
    return [max(1, int(each)) for each in weights / weights.sum() * 2**30]


def grafted(top: Tree, parts: Sequence[Tree]) -> Tree:
    """The tree `top` with a tree in the place of each of its leaves."""
    return parts[top] if isinstance(top, int) else (grafted(top[0], parts), grafted(top[1], parts))


def renumbered(tree: Tree, numbers: Sequence[int]) -> Tree:
    """The same tree over other numbers."""
    return numbers[tree] if isinstance(tree, int) else (renumbered(tree[0], numbers), renumbered(tree[1], numbers))


def leaf_bounds(tree: Tree, weights: Sequence[float]) -> Floats:
    """Bounds of |count - t x share|, [takers].

    Rounding to nearest puts a child off by 1/2, and it inherits its fraction of its parent's error.
    """
    bounds = np.zeros(len(weights))

    def weigh(tree: Tree) -> tuple[float, Tree, object]:
        if isinstance(tree, int):
            return weights[tree], tree, None
        left, right = weigh(tree[0]), weigh(tree[1])
        return left[0] + right[0], tree, (left, right)

    def descend(weighed: tuple[float, Tree, object], error: float) -> None:
        weight, tree, children = weighed
        if isinstance(tree, int):
            bounds[tree] = error
            return
        assert isinstance(children, tuple)
        for child in children:
            descend(child, 0.5 + error * child[0] / max(weight, 1e-300))

    descend(weigh(tree), 0.0)
    return bounds


def value_bounds(tree: Tree, weights: Floats, values: Floats) -> Floats:
    """Bounds of |sum of count x value - t x its mean|, [sums]. values: [takers, sums].

    Rounding at a node moves up to half a thing from one side to the other, and so half the difference of the sides' means.
    """
    bounds = np.zeros(values.shape[1])

    def mean(tree: Tree) -> tuple[float, Floats]:
        if isinstance(tree, int):
            return float(weights[tree]), values[tree]
        (left, mean_left), (right, mean_right) = mean(tree[0]), mean(tree[1])
        np.add(bounds, 0.5 * np.abs(mean_left - mean_right), out=bounds)
        total = left + right
        return total, (left * mean_left + right * mean_right) / total if total else mean_left

    mean(tree)
    return bounds


def _every_tree(leaves: tuple[int, ...]) -> Iterator[Tree]:
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, rest = leaves[0], leaves[1:]
    for chosen in range(2 ** len(rest) - 1):
        left = (first, *(leaf for bit, leaf in enumerate(rest) if chosen >> bit & 1))
        right = tuple(leaf for bit, leaf in enumerate(rest) if not chosen >> bit & 1)
        for one in _every_tree(left):
            for other in _every_tree(right):
                yield one, other
