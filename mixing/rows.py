"""Rows: what every kind of source gives when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
from numpy.typing import NDArray

from mixing.tasks import Cells

MOST_BAD = 0.01
"""Share of a source's rows that may be bad with `on_bad_row: skip`."""
FEW = 1_000
"""Rows of a stream before which a few bad ones may be chance."""

Stored: TypeAlias = "NDArray[Any] | pa.Table"
"""What a data index keeps: it comes back memory-mapped."""


def no_stamp() -> None:
    """The stamp of a row of which nothing can be told without reading it."""


@dataclass(frozen=True)
class Found:
    """A row as it was found, good or bad. Making one must be cheap: it is the reading that is shared out to processes."""

    place: str
    """Where it stands, for messages."""
    key: str
    """Its identity, if it is good; no two rows of a source have the same."""
    read: Callable[[], Cells]
    """What it holds; raises RowError."""
    stamp: Callable[[], str | None] = no_stamp
    """The state of the files that it is read from and of what names them, told without reading images: a good row whose key and stamp are those of
    an earlier opening is not read again. None: it cannot be told, and the row is always read."""


@dataclass(frozen=True)
class Good:
    """A row that can be used, as far as can be told without decoding."""

    position: int
    """Its place among all rows found, from 0."""
    key: str
    cells: Callable[[], Cells]
    """What it holds; images that are held as bytes may be empty here."""
    earlier: tuple[Rows, int] | None = None
    """Rows that this listing restored, and which of them it still is, unchanged."""


class Rows(Protocol):
    """The good rows of a source; goes through fork and pickling."""

    def key(self, index: int) -> str:
        """The row's identity, the same when other rows are added."""

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """The identities of many rows, quickly."""

    def cells(self, index: int) -> Cells:
        """What the row holds, images not decoded. Raises RowError if that has changed since opening."""

    def saved(self) -> Mapping[str, Stored]:
        """What a listing of the same source needs, beside itself, to give these rows again without looking at them."""


class NoRows:
    """The rows of a source that has none."""

    def key(self, index: int) -> str:
        """There is none. Raises IndexError."""
        raise IndexError(f"no row {index}: the source has none")

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """Of none of them."""
        return [self.key(int(index)) for index in indices]

    def cells(self, index: int) -> Cells:
        """There are none. Raises IndexError."""
        raise IndexError(f"no row {index}: the source has none")

    def saved(self) -> Mapping[str, Stored]:
        """Nothing."""
        return {}


class Listing(Protocol):
    """A source before its rows are looked at. Making one must be cheap too: what is slow waits for `found`."""

    def stamp(self) -> str | None:
        """The state of everything beneath (names, sizes and times of files): as long as it is the same, so are all rows.

        None: that cannot be told at once, for rows name files elsewhere, and each row's own stamp decides.
        """

    def found(self) -> Iterator[Found]:
        """Every row, in the source's own order. Several forked processes go through it, each reading other rows."""

    def keep(self, good: Iterable[Good]) -> Rows:
        """The good rows, which come in the same order."""

    def restored(self, saved: Mapping[str, Stored]) -> Rows:
        """The rows of which `saved()` was remembered: the same arrays and tables, memory-mapped."""
