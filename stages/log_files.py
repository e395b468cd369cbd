"""Log files: JSON lines that a run adds to as long as it goes on, in parts of bounded size. Imports no torch.

What is written now is `NAME.jsonl`. Once that is PART_BYTES long it is closed, which is to be renamed to `NAME-000001.jsonl` and so on, and another is begun; a closed part is
not written to any more. A short run has the one file. Readers ask here, and get the lines of all parts in the order of writing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stages.disk import sync

PART_BYTES = 64 * 2**20
"""A part is closed before the first line that finds it so long."""

LogName = Literal["metrics", "trace"]


@dataclass(frozen=True)
class Place:
    """Where a log stands: what was written before it is kept, what comes after it is not."""

    part: int
    """From 1."""
    bytes: int
    """Of that part. Parts before it are not looked at, so whoever needs the room that a trace takes may take them away."""


BEGINNING = Place(1, 0)


def saved_place(name: LogName, place: Place) -> dict[str, int]:
    """A place in a log as a checkpoint's state keeps it: `metrics_part`, `metrics_bytes`."""
    return {f"{name}_part": place.part, f"{name}_bytes": place.bytes}


def place_of(name: LogName, state: Mapping[str, Any]) -> Place:
    """The place in a log that a checkpoint's state tells. A former version wrote one part, and no number."""
    return Place(int(state.get(f"{name}_part", 1)), int(state[f"{name}_bytes"]))


class LogFile:
    """A log that is written to, by one process."""

    def __init__(self, folder: Path, name: LogName, keep: Place | None) -> None:
        """Open it, or make it. keep: what is there already stands up to here; None is all of it. Raises OSError."""
        self._folder, self._name = folder, name
        self._part = _cut(folder, name, keep)
        self._descriptor = _opened(current_file(folder, name))
        found = os.fstat(self._descriptor).st_size
        self._bytes = found - _torn_bytes(current_file(folder, name), found)
        if self._bytes < found:  # else the next line would go on with it
            os.ftruncate(self._descriptor, self._bytes)
        self._is_torn = False
        self.lost_bytes = 0 if keep is None else max(0, keep.bytes - self._bytes)
        """What should stand there and does not: another has shortened the file, or taken it away."""

    def write(self, text: str) -> None:
        """Add whole lines. Raises OSError where they cannot be written, and leaves nothing of them, so they may be tried again."""
        if self._is_torn:
            os.ftruncate(self._descriptor, self._bytes)
            self._is_torn = False
        if self._bytes >= PART_BYTES:
            self._begin_part()
        content = memoryview(text.encode())
        written = 0
        try:
            while written < len(content):
                written += os.write(self._descriptor, content[written:])
        except OSError:
            self._is_torn = True
            with suppress(OSError):  # a disk that is gone, not full: what is torn is cut off before the next line, or at the next launch
                os.ftruncate(self._descriptor, self._bytes)
                self._is_torn = False
            raise
        self._bytes += written

    def place(self) -> Place:
        """Where it stands, all of it on the disk. Raises OSError."""
        os.fsync(self._descriptor)
        return Place(self._part, self._bytes)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _begin_part(self) -> None:
        """Close the part and begin the next. Raises OSError, with all as it was."""
        current, closed = current_file(self._folder, self._name), closed_file(self._folder, self._name, self._part)
        os.fsync(self._descriptor)
        current.rename(closed)
        try:
            begun = _opened(current)
        except OSError:
            closed.rename(current)
            raise
        sync(self._folder)
        os.close(self._descriptor)
        self._descriptor, self._part, self._bytes = begun, self._part + 1, 0


def current_file(folder: Path, name: LogName) -> Path:
    """The file that is written to now."""
    return folder / f"{name}.jsonl"


def closed_file(folder: Path, name: LogName, part: int) -> Path:
    """Where a part lies once it is closed."""
    return folder / f"{name}-{part:06d}.jsonl"


def closed_files(folder: Path, name: LogName) -> dict[int, Path]:
    """The closed parts that are there, by number, in order."""
    found = {int(match[1]): path for path in folder.glob(f"{name}-*.jsonl") if (match := re.fullmatch(rf"{name}-(\d{{6,}})\.jsonl", path.name))}
    return dict(sorted(found.items()))


def is_log_file(name: str) -> bool:
    """Whether a file of this name, in a run folder, is a part of a log."""
    return is_closed_file(name) or name in [f"{log}.jsonl" for log in get_args(LogName)]


def is_closed_file(name: str) -> bool:
    """Whether it is a closed part, which is not written to any more."""
    return re.fullmatch(rf"({'|'.join(get_args(LogName))})-\d{{6,}}\.jsonl", name) is not None


def log_files(folder: Path, name: LogName) -> list[Path]:
    """All parts that are there, in the order of writing; none where nothing was written yet."""
    current = current_file(folder, name)
    return [*closed_files(folder, name).values(), *([current] if current.is_file() else [])]


def file_of(folder: Path, name: LogName, part: int) -> Path:
    """The file that a part lies in now, closed or not."""
    return closed if (closed := closed_file(folder, name, part)).is_file() else current_file(folder, name)


def log_bytes(folder: Path, name: LogName) -> int:
    """Bytes of all parts that are there."""
    return sum(path.stat().st_size for path in log_files(folder, name))


def log_lines(folder: Path, name: LogName) -> Iterator[bytes]:
    """The lines of all parts, in the order of writing, each with its end; that of the last one is missing if it is half written. May be read while a run writes them."""
    try:
        current = current_file(folder, name).open("rb")
    except FileNotFoundError:  # a run that was killed between two parts, or none
        current = None
    # It is opened first: closed meanwhile, it would else be neither among the closed ones nor the one that is written to.
    own = None if current is None else os.fstat(current.fileno()).st_ino
    try:
        for path in closed_files(folder, name).values():
            with path.open("rb") as closed:
                if os.fstat(closed.fileno()).st_ino != own:
                    yield from closed
        if current is not None:
            yield from current
    finally:
        if current is not None:
            current.close()


def log_events(folder: Path, name: LogName) -> Iterator[dict[str, Any]]:
    """What the lines of all parts say, in the order of writing. One that is torn, or that another has damaged, is passed over."""
    for line in log_lines(folder, name):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith(b"\n") and isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event


def place_after(folder: Path, name: LogName, start: Place, is_wanted: Callable[[bytes], bool], is_later: Callable[[bytes], bool]) -> Place | None:
    """Where the first line ends, from a place on, that is wanted; None if there is none before a line that tells of something later."""
    parts = closed_files(folder, name)
    parts[max(start.part, 1 + max(parts, default=0))] = current_file(folder, name)
    for part, path in parts.items():
        if part < start.part or not path.is_file():
            continue
        with path.open("rb") as file:
            end = file.seek(start.bytes if part == start.part else 0)
            for line in file:
                end += len(line)
                if line.endswith(b"\n") and is_wanted(line):
                    return Place(part, end)
                if is_later(line):
                    return None
    return None


def _cut(folder: Path, name: LogName, keep: Place | None) -> int:
    """Take away what was written after a place, the newest first, so that a kill in between leaves what can be cut again. Gives the number of the part that is written to."""
    current, closed = current_file(folder, name), closed_files(folder, name)
    number = 1 + max(closed, default=0)
    if keep is None:
        return number
    if keep.part < number:
        current.unlink(missing_ok=True)
        for later in sorted((part for part in closed if part > keep.part), reverse=True):
            closed[later].unlink()
        if keep.part in closed:
            _truncate(closed[keep.part], keep.bytes)
            closed[keep.part].rename(current)
    elif current.is_file():
        _truncate(current, keep.bytes)
    return keep.part


def _truncate(path: Path, keep_bytes: int) -> None:
    """Cut a file after so many bytes. Where it is linked to, in an outbox say, the other name keeps what it has."""
    status = path.stat()
    if status.st_size <= keep_bytes:
        return
    if status.st_nlink > 1:
        partial = path.with_name(f".{path.name}.partial")
        shutil.copyfile(path, partial)
        os.truncate(partial, keep_bytes)
        partial.replace(path)
    else:
        os.truncate(path, keep_bytes)


def _torn_bytes(path: Path, size: int) -> int:
    """Bytes behind the end of a file's last line."""
    block = 1 << 16
    with path.open("rb") as file:
        for begin in range(size - block, -block, -block):
            file.seek(max(0, begin))
            if (end := file.read(min(block, begin + block)).rfind(b"\n")) >= 0:
                return size - (max(0, begin) + end + 1)
    return size


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
