"""A store of tensors on disk by content key: append-only shards that processes, stages and runs share, bounded, and safe to kill at any instant.

What is put is gathered in memory and written a shard at a time, or when it has waited long enough. What is got is a copy, read from the shard's own place by `pread`: a shard that another
process deletes meanwhile is a miss. (A memory-mapped view would save that copy, a twentieth of a millisecond for the latents of 512 pixels, and kill the
process with SIGBUS where a network file system takes the file away under it.) The page cache is shared by all processes either way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixing.content import KEY_BYTES
from stages.tensor_shards import DTYPES, Index, Place, ShardError, checksum, entry_bytes, raw_bytes, read_header, write_shard

SHARD_BYTES = 32 * 2**20
"""About what a shard holds; less where the store's limit is below sixteen of them."""
_MOST_ENTRIES = 4096  # in a shard: bounds its header
_SHARD = re.compile(r"[\w.-]+-\d{6,}-[0-9a-f]{16}\.safetensors")  # the names that the store gives: it deletes no other file
_OPEN_SHARDS = 128  # file descriptors that a process keeps
_LOOK_SECONDS = 1.0  # between two looks for other processes' shards
_TOUCH_SECONDS = 60.0  # between two marks that a shard was used
_SETTLED_NANOSECONDS = 2 * 10**9  # a folder changed since then may change again within its clock's tick
_PATIENCE_SECONDS = (10.0, 640.0)  # until what was put is written though no shard is full; doubled each time, up to the second
_ABANDONED_SECONDS = 3600.0  # a half-written file of this age belongs to a process that was killed


class TensorStore:
    """Named tensors by 16-byte key, in a folder. For one thread; goes through fork and pickling, without what is not flushed in the second case."""

    def __init__(self, folder: Path, *, limit_bytes: int | None, writer: str, shared_with: Sequence[Path] = ()) -> None:
        """Open a store, or make it. Raises OSError if the folder cannot be made.

        limit_bytes: what the shards in `folder` and in `shared_with` may take together; None for no limit. writer: begins the names of this
        process's shards, letters, digits and `_.-`. shared_with: the folders of other stores under the same limit.
        """
        if not re.fullmatch(r"[\w.-]+", writer, re.ASCII):
            raise ValueError(f"writer: {writer!r} found; letters, digits and _.- are allowed")
        if limit_bytes is not None and limit_bytes < 1:
            raise ValueError(f"limit_bytes: {limit_bytes} found; at least 1 is allowed, or None for no limit")
        self._folder, self._limit, self._writer, self._folders = folder, limit_bytes, writer, (folder, *shared_with)
        self._shard_bytes = SHARD_BYTES if limit_bytes is None else min(SHARD_BYTES, limit_bytes // 16)
        self._written = 0
        self.is_writing = True
        """Whether anything more is written; no longer once that has failed."""
        self._buffer: dict[bytes, dict[str, Tensor]] = {}
        self._buffer_bytes, self._buffer_began, self._patience = 0, 0.0, _PATIENCE_SECONDS[0]
        self._owner = os.getpid()
        self._index = Index()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._touched: dict[int, float] = {}
        self._ignored: set[str] = set()
        self._damaged: set[Place] = set()
        self._warnings: list[str] = []
        self._warned: set[str] = set()
        self._seen_change: int | None = None
        self._looked = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._delete_abandoned()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._buffer or bool(self._places(key))

    def __len__(self) -> int:
        """Entries that are there; one that two processes wrote at once counts twice."""
        return len(self._buffer) + len(self._index)

    @property
    def index_bytes(self) -> int:
        """Memory that the index takes."""
        return self._index.nbytes

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of a key, on the CPU, as a copy of the caller's own; None if they are not there (any more).

        A key that is not there is looked for again among other processes' shards, at most once a second.
        """
        self._flush_when_due()
        if (waiting := self._buffer.get(_checked(key))) is not None:
            return {name: tensor.clone() for name, tensor in waiting.items()}
        found = self._read(key)
        if found is None and self._look_again():
            found = self._read(key)
        return found

    def put(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies of tensors under a key, unless it is there already. They are on disk once a shard is full or they have waited, or after `flush`.

        Raises ValueError for a dtype that is not in `DTYPES`, for no tensors, and for a name with other than letters, digits and `_.-`.
        """
        _checked(key)
        if not tensors or (strange := [name for name in tensors if not re.fullmatch(r"[\w.-]+", name, re.ASCII)]):
            raise ValueError(f"tensors: {strange if tensors else 'none'} found; give one or more, named with letters, digits and _.-")
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise ValueError(f"{name}: {tensor.dtype} found; {', '.join(str(dtype) for dtype in DTYPES.values())} are kept")
        if self._owner != os.getpid():  # in a forked process: what waits is its parent's to write
            self._owner, self._buffer, self._buffer_bytes = os.getpid(), {}, 0
        self._flush_when_due()
        if not self.is_writing or key in self:
            return
        size = entry_bytes(tensors)
        if self._limit is not None and size > self._limit:
            self._warn(f"{self._folder}: an entry of {size:,} bytes is not cached, the limit is {self._limit:,}; raise it")
            return
        if not self._buffer:
            self._buffer_began = time.monotonic()
        self._buffer[key] = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in sorted(tensors.items())}
        self._buffer_bytes += size
        if self._buffer_bytes >= self._shard_bytes or len(self._buffer) >= _MOST_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write what was put as a shard, and delete the least recently used shards beyond the limit.

        Where that fails (a full disk) there is a warning, what was put is dropped, and nothing more is written.
        """
        if self._owner != os.getpid():
            return
        entries, self._buffer, self._buffer_bytes = self._buffer, {}, 0
        if not entries or not self.is_writing:
            return
        name = f"{self._writer}-{self._written:06d}-{os.urandom(8).hex()}.safetensors"
        self._written += 1
        try:
            write_shard(self._folder / name, entries)
        except OSError as error:
            self.is_writing = False
            self._warn(f"{self._folder}: {error.strerror or error}; training goes on and nothing more is cached. Free some space, or lower the cache's limit")
            return
        self._take_in(name)
        if self._limit is not None:
            self._evict(self._limit)

    def refresh(self) -> None:
        """See what other processes have written and deleted."""
        self._looked = time.monotonic()
        self._seen_change = self._changed()
        try:
            names = set(os.listdir(self._folder))
        except OSError as error:
            names = set()
            self._warn(f"{self._folder}: {error.strerror or error}; nothing of it is used")
        self._forget([number for number, name in self._index.names.items() if name not in names])
        for name in sorted(names - set(self._index.names.values()) - self._ignored):
            if not name.startswith("."):
                self._take_in(name)

    def close(self) -> None:
        """Flush, and close every file."""
        self.flush()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def take_warnings(self) -> list[str]:
        """What was passed over or failed since the last call, each once: files that are no shards, damaged entries, a full disk."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffer": {}, "_buffer_bytes": 0, "_descriptors": OrderedDict()}

    def _flush_when_due(self) -> None:
        """Write what has waited long enough, so that a store too small to fill a shard serves other processes too."""
        if self._buffer and self._owner == os.getpid() and time.monotonic() - self._buffer_began >= self._patience:
            self._patience = min(2 * self._patience, _PATIENCE_SECONDS[1])
            self.flush()

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warnings.append(text)

    # --- reading ---------------------------------------------------------------------------------------------------------------------------

    def _places(self, key: bytes) -> list[Place]:
        return [place for place in self._index.find(key) if place not in self._damaged]

    def _read(self, key: bytes) -> dict[str, Tensor] | None:
        for place in self._places(key):
            name = self._index.names[place.shard]
            try:
                tensors = _read_at(self._descriptor(place.shard), place)
            except OSError:  # deleted since, by another process that keeps to its limit
                self._forget([place.shard])
                continue
            if checksum(key, tensors) == place.check:
                self._touch(place.shard)
                return tensors
            self._damaged.add(place)
            self._warn(f"{self._folder / name}: entry {key.hex()} is damaged and is made anew; delete the file")
        return None

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            path = self._folder / self._index.names[shard]
            try:
                opened = os.open(path, os.O_RDONLY)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._descriptors:
                    raise
                while self._descriptors:  # no more may be open, which is no word on the shard
                    os.close(self._descriptors.popitem()[1])
                opened = os.open(path, os.O_RDONLY)
            self._descriptors[shard] = opened
            if len(self._descriptors) > _OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[shard]

    def _touch(self, shard: int) -> None:
        """Mark a shard as used, for those who delete the least recently used; a folder that may only be read stays as it is."""
        if (now := time.monotonic()) - self._touched.get(shard, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[shard] = now
            with contextlib.suppress(OSError):
                os.utime(self._folder / self._index.names[shard])

    # --- the folder ------------------------------------------------------------------------------------------------------------------------

    def _take_in(self, name: str) -> None:
        try:
            self._index.add(name, read_header(self._folder / name))
        except FileNotFoundError:  # deleted since it was listed
            return
        except (ShardError, OSError) as error:
            self._ignored.add(name)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._warn(f"{self._folder / name}: {reason}; it is not used; delete it, or move it out of the cache")

    def _forget(self, shards: Sequence[int]) -> None:
        self._index.remove(shards)
        for shard in shards:
            self._touched.pop(shard, None)
            if (descriptor := self._descriptors.pop(shard, None)) is not None:
                os.close(descriptor)

    def _look_again(self) -> bool:
        """Whether the folder was looked at once more."""
        if (now := time.monotonic()) - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        if self._seen_change is not None and self._changed() == self._seen_change:
            return False
        self.refresh()
        return True

    def _changed(self) -> int | None:
        """When the folder last changed; None if that is so short ago that a further change might bear the same time."""
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except OSError:
            return None
        return changed if time.time_ns() - changed > _SETTLED_NANOSECONDS else None

    def _evict(self, limit: int) -> None:
        """Delete the least recently used shards of all folders under the limit until they keep to it. Other processes may do so at the same time."""
        shards = []
        for folder in self._folders:
            for name in os.listdir(folder) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    if _SHARD.fullmatch(name):
                        status = os.stat(folder / name)
                        shards.append((status.st_mtime_ns, status.st_size, folder / name))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= limit:
                break
            total -= size
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                total += size
                self._warn(f"{path}: {error.strerror}; the cache is beyond its limit of {limit:,} bytes")
        gone = {path.name for _, _, path in shards if path.parent == self._folder and not path.exists()}
        self._forget([number for number, name in self._index.names.items() if name in gone])

    def _delete_abandoned(self) -> None:
        for partial in self._folder.glob(".*.safetensors.partial"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    partial.unlink()


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: {len(key)} bytes found, {KEY_BYTES} are needed; make it with mixing.content")
    return key


def _read_at(descriptor: int, place: Place) -> dict[str, Tensor]:
    """The tensors of an entry. Raises OSError if the file ends before."""
    tensors, at = {}, place.begin
    for name, dtype, shape in place.form:
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        memory = raw_bytes(tensor)
        while memory:
            if not (read := os.pread(descriptor, len(memory), at)):
                raise OSError("the file ends before the entry does")
            memory[: len(read)] = read
            memory, at = memory[len(read) :], at + len(read)
        tensors[name] = tensor
    return tensors
