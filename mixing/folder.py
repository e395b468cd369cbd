"""Sources of files: a folder of images with .txt captions, a folder with metadata.jsonl, and a .jsonl of rows."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import pyarrow as pa

from mixing.bad_rows import RowError, SourceError
from mixing.images import SUFFIXES
from mixing.rows import Found, Good
from mixing.tasks import TASKS, Asked, Cells, Columns, choose_columns, to_cells

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class FileRows:
    """Rows of files, in an Arrow table: flat in memory, however many."""

    root: str
    table: pa.Table
    """key, prompt, target (relative to root) and references (a list of them)."""

    def key(self, index: int) -> str:
        """The target's path relative to the source's folder; the second row with the same target has `#2` behind it."""
        return str(self.table["key"][index].as_py())

    def cells(self, index: int) -> Cells:
        """What the row holds."""
        (row,) = self.table.slice(index, 1).to_pylist()
        references = tuple(Path(self.root, name) for name in row["references"])
        return Cells(row["prompt"], Path(self.root, row["target"]), references)


@dataclass(frozen=True)
class CaptionListing:
    """A folder of images, each with a .txt of the same name beside it."""

    root: str
    images: tuple[str, ...]
    """Relative to root, sorted."""
    captions: Mapping[str, str]
    """Relative path without suffix to the caption's relative path."""
    linked_folders: tuple[str, ...]
    prompt: str | None

    def found(self) -> Iterator[Found]:
        """Every image, sorted by relative path; then linked folders, not followed and each one bad row."""
        for name in self.images:
            key = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield Found(key, key, partial(self._read, name))
        for name in self.linked_folders:
            reason = "a symbolic link to a folder, which is not followed; move the images here"
            yield Found(name, name, partial(_refuse, reason))

    def keep(self, good: Iterable[Good]) -> FileRows:
        """The good rows."""
        return _file_rows(self.root, good)

    def _read(self, name: str) -> Cells:
        target = locate(name, self.root, (self.root,))
        stem = os.path.splitext(name)[0]
        if (caption := self.captions.get(stem)) is not None:
            text = _caption(locate(caption, self.root, (self.root,)))
            if not text.strip() and self.prompt is None:
                raise RowError(f"its caption '{os.path.basename(caption)}' is empty")
        elif self.prompt is None:
            raise RowError(f"no caption: '{os.path.basename(stem)}.txt' is missing")
        else:
            text = ""
        row = {"image": name, "text": text}
        return to_cells(row, "text_to_image", Columns("image", (), "text"), self.prompt, lambda _: target)


@dataclass(frozen=True)
class JsonLinesListing:
    """Rows in one or more files of one JSON object a line, whose images are files."""

    root: str
    """The images lie in here."""
    files: tuple[str, ...]
    """Relative to root; paths in a file are relative to its own folder."""
    task: str
    columns: Columns
    prompt: str | None

    def found(self) -> Iterator[Found]:
        """Every line that is not blank."""
        rows_with: Counter[str] = Counter()
        for file in self.files:
            base = os.path.join(self.root, os.path.dirname(file))
            read_path = partial(locate, base=base, roots=(self.root,))
            for number, row in _lines(os.path.join(self.root, file)):
                place = f"{file}:{number}"
                if isinstance(row, str):
                    yield Found(place, place, partial(_refuse, row))
                    continue
                key = self._target(row, base) or place
                rows_with[key] += 1
                if rows_with[key] > 1:
                    key = f"{key}#{rows_with[key]}"
                yield Found(place, key, partial(to_cells, row, self.task, self.columns, self.prompt, read_path))

    def keep(self, good: Iterable[Good]) -> FileRows:
        """The good rows."""
        return _file_rows(self.root, good)

    def _target(self, row: Mapping[str, object], base: str) -> str | None:
        """The target's path relative to root, or None: a row that names no file is a bad one."""
        match row.get(self.columns.target):
            case str(target) | [str(target)] | {"path": str(target)}:
                if os.path.isabs(target) and "\0" not in target:
                    target = os.path.realpath(target)
                return os.path.relpath(os.path.join(base, target), self.root)
            case _:
                return None


def list_folder(folder: Path, task: str, columns: Asked, prompt: str | None) -> CaptionListing | JsonLinesListing:
    """The rows of a folder: those of every metadata.jsonl in it and below, or if there is none, images with captions.

    Hidden files and folders are passed over, and so are files that are no images; with a metadata.jsonl, also the
    images that it does not name. Raises SourceError if the folder holds nothing, or mixes both kinds.
    """
    root = os.path.realpath(folder)
    files, linked_folders = _walk(root)
    images = tuple(name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES)
    captions: dict[str, str] = {}
    for name in files:  # sorted, so that x.txt comes after x.TXT and wins
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".txt":
            captions[stem] = name
    metadata = tuple(name for name in files if os.path.basename(name) == METADATA)
    if metadata:
        governed = tuple(os.path.dirname(name) for name in metadata)
        for name in images:
            if os.path.splitext(name)[0] in captions and not any(_inside(name, above) for above in governed):
                raise SourceError(
                    f"it holds {metadata[0]}, and captioned images that no {METADATA} stands above ({name!r}); "
                    "declare them as two sources, or move the captions into the metadata"
                )
        return _list_json_lines(root, metadata, task, columns, prompt)
    if not images:
        others = [name for name in files if name.endswith((".jsonl", ".parquet"))]
        named = f"; it holds {others[0]!r}: name the file in `path`" if others else ""
        raise SourceError(f"{folder} holds no images ({len(files)} files of other kinds){named}")
    if TASKS[task].references:
        raise SourceError(
            f"task '{task}' needs references, and a folder of captioned images has none; write a {METADATA} into it, "
            'one line a row: {"file_name": ..., "reference_file_name": ..., "text": ...}'
        )
    if columns:
        raise SourceError(f"columns: a folder of captioned images has none; leave it out, or write a {METADATA}")
    return CaptionListing(root, images, captions, linked_folders, prompt)


def list_json_lines(file: Path, task: str, columns: Asked, prompt: str | None) -> JsonLinesListing:
    """The rows of one .jsonl file; its images lie in its folder or below. Raises SourceError."""
    return _list_json_lines(os.path.realpath(file.parent), (file.name,), task, columns, prompt)


def locate(name: str, base: str, roots: Sequence[str]) -> Path:
    """The file that a row names, relative to base; it must lie in one of the roots (real paths). Raises RowError."""
    try:
        if "\0" in os.fsencode(name).decode("utf-8"):
            raise RowError(f"{name!r} holds a zero character")
    except UnicodeError as error:
        raise RowError(f"{name!r} is not a name in UTF-8; rename the file") from error
    path = os.path.normpath(os.path.join(base, name))
    real = os.path.realpath(path)
    if not any(_inside(real, root) for root in roots):
        raise RowError(f"{name!r} lies outside {base}; copy the file into that folder and name it from there")
    if not os.path.isfile(real):
        raise RowError(f"{name!r} is not a file" if os.path.exists(real) else f"no file {name!r}")
    return Path(real if os.path.isabs(name) else path)


def _list_json_lines(
    root: str, files: tuple[str, ...], task: str, columns: Asked, prompt: str | None
) -> JsonLinesListing:
    found: dict[str, None] = {}
    broken = None
    for file in files:
        for number, row in _lines(os.path.join(root, file)):
            if isinstance(row, str):
                broken = broken or f"{file}:{number}: {row}"
            else:
                found.update(dict.fromkeys(row))
    if not found:
        raise SourceError(f"{', '.join(files[:3])} holds no rows" + (f"; {broken}" if broken else ""))
    return JsonLinesListing(root, files, task, choose_columns(task, found, columns, prompt), prompt)


def _file_rows(root: str, good: Iterable[Good]) -> FileRows:
    keys: list[str] = []
    prompts: list[str] = []
    targets: list[str] = []
    references: list[list[str]] = []
    for row in good:
        names = [os.path.relpath(pixels, root) for _, pixels in row.cells.images() if isinstance(pixels, Path)]
        keys.append(row.key)
        prompts.append(row.cells.prompt)
        targets.append(names[0])
        references.append(names[1:])
    text = pa.large_string()
    schema = pa.schema([("key", text), ("prompt", text), ("target", text), ("references", pa.large_list(text))])
    columns = {"key": keys, "prompt": prompts, "target": targets, "references": references}
    return FileRows(root, pa.table(columns, schema=schema))


def _walk(root: str) -> tuple[list[str], tuple[str, ...]]:
    """All files that are not hidden and not in a hidden folder, and all linked folders; relative to root, sorted."""
    files: list[str] = []
    linked: list[str] = []
    for folder, names_of_folders, names_of_files in os.walk(root, onerror=_cannot_list):
        names_of_folders[:] = [name for name in names_of_folders if not name.startswith(".")]
        inner = os.path.relpath(folder, root)
        prefix = "" if inner == "." else inner + "/"
        files.extend(prefix + name for name in names_of_files if not name.startswith("."))
        linked.extend(prefix + name for name in names_of_folders if os.path.islink(os.path.join(folder, name)))
    return sorted(files), tuple(sorted(linked))


def _cannot_list(error: OSError) -> NoReturn:
    raise SourceError(f"the folder {error.filename} cannot be listed: {error.strerror}") from error


def _lines(file: str) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Every line that is not blank, by number from 1: its object, or what is wrong with it. Raises SourceError."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield number, _object(text)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error


def _object(line: bytes) -> dict[str, object] | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 ({error.reason} at byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return value if isinstance(value, dict) else "the line is JSON, but not an object {...}"


def _caption(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(
            f"its caption {file.name!r} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8"
        ) from error


def _refuse(reason: str) -> Cells:
    raise RowError(reason)


def _inside(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(folder.rstrip("/") + "/")
