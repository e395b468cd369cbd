"""Shards: the files of a tensor store, each a safetensors file of some entries, and the index of where an entry stands.

An entry is some named tensors under a 16-byte key; in the file they are called KEY/NAME, the key in hexadecimal. A shard is written once and never changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixing.content import KEY_BYTES

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}
"""The dtypes that are kept, by the names that safetensors has for them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMAT = "medley tensors 1"
_MOST_HEADER_BYTES = 100_000_000  # as the safetensors library allows
_KEY = re.compile(f"[0-9a-f]{{{2 * KEY_BYTES}}}")
_PLACE = np.dtype([("begin", np.uint64), ("shard", np.uint32), ("form", np.uint32), ("check", np.uint32)])

Part = tuple[str, str, tuple[int, ...]]
"""A tensor of an entry: its name, its dtype as in DTYPES, its shape."""
Form = tuple[Part, ...]
"""The tensors of an entry, in the order of their bytes."""


class ShardError(ValueError):
    """A file that is no whole shard; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """Where an entry stands in its shard. begin: of its bytes in the file; check: its `checksum`."""

    key: bytes
    form: Form
    begin: int
    check: int


def entry_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes that an entry's tensors take."""
    return sum(tensor.nbytes for tensor in tensors.values())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    memory: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return memory


def checksum(key: bytes, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over an entry's key and its tensors' names, dtypes, shapes and bytes: damage is told, in the header too."""
    check = zlib.crc32(key)
    for name in sorted(tensors):
        tensor = tensors[name]
        check = zlib.crc32(f"{name} {_NAMES[tensor.dtype]} {tuple(tensor.shape)}".encode(), check)
        check = zlib.crc32(raw_bytes(tensor), check)
    return check


def write_shard(path: Path, entries: Mapping[bytes, Mapping[str, Tensor]]) -> None:
    """Write entries as one file beside its place, sync it, and rename it into view.

    The tensors are contiguous, on the CPU, of a dtype in DTYPES. Raises OSError, leaving nothing, where the disk is full.
    """
    header: dict[str, Any] = {}
    checks, offset = [], 0
    for key, tensors in entries.items():
        for name in sorted(tensors):
            tensor = tensors[name]
            header[f"{key.hex()}/{name}"] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
            offset += tensor.nbytes
        checks.append(f"{checksum(key, tensors):08x}")
    text = json.dumps({"__metadata__": {"format": "pt", "medley": _FORMAT, "crc32": "".join(checks)}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensors in entries.values():
                for name in sorted(tensors):
                    file.write(raw_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_header(path: Path) -> list[Entry]:
    """Where each entry of a shard stands. Raises ShardError if the file is torn, truncated or foreign; OSError if it cannot be read."""
    with path.open("rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise ShardError("it is torn, or no safetensors file")
        text = file.read(length)
    try:
        return _entries(json.loads(text), 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardError(str(error) if isinstance(error, ShardError) else "its header is not that of a shard") from error


def _entries(header: dict[str, Any], begin: int, size: int) -> list[Entry]:
    metadata = header.pop("__metadata__")
    if metadata["medley"] != _FORMAT:
        raise ShardError(f"its format is {metadata['medley']!r}, not {_FORMAT!r}")
    checks: str = metadata["crc32"]
    found: dict[str, list[Part]] = {}
    begins: list[int] = []
    end, last = 0, ""
    for name, part in header.items():
        key, _, tensor = name.partition("/")
        if key != last:
            if key in found:
                raise ShardError(f"the tensors of {key} do not stand together")
            found[key], last = [], key
            begins.append(begin + end)
        shape = tuple(part["shape"])
        if any(type(length) is not int or not 0 <= length <= size for length in shape) or part["data_offsets"] != [end, end := end + math.prod(shape) * DTYPES[part["dtype"]].itemsize]:
            raise ShardError(f"{name}: shape and offsets do not agree")
        found[key].append((tensor, part["dtype"], shape))
    if begin + end != size:
        raise ShardError(f"it has {size} bytes where its header says {begin + end}; it was cut or is damaged")
    if not re.fullmatch(f"[0-9a-f]{{{8 * len(found)}}}", checks) or any(not _KEY.fullmatch(key) for key in found):
        raise ShardError("its keys and checks do not agree")
    values = [int(checks[8 * place : 8 * place + 8], 16) for place in range(len(found))]
    return [Entry(bytes.fromhex(key), tuple(parts), begin, check) for (key, parts), begin, check in zip(found.items(), begins, values, strict=True)]


@dataclass(frozen=True)
class Place:
    """Where an entry stands, found in an index. shard: its number there."""

    shard: int
    form: Form
    begin: int
    check: int


@dataclass(frozen=True)
class _Block:
    """Entries sorted by key. high, low: the two halves of each key, uint64 [N]; places: _PLACE [N]."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    places: NDArray[np.void]


class Index:
    """Which shard holds a key, for many shards, in 36 bytes an entry. Goes through fork and pickling.

    Blocks are merged as in a log-structured tree, so that adding costs O(log N) an entry and finding a look into O(log N) blocks.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        """Number to file name of the shards that are there."""
        self._next = 0
        self._blocks: list[_Block] = []
        self._forms: list[Form] = []
        self._form_numbers: dict[Form, int] = {}

    def __len__(self) -> int:
        return sum(len(block.high) for block in self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the entries take."""
        return sum(block.high.nbytes + block.low.nbytes + block.places.nbytes for block in self._blocks)

    def add(self, name: str, entries: Iterable[Entry]) -> None:
        """Take in the entries of a shard."""
        number, self._next = self._next, self._next + 1
        self.names[number] = name
        taken = list(entries)
        if not taken:
            return
        halves = np.frombuffer(b"".join(entry.key for entry in taken), dtype=">u8").reshape(-1, 2).astype(np.uint64)
        places = np.array([(entry.begin, number, self._form_number(entry.form), entry.check) for entry in taken], dtype=_PLACE)
        self._blocks.append(_sorted(_Block(halves[:, 0], halves[:, 1], places)))
        while len(self._blocks) > 1 and len(self._blocks[-2].high) <= 2 * len(self._blocks[-1].high):
            one, other = self._blocks.pop(), self._blocks.pop()
            merged = (np.concatenate([one.high, other.high]), np.concatenate([one.low, other.low]), np.concatenate([one.places, other.places]))
            self._blocks.append(_sorted(_Block(*merged)))

    def remove(self, numbers: Iterable[int]) -> None:
        """Forget shards by their numbers; those that are not there are passed over."""
        gone = [number for number in numbers if self.names.pop(number, None) is not None]
        if not gone:
            return
        kept = [~np.isin(block.places["shard"], gone) for block in self._blocks]
        blocks = [_Block(block.high[keep], block.low[keep], block.places[keep]) for block, keep in zip(self._blocks, kept, strict=True)]
        self._blocks = [block for block in blocks if len(block.high)]

    def find(self, key: bytes) -> list[Place]:
        """Every place where the entry of this key stands, all 128 bits compared."""
        high, low = np.uint64(int.from_bytes(key[:8], "big")), np.uint64(int.from_bytes(key[8:], "big"))
        found = []
        for block in self._blocks:
            at = int(np.searchsorted(block.high, high))
            while at < len(block.high) and block.high[at] == high:
                if block.low[at] == low:
                    place = block.places[at]
                    found.append(Place(int(place["shard"]), self._forms[int(place["form"])], int(place["begin"]), int(place["check"])))
                at += 1
        return found

    def _form_number(self, form: Form) -> int:
        number = self._form_numbers.setdefault(form, len(self._forms))
        if number == len(self._forms):
            self._forms.append(form)
        return number


def _sorted(block: _Block) -> _Block:
    order = np.lexsort((block.low, block.high))
    return _Block(np.ascontiguousarray(block.high[order]), np.ascontiguousarray(block.low[order]), block.places[order])
