"""Every kind of source gives the same rows for the same content; what is odd is read right, what is broken reported."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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

from mixing.source import Source, SourceError, UnreadableRow, open_source
from mixing.tasks import TASKS, Asked, Example

Values = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _no_network_and_a_cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
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
) -> Source:
    return open_source(
        "rows",
        path=path,
        task=task,
        columns=columns or {},
        prompt=prompt,
        split=split,
        on_bad_row=on_bad_row,
        root=root,
    )


def noise(seed: int, height: int = 6, width: int = 5) -> Values:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(values: Values) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_good_folder(folder: Path, number: int) -> None:
    """So many good rows that a few bad ones are less than 1 %."""
    for row in range(number):
        write(folder / f"good{row:03}.png", GOOD)
        write(folder / f"good{row:03}.txt", f"good {row}")


GOOD = png(noise(0))


@dataclass(frozen=True)
class Content:
    """One row, whatever it is stored as."""

    name: str
    prompt: str
    target: Values
    references: tuple[Values, ...] = ()


CAPTIONED = tuple(
    Content(f"{folder}{letter}.png", f"the letter {letter} in «ink»", noise(seed))
    for seed, (folder, letter) in enumerate([("", "a"), ("", "b"), ("inner/", "c"), ("inner/", "ü")])
)
EDITS = tuple(
    Content(
        f"out/{row}.png",
        f"edit {row} of " + " and ".join(f"<img><|image_{number}|></img>" for number in range(1, 2 + row % 3)),
        noise(row),
        tuple(noise(10 * row + k) for k in range(1, 2 + row % 3)),
    )
    for row in range(5)
)


def same(example: Example, content: Content) -> bool:
    pairs = zip((example.target, *example.references), (content.target, *content.references), strict=True)
    return example.prompt == content.prompt and all(
        np.array_equal(np.asarray(image), values) for image, values in pairs
    )


def write_captions(root: Path, rows: Sequence[Content]) -> str:
    for row in rows:
        write(root / "captions" / row.name, png(row.target))
        write((root / "captions" / row.name).with_suffix(".txt"), f"  {row.prompt}\n\n")
    return "captions"


def write_images(folder: Path, rows: Sequence[Content]) -> list[list[str]]:
    """Write all images, return each row's reference names."""
    names = []
    for row in rows:
        write(folder / row.name, png(row.target))
        names.append([f"references/{number}/{row.name}" for number in range(len(row.references))])
        for name, reference in zip(names[-1], row.references, strict=True):
            write(folder / name, png(reference))
    return names


def write_metadata(root: Path, rows: Sequence[Content]) -> str:
    names = write_images(root / "metadata", rows)
    lines = [
        {"file_name": row.name, "text": row.prompt, "reference_file_names": each}
        for row, each in zip(rows, names, strict=True)
    ]
    write_lines(root / "metadata" / "metadata.jsonl", lines)
    return "metadata"


def write_omnigen(root: Path, rows: Sequence[Content]) -> str:
    names = write_images(root / "omnigen", rows)
    lines = [
        {"task_type": "x", "instruction": row.prompt, "input_images": each, "output_image": row.name}
        for row, each in zip(rows, names, strict=True)
    ]
    write_lines(root / "omnigen" / "rows.jsonl", lines)
    return "omnigen/rows.jsonl"


def write_parquet(root: Path, rows: Sequence[Content]) -> str:
    """Images as `datasets` stores them: a struct of bytes and path, with the feature in the metadata."""
    features = datasets.Features(
        {"image": datasets.Image(), "references": datasets.List(datasets.Image()), "caption": datasets.Value("string")}
    )
    table = {
        "image": [{"bytes": png(row.target), "path": row.name} for row in rows],
        "references": [[{"bytes": png(each), "path": None} for each in row.references] for row in rows],
        "caption": [row.prompt for row in rows],
    }
    (root / "table").mkdir(exist_ok=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "table" / "rows.parquet")
    return "table/rows.parquet"


def write_raw_parquet(root: Path, rows: Sequence[Content]) -> str:
    """Bytes in plain columns, two files."""
    for number, part in enumerate((rows[:1], rows[1:])):
        table = {
            "image": [png(row.target) for row in part],
            "references": [[png(each) for each in row.references] for row in part],
            "caption": [row.prompt for row in part],
        }
        schema = pa.schema([("image", pa.binary()), ("references", pa.list_(pa.binary())), ("caption", pa.string())])
        (root / "raw").mkdir(exist_ok=True)
        parquet.write_table(pa.table(table, schema=schema), root / "raw" / f"rows-{number:02}.parquet")
    return "raw/rows-{00..01}.parquet"


def write_path_parquet(root: Path, rows: Sequence[Content]) -> str:
    """Paths in the columns."""
    names = write_images(root / "paths", rows)
    table = {"target": [row.name for row in rows], "source": names, "prompt": [row.prompt for row in rows]}
    parquet.write_table(pa.table(table), root / "paths" / "rows.parquet")
    return "paths/*.parquet"


def write_hub(root: Path, rows: Sequence[Content]) -> str:
    (root / "user").mkdir(exist_ok=True)
    os.rename(root / Path(write_parquet(root, rows)).parent, root / "user" / "set")
    return "hub/user/set"


def write_hub_of_files(root: Path, rows: Sequence[Content]) -> str:
    """A dataset whose repository holds image files; `datasets` stores their absolute paths."""
    os.rename(root / write_metadata(root, rows), root / "files")
    (root / "owner").mkdir()
    os.rename(root / "files", root / "owner" / "files")
    return "hub/owner/files"


Writer = Callable[[Path, Sequence[Content]], str]
"""Writes the rows below a folder and gives the path that a plan would name."""

WRITERS: list[Writer] = [
    write_metadata,
    write_omnigen,
    write_parquet,
    write_raw_parquet,
    write_path_parquet,
    write_hub,
    write_hub_of_files,
]


@pytest.mark.parametrize("kind", [write_captions, *WRITERS])
def test_all_kinds_give_the_same_rows_for_text_to_image(
    kind: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = opened(tmp_path, kind(tmp_path, CAPTIONED))
    assert len(source) == 4
    assert all(same(source.example(row), content) for row, content in enumerate(CAPTIONED))
    assert source.num_references.tolist() == [0] * 4
    assert source.num_references.dtype == np.uint8
    assert source.sizes.tolist() == [[6, 5]] * 4
    assert source.bad == ()
    assert [source.example(row).key for row in range(4)] == [source.key(row) for row in range(4)]
    assert len({source.key(row) for row in range(4)}) == 4


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        *((kind, "edit") for kind in WRITERS),
        *((write_omnigen, task) for task, roles in TASKS.items() if roles.references),
    ],
)
def test_all_kinds_give_the_same_rows_with_references(
    kind: Writer, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = opened(tmp_path, kind(tmp_path, EDITS), task)
    assert source.num_references.tolist() == [len(content.references) for content in EDITS] == [1, 2, 3, 1, 2]
    assert all(same(source.example(row), content) for row, content in enumerate(EDITS))


def test_keys_say_which_row_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {}
    for kind in (write_captions, *WRITERS):
        source = opened(tmp_path, kind(tmp_path, CAPTIONED))
        keys[kind.__name__] = [source.key(row) for row in range(4)]
    names = ["a.png", "b.png", "inner/c.png", "inner/ü.png"]
    assert keys == {
        "write_captions": names,
        "write_metadata": names,
        "write_omnigen": names,
        "write_parquet": [f"rows.parquet:{row}" for row in range(4)],
        "write_raw_parquet": ["rows-00.parquet:0", *(f"rows-01.parquet:{row}" for row in range(3))],
        "write_path_parquet": [f"rows.parquet:{row}" for row in range(4)],
        "write_hub": [f"train:{row}" for row in range(4)],
        "write_hub_of_files": [f"train:{row}" for row in range(4)],
    }


def test_keys_stay_when_rows_are_added(tmp_path: Path) -> None:
    def rows(*names: str) -> list[str]:
        write_lines(tmp_path / "rows.jsonl", [{"image": name, "text": f"{name} {at}"} for at, name in enumerate(names)])
        source = opened(tmp_path, "rows.jsonl")
        return [source.key(row) for row in range(len(source))]

    for name in "abc":
        write(tmp_path / f"{name}.png", GOOD)
    assert rows("a.png", "c.png", "a.png") == ["a.png", "c.png", "a.png#2"]
    assert rows("b.png", "./a.png", "c.png", "a.png", "a.png") == ["b.png", "a.png", "c.png", "a.png#2", "a.png#3"]


def test_a_source_survives_pickling_and_new_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [opened(tmp_path, kind(tmp_path, EDITS), "edit") for kind in (write_omnigen, write_parquet)]
    for source in sources:
        again = pickle.loads(pickle.dumps(source))  # noqa: S301 (our own bytes)
        assert again.fingerprint == source.fingerprint
        assert all(same(again.example(row), content) for row, content in enumerate(EDITS))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for source in sources:
                assert same(pool.apply(source.example, (np.int64(3),)), EDITS[3])


def test_the_fingerprint_changes_with_the_content_and_with_nothing_else(tmp_path: Path) -> None:
    path = write_captions(tmp_path, CAPTIONED)
    first = opened(tmp_path, path).fingerprint
    os.utime(tmp_path / path / "a.png", (1, 1))
    write(tmp_path / path / "notes.md", "x")
    assert opened(tmp_path, path).fingerprint == first
    seen = {first}
    write(tmp_path / path / "a.txt", "another caption")
    seen.add(opened(tmp_path, path).fingerprint)
    write(tmp_path / path / "a.png", png(noise(1, 9, 9)))
    seen.add(opened(tmp_path, path).fingerprint)
    write_captions(tmp_path, [Content("d.png", "more", noise(5))])
    seen.add(opened(tmp_path, path).fingerprint)
    assert len(seen) == 4


def test_a_parquet_file_that_was_rewritten_is_read_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        parquet.write_table(pa.table({"image": [png(noise(seed))], "text": [f"row {seed}"]}), tmp_path / "x.parquet")
        assert same(opened(tmp_path, "x.parquet").example(0), Content("", f"row {seed}", noise(seed)))


def test_a_row_that_does_not_exist_is_an_index_error(tmp_path: Path) -> None:
    source = opened(tmp_path, write_captions(tmp_path, CAPTIONED))
    for row in (4, -1):
        with pytest.raises(IndexError, match=f"no row {row}; it has 4"):
            source.example(row)


# Broken and odd rows.


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(1, 64, 64)).save(file, "JPEG")
    return file.getvalue()[:2000]


def test_bad_rows_of_a_folder_are_named_and_the_others_read(tmp_path: Path) -> None:
    write_good_folder(tmp_path / "photos", 1000)
    broken: dict[str, tuple[bytes, bytes | str | None, str]] = {
        "empty.png": (b"", "x", "target 'empty.png': the file is empty"),
        "zeros.jpg": (bytes(500), "x", "target 'zeros.jpg': not an image, or its header is broken"),
        "text.jpg": (b"hello", "x", "target 'text.jpg': not an image, or its header is broken"),
        "uncaptioned.png": (GOOD, None, "no caption: 'uncaptioned.txt' is missing"),
        "blank.png": (GOOD, " \n\t", "its caption 'blank.txt' is empty"),
        "latin.png": (
            GOOD,
            "caf\u00e9".encode("latin-1"),
            "its caption 'latin.txt' is not UTF-8 (unexpected end of data at byte 4)",
        ),
        "phone.heic": (b"\0\0\0\x18ftypheic", "x", "a HEIC file, which cannot be read; save it as JPEG or PNG"),
    }
    for name, (content, caption, _) in broken.items():
        write(tmp_path / "photos" / name, content)
        if caption is not None:
            write((tmp_path / "photos" / name).with_suffix(".txt"), caption)
    source = opened(tmp_path, "photos")
    assert len(source) == 1000
    assert [row.key for row in source.bad] == sorted(broken)
    for row in source.bad:
        assert row.source == "rows"
        assert broken[row.key][2] in row.reason
    assert source.example(999).prompt == "good 999"


def test_odd_files_of_a_folder_are_read_right(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    odd: dict[str, tuple[bytes, bytes | str]] = {
        "wrong.jpg": (GOOD, "wrong extension"),
        "upper.PNG": (GOOD, "upper case"),
        "line\nbreak.png": (GOOD, "a newline in the name"),
        "日本 語.png": (GOOD, "日本語"),
        "two.dots.png": (GOOD, "two dots"),
        "[brackets].png": (GOOD, "brackets"),
        "bom.png": (GOOD, b"\xef\xbb\xbfbyte order mark"),
    }
    for name, (content, caption) in odd.items():
        write(folder / name, content)
        write(folder / (os.path.splitext(name)[0] + ".txt"), caption)
    write(folder / "deep.png", png(np.array([[0, 300, 65535]], dtype=np.uint16)))
    write(folder / "deep.TXT", "16 bits")
    write(folder / "long.png", png(noise(3, 4000, 1)))
    write(folder / "long.txt", "1 x 4000")
    for ignored in (".hidden.png", ".git/x.png", "notes.md", "orphan.txt", "sub/.DS_Store"):
        write(folder / ignored, b"x")
    source = opened(tmp_path, "odd")
    assert source.bad == ()
    rows = {source.key(row): source.example(row) for row in range(len(source))}
    assert sorted(rows) == sorted([*odd, "deep.png", "long.png"])
    for name, (_, caption) in odd.items():
        expected = caption if isinstance(caption, str) else "byte order mark"
        assert same(rows[name], Content(name, expected, noise(0)))
    assert np.asarray(rows["deep.png"].target).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]
    assert rows["long.png"].target.size == (1, 4000)
    assert [4000, 1] in source.sizes.tolist()


def test_a_name_that_is_not_utf8_is_a_bad_row_that_can_be_printed(tmp_path: Path) -> None:
    write_good_folder(tmp_path / "photos", 120)
    (tmp_path / "photos" / os.fsdecode(b"caf\xe9.png")).write_bytes(GOOD)
    (row,) = opened(tmp_path, "photos", prompt="x").bad
    assert row.key == "caf\\xe9.png"
    assert "is not a name in UTF-8; rename the file" in row.reason
    row.reason.encode()


def test_the_plans_prompt_stands_in_for_a_missing_caption(tmp_path: Path) -> None:
    for name, caption in (("a.png", "its own"), ("b.png", None), ("c.png", " ")):
        write(tmp_path / "photos" / name, GOOD)
        if caption is not None:
            write((tmp_path / "photos" / name).with_suffix(".txt"), caption)
    source = opened(tmp_path, "photos", prompt="a photo")
    assert [source.example(row).prompt for row in range(3)] == ["its own", "a photo", "a photo"]
    write_lines(tmp_path / "rows.jsonl", [{"image": "photos/a.png"}, {"image": "photos/b.png"}])
    assert opened(tmp_path, "rows.jsonl", prompt="").example(1).prompt == ""


def test_pixels_that_turn_out_broken_raise_by_name(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "half.jpg", truncated_jpeg())
    write(tmp_path / "photos" / "half.txt", "half a photo")
    parquet.write_table(pa.table({"image": [truncated_jpeg()], "text": ["half"]}), tmp_path / "x.parquet")
    for path, key, named in (("photos", "half.jpg", "target 'half.jpg'"), ("x.parquet", "x.parquet:0", "target")):
        source = opened(tmp_path, path)
        with pytest.raises(UnreadableRow) as caught:
            source.example(0)
        row = pickle.loads(pickle.dumps(caught.value)).bad_row  # noqa: S301 (our own bytes)
        assert (row.source, row.key) == ("rows", key)
        assert row.reason.startswith(f"{named}: broken JPEG file: image file is truncated")
        assert str(caught.value) == f"source 'rows': {key!r}: {row.reason}"


def test_a_file_that_vanishes_after_opening_raises_by_name(tmp_path: Path) -> None:
    source = opened(tmp_path, write_captions(tmp_path, CAPTIONED))
    (tmp_path / "captions" / "b.png").unlink()
    with pytest.raises(UnreadableRow, match=r"'b.png': target 'b.png': No such file"):
        source.example(1)


def test_bad_rows_of_a_jsonl_are_named_by_line(tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    for name in ("a.png", "b.png"):
        write(folder / name, GOOD)
    write(folder / "empty.png", b"")
    write(tmp_path / "outside.png", GOOD)
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    os.symlink(folder / "a.png", folder / "inner_link.png")
    good: dict[str, object] = {"image": "a.png", "reference": "b.png", "prompt": "x"}
    bad: list[tuple[str | dict[str, object], str]] = [
        ("{broken", "the line is not JSON: "),
        ("[1, 2]", "not an object"),
        ("[" * 100_000, "the line is not JSON: "),
        (good | {"image": "absent.png"}, "no file 'absent.png'"),
        (good | {"image": None}, "'image' holds no images; it must hold one"),
        (good | {"image": ["a.png", "b.png"]}, "'image' holds 2 images; it must hold one"),
        (good | {"image": 7}, "'image' holds a number, not an image or a path"),
        (good | {"image": "../outside.png"}, "lies outside"),
        (good | {"image": str(tmp_path / "outside.png")}, "copy the file into that folder"),
        (good | {"image": "/etc/passwd"}, "lies outside"),
        (good | {"image": "link.png"}, "'link.png' lies outside"),
        (good | {"image": "a\0.png"}, "zero character"),
        (good | {"image": "\ud800.png"}, "not a name in UTF-8"),
        (good | {"image": "x" * 5000}, "no file 'xxx"),
        (good | {"image": "."}, "'.' is not a file"),
        (good | {"reference": []}, "no reference in 'reference'; task 'edit' needs one or more"),
        (good | {"reference": ["a.png", "empty.png"]}, "reference 2 'empty.png': the file is empty"),
        (good | {"reference": ["a.png"] * 256}, "256 references; at most 255"),
        (good | {"reference": {"url": "http://x"}}, "'reference' holds a mapping"),
        (good | {"prompt": "  "}, "no prompt in 'prompt'"),
        (good | {"prompt": ["x", 7]}, "'prompt' holds a list with a number, not text"),
        (good | {"prompt": "\udc00"}, "not valid Unicode"),
        ({"image": "a.png"}, "no prompt in 'prompt'"),
        ("{}", "no prompt"),
    ]
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in bad]
    fine = [
        good | {"image": "inner_link.png"},
        good | {"image": str(folder / "b.png")},
        good | {"image": "../edits/a.png"},
    ]
    filling = [json.dumps(row) for row in fine] + [json.dumps(good)] * 2600
    write(
        folder / "rows.jsonl", b"\xef\xbb\xbf" + "\n".join([*lines, "", *filling]).encode() + b'\n{"image": "\xff"}\n'
    )
    source = opened(tmp_path, "edits/rows.jsonl", "edit")
    assert len(source) == 2603
    assert [source.key(row) for row in range(4)] == ["inner_link.png", "b.png", "a.png#9", "a.png#10"]
    assert [row.key for row in source.bad] == [f"rows.jsonl:{line}" for line in [*range(1, len(bad) + 1), 2629]]
    for row, (_, reason) in zip(source.bad, bad, strict=False):
        assert reason in row.reason
    assert "the line is not UTF-8 (invalid start byte at byte 12)" in source.bad[-1].reason
    json.dumps([row.reason for row in source.bad]).encode()


def test_metadata_in_inner_folders_names_images_from_there(tmp_path: Path) -> None:
    for folder in ("one", "two/deep"):
        write(tmp_path / folder / "x.png", png(noise(len(folder))))
        write(tmp_path / folder / "unnamed.png", GOOD)
        write_lines(tmp_path / folder / "metadata.jsonl", [{"file_name": "x.png", "text": folder}])
    source = opened(tmp_path.parent, tmp_path.name)
    assert [source.key(row) for row in range(len(source))] == ["one/x.png", "two/deep/x.png"]
    assert same(source.example(1), Content("", "two/deep", noise(8)))
    write(tmp_path / "three" / "y.png", GOOD)
    write(tmp_path / "three" / "y.txt", "a caption that no metadata stands above")
    with pytest.raises(SourceError, match=r"captioned images that no metadata.jsonl stands above \('three/y.png'\)"):
        opened(tmp_path.parent, tmp_path.name)


def test_bad_rows_of_a_parquet_file_are_named_by_row(tmp_path: Path) -> None:
    images: list[dict[str, bytes | str | None]] = [{"bytes": GOOD, "path": None}] * 500
    images[3] = {"bytes": None, "path": None}
    images[5] = {"bytes": b"", "path": "x.png"}
    images[7] = {"bytes": None, "path": "../x.png"}
    texts: list[str | None] = ["x"] * 500
    texts[11] = None
    parquet.write_table(pa.table({"image": images, "text": texts}), tmp_path / "x.parquet")
    source = opened(tmp_path, "x.parquet")
    assert [(row.key, row.reason.split(";")[0]) for row in source.bad] == [
        ("x.parquet:3", "'image' holds no images"),
        ("x.parquet:5", "target: the file is empty"),
        ("x.parquet:7", f"'../x.png' lies outside {tmp_path.resolve()}"),
        ("x.parquet:11", "no prompt in 'text'"),
    ]
    assert [source.key(row) for row in (2, 3, 495)] == ["x.parquet:2", "x.parquet:4", "x.parquet:499"]


def test_linked_folders_are_reported_not_followed(tmp_path: Path) -> None:
    write_good_folder(tmp_path / "photos", 120)
    write_good_folder(tmp_path / "elsewhere", 3)
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "more")
    os.symlink(tmp_path / "photos", tmp_path / "link_to_the_source")
    source = opened(tmp_path, "link_to_the_source")
    assert len(source) == 120
    assert [row.key for row in source.bad] == ["more"]
    assert "not followed" in source.bad[0].reason


def test_one_percent_of_bad_rows_is_skipped_and_more_is_an_error(tmp_path: Path) -> None:
    write_good_folder(tmp_path / "photos", 297)
    for number in range(3):
        write(tmp_path / "photos" / f"{number}.png", b"")
        write(tmp_path / "photos" / f"{number}.txt", "x")
    assert len(opened(tmp_path, "photos").bad) == 3
    (tmp_path / "photos" / "good000.png").unlink()
    with pytest.raises(SourceError) as caught:
        opened(tmp_path, "photos")
    assert str(caught.value) == (
        "source 'rows' (photos): 3 of 299 rows are bad; at most 1% are skipped; repair or remove them: "
        "'0.png': target '0.png': the file is empty; '1.png': target '1.png': the file is empty; "
        "'2.png': target '2.png': the file is empty"
    )
    with pytest.raises(
        SourceError, match=r"bad row '0.png': .* is empty; repair or remove it, or say on_bad_row: skip"
    ):
        opened(tmp_path, "photos", on_bad_row="stop")


def test_a_source_without_a_good_row_names_five_of_the_bad(tmp_path: Path) -> None:
    for number in range(7):
        write(tmp_path / "photos" / f"{number}.png", GOOD)
    with pytest.raises(SourceError, match=r"7 of 7 rows are bad; a source needs a good one.*'4.png': .*; and 2 more$"):
        opened(tmp_path, "photos")


# Sources that cannot be used.


def test_columns_are_guessed_only_where_one_can_be_meant(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(noise(1)))
    write(tmp_path / "b.png", png(noise(2)))
    row = {"image": "a.png", "target": "b.png", "text": "x", "caption": "y", "cond1": "a.png", "cond2": "b.png"}
    write_lines(tmp_path / "rows.jsonl", [row])

    def fails(match: str, columns: Asked, task: str = "text_to_image") -> None:
        with pytest.raises(SourceError, match=match):
            opened(tmp_path, "rows.jsonl", task, columns)

    fails("'image', 'target' could each be the target; say which: columns: {target: image}", {})
    fails("'text', 'caption' could each be the prompt", {"target": "target"})
    fails(
        r"columns.prompt: no column 'captoin' \(columns: 'image', .*\); did you mean 'caption'\?",
        {"target": "image", "prompt": "captoin"},
    )
    fails("columns.target: 2 columns named; one plays this role", {"target": ["image", "target"]})
    fails(
        "columns.reference: task 'text_to_image' uses no references",
        {"target": "image", "prompt": "text", "reference": "cond1"},
    )
    fails(
        "no column for the reference .* usual names are reference, .*, source; say which: .*Task 'edit' needs",
        {"target": "image", "prompt": "text"},
        "edit",
    )
    columns: Asked = {"target": "target", "prompt": ["caption"], "reference": ["cond1", "cond2"]}
    source = opened(tmp_path, "rows.jsonl", "edit", columns)
    assert same(source.example(0), Content("", "y", noise(2), (noise(1), noise(2))))


def test_a_source_that_cannot_be_used_says_why_and_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "a.png", GOOD)
    write(tmp_path / "photos" / "a.txt", "x")
    write(tmp_path / "tables" / "x.parquet", b"PAR1 not really PAR1")
    write(tmp_path / "rows.xml", "[]")
    write(tmp_path / "blank.jsonl", "\n\n")
    write(tmp_path / "broken.jsonl", "{\n")
    (tmp_path / "empty").mkdir()
    parquet.write_table(
        pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), tmp_path / "no_rows.parquet"
    )
    parquet.write_table(pa.table({"image": [GOOD], "text": ["x"]}), tmp_path / "mixed-0.parquet")
    parquet.write_table(pa.table({"image": [GOOD], "words": [3]}), tmp_path / "mixed-1.parquet")
    for path, options, reason in (
        ("photoz", {}, "no such file or folder; a source is a folder .*; did you mean 'photos'"),
        ("rows.xml", {}, "cannot be read; a source is a folder of images"),
        ("empty", {}, r"holds no images \(0 files of other kinds\)"),
        ("tables", {}, r"holds no images .*; it holds 'x.parquet': name the file in `path`"),
        ("blank.jsonl", {}, "blank.jsonl holds no rows$"),
        ("broken.jsonl", {}, "broken.jsonl holds no rows; broken.jsonl:1: the line is not JSON"),
        ("no_rows.parquet", {}, "it holds no rows"),
        ("mixed-*.parquet", {}, "mixed-.*.parquet cannot be read: "),
        (
            "photos",
            {"task": "edit"},
            "task 'edit' needs references, and a folder of captioned images has none; write a metadata",
        ),
        ("photos", {"columns": {"prompt": "text"}}, "columns: a folder of captioned images has none"),
        ("photos", {"split": "test"}, "split: only Hub datasets and folders that save_to_disk wrote have one"),
        ("photos", {"task": "edits"}, r"no task 'edits' \(tasks: text_to_image, .*; did you mean 'edit'"),
        ("tables/x.parquet", {}, "x.parquet is not a readable parquet file"),
        ("tables/y.parquet", {}, "no file .*y.parquet"),
        ("tables/y-{00..03}.parquet", {}, "no file .*y-00.parquet, which .* names"),
        ("tables/{3..1}.parquet", {}, r"\{3..1\} in the path: allowed is a rising range"),
        ("hub/only_a_name", {}, "a Hub dataset is written hub/USER/DATASET"),
        ("hub/nobody/nothing", {}, "dataset nobody/nothing, split 'train', cannot be loaded: "),
    ):
        with pytest.raises(SourceError, match=reason) as caught:
            opened(tmp_path, path, **options)
        assert str(caught.value).startswith("source 'rows'")
        assert "\n" not in str(caught.value)


def test_patterns_and_braces_name_parquet_files_in_order(tmp_path: Path) -> None:
    tmp_path = tmp_path / "a project [of] {1,2}*"  # what stands in the root is no pattern
    for name in ("a/x-8", "a/x-9", "a/x-10", "b/x-[1]"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({"image": [GOOD], "text": [name]}), tmp_path / f"{name}.parquet")

    def keys(pattern: str) -> list[str]:
        source = opened(tmp_path, pattern)
        return [source.key(row) for row in range(len(source))]

    assert keys("a/x-{8..10}.parquet") == ["x-8.parquet:0", "x-9.parquet:0", "x-10.parquet:0"]
    assert keys("a/*.parquet") == ["x-10.parquet:0", "x-8.parquet:0", "x-9.parquet:0"]
    assert keys("{b,a}/x-?*.parquet")[:2] == ["b/x-[1].parquet:0", "a/x-10.parquet:0"]
    assert keys("**/x-[89].parquet") == ["a/x-8.parquet:0", "a/x-9.parquet:0"]
    assert keys("b/x-[1].parquet") == ["x-[1].parquet:0"]


def test_a_hub_split_is_named_and_a_wrong_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_hub(tmp_path, CAPTIONED)
    source = opened(tmp_path, path, split="train[1:3]")
    assert [source.key(row) for row in range(2)] == ["train[1:3]:0", "train[1:3]:1"]
    assert same(source.example(0), CAPTIONED[1])
    with pytest.raises(SourceError, match=r"split 'test', cannot be loaded: .*[Uu]nknown split"):
        opened(tmp_path, path, split="test")


def test_files_are_read_without_the_datasets_library() -> None:
    code = "import sys, mixing.mixture, mixing.source, mixing.stream; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
