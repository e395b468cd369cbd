"""Patterns: the files that a path of a plan names, with `*`, `?`, `[...]`, `**`, {000..063} and {a,b}. Imports no torch."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixing.bad_rows import SourceError

_MOST_FILES = 1_000_000  # that braces may name


def fixed_folder(pattern: str) -> str:
    """The folder above everything that a pattern can name."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return os.path.dirname(fixed)


def pattern_files(pattern: str, root: Path) -> list[str]:
    """The files of a pattern, each once: braces in their order, within each sorted. Raises SourceError if one lacks."""
    files: dict[str, None] = {}
    for name in _braces(pattern):
        place = os.path.join(root, name)
        found = [place] if os.path.isfile(place) else sorted(PatternSearch().files(name, root)) if glob.has_magic(name) else []
        if not found:
            raise SourceError(f"no file {name}" + ("" if name == pattern else f", which {pattern} names"))
        files.update(dict.fromkeys(found))
    return list(files)


class PatternSearch:
    """Looks for files by pattern, as glob does: hidden ones are left out, links to folders are followed.

    But no folder is looked through twice for the same rest of a pattern, by whatever links it is reached: a link to a folder above itself would double
    what there is, and two of them would double it forty times.
    """

    def __init__(self, left: int | None = None) -> None:
        """left: entries of folders that are looked at, at most; None: all."""
        self._left = left
        self._seen: set[tuple[int, int, int, str]] = set()  # device and inode of a folder, how many parts of the pattern were left, and the first of them

    @property
    def is_over(self) -> bool:
        """Whether enough has been looked at."""
        return self._left is not None and self._left <= 0

    def files(self, pattern: str, root: str | os.PathLike[str]) -> Iterator[str]:
        """The files that a pattern names, until too much has been looked at. root: where a relative one begins."""
        self._seen.clear()
        top = "/" if pattern.startswith("/") else os.fspath(root)
        parts = [part for part in pattern.split("/") if part]
        return filter(os.path.isfile, self._below(top, [part for part, before in zip(parts, ["", *parts], strict=False) if part != "**" or before != "**"]))

    def _below(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        while parts and not glob.has_magic(parts[0]):
            folder, parts = os.path.join(folder, parts[0]), parts[1:]
        if not parts:
            yield folder
        elif parts[0] == "**":
            folders, links = deque([folder]), deque[str]()
            while folders or links:
                each = (folders or links).popleft()  # links last, so that what lies elsewhere too goes by the name that leads over none
                if (entries := self._entries(each, parts)) is not None:
                    yield from self._below(each, parts[1:] or ["*"])
                    for entry in entries:
                        if entry.name[0] != "." and _is_folder(entry):
                            (links if entry.is_symlink() else folders).append(entry.path)
        else:
            for entry in self._entries(folder, parts) or ():
                if (entry.name[0] != "." or parts[0][0] == ".") and fnmatch.fnmatchcase(entry.name, parts[0]) and (not parts[1:] or _is_folder(entry)):
                    yield from self._below(entry.path, parts[1:])

    def _entries(self, folder: str, parts: Sequence[str]) -> list[os.DirEntry[str]] | None:
        """What lies in a folder, links last; None if that was asked before, cannot be looked at, or enough was."""
        found = []
        try:
            status = os.stat(folder or ".")
            if (known := (status.st_dev, status.st_ino, len(parts), parts[0])) in self._seen:
                return None
            self._seen.add(known)
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    if self._left is not None:
                        self._left -= 1
                    if self.is_over:
                        break
                    found.append(entry)
        except OSError:
            return None  # as glob: what may not be looked at is not there
        return sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


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
