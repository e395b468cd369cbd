"""The check of sources tells of every kind what opening it would refuse, in well under a second, and what it passes can be opened."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from mixing import folder as mixing_folder
from mixing import source as mixing_source
from mixing.columns import TASKS
from mixing.source import SourceError, open_source
from stages import check_sources
from stages.check_sources import source_problems
from stages.reader import read_plan
from stages.unheeded import unheeded

TABLE = {"image": ["1.png", "1.png"], "source": ["1.png", "1.png"], "text": ["a", "b"]}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: str, content: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(autouse=True)
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sources of every kind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "meta", "saved"):
        Path(folder).mkdir()
    for name in ("1.png", "photos/1.png", "meta/1.png", "saved/1.png"):
        Path(name).write_bytes(png())
    Path("photos/1.txt").write_text("a")
    Path("meta/metadata.csv").write_text("file_name,text\n1.png,a\n")
    Path("rows.csv").write_text("image,source,text\n1.png,1.png,a\n1.png,1.png,b\n")
    Path("rows.json").write_text(json.dumps([dict(zip(TABLE, values, strict=True)) for values in zip(*TABLE.values(), strict=True)]))
    Path("entities.json").write_text(json.dumps([{"image": "1.png", "text": "a", "eligen_entity_prompts": ["b"], "eligen_entity_masks": ["1.png"]}]))
    table = datasets.Dataset.from_dict({**TABLE, "image": [png(), png()], "source": [png(), png()]})
    table.save_to_disk("saved/one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk("saved/two")
    with pa.OSFile("feather.arrow", "wb") as file, pa.ipc.new_file(file, table.data.schema) as writer:
        writer.write_table(table.data.table)
    fields = json.dumps({"style": "film", "caption": "c"}).encode()
    write_tar("rows.tar", {"1.jpg": png(), "1.txt": b"a", "1.json": fields, "1.ref.png": png()})
    write_tar("fields.tar", {"1.jpg": png(), "1.json": fields})
    write_tar("cut.tar", {"1.jpg": png(), "1.txt": b"a"})
    with open("cut.tar", "r+b") as file:
        file.truncate(520)


def said(source: str) -> list[str]:
    """What the check says of a source, without its place: `field: message`."""
    Path("plan.yaml").write_text(
        f"model: x/y\nsources:\n  s: {{{source}}}\nstages:\n  - {{name: one, steps: 1, resolution: 16, batch: 1, lr: 1e-4}}\n"
    )
    read = read_plan(Path("plan.yaml"))
    return [f"{problem.where.removeprefix('sources.s.')}: {problem.message}" for problem in source_problems(read, Path.cwd())]


def is_opened(source: str) -> bool:
    said(source)
    plan = read_plan(Path("plan.yaml")).plan.sources["s"]
    try:
        open_source(
            "s", path=plan.path, task=plan.task, columns=plan.columns, prompt=plan.prompt, split=plan.split, on_bad_row="stop", root=Path.cwd()
        )
    except SourceError:
        return False
    return True


GOOD = [
    "path: rows.csv",
    "path: rows.csv, task: edit",
    "path: rows.json, task: edit",
    "path: entities.json, task: entity",
    "path: meta",
    "path: saved/one, task: edit",
    "path: saved/one/data-*.arrow",
    "path: saved/two",
    "path: saved/two, split: test",
    "path: feather.arrow",
    "path: rows.tar",
    "path: rows.tar, task: edit, columns: {reference: ref.png}",
    "path: rows.tar, columns: {prompt: caption}",
    "path: fields.tar",
]


@pytest.mark.parametrize("source", GOOD)
def test_what_can_be_opened_passes(source: str) -> None:
    assert said(source) == []
    assert is_opened(source)


@pytest.mark.parametrize(
    "source",
    ["path: rows.tar, stream: true", "path: hub/user/set, stream: true", "path: hub/user/set, split: test", 'path: rows.tar, where: style == "film"'],
)
def test_what_is_not_opened_here_passes(source: str) -> None:
    assert said(source) == []


REFERENCE = "task edit needs a reference, and no column is called reference or references or input_images or source"
BROKEN: list[tuple[str, str]] = [
    ("path: row.csv", "path: 'row.csv' does not exist; did you mean 'rows.csv'?"),
    ("path: meta, task: edit", f"path: {REFERENCE} (columns: file_name, text); say which it is, columns: {{reference: NAME}}"),
    ("path: rows.csv, take: {count: 3}", "take.count: 3 rows are asked for, and there are 2"),
    ("path: rows.json, take: {count: 3}", "take.count: 3 rows are asked for, and there are 2"),
    ("path: saved/one, take: {count: 3}", "take.count: 3 rows are asked for, and there are 2"),
    ("path: saved/two, split: test, take: {count: 2}", "take.count: 2 rows are asked for, and there are 1"),
    ("path: feather.arrow, take: {count: 3}", "take.count: 3 rows are asked for, and there are 2"),
    ("path: saved/two, split: tets", "split: no split 'tets' (splits: train, test); did you mean 'test'?"),
    ("path: saved/one, split: test", "split: only a Hub dataset, or a folder of several that save_to_disk wrote, has splits; remove it"),
    ("path: photos, split: test", "split: only a Hub dataset, or a folder of several that save_to_disk wrote, has splits; remove it"),
    ("path: photos, task: entity", "task: entity needs regions, and a folder of captioned images has none; write a metadata.jsonl into 'photos'"),
    (
        "path: rows.json, task: entity",
        "path: task entity needs a list of entity prompts, and no column is called eligen_entity_prompts (columns: image, source, text); "
        "say which it is, columns: {entity_prompts: NAME}",
    ),
    ("path: entities.json, task: entity, columns: {entity_prompts: [text, image]}", "columns.entity_prompts: 2 columns are named; one plays this role"),
    ("path: cut.tar", f"path: 'cut.tar' is cut: it ends at byte 520, inside '1.jpg', which goes to byte {512 + len(png())}, and no member before it is whole; copy it again"),
    ("path: bare.tar", "path: no member for the target (columns: 'txt'); its usual extensions are jpg, jpeg, png, webp; say which: columns: {target: NAME}"),
    ("path: hidden.tar", "path: 'hidden.tar' holds no rows; members of one row agree up to the first dot: 0001.jpg, 0001.txt"),
    ("path: rows.tar, task: edit", f"path: {REFERENCE} (columns: jpg, txt, json, ref.png, style, caption, image); say which it is, columns: {{reference: NAME}}"),
    ("path: rows.tar, columns: {prompt: captoin}", "columns.prompt: no column 'captoin' (columns: jpg, txt, json, ref.png, style, caption, image); did you mean 'caption'?"),
    ("path: zipped.tar", "path: zipped.tar is compressed by gzip, so that no row can be read without all before it; unpack it: gunzip zipped.tar"),
    ("path: zipped.tar.gz", "path: a compressed tar has no row that can be read without all before it; unpack it: gunzip zipped.tar.gz"),
    ("path: text.tar", "path: text.tar is no tar: no header stands at its beginning"),
    ("path: 'shard-{0..1}.tar'", "path: no file 'shard-0.tar', which 'shard-{0..1}.tar' names"),
    ("path: 'x-*.csv'", f"path: 'x-*.csv': a pattern names .parquet, .arrow or .tar files; a source is {check_sources.KINDS}"),
    ("path: text.arrow", "path: 'text.arrow' is not readable Arrow: Expected to read 1819043176 metadata bytes, but only read 496"),
    ("path: object.json", "path: object.json is JSON, but not a list of objects [{...}, {...}]; write one, or a .jsonl"),
    ("path: torn.json", "path: torn.json is not JSON: Expecting ',' delimiter: line 1 column 3 (char 2); one object a line is a .jsonl"),
    ("path: quote.csv", "path: quote.csv:2: a double quote is opened and never closed; close it, or double it"),
    ("path: semicolon.csv", "path: the header line of semicolon.csv is one column, 'image;text'; separate columns by commas, not by ';'"),
    ("path: notes.md", f"path: 'notes.md' cannot be read; a source is {check_sources.KINDS}"),
    ("path: rows.csv, stream: true", "stream: only .tar shards, .parquet files and Hub datasets are streamed; remove it"),
    ("path: photos, stream: true", "stream: only .tar shards, .parquet files and Hub datasets are streamed; remove it"),
    ('path: rows.csv, where: stile == "a"', "where: no column 'stile' (columns: image, source, text)"),
    ('path: rows.tar, where: stile == "a"', "where: no column 'stile' (columns: jpg, txt, json, ref.png, style, caption, image); did you mean 'style'?"),
    ("path: photos, where: widht > 5", "where: no column 'widht' (columns: none); did you mean 'width'?"),
    ("path: rows.csv, take: {fraction: 0.5, by: stratified, column: txt}", "take.column: no column 'txt' (columns: image, source, text); did you mean 'text'?"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), BROKEN)
def test_what_cannot_be_opened_is_told_with_the_cure(source: str, expected: str) -> None:
    write_tar("bare.tar", {"1.txt": b"a"})
    write_tar("hidden.tar", {".1.txt": b"a", "README": b"a"})
    for name in ("zipped.tar", "zipped.tar.gz"):
        Path(name).write_bytes(b"\x1f\x8b" + bytes(600))
    for name in ("text.tar", "text.arrow", "notes.md"):
        Path(name).write_text("hello" * 100)
    for name, text in (("object.json", "{}"), ("torn.json", "[1"), ("quote.csv", 'image,text\n1.png,"a\n'), ("semicolon.csv", "image;text\n1;a\n")):
        Path(name).write_text(text)
    assert said(source) == [expected]
    if "take" not in source and "where" not in source and "stream" not in source:
        assert not is_opened(source)


def test_a_saved_folder_without_its_facts_says_so() -> None:
    for content, reason in (("{", "state.json is not JSON: Expecting property name"), ("{}", "state.json names no files; save the dataset again")):
        Path("saved/one/state.json").write_text(content)
        (message,) = said("path: saved/one")
        assert message.startswith(f"path: 'saved/one': {reason}")
    Path("saved/two/dataset_dict.json").write_text('{"splits": 3}')
    assert said("path: saved/two") == ["path: 'saved/two': dataset_dict.json does not name the splits; save the dataset again"]


def test_a_large_json_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import check_files

    monkeypatch.setattr(check_files, "_MOST_READ", 10)
    assert said("path: rows.json, take: {count: 3}") == []
    assert said("path: rows.csv, take: {count: 3}") == []


@pytest.mark.parametrize("task", TASKS)
def test_columns_of_roles_that_a_task_does_not_have_are_unheeded(task: str) -> None:
    said(f"path: rows.json, task: {task}, columns: {{reference: source, entity_prompts: text, entity_masks: image}}")
    refused = {location[-1] for location, _ in unheeded(read_plan(Path("plan.yaml")).plan) if location[:3] == ("sources", "s", "columns")}
    roles: Sequence[str] = ([] if TASKS[task].references else ["reference"]) + ([] if TASKS[task].regions else ["entity_prompts", "entity_masks"])
    assert refused == set(roles)


def test_check_knows_the_kinds_that_are_opened() -> None:
    assert check_sources.KINDS == mixing_source.KINDS
    assert check_sources.METADATA_FILES == mixing_folder.METADATA_FILES
