"""Selection: which rows of a source a run uses, and which of those it only measures itself on. Pure functions of row numbers, keys and a seed.

Nothing is drawn: a choice is a keyed order cut off, so the same plan takes the same rows anywhere, and a larger random `take` holds the smaller.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from hashlib import blake2b, sha256
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixing.keys import key, keys
from mixing.permutation import permute

By = Literal["random", "first", "stratified"]

_AT_ONCE = 1 << 18  # rows that are worked on together: what is needed in between does not grow with the source
_MOST_VALUES = 100_000  # of a column by which rows are stratified; one with more, such as a name, says nothing about proportions


def take_rows(
    candidates: NDArray[np.int64], *, count: int | None, fraction: float | None, by: By, strata: NDArray[Any] | Any | None, seed: int, name: str, filtered: bool = False
) -> NDArray[np.int64]:
    """The rows that a source's `take` leaves, sorted.

    candidates: the rows there are, ascending. count, fraction: how many, or which part of them (to the nearest row, a half upwards, and at
    least one); all, if neither is given. by: `random` is a keyed permutation cut off, `first` the lowest numbers, `stratified` a keyed choice
    inside each value of strata. strata: a value for each candidate, a numpy or pyarrow array (numbers, text or truths; None and NaN are one
    value). Each value gets its share of the rows, rounded by largest remainder, so within one of it; the choice inside a value does not depend
    on which others there are. name: the source. filtered: whether `where` came before, for the message. Raises ValueError if `count` is more than
    there are, or if strata have another type, or more than 100,000 different values.
    """
    total = len(candidates)
    assert total < 2**31
    if count is not None and count > total:
        readable = "that can be read and that `where` leaves" if filtered else "that can be read"
        raise ValueError(f"sources.{name}.take: {count:,} rows asked, the source has {total:,} {readable}; take at most that, or leave `take` out")
    if count is None:
        count = total if fraction is None else min(total, max(1, int(Fraction(repr(fraction)) * total + Fraction(1, 2))))
    if by == "first" or count == total:
        return candidates[:count].astype(np.int64)
    if by == "stratified":
        assert strata is not None
        assert len(strata) == total
        return candidates[_stratified(strata, count, seed, name)].astype(np.int64)
    places = np.empty(count, dtype=np.int32)
    base = key(seed, "take", name)
    for start in range(0, count, _AT_ONCE):
        places[start : start + _AT_ONCE] = permute(np.arange(start, min(start + _AT_ONCE, count), dtype=np.int64), total, base)
    places.sort()
    return candidates[places].astype(np.int64)


def _stratified(strata: Any, count: int, seed: int, name: str) -> NDArray[np.int32]:
    """Places in strata, ascending: `count` of them, each value in proportion."""
    values, codes = _coded(strata, name)
    bases = np.asarray([key(seed, "take", name, repr(value)) for value in values], dtype=np.uint64)
    sizes = np.bincount(codes, minlength=len(values))
    whole, remainder = np.divmod(count * sizes, len(codes))  # below 2**62
    left = count - int(whole.sum())
    whole[np.lexsort((bases, -remainder))[:left]] += 1
    order = np.argsort(codes, kind="stable").astype(np.int32)
    starts = np.cumsum(sizes) - sizes
    chosen = np.empty(count, dtype=np.int32)
    end = 0
    for value in np.flatnonzero(whole).tolist():
        members = order[starts[value] : starts[value] + sizes[value]]
        number = int(whole[value])
        chosen[end : end + number] = members[_smallest(_numbered(len(members), int(bases[value])), number)]
        end += number
    chosen.sort()
    return chosen


def _coded(strata: Any, name: str) -> tuple[list[object], NDArray[np.int32]]:
    """The different values, and for each row the number of its value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        column = pa.array(strata, from_pandas=True) if isinstance(strata, np.ndarray) else strata
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        coded = column.dictionary_encode(null_encoding="encode")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        kind = strata.dtype if isinstance(strata, np.ndarray) else strata.type
        raise ValueError(f"sources.{name}.take.column: its values are of type {kind}; numbers, text, true and false can be kept in proportion; choose another column") from error
    if len(coded.dictionary) > _MOST_VALUES:
        raise ValueError(f"sources.{name}.take.column: it has {len(coded.dictionary):,} different values; at most {_MOST_VALUES:,} can be kept in proportion; choose another column")
    return coded.dictionary.to_pylist(), np.asarray(coded.indices.to_numpy(zero_copy_only=False), dtype=np.int32)


def _numbered(count: int, base: int) -> NDArray[np.uint64]:
    """Keys of the numbers from 0 on, below a base key."""
    words = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _AT_ONCE):
        words[start : start + _AT_ONCE] = keys(base, np.arange(start, min(start + _AT_ONCE, count), dtype=np.int64))
    return words


def _smallest(words: NDArray[np.uint64], number: int) -> NDArray[np.int64]:
    """Where the `number` smallest words stand, ascending; of equal ones the first."""
    if number >= len(words):
        return np.arange(len(words), dtype=np.int64)
    limit = np.partition(words, number)[number]
    below = np.flatnonzero(words < limit)
    return np.sort(np.concatenate([below, np.flatnonzero(words == limit)[: number - len(below)]]))


def held_out_rows(taken: NDArray[np.int64], hashes: NDArray[np.uint64], number: int) -> NDArray[np.int64]:
    """Which of the taken rows are never trained on, in the order of `taken`: as many as asked, but at most a tenth.

    They are those with the smallest hash, so that adding rows to a source changes the set as little as can be. hashes: one for each taken row,
    from `row_hashes`; not looked at where none is held out.
    """
    number = min(number, len(taken) // 10)
    if number == 0:
        return taken[:0]
    assert len(hashes) == len(taken)
    return taken[_smallest(hashes, number)]


def row_hashes(source: str, rows: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits for each row, of its source's name and its key alone. rows: keys; they may come from a generator, and 8 bytes a row are kept."""
    prefix = f"{source}\0".encode("utf-8", "surrogatepass")
    remaining = iter(rows)
    digests = bytearray()
    while part := b"".join(blake2b(prefix + row.encode("utf-8", "surrogatepass"), digest_size=8).digest() for row in islice(remaining, _AT_ONCE)):
        digests += part
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def selection_record(
    *, by: By, column: str | None, seed: int, where: str | None, asked: int | float | None, of: int, hashes: NDArray[np.uint64]
) -> dict[str, str | int | float | None]:
    """What the ledger keeps of a selection.

    asked: `count` or `fraction`; None: all rows. of: rows that could be chosen from, after `where`. hashes: of the rows chosen, in any order.
    `sha256` is that of the sorted hashes, 8 bytes each, lowest byte first: it is the same for the same rows, in whatever order they lie on
    disk. `seed` is None where it decides nothing.
    """
    method = "all" if asked is None else f"stratified ({column})" if by == "stratified" else by
    return {
        "method": method,
        "seed": seed if method not in ("all", "first") else None,
        "where": where,
        "asked": asked,
        "rows": len(hashes),
        "of": of,
        "sha256": sha256(np.sort(hashes).astype("<u8", copy=False).data).hexdigest(),
    }
