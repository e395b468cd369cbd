"""Records: the rows of a .jsonl, .json or .csv file, as they stand in it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterator

from mixing.bad_rows import SourceError

SUFFIXES = (".jsonl", ".json", ".csv")
"""What the name of a file of records ends in."""

Record = dict[str, object]
"""Column to value."""

_HALF = range(0xDC80, 0xDD00)  # what `surrogateescape` puts in the place of a byte that is not UTF-8


def records(file: str, typed: Collection[str] = ()) -> Iterator[tuple[int, Record | str]]:
    """Every row with the number that messages name it by, counted from 1, or in the place of a broken row what is wrong with it.

    A .jsonl has one object a line, a .csv a header line and then one row a line (cells are text, or None where empty): the number is that of
    the line. A .json is a list of objects: the number is that of the object. Blank lines are passed over.
    typed: columns of a .csv whose cells are numbers if all of them are. Raises SourceError if the file as a whole cannot be read.
    """
    try:
        if file.endswith(".csv"):
            yield from _rows(file, _numeric(file, typed) if typed else ())
        elif file.endswith(".json"):
            yield from _objects(file)
        else:
            yield from _lines(file)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error


def _lines(file: str) -> Iterator[tuple[int, Record | str]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, _object(text)


def _object(line: bytes) -> Record | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 ({error.reason} at byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return value if isinstance(value, dict) else "the line is JSON, but not an object {...}"


def _objects(file: str) -> Iterator[tuple[int, Record | str]]:
    name = os.path.basename(file)
    try:
        with open(file, encoding="utf-8-sig") as text:
            value = json.load(text)
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name} is not JSON: {error}; one object a line is a .jsonl") from error
    if not isinstance(value, list):
        raise SourceError(f"{name} is JSON, but not a list of objects [{{...}}, {{...}}]; write one, or a .jsonl")
    for number, each in enumerate(value, 1):
        yield number, each if isinstance(each, dict) else "it is JSON, but not an object {...}"


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
        elif any(ord(character) in _HALF for cell in cells for character in cell if character > "\ud7ff"):
            yield number, "the line is not UTF-8; save the file as UTF-8"
        else:
            pairs = zip(header, cells, strict=True)
            yield number, {name: _number(cell) if name in numbers else cell or None for name, cell in pairs}


def _cells(file: str) -> Iterator[tuple[int, list[str] | str]]:
    """The cells of every line that is not blank, by the line's number, or what is wrong with it."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if str(error) == "unexpected end of data":  # Python 3.11, _csv.c: the file ends inside quotes
                    name = os.path.basename(file)
                    raise SourceError(f"{name}:{number}: a double quote is opened and never closed; close it, or double it") from error
                yield number, f"the line is not CSV: {error}"
                continue
            if any(cells):
                yield number, cells


def _header(name: str, cells: list[str] | str) -> list[str]:
    if isinstance(cells, str):
        raise SourceError(f"the header line of {name} cannot be read: {cells}")
    header = [cell.strip() for cell in cells]
    if twice := next((cell for cell in header if header.count(cell) > 1), None):
        raise SourceError(f"the header line of {name} names '{twice}' twice; give each column a name of its own")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise SourceError(f"the header line of {name} is one column, {header[0]!r}; separate columns by commas, not by {other!r}")
    return header


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
