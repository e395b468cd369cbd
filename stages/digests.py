"""Digests of model files: which weights a cache entry was made with. Files of many gigabytes are hashed once and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from mixing.plain_file import open_plain

_SETTLED_NANOSECONDS = 2 * 10**9  # a file changed since then may change again within its clock's tick: its digest is not remembered


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    digest = sha256()
    with open_plain(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folders_digest(root: Path, names: Sequence[str], digest: Callable[[Path], str]) -> str:
    """SHA-256 over every file in some sub-folders of a model's folder, in hexadecimal: their names and contents; hidden ones are passed over.

    names: sub-folders; one that does not exist counts as empty. digest: of one file, such as `file_digest`. Raises OSError.
    """
    found: list[list[str]] = []
    for name in names:
        for path in sorted((root / name).rglob("*")):
            relative = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                found.append([relative.as_posix(), digest(path)])
    return sha256(json.dumps([list(names), found]).encode()).hexdigest()


class FileDigests:
    """The digests of files, remembered in a JSON file by path, size, and times of the last changes of content and status, in nanoseconds.

    Several processes may use one file: what one of them forgets to keep is hashed again, never taken for another's.
    """

    def __init__(self, memory: Path) -> None:
        """memory: the JSON file; it is made when there is something to remember. One that cannot be read or written is done without."""
        self._memory = memory

    def digest(self, path: Path) -> str:
        """As `file_digest`, from memory where the file has not been touched since. Raises OSError if the file cannot be read."""
        name = str(path.resolve())
        before = _state(path)
        known = self._read()
        if name in known and known[name][:3] == before:
            return str(known[name][3])
        value = file_digest(path)
        if _state(path) == before and time.time_ns() - max(before[1:]) > _SETTLED_NANOSECONDS:
            self._write({**self._read(), name: [*before, value]})
        return value

    def _read(self) -> dict[str, list[int | str]]:
        try:
            known = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], str)}

    def _write(self, known: dict[str, list[int | str]]) -> None:
        partial = self._memory.with_name(f".{self._memory.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
        with contextlib.suppress(OSError):
            try:
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
                partial.replace(self._memory)
            finally:
                partial.unlink(missing_ok=True)


def _state(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
