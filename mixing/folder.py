"""Sources of files: a folder of images with .txt captions, a folder with metadata.jsonl, and a .jsonl of rows."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from mixing.bad_rows import RowError, SourceError, shown
from mixing.file_rows import FileRows, file_rows
from mixing.images import SUFFIXES
from mixing.index import FRESH, State, is_fresh, state
from mixing.plain_file import read_plain
from mixing.records import MOST_TEXT, records
from mixing.rows import Found, Good, Stored
from mixing.tasks import TASKS, Asked, Cells, Columns, choose_columns, to_cells

METADATA = "metadata.jsonl"
METADATA_FILES = (METADATA, "metadata.csv")


@dataclass(frozen=True)
class CaptionListing:
    """A folder of images, each with a .txt of the same name beside it; each line of that which is not blank is a caption."""

    root: str
    images: tuple[str, ...]
    """Relative to root, sorted."""
    captions: Mapping[str, str]
    """Relative path without suffix to the caption's relative path."""
    linked_folders: tuple[str, ...]
    prompt: str | None

    def stamp(self) -> str:
        """The state of every image and caption. Waits a moment if one has only just changed, for it might again within the same tick."""
        digest = hashlib.blake2b(self._stamps, digest_size=16)
        digest.update(json.dumps(self.linked_folders).encode())
        return digest.hexdigest()

    @cached_property
    def _stamps(self) -> bytes:
        """16 bytes for each image: its name and state, and its caption's."""
        stamps, newest = bytearray(), 0
        for name in self.images:
            caption = self.captions.get(os.path.splitext(name)[0])
            texts = [name]
            for file in (name,) if caption is None else (name, caption):
                try:
                    found = state(f"{self.root}/{file}")
                except OSError as error:
                    found = State(error.strerror or "", 0)
                newest = max(newest, found.changed)
                texts.append(found.text)
            stamps += hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogateescape"), digest_size=16).digest()
        if is_fresh(newest):
            time.sleep(FRESH * 1e-9)
        return bytes(stamps)

    def found(self) -> Iterator[Found]:
        """Every image, sorted by relative path; then linked folders, not followed and each one bad row."""
        for number, name in enumerate(self.images):
            key = name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield Found(key, key, partial(self._read, name), partial(self._stamp, number))
        for name in self.linked_folders:
            reason = "a symbolic link to a folder, which is not followed; move the images here"
            yield Found(name, name, partial(_refuse, reason))

    def keep(self, good: Iterable[Good]) -> FileRows:
        """The good rows."""
        return file_rows(self.root, good)

    def restored(self, saved: Mapping[str, Stored]) -> FileRows:
        """The rows of a table."""
        return FileRows(self.root, saved["table"])

    def _stamp(self, number: int) -> str:
        return self._stamps[16 * number : 16 * number + 16].hex()

    def _read(self, name: str) -> Cells:
        target = locate(name, self.root, (self.root,))
        stem = os.path.splitext(name)[0]
        if (caption := self.captions.get(stem)) is not None:
            text = _caption(locate(caption, self.root, (self.root,)))
            lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
            if not lines and self.prompt is None:
                raise RowError(f"its caption '{os.path.basename(caption)}' is empty")
        elif self.prompt is None:
            raise RowError(f"no caption: '{os.path.basename(stem)}.txt' is missing")
        else:
            lines = []
        row = {"image": name, "text": lines}
        return to_cells(row, "text_to_image", Columns("image", (), "text"), self.prompt, lambda _: target)


@dataclass(frozen=True)
class JsonLinesListing:
    """Rows in one or more .jsonl, .json or .csv files, whose images are files."""

    root: str
    """The images lie in here."""
    files: tuple[str, ...]
    """Relative to root; paths in a file are relative to its own folder."""
    task: str
    columns: Columns
    prompt: str | None

    def stamp(self) -> None:
        """None: the images that rows name are known only to the rows."""

    def found(self) -> Iterator[Found]:
        """Every row, by its line; of a .json by its number."""
        rows_with: Counter[str] = Counter()
        for file in self.files:
            base = os.path.join(self.root, os.path.dirname(file))
            read_path = partial(locate, base=base, roots=(self.root,))
            for number, row in records(os.path.join(self.root, file), self._typed()):
                place = f"{file}:{number}"
                if isinstance(row, str):
                    yield Found(place, place, partial(_refuse, row))
                    continue
                key = self._target(row, os.path.dirname(file)) or place
                rows_with[key] += 1
                if rows_with[key] > 1:
                    key = f"{key}#{rows_with[key]}"
                read = partial(to_cells, row, self.task, self.columns, self.prompt, read_path)
                yield Found(place, key, read, partial(self._stamp, row, base))

    def keep(self, good: Iterable[Good]) -> FileRows:
        """The good rows."""
        return file_rows(self.root, good)

    def restored(self, saved: Mapping[str, Stored]) -> FileRows:
        """The rows of a table."""
        return FileRows(self.root, saved["table"])

    def _stamp(self, row: Mapping[str, object], base: str) -> str | None:
        files: list[str] = []

        def note(name: str) -> Path:
            files.append(os.path.join(base, name))
            return Path(name)

        try:
            to_cells(row, self.task, self.columns, self.prompt, note)
        except RowError:
            return None
        stamp = _stamp(files, self.root)
        return None if stamp is None else json.dumps([stamp, base, repr(self.columns), row])

    def _typed(self) -> frozenset[str]:
        """Columns that play no role of text or image: a .csv's cells in them may be numbers."""
        return frozenset(self.columns.extra) - frozenset(replace(self.columns, extra=()).used())

    def _target(self, row: Mapping[str, object], inner: str) -> str | None:
        """The target's path relative to root, or None: a row that names no file is a bad one. inner: what its path is relative to."""
        match row.get(self.columns.target):
            case str(target) | [str(target)] | {"path": str(target)}:
                if os.path.isabs(target) and "\0" not in target:
                    target = os.path.realpath(target)
                path = os.path.normpath(os.path.join(inner, target))
                return os.path.relpath(os.path.join(self.root, path), self.root) if path.startswith(("/", "..")) else path
            case _:
                return None


def list_folder(
    folder: Path, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> CaptionListing | JsonLinesListing:
    """The rows of a folder: those of every metadata.jsonl or .csv in it and below, or if there is none, images with captions.

    Hidden files and folders are passed over, and so are files that are no images; with metadata, also the images that it
    does not name. extra: further columns whose values are kept. Raises SourceError if the folder holds nothing, or mixes
    both kinds.
    """
    root = os.path.realpath(folder)
    files, linked_folders = _walk(root)
    images = tuple(name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES)
    captions: dict[str, str] = {}
    for name in files:  # sorted, so that x.txt comes after x.TXT and wins
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".txt":
            captions[stem] = name
    metadata = tuple(name for name in files if os.path.basename(name) in METADATA_FILES)
    if metadata:
        governed = tuple(os.path.dirname(name) for name in metadata)
        if (twice := next((above for above in governed if governed.count(above) > 1), None)) is not None:
            raise SourceError(f"{folder / twice} holds {' and '.join(METADATA_FILES)}; keep the one that is meant")
        for name in images:
            if os.path.splitext(name)[0] in captions and not any(_inside(name, above) for above in governed):
                raise SourceError(
                    f"it holds {metadata[0]}, and captioned images that no {METADATA} stands above ({name!r}); "
                    "declare them as two sources, or move the captions into the metadata"
                )
        return _list_json_lines(root, metadata, task, columns, prompt, extra)
    if not images:
        others = [name for name in files if name.endswith((".jsonl", ".json", ".csv", ".parquet", ".arrow", ".tar"))]
        named = f"; it holds {others[0]!r}: name the file in `path`" if others else ""
        raise SourceError(f"{folder} holds no images ({len(files)} files of other kinds){named}")
    if TASKS[task].references:
        raise SourceError(
            f"task '{task}' needs references, and a folder of captioned images has none; write a {METADATA} into it, "
            'one line a row: {"file_name": ..., "reference_file_name": ..., "text": ...}'
        )
    if TASKS[task].regions:
        raise SourceError(
            f"task '{task}' needs regions, and a folder of captioned images has none; write a {METADATA} into it, one line a row: "
            '{"file_name": ..., "text": ..., "eligen_entity_prompts": [...], "eligen_entity_masks": [...]}'
        )
    if columns:
        raise SourceError(f"columns: a folder of captioned images has none; leave it out, or write a {METADATA}")
    if extra:
        raise SourceError(f"no column '{extra[0]}': a folder of captioned images has none; write a {METADATA} into it")
    return CaptionListing(root, images, captions, linked_folders, prompt)


def list_json_lines(
    file: Path, task: str, columns: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> JsonLinesListing:
    """The rows of one .jsonl, .json or .csv file; its images lie in its folder or below. Raises SourceError."""
    return _list_json_lines(os.path.realpath(file.parent), (file.name,), task, columns, prompt, extra)


def locate(name: str, base: str, roots: Sequence[str]) -> Path:
    """The file that a row names, relative to base; it must lie in one of the roots (real paths). Raises RowError."""
    if "\0" in name:
        raise RowError(f"{shown(name)} holds a zero character")
    try:
        name.encode("utf-8")
    except UnicodeError as error:
        raise RowError(f"{shown(name)} is not a name in UTF-8; rename the file") from error
    path = os.path.normpath(os.path.join(base, name))
    if any(_is_plain(path, root) for root in roots):
        return Path(path)
    real = os.path.realpath(path)
    if not any(_inside(real, root) for root in roots):
        raise RowError(f"{shown(name)} lies outside {base}; copy the file into that folder and name it from there")
    if not os.path.isfile(real):
        raise RowError(f"{shown(name)} is not a file" if os.path.exists(real) else f"no file {shown(name)}")
    return Path(real if os.path.isabs(name) else path)


def _list_json_lines(
    root: str, files: tuple[str, ...], task: str, columns: Asked, prompt: str | None, extra: Sequence[str]
) -> JsonLinesListing:
    found: dict[str, None] = {}
    broken = None
    for file in files:
        for number, row in records(os.path.join(root, file)):
            if isinstance(row, str):
                broken = broken or f"{file}:{number}: {row}"
            else:
                found.update(dict.fromkeys(row))
    if not found:
        raise SourceError(f"{', '.join(files[:3])} holds no rows" + (f"; {broken}" if broken else ""))
    return JsonLinesListing(root, files, task, choose_columns(task, found, columns, prompt, extra), prompt)


def _is_plain(path: str, root: str) -> bool:
    """Whether it is a file below root, and neither it nor a folder between is a link: what `locate` asks of most files, at little cost."""
    place = root.rstrip("/")
    if not path.startswith(place + "/"):
        return False
    mode = 0
    for name in path[len(place) + 1 :].split("/"):
        place = f"{place}/{name}"
        try:
            mode = os.lstat(place).st_mode
        except OSError:
            return False
        if stat.S_ISLNK(mode):
            return False
    return stat.S_ISREG(mode)


def _stamp(files: Iterable[str], root: str) -> str | None:
    """The state of some files; None if one is not there, or might change again without its times saying so."""
    try:
        states = [state(file, root) for file in files]
    except (OSError, ValueError):
        return None
    return None if any(is_fresh(each.changed) for each in states) else "\0".join(each.text for each in states)


def _walk(root: str) -> tuple[list[str], tuple[str, ...]]:
    """All files that are not hidden and not in a hidden folder, and all linked folders; relative to root, sorted. Raises SourceError."""
    files: list[str] = []
    linked: list[str] = []
    left = [""]
    while left:
        inner = left.pop()
        try:
            with os.scandir(os.path.join(root, inner)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not _is_folder(entry):
                        files.append(inner + entry.name)
                    elif entry.is_symlink():
                        linked.append(inner + entry.name)
                    else:
                        left.append(f"{inner}{entry.name}/")
        except OSError as error:
            raise SourceError(f"the folder {error.filename} cannot be listed: {error.strerror}") from error
    return sorted(files), tuple(sorted(linked))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself: one row that is not there, and no reason to refuse the others
        return False


def _caption(file: Path) -> str:
    if (size := file.stat().st_size) > MOST_TEXT:
        raise RowError(f"its caption {file.name!r} has {size:,} bytes; at most {MOST_TEXT:,} are read")
    try:
        return read_plain(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(
            f"its caption {file.name!r} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8"
        ) from error


def _refuse(reason: str) -> Cells:
    raise RowError(reason)


def _inside(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(folder.rstrip("/") + "/")
