"""Sources of .tar shards in the webdataset layout: indexed once by their headers, then read in any order where they lie."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mixing.bad_rows import RowError, SourceError
from mixing.images import UnreadableImage, header_size, may_be_image
from mixing.index import State, is_fresh, state
from mixing.patterns import fixed_folder, pattern_files
from mixing.plain_file import open_plain
from mixing.records import MOST_TEXT
from mixing.rows import Found, Good, Stored
from mixing.tar_members import FIRST, Torn, check_tar, choose_members, compression, fields_of, image_members, members, raw_row, split_name
from mixing.tasks import Asked, Cells, Columns, to_cells

__all__ = ["TarListing", "TarRows", "compression", "list_tar"]

_MOST_OPEN = 64  # files that a process holds open for one source
_ROWS_WITH_FIELDS = 100  # rows whose .json is looked at for the names of its fields
_STARTS_WITH_SIZE = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # formats whose size and orientation stand before the pixels

_WRONG = {
    1: "is a link; store the file itself",
    2: "is a device, not a file; leave it out",
    3: "is stored with holes (sparse), which is not read; store it whole",
    4: "is of a kind that is not known; store it as a plain file",
    5: "stands in the shard twice; keep one",
    6: "is cut: the shard ends inside it; copy the shard again",
}
"""What is wrong with a member, by the number that stands, with a minus, in the place of its size."""
_CODES = {"link": 1, "device": 2, "sparse": 3, "unknown": 4}
_TWICE, _CUT = 5, 6


class Shards:
    """The files of a source, each opened when it is first read. Goes through fork and pickling; several threads may read."""

    def __init__(self, paths: Sequence[str], stamps: NDArray[np.int64]) -> None:
        self.paths = tuple(paths)
        self.stamps = stamps
        """[shards, 2]: size in bytes and time of change in nanoseconds, when the shards were indexed."""
        self._open: dict[int, FileIO] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return Shards, (self.paths, self.stamps)

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Bytes of a shard. Raises RowError if the shard is gone, or another than when it was indexed."""
        try:
            file = self._file(shard)
            found = os.fstat(file.fileno())
            if [found.st_size, found.st_mtime_ns] != self.stamps[shard].tolist():
                raise RowError("the shard has changed since the source was opened; start again")
            # Not seek and read: processes that were forked share a file's position.
            content = os.pread(file.fileno(), num_bytes, offset)
        except OSError as error:
            raise RowError(f"the shard cannot be read: {error.strerror}") from error
        if len(content) != num_bytes:
            raise RowError("the shard ends early; copy it again")
        return content

    def _file(self, shard: int) -> FileIO:
        file = self._open.get(shard)
        if file is None:
            try:
                file = FileIO(self.paths[shard])
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                self._open.clear()  # no more may be open, which is no word on the shard
                file = FileIO(self.paths[shard])
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)), None)  # whoever reads from it still holds it open
            self._open[shard] = file
        return file


_ARRAYS = ("row_ends", "member_starts", "offsets", "num_bytes", "extension_of")


@dataclass(frozen=True, eq=False)
class TarRows:
    """Rows in shards, by where their members lie. R rows, M members."""

    shards: Shards
    shard_names: tuple[str, ...]
    """Relative to the folder above all of them."""
    row_ends: NDArray[np.int64]
    """[shards]: rows up to the end of each shard."""
    names: pa.Array | pa.ChunkedArray
    """[R], large_string: each row's name, that of its members up to the first dot."""
    member_starts: NDArray[np.int64]
    """[R + 1]: the first member of each row, and M."""
    offsets: NDArray[np.int64]
    """[M]: where each member's content begins in its shard."""
    num_bytes: NDArray[np.int64]
    """[M]: its length; below zero, minus the number of what is wrong with it."""
    extension_of: NDArray[np.int32]
    """[M]: its extension, by number."""
    extensions: tuple[str, ...]
    fields: tuple[str, ...]
    """Of the .json of the first rows."""
    positions: NDArray[np.int64] | None
    """The rows that are used, in order; None: all of them."""
    task: str
    columns: Columns
    prompt: str | None

    def key(self, index: int) -> str:
        """SHARD:NAME."""
        return self._key(self._position(index))

    def cells(self, index: int) -> Cells:
        """What the row holds."""
        return self._cells(self._position(index))

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """SHARD:NAME of many rows."""
        positions = np.asarray(indices) if self.positions is None else self.positions[indices]
        shards = np.searchsorted(self.row_ends, positions, side="right").tolist()
        names = self.names.take(pa.array(positions)).to_pylist()
        return [f"{self.shard_names[shard]}:{name}" for shard, name in zip(shards, names, strict=True)]

    def saved(self) -> Mapping[str, Stored]:
        """The index, and which rows are used."""
        arrays = {"stamps": self.shards.stamps, **{name: getattr(self, name) for name in _ARRAYS}}
        used = {} if self.positions is None else {"positions": self.positions}
        words = {"names": self.names, "extensions": self.extensions, "fields": self.fields}
        return {**arrays, **used, **{name: pa.table({name: pa.array(each, pa.large_string())}) for name, each in words.items()}}

    def _position(self, index: int) -> int:
        return index if self.positions is None else int(self.positions[index])

    def _shard(self, position: int) -> int:
        return int(np.searchsorted(self.row_ends, position, side="right"))

    def _key(self, position: int) -> str:
        return f"{self.shard_names[self._shard(position)]}:{self.names[position].as_py()}"

    def _members(self, position: int) -> dict[str, tuple[int, int]]:
        """Extension to offset and length of the row's members. Raises RowError if one of them cannot be used."""
        found: dict[str, tuple[int, int]] = {}
        for number in range(int(self.member_starts[position]), int(self.member_starts[position + 1])):
            extension, num_bytes = self.extensions[self.extension_of[number]], int(self.num_bytes[number])
            if num_bytes < 0:
                raise RowError(f"its member '{extension}' {_WRONG[-num_bytes]}")
            found[extension] = int(self.offsets[number]), num_bytes
        return found

    def _cells(self, position: int) -> Cells:
        here, shard = self._members(position), self._shard(position)
        row = raw_row(_sizes(here), lambda name: self.shards.read(shard, *here[name]), self.columns)
        return to_cells(row, self.task, self.columns, self.prompt, _no_file)

    def seen(self, position: int) -> Cells:
        """What the row holds; of its target, if that is its only image, no more than the size if the first bytes say it."""
        if self.columns.references or self.columns.entity_masks:
            return self._cells(position)
        here, shard = self._members(position), self._shard(position)
        images = image_members(self.columns)
        firsts: list[tuple[int, bytes]] = []

        def read(name: str) -> bytes:
            offset, num_bytes = here[name]
            content = self.shards.read(shard, offset, min(num_bytes, FIRST))
            if num_bytes <= FIRST or (name in images and not may_be_image(content)):
                return content  # of what is no image, enough to say so
            if not content.startswith(_STARTS_WITH_SIZE):
                return content + self.shards.read(shard, offset + FIRST, num_bytes - FIRST)
            firsts.append((num_bytes, content))
            return b""

        cells = to_cells(raw_row(_sizes(here), read, self.columns), self.task, self.columns, self.prompt, _no_file)
        if not firsts:
            return cells
        ((num_bytes, content),) = firsts
        try:
            return replace(cells, size=header_size(content), unread=num_bytes)
        except UnreadableImage:
            return self._cells(position)  # its header is longer, or broken


@dataclass(frozen=True, eq=False)
class TarListing:
    """Shards before their rows are looked at. Their headers are read when the first row is asked for."""

    paths: tuple[str, ...]
    shard_names: tuple[str, ...]
    states: tuple[State, ...]
    """Of the files, before anything was read."""
    task: str
    asked: Asked
    prompt: str | None
    extra: tuple[str, ...]

    def stamp(self) -> str | None:
        """The shards' names and states."""
        if any(is_fresh(each.changed) for each in self.states):
            return None
        return "\n".join(f"{name} {each.text}" for name, each in zip(self.shard_names, self.states, strict=True))

    def found(self) -> Iterator[Found]:
        """Every row, shard after shard; then, for each shard that breaks off between members, a bad row. Raises SourceError."""
        rows, torn = self._indexed
        start = 0
        for end, name, at in zip(rows.row_ends.tolist(), self.shard_names, self.states, strict=True):
            stamp = partial(_stamp, at)
            for position in range(start, end):
                key = f"{name}:{rows.names[position].as_py()}"
                yield Found(key, key, partial(rows.seen, position), stamp)
            start = end
        for name, reason in torn:
            yield Found(name, name, partial(_refuse, reason))

    def keep(self, good: Iterable[Good]) -> TarRows:
        """The good rows."""
        rows, _ = self._indexed
        positions = np.fromiter((row.position for row in good), dtype=np.int64)
        return replace(rows, positions=None if len(positions) == len(rows.names) else positions)

    def restored(self, saved: Mapping[str, Stored]) -> TarRows:
        """The rows of an index that was remembered; no header is read."""
        tables: Mapping[str, Any] = saved
        names, extensions, fields = (tables[name].column(0) for name in ("names", "extensions", "fields"))
        return self._rows(saved, names, extensions.to_pylist(), fields.to_pylist(), saved.get("positions"))

    @cached_property
    def _indexed(self) -> tuple[TarRows, tuple[tuple[str, str], ...]]:
        """The rows, and the shards that break off between members, with the reason. Raises SourceError."""
        index = _Index()
        for path, name in zip(self.paths, self.shard_names, strict=True):
            index.add(path, name)
        if not index.names:
            raise SourceError("it holds no rows" + (f"; {index.torn[0][0]}: {index.torn[0][1]}" if index.torn else ""))
        rows = self._rows(index.arrays(), pa.concat_arrays(index.names), list(index.extensions), index.fields, None)
        return rows, tuple(index.torn)

    def _rows(
        self, arrays: Mapping[str, NDArray[Any]], names: pa.Array | pa.ChunkedArray, extensions: Sequence[str], fields: Iterable[str],
        positions: NDArray[np.int64] | None,
    ) -> TarRows:  # fmt: skip
        fields = tuple(fields)
        columns = choose_members(self.task, extensions, fields, self.asked, self.prompt, self.extra)
        kept = {name: arrays[name] for name in _ARRAYS}
        return TarRows(
            Shards(self.paths, arrays["stamps"]), self.shard_names, names=names, **kept, extensions=tuple(extensions), fields=fields,
            positions=positions, task=self.task, columns=columns, prompt=self.prompt,
        )  # fmt: skip


def list_tar(
    pattern: str, root: Path, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> TarListing:
    """The rows of .tar shards: one, or those of a pattern, as `mixing.patterns` has it.

    A row is all members of a shard whose names agree up to the first dot of the file name; what is behind it is the column. Raises
    SourceError; so does `TarListing.found` for a shard that is compressed, no tar, or holds no whole member.
    """
    folder = os.path.join(root, fixed_folder(pattern))
    paths = pattern_files(pattern, root)
    try:
        states = tuple(map(state, paths))
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    names = tuple(os.path.relpath(path, folder) for path in paths)
    return TarListing(tuple(paths), names, states, task, columns, prompt, tuple(extra))


class _Index:
    """What the headers of shards say, gathered shard after shard."""

    def __init__(self) -> None:
        self.stamps: list[tuple[int, int]] = []
        self.row_ends: list[int] = []
        self.names: list[pa.Array] = []
        self.member_starts = array("q", [0])
        self.offsets, self.num_bytes, self.extension_of = array("q"), array("q"), array("i")
        self.extensions: dict[str, int] = {}
        self.fields: dict[str, None] = {}
        self._with_fields = 0
        self.torn: list[tuple[str, str]] = []

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is known of shards, rows and members, as `TarRows` has it."""
        return {
            "stamps": np.array(self.stamps, dtype=np.int64).reshape(-1, 2),
            "row_ends": np.array(self.row_ends, dtype=np.int64),
            "member_starts": np.array(self.member_starts, dtype=np.int64),
            "offsets": np.array(self.offsets, dtype=np.int64),
            "num_bytes": np.array(self.num_bytes, dtype=np.int64),
            "extension_of": np.array(self.extension_of, dtype=np.int32),
        }

    def add(self, path: str, name: str) -> None:
        """Read the headers of one more shard. Raises SourceError."""
        rows: dict[str, int] = {}
        row_of, offsets, num_bytes, extension_of = array("q"), array("q"), array("q"), array("i")
        seen: set[tuple[int, int]] = set()

        def note(member: str, offset: int, length: int) -> None:
            if (parts := split_name(member)) is None:
                return
            row = rows.setdefault(parts[0], len(rows))
            extension = self.extensions.setdefault(parts[1], len(self.extensions))
            row_of.append(row)
            offsets.append(offset)
            num_bytes.append(-_TWICE if (row, extension) in seen else length)
            extension_of.append(extension)
            seen.add((row, extension))

        try:
            with open_plain(path, 0) as file:
                check_tar(file, path)
                found = os.fstat(file.fileno())
                try:
                    for member in members(file):
                        code = _CODES.get(member.kind)
                        note(member.name, member.offset, member.num_bytes if code is None else -code)
                        if code is None and self._with_fields < _ROWS_WITH_FIELDS and member.name.endswith(".json") and member.num_bytes <= MOST_TEXT:
                            self._note_fields(os.pread(file.fileno(), member.num_bytes, member.offset), member.name)
                except Torn as error:
                    if not rows:
                        raise SourceError(f"{path} is cut: {error}, and no member before it is whole; copy it again") from error
                    if error.member is not None and split_name(error.member) is not None:
                        note(error.member, 0, -_CUT)
                    else:
                        self.torn.append((name, f"the shard is cut: {error}; copy it again"))
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        self.stamps.append((found.st_size, found.st_mtime_ns))
        if rows:
            counts = np.bincount(np.frombuffer(row_of, dtype=np.int64), minlength=len(rows))
            order = np.argsort(np.frombuffer(row_of, dtype=np.int64), kind="stable")
            first = self.member_starts[-1]
            self.member_starts.frombytes((first + np.cumsum(counts, dtype=np.int64)).tobytes())
            for gathered, more in ((self.offsets, offsets), (self.num_bytes, num_bytes), (self.extension_of, extension_of)):
                gathered.frombytes(np.array(more)[order].tobytes())
            self.names.append(pa.array(list(rows), pa.large_string()))
        self.row_ends.append(len(self.member_starts) - 1)

    def _note_fields(self, content: bytes, name: str) -> None:
        parts = split_name(name)
        if parts is None or parts[1] != "json":
            return
        self._with_fields += 1
        try:
            self.fields.update(dict.fromkeys(fields_of(content)))
        except RowError:
            return  # the row is bad, and named so when it is looked at


def _sizes(members: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    return {extension: num_bytes for extension, (_, num_bytes) in members.items()}


def _no_file(name: str) -> NoReturn:
    raise RowError(f"{name!r} names a file; the images of a row in a tar are members of its own")


def _stamp(shard: State) -> str | None:
    """A row's stamp is its shard's."""
    return None if is_fresh(shard.changed) else shard.text


def _refuse(reason: str) -> Cells:
    raise RowError(reason)
