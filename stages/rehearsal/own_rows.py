"""Own rows: what of a plan's sources is here, whether it is opened in seconds, and copies of the first rows where it is not."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from stages.check_sources import IMAGE_SUFFIXES
from stages.paths import place_of
from stages.plan import Source

_MOST_FILES = 4_000  # in a folder that is opened as it is
_MOST_BYTES = 128 * 2**20  # of files that are opened as they are


def is_there(source: Source, root: Path) -> bool:
    """Whether something lies where a source's path leads. A dataset of the Hub lies here only as a folder USER/DATASET."""
    if source.path.startswith("hub/"):
        return (root / source.path.removeprefix("hub/")).is_dir()
    return os.path.exists(place_of(root, source.path)) or bool(_files(source, root))


def is_small(source: Source, root: Path) -> bool:
    """Whether a source that is there is opened in seconds: a stream, of which only the first rows are read, or few files of few bytes."""
    if source.stream:
        return True
    place = place_of(root, source.path.removeprefix("hub/"))
    if os.path.isdir(place):
        number = total = 0
        for above, _, names in os.walk(place):
            number += len(names)
            if number > _MOST_FILES:
                return False
            total += sum(os.path.getsize(os.path.join(above, name)) for name in names if name.endswith((".parquet", ".arrow", ".tar")))
        return total <= _MOST_BYTES
    files = _files(source, root)
    total = sum(map(os.path.getsize, files))
    return total <= (_MOST_BYTES if source.path.endswith((".parquet", ".arrow", ".tar")) else _MOST_BYTES // 64)


def _files(source: Source, root: Path) -> list[str]:
    """The files that a pattern names; {000..063} as any number."""
    pattern = re.sub(r"\{[^{}]*\}", "*", source.path)
    try:
        return sorted(filter(os.path.isfile, glob.glob(place_of(root, pattern), recursive=True)))
    except (OSError, ValueError):
        return []


def first_rows(source: Source, folder: Path, root: Path, rows: int) -> str | None:
    """Copy the first rows of a source that is too large to be opened, and return the place of the copies.

    None for what is no folder of captioned images, no .jsonl file and no folder with a metadata.jsonl, and for a source whose rows a condition chooses.
    """
    place = Path(place_of(root, source.path))
    lines = place if place.suffix == ".jsonl" else place / "metadata.jsonl"
    if source.where is not None or not (place.is_dir() or lines.is_file()):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if lines.is_file():
        with lines.open("rb") as opened:
            first = [line for line in islice(opened, 2 * rows) if line.strip()][:rows]
        for line in first:
            _copy_files(line, lines.parent, folder)
        (folder / lines.name).write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in first))
        return str(folder if place.is_dir() else folder / lines.name)
    for file in islice(_images_below(place), rows):
        for each in (file, file.with_suffix(".txt")):
            if each.is_file():
                _copy(each, folder / each.relative_to(place))
    return str(folder)


def _images_below(place: Path) -> Iterator[Path]:
    """The images of a folder, folder by folder, each in its order."""
    for above, inner, names in os.walk(place):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(above) / name for name in sorted(names) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."))


def _copy_files(line: bytes, place: Path, folder: Path) -> None:
    """Copy the files that a line of JSON names; a line that is none, and what lies elsewhere, is left to the source to judge."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    for value in row.values() if isinstance(row, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and len(name) < 1024 and "\0" not in name and ".." not in Path(name).parts and not os.path.isabs(name) and (place / name).is_file():
                _copy(place / name, folder / name)


def _copy(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)
