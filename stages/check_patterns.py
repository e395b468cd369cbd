"""Check of paths with patterns: the files that `*`, `?`, `[...]`, `**`, {000..063} and {a,b} name, as far as they are found quickly.

`mixing.patterns` finds all of them when the source is opened. Here a path may come from a plan that nobody has thought about, so what is looked at is bounded:
`/**/*.parquet` would look at the whole disk, and thirty `{a,b}` name a thousand million files.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mixing.patterns import PatternSearch
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
    search = PatternSearch(_MOST_ENTRIES)
    for count, name in enumerate(_braces(path)):
        if count == _MOST_NAMES or search.is_over:
            break
        place = place_of(root, name)
        found = [place] if os.path.isfile(place) else sorted(search.files(os.path.expanduser(name), root)) if glob.has_magic(name) else []
        if not found and not search.is_over:
            if name == path:
                raise Wrong(f"{quoted(path)} matches no file" if glob.has_magic(name) else missing(root, path))
            raise Wrong(f"no file {quoted(name)}, which {quoted(path)} names")
        files += found
    return files


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
