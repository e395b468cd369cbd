"""Rows: what every kind of source gives when it is opened, and the look that tells the good from the bad."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mixing.bad_rows import BadRow, RowError, SourceError
from mixing.images import UnreadableImage, header_size
from mixing.tasks import Cells

MOST_BAD = 0.01
"""Share of a source's rows that may be bad with `on_bad_row: skip`."""

_THREADS = 8  # they hide the waiting on a network file system; a local one is as fast with one
_BLOCK = 64  # rows looked at together: bounds the memory of tables whose rows hold whole images


@dataclass(frozen=True)
class Found:
    """A row as it was found, good or bad."""

    place: str
    """Where it stands, for messages."""
    key: str
    """Its identity, if it is good."""
    read: Callable[[], Cells]
    """What it holds; raises RowError."""


@dataclass(frozen=True)
class Good:
    """A row that can be used, as far as can be told without decoding."""

    position: int
    """Its place among all rows found, from 0."""
    key: str
    cells: Cells


class Rows(Protocol):
    """The good rows of a source; goes through fork and pickling."""

    def key(self, index: int) -> str:
        """The row's identity, the same when other rows are added."""

    def cells(self, index: int) -> Cells:
        """What the row holds, images not decoded. Raises RowError if that has changed since opening."""


class Listing(Protocol):
    """A source before its rows are looked at."""

    def found(self) -> Iterator[Found]:
        """Every row, in the source's own order."""

    def keep(self, good: Iterable[Good]) -> Rows:
        """The good rows, which come in the same order."""


@dataclass(frozen=True)
class Survey:
    """What the look at every row of a source gave. N: good rows."""

    rows: Rows
    num_references: NDArray[np.uint8]
    """[N]"""
    sizes: NDArray[np.uint32]
    """[N, 2]: height and width of the upright target, in pixels, from its header."""
    bad: tuple[BadRow, ...]
    fingerprint: str
    """SHA-256 over the good rows' keys, prompts and image sizes in bytes."""


def survey(source: str, listing: Listing, on_bad_row: Literal["skip", "stop"]) -> Survey:
    """Look at every row once: files there, headers readable, prompt and references present. No pixels are decoded.

    source: its name in the plan. Raises SourceError if there are no good rows; at the first bad row with `stop`; with
    `skip` if more than 1 % of the rows are bad.
    """
    bad: list[BadRow] = []
    num_references, sizes, digest = array("B"), array("I"), hashlib.sha256()

    def good() -> Iterator[Good]:
        for position, (found, seen) in enumerate(_looked_at(listing.found())):
            if isinstance(seen, str):
                bad.append(BadRow(source, found.place, seen))
                if on_bad_row == "stop":
                    raise SourceError(
                        f"bad row {_named(bad[0])}; repair or remove it, or say on_bad_row: skip to go on without"
                    )
                continue
            num_references.append(len(seen.cells.references))
            sizes.extend(seen.size)
            digest.update(json.dumps([found.key, seen.cells.prompt, seen.num_bytes]).encode())
            yield Good(position, found.key, seen.cells)

    rows = listing.keep(good())
    total = len(num_references) + len(bad)
    if total == 0:
        raise SourceError("it holds no rows")
    if not num_references or len(bad) > MOST_BAD * total:
        named = "; ".join(_named(row) for row in bad[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        allowed = "a source needs a good one" if not num_references else f"at most {MOST_BAD:.0%} are skipped"
        raise SourceError(f"{len(bad)} of {total} rows are bad; {allowed}; repair or remove them: {named}{more}")
    return Survey(
        rows,
        np.frombuffer(num_references, dtype=np.uint8).copy(),
        np.array(sizes, dtype=np.uint32).reshape(-1, 2),
        tuple(bad),
        digest.hexdigest(),
    )


@dataclass(frozen=True)
class _Seen:
    cells: Cells
    size: tuple[int, int]
    num_bytes: tuple[int, ...]


def _looked_at(rows: Iterator[Found]) -> Iterator[tuple[Found, _Seen | str]]:
    """Every row with what was seen, or the reason why it is bad."""
    with ThreadPoolExecutor(_THREADS) as pool:
        while block := list(islice(rows, _BLOCK)):
            yield from zip(block, pool.map(_look, block), strict=True)


def _look(found: Found) -> _Seen | str:
    try:
        cells = found.read()
        sizes, num_bytes = [], []
        for name, pixels in cells.images():
            try:
                sizes.append(header_size(pixels))
            except UnreadableImage as error:
                return f"{name}: {error}"
            num_bytes.append(pixels.stat().st_size if isinstance(pixels, Path) else len(pixels))
    except (RowError, OSError) as error:
        return str(error)
    return _Seen(cells, sizes[0], tuple(num_bytes))


def _named(row: BadRow) -> str:
    return f"{row.key!r}: {row.reason}"
