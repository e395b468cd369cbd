"""The survey of a source: its good rows, how large their images are, and which rows are bad; from the data index where nothing has changed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mixing.bad_rows import BadRow, SourceError
from mixing.index import Entry, read_entry, write_entry
from mixing.look import Earlier, Seen, is_unchanged, looked_at
from mixing.rows import MOST_BAD, Good, Listing, Rows, Stored
from mixing.tasks import Cells

_ROWS = "rows-"  # in the index, before the names of what the rows themselves keep
_GIVEN_UP = 100_000  # bad rows from which on a source is refused, if they are most of what was seen: a wrong column in millions of rows is told at once
_AT_ONCE = 65_536  # values held as Python objects before they go into Arrow


@dataclass(frozen=True)
class Survey:
    """What the look at every row of a source gave. N: good rows, R: their references."""

    rows: Rows
    num_references: NDArray[np.uint8]
    """[N]"""
    sizes: NDArray[np.uint32]
    """[N, 2]: height and width of the upright target, in pixels, from its header."""
    reference_sizes: NDArray[np.uint32]
    """[R, 2]: those of every upright reference, row after row."""
    num_regions: NDArray[np.uint8]
    """[N]"""
    extra: Mapping[str, pa.ChunkedArray]
    """[N]: values of the further columns that were asked for."""
    bad: tuple[BadRow, ...]
    fingerprint: str
    """SHA-256 over the good rows' keys, prompts and image sizes in bytes."""


def survey(
    source: str, listing: Listing, on_bad_row: Literal["skip", "stop"], extra: Sequence[str] = (), place: Path | None = None
) -> Survey:
    """Look at every row once: files there, headers readable, prompt and references present. No pixels are decoded.

    source: its name in the plan. extra: names of the further columns whose values rows hold in `Cells.extra`. place: the source's entry in the
    data index: what has not changed since it was written is not looked at again, and what comes back is mapped into memory; None: it is
    all held in memory. Raises SourceError if there are no good rows; at the first bad row with `stop`; with `skip` if more than 1 % of the
    rows are bad, or most of a great many first ones; if a further column holds values of several kinds.
    """
    if place is None:
        facts, rows, stored = _look_at_all(source, listing, on_bad_row, extra, False, None)
        return _survey(source, rows, facts, stored)
    stamp = listing.stamp()  # before anything is read: what changes from here on is seen to have changed the next time
    entry = read_entry(place)
    earlier = None
    if entry is not None:
        bad = [(bad_place, reason) for bad_place, reason in entry.facts["bad"]]
        same = entry.facts["stamp"] == stamp
        if not (same and stamp is not None and not bad):
            earlier = Earlier.of(_rows(listing, entry), entry.stored)
            same = same and is_unchanged(listing, earlier, bad)
        if same:
            return _survey(source, _rows(listing, entry), entry.facts, entry.stored)
    facts, rows, stored = _look_at_all(source, listing, on_bad_row, extra, True, earlier)
    stored |= {_ROWS + name: values for name, values in rows.saved().items()}
    entry = write_entry(place, {**facts, "stamp": stamp}, stored)
    del rows, stored, earlier
    pa.default_memory_pool().release_unused()  # Arrow would keep what the rows took while they were gathered
    return _survey(source, _rows(listing, entry), entry.facts, entry.stored)


def _look_at_all(
    source: str, listing: Listing, on_bad_row: Literal["skip", "stop"], extra: Sequence[str], stamped: bool, earlier: Earlier | None
) -> tuple[dict[str, Any], Rows, dict[str, Stored]]:
    """What is said of all rows together, the good ones, and what is said of each of these."""
    bad: list[BadRow] = []
    num_references, num_regions, sizes, reference_sizes, contents, stamps = array("B"), array("B"), array("I"), array("I"), bytearray(), bytearray()
    values = [_Values(name) for name in extra]

    def good() -> Iterator[Good]:
        for position, row in enumerate(looked_at(listing, stamped, earlier)):
            match row.outcome:
                case str(reason):
                    bad.append(BadRow(source, row.place, reason))
                    if on_bad_row == "stop":
                        raise SourceError(f"bad row {_named(bad[0])}; repair or remove it, or say on_bad_row: skip to go on without")
                    if len(bad) >= _GIVEN_UP and len(bad) > len(num_references):
                        raise SourceError(f"{len(bad)} of the first {position + 1} rows are bad; {_what_to_do(bad)}")
                    continue
                case Seen(cells, look):
                    kept = Good(position, row.key, partial(_itself, cells))
                case int(number):
                    assert earlier is not None  # who else would have given the number
                    look = earlier.look(number)
                    kept = Good(position, row.key, partial(earlier.rows.cells, number), (earlier.rows, number))
            num_references.append(len(look.sizes) - 1)
            num_regions.append(look.regions)
            sizes.extend(look.sizes[0])
            for size in look.sizes[1:]:
                reference_sizes.extend(size)
            contents.extend(look.content)
            stamps.extend(row.stamp)
            for each, value in zip(values, look.extra, strict=True):
                each.add(value)
            yield kept

    rows = listing.keep(good())
    total = len(num_references) + len(bad)
    if total == 0:
        raise SourceError("it holds no rows")
    if not num_references or len(bad) > MOST_BAD * total:
        raise SourceError(f"{len(bad)} of {total} rows are bad; {_what_to_do(bad) if num_references else _what_to_do(bad, 'a source needs a good one')}")
    facts = {"fingerprint": hashlib.sha256(contents).hexdigest(), "bad": [[row.key, row.reason] for row in bad]}
    stored: dict[str, Stored] = {
        "num_references": np.array(num_references, dtype=np.uint8),
        "num_regions": np.array(num_regions, dtype=np.uint8),
        "sizes": np.array(sizes, dtype=np.uint32).reshape(-1, 2),
        "reference_sizes": np.array(reference_sizes, dtype=np.uint32).reshape(-1, 2),
    }
    if stamped:
        stored |= {"contents": _words(contents), "stamps": _words(stamps)}
    if extra:
        stored["extra"] = pa.table({each.name: each.column() for each in values})
    return facts, rows, stored


def _survey(source: str, rows: Rows, facts: Mapping[str, Any], stored: Mapping[str, Stored]) -> Survey:
    extra: Any = stored.get("extra")
    columns = {} if extra is None else dict(zip(extra.column_names, extra.columns, strict=True))
    bad = tuple(BadRow(source, place, reason) for place, reason in facts["bad"])
    return Survey(rows, stored["num_references"], stored["sizes"], stored["reference_sizes"], stored["num_regions"], columns, bad, facts["fingerprint"])


def _rows(listing: Listing, entry: Entry) -> Rows:
    return listing.restored({name.removeprefix(_ROWS): values for name, values in entry.stored.items() if name.startswith(_ROWS)})


class _Values:
    """The values of one further column, row after row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._chunks: list[pa.Array] = []
        self._values: list[object] = []

    def add(self, value: object) -> None:
        """Add the next row's."""
        self._values.append(value)
        if len(self._values) == _AT_ONCE:
            self._pack()

    def column(self) -> pa.ChunkedArray:
        """All values, of the one kind that they have. Raises SourceError if they have several."""
        self._pack()
        kinds = {chunk.type for chunk in self._chunks if chunk.type != pa.null()}
        kind = pa.float64() if kinds == {pa.int64(), pa.float64()} else next(iter(kinds), pa.null())
        if len(kinds) > 1 and kind != pa.float64():
            raise self._mixed()
        return pa.chunked_array([chunk.cast(kind) for chunk in self._chunks], kind)

    def _pack(self) -> None:
        try:
            chunk = pa.array(self._values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise self._mixed() from error
        self._chunks.append(chunk)
        self._values = []

    def _mixed(self) -> SourceError:
        return SourceError(
            f"column '{self.name}' holds values of several kinds, or numbers beyond 64 bits; where rows are chosen by a column it holds "
            "only text, only numbers, or only true and false"
        )


def _words(content: bytearray) -> NDArray[np.uint64]:
    """16 bytes of each row as two words. [N, 2]"""
    return np.frombuffer(content, dtype=np.uint64).reshape(-1, 2)


def _itself(cells: Cells) -> Cells:
    return cells


def _what_to_do(bad: Sequence[BadRow], allowed: str = f"at most {MOST_BAD:.0%} are skipped") -> str:
    named = "; ".join(_named(row) for row in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{allowed}; repair or remove them: {named}{more}"


def _named(row: BadRow) -> str:
    return f"{row.key!r}: {row.reason}"
