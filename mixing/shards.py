"""Shards: files of rows that are read one after another, from any row on, on this machine or on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote

from huggingface_hub import HfApi, HfFileSystem

from mixing.bad_rows import RowError
from mixing.columns import Asked, Columns
from mixing.plain_file import open_plain

Values = Mapping[str, object]
"""Column to value."""

_BUFFER = 2**18  # bytes of a local file read together
_BLOCK = 2**22  # bytes of a file of the Hub fetched together
_BLOCKS = 3  # of them that are kept
_PATHS_AT_ONCE = 500  # files of the Hub asked for in one request
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([^/]+)/(.+)")  # how datasets 5.2 names a file of a dataset


@dataclass(frozen=True)
class Row:
    """A row as its shard gives it."""

    key: str
    """SHARD:NAME in a tar, FILE:ROW in a table."""
    number: int
    """Its place in its shard, from 0."""
    read: Callable[[], Values]
    """What it holds; to be called before the next row is asked for. Raises RowError, or what reading the shard raises."""
    after: Values | None
    """Where the reading goes on behind this row, as JSON: what `Shards.read` takes as `at`. None: the number of the next row is enough."""


class Shards(Protocol):
    """Files of rows. Holds nothing open, so it goes through fork and pickling; several threads may read."""

    @property
    def names(self) -> tuple[str, ...]:
        """The shards in their own order, for messages."""

    def choose(self, rows: Sequence[Values], task: str, asked: Asked, prompt: str | None) -> Columns:
        """Say which column plays which role, by some rows that were read without columns. Raises SourceError."""

    def read(self, shard: int, row: int, at: Values | None, columns: Columns | None) -> Iterator[Row]:
        """The rows of a shard from one on, one after another.

        at: `Row.after` of the row before, or None: then the rows before are passed over. columns: those that `Row.read` gives; None: all, to
        choose from. What cannot be reached raises what the library beneath raises (OSError and its like); a shard that is damaged as a whole
        SourceError; one that breaks off ends with a bad row.
        """

    def locate(self, shard: int, name: str) -> Path:
        """The file that a row of the shard names. Raises RowError."""

    def count(self, limit: int) -> int | None:
        """How many rows there are, counted until there are as many as the limit; None: only reading them tells."""

    def fingerprint(self) -> str:
        """SHA-256 over the shards' names and sizes; of files on the Hub, over their contents' own hashes."""


def is_remote(file: str) -> bool:
    """Whether the file lies on the Hub (`hf://...`), not on this machine."""
    return file.startswith("hf://")


def open_file(file: str) -> BinaryIO:
    """A file on this machine or the Hub, in which one can seek."""
    if not is_remote(file):
        return open_plain(file, _BUFFER)
    # Not fsspec's read-ahead: a row's members are read once the next header is known, so a step back must not fetch a block anew.
    return cast(BinaryIO, HfFileSystem().open(file, "rb", block_size=_BLOCK, cache_type="blockcache", cache_options={"maxblocks": _BLOCKS}))


def fingerprint_of(names: Sequence[str], files: Sequence[str]) -> str:
    """SHA-256 over the shards' names, and the sizes of files on this machine or the contents' hashes of files on the Hub.

    The hashes, unlike the commit that stands in the files' names, stay when another file of the dataset changes.
    """
    marks = {file: str(os.path.getsize(file)) if not is_remote(file) else "" for file in files}
    paths: dict[tuple[str, str], dict[str, str]] = {}
    for file in files:
        if match := _ON_HUB.fullmatch(file):
            repo, revision, path = match.groups()
            paths.setdefault((repo, unquote(revision)), {})[path] = file
    for (repo, revision), named in paths.items():
        asked = list(named)
        for start in range(0, len(asked), _PATHS_AT_ONCE):
            for found in HfApi().get_paths_info(repo, asked[start : start + _PATHS_AT_ONCE], revision=revision, repo_type="dataset"):
                marks[named[found.path]] = str(getattr(found, "blob_id", ""))
    return hashlib.sha256(json.dumps([list(names), list(marks.values())]).encode()).hexdigest()


def short_names(files: Sequence[str], folder: str) -> tuple[str, ...]:
    """Files by what they are called in messages and keys: relative to a folder, or to their dataset on the Hub."""
    found = (_ON_HUB.fullmatch(file) for file in files)
    return tuple(match[3] if match else file if is_remote(file) else os.path.relpath(file, folder) for file, match in zip(files, found, strict=True))


def refuse(reason: str) -> Values:
    """What a bad row holds. Raises RowError, always."""
    raise RowError(reason)
