"""Selection: a take is exact, keyed and the same everywhere, strata keep their proportion, and the held-out rows and the record follow from keys alone."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mixing.keys import key
from mixing.permutation import permute
from mixing.selection import By, held_out_rows, row_hashes, selection_record, take_rows


def take(candidates: Any, count: int | None = None, fraction: float | None = None, by: By = "random", strata: Any = None, seed: int = 0, name: str = "s") -> list[int]:
    rows = take_rows(np.asarray(candidates, dtype=np.int64), count=count, fraction=fraction, by=by, strata=strata, seed=seed, name=name)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all(), "sorted, and none twice"
    return rows.tolist()


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_a_random_take_of_all_rows_is_the_keyed_permutation_cut_off(total: int) -> None:
    for count in {1, total // 2 or 1, total}:
        expected = np.sort(permute(np.arange(count), total, key(3, "take", "photos")))
        assert take(range(total), count=count, seed=3, name="photos") == expected.tolist()


def test_a_random_take_stays_the_same_rows_from_version_to_version() -> None:
    assert take(range(1000), count=8, seed=0, name="photos") == [87, 287, 375, 383, 614, 851, 895, 927]


def test_a_random_take_is_cut_from_the_candidates_grows_with_its_count_and_depends_on_seed_and_name() -> None:
    candidates = list(range(5, 3000, 3))
    small, large = take(candidates, count=100), take(candidates, count=400)
    assert set(small) < set(large) < set(candidates)
    assert len(small) == 100
    assert len({tuple(small), tuple(take(candidates, count=100, seed=1)), tuple(take(candidates, count=100, name="t"))}) == 3
    for part in np.array_split(np.asarray(candidates), 4):
        assert 10 <= len(set(small) & set(part.tolist())) <= 40, "no end of the source is preferred"


def test_a_take_that_is_worked_on_in_parts_has_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = np.arange(1000) % 3
    whole = take(range(1000), count=500), take(range(1000), count=500, by="stratified", strata=strata), row_hashes("s", map(str, range(100))).tolist()
    monkeypatch.setattr("mixing.selection._AT_ONCE", 7)
    assert (take(range(1000), count=500), take(range(1000), count=500, by="stratified", strata=strata), row_hashes("s", map(str, range(100))).tolist()) == whole


def test_first_takes_the_lowest_numbers() -> None:
    assert take([3, 5, 8, 13], count=2, by="first") == [3, 5]
    assert take([3, 5, 8, 13], fraction=0.5, by="first", seed=9) == [3, 5]


@pytest.mark.parametrize("by", ["random", "first", "stratified"])
def test_without_a_cap_every_candidate_is_taken(by: By) -> None:
    assert take([3, 5, 8], by=by, strata=np.array([1, 1, 2])) == [3, 5, 8]
    assert take([3, 5, 8], fraction=1.0, by=by, strata=np.array([1, 1, 2])) == [3, 5, 8]
    assert take([], by=by, strata=np.array([])) == []


@pytest.mark.parametrize(("total", "fraction", "rows"), [(25, 0.1, 3), (24, 0.1, 2), (5, 0.01, 1), (1000, 0.0005, 1), (3, 1.0, 3), (7, 0.5, 4), (10, 0.29, 3), (100, 0.145, 15), (0, 0.5, 0)])
def test_a_fraction_is_rounded_to_the_nearest_row_and_to_at_least_one(total: int, fraction: float, rows: int) -> None:
    assert len(take(range(total), fraction=fraction)) == rows


def test_more_rows_than_there_are_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"^sources\.s\.take: 1,001 rows asked, the source has 1,000 that can be read; take at most that, or leave `take` out$"):
        take(range(1000), count=1001)
    with pytest.raises(ValueError, match="3 rows asked, the source has 2 that can be read and that `where` leaves; take at most that"):
        take_rows(np.arange(2), count=3, fraction=None, by="first", strata=None, seed=0, name="s", filtered=True)


def test_strata_keep_their_share_to_within_one_row_over_200_random_columns() -> None:
    draw = random.Random(0)
    for _ in range(200):
        total = draw.randint(2, 400)
        values = [draw.choice([None, "a", "b", "c", "d"][: draw.randint(1, 5)]) for _ in range(total)]
        count = draw.randint(1, total)
        rows = take(range(0, 10 * total, 10), count=count, by="stratified", strata=pa.array(values, pa.string()), seed=draw.randint(0, 9))
        assert len(rows) == count
        quotas = {value: Fraction(count * values.count(value), total) for value in set(values)}
        taken = {value: sum(values[row // 10] == value for row in rows) for value in quotas}
        assert all(abs(taken[value] - quota) < 1 for value, quota in quotas.items())
        up = [quota % 1 for value, quota in quotas.items() if taken[value] > quota]
        down = [quota % 1 for value, quota in quotas.items() if taken[value] < quota]
        assert not up or not down or min(up) >= max(down), "the largest remainders are rounded up"


def test_a_new_value_leaves_the_choice_inside_the_others_alone() -> None:
    before = np.array(["a", "b"] * 100)
    after = np.concatenate([np.repeat("new", 50), before])
    one = {row for row in take(range(200), count=100, by="stratified", strata=before)}
    other = {row - 50 for row in take(range(250), count=125, by="stratified", strata=after) if row >= 50}
    assert one == other
    fewer = {row - 50 for row in take(range(250), count=75, by="stratified", strata=after) if row >= 50}
    assert len(fewer) == 60
    assert fewer < one, "a smaller quota is the same order cut off earlier"


def test_the_choice_inside_a_value_is_keyed_by_seed_source_and_value() -> None:
    strata = np.repeat([0, 1], 500)

    def inside(value: int, seed: int = 0, name: str = "s") -> list[int]:
        return [row % 500 for row in take(range(1000), count=500, by="stratified", strata=strata, seed=seed, name=name) if row // 500 == value]

    assert inside(0) != inside(1)
    assert inside(0) != inside(0, seed=1)
    assert inside(0) != inside(0, name="t")
    assert 80 < sum(row < 250 for row in inside(0)) < 170


def test_strata_may_be_numpy_or_arrow_of_numbers_text_and_truths_and_none_and_nan_are_one_value() -> None:
    texts = ["x", None, "y", "x", None, "y"] * 10
    codes = [0.0, None, 1.0, 0.0, float("nan"), 1.0] * 10
    same = {
        tuple(take(range(60), count=20, by="stratified", strata=strata))
        for strata in (pa.array(texts), pa.chunked_array([texts[:7], texts[7:]]), pa.array(texts).dictionary_encode(), np.array(texts, dtype=object), pa.array(texts, pa.large_string()))
    }
    assert len(same) == 1
    same = {tuple(take(range(60), count=20, by="stratified", strata=strata)) for strata in (pa.array(codes, pa.float64()), np.array([np.nan if c is None else c for c in codes]), pa.array(codes, pa.float32()))}
    assert len(same) == 1
    assert sum(texts[row] is None for row in next(iter(same))) in (6, 7)
    whole = {tuple(take(range(60), count=20, by="stratified", strata=pa.array(np.arange(60) % 4, kind))) for kind in (pa.int8(), pa.int64(), pa.uint32())}
    assert len(whole) == 1
    assert len(take(range(4), count=2, by="stratified", strata=np.array([True, False, True, False]))) == 2


def test_strata_of_lists_or_of_a_million_values_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"^sources\.s\.take\.column: its values are of type list<.*>; numbers, text, true and false can be kept in proportion; choose another column$"):
        take(range(2), count=1, by="stratified", strata=pa.array([[1], [2]]))
    with pytest.raises(ValueError, match=r"its values are of type struct<"):
        take(range(2), count=1, by="stratified", strata=pa.array([{"bytes": b""}, None]))
    with pytest.raises(ValueError, match=r"its values are of type object;"):
        take(range(2), count=1, by="stratified", strata=np.array(["a", 1], dtype=object))
    with pytest.raises(ValueError, match=r"it has 100,001 different values; at most 100,000 can be kept in proportion"):
        take(range(100_001), count=1, by="stratified", strata=np.arange(100_001))


def hash_of(source: str, row: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{source}\0{row}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def test_row_hashes_are_of_the_source_and_the_key_alone() -> None:
    keys = ["a.png", "", "b/ä.jpg", "odd\udc80.png", "a.png", "0"]
    hashes = row_hashes("photos", keys)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [hash_of("photos", row) for row in keys]
    assert row_hashes("photos", (row for row in keys)).tolist() == hashes.tolist()
    assert row_hashes("other", keys).tolist() != hashes.tolist()
    assert row_hashes("photos", []).tolist() == []


@pytest.mark.parametrize(("rows", "asked", "number"), [(100, 64, 10), (1000, 64, 64), (9, 64, 0), (10, 64, 1), (50, 0, 0), (19, 1, 1)])
def test_held_out_rows_are_those_with_the_smallest_hash_and_at_most_a_tenth(rows: int, asked: int, number: int) -> None:
    taken = np.arange(0, 3 * rows, 3)
    hashes = row_hashes("s", (str(row) for row in taken))
    held_out = held_out_rows(taken, hashes, asked)
    assert held_out.tolist() == np.sort(taken[np.argsort(hashes, kind="stable")[:number]]).tolist()
    assert held_out_rows(taken, np.zeros(rows, dtype=np.uint64), asked).tolist() == taken[:number].tolist(), "of equal hashes the first"


def test_no_hashes_are_needed_where_nothing_is_held_out() -> None:
    assert held_out_rows(np.arange(5), np.empty(0, dtype=np.uint64), 64).tolist() == []


def test_the_record_says_how_rows_were_chosen_and_is_the_same_for_the_same_rows_in_another_order() -> None:
    hashes = row_hashes("s", map(str, range(20)))
    record = selection_record(by="random", column=None, seed=4, where="width > 3", asked=20, of=100, hashes=hashes)
    digest = hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in sorted(hashes.tolist()))).hexdigest()
    assert record == {"method": "random", "seed": 4, "where": "width > 3", "asked": 20, "rows": 20, "of": 100, "sha256": digest}
    assert selection_record(by="random", column=None, seed=4, where="width > 3", asked=20, of=100, hashes=hashes[::-1]) == record
    assert selection_record(by="random", column=None, seed=4, where="width > 3", asked=20, of=100, hashes=hashes[1:])["sha256"] != digest


def test_the_record_names_no_seed_where_a_seed_decides_nothing() -> None:
    hashes = row_hashes("s", ["a"])
    for by, asked, method, seed in (("random", None, "all", None), ("first", 1, "first", None), ("stratified", 0.5, "stratified (style)", 4), ("random", 1, "random", 4)):
        record = selection_record(by=by, column="style", seed=4, where=None, asked=asked, of=1, hashes=hashes)  # type: ignore[arg-type]
        assert (record["method"], record["seed"]) == (method, seed)
