"""Check of the sources: whether what the plan names lies there and has what its task needs, as far as names, headers and first rows tell.

`mixing.source` opens a source and looks at every row; this is the look that takes no torch and well under a second.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stages.columns import column_problem
from stages.paths import missing, place_of
from stages.plan import Source
from stages.problems import Problem, quoted, written
from stages.reader import ReadPlan

KINDS = "a folder of images with .txt captions or metadata.jsonl, a .jsonl file, .parquet files, or hub/USER/DATASET"
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
        *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".heic", ".heif", ".jxl"),
    }
)
"""As mixing.images.SUFFIXES, which cannot be imported without torch; a test holds the two together."""
METADATA = "metadata.jsonl"

_MOST_LISTED = 300_000  # files; a larger folder is judged by these and not counted
_MOST_READ = 8 * 2**20  # bytes of a .jsonl whose rows are looked at
_MOST_COUNTED = 64 * 2**20  # bytes of a .jsonl whose lines are counted
_MOST_FILES = 1_000_000  # that braces may name


class _Wrong(Exception):
    """What is wrong with a source; the field, and the message."""

    def __init__(self, message: str, field: str = "path") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class _Files:
    """What lies in a folder and below, hidden files left out; relative names."""

    names: tuple[str, ...]
    is_whole: bool
    """Whether that is all of them."""


def source_problems(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """What is wrong with the plan's sources, and with the folder of labelled images."""
    for name, source in read.plan.sources.items():
        try:
            most = _most_rows(source, root)
            if source.take is not None and most is not None and source.take.count > most:
                raise _Wrong(f"{source.take.count:,} rows are asked for, and there are {most:,}", "take.count")
        except _Wrong as error:
            location = ("sources", name, *error.field.split("."))
            place = read.place(*location) if location in read.places else read.place("sources", name, "path")
            yield Problem(place, written(location), str(error))
    accuracy = read.plan.evaluate.accuracy
    if accuracy is not None:
        location = ("evaluate", "accuracy", "labelled")
        try:
            _look_at_labels(root, accuracy.labelled)
        except _Wrong as error:
            yield Problem(read.place(*location), written(location), str(error))


def source_notes(read: ReadPlan) -> Iterator[Problem]:
    """That datasets of the Hub are not looked up."""
    for name, source in read.plan.sources.items():
        if source.path.startswith("hub/"):
            place = read.place("sources", name, "path")
            yield Problem(place, f"sources.{name}.path", f"{quoted(source.path)} lies on the Hub, which was not asked")


def _most_rows(source: Source, root: Path) -> int | None:
    """Look at a source, and say how many rows it has at most; None if that is not counted cheaply. Raises _Wrong."""
    path = source.path
    if path.startswith("hub/"):
        if not re.fullmatch(r"hub/[\w.-]+/[\w.-]+", path):
            raise _Wrong(f"{quoted(path)}: a dataset of the Hub is written hub/USER/DATASET")
        return None
    place = place_of(root, path)
    if os.path.isdir(place):
        return _folder(source, place)
    if path.endswith(".parquet"):
        return _parquet(source, root)
    if not os.path.exists(place):
        if re.search(r"[*?{\[]", path):
            raise _Wrong(f"{quoted(path)}: a pattern names .parquet files; a source is {KINDS}")
        raise _Wrong(missing(root, path))
    if not path.endswith(".jsonl"):
        raise _Wrong(f"{quoted(path)} cannot be read; a source is {KINDS}")
    return _json_lines(source, [place])


def _folder(source: Source, place: str) -> int | None:
    """A folder of images with captions, or with metadata."""
    files = _listed_files(place)
    metadata = [name for name in files.names if os.path.basename(name) == METADATA]
    if metadata:
        return _json_lines(source, [os.path.join(place, name) for name in metadata])
    images = sum(_suffix(name) in IMAGE_SUFFIXES for name in files.names)
    shown = quoted(source.path)
    if not images:
        tables = sorted(name for name in files.names if name.endswith((".jsonl", ".parquet")))
        hint = f"; it holds {quoted(tables[0])}: name the file in `path`" if tables else ""
        others = "1 file of another kind" if len(files.names) == 1 else f"{len(files.names):,} files of other kinds"
        raise _Wrong(f"{shown} holds no images ({others}){hint}")
    if source.task != "text_to_image":
        message = f"{source.task} needs references, and a folder of captioned images has none; write a {METADATA} into {shown}"
        raise _Wrong(message, "task")
    if source.columns:
        raise _Wrong(f"{shown} is a folder of captioned images, which has no columns; remove it", "columns")
    if source.prompt is None and not any(_suffix(name) == ".txt" for name in files.names):
        counted = "1 image" if images == 1 else f"{images:,} images"
        message = f"{shown} holds {counted} and no caption; write a .txt of the same name beside each, or give `prompt`"
        raise _Wrong(message)
    return images if files.is_whole else None


def _listed_files(place: str) -> _Files:
    names: list[str] = []
    for folder, inner, files in os.walk(place):
        inner[:] = [name for name in inner if not name.startswith(".")]
        prefix = os.path.relpath(folder, place) + "/" if folder != place else ""
        names += [prefix + name for name in files if name[0] != "."]
        if len(names) > _MOST_LISTED:
            return _Files(tuple(names), is_whole=False)
    return _Files(tuple(names), is_whole=True)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _json_lines(source: Source, files: Sequence[str]) -> int | None:
    """One or more files of one JSON object a line."""
    columns: dict[str, None] = {}
    broken = ""
    for file in files[:100]:
        for number, line in _first_lines(file):
            row = _object(line)
            if isinstance(row, str):
                broken = broken or f"; {os.path.basename(file)}:{number}: {row}"
            else:
                columns.update(dict.fromkeys(row))
    if not columns:
        raise _Wrong(f"{quoted(source.path)} holds no rows{broken}")
    _look_at_columns(source, list(columns))
    if sum(os.path.getsize(file) for file in files) > _MOST_COUNTED:
        return None
    return sum(_count_lines(file) for file in files)


def _first_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by number from 1, up to 8 MiB of them. Raises _Wrong."""
    left = _MOST_READ
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MOST_READ), b""), 1):
                left -= len(line)
                if left < 0:
                    return
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise _Wrong(f"{quoted(file)} cannot be read: {(error.strerror or str(error)).lower()}") from error


def _object(line: bytes) -> dict[str, object] | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return value if isinstance(value, dict) else "the line is JSON, but not an object {...}"


def _count_lines(file: str) -> int:
    """Lines that are not blank."""
    with open(file, "rb") as lines:
        return sum(not line.isspace() for line in lines)


def _parquet(source: Source, root: Path) -> int | None:
    """One or more .parquet files, of which the first's schema is looked at."""
    files = _pattern_files(source.path, root)
    from pyarrow import parquet  # takes 0.2 s, and few plans need it

    try:
        columns = parquet.read_schema(files[0]).names
        rows = sum(parquet.read_metadata(file).num_rows for file in files[:64])
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).splitlines()[0][:200]
        raise _Wrong(f"{quoted(source.path)} is not readable parquet: {reason}") from error
    _look_at_columns(source, columns)
    return rows if len(files) <= 64 else None


def _pattern_files(path: str, root: Path) -> list[str]:
    """The files that a pattern names: `*`, `?`, `[...]`, `**`, {000..063} and {a,b}. Raises _Wrong if one lacks."""
    files: list[str] = []
    for name in _braces(path):
        place = place_of(root, name)
        found = [place] if os.path.isfile(place) else sorted(filter(os.path.isfile, glob.glob(place, recursive=True)))
        if not found and name == path and not glob.has_magic(name):
            raise _Wrong(missing(root, path))
        if not found:
            raise _Wrong(f"{quoted(path)} matches no file" if name == path else f"no file {quoted(name)}, which {quoted(path)} names")
        files += found
    return files


def _braces(pattern: str) -> Iterator[str]:
    """The pattern with {000..063} and {a,b} written out."""
    match = re.search(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is not None:
        inner = words.split(",")
    elif not 0 <= int(last) - int(first) < _MOST_FILES:
        raise _Wrong(f"{match.group()}: a range rises, over at most {_MOST_FILES:,} numbers")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        inner = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    for each in inner:
        for rest in _braces(pattern[match.end() :]):
            yield pattern[: match.start()] + each + rest


def _look_at_columns(source: Source, columns: Sequence[str]) -> None:
    asked = {str(role): names for role, names in source.columns.items()}
    found = column_problem(source.task, columns, asked, source.prompt is not None)
    if found is not None:
        raise _Wrong(found[1], found[0])


def _look_at_labels(root: Path, path: str) -> None:
    """The folder on which the classifier is fitted. Raises _Wrong."""
    place = place_of(root, path)
    if not os.path.isdir(place):
        raise _Wrong(f"{quoted(path)} is not a folder" if os.path.exists(place) else missing(root, path))
    file = os.path.join(place, METADATA)
    if not os.path.isfile(file):
        raise _Wrong(f"{quoted(path)} has no {METADATA} (lines of file_name and label)")
    for number, line in islice(_first_lines(file), 1):
        row = _object(line)
        if isinstance(row, str) or not {"file_name", "label"} <= row.keys():
            raise _Wrong(f"{quoted(path)}: {METADATA}:{number}: a line needs file_name and label")
        return
    raise _Wrong(f"{quoted(path)}: {METADATA} holds no rows")
