"""What lies under a name can have become another thing since it was looked at; whoever opens it then is told so, and waits for nobody."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mixing.bad_rows import SourceError, UnreadableRow
from mixing.content import content_hash
from mixing.file_hashes import FileHashes
from mixing.images import UnreadableImage, decode, header_size
from mixing.index import read_entry
from mixing.plain_file import NOT_PLAIN, open_plain, read_plain
from mixing.records import records
from mixing.shards import open_file
from mixing.source import Source, open_source
from mixing.tar_shards import tar_shards
from stages.checkpoint import newest_checkpoint
from stages.digests import file_digest
from stages.paths import read_json
from stages.problems import PlanError
from stages.reader import read_plan


@pytest.fixture(autouse=True)
def nobody_waits() -> Iterator[None]:
    """A pipe without a writer hangs whoever opens it as usual."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "an image": (decode, UnreadableImage),
    "an image's header": (header_size, UnreadableImage),
    "an image's hash": (content_hash, OSError),
    "an image's hash, remembered": (FileHashes().hash, OSError),
    "a shard": (lambda path: open_file(str(path)), OSError),
    "a tar": (lambda path: tar_shards([str(path)], str(path.parent)), SourceError),
    "a model's weights": (file_digest, OSError),
    "a plan": (read_plan, PlanError),
}


@pytest.mark.parametrize("what", READERS)
def test_pipe_in_the_place_of_a_file_is_refused_by_whoever_reads_it(what: str, pipe: Path) -> None:
    read, error = READERS[what]
    with pytest.raises(error, match=NOT_PLAIN):
        read(pipe)


def test_sockets_and_devices_are_refused_folders_too_and_what_a_link_leads_to_is_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="No such device"):
            open_plain(tmp_path / "socket")
    with pytest.raises(OSError, match=NOT_PLAIN):
        open_plain("/dev/zero")
    with pytest.raises(IsADirectoryError) as found:
        open_plain(tmp_path)
    assert found.value.errno == errno.EISDIR
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link") == b"abc"
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match=NOT_PLAIN):
            open_plain("/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_records_that_become_a_pipe_while_they_are_looked_at_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / name)
    monkeypatch.setattr("mixing.records.check_file", lambda file: None)  # it looked, and the pipe came after
    with pytest.raises(SourceError, match=NOT_PLAIN):
        list(records(str(tmp_path / name)))


def test_state_files_that_are_pipes_are_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    assert NOT_PLAIN in str(read_json(str(tmp_path / "state.json")))
    (tmp_path / "entry").mkdir()
    os.mkfifo(tmp_path / "entry" / "facts.json")
    assert read_entry(tmp_path / "entry") is None
    checkpoint = tmp_path / "1-first" / "step-000001"
    checkpoint.mkdir(parents=True)
    os.mkfifo(checkpoint / "manifest.json")
    said: list[str] = []
    assert newest_checkpoint(checkpoint.parent, said.append) is None
    assert NOT_PLAIN in said[0]


def opened(path: str, root: Path, prompt: str | None = None) -> Source:
    return open_source("photos", path=path, task="text_to_image", columns={}, prompt=prompt, split="train", on_bad_row="skip", root=root)


def test_image_that_becomes_a_pipe_after_its_source_was_opened_is_named_as_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = opened(".", tmp_path, "x")
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableRow, match=f"'a.png': .*{NOT_PLAIN}"):
        source.example(0)


def test_table_is_looked_through_in_the_memory_of_few_rows_and_damaged_text_spoils_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "BMP")
    image, rows = file.getvalue(), 150
    asked: list[int] = []
    monkeypatch.setattr("mixing.table.rows_of", lambda block: asked.append(block.num_rows) or block.to_pylist())
    table = pa.table({"image": [image] * rows, "text": [f"{number}" for number in range(rows)]})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as opened_file, pa.ipc.new_stream(opened_file, table.schema) as writer:
        writer.write_table(table)
    for most, expected in ((2**24, 16), (3 * len(image), 3), (1, 1)):
        asked.clear()
        monkeypatch.setattr("mixing.table._BYTES_AT_ONCE", most)
        assert len(opened("rows.arrow", tmp_path)) == rows
        assert max(asked) == expected
        assert sum(asked) == rows


def test_footer_of_a_parquet_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"image": [b""], "text": ["x"]}), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").unlink()
    os.mkfifo(tmp_path / "rows.parquet")
    monkeypatch.setattr("mixing.table.pattern_files", lambda pattern, root: [str(tmp_path / "rows.parquet")])
    with pytest.raises(SourceError, match=NOT_PLAIN):
        opened("rows.parquet", tmp_path)


def test_json_of_one_list_is_read_as_json_loads_reads_it_wherever_blocks_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"image": "é\U0001f600" * 3, "n": -1.5e300, "deep": [[], {"a": [True, None, "\\\"]}"]}]}, {}, {"n": 12}]
    (tmp_path / "rows.json").write_text("\ufeff\n" + json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr("mixing.json_list._BLOCK", block)
        assert [row for _, row in records(str(tmp_path / "rows.json"))] == rows
    for broken, said in ((b'[{"a": 1},\n {"a": }]', "line 2 column 8"), (b'[{"a": "\xff"}]', "invalid start byte at byte 9"), (b"[1 2]", "Expecting ',' delimiter: line 1 column 4 (char 3)"), (b"[{}]\n]", "Extra data: line 2 column 1 (char 5)")):
        (tmp_path / "rows.json").write_bytes(broken)
        for block in (1, 3, 64):
            monkeypatch.setattr("mixing.json_list._BLOCK", block)
            with pytest.raises(SourceError) as found:
                list(records(str(tmp_path / "rows.json")))
            assert said in str(found.value)
