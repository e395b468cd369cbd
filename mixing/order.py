"""Order: which source and which row stand at which position of a stage, as arithmetic.

Nothing here is drawn, stored or replayed. How many images each source has given after t images of a stage is a closed formula of t
(`mixing.quota`); the order inside a step is a sort by keys; the rows of an epoch are a keyed permutation (`permute`). So the order depends
on the plan and the position alone, not on the number of processes, workers or restarts, and step 1,000,000 costs what step 0 costs.

Rows of one source and one shape class are a *group*: each epoch shows every row of it once. A group at one level of resolution is a *cell*; cells
whose images have the same shapes share a *signature*. The images of a stage stand in one long line of micro-batches, each of one signature and of
as many images as fit; a step is a piece of that line, so many images or tokens long. Where a step ends inside a micro-batch the rest of it opens
the next step: nothing is dropped, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixing.keys import key, keys
from mixing.permutation import permute, permute_each, round_keys
from mixing.quota import Quota, grafted, leaf_bounds, renumbered, tree_by_composition, tree_by_group, tree_by_weight, value_bounds
from mixing.shares import integers

Integers = NDArray[np.int64]

# --- how long a step is ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a step holds, over all processes: so many images or tokens, the same in every step, or changing in a straight line over the stage."""

    unit: Literal["images", "tokens"]
    first: int
    """Of the first step."""
    last: int
    """Of the last step."""
    steps: int
    """Of the stage."""

    def edges(self, steps: Integers) -> Integers:
        """Images or tokens before each of these steps, shape as `steps`."""
        if self.first == self.last:
            return steps.astype(np.int64) * self.first
        slope, over = self.last - self.first, 2 * (self.steps - 1)
        return steps * self.first + (steps * (steps - 1) * slope + over // 2) // over


# --- the order of a stage -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The rows of one group at one level."""

    source: str
    group: str
    """Rows of one shape class; its draws are numbered through all cells and stages."""
    signature: str
    """What must agree inside a micro-batch."""
    rows: int
    """Of the group, at least 1."""
    weight: Fraction
    """Share of the images, not normalised."""
    micro: int = 1
    """Images that a micro-batch may hold; cells of one signature agree in it."""
    tokens: int = 1
    """Of an image; cells of one signature agree in it."""
    drawn_before: int = 0
    """Images of the group drawn in earlier stages: the epoch goes on where they left it."""
    level: int = 0
    """Which of the stage's resolutions."""

    def row(self, draws: Integers, seed: int) -> Integers:
        """The row, in [0, rows), that each draw of this group gets. draws: 0 is the first of the whole run.

        Each epoch visits every row once, in an order of its own, keyed by the seed and this group's names alone.
        """
        epochs, places = np.divmod(draws, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(places[here], self.rows, key(seed, "rows", self.source, self.group, int(epoch)))
        return rows


@dataclass(frozen=True)
class Drawn:
    """What stands at the positions of a run of steps, image after image."""

    first_step: int
    first_position: int
    """Images of the stage before these."""
    starts: Integers
    """[steps + 1]: where each step begins among these images, and where the last one ends."""
    micro: Integers
    """[images]: which micro-batch of its step, from 0."""
    cell: Integers
    """[images]: index into `Order.cells`."""
    draw: Integers
    """[images]: how many images of that cell's group came before, in the whole run."""


class Order:
    """The order of one stage.

    seed, stage: what the order inside a step is keyed by. segments: the cells' weights from a step on, in the order of `cells`, where they change on
    the way; the first begins at step 0. Left out: the cells' own weights throughout. grows: whether segments may come later, so that what stands in
    front of one must not depend on it. For every source, images drawn and images asked for differ at the end of every step by at most `off[source]`:
    less than 2 where all cells have one signature and a step is whole micro-batches.
    """

    def __init__(self, seed: int, stage: str, cells: Sequence[Cell], budget: Budget, segments: Sequence[tuple[int, Sequence[Fraction]]] = (), *, grows: bool = False) -> None:
        assert cells
        assert min(min(cell.rows, cell.micro, cell.tokens) for cell in cells) > 0
        self.cells, self.budget = tuple(cells), budget
        self._key = key(seed, "order", stage)
        self.signatures = tuple(dict.fromkeys(cell.signature for cell in cells))
        numbers = {name: number for number, name in enumerate(dict.fromkeys((cell.source, cell.group) for cell in cells))}
        self.groups: tuple[tuple[str, str], ...] = tuple(numbers)
        """Source and group of everything whose draws are numbered together."""
        self._group_of = np.asarray([numbers[cell.source, cell.group] for cell in cells], dtype=np.int64)
        self._drawn_before = np.zeros(len(numbers), dtype=np.int64)
        self._drawn_before[self._group_of] = [cell.drawn_before for cell in cells]
        asked = [(first, tuple(weights)) for first, weights in segments] or [(0, tuple(cell.weight for cell in cells))]
        assert asked[0][0] == 0
        self._first_steps = np.asarray([first for first, _ in asked], dtype=np.int64)
        self._weights = [weights for _, weights in asked]
        self._trees = self._chosen(self._weights[:1] if grows else self._weights)
        self._names, self._members, self._micro, self._units = (trees := self._trees).names, trees.members, trees.micro, trees.units
        self.off = {name: off * (3 if grows else 2 if len(asked) > 1 else 1) for name, off in trees.off.items()}
        size = self._micro * self._units
        self._reach = int(min(4, max(1, min(budget.first, budget.last) // size.max() - 1))) if budget.unit == "tokens" else 1
        self._laid_out: dict[int, _Segment] = {}
        """Those that were asked for, by number. Two threads that lay out the same one make the same."""

    def _chosen(self, weights: Sequence[Sequence[Fraction]]) -> _Trees:
        """Sources share micro-batches, or each has its own: whichever keeps the shares closer. With one signature that is sharing them."""
        shares = [_normalised(each) for each in weights]
        mean = [sum(parts, Fraction(0)) for parts in zip(*shares, strict=True)]
        tried = [_Trees(self.cells, mean, self.budget, how) for how in ("together", "sources apart", "levels apart")]
        # A level may be off by a few images more than a source, for nothing else is told by its share.
        return min(tried, key=lambda trees: max(trees.off.values()) + max(trees.levels_off.values()) / 4)

    def changed(self, step: int, weights: Sequence[Fraction]) -> Order:
        """The same order, of one that grows, up to a step that a segment begins at; from there on with other weights of the cells. What stands in front is shared, not worked out again."""
        place = int(np.searchsorted(self._first_steps, step))
        assert self._first_steps[place] == step > 0
        changed = copy(self)
        changed._weights = [*self._weights[:place], *[tuple(weights)] * (len(self._weights) - place)]
        changed._laid_out = {number: segment for number, segment in list(self._laid_out.items()) if number < place}
        return changed

    def _segment(self, number: int) -> _Segment:
        """A segment, laid out when it is first asked for, and before it those in front of it: what one has given too much or too little the next one makes good, so that errors do not add up."""
        if (segment := self._laid_out.get(number)) is not None:
            return segment
        first = number
        while first and first - 1 not in self._laid_out:
            first -= 1
        for each in range(first, number + 1):
            self._laid_out[each] = segment = self._after(self._laid_out[each - 1] if each else None, each)
        assert segment is not None
        return segment

    def _after(self, last: _Segment | None, number: int) -> _Segment:
        """The segment with a number, which is 0 or comes after the last one."""
        first, share = int(self._first_steps[number]), _normalised(self._weights[number])
        if last is None:
            drawn, due = np.zeros(len(self.cells), dtype=np.int64), tuple([Fraction(0)] * len(self.cells))
        else:
            drawn = self.counts(np.asarray(first))
            due = last.asked_after(int(drawn.sum()))
        end = int(self._first_steps[number + 1]) if number + 1 < len(self._first_steps) else self.budget.steps
        length = int(self.budget.edges(np.asarray(end)) - self.budget.edges(np.asarray(first)))
        expected = Fraction(length) / sum((part * int(unit) for part, unit in zip(share, self._units[self._trees.number_of], strict=True)), Fraction(0))
        wanted = [max(part * expected + owed - int(given), part * expected / 1000) for part, owed, given in zip(share, due, drawn, strict=True)]
        return _Segment(first, int(drawn.sum()), share, due, drawn, *self._trees.quotas(wanted if number else share), self._micro * self._units)

    def _segment_at(self, steps: Integers) -> Integers:
        """Which segment steps, or the edges before them, belong to; an edge between two belongs to the earlier."""
        return np.maximum(np.searchsorted(self._first_steps, steps, side="left") - 1, 0)

    def _segment_of(self, step: int) -> _Segment:
        """The segment of `_segment_at`, of one step."""
        return self._segment(int(self._segment_at(np.asarray(step))))

    def asked(self, steps: int) -> dict[str, float]:
        """The share of each source that was asked for over the first `steps` steps of the stage, counted in images; of the first one's if that is 0."""
        steps = max(steps, 1)
        total = int(self.counts(np.asarray(steps)).sum())
        shares = dict.fromkeys((cell.source for cell in self.cells), Fraction(0))
        for cell, images in zip(self.cells, self._segment_of(steps).asked_after(total), strict=True):
            shares[cell.source] += images
        return {name: float(share / total) for name, share in shares.items()}

    def asked_at(self, step: int) -> dict[str, float]:
        """The share of each source that is asked for in one step."""
        shares = dict.fromkeys((cell.source for cell in self.cells), Fraction(0))
        for cell, part in zip(self.cells, self._segment_of(step + 1).shares, strict=True):
            shares[cell.source] += part
        return {name: float(share) for name, share in shares.items()}

    def counts(self, steps: Integers) -> Integers:
        """Images of each cell that the stage has drawn after so many steps, [*steps.shape, cells]. A closed formula: no step is visited."""
        flat = steps.astype(np.int64).ravel()
        counts = np.empty((flat.size, len(self.cells)), dtype=np.int64)
        number = self._segment_at(flat)
        for which in np.unique(number):
            segment, here = self._segment(int(which)), number == which
            counts[here] = self._cell_counts(segment, self._images(segment, self._edges(segment, flat[here])))
        return counts.reshape(*steps.shape, len(self.cells))

    def drawn_after(self, steps: int) -> dict[tuple[str, str], int]:
        """Images of each (source, group) drawn in the whole run once this stage has made so many steps."""
        counts = self._drawn_before + self._group_counts(self.counts(np.asarray([steps])))[0]
        return dict(zip(self.groups, counts.tolist(), strict=True))

    def steps(self, first: int, number: int) -> Drawn:
        """What stands in steps first ... first + number - 1."""
        borders = self._first_steps[np.searchsorted(self._first_steps, first, side="right") : np.searchsorted(self._first_steps, first + number)]
        edges = [first, *borders.tolist(), first + number]
        parts = [self._steps(self._segment_of(start + 1), start, end - start) for start, end in pairwise(edges)]
        if len(parts) == 1:
            return parts[0]
        before = np.cumsum([0, *(part.starts[-1] for part in parts[:-1])])
        starts = [parts[0].starts[:1], *(part.starts[1:] + images for part, images in zip(parts, before, strict=True))]
        micro, cell, draw = (np.concatenate([getattr(part, name) for part in parts]) for name in ("micro", "cell", "draw"))
        return Drawn(first, parts[0].first_position, np.concatenate(starts), micro, cell, draw)

    def rows(self, drawn: Drawn, seed: int) -> Integers:
        """The row of each image among those of its group, as `Cell.row` gives it: of all cells together. [images]"""
        epochs, places = np.divmod(drawn.draw, np.asarray([cell.rows for cell in self.cells])[drawn.cell])
        pairs, example, which = np.unique(epochs * len(self.groups) + self._group_of[drawn.cell], return_index=True, return_inverse=True)
        numbers = [divmod(pair, len(self.groups)) for pair in pairs.tolist()]
        rounds = np.asarray([round_keys(key(seed, "rows", *self.groups[group], epoch)) for epoch, group in numbers])
        return permute_each(places, which.ravel(), np.asarray([self.cells[number].rows for number in drawn.cell[example].tolist()]), rounds)

    def _edges(self, segment: _Segment, steps: Integers) -> _Edges:
        """Where steps begin in a segment. Where the budget's edge falls inside a micro-batch, images of that one, or of one shortly before it with
        images that fill the step better, are left to the step that begins. steps: [edges].
        """
        edges = self.budget.edges(steps) - int(self.budget.edges(np.asarray(segment.first_step)))
        size = self._micro * self._units
        low = np.maximum((edges / segment.mean_units).astype(np.int64) - segment.slack, 0)
        high = low + 2 * segment.slack + 1  # the first `low` micro-batches end at or before the edge, the first `high` after it
        while (high - low > 1).any():
            middle = (low + high) // 2
            fits = segment.signatures.counts(middle) @ size <= edges
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        batch = low[:, None] + np.arange(1 - self._reach, 1)  # candidates, [edges, reach]
        counts = segment.signatures.counts(np.maximum(np.concatenate([batch, low[:, None] + 1], axis=1), 0))
        signature = np.diff(counts, axis=1).argmax(axis=2)
        over = counts[:, -1] @ size - edges
        unit, most = self._units[signature], self._micro[signature]
        left = (2 * over[:, None] + unit) // (2 * unit)
        last = np.arange(self._reach) == self._reach - 1
        off = np.where((batch >= 0) & ((left < most) | last), np.abs(over[:, None] - left * unit), np.iinfo(np.int64).max)
        chosen = self._reach - 1 - off[:, ::-1].argmin(axis=1)
        here = np.arange(len(edges)), chosen
        whole = left[here] == most[here]  # the edge falls between two micro-batches
        return _Edges(np.where(whole, low, low + 1), batch[here], signature[here], np.where(whole, 0, left[here]))

    def _images(self, segment: _Segment, edges: _Edges) -> Integers:
        """Images of each signature before edges, [edges, signatures]."""
        counts = segment.signatures.counts(edges.batches) * self._micro
        counts[np.arange(len(counts)), edges.signature] -= edges.left
        return counts

    def _cell_counts(self, segment: _Segment, images: Integers) -> Integers:
        """Images of each cell in the stage, [edges, cells], from those of each signature in a segment."""
        counts = np.empty((len(images), len(self.cells)), dtype=np.int64)
        alone = [number for number, members in enumerate(self._members) if members.size == 1]
        counts[:, [self._members[number][0] for number in alone]] = images[:, alone]
        for number, (members, quota) in enumerate(zip(self._members, segment.cells, strict=True)):
            if members.size > 1:
                counts[:, members] = quota.counts(images[:, number])
        return counts + segment.drawn_before

    def _group_counts(self, counts: Integers) -> Integers:
        """Images of each group, [edges, groups], from those of each cell."""
        groups = np.zeros((len(self.groups), len(counts)), dtype=np.int64)
        np.add.at(groups, self._group_of, counts.T)
        return groups.T

    def _steps(self, segment: _Segment, first: int, number: int) -> Drawn:
        """As `steps`, inside one segment."""
        edges = self._edges(segment, np.arange(first, first + number + 1, dtype=np.int64))
        per_cell = self._cell_counts(segment, self._images(segment, edges))
        # Micro-batches: those that begin in these steps, and what was left of those before.
        low, high = int(edges.batches[0]), int(edges.batches[-1])
        signature = np.diff(segment.signatures.counts(np.arange(low, high + 1, dtype=np.int64)), axis=0).argmax(axis=1)
        length = self._micro[signature]
        opening, closing = np.flatnonzero(edges.left[:-1]), np.flatnonzero(edges.left[1:]) + 1
        length[edges.batch[closing] - low] -= edges.left[closing]
        begun = np.searchsorted(edges.batches, np.arange(low, high), side="right") - 1
        batch = np.concatenate([np.arange(low, high), edges.batch[opening]])
        signature = np.concatenate([signature, edges.signature[opening]])
        length = np.concatenate([length, edges.left[opening]])
        of_step = np.concatenate([begun, opening])
        # In each step in an order of their own.
        shuffled = np.lexsort((keys(key(self._key, "micro-batch", segment.first_step), batch), of_step))
        signature, length, of_step = signature[shuffled], length[shuffled], of_step[shuffled]
        micro = np.arange(of_step.size) - np.searchsorted(of_step, of_step)
        # Their images: each gets a cell of its signature, and a number among the images of its group.
        step, image_signature = np.repeat(of_step, length), np.repeat(signature, length)
        cell = np.asarray([members[0] for members in self._members], dtype=np.int64)[image_signature]
        for index, members in enumerate(self._members):
            if members.size > 1 and (here := np.flatnonzero(image_signature == index)).size:
                cell[here] = members[_shuffled(per_cell[:, members], key(self._key, "image", self._names[index], segment.first_step))]
        group, before = self._group_of[cell], self._drawn_before + self._group_counts(per_cell)
        together = np.lexsort((group, step))
        run = (step * len(self.groups) + group)[together]
        nth = np.empty(step.size, dtype=np.int64)
        nth[together] = np.arange(step.size) - np.searchsorted(run, run)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(step, minlength=number))])
        return Drawn(first, int(per_cell[0].sum()), starts, np.repeat(micro, length), cell, before[step, group] + nth)


@dataclass(frozen=True)
class _Edges:
    """Where steps begin in the line of a segment's micro-batches. Each [edges]."""

    batches: Integers
    """Micro-batches begun before."""
    batch: Integers
    """The one of them whose last images belong to the step that begins here."""
    signature: Integers
    """Its signature."""
    left: Integers
    """How many images that are."""


class _Trees:
    """The trees along which shares are rounded, the same in all segments of a stage."""

    def __init__(self, cells: Sequence[Cell], weights: Sequence[Fraction], budget: Budget, how: str) -> None:
        """weights: of each cell, on average over the segments. how: sources share micro-batches (`together`); or each has its own, and what is divided
        first is the micro-batches among the sources, and then a source's among the levels (`sources apart`), or the other way round (`levels apart`).
        """
        kinds = [cell.signature if how == "together" else f"{cell.signature} of {cell.source}" for cell in cells]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        self.names = tuple(numbers)
        self.number_of = np.asarray([numbers[kind] for kind in kinds], dtype=np.int64)
        self.members = [np.flatnonzero(self.number_of == number) for number in range(len(self.names))]
        members: list[list[int]] = [own.tolist() for own in self.members]
        assert all(len({(cells[i].micro, cells[i].tokens) for i in own}) == 1 for own in members)
        tokens = np.asarray([cells[own[0]].tokens for own in members], dtype=np.int64)
        self.units = tokens if budget.unit == "tokens" else np.ones_like(tokens)
        # A micro-batch is no longer than a step, and holds no row twice as long as there are as many.
        rows = [sum({(cells[i].source, cells[i].group): cells[i].rows for i in own}.values()) for own in members]
        most = min(budget.first, budget.last) // self.units
        assert most.min() > 0, "an image is longer than a step"
        self.micro = micro = np.asarray([min(cells[own[0]].micro, *each) for own, *each in zip(members, rows, most.tolist(), strict=True)], dtype=np.int64)
        names, levels = list(dict.fromkeys(cell.source for cell in cells)), sorted({cell.level for cell in cells})
        shares = np.asarray([float(weight) for weight in weights])
        shares /= shares.sum()
        image_share = np.asarray([shares[own].sum() for own in members])
        # Of each source, and of each level, the images in an image of each signature beyond what they are in all.
        within = np.zeros((len(members), len(names) + len(levels)))
        for number, own in enumerate(members):
            for i in own:
                within[number, names.index(cells[i].source)] += shares[i] / image_share[number]
                within[number, len(names) + levels.index(cells[i].level)] += shares[i] / image_share[number]
        excess = within - image_share @ within
        batch_share = image_share / micro
        if how == "together":
            self._signatures = tree_by_composition(excess * micro[:, None], batch_share)
        else:
            of_source, of_level = [cells[own[0]].source for own in members], [cells[own[0]].level for own in members]
            self._signatures = tree_by_group([of_source, of_level] if how == "sources apart" else [of_level, of_source], batch_share)
        self._cells, inside = [], np.zeros(len(names))
        for own in members:
            sources = list(dict.fromkeys(cells[i].source for i in own))
            parts = [[place for place, i in enumerate(own) if cells[i].source == name] for name in sources]
            sums = [sum((weights[own[place]] for place in part), Fraction(0)) for part in parts]
            top = tree_by_weight(_whole(sums))
            inner = [renumbered(tree_by_weight(_whole([weights[own[place]] for place in part])), part) for part in parts]
            self._cells.append(grafted(top, inner))
            inside[[names.index(name) for name in sources]] += leaf_bounds(top, [float(value) for value in sums])
        moved = value_bounds(self._signatures, batch_share, excess * micro[:, None])
        is_whole = budget.unit == "images" and budget.first == budget.last and len(set(micro.tolist())) == 1 and budget.first % int(micro[0]) == 0
        if not is_whole:
            moved += np.abs(excess * micro[:, None]).max(axis=0)
        self.off = dict(zip(names, (moved[: len(names)] + inside).tolist(), strict=True))
        """For each source, the bound on |images drawn - images asked for| at the end of every step."""
        self.levels_off = dict(zip(levels, moved[len(names) :].tolist(), strict=True))
        """The same for each level."""

    def quotas(self, weights: Sequence[Fraction]) -> tuple[Quota, list[Quota]]:
        """How micro-batches are given to the signatures, and the images of each to its cells. weights: of the cells, some of which may be 0."""
        sums = [sum((weights[i] for i in own.tolist()), Fraction(0)) / int(micro) for own, micro in zip(self.members, self.micro, strict=True)]
        cells = [Quota(_whole([weights[i] for i in own.tolist()]), tree) for own, tree in zip(self.members, self._cells, strict=True)]
        return Quota(_whole(sums), self._signatures), cells


class _Segment:
    """A run of steps with one set of weights."""

    def __init__(
        self,
        first_step: int,
        images_before: int,
        shares: Sequence[Fraction],
        asked_before: Sequence[Fraction],
        drawn_before: Integers,
        signatures: Quota,
        cells: list[Quota],
        size: Integers,
    ) -> None:
        self.first_step, self.images_before, self.shares = first_step, images_before, shares
        self.asked_before, self.drawn_before = asked_before, drawn_before
        self.signatures, self.cells = signatures, cells
        weights = np.asarray(signatures.weights, dtype=np.float64)
        self.mean_units = float(weights @ size / weights.sum())
        """Images or tokens of a micro-batch."""
        self.slack = int(value_bounds(signatures.tree, weights, size[:, None].astype(np.float64))[0] / self.mean_units) + 2
        """How many micro-batches the line can be ahead of, or behind, the mean."""

    def asked_after(self, images: int) -> tuple[Fraction, ...]:
        """Images of each cell that were asked for in the stage when it has given so many, the last of them here."""
        return tuple(asked + part * (images - self.images_before) for asked, part in zip(self.asked_before, self.shares, strict=True))


def _normalised(weights: Sequence[Fraction]) -> list[Fraction]:
    whole = sum(weights, Fraction(0))
    return [weight / whole for weight in weights]


def _whole(weights: Sequence[Fraction]) -> list[int]:
    """Weights, some of which may be 0, as whole numbers; all 0 count alike."""
    whole = integers({str(number): weight for number, weight in enumerate(weights) if weight > 0} or {str(number): Fraction(1) for number in range(len(weights))})
    return [whole.get(str(number), 0) for number in range(len(weights))]


def _shuffled(counts: Integers, base: int) -> Integers:
    """For each thing given out between the edges its taker, shuffled inside each step by key. counts: running counts at the edges, [steps + 1, takers]."""
    given = np.diff(counts, axis=0)
    steps, takers = given.shape
    which = np.repeat(np.tile(np.arange(takers, dtype=np.int64), steps), given.ravel())
    step = np.repeat(np.arange(steps, dtype=np.int64), given.sum(axis=1))
    return which[np.lexsort((keys(base, counts[0].sum() + np.arange(which.size, dtype=np.int64)), step))]
