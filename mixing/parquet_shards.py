"""Shards of .parquet files: the files, or their row groups."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import parquet

from mixing.arrow_rows import rows_of
from mixing.bad_rows import RowError, SourceError
from mixing.columns import Asked, Columns, choose_columns
from mixing.folder import locate
from mixing.patterns import fixed_folder, pattern_files
from mixing.plain_file import open_plain
from mixing.shards import Row, Values, fingerprint_of, is_remote, open_file, short_names

_BUFFER = 2**22  # bytes of a column read together; else pyarrow reads all of it that a row group has
_AT_ONCE = 16  # rows taken out of a file together; each may hold megabytes


@dataclass(frozen=True)
class ParquetShards:
    """.parquet files, or, where these are fewer than the lanes, their row groups.

    They are read by pyarrow in the reader's own thread, and not by the streams of datasets 5.2: those leave threads of Arrow behind where
    they are not read to their end, and with them the interpreter's exit aborts (apache/arrow#45214; still so in pyarrow 26).
    """

    names: tuple[str, ...]
    parts: tuple[tuple[str, str, int | None], ...]
    """File, its name, and which row group of it; None: all."""
    root: str | None
    """Real path of the folder that files named in the rows must lie in; None: rows hold their images."""

    def choose(self, rows: Sequence[Values], task: str, asked: Asked, prompt: str | None) -> Columns:
        """By the columns' names."""
        return choose_columns(task, [name for row in rows for name in row], asked, prompt)

    def read(self, shard: int, row: int, at: Values | None, columns: Columns | None) -> Iterator[Row]:
        """The rows of a shard from one on; row groups before are not read."""
        file, name, group = self.parts[shard]
        used = list(columns.used()) if columns is not None else None
        with _readable(file), _opened(file) as content, parquet.ParquetFile(content, buffer_size=_BUFFER) as table:
            sizes = [table.metadata.row_group(each).num_rows for each in range(table.num_row_groups)]
            before = sum(sizes[:group]) if group is not None else 0  # rows of the file before the shard
            number = 0
            for each in range(table.num_row_groups) if group is None else (group,):
                if number + sizes[each] <= row:
                    number += sizes[each]
                    continue
                for batch in table.iter_batches(_AT_ONCE, row_groups=[each], columns=used, use_threads=False):
                    for place in range(batch.num_rows):
                        if number >= row:
                            yield Row(f"{name}:{before + number}", number, partial(_values, batch, place), None)
                        number += 1

    def locate(self, shard: int, name: str) -> Path:
        """The file, relative to the folder of the .parquet file."""
        if self.root is None:
            raise RowError(f"{name!r} is a name without an image; the dataset does not hold the file")
        return locate(name, os.path.realpath(os.path.dirname(self.parts[shard][0])), (self.root,))

    def count(self, limit: int) -> int:
        """Rows, by the files' footers."""
        total = 0
        for file in dict.fromkeys(part[0] for part in self.parts):
            total += _footer(file).num_rows
            if total >= limit:
                break
        return total

    def fingerprint(self) -> str:
        """Over names, and sizes or hashes."""
        return fingerprint_of(self.names, [part[0] for part in self.parts])


def list_parquet_shards(pattern: str, root: Path, lanes: int) -> ParquetShards:
    """The .parquet files of a pattern, as `mixing.patterns` has it. Raises SourceError."""
    return parquet_shards(pattern_files(pattern, root), os.path.join(root, fixed_folder(pattern)), lanes)


def parquet_shards(files: Sequence[str], folder: str | None, lanes: int) -> ParquetShards:
    """Files as shards, or their row groups if there are fewer files than lanes. folder: they lie in it; None: on the Hub. Raises SourceError."""
    parts: list[tuple[str, str, int | None]] = []
    for file, name in zip(files, short_names(files, folder or ""), strict=True):
        groups = [None] if len(files) >= lanes else range(_footer(file).num_row_groups)
        parts.extend((file, name, group) for group in groups)
    names = tuple(name if group is None else f"{name} row group {group}" for _, name, group in parts)
    return ParquetShards(names, tuple(parts), os.path.realpath(folder) if folder is not None else None)


def _values(batch: pa.RecordBatch, place: int) -> Values:
    (row,) = rows_of(batch.slice(place, 1))
    if isinstance(row, str):
        raise RowError(row)
    return row


def _footer(file: str) -> parquet.FileMetaData:
    with _readable(file), _opened(file) as content:
        return parquet.read_metadata(content)


def _opened(file: str) -> BinaryIO | pa.NativeFile:
    """A file for pyarrow, opened by pyarrow itself where it lies on this machine.

    A thread of pyarrow 26 that lets go of a file of Python's while the interpreter ends aborts the process, after all was done (on a loaded machine
    4 of 960 times, and of its own files 0 of 720). Of files on the Hub that may still be.
    """
    if is_remote(file):
        return open_file(file)
    open_plain(file).close()  # raises OSError where there is none, and of a pipe
    return pa.OSFile(os.fsencode(file))


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Raise SourceError if the file turns out to be damaged, which pyarrow 26 says by its own errors and by OSErrors without a number."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        damaged = type(error) is OSError and error.errno is None and not is_remote(file)
        if damaged or isinstance(error, pa.ArrowException):
            raise SourceError(f"{file} is not a readable parquet file: {' '.join(str(error).split())[:400]}") from error
        raise
