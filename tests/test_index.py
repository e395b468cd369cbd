"""A source opened again gives what a first look would give, and looks only at what has changed; many processes give what one gives."""

from __future__ import annotations

import io
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mixing import file_rows, folder, look, survey
from mixing.bad_rows import RowError
from mixing.images import UnreadableImage, header_size
from mixing.index import FORMAT, is_fresh, place_of, read_entry, state, write_entry
from mixing.rows import Found, Good, Stored
from mixing.source import Source, SourceError, open_source
from mixing.tasks import Cells


@pytest.fixture(autouse=True)
def _no_network_and_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def opened(
    root: Path,
    path: str,
    task: str = "text_to_image",
    prompt: str | None = None,
    on_bad_row: Literal["skip", "stop"] = "skip",
    extra: Sequence[str] = (),
    index: bool = True,
) -> Source:
    return open_source(
        "rows",
        path=path,
        task=task,
        columns={},
        prompt=prompt,
        split="train",
        on_bad_row=on_bad_row,
        root=root,
        extra=extra,
        index=root / "index" if index else None,
    )


def png(seed: int, height: int = 6, width: int = 5) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_captions(folder: Path, number: int) -> None:
    for row in range(number):
        write(folder / f"{row:04}.png", png(row, 4 + row % 7, 5 + row % 3))
        write(folder / f"{row:04}.txt", f"caption {row}")


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_edits(folder: Path, number: int) -> None:
    """A rows.jsonl with one to three references a row, of sizes of their own."""
    for row in range(number):
        write(folder / f"target{row}.png", png(row, 4 + row, 5))
        for reference in range(1 + row % 3):
            write(folder / f"reference{row}-{reference}.png", png(100 + row, 3 + reference, 2 + row))
    rows = [
        {"image": f"target{row}.png", "reference": [f"reference{row}-{each}.png" for each in range(1 + row % 3)], "text": f"edit {row}"}
        for row in range(number)
    ]
    write_lines(folder / "rows.jsonl", rows)


def all_of(source: Source) -> dict[str, Any]:
    """Everything that a source says."""
    return {
        "keys": [source.key(row) for row in range(len(source))],
        "cells": [source.rows.cells(row) for row in range(len(source))],
        "num_references": (source.num_references.tolist(), source.num_references.dtype),
        "sizes": (source.sizes.tolist(), source.sizes.dtype, source.sizes.shape),
        "reference_sizes": (source.reference_sizes.tolist(), source.reference_sizes.dtype, source.reference_sizes.shape),
        "extra": {name: values.to_pylist() for name, values in source.extra.items()},
        "bad": source.bad,
        "fingerprint": source.fingerprint,
    }


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the rows that are read, as they are."""
    keys: list[str] = []
    see = look._see

    def noting(found: Found) -> Any:
        keys.append(found.key)
        return see(found)

    monkeypatch.setattr(look, "_see", noting)
    return keys


@pytest.fixture
def _many_may_be_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "MOST_BAD", 0.9)


def settle() -> None:
    """Wait until files written before are no longer fresh."""
    time.sleep(0.06)


# What is remembered.


def write_table(root: Path) -> str:
    columns = {"image": [png(row, 4 + row, 5) for row in range(5)], "text": [f"row {row}" for row in range(5)]}
    parquet.write_table(pa.table({**columns, "style": ["a", "b", None, "a", "b"]}), root / "rows.parquet")
    return "rows.parquet"


def write_jsonl(root: Path) -> str:
    write_edits(root / "edits", 5)
    rows = [json.loads(line) | {"style": "ab"[number % 2]} for number, line in enumerate((root / "edits/rows.jsonl").read_text().splitlines())]
    write_lines(root / "edits/rows.jsonl", rows)
    return "edits/rows.jsonl"


def write_folder(root: Path) -> str:
    write_captions(root / "photos", 5)
    return "photos"


@pytest.mark.parametrize(("kind", "task", "extra"), [(write_folder, "text_to_image", ()), (write_jsonl, "edit", ("style",)), (write_table, "text_to_image", ("style",))])
def test_a_source_opened_again_gives_the_same_without_reading_a_row(
    kind: Callable[[Path], str], task: str, extra: tuple[str, ...], tmp_path: Path, looked: list[str]
) -> None:
    path = kind(tmp_path)
    settle()
    expected = all_of(opened(tmp_path, path, task, extra=extra, index=False))
    assert len(expected["keys"]) == 5
    assert list(expected["extra"]) == list(extra)
    assert all_of(opened(tmp_path, path, task, extra=extra)) == expected
    looked.clear()
    assert all_of(opened(tmp_path, path, task, extra=extra)) == expected
    assert looked == []


def test_sizes_of_references_stand_row_after_row(tmp_path: Path) -> None:
    write_edits(tmp_path / "edits", 5)
    for index in (False, True, True):
        source = opened(tmp_path, "edits/rows.jsonl", "edit", index=index)
        assert source.num_references.tolist() == [1, 2, 3, 1, 2]
        assert source.reference_sizes.tolist() == [[3 + each, 2 + row] for row in range(5) for each in range(1 + row % 3)]
        assert source.sizes.tolist() == [[4 + row, 5] for row in range(5)]


def test_what_comes_from_the_index_is_mapped_and_not_held_in_memory(tmp_path: Path) -> None:
    write_edits(tmp_path / "edits", 5)
    for _ in range(2):
        before = pa.total_allocated_bytes()
        source = opened(tmp_path, "edits/rows.jsonl", "edit", extra=["text"])
        for values in (source.sizes, source.num_references, source.reference_sizes):
            base: Any = values
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base, mmap.mmap)
            assert not values.flags.writeable
        assert source.extra["text"].to_pylist()[4] == "edit 4"
        assert pa.total_allocated_bytes() == before


def test_only_what_has_changed_in_a_folder_is_looked_at(tmp_path: Path, looked: list[str]) -> None:
    photos = tmp_path / "photos"
    write_captions(photos, 20)
    settle()
    opened(tmp_path, "photos")
    same_size = bytearray((photos / "0003.png").read_bytes())
    same_size[-1] ^= 1
    times = os.stat(photos / "0003.png")
    write(photos / "0003.png", bytes(same_size))
    os.utime(photos / "0003.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    write(photos / "0005.txt", "CAPTION 5")
    write(photos / "inner/new.png", png(99))
    write(photos / "inner/new.txt", "new")
    os.replace(photos / "0007.png", photos / "moved.png")
    os.replace(photos / "0007.txt", photos / "moved.txt")
    write(photos / "notes.md", "no row's file")
    settle()
    looked.clear()
    again = all_of(opened(tmp_path, "photos"))
    assert looked == ["0003.png", "0005.png", "inner/new.png", "moved.png"]
    assert again == all_of(opened(tmp_path, "photos", index=False))
    looked.clear()
    assert all_of(opened(tmp_path, "photos")) == again
    assert looked == []


def test_only_what_has_changed_in_a_jsonl_is_looked_at(tmp_path: Path, looked: list[str]) -> None:
    edits = tmp_path / "edits"
    write_edits(edits, 12)
    settle()
    opened(tmp_path, "edits/rows.jsonl", "edit")
    rows = [json.loads(line) for line in (edits / "rows.jsonl").read_text().splitlines()]
    rows[4]["text"] = "another prompt"
    rows[5]["reference"] = rows[5]["reference"][::-1]
    rows.insert(2, rows[11])
    write_lines(edits / "rows.jsonl", [*rows[6:], *rows[:6]])
    write(edits / "reference8-1.png", png(7, 9, 9))
    settle()
    looked.clear()
    again = all_of(opened(tmp_path, "edits/rows.jsonl", "edit"))
    assert looked == ["target5.png", "target8.png", "target11.png#2", "target4.png"]
    assert again == all_of(opened(tmp_path, "edits/rows.jsonl", "edit", index=False))


def test_rows_in_another_order_are_in_that_order(tmp_path: Path, looked: list[str]) -> None:
    write_edits(tmp_path, 6)
    settle()
    first = opened(tmp_path, "rows.jsonl", "edit")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    write(tmp_path / "rows.jsonl", "".join(lines[::-1]))
    looked.clear()
    again = opened(tmp_path, "rows.jsonl", "edit")
    assert looked == []
    assert all_of(again)["keys"] == all_of(first)["keys"][::-1]
    assert all_of(again) == all_of(opened(tmp_path, "rows.jsonl", "edit", index=False))


def test_a_table_that_was_changed_in_many_places_stays_in_few_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "_MOST_CHUNKS", 4)
    write_captions(tmp_path / "photos", 20)
    for turn in range(3):
        for row in range(0, 20, 2):
            write(tmp_path / f"photos/{row:04}.txt", f"turn {turn}")
        source = opened(tmp_path, "photos")
        assert isinstance(source.rows, file_rows.FileRows)
        assert source.rows.table["key"].num_chunks <= 4
        assert all_of(source) == all_of(opened(tmp_path, "photos", index=False))


def test_rows_of_a_parquet_file_that_stands_are_not_read_when_another_comes(tmp_path: Path, looked: list[str]) -> None:
    for name in "ab":
        parquet.write_table(pa.table({"image": [png(1), png(2)], "text": ["x", "y"]}), tmp_path / f"{name}.parquet")
        settle()
        looked.clear()
        source = opened(tmp_path, "*.parquet")
        assert looked == [f"{name}.parquet:0", f"{name}.parquet:1"]
        assert all_of(source) == all_of(opened(tmp_path, "*.parquet", index=False))


@pytest.mark.usefixtures("_many_may_be_bad")
def test_whatever_is_done_to_a_folder_the_index_gives_what_a_first_look_gives(tmp_path: Path) -> None:
    chance = random.Random(1)
    photos = tmp_path / "photos"
    write_captions(photos, 12)
    write_captions(tmp_path / "spare", 4)

    def name() -> str:
        return chance.choice(sorted(each.stem for each in photos.rglob("*.png"))) if chance.random() < 0.8 else f"n{chance.randrange(99)}"

    def stray() -> None:
        (photos / f"link{chance.randrange(9)}").symlink_to(tmp_path / "spare")

    steps: list[Callable[[], object]] = [
        lambda: write(photos / f"{name()}.png", png(chance.randrange(99), 3 + chance.randrange(5), 4)),
        lambda: write(photos / f"{name()}.txt", chance.choice(["one", "two", "one\ntwo", " ", "tre"])),
        lambda: write(photos / f"{name()}.png", b"broken"),
        lambda: (photos / f"{name()}.txt").unlink(missing_ok=True),
        lambda: (photos / f"{name()}.png").unlink(missing_ok=True),
        lambda: shutil.copy2(tmp_path / "spare" / f"000{chance.randrange(4)}.png", photos / f"{name()}.png"),
        stray,
    ]
    for number in range(40):
        for _ in range(chance.randrange(3)):
            try:
                chance.choice(steps)()
            except FileExistsError:
                continue
        assert all_of(opened(tmp_path, "photos")) == all_of(opened(tmp_path, "photos", index=False)), number


def test_a_file_rewritten_at_once_after_opening_is_seen(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 1)
    write_lines(tmp_path / "rows.jsonl", [{"image": "photos/0000.png", "text": "x"}])
    for height in (3, 4, 5, 6, 7, 8):  # the same number of bytes, and in a tick of the clock the same times
        write(tmp_path / "photos/0000.txt", f"caption {height}")
        write(tmp_path / "photos/0000.png", png(1, height, 5).ljust(500, b"\0"))
        assert opened(tmp_path, "rows.jsonl").sizes.tolist() == [[height, 5]]
        assert opened(tmp_path, "photos").example(0).prompt == f"caption {height}"


def test_a_stamp_is_given_only_once_the_clock_has_ticked_since_the_last_change(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 2)
    folder.list_folder(tmp_path / "photos", "text_to_image", {}, None).stamp()
    assert not is_fresh(state(str(tmp_path / "photos/0001.txt")).changed)
    write(tmp_path / "photos/0001.png", png(2))
    write_lines(tmp_path / "rows.jsonl", [{"image": f"photos/000{row}.png", "text": "x"} for row in (0, 1)])
    stamps = [found.stamp() for found in folder.list_json_lines(tmp_path / "rows.jsonl", "text_to_image", {}, None).found()]
    assert stamps[0] is not None
    assert stamps[1] is None


@pytest.mark.usefixtures("_many_may_be_bad")
def test_a_bad_row_is_looked_at_again_though_no_file_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: list[str]) -> None:
    write_captions(tmp_path / "photos", 3)
    write_lines(tmp_path / "rows.jsonl", [{"image": f"photos/000{row}.png", "text": "x"} for row in (1, 2)])
    settle()
    for path, bad in (("photos", "0001.png"), ("rows.jsonl", "rows.jsonl:1")):
        with monkeypatch.context() as passing:

            def fails(pixels: Path) -> tuple[int, int]:
                if pixels.name == "0001.png":
                    raise UnreadableImage("the disk was slow")
                return header_size(pixels)

            passing.setattr(look, "header_size", fails)
            for _ in range(2):
                looked.clear()
                source = opened(tmp_path, path)
                assert [(row.key, row.reason) for row in source.bad] == [(bad, "target '0001.png': the disk was slow")]
            assert looked == ["0001.png" if path == "photos" else "photos/0001.png"]
        source = opened(tmp_path, path)
        assert source.bad == ()
        assert all_of(source) == all_of(opened(tmp_path, path, index=False))


def test_a_row_that_comes_to_lead_outside_is_bad_though_its_file_is_the_same(tmp_path: Path) -> None:
    write_captions(tmp_path / "data/inner", 200)
    write_lines(tmp_path / "data/rows.jsonl", [{"image": f"inner/{row:04}.png", "text": "x"} for row in range(200)])
    shutil.copytree(tmp_path / "data/inner", tmp_path / "photos")
    settle()
    for path in ("data/rows.jsonl", "photos"):
        assert opened(tmp_path, path).bad == ()
    os.rename(tmp_path / "photos/0000.png", tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", tmp_path / "photos/0000.png")
    assert [row.key for row in opened(tmp_path, "photos").bad] == ["0000.png"]
    os.rename(tmp_path / "data/inner", tmp_path / "outside")
    os.symlink(tmp_path / "outside", tmp_path / "data/inner")
    with pytest.raises(SourceError, match=r"200 of 200 rows are bad.*lies outside"):
        opened(tmp_path, "data/rows.jsonl")


def test_each_declaration_has_an_entry_of_its_own(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 3)
    (tmp_path / "photos/0001.txt").unlink()
    settle()
    for _ in range(2):
        assert [opened(tmp_path, "photos", prompt=prompt).example(1).prompt for prompt in ("one", "two")] == ["one", "two"]
        with pytest.raises(SourceError, match=r"no caption: '0001.txt' is missing"):
            opened(tmp_path, "photos", on_bad_row="stop")
    assert len(list((tmp_path / "index").iterdir())) == 2
    os.symlink(tmp_path / "photos", tmp_path / "link")
    assert opened(tmp_path, "link", prompt="one").example(1).prompt == "one"
    assert len(list((tmp_path / "index").iterdir())) == 2


# Entries that cannot be used.


def entry_of(root: Path) -> Path:
    (entry,) = (root / "index").iterdir()
    return entry


def test_a_damaged_torn_or_foreign_entry_is_made_anew(tmp_path: Path, looked: list[str]) -> None:
    write_captions(tmp_path / "photos", 5)
    settle()
    expected = all_of(opened(tmp_path, "photos"))
    whole = tmp_path / "whole"
    shutil.copytree(entry_of(tmp_path), whole)
    names = sorted(path.name for path in whole.iterdir())
    assert {"facts.json", "sizes.npy", "rows-table.arrow"} <= set(names)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-7])

    def another_format(path: Path) -> None:
        if path.suffix != ".json":
            return path.unlink()
        written = json.loads(path.read_text())
        path.write_text(json.dumps({**written, "format": FORMAT + 1}))
        return None

    def swap(path: Path) -> None:
        path.unlink()
        os.symlink("facts.json", path)

    for name in names:
        for damage in (flip, cut, another_format, swap, Path.unlink):
            damage(entry_of(tmp_path) / name)
            looked.clear()
            assert all_of(opened(tmp_path, "photos")) == expected
            assert len(looked) == 5
            assert sorted(path.name for path in entry_of(tmp_path).iterdir()) == names
            looked.clear()
            assert all_of(opened(tmp_path, "photos")) == expected
            assert looked == []
    shutil.rmtree(entry_of(tmp_path))
    write(tmp_path / "index" / place_of(tmp_path / "index").name, "a file")
    assert all_of(opened(tmp_path, "photos")) == expected


def test_facts_of_which_one_bit_is_another_are_not_read(tmp_path: Path) -> None:
    entry = write_entry(tmp_path / "index/a", {"fingerprint": "x", "bad": [["place", "reason"]]}, {"numbers": np.arange(3)})
    assert entry.stored["numbers"].tolist() == [0, 1, 2]
    assert read_entry(tmp_path / "index/a") is not None
    facts = tmp_path / "index/a/facts.json"
    content = facts.read_bytes()
    for at in range(len(content)):
        facts.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert read_entry(tmp_path / "index/a") is None


def test_what_a_killed_process_left_is_cleared_after_an_hour_and_never_read(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 2)
    opened(tmp_path, "photos")
    entry = entry_of(tmp_path)
    old, young = (entry.parent / f".{entry.name}.{name}.partial" for name in ("1-old", "2-young"))
    for left in (old, young):
        shutil.copytree(entry, left)
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    write(tmp_path / "photos/0000.txt", "another")
    assert opened(tmp_path, "photos").example(0).prompt == "another"
    assert sorted(path.name for path in entry.parent.iterdir()) == [young.name, entry.name]


def test_an_index_that_cannot_be_written_says_where_and_why(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 2)
    write(tmp_path / "index", "a file")
    with pytest.raises(SourceError, match=r"^source 'rows' \(photos\): the data index in .*index cannot be written: Not a directory; make room, or choose another"):
        opened(tmp_path, "photos")


def test_processes_that_make_the_same_entry_at_once_all_end_well(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 20)
    context = multiprocessing.get_context("fork")
    with context.Pool(6) as pool:
        for turn in range(3):
            write(tmp_path / "photos/0007.txt", f"turn {turn}")
            given = pool.map(partial(_open_for_another, tmp_path), range(12), chunksize=1)
            assert given == [all_of(opened(tmp_path, "photos", index=False))] * 12
    entry = entry_of(tmp_path)  # and nothing half-written beside it
    assert read_entry(entry) is not None


def _open_for_another(root: Path, _: int) -> dict[str, Any]:
    return all_of(opened(root, "photos"))


# Further columns.


@pytest.mark.usefixtures("_many_may_be_bad")
def test_further_columns_are_kept_for_good_rows(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 4)
    values: list[tuple[str | None, float | None, bool]] = [("film", 1, True), (None, 0.5, False), ("bad", 7, True), ("photo", None, True)]
    rows = [
        {"image": "none.png" if style == "bad" else f"photos/000{row}.png", "text": "x", "style": style, "score": score, "is_new": is_new}
        for row, (style, score, is_new) in enumerate(values)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    for index in (False, True, True):
        source = opened(tmp_path, "rows.jsonl", extra=["score", "style", "is_new"], index=index)
        assert {name: column.to_pylist() for name, column in source.extra.items()} == {
            "score": [1.0, 0.5, None],
            "style": ["film", None, "photo"],
            "is_new": [True, False, True],
        }
        assert [str(column.type) for column in source.extra.values()] == ["double", "string", "bool"]
        assert len(source.bad) == 1
    assert opened(tmp_path, "rows.jsonl").extra == {}


def test_a_further_column_that_is_not_there_or_holds_several_kinds_is_an_error(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 2)
    with pytest.raises(SourceError, match=r"no column 'style'.*write a metadata.jsonl"):
        opened(tmp_path, "photos", extra=["style"])
    mixed: list[tuple[object, object]] = [("a", 1), (1, True), (2**80, 1), (1, False)]
    for values in mixed:
        rows = [{"image": f"photos/000{row}.png", "text": "x", "style": value} for row, value in enumerate(values)]
        write_lines(tmp_path / "rows.jsonl", rows)
        with pytest.raises(SourceError, match="column 'style' holds values of several kinds, or numbers beyond 64 bits"):
            opened(tmp_path, "rows.jsonl", extra=["style"])
    with pytest.raises(SourceError, match=r"no column 'styel' \(columns: .*; did you mean 'style'"):
        opened(tmp_path, "rows.jsonl", extra=["styel"])


def test_a_kind_that_changes_far_down_the_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_AT_ONCE", 2)
    values = {"whole": [1, 2, 3, 4.5, None, None], "text": [None, None, "a", "b", None, "c"], "none": [None] * 6}
    for name, each in values.items():
        column = survey._Values(name)
        for value in each:
            column.add(value)
        assert column.column().to_pylist() == each
    column = survey._Values("mixed")
    for value in (1, 2, "a", "b"):
        column.add(value)
    with pytest.raises(SourceError, match="'mixed'"):
        column.column()


# Rows.


def test_keys_of_many_rows_are_those_of_each(tmp_path: Path) -> None:
    write_captions(tmp_path / "photos", 9)
    write_table(tmp_path)
    for path in ("photos", "rows.parquet"):
        for index in (False, True):
            source = opened(tmp_path, path, index=index)
            rows = np.array([3, 0, 3, 4], dtype=np.int64)
            assert source.keys(rows) == [source.key(int(row)) for row in rows]
            assert source.keys(rows[:0]) == []
            for row in (-1, len(source)):
                with pytest.raises(IndexError, match=f"no row {row}; it has {len(source)}"):
                    source.keys(np.array([1, row]))


def test_each_line_of_a_caption_file_is_a_caption(tmp_path: Path) -> None:
    contents = {"a": "one", "b": "  one \n\n two\t\r\nthree\rfour\n", "c": "\n", "d": "line\u2028separator"}
    for name, content in contents.items():
        write(tmp_path / "photos" / f"{name}.png", png(1))
        write(tmp_path / "photos" / f"{name}.txt", content)
    for index in (False, True, True):
        source = opened(tmp_path, "photos", prompt="p", index=index)
        assert [source.example(row).prompts for row in range(4)] == [("one",), ("one", "two", "three", "four"), ("p",), ("line\u2028separator",)]


# Several processes.


@dataclass(frozen=True)
class Made:
    """A listing whose rows do what a test wants, in whichever process reads them."""

    number: int
    read: Callable[[int], Cells]

    def stamp(self) -> None:
        """None."""

    def found(self) -> Iterator[Found]:
        """Every row."""
        for row in range(self.number):
            yield Found(f"place {row}", f"key {row}", partial(self.read, row))

    def keep(self, good: Iterable[Good]) -> Any:
        """What was good."""
        return [(row.position, row.key, row.cells()) for row in good]

    def restored(self, saved: Mapping[str, Stored]) -> Any:
        """Never asked for."""
        raise AssertionError(saved)


PARENT = os.getpid()


def sized(row: int) -> Cells:
    if row % 150 == 149:
        raise RowError(f"bad row {row}")
    return Cells((f"prompt {row}",), b"", (), size=(row + 1, os.getpid() == PARENT), unread=row)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "BLOCK", 8)
    monkeypatch.setattr(look, "ALONE", 20)
    monkeypatch.setattr(look, "_processes", lambda waiting: 3)


@pytest.mark.usefixtures("_small_blocks")
def test_several_processes_give_the_same_rows_in_the_same_order_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 24, 25, 48, 49, 1001):
        shared = list(look.looked_at(Made(number, sized), True, None))
        with monkeypatch.context() as alone:
            alone.setattr(look, "_processes", lambda waiting: 1)
            single = list(look.looked_at(Made(number, sized), True, None))
        assert [(row.key, row.place, row.stamp) for row in shared] == [(row.key, row.place, row.stamp) for row in single]
        assert [row.key for row in shared] == [f"key {row}" for row in range(number)]
        for row, (ours, theirs) in enumerate(zip(shared, single, strict=True)):
            if isinstance(theirs.outcome, look.Seen):
                assert isinstance(ours.outcome, look.Seen)
                assert ours.outcome.look.content == theirs.outcome.look.content
                assert ours.outcome.look.sizes == ((row + 1, row < 24),)  # read here, or in another process
            else:
                assert ours == theirs
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("_small_blocks")
def test_a_folder_opened_by_several_processes_is_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_captions(tmp_path / "photos", 150)
    write(tmp_path / "photos/0077.png", b"broken")
    shared = [all_of(opened(tmp_path, "photos", index=index)) for index in (False, True, True)]
    monkeypatch.setattr(look, "ALONE", 1000)
    alone = all_of(opened(tmp_path, "photos", index=False))
    assert shared == [alone] * 3
    assert [row.key for row in alone["bad"]] == ["0077.png"]
    for row in range(0, 140, 3):
        write(tmp_path / f"photos/{row:04}.txt", "another")
    changed = all_of(opened(tmp_path, "photos", index=False))
    monkeypatch.setattr(look, "ALONE", 20)
    assert all_of(opened(tmp_path, "photos")) == changed
    with pytest.raises(SourceError, match=r"bad row '0077.png'"):
        opened(tmp_path, "photos", on_bad_row="stop")
    assert multiprocessing.active_children() == []


def divides(row: int) -> Cells:
    if row == 500:
        raise ZeroDivisionError("row 500")
    return sized(row)


def dies(row: int) -> Cells:
    if row == 500 and os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return sized(row)


@pytest.mark.usefixtures("_small_blocks")
def test_an_error_in_a_process_comes_through(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError, match="row 500"):
        survey.survey("rows", Made(1001, divides), "skip")
    assert multiprocessing.active_children() == []
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.usefixtures("_small_blocks")
def test_rows_of_a_process_that_was_killed_are_read_by_its_parent() -> None:
    seen = survey.survey("rows", Made(1001, dies), "skip")
    assert seen.fingerprint == survey.survey("rows", Made(1001, sized), "skip").fingerprint
    assert len(seen.sizes) == 995
    assert multiprocessing.active_children() == []


def test_a_process_of_a_pool_looks_alone(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(look._processes, (1.0,)) == 1
    assert look._processes(1.0) == len(os.sched_getaffinity(0))
    assert look._processes(1e9) > look._processes(1.0)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_one_that_is_interrupted_or_killed(sign: signal.Signals, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys, time
        sys.path.insert(0, "tests")
        import test_index
        from mixing import file_rows, folder, look, survey
        look.BLOCK, look.ALONE, look._processes = 8, 20, lambda waiting: 3
        def slow(row):
            if row == 40:
                print(os.getpid(), flush=True)
            if os.getpid() != test_index.PARENT:
                time.sleep(0.01)
            return test_index.sized(row)
        survey.survey("rows", test_index.Made(1_000_000, slow), "skip")
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=Path(__file__).parent.parent
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert child != process.pid
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # as Ctrl-C does
    else:
        process.kill()
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors if sign == signal.SIGINT else errors == ""
    assert errors.count("Traceback") <= 1
    deadline = time.monotonic() + 10
    while running_in(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running_in(group: int) -> list[int]:
    """The processes of a group that have not ended. Source: proc_pid_stat(5)."""
    running = []
    for process in Path("/proc").iterdir():
        try:
            doing, _, its_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and doing != "Z":
            running.append(int(process.name))
    return running
