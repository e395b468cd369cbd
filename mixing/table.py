"""Sources of tables: .parquet and .arrow files, saved datasets and those of the Hub, read through `datasets`, whose rows stay on disk."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import constants
from numpy.typing import NDArray
from pyarrow import parquet

from mixing.arrow_rows import Values, check_layout, rows_of
from mixing.bad_rows import RowError, SourceError, shown
from mixing.folder import locate
from mixing.index import State, is_fresh, state
from mixing.patterns import fixed_folder, pattern_files
from mixing.plain_file import open_plain, read_plain
from mixing.rows import Found, Good, Stored
from mixing.saved import outside_of_saved
from mixing.tasks import Asked, Cells, Columns, choose_columns, nearest, to_cells

_AT_ONCE = 16  # rows taken out of the table together while it is looked through
_BYTES_AT_ONCE = 2**24  # of their images; a row with more is taken out alone
_WITHOUT_IMAGES = 1024  # the same, where their images are left out

# What datasets 5.2 and huggingface_hub raise over a dataset that is missing, gated, unreachable or damaged. MemoryError: a damaged length asks for any.
_REFUSED = (OSError, ValueError, RuntimeError, MemoryError, datasets.exceptions.DatasetsError)


@dataclass(frozen=True)
class Part:
    """Rows that follow one another and are numbered together: a file, or a split."""

    name: str
    num_rows: int
    base: str | None
    """Paths in the rows are relative to this folder; None: there is none."""
    states: tuple[State, ...]
    """Of the files in which the rows stand, before they were read."""

    def stamp(self) -> str | None:
        """What tells whether its rows have changed; None: that cannot be told."""
        if not self.states or any(is_fresh(each.changed) for each in self.states):
            return None
        return " ".join(each.text for each in self.states)


@dataclass
class _AtHand:
    """Rows of a table that were taken out of it together, since that takes far less time; so many that their images are few megabytes, or one."""

    table: datasets.Dataset
    images: tuple[str, ...]
    """The columns that hold images."""
    left_out: str | None
    """A column that is not taken out: how many bytes it holds is told instead."""
    _first: int = 0
    _rows: Sequence[tuple[Values | str, int | None]] = ()

    def row(self, position: int) -> tuple[Values | str, int | None]:
        """A row, or what is wrong with it; and how many bytes of it were left out: 0 if it holds a path or nothing there, None if nothing was left out."""
        if not self._first <= position < self._first + len(self._rows):
            self._rows = ()  # before others are taken out
            self._first, self._rows = position, self._taken_out(position)
        return self._rows[position - self._first]

    def _taken_out(self, position: int) -> list[tuple[Values | str, int | None]]:
        block = self.table[position : position + (_AT_ONCE if self.left_out is None else _WITHOUT_IMAGES)]
        left_out = None if self.left_out is None else _num_bytes(block.column(self.left_out))
        if left_out is not None:
            return list(zip(rows_of(block.drop_columns([self.left_out])), (each or 0 for each in left_out), strict=True))
        taken, total = 0, 0
        lengths = [found for name in self.images if (found := _num_bytes(block.column(name))) is not None]
        for of_row in zip(*lengths, strict=True):
            total += sum(each or 0 for each in of_row)
            if taken and total > _BYTES_AT_ONCE:
                break
            taken += 1
        return [(row, None) for row in rows_of(block.slice(0, taken) if lengths else block)]


@dataclass(frozen=True)
class TableRows:
    """Rows of a memory-mapped table."""

    table: datasets.Dataset
    """In the `arrow` format: a row comes as it is stored, no feature decodes it."""
    parts: tuple[Part, ...]
    ends: NDArray[np.int64]
    """Rows of the table up to the end of each part."""
    positions: NDArray[np.int64] | None
    """The rows of the table that are used, in order; None: all of them."""
    roots: tuple[str, ...]
    """Real paths of the folders that files named in the rows must lie in."""
    task: str
    columns: Columns
    prompt: str | None
    has_sizes: bool
    """Whether columns `width` and `height` say how large the target is."""
    names_files: bool
    """Whether rows may name files in the place of images."""

    def key(self, index: int) -> str:
        """FILE:ROW or SPLIT:ROW, rows counted from 0, bad ones too."""
        return self._place(self._position(index))[0]

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """The same of many rows."""
        positions = np.asarray(indices) if self.positions is None else self.positions[indices]
        numbers = np.searchsorted(self.ends, positions, side="right")
        starts = (self.ends - np.array([part.num_rows for part in self.parts]))[numbers]
        places = zip(numbers.tolist(), (positions - starts).tolist(), strict=True)
        return [f"{self.parts[number].name}:{row}" for number, row in places]

    def saved(self) -> Mapping[str, Stored]:
        """Which rows are used."""
        return {} if self.positions is None else {"positions": self.positions}

    def restored(self, saved: Mapping[str, Stored]) -> TableRows:
        """The rows that were used."""
        return replace(self, positions=saved.get("positions"))

    def stamp(self) -> str | None:
        """The parts' names, lengths and stamps; None if rows name files, each of which may change."""
        stamps = [part.stamp() for part in self.parts]
        if self.names_files or None in stamps:
            return None
        return "\n".join(f"{part.name} {part.num_rows} {stamp}" for part, stamp in zip(self.parts, stamps, strict=True))

    def cells(self, index: int) -> Cells:
        """What the row holds."""
        position = self._position(index)
        (row,) = self.table.data.fast_slice(position, 1).to_pylist()  # what `self.table[position]` gives, in two thirds of the time
        base = self._place(position)[1] if self.names_files else None
        return to_cells(row, self.task, self.columns, self.prompt, partial(self._locate, base=base))

    def found(self) -> Iterator[Found]:
        """Every row of the table. Where its columns say how large the target is, the target is left out. What a row holds is taken out of the table when it is asked for."""
        at_hand = _AtHand(self.table, self._images(), self.columns.target if self.has_sizes else None)
        for position in range(len(self.table)):
            key, base = self._place(position)
            yield Found(key, key, partial(self._seen, at_hand, position, base), partial(self._stamp, at_hand, position))

    def keep(self, good: Iterable[Good]) -> TableRows:
        """The same table, only the good rows used."""
        positions = np.fromiter((row.position for row in good), dtype=np.int64)
        return replace(self, positions=None if len(positions) == len(self.table) else positions)

    def _position(self, index: int) -> int:
        return index if self.positions is None else int(self.positions[index])

    def _place(self, position: int) -> tuple[str, str | None]:
        number = int(np.searchsorted(self.ends, position, side="right"))
        part = self.parts[number]
        return f"{part.name}:{position - (int(self.ends[number]) - part.num_rows)}", part.base

    def _images(self) -> tuple[str, ...]:
        return (self.columns.target, *self.columns.references, *self.columns.entity_masks)

    def _seen(self, at_hand: _AtHand, position: int, base: str | None) -> Cells:
        """What a row holds, its target left out if its size is known; else all of it."""
        row, unread = at_hand.row(position)
        if isinstance(row, str):
            raise RowError(row)
        if unread is None:
            return self._cells(row, base)
        if unread:
            cells = self._cells({**row, self.columns.target: b""}, base)
            if cells.size is not None:
                return replace(cells, unread=unread)
        (whole,) = self.table[position].to_pylist()
        return self._cells(whole, base)

    def _cells(self, row: Mapping[str, object], base: str | None) -> Cells:
        cells = to_cells(row, self.task, self.columns, self.prompt, partial(self._locate, base=base))
        match row.get("height"), row.get("width"):
            case int(height), int(width) if self.has_sizes and 0 < height < 2**31 and 0 < width < 2**31:
                return replace(cells, size=(height, width))
            case _:
                return cells

    def _stamp(self, at_hand: _AtHand, position: int) -> str | None:
        """The stamp of the row's part, and the states of the files that the row names."""
        part = self.parts[int(np.searchsorted(self.ends, position, side="right"))]
        stamp = part.stamp()
        if stamp is None or not self.names_files:
            return stamp
        row, unread = at_hand.row(position)
        if isinstance(row, str):
            return None
        if unread is not None:
            (row,) = self.table[position].to_pylist()
        try:
            files = [state(str(pixels)) for _, pixels in self._cells(row, part.base).images() if isinstance(pixels, Path)]
        except (RowError, OSError):
            return None
        return None if any(is_fresh(each.changed) for each in files) else " ".join([stamp, *(each.text for each in files)])

    def _locate(self, name: str, base: str | None) -> Path:
        if base is None and not os.path.isabs(name):
            raise RowError(f"{name!r} is a name without an image; the dataset does not hold the file")
        return locate(name, base or self.roots[0], self.roots)


def list_parquet(
    pattern: str, root: Path, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> TableRows:
    """The rows of .parquet files: one, or those of a pattern with `*`, `?`, `[...]`, `**`, {000..063} and {a,b}.

    `datasets` writes the rows into its cache as Arrow files, once, and maps these into memory. Raises SourceError.
    """
    folder = os.path.join(root, fixed_folder(pattern))
    parts: dict[str, Part] = {}
    for file in pattern_files(pattern, root):
        try:
            states = (state(file),)
            with open_plain(file) as opened:
                num_rows = parquet.read_metadata(opened).num_rows
        except _REFUSED as error:
            raise SourceError(f"{file} is not a readable parquet file: {_said(error)}") from error
        if num_rows:  # datasets 5.2 cannot read a file without rows
            parts[file] = Part(os.path.relpath(file, folder), num_rows, os.path.realpath(os.path.dirname(file)), states)
    if not parts:
        raise SourceError("it holds no rows")
    try:
        table = datasets.Dataset.from_parquet([glob.escape(file) for file in parts])
    except _REFUSED as error:
        raise SourceError(f"{pattern} cannot be read: {_said(error)}") from error
    finally:
        pa.default_memory_pool().release_unused()  # Arrow would keep what a row group took, two and a half times what it holds
    if len(table) != (num_rows := sum(part.num_rows for part in parts.values())):
        raise SourceError(f"{pattern} holds {num_rows} rows and {len(table)} were read; is it still being written?")
    return _rows(table, tuple(parts.values()), (os.path.realpath(folder),), task, columns, prompt, extra)


def list_arrow(
    pattern: str, root: Path, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> TableRows:
    """The rows of .arrow files, named as those of .parquet are; they are mapped into memory where they lie.

    Files of the random-access format (Feather) are first written into the cache of `datasets`, once. Raises SourceError.
    """
    folder = os.path.join(root, fixed_folder(pattern))
    parts: list[Part] = []
    tables: list[datasets.Dataset] = []
    for file in pattern_files(pattern, root):
        try:
            states = (state(file),)
            table = _arrow(file)
            check_layout(table.data.table)
        except _REFUSED as error:
            raise SourceError(f"{file} is not a readable .arrow file: {_said(error)}") from error
        if len(table):
            tables.append(table)
            parts.append(Part(os.path.relpath(file, folder), len(table), os.path.realpath(os.path.dirname(file)), states))
    if not parts:
        raise SourceError("it holds no rows")
    try:
        table = datasets.concatenate_datasets(tables)
    except _REFUSED as error:
        raise SourceError(f"{pattern} cannot be read as one table: {_said(error)}") from error
    return _rows(table, tuple(parts), (os.path.realpath(folder),), task, columns, prompt, extra)


def list_saved(
    folder: Path, split: str, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> TableRows:
    """The rows of a folder that `save_to_disk` wrote: those of one split where there are several. Raises SourceError."""
    name, place = os.path.basename(os.path.realpath(folder)), str(folder)
    if os.path.isfile(folder / "dataset_dict.json"):
        try:
            splits = json.loads(read_plain(folder / "dataset_dict.json"))["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{folder / 'dataset_dict.json'} does not name the splits: {_said(error)}; save the dataset again") from error
        if split not in splits:
            raise SourceError(f"split: no split '{split}' (splits: {', '.join(map(str, splits))}){nearest(split, map(str, splits))}")
        name, place = split, os.path.join(folder, split)
    elif split != "train":
        raise SourceError(f"split: the dataset saved here has none ('{split}' found); leave it out")
    if (outside := outside_of_saved(place)) is not None:
        raise SourceError(f"the dataset saved in {place} names {shown(outside)}, which lies outside of it; save the dataset again")
    try:
        table = datasets.load_from_disk(place)
        check_layout(table.data.table)
    except (*_REFUSED, KeyError, TypeError) as error:
        raise SourceError(f"the dataset saved in {place} cannot be loaded: {_said(error)}") from error
    base = os.path.realpath(place)
    if not len(table):
        raise SourceError("it holds no rows")
    return _rows(table, (Part(name, len(table), base, _states(table)),), (os.path.realpath(folder),), task, columns, prompt, extra)


def list_hub(
    name: str, split: str, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> TableRows:
    """The rows of one split of a dataset of the Hub, USER/NAME. Raises SourceError."""
    try:
        table = datasets.load_dataset(name, split=split)
    except _REFUSED as error:
        raise SourceError(f"dataset {name}, split '{split}', cannot be loaded: {_said(error)}") from error
    # load_dataset takes a folder USER/NAME, where the command is typed, for the dataset; else files lie in its caches.
    base = os.path.realpath(name) if os.path.isdir(name) else None
    config = datasets.config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    roots = (base,) if base else tuple(os.path.realpath(folder) for folder in caches)
    return _rows(table, (Part(split, len(table), base, _states(table)),), roots, task, columns, prompt, extra)


def _rows(
    table: datasets.Dataset,
    parts: tuple[Part, ...],
    roots: tuple[str, ...],
    task: str,
    asked: Asked,
    prompt: str | None,
    extra: Sequence[str],
) -> TableRows:
    columns = choose_columns(task, table.column_names, asked, prompt, extra)
    fields = {field.name: field.type for field in table.data.schema}
    has_sizes = not (columns.references or columns.entity_masks) and all(
        name in fields and pa.types.is_integer(fields[name]) for name in ("height", "width")
    )
    used = dict.fromkeys([*columns.used(), *(("height", "width") if has_sizes else ())])
    stored = table.select_columns(list(used)).with_format("arrow")
    images = (columns.target, *columns.references, *columns.entity_masks)
    names_files = any(_names_files(table.data.column(name)) for name in images)
    ends = np.cumsum([part.num_rows for part in parts], dtype=np.int64)
    return TableRows(stored, parts, ends, None, roots, task, columns, prompt, has_sizes, names_files)


def _num_bytes(column: pa.ChunkedArray) -> list[int | None] | None:
    """How many bytes each image has, None where it is a path or nothing; None for a column that holds no bytes. Reads none of them."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return None
    lengths: list[int | None] = pc.binary_length(column).to_pylist()
    return lengths


def _names_files(column: pa.ChunkedArray) -> bool:
    """Whether some image in a column is a path: it is not held as bytes."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _names_files(pc.list_flatten(column))
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return bool(pc.struct_field(column, "bytes").null_count)
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind))


def _states(table: datasets.Dataset) -> tuple[State, ...]:
    """The states of the Arrow files in which a table stands; none if it is held in memory."""
    return tuple(state(str(file["filename"])) for file in table.cache_files)


def _arrow(file: str) -> datasets.Dataset:
    """The table in an .arrow file. Raises what `datasets` and pyarrow raise."""
    with open_plain(file) as stream:
        is_random_access = stream.read(6) == b"ARROW1"
    if not is_random_access:
        return datasets.Dataset.from_file(file)
    return datasets.load_dataset("arrow", data_files=[glob.escape(file)], split="train")


def _said(error: BaseException) -> str:
    """What an error says, and what caused it, on one line."""
    said = " ".join(str(error).split())[:400] or type(error).__name__
    if isinstance(error, MemoryError):
        said = f"it asks for more memory than there is ({said})"
    return f"{said}: {_said(error.__cause__)}" if error.__cause__ is not None else said
