"""Members of a .tar: where each lies, and which plays which role in a row of the webdataset layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

from mixing.bad_rows import RowError, SourceError
from mixing.columns import USUAL_NAMES, Asked, Columns, Role, choose_columns, listed
from mixing.records import MOST_TEXT, object_in

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of which a row's target has one, where a plan does not name another."""
CAPTIONS = ("txt", "caption")
"""Extensions that are taken for the prompt, the first that there is, where a plan does not name one."""
TARGET = "image"
"""The column that stands for the one member with an extension of IMAGES."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
FIRST = 2**15
"""Bytes of a member that are read first. The header of a JPEG or PNG nearly always stands in them."""

_BLOCK = 512
_MOST_NAMED = 2**20  # bytes of an extended header, which holds names
_ZEROS = bytes(_BLOCK)

Kind = Literal["file", "link", "device", "sparse", "unknown"]
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **dict.fromkeys((b"1", b"2"), "link"),
    **dict.fromkeys((b"3", b"4", b"6"), "device"),
    b"S": "sparse",
}
_WITHOUT_CONTENT = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})  # whatever size their headers say
_PASSED_OVER = frozenset({b"5", b"K", b"V", b"D", b"M", b"N"})  # folders, names of links, and what backups by GNU tar hold


@dataclass(frozen=True)
class Member:
    """A member of a tar that is no folder."""

    name: str
    """As written; bytes that are not UTF-8 as surrogates."""
    kind: Kind
    offset: int
    """Where its content begins."""
    num_bytes: int


class Torn(ValueError):
    """A tar ends, or cannot be followed, before its end; the message says where and how."""

    def __init__(self, message: str, member: str | None = None) -> None:
        super().__init__(message)
        self.member = member
        """The member inside which it ends."""


def members(file: BinaryIO, start: int = 0) -> Iterator[Member]:
    """The members of a tar in their order, by their headers, from the byte where a header stands. Reads no content.

    Names of any length (ustar, GNU, PAX) are understood; folders are passed over. Raises Torn after the last whole member of a tar that
    breaks off. Source: POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format".
    """
    end = file.seek(0, 2)
    place, shared, own = start, dict[str, str](), dict[str, str]()
    while place < end:
        block = _read(file, place, _BLOCK)
        if block == _ZEROS:
            return
        if len(block) < _BLOCK:
            raise Torn(f"it ends inside a header, at byte {end:,}")
        if not _is_header(block):
            raise Torn(f"no header stands at byte {place:,}, where one belongs; what follows cannot be read")
        kind, num_bytes = block[156:157], _number(block[124:136])
        content = place + _BLOCK
        if kind in (b"x", b"X", b"g", b"L"):
            text = _read(file, content, num_bytes) if 0 <= num_bytes <= _MOST_NAMED else b""
            if len(text) < max(num_bytes, 1):
                raise Torn(f"the header at byte {place:,} is cut, or no header")
            if kind == b"L":
                own["path"] = _text(text.rstrip(b"\0"))
            else:
                (shared if kind == b"g" else own).update(_pax(text))
            place = content + _padded(num_bytes)
            continue
        if kind == b"S":
            while block[482 if content == place + _BLOCK else 504]:  # further headers say where the holes are
                block = _read(file, content, _BLOCK)
                if len(block) < _BLOCK:
                    raise Torn(f"it ends inside a header, at byte {end:,}")
                content += _BLOCK
        facts = {**shared, **own}
        own = {}
        name = facts.get("GNU.sparse.name") or facts.get("path") or _name(block)
        if kind in _WITHOUT_CONTENT:
            num_bytes = 0
        elif re.fullmatch("[0-9]{1,18}", facts.get("size", "")):
            num_bytes = int(facts["size"])
        if num_bytes < 0 or content + num_bytes > end:
            raise Torn(f"it ends at byte {end:,}, inside '{_shown(name)}', which goes to byte {content + max(num_bytes, 0):,}", name)
        if kind not in _PASSED_OVER and not name.endswith("/"):
            is_sparse = any(fact.startswith("GNU.sparse.") for fact in facts)
            yield Member(name, "sparse" if is_sparse else _KINDS.get(kind, "unknown"), content, num_bytes)
        place = content + _padded(num_bytes)


def split_name(name: str) -> tuple[str, str] | None:
    """The row that a member belongs to, and its column: the file name up to its first dot, with the folders before; and the rest, in lower case.

    None for a member that belongs to none: a hidden file, or one without a dot. The row's name can be printed.
    """
    match = re.fullmatch(r"(?:\./)*((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return None if match is None else (_shown(match[1]), match[2].lower())


def check_tar(file: BinaryIO, name: str) -> None:
    """Raise SourceError if a file is compressed, or no tar at all."""
    block = _read(file, 0, _BLOCK)
    for magic, (by, cure) in _COMPRESSED.items():
        if block.startswith(magic):
            raise SourceError(f"{name} is compressed by {by}, so that no row can be read without all before it; unpack it: {cure} {name}")
    if not block:
        raise SourceError(f"{name} is empty; copy it again")
    if block != _ZEROS and not (len(block) == _BLOCK and _is_header(block)):
        raise SourceError(f"{name} is no tar: no header stands at its beginning")


def compression(name: str) -> str | None:
    """Why a file with a name such as x.tar.gz is not read, and what to do; None for another name."""
    cures = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
    suffix = next((suffix for suffix in cures if name.endswith(suffix)), None)
    if suffix is None or not (suffix == ".tgz" or name.endswith(f".tar{suffix}")):
        return None
    return f"a compressed tar has no row that can be read without all before it; unpack it: {cures[suffix]} {name}"


def choose_members(
    task: str, extensions: Iterable[str], fields: Iterable[str], asked: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> Columns:
    """Say which column plays which role: columns are the extensions of the members, and the fields of the .json members.

    Raises SourceError; see `mixing.columns.choose_columns`.
    """
    found, said = usual_members(extensions, fields, asked)
    return choose_columns(task, found, said, prompt, extra)


def usual_members(extensions: Iterable[str], fields: Iterable[str], asked: Asked) -> tuple[list[str], Asked]:
    """All columns of a tar's rows, and `asked` with what a plan does not say filled in, where members have their own usual names.

    The target is the one member with an extension of IMAGES, the prompt that of CAPTIONS. Raises SourceError if there is no target.
    """
    extensions = list(dict.fromkeys(extensions))
    found = list(dict.fromkeys([*extensions, *fields]))
    said: dict[Role, str | Sequence[str]] = dict(asked)
    if "target" not in said:
        if any(extension in IMAGES for extension in extensions):
            found.append(TARGET)
            said["target"] = TARGET
        elif not any(name in extensions for name in USUAL_NAMES["target"]):
            raise SourceError(
                f"no member for the target (columns: {listed(found)}); its usual extensions are {', '.join(IMAGES)}; "
                "say which: columns: {target: NAME}"
            )
    if "prompt" not in said and (caption := next((name for name in CAPTIONS if name in extensions), None)) is not None:
        said["prompt"] = caption
    return found, said


def image_members(columns: Columns) -> frozenset[str]:
    """The extensions of the members that are images."""
    target = IMAGES if columns.target == TARGET else (columns.target,)
    return frozenset((*target, *columns.references, *columns.entity_masks))


def raw_row(num_bytes: Mapping[str, int], read: Callable[[str], bytes], columns: Columns) -> dict[str, object]:
    """A row's columns with their values, as `mixing.tasks.to_cells` takes it; only those that are used are read.

    num_bytes: of the row's members, by extension. read: gives the content of one. Raises RowError.
    """
    extensions, images = num_bytes.keys(), {columns.target, *columns.references, *columns.entity_masks}

    def text(name: str) -> bytes:
        if num_bytes[name] > MOST_TEXT:
            raise RowError(f"its '{name}' has {num_bytes[name]:,} bytes; at most {MOST_TEXT:,} are read")
        return read(name)

    row: dict[str, object] = {}
    fields: dict[str, object] | None = None
    for name in columns.used():
        if name in extensions:
            row[name] = read(name) if name in images else _value(name, text(name))
        elif name == TARGET and name == columns.target:
            present = [extension for extension in IMAGES if extension in extensions]
            if len(present) > 1:
                raise RowError(f"it has members {listed(present)}; say which is the target: columns: {{target: {present[0]}}}")
            row[name] = read(present[0]) if present else None
        elif "json" in extensions:
            fields = fields if fields is not None else fields_of(text("json"))
            row[name] = fields.get(name)
            if name in images and isinstance(row[name], str | list):
                raise RowError(f"'{name}' names a file; the images of a row in a tar are members of its own")
    return row


def fields_of(content: bytes) -> dict[str, object]:
    """The fields of a .json member. Raises RowError."""
    try:
        found = object_in(content.decode("utf-8-sig"), "its 'json'")
    except UnicodeDecodeError as error:
        raise RowError(f"its 'json' is not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    if isinstance(found, str):
        raise RowError(found)
    return found


def _value(name: str, content: bytes) -> object:
    """Text; the number in a .cls; what is in a .json of another name."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"its '{name}' is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from error
    kind = name.rpartition(".")[2]
    if kind == "cls" and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text):
        return int(text)
    if kind == "json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError(f"its '{name}' is not JSON: {error}") from error
    return text


def _read(file: BinaryIO, place: int, num_bytes: int) -> bytes:
    file.seek(place)
    return file.read(num_bytes)


def _is_header(block: bytes) -> bool:
    """Whether the checksum, which some count over signed bytes, agrees."""
    said = _number(block[148:156])
    rest = block[:148] + block[156:]
    total = 256 + sum(rest)
    return said == total or said == total - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or binary behind a byte 128 (large) or 255 (negative); -1 for anything else."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if re.fullmatch(b"[0-7]+", digits) else -1


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax(text: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    found: dict[str, str] = {}
    while (match := re.match(rb"([0-9]{1,9}) ([^=]+)=", text)) is not None and int(match[1]) > match.end():
        found[_text(match[2])] = _text(text[match.end() : int(match[1]) - 1])
        text = text[int(match[1]) :]
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK
