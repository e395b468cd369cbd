"""Order: which source and which row stand at which position of a stage, as arithmetic.

Nothing here is drawn, stored or replayed. How many images each source has given after t images of a stage is a closed formula of t
(`Quota`); the order inside a step is a sort by keys; the rows of an epoch are a keyed permutation (`permute`). So the order depends on the
plan and the position alone, not on the number of processes, workers or restarts, and step 1,000,000 costs what step 0 costs.

A step is a list of micro-batches of equal size, and a micro-batch has one signature. The rows of one source with one signature are a *cell*.
Micro-batches are shared out among the signatures, and the images of a signature among its cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from mixing.keys import key, keys, scramble
from mixing.shares import integers

Integers = NDArray[np.int64]

# --- how many of each, after t --------------------------------------------------------------------------------------------------------

_Tree = int | tuple["_Tree", "_Tree"]
_SEARCHED = 6  # up to so many leaves every tree is tried (945 of them)


def _weight(tree: _Tree, weights: Sequence[int]) -> int:
    return weights[tree] if isinstance(tree, int) else sum(_weight(child, weights) for child in tree)


def _worst(tree: _Tree, weights: Sequence[int], error: float = 0.0) -> float:
    """Upper bound of |count - t x share| over the leaves of a tree whose root is off by at most `error`.

    Rounding to nearest puts a child off by 1/2, and it inherits its fraction of its parent's error.
    """
    if isinstance(tree, int):
        return error
    total = _weight(tree, weights)
    return max(_worst(child, weights, 0.5 + error * _weight(child, weights) / total) for child in tree)


def _every_tree(leaves: tuple[int, ...]) -> Iterator[_Tree]:
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


def _huffman(weights: Sequence[int]) -> _Tree:
    heap: list[tuple[int, int, _Tree]] = [(weight, leaf, leaf) for leaf, weight in enumerate(weights)]
    heapify(heap)
    for number in range(len(weights), 2 * len(weights) - 1):
        light, _, left = heappop(heap)
        heavy, _, right = heappop(heap)
        heappush(heap, (light + heavy, number, (left, right)))
    return heap[0][2]


class Quota:
    """How many of t things go to each of several takers, exactly by weight at every t: nested rounding down a binary tree.

    weights: positive integers with a sum below 2**31. For every t >= 0: the counts sum to t; each grows by 0 or 1 from t to t + 1; at a
    multiple of the sum of the weights they are exact; and each is within `bound` of t x its share, always below 2: in a Huffman tree an
    inner node weighs at most 2/3 of its parent, so inner errors stay below 1/2 / (1 - 2/3) and a leaf adds 1/2. Up to 6 takers the best
    of all trees is taken, whose bound is at most 1 in practice.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = tuple(int(weight) for weight in weights)
        assert self.weights
        assert min(self.weights) > 0
        assert sum(self.weights) < 2**31
        leaves = tuple(range(len(self.weights)))
        tree = min(_every_tree(leaves), key=lambda t: _worst(t, self.weights)) if len(leaves) <= _SEARCHED else _huffman(self.weights)
        self.bound = _worst(tree, self.weights)
        self._splits: list[tuple[int, int, int, int, int]] = []  # node, left child, right child, weight left, weight; parents first
        self._leaves: list[int] = [0] * len(leaves)
        self._number = 0
        self._lay_out(tree)

    def _lay_out(self, tree: _Tree) -> int:
        node, self._number = self._number, self._number + 1
        if isinstance(tree, int):
            self._leaves[tree] = node
            return node
        place = len(self._splits)
        self._splits.append((0, 0, 0, 0, 0))
        left, right = self._lay_out(tree[0]), self._lay_out(tree[1])
        self._splits[place] = (node, left, right, _weight(tree[0], self.weights), _weight(tree, self.weights))
        return node

    def counts(self, t: Integers) -> Integers:
        """Counts after t things, [*t.shape, number of takers]. t: any shape, 0 <= t < 2**62."""
        nodes: list[Integers] = [t.astype(np.int64)] * self._number
        for node, left, right, weight, total in self._splits:
            whole, rest = np.divmod(nodes[node], total)
            nodes[left] = whole * weight + (rest * weight + total // 2) // total
            nodes[right] = nodes[node] - nodes[left]
        return np.stack([nodes[leaf] for leaf in self._leaves], axis=-1)


# --- which row ------------------------------------------------------------------------------------------------------------------------

_ROUNDS = 6  # a keyed Feistel network of four rounds leaves a measurable rank correlation; six do not


def permute(places: Integers, size: int, base: int) -> Integers:
    """Where a keyed permutation of [0, size) sends each place: one to one, and for another key another permutation.

    places: any shape, each in [0, size). A Feistel network over the bits of size - 1 with splitmix64 as its round function; what falls
    outside is sent on until it falls inside (Black and Rogaway 2002). Costs the same for the first place and the last.
    """
    bits = max(2, int(size - 1).bit_length())
    low = bits // 2
    low_mask, high_mask = np.uint64((1 << low) - 1), np.uint64((1 << (bits - low)) - 1)
    rounds = [np.uint64(key(base, number)) for number in range(_ROUNDS)]

    def network(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        lower, upper = words & low_mask, words >> np.uint64(low)
        for number, word in enumerate(rounds):
            if number % 2:
                lower = lower ^ (scramble(upper ^ word) >> np.uint64(17)) & low_mask
            else:
                upper = upper ^ (scramble(lower ^ word) >> np.uint64(17)) & high_mask
        return upper << np.uint64(low) | lower

    flat = network(places.astype(np.uint64).ravel())
    outside = np.flatnonzero(flat >= np.uint64(size))
    while outside.size:
        flat[outside] = network(flat[outside])
        outside = outside[flat[outside] >= np.uint64(size)]
    return flat.astype(np.int64).reshape(places.shape)


# --- the order of a stage -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The training rows of one source that have one signature."""

    source: str
    signature: str
    rows: int
    """How many rows, at least 1."""
    weight: Fraction
    """Share of the images, not normalised."""
    drawn_before: int = 0
    """Images drawn in earlier stages: the epoch goes on where they left it."""

    def row(self, draws: Integers, seed: int) -> Integers:
        """The row, in [0, rows), that each draw of this cell gets. draws: 0 is the first of the whole run.

        Each epoch visits every row once, in an order of its own, keyed by the seed and this cell's names alone.
        """
        epochs, places = np.divmod(draws, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(places[here], self.rows, key(seed, "rows", self.source, self.signature, int(epoch)))
        return rows


@dataclass(frozen=True)
class Drawn:
    """What stands at the positions of a run of steps. Shapes [steps, micro-batches, images of a micro-batch]."""

    first_step: int
    cell: Integers
    """Index into `Order.cells`."""
    draw: Integers
    """How many images of that cell came before, in the whole run."""


class Order:
    """The order of one stage.

    seed, stage: what the order inside a step is keyed by. images: per step, over all processes. micro: images of a micro-batch, a divisor
    of `images`. For every source, images drawn and share x images differ at the end of every step by less than 2 where all cells have one
    signature, and otherwise by at most `micro_batches_off` micro-batches times its part of the signature, and 2.
    """

    def __init__(self, seed: int, stage: str, cells: Sequence[Cell], images: int, micro: int) -> None:
        assert cells
        assert images % micro == 0
        assert min(cell.rows for cell in cells) > 0
        self.cells = tuple(cells)
        self.images, self.micro, self.micro_batches = images, micro, images // micro
        self._key = key(seed, "order", stage)
        self.signatures = tuple(dict.fromkeys(cell.signature for cell in cells))
        members = [[index for index, cell in enumerate(cells) if cell.signature == signature] for signature in self.signatures]
        whole = list(integers({str(index): cell.weight for index, cell in enumerate(cells)}).values())
        self._members = members
        self._signature_quota = Quota(list(integers({s: sum((cells[i].weight for i in m), Fraction(0)) for s, m in zip(self.signatures, members, strict=True)}).values()))
        self._cell_quotas = [Quota([whole[index] for index in member]) for member in members]
        self.micro_batches_off = self._signature_quota.bound

    def counts(self, steps: Integers) -> Integers:
        """Images of each cell that the stage has drawn after so many steps, [*steps.shape, cells]. A closed formula: no step is visited."""
        counts = np.zeros((*steps.shape, len(self.cells)), dtype=np.int64)
        per_signature = self._signature_quota.counts(steps.astype(np.int64) * self.micro_batches) * self.micro
        for number, (member, quota) in enumerate(zip(self._members, self._cell_quotas, strict=True)):
            counts[..., member] = quota.counts(per_signature[..., number])
        return counts

    def steps(self, first: int, number: int) -> Drawn:
        """What stands in steps first ... first + number - 1."""
        edges = np.arange(first, first + number + 1, dtype=np.int64)
        batches = edges * self.micro_batches
        signature = _laid_out(self._signature_quota.counts(batches), key(self._key, "signature"), batches[0], self.micro_batches)
        cell = np.empty((number * self.micro_batches, self.micro), dtype=np.int64)
        draw = np.empty_like(cell)
        counted = self._signature_quota.counts(batches)
        before = self.counts(edges)
        for index, member in enumerate(self._members):
            images = counted[:, index] * self.micro
            which, nth = _shuffled(before[:, member], key(self._key, "image", self.signatures[index]), int(images[0]))
            here = signature.ravel() == index
            cell[here] = np.asarray(member, dtype=np.int64)[which].reshape(-1, self.micro)
            draw[here] = nth.reshape(-1, self.micro)
        draw += np.asarray([c.drawn_before for c in self.cells], dtype=np.int64)[cell]
        shape = (number, self.micro_batches, self.micro)
        return Drawn(first, cell.reshape(shape), draw.reshape(shape))


def _laid_out(counts: Integers, base: int, first: np.int64, width: int) -> Integers:
    """The takers of each step in an order keyed by position, [steps, width]. counts: at the edges of the steps, [steps + 1, takers]."""
    which, _ = _shuffled(counts, base, int(first))
    return which.reshape(-1, width)


def _shuffled(counts: Integers, base: int, first: int) -> tuple[Integers, Integers]:
    """For each thing given out between the edges, its taker and how many that taker had before it; shuffled inside each step by key.

    counts: running counts at the edges of the steps, [steps + 1, takers]; first: things given out before the first edge.
    """
    given = np.diff(counts, axis=0)
    steps, takers = given.shape
    flat = given.ravel()
    which = np.repeat(np.tile(np.arange(takers, dtype=np.int64), steps), flat)
    starts = np.cumsum(flat) - flat
    nth = np.arange(which.size, dtype=np.int64) - np.repeat(starts, flat) + np.repeat(counts[:-1].ravel(), flat)
    step = np.repeat(np.arange(steps, dtype=np.int64), given.sum(axis=1))
    order = np.lexsort((keys(base, first + np.arange(which.size, dtype=np.int64)), step))
    return which[order], nth[order]
