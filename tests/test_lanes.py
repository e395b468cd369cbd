"""Streams: what a lane gives depends on keys and numbers alone, whoever reads it, from wherever, whatever the network does."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import BinaryIO

import datasets
import httpx2
import pyarrow as pa
import pytest
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import RepoFile
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from pyarrow import parquet

import mixing.shards
import mixing.tar_shards
from mixing.bad_rows import BadRow, RowError, SourceError
from mixing.lanes import LaneReader, Place, place
from mixing.parquet_shards import parquet_shards
from mixing.retries import WAITS, is_final
from mixing.shards import Row, Values
from mixing.source import open_source
from mixing.stream import Stream, open_stream
from mixing.tar_members import Member, members
from mixing.tar_shards import tar_shards

Open = Callable[..., Stream]


def png(number: int, padding: int = 0) -> bytes:
    """An image of its own for each number, with so many bytes more behind it."""
    content = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256, 0)).save(content, "PNG")
    return content.getvalue() + Random(number).randbytes(padding)


def write_tar(file: Path, rows: Sequence[dict[str, bytes]], names: Sequence[str] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, row in enumerate(rows):
            for column, content in row.items():
                member = tarfile.TarInfo(f"{names[number] if names else f'{number:04d}'}.{column}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path, sizes: Sequence[int], padding: int = 0) -> str:
    first = 0
    for shard, size in enumerate(sizes):
        write_tar(folder / f"s-{shard:03d}.tar", [{"png": png(number, padding), "txt": str(number).encode()} for number in range(first, first + size)])
        first += size
    return str(folder / "*.tar")


def write_parquet(folder: Path, sizes: Sequence[int], group: int = 7, padding: int = 0) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        table = pa.table({"image": [{"bytes": png(number, padding), "path": None} for number in numbers], "text": [str(number) for number in numbers]})
        parquet.write_table(table, folder / f"train-{shard:03d}.parquet", row_group_size=group)
        first += size
    return str(folder / "*.parquet")


def write_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    for each in range(number):
        (folder / f"{each:04d}.png").write_bytes(png(each))
    lines = (json.dumps({"file_name": f"{each:04d}.png", "text": str(each)}) for each in range(number))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def opened(path: str, **asked: object) -> Stream:
    words: dict[str, object] = {
        "task": "text_to_image", "columns": {}, "prompt": None, "split": "train", "references": None, "on_bad_row": "skip", "root": Path("."),
        "seed": 1, "lanes": 3, "held_out": 0,
    }  # fmt: skip
    return open_stream("s", path=path, **{**words, **asked})  # type: ignore[arg-type]


def reader(stream: Stream, mine: Sequence[int], states: dict[int, dict[str, object]] | None = None, rows: int = 5, **asked: object) -> LaneReader:
    words: dict[str, object] = {"on_bad": lambda bad: None, "stalled": lambda message: None, "waits": (), **asked}
    return stream.lanes(mine, states or {}, rows=rows, **words)  # type: ignore[arg-type]


def drawn(stream: Stream, number: int, processes: int = 1, rows: int = 5) -> list[str]:
    """The prompts of the first draws, read by so many processes' readers."""
    readers = [reader(stream, range(rank, stream.num_lanes, processes), rows=rows) for rank in range(processes)]
    try:
        return [readers[draw % stream.num_lanes % processes].draw(draw).cells.prompt for draw in range(number)]
    finally:
        for each in readers:
            each.close()


def lane_rows(stream: Stream, lane: int, number: int, rows: int = 5) -> list[tuple[str, int]]:
    """Prompt and epoch of the first rows of a lane."""
    with reader(stream, [lane], rows=rows) as lanes:
        return [(row.cells.prompt, row.epoch) for row in (lanes.row(lane, index) for index in range(number))]


def first_epoch(stream: Stream, lane: int) -> list[str]:
    with reader(stream, [lane]) as lanes:
        found = []
        for index in range(10_000):
            row = lanes.row(lane, index)
            if row.epoch:
                return found
            found.append(row.cells.prompt)
    raise AssertionError("the first epoch does not end")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Open]:
    """Opens the same 100 rows in four shards, of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    sizes = (30, 20, 40, 10)
    tars, tables = write_tars(folder / "tar", sizes), write_parquet(folder / "parquet", sizes)
    write_parquet(folder / "user" / "tables" / "data", sizes)
    write_tars(folder / "user" / "tars", sizes)
    write_images(folder / "user" / "images", 100)

    def hub(name: str, **asked: object) -> Stream:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return opened(f"hub/user/{name}", **asked)

    datasets.disable_progress_bars()
    local = {"tar": partial(opened, tars), "parquet": partial(opened, tables)}
    return local | {f"hub {name}": partial(hub, name) for name in ("tables", "tars", "images")}


KINDS = ("tar", "parquet", "hub tables", "hub tars", "hub images")


@pytest.mark.parametrize("kind", KINDS)
def test_lane_goes_on_from_its_state_at_any_index_with_the_same_rows(kinds: dict[str, Open], kind: str) -> None:
    stream = kinds[kind](held_out=2)
    with reader(stream, [1]) as lanes:
        whole = [lanes.row(1, index) for index in range(90)]
    assert {row.epoch for row in whole} >= {0, 1}
    for index in range(0, 80, 4):
        with reader(stream, [1]) as lanes:
            for before in range(index + 3):  # rows are asked for ahead of those that are used
                assert lanes.row(1, before) == whole[before]
            state = json.loads(json.dumps(lanes.state(1, index)))
        assert index - 5 < state["index"] <= index
        with reader(stream, [1], {1: state}) as lanes:
            assert [lanes.row(1, after) for after in range(index, index + 10)] == whole[index : index + 10]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_neither_on_the_number_of_processes_nor_on_pickling(kinds: dict[str, Open], kind: str) -> None:
    stream = kinds[kind](lanes=4)
    alone = drawn(stream, 120)
    assert drawn(stream, 120, processes=2) == alone
    assert drawn(pickle.loads(pickle.dumps(stream)), 120, processes=4) == alone  # noqa: S301
    assert drawn(kinds[kind](lanes=4, seed=2), 120) != alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", [1, 3, 4, 7, 13])
def test_rows_of_an_epoch_come_once_each_and_in_one_lane(kinds: dict[str, Open], kind: str, lanes: int) -> None:
    stream = kinds[kind](lanes=lanes, held_out=4)
    held_out = [cells.prompt for _, cells in stream.held_out_rows()]
    assert held_out == ["0", "1", "2", "3"]
    seen = [prompt for lane in range(lanes) for prompt in first_epoch(stream, lane)]
    assert sorted(map(int, seen)) == list(range(4, 100))


def test_a_lane_goes_on_without_reading_what_lies_before_its_window(kinds: dict[str, Open], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = kinds["tar"](lanes=4)
    begun: list[int] = []

    def watched(file: BinaryIO, start: int) -> Iterator[Member]:
        for member in members(file, start):
            begun.append(member.offset)
            yield member

    with reader(stream, [2]) as lanes:
        row = lanes.row(2, 9)
        state = lanes.state(2, 9)
    monkeypatch.setattr(mixing.tar_shards, "members", watched)
    with reader(stream, [2], {2: state}) as lanes:
        assert lanes.row(2, 9) == row
    assert state["at"] == {"byte": begun[0] - 512}
    assert begun[0] > 5 * 2 * 1024


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_every_state_of_every_lane_is_handed_over_when_processes_become_fewer(kinds: dict[str, Open], kind: str) -> None:
    stream = kinds[kind](lanes=4)
    alone = drawn(stream, 120)
    states: dict[int, dict[str, object]] = {}
    for rank in range(4):
        with reader(stream, [rank]) as lanes:
            for draw in range(rank, 61, 4):
                lanes.draw(draw)
            states.update(json.loads(json.dumps(lanes.states(50)), object_hook=lambda found: {int(k) if k.isdigit() else k: v for k, v in found.items()}))
    with reader(stream, range(4), states) as lanes:
        assert [lanes.draw(draw).cells.prompt for draw in range(50, 120)] == alone[50:]


def test_state_without_a_state_before_is_found_by_counting(kinds: dict[str, Open]) -> None:
    stream = kinds["tar"]()
    whole = lane_rows(stream, 0, 60)
    with reader(stream, [0]) as lanes:
        row = lanes.row(0, 57)
    assert (row.cells.prompt, row.epoch) == whole[57]


def test_stream_gives_the_keys_and_contents_that_an_indexed_parquet_gives(kinds: dict[str, Open], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p", (6, 5))
    source = open_source("s", path=path, task="text_to_image", columns={}, prompt=None, split="train", on_bad_row="skip", root=Path("."))
    stream = opened(path, lanes=2)
    with reader(stream, range(2), rows=3) as lanes:
        rows = [lanes.draw(draw) for draw in range(60)]
    for number in range(len(source)):
        cells = next(row.cells for row in rows if row.key == source.key(number))
        assert (cells.prompts, cells.target) == (source.rows.cells(number).prompts, source.rows.cells(number).target)


def test_window_is_shuffled_otherwise_in_each_epoch_and_keeps_its_rows_together(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, (40,)), lanes=1)
    rows = [int(prompt) for prompt, _ in lane_rows(stream, 0, 80, rows=20)]
    first, second = rows[:40], rows[40:]
    assert sorted(first[:20]) == sorted(second[:20]) == list(range(20))
    assert sorted(first[20:]) == sorted(second[20:]) == list(range(20, 40))
    assert first != sorted(first)
    assert first != second
    assert [place % 20 for place in first[:20]] != [place % 20 for place in first[20:]]


def test_shards_come_in_another_order_in_each_epoch(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, (2,) * 8), lanes=1)
    rows = [int(prompt) // 2 for prompt, _ in lane_rows(stream, 0, 64, rows=1)]
    orders = {tuple(rows[start : start + 16 : 2]) for start in range(0, 64, 16)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_last_window_of_an_epoch_is_short_and_epochs_do_not_mix(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, (13,)), lanes=1)
    rows = lane_rows(stream, 0, 39, rows=5)
    for epoch in range(3):
        assert sorted(int(prompt) for prompt, found in rows if found == epoch) == list(range(13))
    assert [epoch for _, epoch in rows] == [0] * 13 + [1] * 13 + [2] * 13


def test_source_of_one_row_is_read_in_eight_lanes_on_four_processes(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, (1,)), lanes=8, held_out=64)
    assert stream.num_held_out == 0
    assert drawn(stream, 40, processes=4) == ["0"] * 40


def test_lane_without_rows_reads_the_whole_source_and_goes_on_from_its_state(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, (2, 1)), lanes=6)
    with reader(stream, [5], rows=2) as lanes:
        whole = [lanes.row(5, index) for index in range(12)]
        state = json.loads(json.dumps(lanes.state(5, 7)))
        beginning = lanes_state_at_start(stream)
    assert {row.cells.prompt for row in whole} == {"0", "1", "2"}
    assert state["whole"] is True
    assert beginning["whole"] is False
    with reader(stream, [5], {5: state}, rows=2) as lanes:
        assert [lanes.row(5, index) for index in range(7, 12)] == whole[7:]


def lanes_state_at_start(stream: Stream) -> dict[str, object]:
    with reader(stream, [5]) as lanes:
        return lanes.state(5, 0)


@pytest.mark.parametrize(("rows", "held_out"), [(5, 0), (9, 0), (19, 1), (100, 3), (29, 2)])
def test_a_tenth_is_held_out_of_a_small_stream(tmp_path: Path, rows: int, held_out: int) -> None:
    for path in (write_tars(tmp_path / "t", (rows // 2, rows - rows // 2)), write_parquet(tmp_path / "p", (rows,))):
        assert opened(path, held_out=3).num_held_out == held_out


# --- bad rows ---------------------------------------------------------------------------------------------------------------------------


def cut(file: Path, num_bytes: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:num_bytes])


def first_header(file: Path, name: str) -> int:
    """Where a member's header begins."""
    with tarfile.open(file) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize(
    ("member", "beyond", "whole", "key"),
    [
        ("0003.png", 512 + 10, [0, 1, 2], "0003"),  # in the pixels: the row before is whole
        ("0003.txt", 512, [0, 1, 2], "0003"),  # before the text
        ("0003.png", 100, [0, 1, 2], ""),  # in a header: there is no more of the row before than what there is
        ("0003.png", 0, [0, 1, 2], None),  # between two rows: nobody can tell
    ],
)
def test_shard_that_ends_early_gives_its_whole_rows_and_the_next_shard_follows(
    tmp_path: Path, member: str, beyond: int, whole: list[int], key: str | None
) -> None:
    path = write_tars(tmp_path, (6, 4))
    cut(tmp_path / "s-000.tar", first_header(tmp_path / "s-000.tar", member) + beyond)
    stream = opened(path, lanes=1)
    bad: list[BadRow] = []
    with reader(stream, [0], on_bad=bad.append) as lanes:
        rows = [lanes.row(0, index) for index in range(20)]
        state = lanes.state(0, 9)
    assert {int(row.cells.prompt) for row in rows} == {*whole, 6, 7, 8, 9}
    assert [(row.source, row.key) for row in bad] == ([("s", f"s-000.tar:{key}".rstrip(":"))] if key is not None else [])
    assert all(row.reason.startswith("the shard ends early: it ends ") for row in bad)
    with reader(stream, [0], {0: state}) as lanes:
        assert [lanes.row(0, index) for index in range(9, 20)] == rows[9:]


def test_shard_of_a_dataset_that_ends_early_gives_its_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "user" / "cut", (12, 4))
    cut(tmp_path / "user" / "cut" / "s-000.tar", first_header(tmp_path / "user" / "cut" / "s-000.tar", "0008.png") + 520)
    monkeypatch.chdir(tmp_path)
    stream = opened("hub/user/cut", lanes=1)
    bad: list[BadRow] = []
    with reader(stream, [0], on_bad=bad.append) as lanes:
        rows = [lanes.row(0, index) for index in range(24)]
        state = json.loads(json.dumps(lanes.state(0, 9)))
    assert sorted(int(row.cells.prompt) for row in rows[:12]) == [*range(8), 12, 13, 14, 15]
    assert len(bad) == 1
    assert "ends early" in bad[0].reason
    with reader(stream, [0], {0: state}) as lanes:
        assert [lanes.row(0, index) for index in range(9, 24)] == rows[9:]


def test_bad_rows_are_left_out_and_reported_once(tmp_path: Path) -> None:
    rows = [{"png": png(number), "txt": str(number).encode()} for number in range(20)]
    rows[3] = {"png": b"no image", "txt": b"3"}
    rows[5] = {"png": png(5)}
    rows[7] = {"txt": b"7"}
    write_tar(tmp_path / "a.tar", rows)
    bad: list[BadRow] = []
    with reader(opened(str(tmp_path / "a.tar"), lanes=1), [0], on_bad=bad.append) as lanes:
        prompts = [lanes.row(0, index).cells.prompt for index in range(34)]
    assert sorted(map(int, prompts[:17])) == [number for number in range(20) if number not in (3, 5, 7)]
    assert [row.key for row in bad] == ["a.tar:0003", "a.tar:0005", "a.tar:0007"]
    assert [row.reason.split(";")[0] for row in bad[1:]] == ["no prompt in 'txt'", "'image' holds no images"]


def test_row_with_another_number_of_references_than_declared_is_bad(tmp_path: Path) -> None:
    rows = [{"a.png": png(0), "b.png": png(1), "c.png": png(2), "txt": b"two"}, {"a.png": png(3), "b.png": png(4), "txt": b"one"}] * 3
    write_tar(tmp_path / "a.tar", rows)
    stream = opened(str(tmp_path / "a.tar"), lanes=1, task="edit", columns={"target": "a.png", "reference": ["b.png", "c.png"]}, references=2)
    bad: list[BadRow] = []
    with reader(stream, [0], on_bad=bad.append) as lanes:
        assert [lanes.row(0, index).cells.references for index in range(3)] == [(png(1), png(2))] * 3
    assert {row.reason for row in bad} == {"it has 1 references; `references: 2` holds for the source"}


@pytest.mark.parametrize(("bad_rows", "fails"), [(1, False), (2, True)])
def test_more_than_a_hundredth_of_bad_rows_is_an_error_that_names_them(tmp_path: Path, bad_rows: int, fails: bool) -> None:
    rows = [{"png": png(number) if 50 <= number < 150 - bad_rows else b"" , "txt": b"x"} for number in range(50, 150)]
    write_tar(tmp_path / "a.tar", rows)
    with reader(opened(str(tmp_path / "a.tar"), lanes=1), [0]) as lanes:
        if not fails:
            assert lanes.row(0, 200).epoch == 2
            return
        with pytest.raises(SourceError, match=r"source 's': 2 of 100 rows are bad; at most 1% are skipped; repair or remove them: 'a.tar:0098': "):
            lanes.row(0, 200)


def test_source_of_which_all_is_bad_behind_its_first_rows_is_given_up_before_it_is_read_through(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"png": png(0), "txt": b"x"}] + [{"png": b"", "txt": b"x"}] * 300)
    with reader(opened(str(tmp_path / "a.tar"), lanes=1), [0]) as lanes, pytest.raises(SourceError, match="99 of 100 rows are bad"):
        lanes.row(0, 1)


def test_stop_stops_at_the_first_bad_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"png": png(number) if number != 12 else b"", "txt": b"x"} for number in range(20)])
    with reader(opened(str(tmp_path / "a.tar"), lanes=1, on_bad_row="stop"), [0]) as lanes:
        for index in range(10):
            lanes.row(0, index)
        with pytest.raises(SourceError, match=r"source 's': bad row 'a.tar:0012': target: .*; repair or remove it, or say on_bad_row: skip"):
            lanes.row(0, 10)


# --- what a tar can hold ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"jpg": png(1), "txt": b"words"}, {}),
        ({"webp": png(1), "caption": b"words"}, {}),
        ({"png": png(1), "json": b'{"caption": "words", "width": 8}'}, {}),
        ({"png": png(1), "json": b'{"prompt": "words"}', "cls": b"7"}, {}),
        ({"png": png(1), "json": b'{"caption": "not these"}', "txt": b"\xef\xbb\xbfwords"}, {}),
        ({"output.png": png(1), "input.png": png(2), "txt": b"words"}, {"columns": {"target": "output.png"}}),
        ({"png": png(1), "json": b'{"text": "words"}', "txt": b"not these"}, {"columns": {"prompt": "text"}}),
        ({"png": png(1), "cls": b"7"}, {"prompt": "words"}),
    ],
)
def test_members_of_a_tar_play_the_usual_roles(tmp_path: Path, row: dict[str, bytes], asked: dict[str, object]) -> None:
    write_tar(tmp_path / "a.tar", [row] * 3)
    with reader(opened(str(tmp_path / "a.tar"), lanes=1, **asked), [0]) as lanes:
        cells = lanes.row(0, 0).cells
    assert (cells.prompts, cells.target) == (("words",), png(1))


def test_long_names_folders_and_hidden_members_of_a_tar_are_understood(tmp_path: Path) -> None:
    names = ["v1.0/" + "long" * 60 + str(number) for number in range(3)]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
            folder = tarfile.TarInfo("v1.0")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for number, name in enumerate(names):
                for column, content in (("png", png(number)), ("txt", str(number).encode())):
                    for full in (f"{name}.{column}", f"v1.0/._{number}.{column}") if column == "txt" else (f"{name}.{column}",):
                        member = tarfile.TarInfo(full)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        stream = opened(str(tmp_path / "a.tar"), lanes=1)
        with reader(stream, [0], rows=1) as lanes:
            rows = [lanes.row(0, index) for index in range(7)]
            state = lanes.state(0, 4)
        assert [row.key for row in rows[:3]] == [f"a.tar:{name}" for name in names]
        with reader(stream, [0], {0: state}, rows=1) as lanes:
            assert [lanes.row(0, index) for index in range(4, 7)] == rows[4:]


def test_link_in_a_tar_is_a_bad_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"png": png(number), "txt": b"x"} for number in range(12)])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("0012.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    bad: list[BadRow] = []
    with reader(opened(str(tmp_path / "a.tar"), lanes=1), [0], on_bad=bad.append) as lanes:
        lanes.row(0, 30)
    assert [(row.key, row.reason.split(";")[0]) for row in bad] == [("a.tar:0012", "its member 'png' is not a plain file")]


# --- the network ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flaky:
    """Shards that fail so many times at one row, each time it is reached."""

    names: tuple[str, ...]
    rows: int
    error: Exception
    fails_at: int
    failures: list[int]
    """How often it is still to fail; counts down."""
    opened: list[int]
    """The rows at which reading began."""
    hangs: float = 0.0

    def read(self, shard: int, row: int, at: Values | None, columns: Sequence[str] | None) -> Iterator[Row]:
        self.opened.append(row)
        for number in range(row, self.rows):
            if number == self.fails_at:
                time.sleep(self.hangs)
                if self.failures[0]:
                    self.failures[0] -= 1
                    raise self.error
            yield Row(f"x:{number}", number, partial(dict, image=png(number), text=str(number)), {"byte": number + 1})

    def locate(self, shard: int, name: str) -> Path:
        raise RowError("no file")

    def count(self, limit: int) -> int:
        return self.rows

    def fingerprint(self) -> str:
        return ""


def flaky(tmp_path: Path, error: Exception, failures: int, hangs: float = 0.0) -> tuple[Stream, Flaky]:
    shards = Flaky(("far",), 20, error, 8, [failures], [], hangs)
    stream = opened(write_parquet(tmp_path / "p", (1,)), lanes=1)
    return replace(stream, shards=shards), shards


def http_error(status: int) -> Exception:
    return HfHubHTTPError("refused", response=httpx2.Response(status, request=httpx2.Request("GET", "https://x")))


PASSING = [ConnectionError("gone"), TimeoutError("slow"), httpx2.ReadTimeout("slow"), http_error(503), http_error(429), OSError(5, "io")]
FINAL = [FileNotFoundError(2, "none", "far"), PermissionError(13, "no"), http_error(404), http_error(401), http_error(403)]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_cannot_be_reached_is_tried_again_where_it_stood(tmp_path: Path, error: Exception) -> None:
    stream, shards = flaky(tmp_path, error, failures=3)
    with reader(stream, [0], waits=(0.001,) * 3) as lanes:
        assert sorted(int(lanes.row(0, index).cells.prompt) for index in range(20)) == list(range(20))
    assert shards.opened[:4] == [0, 8, 8, 8]


def test_waits_that_are_used_up_end_in_an_error_that_names_the_shard(tmp_path: Path) -> None:
    stream, _ = flaky(tmp_path, ConnectionError("gone"), failures=4)
    with reader(stream, [0], waits=(0.001,) * 3) as lanes:
        assert lanes.row(0, 4).epoch == 0  # rows that were read before are given
        with pytest.raises(SourceError, match=r"source 's': shard far cannot be read: ConnectionError: gone; tried 4 times in 0 seconds; once it"):
            lanes.row(0, 5)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_is_not_there_or_refused_is_not_tried_again(tmp_path: Path, error: Exception) -> None:
    stream, shards = flaky(tmp_path, error, failures=1)
    with reader(stream, [0], waits=(30.0,)) as lanes, pytest.raises(SourceError, match=f"shard far cannot be read: {type(error).__name__}"):
        lanes.row(0, 5)
    assert shards.opened == [0]


def test_waits_grow_to_a_minute_and_make_ten() -> None:
    assert list(WAITS) == sorted(WAITS)
    assert (WAITS[0], WAITS[-1]) == (1.0, 60.0)
    assert 590 <= sum(WAITS) <= 660
    assert not any(is_final(error) for error in PASSING)
    assert all(is_final(error) for error in FINAL)


def test_error_of_the_thread_that_nobody_expects_comes_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    stream, _ = flaky(tmp_path, ZeroDivisionError("a mistake of ours"), failures=1)
    with reader(stream, [0]) as lanes, pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        lanes.row(0, 5)


def test_stalled_source_is_named_again_and_again_until_it_goes_on(tmp_path: Path) -> None:
    stream, _ = flaky(tmp_path, ConnectionError(), failures=0, hangs=0.35)
    said: list[str] = []
    with reader(stream, [0], stalled=said.append, stalled_after=0.1) as lanes:
        assert lanes.row(0, 5).epoch == 0
    assert 2 <= len(said) <= 3
    assert said[0] == "source 's': lane 0 has been waited for 0 seconds, at shard far"


def test_stall_says_which_error_is_waited_out(tmp_path: Path) -> None:
    stream, _ = flaky(tmp_path, ConnectionError("gone"), failures=1)
    said: list[str] = []
    with reader(stream, [0], stalled=said.append, stalled_after=0.1, waits=(0.25,)) as lanes:
        lanes.row(0, 5)
    assert said[0].endswith("at shard far, which cannot be reached: ConnectionError: gone")


class FarFile(AbstractBufferedFile):
    """A file of the Hub, its content on this machine; counts what is fetched."""

    def __init__(self, content: bytes, fetched: list[int], **asked: object) -> None:
        self.content, self.fetched = content, fetched
        super().__init__(None, "far", size=len(content), **asked)

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fetched.append(end - start)
        return self.content[start:end]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_of_the_hub_are_read_where_they_lie_and_hardly_a_byte_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = write_tars(tmp_path, (120, 120), padding=8000) if kind == "tar" else write_parquet(tmp_path, (120, 120), group=60, padding=8000)
    fetched: list[int] = []

    class FarSystem:
        def open(self, file: str, mode: str, **asked: object) -> FarFile:
            assert (file.startswith("hf://datasets/user/name@abc/"), mode) == (True, "rb")
            return FarFile((tmp_path / file.rpartition("/")[2]).read_bytes(), fetched, mode="rb", **asked)

    monkeypatch.setattr(mixing.shards, "HfFileSystem", FarSystem)
    monkeypatch.setattr(mixing.shards, "_BLOCK", 2**14)
    monkeypatch.setattr(mixing.shards, "fingerprint_of", lambda names, files: "")
    files = [f"hf://datasets/user/name@abc/{file.name}" for file in sorted(tmp_path.iterdir())]
    shards = tar_shards(files, "") if kind == "tar" else parquet_shards(files, None, 1)
    stream = replace(opened(path, lanes=1), shards=shards)
    fetched.clear()
    rows = next(stream._windows(0, Place(), 240, (), lambda seconds, doing: None)).rows
    assert sorted(int(cells.prompt) for _, cells in rows) == list(range(240))
    assert {key.partition(":")[0] for key, _ in rows} == {file.name for file in tmp_path.iterdir()}
    assert sum(fetched) < 1.2 * sum(file.stat().st_size for file in tmp_path.iterdir())


def test_fingerprint_of_files_of_the_hub_is_that_of_their_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"data/a b.tar": "11", "data/c.tar": "22"}

    class Answers:
        def get_paths_info(self, repo: str, paths: list[str], *, revision: str, repo_type: str) -> list[RepoFile]:
            assert (repo, repo_type) == ("user/name", "dataset")
            assert revision in ("abc", "refs/convert/parquet")
            return [RepoFile(path=path, size=1, oid=contents[path]) for path in reversed(paths)]

    monkeypatch.setattr(mixing.shards, "HfApi", Answers)

    def mark(revision: str) -> str:
        return tar_shards([f"hf://datasets/user/name@{revision}/{path}" for path in contents], "").fingerprint()

    first = mark("abc")
    assert mark("refs%2Fconvert%2Fparquet") == first
    contents["data/c.tar"] = "33"
    assert mark("abc") != first


@pytest.mark.parametrize(("name", "closes"), [("tables", True), ("tables", False), ("images", True)])
def test_interpreter_ends_cleanly_after_a_stream_was_left_in_the_middle(tmp_path: Path, name: str, closes: bool) -> None:
    if name == "images":
        write_images(tmp_path / "user" / name, 40)
    else:
        write_parquet(tmp_path / "user" / name, (40, 40, 40, 40))
    code = (
        "import sys; from pathlib import Path; from mixing.stream import open_stream; "
        "stream = open_stream('s', path=sys.argv[1], task='text_to_image', columns={}, prompt=None, split='train', references=None, on_bad_row='skip', "
        "root=Path('.'), seed=1, lanes=4, held_out=0); lanes = stream.lanes(range(4), {}, on_bad=print, stalled=print, rows=5); "
        f"[lanes.draw(draw) for draw in range(4)]; {'lanes.close()' if closes else ''}"
    )
    root = str(Path(mixing.shards.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, f"hub/user/{name}"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr.count("terminate")) == (0, 0), done.stderr


# --- threads ----------------------------------------------------------------------------------------------------------------------------


def lane_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lane ")]


@pytest.mark.parametrize("kind", KINDS)
def test_no_thread_is_left_after_close(kinds: dict[str, Open], kind: str) -> None:
    lanes = reader(kinds[kind](), range(3))
    assert not lane_threads()  # none before the first row
    lanes.row(0, 0)
    assert lane_threads()
    start = time.monotonic()
    lanes.close()
    assert time.monotonic() - start < 1.0
    assert not lane_threads()
    with pytest.raises(ValueError, match="source 's': lane 0 is closed"):
        lanes.row(0, 50)


def test_threads_of_a_reader_that_nobody_closed_end_with_it(kinds: dict[str, Open]) -> None:
    lanes = reader(kinds["tar"](), range(3))
    lanes.row(0, 0)
    assert len(lane_threads()) == 3
    del lanes
    assert not lane_threads()


def test_close_ends_a_wait_for_the_network(tmp_path: Path) -> None:
    stream, _ = flaky(tmp_path, ConnectionError(), failures=1)
    lanes = reader(stream, [0], waits=(300.0,))
    lanes.row(0, 0)
    time.sleep(0.1)
    start = time.monotonic()
    lanes.close()
    assert time.monotonic() - start < 1.0
    assert not lane_threads()


def test_at_most_two_windows_are_read_ahead(tmp_path: Path) -> None:
    stream, shards = flaky(tmp_path, ConnectionError(), failures=0)
    seen: list[int] = []
    watched = replace(stream, shards=replace(shards, rows=1000), columns=stream.columns)
    look = Stream._look

    def counting(self: Stream, shard: int, row: Row) -> object:
        seen.append(row.number)
        return look(self, shard, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_look", counting)
        with reader(watched, [0]) as lanes:
            lanes.row(0, 0)
            time.sleep(0.2)
            assert len(seen) == 15  # the one in use, one that waits, and one that is whole but has no room


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def test_rows_are_asked_for_in_rising_order_and_of_lanes_that_are_read_here(kinds: dict[str, Open]) -> None:
    stream = kinds["tar"]()
    with reader(stream, [1]) as lanes:
        lanes.row(1, 4)
        with pytest.raises(ValueError, match="row 4 of lane 1 has passed; the next is 5"):
            lanes.row(1, 4)
        with pytest.raises(ValueError, match="lane 0 is not read here; these are: 1"):
            lanes.row(0, 0)
        lanes.state(1, 4)
        lanes.row(1, 20)
        lanes.state(1, 20)
        with pytest.raises(ValueError, match="the state of lane 1 at row 0 is forgotten; it is known from row 20 on"):
            lanes.state(1, 0)
    with pytest.raises(ValueError, match="has lanes 0 to 2"):
        reader(stream, [3])
    with pytest.raises(ValueError, match="the state of a lane holds index, epoch"):
        place({"index": 0})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.tar.gz", r"only .tar shards, .parquet files and Hub datasets \(hub/USER/NAME\) are streamed; remove `stream: true`"),
        ("packed.tar", "packed.tar is compressed by gzip, .*; unpack it: gunzip packed.tar"),
        ("page.tar", "page.tar is no tar: "),
        ("empty.tar", "it holds no rows"),
        ("none.tar", "no file none.tar"),
        ("bad.parquet", "is not a readable parquet file"),
        ("nameless.tar", "no column for the prompt .columns: 'png', 'image'.; usual names are prompt, text, caption, instruction; .*Or say `prompt:`"),
        ("pixels.tar", "none of its first 3 rows can be used; repair or remove them: 'pixels.tar:0000': target: "),
        ("hub/user/nowhere", "dataset user/nowhere, split 'train', cannot be streamed: "),
    ],
)
def test_source_that_cannot_be_streamed_says_so_when_it_is_opened(
    tmp_path: Path, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "page.tar").write_bytes(b"<html>" * 200)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "nameless.tar", [{"png": png(0)}])
    write_tar(tmp_path / "pixels.tar", [{"png": b"", "txt": b"x"}] * 3)
    with pytest.raises(SourceError, match=message) as raised:
        opened(path)
    assert str(raised.value).startswith(f"source 's' ({path}): ")


def test_fingerprint_tells_another_size_or_name_and_not_another_place(tmp_path: Path) -> None:
    first = opened(write_tars(tmp_path / "a", (3, 2))).fingerprint
    assert opened(write_tars(tmp_path / "b", (3, 2))).fingerprint == first
    assert opened(write_tars(tmp_path / "c", (3, 9))).fingerprint != first
    (tmp_path / "b" / "s-001.tar").rename(tmp_path / "b" / "s-002.tar")
    assert opened(str(tmp_path / "b" / "*.tar")).fingerprint != first


def test_damaged_parquet_is_an_error_at_once_and_not_a_network(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p", (20, 20), group=20)
    stream = opened(path, lanes=1)
    file = tmp_path / "p" / "train-001.parquet"
    content = bytearray(file.read_bytes())
    content[4:600] = bytes(596)
    file.write_bytes(bytes(content))
    with reader(stream, [0], waits=(30.0,)) as lanes, pytest.raises(SourceError, match=r"train-001\.parquet is not a readable parquet file"):
        lanes.row(0, 39)


def test_missing_file_of_an_open_stream_is_named(tmp_path: Path) -> None:
    stream = opened(write_tars(tmp_path, (5, 5)), lanes=1)
    (tmp_path / "s-001.tar").unlink()
    with reader(stream, [0]) as lanes, pytest.raises(SourceError, match=r"shard s-001.tar cannot be read: FileNotFoundError: .*once it can be, the same"):
        list(islice((lanes.row(0, index) for index in range(20)), 20))
