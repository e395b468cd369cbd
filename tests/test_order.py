"""The order: exact shares, every row once an epoch, nothing that depends on processes, and a permutation that is one."""

from __future__ import annotations

import itertools
import math
import random
import time
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest

from mixing.keys import key, keys, uniform
from mixing.order import Budget, Cell, Drawn, Order
from mixing.permutation import permute
from mixing.quota import Quota
from mixing.share_out import share_out
from mixing.shares import Ramp, integers, mix_steps, shares, weights

MIXES = 300


def cell_of(source: str, rows: int, weight: Fraction, signature: str = "0 references", micro: int = 1, drawn_before: int = 0) -> Cell:
    """A source whose rows are all of one class, called as its signature."""
    return Cell(source, signature, signature, rows, weight, micro, drawn_before=drawn_before)


def order_of(seed: int, cells: list[Cell], images: int, steps: int = 10**9, stage: str = "stage") -> Order:
    """Steps of so many images."""
    return Order(seed, stage, cells, Budget("images", images, images, steps))


def by_step(drawn: Drawn, values: np.ndarray) -> list[np.ndarray]:
    """What stands in each step."""
    return np.split(values, drawn.starts[1:-1])


def draws_of(order: Order, drawn: Drawn, number: int) -> np.ndarray:
    """The draws of a cell, in order."""
    return np.sort(drawn.draw[drawn.cell == number])


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
    cells = [cell_of(name, sizes[name], weight, f"{draw.randrange(signatures)} references", micro) for name, weight in asked.items()]
    total = sum(asked.values())
    return order_of(number, cells, micro * draw.choice([4, 8])), {name: float(weight / total) for name, weight in asked.items()}


@pytest.mark.parametrize("signatures", [1, 4])
def test_shares_hold_at_the_end_of_every_step_over_300_random_mixes(signatures: int) -> None:
    for number in range(MIXES):
        order, asked = random_order(number, signatures)
        steps = np.arange(400)
        counts = order.counts(steps)
        drawn = order.steps(0, 399)
        seen = np.stack([np.bincount(cell, minlength=len(order.cells)) for cell in by_step(drawn, drawn.cell)]).cumsum(axis=0)
        assert (seen == counts[1:]).all(), "the formula and the order must be one"
        off = np.abs(counts - steps[:, None] * order.budget.first * np.array([asked[cell.source] for cell in order.cells])).max(axis=0)
        assert all(off[number] <= order.off[cell.source] + 1e-6 for number, cell in enumerate(order.cells))
        if len(order.signatures) == 1:
            assert off.max() < 2
        else:
            assert off.max() <= order.cells[0].micro + 2


def test_rows_come_once_an_epoch_and_unmoved_by_other_sources_and_processes_over_100_random_mixes() -> None:
    for number in range(MIXES // 3):
        order, _ = random_order(number, 1 + number % 4)
        drawn = order.steps(0, 60)
        # Draws of a cell are numbered without a gap, so that an epoch, a permutation of its rows, shows each once.
        for index, cell in enumerate(order.cells):
            draws = draws_of(order, drawn, index)
            assert (draws == np.arange(draws.size)).all()
            for first in range(0, draws.size - cell.rows + 1, cell.rows):
                assert (np.sort(cell.row(draws[first : first + cell.rows], number)) == np.arange(cell.rows)).all()
        # Whatever the number of processes, a step is the same images, shared out whole.
        for processes in (2, 3, 4):
            for images in by_step(drawn, drawn.cell)[:20]:
                parts = share_out(np.ones(len(images), dtype=np.int64), np.full(len(images), -1), processes)
                assert (np.concatenate(parts) == np.arange(len(images))).all()
                assert max(map(len, parts)) - min(map(len, parts)) <= 1
        # Another source in front and a renamed one leave the rows of the others where they were.
        first = order.cells[0]
        renamed = [cell_of("another", 77, Fraction(1), first.signature, first.micro), cell_of("new name", first.rows, first.weight, first.signature, first.micro), *order.cells[1:]]
        changed = order_of(number, renamed, order.budget.first)
        for before, after in zip(order.cells[1:], changed.cells[2:], strict=True):
            assert (before.row(np.arange(min(50, before.rows)), number) == after.row(np.arange(min(50, after.rows)), number)).all()


def test_shares_still_hold_after_a_hundred_million_steps() -> None:
    for number in range(50):
        order, asked = random_order(number, 1)
        steps = np.array([10**8, 10**8 + 7])
        total = steps[:, None] * order.budget.first
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
    cells = [cell_of(name, rows, weight, micro=4) for (name, weight), rows in zip(weights({"many": 3, "few": 1, "one": 0.1}, sizes).items(), sizes.values(), strict=True)]
    order = order_of(3, cells, 16)
    drawn = order.steps(0, 700)
    for number, cell in enumerate(order.cells):
        draws = draws_of(order, drawn, number)
        assert (draws == np.arange(draws.size)).all(), "draws of a source are numbered without a gap"
        rows = cell.row(draws, seed=3)
        epochs = [rows[first : first + cell.rows] for first in range(0, len(rows) - cell.rows + 1, cell.rows)]
        assert epochs
        assert all((np.sort(epoch) == np.arange(cell.rows)).all() for epoch in epochs)
        if cell.rows > 5:
            assert not any((one == other).all() for one, other in itertools.combinations(epochs, 2))


def test_natural_shares_show_every_row_of_every_source_once_before_any_twice() -> None:
    sizes = {"a": 120, "b": 64, "c": 7, "d": 1}
    order = order_of(0, [cell_of(name, sizes[name], weight, micro=4) for name, weight in weights("natural", sizes).items()], 16)
    drawn = order.steps(0, 12)
    assert drawn.draw.size == sum(sizes.values())
    for number, cell in enumerate(order.cells):
        assert sorted(cell.row(drawn.draw[drawn.cell == number], 0).tolist()) == list(range(cell.rows))


def test_a_later_stage_goes_on_in_the_epoch() -> None:
    cell = cell_of("a", 100, Fraction(1), micro=5)
    first = order_of(0, [cell], 10, stage="one")
    second = order_of(0, [cell_of("a", 100, Fraction(1), micro=5, drawn_before=60)], 10, stage="two")
    rows = np.concatenate([cell.row(first.steps(0, 6).draw.ravel(), 0), cell.row(second.steps(0, 4).draw.ravel(), 0)])
    assert sorted(rows.tolist()) == list(range(100))


def test_any_step_can_be_asked_for_first() -> None:
    order, _ = random_order(11, 3)
    whole = order.steps(0, 200)
    for first, number in [(0, 1), (199, 1), (37, 64), (100, 100)]:
        part = order.steps(first, number)
        here = slice(int(whole.starts[first]), int(whole.starts[first + number]))
        assert part.first_position == here.start
        assert (part.starts == whole.starts[first : first + number + 1] - here.start).all()
        for name in ("micro", "cell", "draw"):
            assert (getattr(part, name) == getattr(whole, name)[here]).all()


def test_position_a_billion_takes_milliseconds() -> None:
    order, _ = random_order(2, 4)
    order.steps(0, 2)
    best = math.inf
    for attempt in range(5):
        began = time.perf_counter()
        drawn = order.steps(10**8 + attempt, 1)
        order.cells[0].row(drawn.draw.ravel(), 1)
        best = min(best, time.perf_counter() - began)
    assert best < 0.02


def test_a_new_source_leaves_the_rows_of_the_others_in_their_order() -> None:
    own = [cell_of("a", 500, Fraction(1), micro=2), cell_of("b", 300, Fraction(1), "1 references", micro=2)]
    alone, joined = order_of(7, own, 8), order_of(7, [cell_of("new", 50, Fraction(1), micro=2), *own], 8)
    for name in ("a", "b"):
        rows = []
        for order in (alone, joined):
            number = next(i for i, cell in enumerate(order.cells) if cell.source == name)
            drawn = order.steps(0, 200)
            draws = draws_of(order, drawn, number)[:300]
            rows.append(order.cells[number].row(draws, 7))
        assert (rows[0] == rows[1]).all()


def test_every_micro_batch_has_one_signature() -> None:
    for number in range(30):
        order, _ = random_order(number, 3)
        signature = np.array([order.signatures.index(cell.signature) for cell in order.cells])
        drawn = order.steps(0, 50)
        for micro, found in zip(by_step(drawn, drawn.micro), by_step(drawn, signature[drawn.cell]), strict=True):
            assert (np.diff(micro) >= 0).all()
            assert all(len(set(found[micro == each].tolist())) == 1 for each in set(micro.tolist()))
            assert np.bincount(micro).max() <= order.cells[0].micro


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_get_the_same_shares_within_two_percent(processes: int) -> None:
    """A bare low-discrepancy order gives two of four ranks nothing of the first source."""
    sizes = dict.fromkeys("abc", 1000)
    cells = [cell_of(name, 1000, weight) for name, weight in weights({"a": 50, "b": 25, "c": 25}, sizes).items()]
    for order in (order_of(1, cells, 4), order_of(1, [cell_of(c.source, c.rows, c.weight, c.source, 4) for c in cells], 16)):
        drawn = order.steps(0, 20_000).cell.reshape(20_000, -1)
        for rank, own in enumerate(np.split(drawn, processes, axis=1)):
            shares_of_rank = np.bincount(own.ravel(), minlength=3) / own.size
            assert np.abs(shares_of_rank - [0.5, 0.25, 0.25]).max() < 0.02, rank


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


# --- buckets, levels, tokens, ramps -------------------------------------------------------------------------------------------------------


def bucketed(number: int, unit: Literal["images", "tokens"]) -> tuple[Order, dict[str, float], dict[int, float]]:
    """Sources of 9 aspects each, in proportions of their own, with 0 to 2 references, at one or three resolutions; micro-batches of 8,192 tokens or 4 images."""
    draw = random.Random(number)
    levels = draw.choice([{256: 1.0}, {256: 0.25, 512: 0.5, 768: 0.25}])
    names = [f"source{i}" for i in range(draw.randint(2, 8))]
    asked = {name: draw.randint(1, 50) for name in names}
    cells = []
    for name in names:
        references = draw.choice([0, 0, 1, 2])
        rows = [draw.randint(1, 1000) for _ in range(9)]
        for level, (pixels, share) in enumerate(levels.items()):
            for aspect in range(9):
                tokens = (pixels // 16) ** 2 * (1 + references) - 3 * aspect + 128
                weight = Fraction(asked[name]) * Fraction(rows[aspect], sum(rows)) * Fraction(share)
                micro = 4 if unit == "images" else 8192 // tokens
                cells.append(Cell(name, f"{aspect} {references}", f"{pixels} {aspect} {references}", rows[aspect], weight, max(1, micro), tokens, 0, level))
    step = 64 if unit == "images" else 20 * max(cell.tokens for cell in cells)
    order = Order(number, "stage", cells, Budget(unit, step, step, 10_000))
    return order, {name: each / sum(asked.values()) for name, each in asked.items()}, dict(enumerate(levels.values()))


def off_by(order: Order, counts: np.ndarray, asked: dict[str, float]) -> dict[str, float]:
    """The largest |images drawn - images asked| of each source over all steps."""
    total = counts.sum(axis=1)
    return {name: float(np.abs(counts[:, [c.source == name for c in order.cells]].sum(axis=1) - share * total).max()) for name, share in asked.items()}


def test_shares_over_buckets_and_resolutions_stay_within_one_micro_batch_and_two_images_over_100_random_mixes() -> None:
    for number in range(100):
        order, asked, levels = bucketed(number, "images")
        counts = order.counts(np.arange(300))
        off = off_by(order, counts, asked)
        assert all(off[name] <= order.off[name] + 1e-6 for name in asked)
        assert max(off.values()) <= 4 + 2
        total = counts.sum(axis=1)
        for level, share in levels.items():
            own = counts[:, [cell.level == level for cell in order.cells]].sum(axis=1)
            assert np.abs(own - share * total).max() <= 4 * len(asked)


def test_a_step_of_tokens_is_within_five_percent_of_what_was_asked_over_100_random_mixes() -> None:
    for number in range(100):
        order, asked, _ = bucketed(number, "tokens")
        counts = order.counts(np.arange(400))
        tokens = np.diff(counts @ np.array([cell.tokens for cell in order.cells]))
        assert np.abs(tokens / order.budget.first - 1).max() <= 0.05
        assert all(off <= order.off[name] + 1e-6 for name, off in off_by(order, counts, asked).items())
        assert max(off_by(order, counts, asked).values()) <= 2 * max(cell.micro for cell in order.cells)


def test_a_bucketed_step_is_what_the_formula_counts_and_every_row_comes_once_an_epoch() -> None:
    for number in range(40):
        order, _, _ = bucketed(number, "tokens" if number % 2 else "images")
        drawn = order.steps(0, 120)
        seen = np.stack([np.bincount(cell, minlength=len(order.cells)) for cell in by_step(drawn, drawn.cell)]).cumsum(axis=0)
        assert (seen == order.counts(np.arange(1, 121))).all()
        signature = np.array([order.signatures.index(cell.signature) for cell in order.cells])[drawn.cell]
        most = np.array([cell.micro for cell in order.cells])[drawn.cell]
        for micro, found, limit in zip(by_step(drawn, drawn.micro), by_step(drawn, signature), by_step(drawn, most), strict=True):
            assert sorted(set(micro.tolist())) == list(range(micro.max() + 1))
            assert all(len(set(found[micro == each].tolist())) == 1 for each in range(micro.max() + 1))
            assert (np.bincount(micro)[micro] <= limit).all()
        for source, group in order.groups:  # over all levels together
            own = [index for index, cell in enumerate(order.cells) if (cell.source, cell.group) == (source, group)]
            draws = np.sort(drawn.draw[np.isin(drawn.cell, own)])
            assert (draws == np.arange(draws.size)).all()


def test_three_resolutions_get_a_quarter_a_half_and_a_quarter() -> None:
    cells = [Cell("a", "square", str(pixels), 1000, Fraction(share), 4, tokens, 0, level) for level, (pixels, share, tokens) in enumerate([(256, 25, 256), (512, 50, 1024), (768, 25, 2304)])]
    order = Order(0, "stage", cells, Budget("images", 16, 16, 1000))
    counts = order.counts(np.arange(1001))
    assert np.abs(counts - np.arange(1001)[:, None] * np.array([4, 8, 4])).max() <= 4
    assert counts[1000].tolist() == [4000, 8000, 4000]


def test_processes_share_a_steps_tokens_to_within_five_percent() -> None:
    for number in range(30):
        order, _, _ = bucketed(number, "tokens")
        drawn = order.steps(0, 60)
        for cell in by_step(drawn, drawn.cell):
            tokens = np.array([order.cells[i].tokens for i in cell.tolist()])
            for processes in (2, 4):
                loads = [int(tokens[own].sum()) for own in share_out(tokens, np.full(len(tokens), -1), processes)]
                assert max(loads) - min(loads) <= 2 * tokens.max()


def test_a_ramp_of_shares_is_followed_to_within_a_few_images_at_every_step() -> None:
    steps = 1000
    mix = Ramp({"a": 8, "b": 2}, {"b": 5, "c": 5})
    sizes = {"a": 100, "b": 300, "c": 50}
    parts = mix_steps(mix, sizes, steps)
    cells = [cell_of(name, rows, Fraction(1), "x" if name != "c" else "y", 4) for name, rows in sizes.items()]
    order = Order(1, "stage", cells, Budget("images", 16, 16, steps), [(first, [part[name] for name in sizes]) for first, part in parts])
    way = np.arange(steps) / (steps - 1)
    asked = 16 * np.stack([0.8 * (1 - way), 0.2 * (1 - way) + 0.5 * way, 0.5 * way], axis=1)
    ideal = np.concatenate([np.zeros((1, 3)), asked.cumsum(axis=0)])
    counts = order.counts(np.arange(steps + 1))
    assert np.abs(counts - ideal).max() <= 4 + 2
    assert order.asked(steps) == pytest.approx({"a": 0.4, "b": 0.35, "c": 0.25})
    assert order.asked_at(0)["a"] > 0.79
    assert order.asked_at(steps - 1)["c"] > 0.49
    whole, part = order.steps(0, steps), order.steps(457, 300)
    here = slice(int(whole.starts[457]), int(whole.starts[757]))
    assert (part.cell == whole.cell[here]).all()
    assert (part.draw == whole.draw[here]).all()
    assert (part.starts == whole.starts[457:758] - here.start).all()


@pytest.mark.parametrize("unit", ["images", "tokens"])
def test_a_ramp_of_the_batch_gives_each_step_what_it_asks(unit: Literal["images", "tokens"]) -> None:
    cells = [Cell("a", "x", "x", 100, Fraction(1), 4, 100), Cell("b", "y", "y", 100, Fraction(1), 2, 250)]
    first, last, steps = (4, 64, 200) if unit == "images" else (5_000, 50_000, 200)
    order = Order(1, "stage", cells, Budget(unit, first, last, steps))
    counts = order.counts(np.arange(steps + 1))
    held = np.diff(counts @ np.array([cell.tokens if unit == "tokens" else 1 for cell in cells]))
    asked = np.linspace(first, last, steps)
    assert np.abs(held - asked).max() <= (1 if unit == "images" else 250)
    if unit == "tokens":
        assert np.abs(held / asked - 1).max() <= 0.05
    drawn = order.steps(150, 20)
    assert (np.diff(drawn.starts) == np.diff(counts.sum(axis=1))[150:170]).all()


def test_a_stage_that_draws_a_row_at_several_resolutions_shows_every_row_before_any_again() -> None:
    cells = [Cell("a", "square", str(pixels), 120, Fraction(share), 2, 1, 0, level) for level, (pixels, share) in enumerate([(256, 1), (512, 2), (768, 1)])]
    order = Order(5, "stage", cells, Budget("images", 8, 8, 1000))
    drawn = order.steps(0, 45)
    rows = order.cells[0].row(drawn.draw, 5)
    for epoch in range(3):
        assert sorted(rows[drawn.draw // 120 == epoch].tolist()) == list(range(120))


def test_a_lone_row_of_a_rare_shape_is_not_put_twice_into_a_micro_batch() -> None:
    cells = [Cell("a", "square", "512x512", 99, Fraction(99), 4), Cell("a", "strip", "1024x256", 1, Fraction(1), 4)]
    order = Order(2, "stage", cells, Budget("images", 16, 16, 1000))
    drawn = order.steps(0, 400)
    for micro, cell in zip(by_step(drawn, drawn.micro), by_step(drawn, drawn.cell), strict=True):
        assert all((cell[micro == each] == 1).sum() <= 1 for each in set(micro.tolist()))
    assert (drawn.cell == 1).sum() == 64
