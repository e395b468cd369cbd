"""Patterns: the files that a path of a plan names, with `*`, `?`, `[...]`, `**`, {000..063} and {a,b}. Imports no torch."""

from __future__ import annotations

import glob
import os
import re
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
