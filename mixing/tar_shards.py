"""Shards of the webdataset layout: .tar files, read one member after another."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mixing.bad_rows import RowError, SourceError
from mixing.columns import Asked, Columns
from mixing.images import may_be_image
from mixing.patterns import fixed_folder, pattern_files
from mixing.plain_file import open_plain
from mixing.records import MOST_TEXT
from mixing.shards import Row, Values, fingerprint_of, is_remote, open_file, refuse, short_names
from mixing.tar_members import FIRST, Member, Torn, check_tar, choose_members, fields_of, image_members, members, raw_row, split_name

_PADDED = 512  # what a member's content is filled up to a multiple of


@dataclass(frozen=True)
class TarShards:
    """.tar files whose rows are the members that follow one another and agree up to the first dot of their file name."""

    names: tuple[str, ...]
    files: tuple[str, ...]

    def choose(self, rows: Sequence[Values], task: str, asked: Asked, prompt: str | None) -> Columns:
        """By the members' extensions, and the fields in their .json."""
        fields = [name for row in rows if isinstance(found := row.get("json"), Mapping) for name in found]
        return choose_members(task, [name for row in rows for name in row], fields, asked, prompt)

    def read(self, shard: int, row: int, at: Values | None, columns: Columns | None) -> Iterator[Row]:
        """The rows of a shard from one on; `at` holds the byte where the first of them begins. Without columns only .json members are read."""
        start = int(str(at["byte"])) if at is not None else 0
        number = row if at is not None else 0
        with open_file(self.files[shard]) as file, closing(_rows(file, start)) as rows:
            for name, found, end in rows:
                if number >= row:
                    read = partial(_values, file, found, columns) if not isinstance(found, str) else partial(refuse, found)
                    yield Row(f"{self.names[shard]}:{name}" if name else self.names[shard], number, read, {"byte": end})
                number += 1

    def locate(self, shard: int, name: str) -> Path:
        """No file: the images of a row in a tar are members of its own."""
        raise RowError(f"{name!r} is a name without an image; the images of a row in a tar are members of its own")

    def count(self, limit: int) -> None:
        """Only reading the headers tells."""

    def fingerprint(self) -> str:
        """Over names, and sizes or hashes."""
        return fingerprint_of(self.names, self.files)


def list_tar_shards(pattern: str, root: Path) -> TarShards:
    """The .tar files of a pattern, as `mixing.patterns` has it. Raises SourceError if one is no tar."""
    return tar_shards(pattern_files(pattern, root), os.path.join(root, fixed_folder(pattern)))


def tar_shards(files: Sequence[str], folder: str) -> TarShards:
    """Files as shards. folder: they lie in it, unless on the Hub. Raises SourceError if one on this machine is no tar."""
    names = short_names(files, folder)
    for file, name in zip(files, names, strict=True):
        if not is_remote(file):
            try:
                with open_plain(file) as content:
                    check_tar(content, name)
            except OSError as error:
                raise SourceError(f"{file} cannot be read: {error.strerror}") from error
    return TarShards(names, tuple(files))


def _rows(file: BinaryIO, start: int) -> Generator[tuple[str, dict[str, Member] | str, int], None, None]:
    """The rows of an open tar from a byte on: name, members by extension or what is wrong, and the byte where the next row begins.

    Where the tar breaks off inside a member, its row is bad; where it does so between members, a bad row without a name comes last.
    """
    size = file.seek(0, 2)
    name: str | None = None
    row: dict[str, Member] | str = {}
    end = start
    try:
        for member in members(file, start):
            place = split_name(member.name)
            if place is not None:
                if name is not None and place[0] != name:
                    yield name, row, end
                    row = {}
                name, row = place[0], _with(row, place[1], member)
            end = member.offset - -member.num_bytes // _PADDED * _PADDED
    except Torn as torn:
        place = split_name(torn.member) if torn.member is not None else None
        if name is not None and (place is None or place[0] != name):
            yield name, row, end
        yield place[0] if place is not None else "", f"the shard ends early: {torn}", size
        return
    if name is not None:
        yield name, row, size


def _with(row: dict[str, Member] | str, extension: str, member: Member) -> dict[str, Member] | str:
    """The row with one member more, or what is wrong with it."""
    if isinstance(row, str):
        return row
    if extension in row:
        return f"it has two members '{extension}'; keep one"
    if member.kind != "file":
        return f"its member '{extension}' is not a plain file; links, devices and sparse files are not read"
    return {**row, extension: member}


def _values(file: BinaryIO, row: Mapping[str, Member], columns: Columns | None) -> Values:
    images = () if columns is None else image_members(columns)

    def read(extension: str) -> bytes:
        member = row[extension]
        file.seek(member.offset)
        content = file.read(min(member.num_bytes, FIRST))
        if member.num_bytes > FIRST:
            if extension in images and not may_be_image(content):
                return content  # enough to say that it is none
            content += file.read(member.num_bytes - FIRST)
        if len(content) < member.num_bytes:
            raise RowError(f"the shard ends inside its member '{extension}'; copy the shard again")
        return content

    if columns is None:
        return {extension: fields_of(read(extension)) if extension == "json" and member.num_bytes <= MOST_TEXT else None for extension, member in row.items()}
    return raw_row({extension: member.num_bytes for extension, member in row.items()}, read, columns)
