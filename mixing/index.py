"""The data index: what the look at a source gave, kept on disk and memory-mapped when the same source is opened again.

One folder for each declaration of a source. It appears whole or not at all, its files are known by their hashes, and it holds npy, Arrow and JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mixing.bad_rows import SourceError
from mixing.plain_file import open_plain, read_plain
from mixing.rows import Stored

FORMAT = 2  # 1 did not say how many regions a row has

FRESH = 50_000_000
"""Nanoseconds: a file that changed less than this ago can change again and bear the same time, for clocks of file systems tick (Linux: 1 to 10 ms)."""

_FACTS = "facts.json"
_LEFT_BEHIND = 3600.0  # seconds after which a half-written entry is taken for that of a process that was killed
_TRIES = 10  # to take the place of another process's entry, which may come back while it is moved away
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What was remembered."""

    facts: Mapping[str, Any]
    """Whatever goes into JSON."""
    stored: Mapping[str, Stored]
    """Arrays and tables by name, memory-mapped."""


@dataclass(frozen=True)
class State:
    """What tells whether a file has changed."""

    text: str
    """Its size, and when content and inode changed; of a file behind a link also where it really lies."""
    changed: int
    """When it changed, in nanoseconds since 1970."""


def state(path: str, root: str = "") -> State:
    """The state of a file; root: a real path above it below which it looks for links. Raises OSError or ValueError if there is none."""
    status = os.lstat(path)
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    text = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    if stat.S_ISREG(status.st_mode) and not (root and _linked(path, root)):
        return State(text, changed)
    status = os.stat(path)
    changed = max(changed, status.st_mtime_ns, status.st_ctime_ns)
    return State(f"{text} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {os.path.realpath(path)}", changed)


def is_fresh(changed: int) -> bool:
    """Whether what changed then may change again without it being seen from its times."""
    return time.time_ns() - changed < FRESH


def place_of(index: Path, *declared: object) -> Path:
    """The entry of a source that was declared like this; declared: what goes into JSON."""
    return index / hashlib.blake2b(json.dumps([FORMAT, *declared]).encode(), digest_size=16).hexdigest()


def read_entry(place: Path) -> Entry | None:
    """The entry at a place; None if there is none, or it is damaged, torn or foreign."""
    try:
        written = json.loads(read_plain(place / _FACTS))
        if written["format"] != FORMAT or written["hash"] != _hash_of_facts(written):
            return None
        for name, expected in written["files"].items():
            if _hash(place / name) != expected:
                return None
        return Entry(written["facts"], {Path(name).stem: _mapped(place / name) for name in written["files"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_entry(place: Path, facts: Mapping[str, Any], stored: Mapping[str, Stored]) -> Entry:
    """Write an entry beside its place, rename it into view, and give it as it lies on disk. Raises SourceError if it cannot be written.

    An entry that stands there is replaced; a process that has mapped it keeps what it has. Not synced: after a crash its hashes tell.
    """
    partial = place.parent / f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        try:
            _clear(place)
            files = {}
            for name, values in stored.items():
                path = partial / (f"{name}.arrow" if isinstance(values, pa.Table) else f"{name}.npy")
                _write(path, values)
                files[path.name] = _hash(path)
            written: dict[str, Any] = {"format": FORMAT, "facts": facts, "files": files}
            (partial / _FACTS).write_text(json.dumps({**written, "hash": _hash_of_facts(written)}), encoding="utf-8")
            entry = Entry(facts, {Path(name).stem: _mapped(partial / name) for name in files})
            _rename(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        said = error.strerror or str(error)
        raise SourceError(f"the data index in {place.parent} cannot be written: {said}; make room, or choose another folder for the cache") from error
    return entry


def _rename(partial: Path, place: Path) -> None:
    """Put an entry in its place. Another process may do the same at the same time: then one of both entries stays, and either is right."""
    for number in range(_TRIES):
        try:
            partial.rename(place)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            old = partial.with_suffix(f".old{number}")
            try:
                place.rename(old)
            except FileNotFoundError:
                continue
            shutil.rmtree(old, ignore_errors=True)
        else:
            return


def _clear(place: Path) -> None:
    """Delete what killed processes left half-written or half-deleted."""
    for left in place.parent.glob(f".{place.name}.*"):
        try:
            if time.time() - left.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            continue


def _write(path: Path, values: Stored) -> None:
    if isinstance(values, pa.Table):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, values.schema) as writer:
            writer.write_table(values)
    else:
        np.save(path, values, allow_pickle=False)


def _mapped(path: Path) -> Stored:
    if path.suffix == ".arrow":
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open_plain(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _hash_of_facts(written: Mapping[str, Any]) -> str:
    text = json.dumps([written["facts"], written["files"]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _linked(path: str, root: str) -> bool:
    """Whether a folder between root and the path is a link."""
    below = os.path.normpath(path).removeprefix(root.rstrip("/") + "/").split("/")[:-1]
    folder = root.rstrip("/")
    for name in below:
        folder = f"{folder}/{name}"
        if stat.S_ISLNK(os.lstat(folder).st_mode):
            return True
    return False
