"""Files of records (.jsonl, .json, .csv) of which a line, a cell or the whole is broken or odd."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from faults.corpus_case import FILLERS, GOOD, Case, Row, Values, colours, fill, lines, put, several, stored

_OTHER = colours(seed=1)
_GOOD = {"image": "filler000.png", "text": "x"}
_EDIT = {"task": "edit"}
_PIPE = "is not a file but a pipe, a socket or a device"


def record_cases() -> Iterator[Case]:
    """All of them."""
    yield from _lines()
    yield from _cells()
    yield from _references()
    yield from _places()
    yield from _csv()
    yield from _json()
    yield from _special_files()


def _case(name: str, *odd: Mapping[str, object] | str | bytes, bad: str = "", prompt: str = "", references: tuple[Values, ...] = (), asked: Mapping[str, Any] | None = None, more: Mapping[str, bytes] | None = None) -> Case:
    """A .jsonl whose line 3 is odd: bad for this reason, or good with this prompt and the target odd.png."""
    return Case(
        name,
        partial(_write_lines, odd, more or {}),
        "rows/rows.jsonl",
        rows={"odd.png": Row((prompt,), _OTHER, references=references)} if prompt else {},
        bad={"rows.jsonl:3": bad} if bad else {},
        fillers=FILLERS,
        asked=asked or {},
    )


def _write_lines(odd: Sequence[Mapping[str, object] | str | bytes], more: Mapping[str, bytes], folder: Path) -> None:
    fill(folder / "rows", 1)
    put(folder / "rows" / "odd.png", stored(_OTHER))
    for name, content in more.items():
        put(folder / "rows" / name, content)
    fillers = [{**_GOOD, "reference": "filler000.png"}] * FILLERS
    written = [each if isinstance(each, bytes) else lines([each]).encode() for each in odd]
    put(folder / "rows" / "rows.jsonl", lines(fillers[:2]).encode() + b"".join(written) + lines(fillers[2:]).encode())


def _lines() -> Iterator[Case]:
    odd = {"image": "odd.png", "text": "odd"}
    yield _case("jsonl: a line that is cut", '{"image": "odd.png", "te', bad="the line is not JSON")
    yield _case("jsonl: a line that is a list", "[1, 2]", bad="not an object {...}")
    yield _case("jsonl: a line that is a number", "7", bad="not an object {...}")
    yield _case("jsonl: blank lines are passed over", "", "   ", odd, prompt="odd")
    yield _case("jsonl: a line in Latin-1", '{"image": "odd.png", "text": "läuft"}\n'.encode("latin-1"), bad="the line is not UTF-8")
    yield _case("jsonl: a line of NUL bytes", bytes(300) + b"\n", bad="the line is not JSON")
    yield _case("jsonl: a key given twice", '{"image": "filler000.png", "image": "odd.png", "text": "odd"}', bad="the line gives 'image' twice; keep one")
    yield _case("jsonl: NaN in a column that is not used", '{"image": "odd.png", "text": "odd", "score": NaN}', prompt="odd")
    yield _case("jsonl: NaN for a prompt", '{"image": "odd.png", "text": NaN}', bad="'text' holds a number, not text")
    yield _case("jsonl: nested 10,000 deep", '{"image": "odd.png", "text": "odd", "x": ' + "[" * 10_000 + "]" * 10_000 + "}", bad="the line is not JSON")
    yield _case("jsonl: nested 1,000,000 deep", "[" * 1_000_000, bad="the line is not JSON")
    yield _case("jsonl: a number of 100,000 digits", '{"image": "odd.png", "text": "odd", "x": ' + "9" * 100_000 + "}", bad="the line is not JSON")
    yield _case("jsonl: a line of 100 MB", b'{"image": "odd.png", "text": "' + b"word " * 20_000_000 + b'"}\n', bad="the line is longer than 8,388,608 bytes")
    yield _case("jsonl: a line of 100 MB that is cut", b'{"image": "' + bytes(100_000_000) + b"\n", bad="the line is longer than 8,388,608 bytes")
    yield _case("jsonl: a byte order mark and Windows line ends", b'{"image": "odd.png", "text": "odd"}\r\n', prompt="odd")
    yield Case("jsonl: in UTF-16", partial(_utf16, "rows.jsonl"), "rows/rows.jsonl", refused="holds no rows; rows.jsonl:1: the line is not UTF-8", checked="holds no rows")
    yield Case("jsonl: no byte at all", lambda folder: put(folder / "rows.jsonl", b""), "rows.jsonl", refused="holds no rows", checked="holds no rows")
    yield Case("jsonl: not a line is JSON", lambda folder: put(folder / "rows.jsonl", "hello\nworld\n"), "rows.jsonl", refused="rows.jsonl:1: the line is not JSON", checked="rows.jsonl:1: the line is not JSON")
    yield Case("jsonl: no column for the prompt", lambda folder: put(folder / "rows.jsonl", '{"image": "x.png", "words": "x"}\n'), "rows.jsonl", refused="no column for the prompt (columns: 'image', 'words')", checked="no column is called prompt")


def _utf16(name: str, folder: Path) -> None:
    fill(folder / "rows", 1)
    put(folder / "rows" / name, (lines([_GOOD]) * 3).encode("utf-16"))


def _cells() -> Iterator[Case]:
    long = "a very long caption, " * 500
    yield _case("cell: a prompt of 10,000 characters", {"image": "odd.png", "text": long}, prompt=long.strip())
    yield _case("cell: a prompt with an emoji in two halves", '{"image": "odd.png", "text": "\\ud83d\\ude00"}', prompt="😀")
    yield _case("cell: a prompt with half an emoji", '{"image": "odd.png", "text": "\\ud83d"}', bad="half of a surrogate pair")
    yield _case("cell: a prompt with a zero character", {"image": "odd.png", "text": "a\0b"}, bad="zero character")
    yield _case("cell: an empty prompt", {"image": "odd.png", "text": "  "}, bad="no prompt in 'text'")
    yield _case("cell: a prompt that is a mapping", {"image": "odd.png", "text": {"en": "odd"}}, bad="'text' holds a mapping, not text")
    yield _case("cell: no target", {"text": "odd"}, bad="'image' holds no images; it must hold one")
    yield _case("cell: two targets", {"image": ["odd.png", "odd.png"], "text": "odd"}, bad="'image' holds 2 images; it must hold one")
    yield _case("cell: a target that is a number", {"image": 7, "text": "odd"}, bad="'image' holds a number, not an image or a path")
    yield _case("cell: a target that is an address", {"image": "https://example.com/a.png", "text": "odd"}, bad="no file 'https://example.com/a.png'")
    yield _case("cell: a target that is a folder", {"image": ".", "text": "odd"}, bad="is not a file")
    yield _case("cell: a target with a name of 100,000 characters", {"image": "n" * 100_000, "text": "odd"}, bad=_cut_name("n"))
    yield _case("cell: a target with half an emoji", '{"image": "\\ud83d.png", "text": "odd"}', bad="is not a name in UTF-8")


def _cut_name(letter: str) -> str:
    return f"no file '{letter * 50}"


def _references() -> Iterator[Case]:
    row = {"image": "odd.png", "reference": "filler000.png", "text": "odd"}
    yield _case("reference: it is the target itself", {**row, "reference": "odd.png"}, prompt="odd", references=(_OTHER,), asked=_EDIT)
    yield _case("reference: none", {**row, "reference": []}, bad="no reference in 'reference'; task 'edit' needs one or more", asked=_EDIT)
    yield _case("reference: it is not there", {**row, "reference": "gone.png"}, bad="no file 'gone.png'", asked=_EDIT)
    yield _case("reference: it is no image", {**row, "reference": "rows.jsonl"}, bad="reference 1 'rows.jsonl': not an image", asked=_EDIT)
    yield _case("reference: 300 of them", {**row, "reference": ["filler000.png"] * 300}, bad="300 references; at most 255 are read", asked=_EDIT)
    yield _case("placeholder: of a reference that is not there", {**row, "text": "<img><|image_1|></img> and <img><|image_2|></img>"}, bad="the prompt names image 2, and the row has 1 reference", asked=_EDIT)
    yield _case("placeholder: counted from 0", {**row, "text": "<img><|image_0|></img>"}, bad="the prompt names image 0, and the row has 1 reference", asked=_EDIT)
    yield _case("placeholder: one of two references is not named", {**row, "reference": ["odd.png", "odd.png"], "text": "as <|image_2|>"}, bad="but not image 1", asked=_EDIT)
    yield _case("placeholder: number of 5,000 digits", {**row, "text": f"<|image_{'9' * 5000}|>"}, bad="the prompt names image 9", asked=_EDIT)


def _places() -> Iterator[Case]:
    for called, name in (("../../etc/passwd", "../../../../../../../../etc/passwd"), ("/etc/passwd", "/etc/passwd"), ("a folder beside", "../beside.png"), ("~root", "~root/.bashrc")):
        reason = "no file '~root" if name.startswith("~") else f"{name!r} lies outside"
        yield _case(f"outside: a line names {called}", {"image": name, "text": "odd"}, bad=reason, more={"../beside.png": GOOD})
    yield _case("outside: a way out and in again", {"image": "../rows/odd.png", "text": "odd"}, prompt="odd")
    yield _case("outside: a zero character in a name", {"image": "odd.png\0.txt", "text": "odd"}, bad="holds a zero character")
    yield Case("metadata: it names an image that is not there", partial(_metadata, "gone.png"), bad={"metadata.jsonl:1": "no file 'gone.png'"}, fillers=FILLERS)
    yield Case("metadata: it names /etc/passwd by ..", partial(_metadata, "../" * 12 + "etc/passwd"), bad={"metadata.jsonl:1": "lies outside"}, fillers=FILLERS)
    yield Case("metadata: .jsonl and .csv side by side", _two_metadata, refused="holds metadata.jsonl and metadata.csv; keep the one that is meant")


def _metadata(name: str, folder: Path) -> None:
    fill(folder / "rows")
    put(folder / "rows" / "metadata.jsonl", lines([{"file_name": each, "text": "x"} for each in (name, *(f"filler{each:03}.png" for each in range(FILLERS)))]))


def _two_metadata(folder: Path) -> None:
    _metadata("filler000.png", folder)
    put(folder / "rows" / "metadata.csv", "file_name,text\nfiller000.png,x\n")


def _csv_case(name: str, odd: str | bytes, *, bad: str = "", prompt: str = "", refused: str = "", header: str = "image,text", checked: str = "") -> Case:
    """A .csv whose line 3 is odd."""
    return Case(
        f"csv: {name}",
        partial(_write_csv, odd, header),
        "rows/rows.csv",
        rows={"odd.png": Row((prompt,), _OTHER)} if prompt else {},
        bad={"rows.csv:3": bad} if bad else {},
        fillers=0 if refused else FILLERS,
        refused=refused,
        checked=checked,
    )


def _write_csv(odd: str | bytes, header: str, folder: Path) -> None:
    fill(folder / "rows", 1)
    put(folder / "rows" / "odd.png", stored(_OTHER))
    content = odd.encode() if isinstance(odd, str) else odd
    good = b"filler000.png,x\n"
    put(folder / "rows" / "rows.csv", header.encode() + b"\n" + good + content + b"\n" + good * (FILLERS - 1))


def _csv() -> Iterator[Case]:
    yield _csv_case("a cell too many", "odd.png,one,two", bad="3 cells, and the header line names 2; a cell with a comma stands between double quotes")
    yield _csv_case("a cell too few", "odd.png", bad="1 cell, and the header line names 2")
    yield _csv_case("a comma and a line break between quotes", 'odd.png,"one, two\nthree"', prompt="one, two\nthree")
    yield _csv_case("a quote that never closes", 'odd.png,"one', refused="rows.csv:3: a double quote is opened and never closed", checked="a double quote is opened and never closed")
    never = 'odd.png,"one\n' + "filler000.png,x\n" * 20_000
    yield _csv_case("a quote that never closes, and much behind it", never, refused="rows.csv:3: ", checked="rows.csv:3: ")
    yield _csv_case("text behind a closing quote", 'odd.png,"one" two', bad="the line is not CSV")
    yield _csv_case("a line in Latin-1", "odd.png,läuft".encode("latin-1"), bad="the line is not UTF-8")
    yield _csv_case("a NUL byte", b"odd.png,a\0b", bad="zero character")
    yield _csv_case("an empty prompt", "odd.png,", bad="no prompt in 'text'")
    yield _csv_case("a line of 100 MB", b"odd.png," + b"word " * 20_000_000, bad="the line is not CSV: it is longer than 8,388,608 characters")
    yield _csv_case("no column for the prompt", "odd.png,x", header="image,words", refused="no column for the prompt", checked="no column is called prompt")
    yield _csv_case("a column named twice", "odd.png,x", header="image,image", refused="names 'image' twice", checked="names 'image' twice")
    yield _csv_case("semicolons", "odd.png;x", header="image;text", refused="separate columns by commas, not by ';'", checked="separate columns by commas")
    yield Case("csv: in UTF-16", partial(_utf16, "rows.csv"), "rows/rows.csv", refused="the header line of rows.csv is not UTF-8", checked="the header line of rows.csv is not UTF-8")


def _json() -> Iterator[Case]:
    good = json.dumps(_GOOD)
    for called, odd, words in (("an object among the list that is a number", "7", "it is JSON, but not an object"), ("a key given twice", '{"image": "a", "image": "b"}', "it gives 'image' twice; keep one")):
        whole = f"[{', '.join([good, odd, *[good] * (FILLERS - 1)])}]"
        yield Case(f"json: {called}", several(lambda folder: fill(folder, 1), lambda folder, whole=whole: put(folder / "rows.json", whole)), "rows.json", bad={"rows.json:2": words}, fillers=FILLERS)  # type: ignore[misc]
    for called, content, words in (
        ("an object", good, "rows.json is JSON, but not a list of objects"),
        ("cut", f"[{good}, {good[:9]}", "rows.json is not JSON"),
        ("nested 1,000,000 deep", "[" * 1_000_000, "rows.json is not JSON"),
        ("in Latin-1", '[{"image": "ä"}]'.encode("latin-1"), "rows.json is not UTF-8"),
        ("no byte at all", b"", "rows.json is not JSON"),
    ):
        yield Case(f"json: {called}", lambda folder, content=content: put(folder / "rows.json", content), "rows.json", refused=words, checked=words)  # type: ignore[misc]
    longest = "rows.json holds a value of more than 8,388,608 characters (from line 1 on)"
    long = partial(_write_long, '{"image": "filler000.png", "text": "' + "word " * 24_000_000 + '"}')
    yield Case("json: 100 rows and one of 120 MB", long, "rows.json", refused=longest, checked=longest)
    hollow = partial(_write_long, '{"image": "filler000.png", "text": [' + "[]," * 200_000 + "[]]}")
    yield Case("json: a prompt of 200,000 empty lists", hollow, "rows.json", bad={"rows.json:101": "holds a list with a list, not text"}, fillers=FILLERS)
    unused = ", ".join(['{"image": "filler000.png", "text": "x", "unused": "' + "word " * 1_200_000 + '"}'] * 20)
    yield Case("json: 120 rows of 120 MB in all", partial(_write_long, unused), "rows.json", fillers=FILLERS + 20)
    yield Case("json: rows, and behind the list what belongs to none", lambda folder: put(folder / "rows.json", f"[{good}]\n x"), "rows.json", refused="rows.json is not JSON: Extra data: line 2 column 2", checked="Extra data")
    broken = f"[{good},\n{good} {good}]"
    yield Case("json: a comma is missing", lambda folder: put(folder / "rows.json", broken), "rows.json", refused="rows.json is not JSON: Expecting ',' delimiter: line 2 column", checked="Expecting ',' delimiter")


def _write_long(rows: str, folder: Path) -> None:
    """A .json of many rows that goes on for 120 MB behind them."""
    fill(folder, 1)
    put(folder / "rows.json", f"[{', '.join([json.dumps(_GOOD)] * FILLERS)}, {rows}]")


def _special_files() -> Iterator[Case]:
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        yield Case(f"special: FIFO named {name}", lambda folder, name=name: os.mkfifo(folder / name), name, refused=_PIPE, checked="is neither a file nor a folder")  # type: ignore[misc]
        yield Case(f"special: {name} is a link to /dev/zero", lambda folder, name=name: os.symlink("/dev/zero", folder / name), name, refused=_PIPE, checked="is neither a file nor a folder")  # type: ignore[misc]
    yield Case("special: FIFO named metadata.jsonl", several(lambda folder: fill(folder / "rows"), lambda folder: os.mkfifo(folder / "rows/metadata.jsonl")), refused=_PIPE, checked=f"holds {FILLERS} images and no caption")
    for name in ("rows.parquet", "rows.arrow", "rows.tar"):
        yield Case(f"special: FIFO named {name}", lambda folder, name=name: os.mkfifo(folder / name), name, refused=f"no file {name}", checked=name)  # type: ignore[misc]
