"""Rows of files: which image files a source's rows name, and their prompts, in an Arrow table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from mixing.rows import Good, Stored
from mixing.tasks import Cells, Region

_ROWS_AT_ONCE = 16_384  # held as Python objects before they go into Arrow
_MOST_CHUNKS = 100  # of a table, beside those that it must have: a row is found the slower the more there are
_MOST_AT_HAND = 4096  # rows, at about a kilobyte each
_TEXT, _TEXTS = pa.large_string(), pa.large_list(pa.large_string())
_SCHEMA = pa.schema(
    [("key", _TEXT), ("prompts", _TEXTS), ("target", _TEXT), ("references", _TEXTS), ("region_prompts", _TEXTS), ("masks", _TEXTS)]
)


@dataclass(frozen=True)
class FileRows:
    """Rows of files, in an Arrow table: flat in memory, however many."""

    root: str
    table: pa.Table
    """key, prompts, target (relative to root), references (a list of them), and region_prompts and masks (lists too, of one length)."""
    _at_hand: dict[int, tuple[str, Cells]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Rows that were asked for: to take one out of Arrow takes as long as to read a small file."""

    def key(self, index: int) -> str:
        """The target's path relative to the source's folder; the second row with the same target has `#2` behind it."""
        known = self._at_hand.get(index)
        return known[0] if known is not None else str(self.table["key"][index].as_py())

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """The keys of many rows."""
        keys: list[str] = self.table["key"].take(pa.array(indices)).to_pylist()
        return keys

    def cells(self, index: int) -> Cells:
        """What the row holds."""
        if (known := self._at_hand.get(index)) is not None:
            return known[1]
        (row,) = self.table.slice(index, 1).to_pylist()
        references = tuple(Path(self.root, name) for name in row["references"])
        masks = (Path(self.root, name) for name in row["masks"])
        regions = tuple(map(Region, row["region_prompts"], masks))
        if len(self._at_hand) >= _MOST_AT_HAND:
            self._at_hand.clear()
        found = Cells(tuple(row["prompts"]), Path(self.root, row["target"]), references, regions)
        self._at_hand[index] = row["key"], found
        return found

    def saved(self) -> Mapping[str, Stored]:
        """The table."""
        return {"table": self.table}


def file_rows(root: str, good: Iterable[Good]) -> FileRows:
    """The rows as a table. Those of an earlier table are taken from it, as many together as follow one another."""
    tables = [_SCHEMA.empty_table()]
    for offset, rows in groupby(enumerate(good), _offset):
        if offset is None:
            while block := list(islice(rows, _ROWS_AT_ONCE)):
                tables.append(pa.Table.from_pylist([_as_stored(root, row.key, row.cells()) for _, row in block], schema=_SCHEMA))
        else:
            number, first = next(rows)
            assert first.earlier is not None  # or it would have no offset
            assert isinstance(first.earlier[0], FileRows)  # as `restored` gives them
            tables.append(first.earlier[0].table.slice(number + offset, 1 + sum(1 for _ in rows)))
    table = pa.concat_tables(tables)
    return FileRows(root, table if table["key"].num_chunks < _MOST_CHUNKS + len(table) // _ROWS_AT_ONCE else table.combine_chunks())


def _offset(numbered: tuple[int, Good]) -> int | None:
    """How far behind its place a row was earlier: the same for rows that have stayed together. None for a new one."""
    number, row = numbered
    return None if row.earlier is None else row.earlier[1] - number


def _as_stored(root: str, key: str, cells: Cells) -> dict[str, object]:
    start = root.rstrip("/") + "/"
    paths = [str(pixels) for _, pixels in cells.images() if isinstance(pixels, Path)]
    names = [path.removeprefix(start) if path.startswith(start) else os.path.relpath(path, root) for path in paths]
    references = cells.are_references()
    return {
        "key": key,
        "prompts": cells.prompts,
        "target": names[0],
        "references": names[references],
        "region_prompts": [region.prompt for region in cells.regions],
        "masks": names[references.stop :],
    }
