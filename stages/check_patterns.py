"""Check of paths with patterns: the files that `*`, `?`, `[...]`, `**`, {000..063} and {a,b} name, as far as they are found quickly.

`mixing.patterns` finds all of them when the source is opened. Here a path may come from a plan that nobody has thought about, so what is looked at is bounded:
`/**/*.parquet` would look at the whole disk, and thirty `{a,b}` name a thousand million files.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.paths import missing, place_of
from stages.problems import quoted

_MOST_FILES = 1_000_000  # that braces may name
_MOST_NAMES = 20_000  # that braces come to, which are looked for
_MOST_ENTRIES = 100_000  # of folders, that are looked at for a pattern


class Wrong(Exception):
    """What is wrong with a source; the field, and the message."""

    def __init__(self, message: str, field: str = "path") -> None:
        super().__init__(message)
        self.field = field


def pattern_files(path: str, root: Path) -> list[str]:
    """The files that a pattern names; of very many, some; empty if none was found in the time that is taken. Raises Wrong if one lacks."""
    if (number := _num_names(path)) > _MOST_FILES:
        raise Wrong(f"{quoted(path)}: its braces name {number:,} files; at most {_MOST_FILES:,} are read")
    files: list[str] = []
    search = _Search(_MOST_ENTRIES)
    for count, name in enumerate(_braces(path)):
        if count == _MOST_NAMES or search.left <= 0:
            break
        place = place_of(root, name)
        found = [place] if os.path.isfile(place) else sorted(search.files(place)) if glob.has_magic(place) else []
        if not found and search.left > 0:
            if name == path:
                raise Wrong(f"{quoted(path)} matches no file" if glob.has_magic(name) else missing(root, path))
            raise Wrong(f"no file {quoted(name)}, which {quoted(path)} names")
        files += found
    return files


@dataclass
class _Search:
    """Looks for files by pattern, as glob does: hidden ones are left out."""

    left: int
    """Entries of folders that are still looked at."""

    def files(self, pattern: str) -> Iterator[str]:
        """The files that a pattern names, until too much has been looked at."""
        top = "/" if pattern.startswith("/") else ""
        parts = [part for part in pattern.split("/") if part]
        return filter(os.path.isfile, self._below(top, [part for part, before in zip(parts, ["", *parts], strict=False) if part != "**" or before != "**"]))

    def _below(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        while parts and not glob.has_magic(parts[0]):
            folder, parts = os.path.join(folder, parts[0]), parts[1:]
        if not parts:
            yield folder
        elif parts[0] == "**":
            folders = [folder]
            for each in folders:
                yield from self._below(each, parts[1:] or ["*"])
                folders += [entry.path for entry in self._entries(each) if entry.is_dir(follow_symlinks=False)]
        else:
            for entry in self._entries(folder):
                if (entry.name[0] != "." or parts[0][0] == ".") and fnmatch.fnmatchcase(entry.name, parts[0]) and (not parts[1:] or entry.is_dir()):
                    yield from self._below(entry.path, parts[1:])

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What lies in a folder; nothing if it cannot be looked at, or once enough was."""
        found = []
        try:
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    self.left -= 1
                    if self.left <= 0:
                        break
                    found.append(entry)
        except OSError:
            return []  # as glob: what may not be looked at is not there
        return found


_BRACES = re.compile(r"\{([^{}]*)\}")


def _first_braces(pattern: str) -> re.Match[str] | None:
    """The first braces that name something: {000..063} or {a,b}."""
    return next((match for match in _BRACES.finditer(pattern) if "," in match[1] or re.fullmatch(r"\d{1,9}\.\.\d{1,9}", match[1])), None)


def _inner(match: re.Match[str]) -> tuple[int, Iterator[str]]:
    """How many names stand in braces, and the names. Raises Wrong."""
    if "," in match[1]:
        words = match[1].split(",")
        return len(words), iter(words)
    first, last = match[1].split("..")
    if not 0 <= int(last) - int(first) < _MOST_FILES:
        raise Wrong(f"{match.group()}: a range rises, over at most {_MOST_FILES:,} numbers")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    numbers = range(int(first), int(last) + 1)
    return len(numbers), (str(number).zfill(width) for number in numbers)


def _num_names(pattern: str) -> int:
    """How many names the braces of a pattern come to. Raises Wrong."""
    number = 1
    while (match := _first_braces(pattern)) is not None:
        number, pattern = number * _inner(match)[0], pattern[match.end() :]
    return number


def _braces(pattern: str) -> Iterator[str]:
    """The pattern with its braces written out."""
    match = _first_braces(pattern)
    if match is None:
        yield pattern
        return
    for each in _inner(match)[1]:
        for rest in _braces(pattern[match.end() :]):
            yield pattern[: match.start()] + each + rest
