"""Sources of tables: .parquet files and datasets of the Hub, read through `datasets`, whose rows stay on disk."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import constants
from numpy.typing import NDArray
from pyarrow import parquet

from mixing.bad_rows import RowError, SourceError
from mixing.folder import locate
from mixing.rows import Found, Good
from mixing.tasks import Asked, Cells, Columns, choose_columns, to_cells

_AT_ONCE = 16  # rows taken out of the table together while it is looked through; each may hold megabytes
_MOST_FILES = 1_000_000

# What datasets 5.2 and huggingface_hub raise over a dataset that is missing, gated, unreachable or damaged.
_REFUSED = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


@dataclass(frozen=True)
class Part:
    """Rows that follow one another and are numbered together: a file, or a split."""

    name: str
    num_rows: int
    base: str | None
    """Paths in the rows are relative to this folder; None: there is none."""


@dataclass(frozen=True)
class TableRows:
    """Rows of a memory-mapped table."""

    table: datasets.Dataset
    """In the `arrow` format: a row comes as it is stored, no feature decodes it."""
    parts: tuple[Part, ...]
    ends: NDArray[np.int64]
    """Rows of the table up to the end of each part."""
    positions: NDArray[np.int64]
    """The rows of the table that are used, in order."""
    roots: tuple[str, ...]
    """Real paths of the folders that files named in the rows must lie in."""
    task: str
    columns: Columns
    prompt: str | None

    def key(self, index: int) -> str:
        """FILE:ROW or SPLIT:ROW, rows counted from 0, bad ones too."""
        return self._place(int(self.positions[index]))[0]

    def cells(self, index: int) -> Cells:
        """What the row holds."""
        position = int(self.positions[index])
        (row,) = self.table[position].to_pylist()
        return self._cells(row, self._place(position)[1])

    def found(self) -> Iterator[Found]:
        """Every row of the table."""
        for start in range(0, len(self.table), _AT_ONCE):
            rows = self.table[start : start + _AT_ONCE].to_pylist()
            for position, row in enumerate(rows, start):
                key, base = self._place(position)
                yield Found(key, key, partial(self._cells, row, base))

    def keep(self, good: Iterable[Good]) -> TableRows:
        """The same table, only the good rows used."""
        return replace(self, positions=np.fromiter((row.position for row in good), dtype=np.int64))

    def _place(self, position: int) -> tuple[str, str | None]:
        number = int(np.searchsorted(self.ends, position, side="right"))
        part = self.parts[number]
        return f"{part.name}:{position - (int(self.ends[number]) - part.num_rows)}", part.base

    def _cells(self, row: Mapping[str, object], base: str | None) -> Cells:
        return to_cells(row, self.task, self.columns, self.prompt, partial(self._locate, base=base))

    def _locate(self, name: str, base: str | None) -> Path:
        if base is None and not os.path.isabs(name):
            raise RowError(f"{name!r} is a name without an image; the dataset does not hold the file")
        return locate(name, base or self.roots[0], self.roots)


def list_parquet(pattern: str, root: Path, task: str, columns: Asked, prompt: str | None) -> TableRows:
    """The rows of .parquet files: one, or those of a pattern with `*`, `?`, `[...]`, `**`, {000..063} and {a,b}.

    `datasets` writes the rows into its cache as Arrow files, once, and maps these into memory. Raises SourceError.
    """
    folder = os.path.join(root, _fixed_folder(pattern))
    parts: dict[str, Part] = {}
    for file in _files(pattern, root):
        try:
            num_rows = parquet.read_metadata(file).num_rows
        except _REFUSED as error:
            raise SourceError(f"{file} is not a readable parquet file: {_said(error)}") from error
        if num_rows:  # datasets 5.2 cannot read a file without rows
            parts[file] = Part(os.path.relpath(file, folder), num_rows, os.path.realpath(os.path.dirname(file)))
    if not parts:
        raise SourceError("it holds no rows")
    try:
        table = datasets.Dataset.from_parquet([glob.escape(file) for file in parts])
    except _REFUSED as error:
        raise SourceError(f"{pattern} cannot be read: {_said(error)}") from error
    if len(table) != (num_rows := sum(part.num_rows for part in parts.values())):
        raise SourceError(f"{pattern} holds {num_rows} rows and {len(table)} were read; is it still being written?")
    return _rows(table, tuple(parts.values()), (os.path.realpath(folder),), task, columns, prompt)


def list_hub(name: str, split: str, task: str, columns: Asked, prompt: str | None) -> TableRows:
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
    return _rows(table, (Part(split, len(table), base),), roots, task, columns, prompt)


def _rows(
    table: datasets.Dataset,
    parts: tuple[Part, ...],
    roots: tuple[str, ...],
    task: str,
    asked: Asked,
    prompt: str | None,
) -> TableRows:
    columns = choose_columns(task, table.column_names, asked, prompt)
    used = [columns.target, *columns.references, *([columns.prompt] if columns.prompt is not None else [])]
    stored = table.select_columns(list(dict.fromkeys(used))).with_format("arrow")
    ends = np.cumsum([part.num_rows for part in parts], dtype=np.int64)
    return TableRows(stored, parts, ends, np.arange(len(table), dtype=np.int64), roots, task, columns, prompt)


def _files(pattern: str, root: Path) -> list[str]:
    """The files of a pattern, each once: braces in their order, within each sorted. Raises SourceError if one lacks."""
    files: dict[str, None] = {}
    for name in _braces(pattern):
        named = (
            [name]
            if os.path.isfile(os.path.join(root, name))
            else sorted(glob.glob(name, root_dir=root, recursive=True))
        )
        found = [file for each in named if os.path.isfile(file := os.path.join(root, each))]
        if not found:
            raise SourceError(f"no file {name}" + ("" if name == pattern else f", which {pattern} names"))
        files.update(dict.fromkeys(found))
    return list(files)


def _braces(pattern: str) -> list[str]:
    """The pattern with {000..063} and {a,b} written out."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is not None:
        inner = words.split(",")
    else:
        if not 0 <= int(last) - int(first) < _MOST_FILES:
            raise SourceError(
                f"{match.group()} in the path: allowed is a rising range, at most {_MOST_FILES:,} numbers"
            )
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        inner = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [start + each + rest for each in inner for rest in _braces(end)]


def _fixed_folder(pattern: str) -> str:
    """The folder above everything that a pattern can name."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return os.path.dirname(fixed)


def _said(error: BaseException) -> str:
    """What an error says, and what caused it, on one line."""
    said = " ".join(str(error).split())[:400] or type(error).__name__
    return f"{said}: {_said(error.__cause__)}" if error.__cause__ is not None else said
