"""Tables (.parquet, .arrow) of which a cell, a column or the file is broken or odd."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from faults.corpus_case import FILLERS, GOOD, Case, Row, colours, put, stored

_ODD = stored(colours(seed=1))
_SIDE = 2_900  # of a large image: 25 MB as a BMP
_SHOWN = Row(("odd",), colours(seed=1))
Change = Callable[[bytes], bytes]


def table_cases() -> Iterator[Case]:
    """All of them."""
    for kind in ("parquet", "arrow"):
        yield from _cells(kind)
        yield from _columns(kind)
        yield from _files(kind)
    yield Case("parquet: text that is not UTF-8", partial(_write_table, "parquet", {"text": _not_text(FILLERS + 1)}), "rows.parquet", bad={"rows.parquet:0": "'text' is not UTF-8; save it as UTF-8"}, fillers=FILLERS, streams=True)
    yield Case("arrow: text that is not UTF-8", partial(_write_table, "arrow", {"text": _not_text(FILLERS + 1)}), "rows.arrow", bad={"rows.arrow:0": "'text' is not UTF-8; save it as UTF-8"}, fillers=FILLERS)
    yield Case("arrow: offsets that lead out of the file", partial(_write_table, "arrow", {"text": _lost(FILLERS + 1)}), "rows.arrow", refused="is not a readable .arrow file")
    yield Case("arrow: random-access, cut", partial(_write_file, "arrow", lambda content: content[: len(content) // 2], True), "rows.arrow", refused="is not a readable .arrow file", checked="is not readable")
    yield Case("arrow: a length that asks for 16 terabytes", _asks, "rows.arrow", refused="rows.arrow is not a readable .arrow file: it asks for more memory than there is", checked="is not readable")
    for kind in ("parquet", "arrow"):
        yield Case(f"{kind}: six images of 24 MB", partial(_large, kind), f"rows.{kind}", rows={f"rows.{kind}:{each}": Row(("x",), (_SIDE, _SIDE)) for each in range(6)}, fillers=FILLERS)
    yield Case("parquet: folders with two links to the folder above", _looped, "rows/**/*.parquet", rows={"below/rows.parquet:0": _SHOWN}, fillers=FILLERS)
    yield Case("saved dataset: its file is not there", partial(_saved, "gone.arrow"), "rows", refused="cannot be loaded", checked="is not readable")
    for called, name in (("by ..", "../rows.arrow"), ("by .. further on", "x/../../rows.arrow"), ("by its whole path", "/etc/passwd")):
        yield Case(f"saved dataset: its file lies outside, {called}", partial(_saved, name), "rows", refused=f"names '{name}', which lies outside of it", checked=f"state.json names '{name}', which lies outside of it")


def _not_text(rows: int) -> pa.Array:
    """Texts of which the first is three bytes that are not UTF-8."""
    ends = np.arange(rows + 1, dtype=np.int32) + 2
    ends[0] = 0
    return pa.StringArray.from_buffers(rows, pa.py_buffer(ends), pa.py_buffer(b"\xff\xfe\xfd" + b"x" * rows))


def _lost(rows: int) -> pa.Array:
    """Texts of which all but the first and the last lie a gigabyte behind the end."""
    ends = np.full(rows + 1, 2**30, dtype=np.int32)
    ends[0], ends[-1] = 0, 3
    return pa.StringArray.from_buffers(rows, pa.py_buffer(ends), pa.py_buffer(b"xyz"))


def _table(changes: Mapping[str, Any]) -> pa.Table:
    columns: dict[str, Any] = {"image": [_ODD] + [GOOD] * FILLERS, "text": ["odd"] + ["x"] * FILLERS, **changes}
    return pa.table({name: values for name, values in columns.items() if values is not None})


def _write_table(kind: str, changes: Mapping[str, Any], folder: Path, is_random_access: bool = False) -> None:
    table, place = _table(changes), folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, place)
        return
    with pa.OSFile(str(place), "wb") as file, (pa.ipc.new_file if is_random_access else pa.ipc.new_stream)(file, table.schema) as writer:
        writer.write_table(table)


def _write_file(kind: str, change: Change, is_random_access: bool, folder: Path) -> None:
    _write_table(kind, {}, folder, is_random_access)
    put(folder / f"rows.{kind}", change((folder / f"rows.{kind}").read_bytes()))


def _case(kind: str, name: str, changes: Mapping[str, Any], *, bad: str = "", good: Row | None = None, broken: str = "", asked: Mapping[str, Any] | None = None) -> Case:
    """A table whose row 0 is odd."""
    key = f"rows.{kind}:0"
    return Case(
        f"{kind}: {name}",
        partial(_write_table, kind, changes),
        f"rows.{kind}",
        rows={key: good} if good else {},
        bad={key: bad} if bad else {},
        broken={key: broken} if broken else {},
        fillers=FILLERS,
        asked=asked or {},
        streams=kind == "parquet",
    )


def _cells(kind: str) -> Iterator[Case]:
    images = [GOOD] * FILLERS
    yield _case(kind, "an image of no byte", {"image": [b"", *images]}, bad="target: the file is empty")
    yield _case(kind, "a null image", {"image": [None, *images]}, bad="'image' holds no images; it must hold one")
    yield _case(kind, "a null prompt", {"text": [None] + ["x"] * FILLERS}, bad="no prompt in 'text'")
    yield _case(kind, "an image cut in the middle", {"image": [_ODD[: len(_ODD) // 2], *images]}, broken="broken PNG file")
    yield _case(kind, "an image that is text", {"image": [b"hello", *images]}, bad="target: not an image")
    yield _case(kind, "an image that is 30 MB of zeros", {"image": [bytes(30_000_000), *images]}, bad="target: not an image")
    yield _case(kind, "a struct with neither bytes nor path", {"image": [{"bytes": None, "path": None}, *({"bytes": GOOD, "path": None} for _ in images)]}, bad="'image' holds no images")
    yield _case(kind, "a path to /etc/passwd in the place of an image", {"image": [{"bytes": None, "path": "/etc/passwd"}, *({"bytes": GOOD, "path": None} for _ in images)]}, bad="lies outside")
    yield _case(kind, "a width and height that are not the image's", {"width": [5_000] * (FILLERS + 1), "height": [5_000] * (FILLERS + 1)}, good=_SHOWN)
    yield _case(kind, "a prompt with a zero character", {"text": ["a\0b"] + ["x"] * FILLERS}, bad="zero character")
    yield _case(kind, "a list of prompts", {"text": [["one", "two"], *([["x"]] * FILLERS)]}, good=Row(("one", "two"), colours(seed=1)))


def _columns(kind: str) -> Iterator[Case]:
    def whole(name: str, changes: Mapping[str, Any], words: str, checked: str = "") -> Case:
        return Case(f"{kind}: {name}", partial(_write_table, kind, changes), f"rows.{kind}", refused=words, checked=checked)

    yield whole("no column for the image", {"image": None}, "no column for the target (columns: 'text')", "no column is called image")
    yield whole("no column for the prompt", {"text": None}, "no column for the prompt (columns: 'image')", "no column is called prompt")
    yield whole("two columns for the prompt", {"caption": ["y"] * (FILLERS + 1)}, "could each be the prompt", "could each be the prompt")
    yield whole("images that are numbers", {"image": [7] * (FILLERS + 1)}, f"{FILLERS + 1} of {FILLERS + 1} rows are bad")
    yield whole("prompts that are numbers", {"text": [1.5] * (FILLERS + 1)}, "'text' holds a number, not text")
    yield whole("no rows", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, "it holds no rows")


def _files(kind: str) -> Iterator[Case]:
    words = f"is not a readable {'parquet file' if kind == 'parquet' else '.arrow file'}"
    changes: dict[str, Change] = {
        "no byte at all": lambda content: b"",
        "cut in its first bytes": lambda content: content[:6],
        "cut in the middle": lambda content: content[: len(content) // 2],
        "its last byte is missing": lambda content: content[:-1],
        "text": lambda content: b"hello, this is no table at all" * 10,
    }
    for name, change in changes.items():
        yield Case(f"{kind}: {name}", partial(_write_file, kind, change, False), f"rows.{kind}", refused=words, checked="is not readable")
    if kind == "parquet":

        def flipped(content: bytes) -> bytes:
            return content[:40] + bytes(byte ^ 0xFF for byte in content[40:200]) + content[200:]

        yield Case("parquet: a damaged page", partial(_write_file, kind, flipped, False), "rows.parquet", refused=f"{FILLERS + 1} of {FILLERS + 1} rows are bad")
        yield Case("parquet: it is a PNG", lambda folder: put(folder / "rows.parquet", GOOD), "rows.parquet", refused=words, checked="is not readable")
        yield Case("parquet: it is zlib", lambda folder: put(folder / "rows.parquet", zlib.compress(bytes(10_000_000))), "rows.parquet", refused=words, checked="is not readable")


def _asks(folder: Path) -> None:
    """A compressed table of which one buffer says that it is 16 terabytes once unpacked."""
    table, place = _table({}), folder / "rows.arrow"
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    content = bytearray(place.read_bytes())
    at = content.rindex((len(_ODD) + FILLERS * len(GOOD)).to_bytes(8, "little"))
    content[at : at + 8] = (2**44).to_bytes(8, "little")
    place.write_bytes(content)


def _large(kind: str, folder: Path) -> None:
    images = [stored(Image.new("RGB", (_SIDE, _SIDE)), "BMP")] * 6 + [GOOD] * FILLERS
    table, place = pa.table({"image": images, "text": ["x"] * len(images)}), folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, place, row_group_size=1)
        return
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _looped(folder: Path) -> None:
    (folder / "rows" / "below").mkdir(parents=True)
    _write_table("parquet", {}, folder / "rows" / "below")
    for name in ("first", "second"):
        (folder / "rows" / "below" / name).symlink_to(folder / "rows")


def _saved(name: str, folder: Path) -> None:
    _write_table("arrow", {}, folder)
    put(folder / "rows" / "state.json", '{"_data_files": [{"filename": "' + name + '"}], "_fingerprint": "x", "_format_columns": null, "_format_kwargs": {}, "_format_type": null, "_output_all_columns": false, "_split": null}')
    put(folder / "rows" / "dataset_info.json", "{}")
