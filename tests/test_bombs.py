"""What is told before it is read leaves ordinary files alone; what is done in parts gives what is done at once."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mixing import bombs, images, records, survey
from mixing.arrow_rows import check_layout, rows_of
from mixing.bad_rows import BadRow, SourceError, shown
from mixing.bombs import named_bytes, num_scans
from mixing.images import FORMATS, decode, may_be_image
from mixing.records import object_in
from mixing.source import open_source
from stages.explain import _refused

NOISE = np.random.default_rng(3)


def stored(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_of_ordinary_tiffs_name_no_more_than_there_is(big: bool, order: str) -> None:
    image = Image.fromarray(NOISE.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = stored(image, "TIFF", big_tiff=big, description="x" * 10_000)
    assert named_bytes(io.BytesIO(content)) == 0
    assert named_bytes(io.BytesIO(content[:5])) == named_bytes(io.BytesIO(b"")) == named_bytes(io.BytesIO(b"hello" * 9)) == 0


@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_that_name_the_same_bytes_are_counted_each_time(order: str) -> None:
    start = {"<": b"II", ">": b"MM"}[order]
    number = lambda value, width: value.to_bytes(width, "little" if order == "<" else "big")  # noqa: E731
    tags = b"".join(number(40_000 + each, 2) + number(7, 2) + number(1_000_000, 4) + number(0, 4) for each in range(100))
    content = start + number(42, 2) + number(8, 4) + number(100, 2) + tags + bytes(1_000_000)
    assert named_bytes(io.BytesIO(content)) == 100 * 1_000_000
    damaged = content[:20] + b"\xff\xff\xff\xff" + content[24 : 22 + 12]  # one tag that claims four gigabytes, and no more of the file
    assert named_bytes(io.BytesIO(damaged)) == 0


def test_scans_are_counted_across_the_blocks_in_which_a_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(Image.fromarray(NOISE.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG", progressive=True)
    for block in (2**20, 1, 2, 3):
        monkeypatch.setattr(bombs, "_BLOCK", block)
        assert num_scans(io.BytesIO(content)) == 10


@pytest.mark.parametrize(
    ("image", "format"),
    [
        (Image.fromarray(NOISE.integers(0, 256, (37, 5, 4), dtype=np.uint8)), "PNG"),
        (Image.fromarray(NOISE.integers(0, 2**16, (37, 5), dtype=np.uint16)), "PNG"),
        (Image.fromarray(NOISE.random((37, 5), dtype=np.float32)), "TIFF"),
        (Image.fromarray(NOISE.integers(0, 256, (37, 5, 3), dtype=np.uint8)).quantize(40), "GIF"),
    ],
    ids=["RGBA", "16-bit grey", "float", "palette"],
)
def test_an_image_that_is_changed_in_bands_is_the_same(image: Image.Image, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(image, format, **({"transparency": 3} if format == "GIF" else {}))
    whole = np.asarray(decode(content))
    for pixels in (1, 5, 10, 35):
        monkeypatch.setattr(images, "_AT_ONCE", pixels)
        assert np.array_equal(np.asarray(decode(content)), whole)


def test_the_beginning_of_every_format_that_is_read_may_be_an_image_and_other_bytes_may_not() -> None:
    image = Image.new("RGB", (8, 8))
    for format in FORMATS:
        assert may_be_image(stored(image, format)[:32]), format
    for other in (b"hello, this is text", bytes(32), b"\x1f\x8b" + bytes(30), b"PK\3\4" + bytes(30), b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg xmlns='http://w3.org'>"):
        assert not may_be_image(other)


def test_a_key_given_twice_is_told_and_nested_ones_are_left_alone() -> None:
    assert object_in('{"a": 1, "b": 2, "b": 3}', "it") == "it gives 'b' twice; keep one"
    assert object_in('{"a": {"b": 1, "b": 2, "c": 3}}', "it") == {"a": {"b": 2, "c": 3}}
    assert object_in("[]", "it") == "it is JSON, but not an object {...}"


def test_lines_behind_one_that_is_too_long_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST", 30)
    for length in (10, 31, 60, 61, 100):
        (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * length + '"}\n{"a": 3}')
        found = list(records.records(str(tmp_path / "x.jsonl")))
        assert found[0] == (1, {"a": 1})
        assert found[2:] == [(3, {"a": 3})]
        assert found[1] == (2, {"a": "x" * length} if length == 10 else "the line is longer than 30 bytes")
        (tmp_path / "x.csv").write_text("a,b\n1,2\n3," + "x" * length + '\n"4\n",5\n6')
        assert list(records.records(str(tmp_path / "x.csv"))) == [
            (2, {"a": "1", "b": "2"}),
            (3, {"a": "3", "b": "x" * length} if length == 10 else "the line is not CSV: it is longer than 30 characters"),
            (4, {"a": "4\n", "b": "5"}),
            (6, "1 cell, and the header line names 2; a cell with a comma stands between double quotes"),
        ]


def test_a_long_cell_of_one_line_is_one_bad_row_and_no_open_quote(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n" + "x" * (csv.field_size_limit() + 1) + "\ny\n")
    (number, reason), last = records.records(str(tmp_path / "x.csv"))
    assert number == 2
    assert "field larger than field limit" in str(reason)
    assert last == (3, {"a": "y"})


def test_a_row_whose_text_is_not_utf8_is_told_and_its_neighbours_are_read() -> None:
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 2, 3], dtype=np.int32)), pa.py_buffer(b"a\xffc"))
    table = pa.table({"number": [1, 2, 3], "text": texts})
    check_layout(table)
    assert rows_of(table) == [{"number": 1, "text": "a"}, "'text' is not UTF-8; save it as UTF-8", {"number": 3, "text": "c"}]


def test_offsets_that_lead_out_of_memory_are_refused() -> None:
    for ends in ([0, 2**30, 3], [0, -5, 3]):
        texts = pa.StringArray.from_buffers(2, pa.py_buffer(np.array(ends, dtype=np.int32)), pa.py_buffer(b"abc"))
        with pytest.raises(pa.ArrowInvalid):
            check_layout(pa.table({"text": texts}))


def test_long_fields_and_large_images_of_a_tar_are_read_whole(tmp_path: Path) -> None:
    pixels = NOISE.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    words = "word " * 20_000
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for name, content in (("a.webp", stored(Image.fromarray(pixels), "WEBP", lossless=True)), ("a.json", json.dumps({"text": words}).encode()), ("b.png", stored(Image.fromarray(pixels), "PNG")), ("b.txt", words.encode())):
            assert len(content) > 2**15
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for prompt, row in (("text", "a"), ("txt", "b")):
        source = open_source("s", path="rows.tar", task="text_to_image", columns={"prompt": prompt}, prompt="none", split="train", on_bad_row="skip", root=tmp_path)
        (example,) = (source.example(number) for number in range(len(source)) if source.key(number) == f"rows.tar:{row}")
        assert example.prompt == words.strip()
        assert np.array_equal(np.asarray(example.target), pixels)


def test_long_names_are_cut_in_messages() -> None:
    assert shown("it's") == '"it\'s"'
    assert shown("n" * 1000) == f"'{'n' * 200}'... (1,000 characters)"


def test_a_source_of_which_most_is_bad_is_refused_before_it_is_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_GIVEN_UP", 20)
    (tmp_path / "x.png").write_bytes(stored(Image.new("RGB", (4, 4)), "PNG"))
    good, bad = '{"image": "x.png", "text": "x"}\n', '{"image": "gone.png", "text": "x"}\n'

    def opened(text: str) -> None:
        (tmp_path / "rows.jsonl").write_text(text)
        open_source("s", path="rows.jsonl", task="text_to_image", columns={}, prompt=None, split="train", on_bad_row="skip", root=tmp_path)

    with pytest.raises(SourceError, match=r"20 of the first 29 rows are bad; at most 1% are skipped; repair or remove them: 'rows.jsonl:10': no file 'gone.png'.*; and 15 more"):
        opened(9 * good + 50 * bad + 10_000 * good)
    with pytest.raises(SourceError, match="20 of 70 rows are bad"):
        opened(50 * good + 20 * bad)
    opened(15 * bad + 2_000 * good)


def test_names_in_the_list_of_refused_rows_cannot_change_the_terminal() -> None:
    bad = tuple(BadRow("s", key, "it is empty") for key in ("\x1b[31mred.png", "line\nbreak.png", "plain.png"))
    text = _refused("s", cast(Any, SimpleNamespace(source=SimpleNamespace(bad=bad)))).plain
    assert text.splitlines()[1:] == ["  '\\x1b[31mred.png': it is empty", "  'line\\nbreak.png': it is empty", "  plain.png: it is empty"]
