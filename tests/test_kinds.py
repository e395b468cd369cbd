"""Every kind of file, and every format of rows, gives the same examples for the same content; what is broken is named."""

from __future__ import annotations

import csv
import datetime
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from mixing.bad_rows import RowError
from mixing.columns import choose_columns
from mixing.images import header_size
from mixing.source import Source, SourceError, UnreadableRow, open_source
from mixing.table import TableRows
from mixing.tar import TarRows
from mixing.tar_members import Torn, members, split_name
from mixing.tasks import Asked, Cells, to_cells, without_placeholders

Values = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _no_network_and_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def opened(
    root: Path,
    path: str,
    task: str = "text_to_image",
    columns: Asked | None = None,
    prompt: str | None = None,
    split: str = "train",
    on_bad_row: Literal["skip", "stop"] = "skip",
    extra: Sequence[str] = (),
    index: Path | None = None,
) -> Source:
    return open_source(
        "rows", path=path, task=task, columns=columns or {}, prompt=prompt, split=split, on_bad_row=on_bad_row, root=root, extra=extra, index=index
    )


def refusal(root: Path, path: str, task: str = "text_to_image", columns: Asked | None = None, split: str = "train") -> str:
    """What opening a source that cannot be used says, without the source's name and the root's."""
    with pytest.raises(SourceError) as caught:
        opened(root, path, task, columns, split=split)
    return str(caught.value).removeprefix(f"source 'rows' ({path}): ").replace(f"{root}/", "")


def noise(seed: int, height: int = 6, width: int = 5) -> Values:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(values: Values, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


GOOD = encoded(noise(0))


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True)
class Row:
    """One row, whatever it is stored as."""

    prompt: str
    target: Values
    references: tuple[Values, ...] = ()


CAPTIONED = tuple(Row(f"row {seed}, with «a comma»\nand a second line", noise(seed)) for seed in range(6))
EDITS = tuple(
    Row(f"turn <img><|image_1|></img> {seed}" + " into <img><|image_2|></img>" * (seed % 2), noise(seed), tuple(noise(9 * seed + k + 1) for k in range(1 + seed % 2)))
    for seed in range(6)
)


def files_of(folder: Path, rows: Sequence[Row]) -> list[dict[str, object]]:
    """Write the images, and give a record for each row."""
    records: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        write(folder / f"{number}.png", encoded(row.target))
        references = [f"references/{number}-{place}.png" for place in range(len(row.references))]
        for name, reference in zip(references, row.references, strict=True):
            write(folder / name, encoded(reference))
        records.append({"image": f"{number}.png", "input_images": references, "instruction": row.prompt, "task_type": "x"})
    return records


def write_csv(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Lists are written as JSON."""
    with file.open("w", encoding="utf-8-sig", newline="") as text:
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows)


def as_csv(root: Path, rows: Sequence[Row]) -> str:
    write_csv(root / "rows.csv", files_of(root, rows))
    return "rows.csv"


def as_metadata_csv(root: Path, rows: Sequence[Row]) -> str:
    records = files_of(root / "folder", rows)
    write_csv(root / "folder" / "metadata.csv", [{"file_name": row["image"], "text": row["instruction"], "reference_file_names": row["input_images"]} for row in records])
    return "folder"


def as_json(root: Path, rows: Sequence[Row]) -> str:
    write(root / "rows.json", json.dumps(files_of(root, rows)))
    return "rows.json"


def as_json_lines(root: Path, rows: Sequence[Row]) -> str:
    write(root / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in files_of(root, rows)))
    return "rows.jsonl"


def table_of(rows: Sequence[Row]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "references": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    columns = {
        "image": [{"bytes": encoded(row.target), "path": None} for row in rows],
        "references": [[{"bytes": encoded(each), "path": None} for each in row.references] for row in rows],
        "caption": [row.prompt for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def as_parquet(root: Path, rows: Sequence[Row]) -> str:
    table_of(rows).to_parquet(root / "rows.parquet")
    return "rows.parquet"


def as_saved(root: Path, rows: Sequence[Row]) -> str:
    table_of(rows).save_to_disk(root / "saved", num_shards=2)
    return "saved"


def as_saved_splits(root: Path, rows: Sequence[Row]) -> str:
    datasets.DatasetDict({"train": table_of(rows), "test": table_of(rows[:1])}).save_to_disk(root / "splits")
    return "splits"


def as_arrow(root: Path, rows: Sequence[Row]) -> str:
    """Two files, as `datasets` writes them."""
    table_of(rows).save_to_disk(root / "saved", num_shards=2)
    return "saved/data-{00000..00001}-of-00002.arrow"


def as_feather(root: Path, rows: Sequence[Row]) -> str:
    """Arrow's format with random access."""
    table = table_of(rows).data.table
    with pa.OSFile(str(root / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return "rows.arrow"


def write_tar(file: Path, content: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


TAR_COLUMNS: Asked = {"target": "output.png", "reference": ["input.png", "second.png"]}


def as_tar(root: Path, rows: Sequence[Row]) -> str:
    """Two shards."""
    for shard, some in enumerate((range(2), range(2, len(rows)))):
        content = []
        for number in some:
            row = rows[number]
            content.append((f"{number:04}.{'output.' if row.references else ''}png", encoded(row.target)))
            content.append((f"{number:04}.txt", row.prompt.encode()))
            content += [(f"{number:04}.{name}.png", encoded(each)) for name, each in zip(("input", "second"), row.references, strict=False)]
        write_tar(root / f"shard-{shard}.tar", content)
    return "shard-{0..1}.tar"


Writer = Callable[[Path, Sequence[Row]], str]
WRITERS: list[Writer] = [as_json_lines, as_csv, as_metadata_csv, as_json, as_parquet, as_saved, as_saved_splits, as_arrow, as_feather, as_tar]


def assert_same(source: Source, rows: Sequence[Row]) -> None:
    assert len(source) == len(rows)
    assert source.bad == ()
    for number, row in enumerate(rows):
        example = source.example(number)
        assert example.prompts == (row.prompt,)
        for image, values in zip((example.target, *example.references), (row.target, *row.references), strict=True):
            assert np.array_equal(np.asarray(image), values)
    assert source.sizes.tolist() == [[6, 5]] * len(rows)
    assert source.keys(np.arange(len(rows))) == [source.key(number) for number in range(len(rows))]
    assert len(set(source.keys(np.arange(len(rows))))) == len(rows)


@pytest.mark.parametrize("kind", WRITERS)
def test_all_kinds_give_the_same_six_rows(kind: Writer, tmp_path: Path) -> None:
    assert_same(opened(tmp_path, kind(tmp_path, CAPTIONED)), CAPTIONED)


@pytest.mark.parametrize("kind", WRITERS)
def test_all_kinds_give_the_same_six_rows_with_references(kind: Writer, tmp_path: Path) -> None:
    path = kind(tmp_path, EDITS)
    source = opened(tmp_path, path, "edit", TAR_COLUMNS if kind is as_tar else None)
    assert_same(source, EDITS)
    assert source.num_references.tolist() == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("kind", [as_saved, as_tar])
def test_a_source_goes_through_pickling_and_new_processes(kind: Writer, tmp_path: Path) -> None:
    source = opened(tmp_path, kind(tmp_path, CAPTIONED))
    source.example(5)
    content = pickle.dumps(source)
    assert_same(pickle.loads(content), CAPTIONED)  # noqa: S301 (our own bytes)
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for number in (3, 0):
                assert np.array_equal(np.asarray(pool.apply(source.example, (number,)).target), CAPTIONED[number].target)


@pytest.mark.parametrize("kind", [as_csv, as_saved, as_parquet, as_tar])
def test_a_source_from_the_data_index_is_equal(kind: Writer, tmp_path: Path) -> None:
    path = kind(tmp_path, CAPTIONED)
    time.sleep(0.1)  # a file that has only just changed is not trusted
    first = opened(tmp_path, path, index=tmp_path / "index")
    second = opened(tmp_path, path, index=tmp_path / "index")
    for source in (first, second):
        assert_same(source, CAPTIONED)
    assert first.fingerprint == second.fingerprint == opened(tmp_path, path).fingerprint


def test_a_rewritten_shard_is_indexed_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_tar(tmp_path / "x.tar", [("a.png", encoded(noise(seed))), ("a.txt", b"x")])
        time.sleep(0.1)
        for _ in range(2):
            source = opened(tmp_path, "x.tar", index=tmp_path / "index")
            assert np.array_equal(np.asarray(source.example(0).target), noise(seed))


def test_keys_say_file_and_row(tmp_path: Path) -> None:
    keys = {}
    for kind in (as_csv, as_metadata_csv, as_json, as_saved, as_saved_splits, as_arrow, as_tar):
        (root := tmp_path / kind.__name__).mkdir()
        source = opened(root, kind(root, CAPTIONED))
        keys[kind.__name__] = [source.key(number) for number in (0, 5)]
    assert keys == {
        "as_csv": ["0.png", "5.png"],
        "as_metadata_csv": ["0.png", "5.png"],
        "as_json": ["0.png", "5.png"],
        "as_saved": ["saved:0", "saved:5"],
        "as_saved_splits": ["train:0", "train:5"],
        "as_arrow": ["data-00000-of-00002.arrow:0", "data-00001-of-00002.arrow:2"],
        "as_tar": ["shard-0.tar:0000", "shard-1.tar:0005"],
    }


# Records: .csv and .json.


def test_bad_rows_of_a_csv_are_named_by_line(tmp_path: Path) -> None:
    write(tmp_path / "a.png", GOOD)
    bad = {
        3: (b"a.png", "1 cell, and the header line names 2; a cell with a comma stands between double quotes"),
        4: (b"a.png,one,two", "3 cells, and the header line names 2; a cell with a comma stands between double quotes"),
        5: (b'a.png,"x"y', "the line is not CSV: ',' expected after '\"'"),
        6: (b"a.png,caf\xe9", "the line is not UTF-8; save the file as UTF-8"),
        7: (b"b.png,x", "no file 'b.png'"),
        8: (b",x", "'image' holds no images; it must hold one"),
        9: (b"a.png,", "no prompt in 'text'"),
    }
    lines = [b"image,text", b"a.png,first", *(line for line, _ in bad.values()), b"", b'a.png,"two\nlines"', *[b"a.png,x"] * 700]
    write(tmp_path / "rows.csv", b"\r\n".join(lines))
    source = opened(tmp_path, "rows.csv")
    assert [(row.key, row.reason) for row in source.bad] == [(f"rows.csv:{line}", reason) for line, (_, reason) in bad.items()]
    assert [source.example(number).prompt for number in (0, 1)] == ["first", "two\nlines"]
    assert len(source) == 702


def test_a_number_in_a_csv_is_one_only_where_no_text_is_wanted(tmp_path: Path) -> None:
    write(tmp_path / "7", GOOD)
    write_csv(tmp_path / "rows.csv", [{"image": "7", "text": "007", "score": score, "name": name} for score, name in (("1", "1"), ("0.5", "b"), ("", ""))])
    source = opened(tmp_path, "rows.csv", extra=("score", "name", "text"))
    assert source.example(0).prompt == "007"
    assert {name: values.to_pylist() for name, values in source.extra.items()} == {
        "score": [1.0, 0.5, None],
        "name": ["1", "b", None],
        "text": ["007"] * 3,
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", "{", "rows.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); one object a line is a .jsonl"),
        ("rows.json", '{"image": ["a.png"]}', "rows.json is JSON, but not a list of objects [{...}, {...}]; write one, or a .jsonl"),
        ("rows.json", b'["\xff"]', "rows.json is not UTF-8 (invalid start byte at byte 3); save it as UTF-8"),
        ("rows.json", "[]", "rows.json holds no rows"),
        ("rows.json", "[3]", "rows.json holds no rows; rows.json:1: it is JSON, but not an object {...}"),
        ("rows.csv", "", "rows.csv holds no rows"),
        ("rows.csv", "image,text\n", "rows.csv holds no rows"),
        ("rows.csv", "image,text,image\n", "the header line of rows.csv names 'image' twice; give each column a name of its own"),
        ("rows.csv", "image;text\na;b\n", "the header line of rows.csv is one column, 'image;text'; separate columns by commas, not by ';'"),
        ("rows.csv", 'image,text\na,"b\nc,d\n', "rows.csv:2: a double quote is opened and never closed; close it, or double it"),
        ("rows.csv", "image,words\na,b\n", "no column for the prompt (columns: 'image', 'words'); usual names are prompt, text, caption, instruction; say which: columns: {prompt: NAME}. Or say `prompt:` for rows that have none."),
        ("rows.xml", "<x/>", "it cannot be read; a source is a folder of images with .txt captions or metadata.jsonl, a .jsonl, .json or .csv file, .parquet or .arrow files, .tar shards, a folder that save_to_disk wrote, or hub/USER/DATASET"),
        ("rows.tar.gz", "x", "a compressed tar has no row that can be read without all before it; unpack it: gunzip rows.tar.gz"),
        ("rows.tgz", "x", "a compressed tar has no row that can be read without all before it; unpack it: gunzip rows.tgz"),
        ("rows.tar", b"\x1f\x8b" + bytes(600), "rows.tar is compressed by gzip, so that no row can be read without all before it; unpack it: gunzip rows.tar"),
        ("rows.tar", "hello" * 200, "rows.tar is no tar: no header stands at its beginning"),
        ("rows.tar", "", "rows.tar is empty; copy it again"),
        ("rows.tar", bytes(10240), "it holds no rows"),
        ("rows.arrow", "hello", "rows.arrow is not a readable .arrow file: Expected to read 1819043176 metadata bytes, but only read 1"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_says_why(name: str, content: bytes | str, said: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    assert refusal(tmp_path, name) == said


def test_two_kinds_of_metadata_in_one_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "metadata.jsonl", "{}\n")
    as_metadata_csv(tmp_path, CAPTIONED)
    assert refusal(tmp_path, "folder") == "folder holds metadata.jsonl and metadata.csv; keep the one that is meant"


# Tables.


def test_a_split_of_a_saved_dataset_is_named_and_a_wrong_one_refused(tmp_path: Path) -> None:
    path = as_saved_splits(tmp_path, CAPTIONED)
    source = opened(tmp_path, path, split="test")
    assert [source.key(number) for number in range(len(source))] == ["test:0"]
    assert refusal(tmp_path, path, split="tets") == "split: no split 'tets' (splits: train, test); did you mean 'test'?"
    assert refusal(tmp_path, as_saved(tmp_path, CAPTIONED), split="test") == "split: the dataset saved here has none ('test' found); leave it out"
    write(tmp_path / "splits" / "dataset_dict.json", "{}")
    assert refusal(tmp_path, path) == "splits/dataset_dict.json does not name the splits: 'splits'; save the dataset again"


def test_a_saved_dataset_that_is_torn_says_so(tmp_path: Path) -> None:
    path = as_saved(tmp_path, CAPTIONED)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "the dataset saved in saved cannot be loaded: " in refusal(tmp_path, path)


def test_arrow_files_of_different_columns_are_no_table(tmp_path: Path) -> None:
    for number, columns in enumerate(({"image": [GOOD], "text": ["x"]}, {"image": ["x"], "text": [3]})):
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / f"saved-{number}")
    assert refusal(tmp_path, "saved-*/*.arrow").startswith("saved-*/*.arrow cannot be read as one table: ")


def test_columns_of_width_and_height_spare_the_reading_of_images(tmp_path: Path) -> None:
    """The images are broken, which only reading them would tell."""
    columns = {"image": [b"no image"] * 3, "text": ["x"] * 3, "width": [7, 8, 9], "height": pa.array([4, 5, 6], pa.uint16())}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = opened(tmp_path, "x.parquet")
    assert source.sizes.tolist() == [[4, 7], [5, 8], [6, 9]]
    with pytest.raises(UnreadableRow, match="target: not an image"):
        source.example(0)
    longer = {**columns, "image": [b"no image", b"no image", b"no image."]}
    parquet.write_table(pa.table(longer), tmp_path / "y.parquet")
    assert opened(tmp_path, "y.parquet").fingerprint != source.fingerprint
    structs = {**columns, "image": [{"bytes": b"no image", "path": "x"}] * 3}
    parquet.write_table(pa.table(structs), tmp_path / "z.parquet")
    assert opened(tmp_path, "z.parquet").sizes.tolist() == [[4, 7], [5, 8], [6, 9]]


@pytest.mark.parametrize("sized", [False, True])
def test_an_image_that_a_table_names_is_looked_at_again_once_it_has_changed(sized: bool, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.png", encoded(noise(number)))
    rows = [{"image": f"{number}.png", "text": "x", **({"width": 5, "height": 6} if sized else {})} for number in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    time.sleep(0.1)
    first = opened(tmp_path, "x.parquet", index=tmp_path / "index")
    again = opened(tmp_path, "x.parquet", index=tmp_path / "index")
    assert (again.fingerprint, again.sizes.tolist()) == (first.fingerprint, [[6, 5]] * 3)
    write(tmp_path / "1.png", encoded(noise(7, 8, 9)))
    changed = opened(tmp_path, "x.parquet", index=tmp_path / "index")
    assert changed.fingerprint != first.fingerprint
    assert changed.sizes.tolist() == [[6, 5], [6, 5] if sized else [8, 9], [6, 5]]


@pytest.mark.parametrize("odd", [None, 0, -3, 2**40])
def test_a_width_that_says_nothing_is_not_believed(odd: int | None, tmp_path: Path) -> None:
    columns = {"image": [GOOD] * 2, "text": ["x"] * 2, "width": pa.array([odd, 5], pa.int64()), "height": [6, 6]}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert opened(tmp_path, "x.parquet").sizes.tolist() == [[6, 5]] * 2
    floats = {**columns, "width": [1.0, 2.0]}
    parquet.write_table(pa.table(floats), tmp_path / "y.parquet")
    assert opened(tmp_path, "y.parquet").sizes.tolist() == [[6, 5]] * 2


def test_a_table_whose_rows_are_all_good_holds_nothing_for_each(tmp_path: Path) -> None:
    columns = {"image": [GOOD] * 200, "text": ["x"] * 200}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    parquet.write_table(pa.table({**columns, "text": [None, *["x"] * 199]}), tmp_path / "y.parquet")
    whole, holed = opened(tmp_path, "x.parquet").rows, opened(tmp_path, "y.parquet").rows
    assert isinstance(whole, TableRows)
    assert isinstance(holed, TableRows)
    assert whole.positions is None
    assert holed.positions is not None
    assert holed.positions.tolist() == list(range(1, 200))
    assert holed.key(0) == "y.parquet:1"


def test_extra_columns_are_kept_in_every_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.png", GOOD)
    rows = [{"image": "a.png", "text": "x", "style": style, "score": score} for style, score in (("photo", 1), (None, 2), ("film", 3))]
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "rows.json", json.dumps(rows))
    write_csv(tmp_path / "rows.csv", rows)
    parquet.write_table(pa.Table.from_pylist([row | {"image": GOOD} for row in rows]), tmp_path / "rows.parquet")
    datasets.Dataset.from_list([row | {"image": GOOD} for row in rows]).save_to_disk(tmp_path / "saved")
    write_tar(tmp_path / "rows.tar", [(f"{at}.{name}", data) for at, row in enumerate(rows) for name, data in (("png", GOOD), ("json", json.dumps(row | {"image": None}).encode()))])
    for path in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved", "rows.tar"):
        source = opened(tmp_path, path, extra=("score", "style"))
        assert {name: values.to_pylist() for name, values in source.extra.items()} == {"score": [1, 2, 3], "style": ["photo", None, "film"]}, path
        with pytest.raises(SourceError, match=r"no column 'styl' \(columns: .*'style'.*\); did you mean 'style'\?"):
            opened(tmp_path, path, extra=("styl",))


def test_an_extra_value_that_cannot_be_compared_is_a_bad_row() -> None:
    columns = choose_columns("text_to_image", ["image", "text", "tags"], {}, None, ["tags"])

    def kept(value: object) -> object:
        return to_cells({"image": b"x", "text": "x", "tags": value}, "text_to_image", columns, None, Path).extra[0]

    assert [kept(value) for value in ("x", 1, 0.5, True, None)] == ["x", 1, 0.5, True, None]
    assert kept(datetime.date(2024, 2, 3)) == "2024-02-03"
    for odd, said in ((["x"], "a list"), ({}, "a mapping"), (b"x", "bytes")):
        with pytest.raises(RowError, match=f"'tags' holds {said}; what can be compared is text, numbers, true and false"):
            kept(odd)


# Shards.


def test_members_in_any_order_are_rows_by_their_names(tmp_path: Path) -> None:
    content = [
        ("./b/0001.jpg", encoded(noise(1), "JPEG")),
        ("b.c/0001.png", encoded(noise(2))),
        ("._0001.jpg", b"x"),
        ("README", b"x"),
        ("b/0001.txt", b"\xef\xbb\xbfone"),
        ("b.c/0001.TXT", b"two"),
        ("b/0001.cls", b"7"),
    ]
    write_tar(tmp_path / "x.tar", content)
    source = opened(tmp_path, "x.tar", extra=("cls",))
    assert source.keys(np.arange(2)) == ["x.tar:b/0001", "x.tar:b.c/0001"]
    assert [source.example(number).prompt for number in range(2)] == ["one", "two"]
    assert np.array_equal(np.asarray(source.example(1).target), noise(2))
    assert source.extra["cls"].to_pylist() == [7, None]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int, tmp_path: Path) -> None:
    names = ["a.jpg", "x" * 60 + "/" + "y" * 90 + ".jpg", "plain/ü.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" * 80 + "n.png", "日本" * 60 + ".png"]
    if form == tarfile.GNU_FORMAT:
        names.append(os.fsdecode(b"caf\xe9.png"))
    with tarfile.open(tmp_path / "x.tar", "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        folder = tarfile.TarInfo("plain")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 511 + number, 1.5  # a fraction makes PAX write an extended header
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with tarfile.open(tmp_path / "x.tar", encoding="utf-8", errors="surrogateescape") as tar:
        theirs = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    with open(tmp_path / "x.tar", "rb") as file:
        ours = [(member.name, member.offset, member.num_bytes) for member in members(file)]
    assert ours == theirs
    assert [name for name, _, _ in ours] == names


def test_a_size_beyond_octal_digits_is_read(tmp_path: Path) -> None:
    """GNU writes sizes from 8 GiB on in binary; the file is all hole."""
    member = tarfile.TarInfo("x.png")
    member.size = 2**33 + 5
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + 2**33 + 512)
    with open(tmp_path / "x.tar", "rb") as file:
        assert [each.num_bytes for each in members(file)] == [2**33 + 5]


def test_names_end_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("a/b.c/0001.input.PNG") == ("a/b.c/0001", "input.png")
    assert split_name("././0001.x") == ("0001", "x")
    assert split_name(os.fsdecode(b"caf\xe9.png")) == ("caf\\xe9", "png")
    for name in (".hidden.png", "a/.png", "README", "a.b/README", "x.", ""):
        assert split_name(name) is None


def filled(number: int) -> list[tuple[str, bytes]]:
    """So many good rows that a few bad ones are less than 1 %."""
    return [(f"good{row:04}.{name}", data) for row in range(number) for name, data in (("png", GOOD), ("txt", b"x"))]


def test_bad_rows_of_a_shard_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(GOOD)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(data))

        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "pipe")):
            add(f"{name}.png", kind=kind)
            add(f"{name}.txt")
        add("twice.png", GOOD)
        add("twice.png", GOOD)
        add("two.png", GOOD)
        add("two.jpg", GOOD)
        add("two.txt")
        add("alone.txt")
        add("silent.png", GOOD)
        add("empty.png", b"")
        add("empty.txt")
        add("latin.png", GOOD)
        add("latin.txt", b"caf\xe9")
        for name, data in filled(1200):
            add(name, data)
    source = opened(tmp_path, "x.tar")
    assert [(row.key, row.reason) for row in source.bad] == [
        ("x.tar:soft", "its member 'png' is a link; store the file itself"),
        ("x.tar:hard", "its member 'png' is a link; store the file itself"),
        ("x.tar:device", "its member 'png' is a device, not a file; leave it out"),
        ("x.tar:pipe", "its member 'png' is a device, not a file; leave it out"),
        ("x.tar:twice", "its member 'png' stands in the shard twice; keep one"),
        ("x.tar:two", "it has members 'jpg', 'png'; say which is the target: columns: {target: jpg}"),
        ("x.tar:alone", "'image' holds no images; it must hold one"),
        ("x.tar:silent", "no prompt in 'txt'"),
        ("x.tar:empty", "target: the file is empty"),
        ("x.tar:latin", "its 'txt' is not UTF-8 (unexpected end of data at byte 4); save it as UTF-8"),
    ]
    assert len(source) == 1200
    assert source.key(0) == "x.tar:good0000"
    assert isinstance(source.rows, TarRows)
    assert sorted(os.listdir(tmp_path)) == ["x", "x.tar"]  # nothing was unpacked


def test_a_shard_that_is_cut_inside_a_member_loses_that_row_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*filled(150), ("last.txt", b"x"), ("last.png", GOOD)])
    with open(tmp_path / "x.tar", "rb") as file:
        (last,) = [member for member in members(file) if member.name == "last.png"]
    for end in (last.offset, last.offset + len(GOOD) - 1):
        os.truncate(tmp_path / "x.tar", max(end, last.offset + 1))
        source = opened(tmp_path, "x.tar")
        assert len(source) == 150
        assert [(row.key, row.reason) for row in source.bad] == [
            ("x.tar:last", "its member 'png' is cut: the shard ends inside it; copy the shard again")
        ]
        write_tar(tmp_path / "x.tar", [*filled(150), ("last.txt", b"x"), ("last.png", GOOD)])


def test_a_shard_that_is_cut_between_members_names_the_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", filled(150))
    content = (tmp_path / "whole.tar").read_bytes()
    with open(tmp_path / "whole.tar", "rb") as file:
        last = list(members(file))[-1]
    end = last.offset + 512
    write(tmp_path / "x.tar", content[:end])  # the end is missing, and no row
    assert (len(opened(tmp_path, "x.tar")), opened(tmp_path, "x.tar").bad) == (150, ())
    for damaged, reason in (
        (content[: end + 100].ljust(end + 100, b"\1"), f"the shard is cut: it ends inside a header, at byte {end + 100:,}; copy it again"),
        (content[:end] + b"\1" * 1024, f"the shard is cut: no header stands at byte {end:,}, where one belongs; what follows cannot be read; copy it again"),
    ):
        write(tmp_path / "x.tar", damaged)
        source = opened(tmp_path, "x.tar")
        assert len(source) == 150
        assert [(row.key, row.reason) for row in source.bad] == [("x.tar", reason)]


def test_a_shard_with_nothing_whole_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", GOOD), ("a.txt", b"x")])
    os.truncate(tmp_path / "x.tar", 600)
    assert refusal(tmp_path, "x.tar") == (
        f"x.tar is cut: it ends at byte 600, inside 'a.png', which goes to byte {512 + len(GOOD)}, and no member before it is whole; copy it again"
    )


def test_no_cut_or_garbled_shard_raises_anything_else(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*filled(3), ("long/" * 50 + "n.png", GOOD)], tarfile.PAX_FORMAT)
    content = (tmp_path / "x.tar").read_bytes()
    chance = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content[: chance.integers(1, len(content))])
        for place in chance.integers(0, len(damaged), 3):
            damaged[place] = chance.integers(0, 256)
        whole = list[str]()
        try:
            for member in members(io.BytesIO(damaged)):
                assert 0 <= member.offset <= member.offset + member.num_bytes <= len(damaged)
                whole.append(member.name)
        except Torn:
            continue


def test_a_shard_that_changed_after_opening_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", GOOD), ("a.txt", b"x")])
    source = opened(tmp_path, "x.tar")
    os.utime(tmp_path / "x.tar", (1, 1))
    with pytest.raises(UnreadableRow, match="the shard has changed since the source was opened; start again"):
        source.example(0)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(UnreadableRow, match="the shard cannot be read: No such file"):
        pickle.loads(pickle.dumps(source)).example(0)  # noqa: S301 (our own bytes)


def test_more_shards_than_are_held_open_are_read_in_any_order(tmp_path: Path) -> None:
    for number in range(70):
        write_tar(tmp_path / f"{number:02}.tar", [("a.png", encoded(noise(number))), ("a.txt", b"x")])
    source = opened(tmp_path, "{00..69}.tar")
    assert isinstance(source.rows, TarRows)
    for number in np.random.default_rng(0).permutation(np.repeat(np.arange(70), 2)).tolist():
        assert np.array_equal(np.asarray(source.example(number).target), noise(number))
    assert len(source.rows.shards._open) <= 64


def test_the_size_of_a_large_image_comes_from_its_first_bytes(tmp_path: Path) -> None:
    large = noise(1, 300, 200)
    turned = Image.Exif()
    turned[0x0112] = 6
    padding = b"\xff\xe1\xff\xff" + bytes(65533)
    jpeg = encoded(large, "JPEG", quality=100, exif=turned)
    content = {
        "a": encoded(large),
        "b": jpeg,
        "c": jpeg[:2] + padding + jpeg[2:],  # its header stands behind what is read first
        "d": encoded(large, "WEBP", lossless=True, exif=turned),
    }
    write_tar(tmp_path / "x.tar", [(f"{name}.{kind}", data) for name, image in content.items() for kind, data in (("jpg", image), ("txt", b"x"))])
    source = opened(tmp_path, "x.tar")
    assert all(len(image) > 2**15 for image in content.values())
    assert source.sizes.tolist() == [list(header_size(image)) for image in content.values()]
    assert source.sizes.tolist()[:2] == [[300, 200], [200, 300]]
    assert isinstance(source.rows, TarRows)
    assert source.rows.seen(0).unread == len(content["a"])
    again = opened(tmp_path, "x.tar", "edit", {"reference": "jpg"})  # with references all is read
    assert again.sizes.tolist() == source.sizes.tolist()


def test_what_a_member_is_for_goes_by_its_extension(tmp_path: Path) -> None:
    fields = {"caption": "from the fields", "width": 3, "url": "x"}

    def prompt(*content: tuple[str, bytes], columns: Asked | None = None) -> str:
        write_tar(tmp_path / "x.tar", [("0.jpg", GOOD), *((f"0.{name}", data) for name, data in content)])
        return opened(tmp_path, "x.tar", columns=columns).example(0).prompt

    stored = ("json", json.dumps(fields).encode())
    assert prompt(stored) == "from the fields"
    assert prompt(stored, ("txt", b"from the text")) == "from the text"
    assert prompt(("caption", b"from the caption")) == "from the caption"
    assert prompt(stored, ("txt", b"from the text"), columns={"prompt": "caption"}) == "from the fields"
    for content, columns, said in (
        (("gif", GOOD), None, "no member for the target (columns: 'gif', 'txt'); its usual extensions are jpg, jpeg, png, webp; say which: columns: {target: NAME}"),
        (("jpg", GOOD), {"target": "jpgg"}, "columns.target: no column 'jpgg' (columns: 'jpg', 'txt'); did you mean 'jpg'?"),
        (("jpg", GOOD), {"target": "txt"}, "1 of 1 rows are bad; a source needs a good one; repair or remove them: 'x.tar:0': 'txt' holds bytes, not text"),
    ):  # fmt: skip
        write_tar(tmp_path / "x.tar", [(f"0.{content[0]}", content[1]), ("0.txt", b"x")])
        assert refusal(tmp_path, "x.tar", columns=columns) == said
    write_tar(tmp_path / "x.tar", [("0.jpg", GOOD), ("0.json", b'{"text": "x", "source": "a.png"}')])
    assert "'source' names a file; the images of a row in a tar are members of its own" in refusal(tmp_path, "x.tar", "edit")


# Formats of rows.


def mask(seed: int) -> Values:
    return np.random.default_rng(seed).integers(0, 2, (6, 5), dtype=np.uint8) * 255


def entity_rows(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number in range(6):
        write(folder / f"{number}.png", encoded(noise(number)))
        masks = [f"masks/{number}-{place}.png" for place in range(1 + number % 3)]
        for place, name in enumerate(masks):
            write(folder / name, encoded(mask(10 * number + place)))
        prompts = [f" entity {number}-{place}" for place in range(len(masks))]
        rows.append({"image": f"{number}.png", "prompt": f"scene {number}", "eligen_entity_prompts": prompts, "eligen_entity_masks": masks})
    return rows


def test_entities_are_the_same_in_every_kind(tmp_path: Path) -> None:
    rows = entity_rows(tmp_path)
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "rows.json", json.dumps(rows))
    write_csv(tmp_path / "rows.csv", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "paths.parquet")
    stored = [row | {"image": (tmp_path / str(row["image"])).read_bytes(), "eligen_entity_masks": [(tmp_path / name).read_bytes() for name in row["eligen_entity_masks"]]} for row in rows]  # type: ignore[attr-defined]
    parquet.write_table(pa.Table.from_pylist(stored), tmp_path / "bytes.parquet")
    datasets.Dataset.from_list(stored).save_to_disk(tmp_path / "saved")
    content = []
    for number, row in enumerate(stored):
        content += [(f"{number}.png", row["image"]), (f"{number}.txt", f"scene {number}".encode())]
        content.append((f"{number}.json", json.dumps({"eligen_entity_prompts": row["eligen_entity_prompts"]}).encode()))
        content += [(f"{number}.mask{place}.png", data) for place, data in enumerate(row["eligen_entity_masks"])]
    write_tar(tmp_path / "rows.tar", content)
    for path in ("rows.jsonl", "rows.json", "rows.csv", "paths.parquet", "bytes.parquet", "saved", "rows.tar"):
        columns: Asked | None = {"entity_masks": ["mask0.png", "mask1.png", "mask2.png"]} if path == "rows.tar" else None
        source = opened(tmp_path, path, "entity", columns)
        assert source.bad == (), path
        assert source.num_references.tolist() == [0] * 6
        assert source.sizes.tolist() == [[6, 5]] * 6
        for number in range(6):
            example = source.example(number)
            assert (example.prompt, example.references) == (f"scene {number}", ())
            assert [region.prompt for region in example.regions] == [f"entity {number}-{place}" for place in range(1 + number % 3)]
            for place, region in enumerate(example.regions):
                assert region.mask.mode == "L"
                assert np.array_equal(np.asarray(region.mask), mask(10 * number + place))


def test_bad_entities_are_named(tmp_path: Path) -> None:
    good = entity_rows(tmp_path)[1]
    write(tmp_path / "wide.png", encoded(mask(1).repeat(2, 1)))
    write(tmp_path / "broken.png", b"x")
    bad: list[tuple[dict[str, object], str]] = [
        ({"eligen_entity_prompts": ["a"]}, "'eligen_entity_prompts' holds 1 prompts and 'eligen_entity_masks' 2 masks; each region has one of both"),
        ({"eligen_entity_prompts": [], "eligen_entity_masks": []}, "no region in 'eligen_entity_prompts'; task 'entity' needs one or more"),
        ({"eligen_entity_prompts": None, "eligen_entity_masks": None}, "no region in 'eligen_entity_prompts'; task 'entity' needs one or more"),
        ({"eligen_entity_prompts": ["a", " "]}, "prompt 2 in 'eligen_entity_prompts' is empty"),
        ({"eligen_entity_prompts": ["a", 3]}, "'eligen_entity_prompts' holds a list with a number, not texts alone"),
        ({"eligen_entity_prompts": 3}, "'eligen_entity_prompts' holds a number, not a list of texts"),
        ({"eligen_entity_prompts": "a, b"}, "'eligen_entity_prompts' holds text that is not a JSON list; write [\"...\", \"...\"]"),
        ({"eligen_entity_masks": ["masks/1-0.png", "absent.png"]}, "no file 'absent.png'"),
        ({"eligen_entity_masks": ["masks/1-0.png", "broken.png"]}, "mask 2 'broken.png': not an image, or its header is broken (read are"),
        ({"eligen_entity_masks": ["masks/1-0.png", "wide.png"]}, "mask 2 'wide.png': 10 x 6 pixels, and the target has 5 x 6; a mask has the target's size"),
        ({"eligen_entity_prompts": ["a"] * 256, "eligen_entity_masks": ["wide.png"] * 256}, "256 regions; at most 255 are read"),
    ]  # fmt: skip
    rows = [good | wrong for wrong, _ in bad] + [good] * 1200
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    source = opened(tmp_path, "rows.jsonl", "entity")
    assert len(source) == 1200
    for row, (_, reason) in zip(source.bad, bad, strict=True):
        assert row.reason.startswith(reason)


def test_a_mask_that_is_swapped_for_another_size_raises_by_name(tmp_path: Path) -> None:
    write(tmp_path / "rows.json", json.dumps(entity_rows(tmp_path)))
    source = opened(tmp_path, "rows.json", "entity")
    write(tmp_path / "masks" / "1-1.png", encoded(mask(1).repeat(2, 1)))
    with pytest.raises(UnreadableRow, match=r"mask 2 '1-1.png': 10 x 6 pixels, and the target has 5 x 6; a mask has the target's size"):
        source.example(1)


def test_regions_need_their_columns_and_their_task(tmp_path: Path) -> None:
    rows = entity_rows(tmp_path)
    write(tmp_path / "rows.json", json.dumps([{"image": "0.png", "text": "x"}]))
    write(tmp_path / "entities.json", json.dumps(rows))
    assert refusal(tmp_path, "rows.json", "entity") == (
        "no column for the entity_prompts (columns: 'image', 'text'); its usual name is eligen_entity_prompts; "
        "say which: columns: {entity_prompts: NAME}. Task 'entity' needs one or more regions."
    )
    assert refusal(tmp_path, "entities.json", columns={"entity_masks": "eligen_entity_masks"}) == (
        "columns.entity_masks: task 'text_to_image' uses no regions; leave it out, or choose task entity"
    )
    assert refusal(tmp_path, "entities.json", "entity", {"reference": "image"}) == (
        "columns.reference: task 'entity' uses no references; leave it out, or choose another task"
    )
    assert opened(tmp_path, "entities.json").example(0).regions == ()
    write(tmp_path / "photos" / "a.png", GOOD)
    assert refusal(tmp_path, "photos", "entity").startswith("task 'entity' needs regions, and a folder of captioned images has none; write a metadata.jsonl")


def prompted(prompt: object, num_references: int, instead: str | None = None) -> Cells:
    columns = choose_columns("edit", ["image", "reference", "prompt"], {}, None)
    row = {"image": b"x", "reference": [b"x"] * num_references, "prompt": prompt}
    return to_cells(row, "edit", columns, instead, Path)


@pytest.mark.parametrize(
    ("prompt", "num_references"),
    [
        ("no placeholder at all", 3),
        ("<img><|image_1|></img> beside <img><|image_2|></img>, and <img><|image_1|></img> again", 2),
        ("<|image_2|> then <|image_1|>", 2),
        ("<img> <|image_01|> </img>", 1),
        ("<|image_x|> is no placeholder", 2),
    ],
)
def test_placeholders_name_every_reference_or_none(prompt: str, num_references: int) -> None:
    assert prompted(prompt, num_references).prompts == (prompt,)


@pytest.mark.parametrize(
    ("prompt", "num_references", "said"),
    [
        ("<img><|image_1|></img>", 2, "the prompt names images, but not image 2, and the row has 2 references; name all of them, or none"),
        ("<|image_1|> and <|image_3|>", 3, "the prompt names images, but not image 2, and the row has 3 references; name all of them, or none"),
        ("<|image_1|> and <|image_3|>", 2, "the prompt names image 3, and the row has 2 references; each is named by its number, from 1"),
        ("<|image_0|>", 1, "the prompt names image 0, and the row has 1 reference; each is named by its number, from 1"),
        ("<|image_" + "9" * 5000 + "|>", 1, "the prompt names image 999"),
        (["fine", "<|image_2|>"], 1, "the prompt names image 2, and the row has 1 reference"),
    ],
)
def test_placeholders_of_other_images_are_a_bad_row(prompt: object, num_references: int, said: str) -> None:
    with pytest.raises(RowError) as caught:
        prompted(prompt, num_references)
    assert str(caught.value).startswith(said)


def test_a_placeholder_without_references_is_a_bad_row() -> None:
    columns = choose_columns("text_to_image", ["image", "prompt"], {}, None)
    with pytest.raises(RowError, match="the prompt names image 1, and the row has no references"):
        to_cells({"image": b"x", "prompt": "<img><|image_1|></img>"}, "text_to_image", columns, None, Path)


def test_placeholders_become_words_for_models_to_which_they_mean_nothing() -> None:
    assert without_placeholders("put <img><|image_1|></img> on <img> <|image_02|> </img>; <|image_12|>") == "put image 1 on image 2; image 12"
    assert without_placeholders("a photo of <img>") == "a photo of <img>"


def test_a_list_of_texts_is_several_captions() -> None:
    assert prompted([" one ", "", None, "two"], 1).prompts == ("one", "two")
    assert prompted([], 1, "instead").prompts == ("instead",)
    assert prompted([" "], 1, "instead").prompts == ("instead",)
    for odd, said in (([], "no prompt in 'prompt'"), ([" ", None], "no prompt in 'prompt'"), (["x", 3], "'prompt' holds a list with a number, not text")):
        with pytest.raises(RowError, match=said):
            prompted(odd, 1)


def test_images_say_which_are_references(tmp_path: Path) -> None:
    rows = entity_rows(tmp_path)
    columns = choose_columns("entity", rows[2], {}, None)
    cells = to_cells(rows[2], "entity", columns, None, Path)
    assert [name for name, _ in cells.images()] == ["target '2.png'", "mask 1 '2-0.png'", "mask 2 '2-1.png'", "mask 3 '2-2.png'"]
    assert list(cells.images())[cells.are_references()] == []
    edit = prompted("x", 2)
    assert [name for name, _ in list(edit.images())[edit.are_references()]] == ["reference 1", "reference 2"]
