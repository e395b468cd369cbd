"""The order: exact shares, every row once an epoch, nothing that depends on processes, and a permutation that is one."""

from __future__ import annotations

import itertools
import math
import random
import time
from fractions import Fraction

import numpy as np
import pytest

from mixing.keys import key, keys, uniform
from mixing.mixture import _Requests
from mixing.order import Cell, Order, Quota, permute
from mixing.shares import integers, shares, weights

MIXES = 300


def random_order(number: int, signatures: int) -> tuple[Order, dict[str, float]]:
    """A random mix: 2 to 50 sources of 1 to 1e6 rows, shares down to 0.1 %, steps of 4 to 64 images."""
    draw = random.Random(number)
    names = [f"source{i}" for i in range(draw.randint(2, 50))]
    sizes = {name: int(10 ** draw.uniform(0, 6)) for name in names}
    kind = draw.choice(["natural", "shares", "rare"])
    if kind == "natural":
        asked = weights("natural", sizes)
    elif kind == "shares":
        asked = weights({name: draw.randint(1, 100) / 10 for name in names}, sizes)
    else:
        rare = 0.001 * (len(names) - 1)
        asked = weights({names[0]: 1 - rare, **dict.fromkeys(names[1:], 0.001)}, sizes)
    micro = draw.choice([1, 2, 4, 8])
    cells = [Cell(name, f"{draw.randrange(signatures)} references", sizes[name], weight) for name, weight in asked.items()]
    total = sum(asked.values())
    return Order(number, "stage", cells, micro * draw.choice([4, 8]), micro), {name: float(weight / total) for name, weight in asked.items()}


@pytest.mark.parametrize("signatures", [1, 4])
def test_shares_hold_at_the_end_of_every_step_over_300_random_mixes(signatures: int) -> None:
    for number in range(MIXES):
        order, asked = random_order(number, signatures)
        steps = np.arange(400)
        counts = order.counts(steps)
        drawn = order.steps(0, 399)
        seen = np.stack([np.bincount(cell.ravel(), minlength=len(order.cells)) for cell in drawn.cell]).cumsum(axis=0)
        assert (seen == counts[1:]).all(), "the formula and the order must be one"
        off = np.abs(counts - steps[:, None] * order.images * np.array([asked[cell.source] for cell in order.cells]))
        if len(order.signatures) == 1:
            assert off.max() < 2
        else:
            per_signature = np.stack([counts[:, [c.signature == s for c in order.cells]].sum(axis=1) for s in order.signatures], axis=1)
            wanted = [sum(asked[c.source] for c in order.cells if c.signature == s) for s in order.signatures]
            assert np.abs(per_signature - steps[:, None] * order.images * np.array(wanted)).max() <= order.micro
            assert off.max() <= order.micro + 2


def test_rows_come_once_an_epoch_and_unmoved_by_other_sources_and_processes_over_300_random_mixes() -> None:
    for number in range(MIXES):
        order, _ = random_order(number, 1 + number % 4)
        drawn = order.steps(0, 60)
        # Draws of a cell are numbered without a gap, so that an epoch, a permutation of its rows, shows each once.
        for index, cell in enumerate(order.cells):
            draws = np.sort(drawn.draw[drawn.cell == index])
            assert (draws == np.arange(draws.size)).all()
            for first in range(0, draws.size - cell.rows + 1, cell.rows):
                assert (np.sort(cell.row(draws[first : first + cell.rows], number)) == np.arange(cell.rows)).all()
        # Whatever the number of processes, a step is the same micro-batches, each process taking every W-th.
        for processes in {count for count in (2, 4) if order.micro_batches % count == 0}:
            parts = [[(request.step, request.micro, request.cells, request.draws) for request in _Requests(order, 0, 20, rank, processes)] for rank in range(processes)]
            assert len({len(part) for part in parts}) == 1
            assert sorted(itertools.chain(*parts)) == [(r.step, r.micro, r.cells, r.draws) for r in _Requests(order, 0, 20, 0, 1)]
        # Another source in front and a renamed one leave the rows of the others where they were.
        renamed = [Cell("another", order.cells[0].signature, 77, Fraction(1)), Cell("new name", *[getattr(order.cells[0], n) for n in ("signature", "rows", "weight")]), *order.cells[1:]]
        changed = Order(number, "stage", renamed, order.images, order.micro)
        for before, after in zip(order.cells[1:], changed.cells[2:], strict=True):
            assert (before.row(np.arange(min(50, before.rows)), number) == after.row(np.arange(min(50, after.rows)), number)).all()


def test_shares_still_hold_after_a_hundred_million_steps() -> None:
    for number in range(50):
        order, asked = random_order(number, 1)
        steps = np.array([10**8, 10**8 + 7])
        total = steps[:, None] * order.images
        off = np.abs(order.counts(steps) - total * np.array([asked[cell.source] for cell in order.cells]))
        # weights whose sum exceeds 2**31 are rounded to it: a source is then off by at most that part of what was drawn
        assert off.max() < 2 + total.max() / 2**31


def test_bounds_of_quotas_are_bounds() -> None:
    draw = random.Random(5)
    for _ in range(100):
        quota = Quota([draw.choice([1, 3, 10, 500, draw.randint(1, 10**6)]) for _ in range(draw.randint(1, 50))])
        t = np.arange(3000)
        counts = quota.counts(t)
        total = sum(quota.weights)
        assert (counts.sum(axis=1) == t).all()
        assert set(np.unique(np.diff(counts, axis=0))) <= {0, 1}
        assert np.abs(counts - t[:, None] * np.array(quota.weights) / total).max() <= quota.bound + 1e-9 < 2 + 1e-9
        assert (quota.counts(np.array(total)) == quota.weights).all()


def test_up_to_five_signatures_are_off_by_at_most_one_micro_batch() -> None:
    draw = random.Random(9)
    for _ in range(300):
        assert Quota([int(10 ** draw.uniform(0, 4)) for _ in range(draw.randint(2, 5))]).bound <= 1.0


def test_every_row_is_drawn_once_an_epoch_and_in_another_order_each_epoch() -> None:
    sizes = {"many": 997, "few": 13, "one": 1}
    cells = [Cell(name, "0 references", rows, weight) for (name, weight), rows in zip(weights({"many": 3, "few": 1, "one": 0.1}, sizes).items(), sizes.values(), strict=True)]
    order = Order(3, "stage", cells, 16, 4)
    drawn = order.steps(0, 700)
    for number, cell in enumerate(order.cells):
        draws = np.sort(drawn.draw[drawn.cell == number])
        assert (draws == np.arange(draws.size)).all(), "draws of a source are numbered without a gap"
        rows = cell.row(draws, seed=3)
        epochs = [rows[first : first + cell.rows] for first in range(0, len(rows) - cell.rows + 1, cell.rows)]
        assert epochs
        assert all((np.sort(epoch) == np.arange(cell.rows)).all() for epoch in epochs)
        if cell.rows > 5:
            assert not any((one == other).all() for one, other in itertools.combinations(epochs, 2))


def test_natural_shares_show_every_row_of_every_source_once_before_any_twice() -> None:
    sizes = {"a": 120, "b": 64, "c": 7, "d": 1}
    order = Order(0, "stage", [Cell(name, "0 references", sizes[name], weight) for name, weight in weights("natural", sizes).items()], 16, 4)
    drawn = order.steps(0, 12)
    assert drawn.draw.size == sum(sizes.values())
    for number, cell in enumerate(order.cells):
        assert sorted(cell.row(drawn.draw[drawn.cell == number], 0).tolist()) == list(range(cell.rows))


def test_a_later_stage_goes_on_in_the_epoch() -> None:
    cell = Cell("a", "0 references", 100, Fraction(1))
    first = Order(0, "one", [cell], 10, 5)
    second = Order(0, "two", [Cell("a", "0 references", 100, Fraction(1), drawn_before=60)], 10, 5)
    rows = np.concatenate([cell.row(first.steps(0, 6).draw.ravel(), 0), cell.row(second.steps(0, 4).draw.ravel(), 0)])
    assert sorted(rows.tolist()) == list(range(100))


def test_any_step_can_be_asked_for_first() -> None:
    order, _ = random_order(11, 3)
    whole = order.steps(0, 200)
    for first, number in [(0, 1), (199, 1), (37, 64), (100, 100)]:
        part = order.steps(first, number)
        assert (part.cell == whole.cell[first : first + number]).all()
        assert (part.draw == whole.draw[first : first + number]).all()


def test_position_a_billion_takes_milliseconds() -> None:
    order, _ = random_order(2, 4)
    order.steps(0, 2)
    best = math.inf
    for attempt in range(5):
        began = time.perf_counter()
        drawn = order.steps(10**9 // order.images + attempt, 1)
        order.cells[0].row(drawn.draw.ravel(), 1)
        best = min(best, time.perf_counter() - began)
    assert best < 0.02


def test_a_new_source_leaves_the_rows_of_the_others_in_their_order() -> None:
    alone = Order(7, "stage", [Cell("a", "0 references", 500, Fraction(1)), Cell("b", "1 references", 300, Fraction(1))], 8, 2)
    joined = Order(7, "stage", [Cell("new", "0 references", 50, Fraction(1)), Cell("a", "0 references", 500, Fraction(1)), Cell("b", "1 references", 300, Fraction(1))], 8, 2)
    for name in ("a", "b"):
        rows = []
        for order in (alone, joined):
            number = next(i for i, cell in enumerate(order.cells) if cell.source == name)
            drawn = order.steps(0, 200)
            draws = np.sort(drawn.draw[drawn.cell == number])[:300]
            rows.append(order.cells[number].row(draws, 7))
        assert (rows[0] == rows[1]).all()


def test_every_micro_batch_has_one_signature() -> None:
    for number in range(30):
        order, _ = random_order(number, 3)
        signature = np.array([order.signatures.index(cell.signature) for cell in order.cells])
        drawn = signature[order.steps(0, 50).cell]
        assert (drawn == drawn[:, :, :1]).all()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_get_the_same_shares_within_two_percent(processes: int) -> None:
    """A bare low-discrepancy order gives two of four ranks nothing of the first source."""
    sizes = dict.fromkeys("abc", 1000)
    cells = [Cell(name, "0 references", 1000, weight) for name, weight in weights({"a": 50, "b": 25, "c": 25}, sizes).items()]
    for order in (Order(1, "stage", cells, 4, 1), Order(1, "stage", [Cell(c.source, c.source, c.rows, c.weight) for c in cells], 16, 4)):
        drawn = order.steps(0, 20_000).cell
        for rank in range(processes):
            own = drawn[:, rank::processes]
            shares_of_rank = np.bincount(own.ravel(), minlength=3) / own.size
            assert np.abs(shares_of_rank - [0.5, 0.25, 0.25]).max() < 0.02


def test_the_permutation_is_one() -> None:
    for size in (1, 2, 3, 5, 7, 64, 100, 257, 1000, 4096, 5000, 99_991):
        for base in (0, 1, key("x")):
            assert (np.sort(permute(np.arange(size), size, base)) == np.arange(size)).all()


@pytest.mark.parametrize(("size", "number"), [(3, 6), (4, 24), (5, 120)])
def test_all_permutations_of_few_rows_occur(size: int, number: int) -> None:
    assert len({tuple(permute(np.arange(size), size, base)) for base in range(4000)}) == number


def test_the_permutation_looks_random() -> None:
    """Parity flips, rank correlation, fixed points and the spread of a prefix over 60 keys; a published Feistel order fails the first at z = 254."""
    size, bases = 65_536, range(60)
    parity, correlation, fixed, spread = [], [], [], []
    places = np.arange(size)
    for base in bases:
        order = permute(places, size, key("test", base))
        flips = np.count_nonzero((order[1:] ^ order[:-1]) & 1)
        parity.append((flips - (size - 1) / 2) / math.sqrt((size - 1) / 4))
        correlation.append(np.corrcoef(places, order)[0, 1] * math.sqrt(size))
        fixed.append(np.count_nonzero(order == places))
        bins = np.bincount(order[:512] * 16 // size, minlength=16)
        spread.append(((bins - 32) ** 2 / 32).sum())
    assert 0.7 < np.std(parity) < 1.35
    assert abs(np.mean(parity)) < 0.5
    assert 0.7 < np.std(correlation) < 1.35
    assert 0.5 < np.mean(fixed) < 1.6
    assert 13 < np.mean(spread) < 17


def test_keys_are_the_same_everywhere() -> None:
    """Golden numbers: these must never change, or no old run can be gone on with."""
    assert key(1, "a") == 12463034207613233928
    assert key(1, 2) != key(12) != key("1", 2)
    assert keys(5, np.arange(3)).tolist() == [4517933670823692284, 12773366489153039575, 10754009927501035530]
    assert permute(np.arange(8), 8, 42).tolist() == [2, 6, 1, 0, 3, 7, 5, 4]
    numbers = uniform(keys(0, np.arange(100_000)))
    assert 0 < numbers.min() < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005


def test_weights_are_taken_as_written() -> None:
    sizes = {"a": 10, "b": 30, "c": 60}
    assert integers(weights({"a": 0.1, "b": 0.2, "c": 0.7}, sizes)) == {"a": 1, "b": 2, "c": 7}
    assert integers(weights("natural", sizes)) == {"a": 1, "b": 3, "c": 6}
    assert shares({"a": 50, "b": 50, "c": 0}, sizes) == {"a": 0.5, "b": 0.5}
    big = integers({str(number): Fraction(10**9 + number, 7) for number in range(40)})
    assert sum(big.values()) < 2**31
    assert min(big.values()) > 0


@pytest.mark.parametrize(
    ("mix", "sizes", "message"),
    [({"d": 1.0}, {"a": 1}, "no source 'd'"), ({"a": 0.0}, {"a": 1}, "every share is 0"), ({"a": 1.0}, {"a": 0}, "no rows")],
)
def test_a_mix_that_draws_nothing_is_refused(mix: dict[str, float], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(mix, sizes)
