"""Records: the rows of a .jsonl, .json or .csv file, as they stand in it."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from io import TextIOWrapper
from typing import BinaryIO, TextIO

from mixing.bad_rows import SourceError, shown
from mixing.json_list import JsonListError, list_values
from mixing.plain_file import open_plain

SUFFIXES = (".jsonl", ".json", ".csv")
"""What the name of a file of records ends in."""

Record = dict[str, object]
"""Column to value."""

LONGEST = 2**23
"""Bytes of the longest line that is read, and characters of the longest object of a .json: a damaged file can be one of any length, and in Python eight megabytes can become two hundred."""

MOST_TEXT = 2**20
"""Bytes of the largest file, or member of a tar, that is read as one row's text or fields."""

_HALF = range(0xDC80, 0xDD00)  # what `surrogateescape` puts in the place of a byte that is not UTF-8


def records(file: str, typed: Collection[str] = ()) -> Iterator[tuple[int, Record | str]]:
    """Every row with the number that messages name it by, counted from 1, or in the place of a broken row what is wrong with it.

    A .jsonl has one object a line, a .csv a header line and then one row a line (cells are text, or None where empty): the number is that of
    the line. A .json is a list of objects: the number is that of the object. Blank lines are passed over.
    typed: columns of a .csv whose cells are numbers if all of them are. Raises SourceError if the file as a whole cannot be read.
    """
    check_file(file)
    try:
        if file.endswith(".csv"):
            yield from _rows(file, _numeric(file, typed) if typed else ())
        elif file.endswith(".json"):
            yield from _objects(file)
        else:
            yield from _lines(file)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error


def check_file(file: str) -> None:
    """Raise SourceError for a pipe, a socket or a device: to open one waits, and to read one may never end."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise SourceError(f"{file} is not a file but a pipe, a socket or a device; write what it gives into a file")


def object_in(text: str, called: str) -> Record | str:
    """The JSON object that a text is, or what is wrong with it. called: what messages call the text."""
    try:
        value = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        return f"{called} is not JSON: {error}"
    return _looked_at(value, called)


class _Twice(dict[str, object]):
    """An object that gives a key twice, of which json.loads keeps the last in silence."""

    key = ""
    """That key."""


def _pairs(pairs: list[tuple[str, object]]) -> Record:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = _Twice(found)
    ((twice.key, _),) = Counter(name for name, _ in pairs).most_common(1)
    return twice


def _looked_at(value: object, called: str) -> Record | str:
    if isinstance(value, _Twice):
        return f"{called} gives {shown(value.key)} twice; keep one"
    return value if isinstance(value, dict) else f"{called} is JSON, but not an object {{...}}"


def _lines(file: str) -> Iterator[tuple[int, Record | str]]:
    with open_plain(file) as lines:
        for number, line in enumerate(_each_line(lines), 1):
            if line is None:
                yield number, f"the line is longer than {LONGEST:,} bytes"
                continue
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, _object(text)


def _each_line(lines: BinaryIO) -> Iterator[bytes | None]:
    """Every line; None for one that is too long, of which no more than that is held."""
    while line := lines.readline(LONGEST + 1):
        if len(line) <= LONGEST:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = lines.readline(LONGEST)
        yield None


def _object(line: bytes) -> Record | str:
    try:
        return object_in(line.decode("utf-8"), "the line")
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 ({error.reason} at byte {error.start + 1})"


def _objects(file: str) -> Iterator[tuple[int, Record | str]]:
    try:
        with open_plain(file) as opened:
            for number, value in enumerate(list_values(opened, LONGEST, _pairs), 1):
                yield number, _looked_at(value, "it")
    except JsonListError as error:
        raise SourceError(f"{os.path.basename(file)} {error}") from error


def _rows(file: str, numbers: Collection[str]) -> Iterator[tuple[int, Record | str]]:
    header: list[str] | None = None
    for number, cells in _cells(file):
        if header is None:
            header = _header(os.path.basename(file), cells)
        elif isinstance(cells, str):
            yield number, cells
        elif len(cells) != len(header):
            count = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
            yield number, f"{count}, and the header line names {len(header)}; a cell with a comma stands between double quotes"
        elif any(map(_is_not_text, cells)):
            yield number, "the line is not UTF-8; save the file as UTF-8"
        else:
            pairs = zip(header, cells, strict=True)
            yield number, {name: _number(cell) if name in numbers else cell or None for name, cell in pairs}


def _cells(file: str) -> Iterator[tuple[int, list[str] | str]]:
    """The cells of every line that is not blank, by the line's number, or what is wrong with it."""
    with TextIOWrapper(open_plain(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = _Lines(text)
        reader = csv.reader(lines, strict=True)
        while True:
            number = lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                # Python 3.11, _csv.c: the file ends inside quotes; or a cell of many lines is too long, and what it has swallowed would be lost in silence.
                if str(error) == "unexpected end of data" or ("field limit" in str(error) and lines.number > number):
                    name = os.path.basename(file)
                    raise SourceError(f"{name}:{number}: a double quote is opened and never closed; close it, or double it") from error
                yield number, f"the line is not CSV: {error}"
                continue
            if any(cells):
                yield number, cells


class _Lines:
    """The lines of a file, counted; a csv.Error in the place of one that is too long."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.number = 0
        """Of the last line that was given."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > LONGEST:
            while line and not line.endswith("\n"):
                line = self._text.readline(LONGEST)
            raise csv.Error(f"it is longer than {LONGEST:,} characters")
        return line


def _header(name: str, cells: list[str] | str) -> list[str]:
    if isinstance(cells, str):
        raise SourceError(f"the header line of {name} cannot be read: {cells}")
    if any(map(_is_not_text, cells)):
        raise SourceError(f"the header line of {name} is not UTF-8; save the file as UTF-8")
    header = [cell.strip() for cell in cells]
    if twice := next((cell for cell in header if header.count(cell) > 1), None):
        raise SourceError(f"the header line of {name} names '{twice}' twice; give each column a name of its own")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise SourceError(f"the header line of {name} is one column, {header[0]!r}; separate columns by commas, not by {other!r}")
    return header


def _is_not_text(cell: str) -> bool:
    """Whether some of a cell is not UTF-8."""
    return any(ord(character) in _HALF for character in cell if character > "\ud7ff")


def _numeric(file: str, names: Collection[str]) -> set[str]:
    """Which columns of a .csv hold numbers, at least one, and nothing else."""
    found: set[str] = set()
    others: set[str] = set()
    for _, row in _rows(file, ()):
        for name in names:
            if isinstance(row, dict) and (cell := row.get(name)) is not None:
                (found if isinstance(_number(str(cell)), int | float) else others).add(name)
    return found - others


def _number(cell: str) -> object:
    """The number that a cell writes; the cell itself if it writes none, and None if it is empty."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None
