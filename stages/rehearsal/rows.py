"""Rows: a few of a source's own where they can be read, and rows made of the right shape for its task where not."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import random
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from mixing.columns import TASKS
from mixing.keys import key
from mixing.where import BUILT_IN, parse
from stages.check_sources import IMAGE_SUFFIXES
from stages.paths import place_of
from stages.plan import Source

Kind = Literal["captioned", "metadata", "jsonl", "json", "csv", "parquet", "arrow", "tar"]
Size = tuple[int, int]
"""Width and height in pixels."""

_MOST_FILES = 4_000  # in a folder that is opened as it is
_MOST_BYTES = 128 * 2**20  # of files that are opened as they are
_COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220)}
_SHAPES = ("square", "disc")
_SHARD = 12  # rows of a .tar or a .parquet
_TRIED = 600  # rows that a condition is tried on
_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Made:
    """Rows that were made."""

    source: Source
    """The same source over them."""
    rows: int
    """That are trained on, held-out ones among them."""
    references: int
    """The most that a row has."""
    regions: int
    notes: tuple[str, ...]
    """What of the source they do not exercise."""


# --- what can be read -------------------------------------------------------------------------------------------------------------------


def is_there(source: Source, root: Path) -> bool:
    """Whether something lies where a source's path leads. A dataset of the Hub lies here only as a folder USER/DATASET."""
    if source.path.startswith("hub/"):
        return (root / source.path.removeprefix("hub/")).is_dir()
    return os.path.exists(place_of(root, source.path)) or bool(_files(source, root))


def is_small(source: Source, root: Path) -> bool:
    """Whether a source that is there is opened in seconds: a stream, of which only the first rows are read, or few files of few bytes."""
    if source.stream:
        return True
    place = place_of(root, source.path.removeprefix("hub/"))
    if os.path.isdir(place):
        number = total = 0
        for above, _, names in os.walk(place):
            number += len(names)
            if number > _MOST_FILES:
                return False
            total += sum(os.path.getsize(os.path.join(above, name)) for name in names if name.endswith((".parquet", ".arrow", ".tar")))
        return total <= _MOST_BYTES
    files = _files(source, root)
    total = sum(map(os.path.getsize, files))
    return total <= (_MOST_BYTES if source.path.endswith((".parquet", ".arrow", ".tar")) else _MOST_BYTES // 64)


def _files(source: Source, root: Path) -> list[str]:
    """The files that a pattern names; {000..063} as any number."""
    pattern = re.sub(r"\{[^{}]*\}", "*", source.path)
    try:
        return sorted(filter(os.path.isfile, glob.glob(place_of(root, pattern), recursive=True)))
    except (OSError, ValueError):
        return []


def first_rows(source: Source, folder: Path, root: Path, rows: int) -> str | None:
    """Copy the first rows of a source that is too large to be opened, and return the place of the copies.

    None for what is no folder of captioned images, no .jsonl file and no folder with a metadata.jsonl, and for a source whose rows a condition chooses.
    """
    place = Path(place_of(root, source.path))
    lines = place if place.suffix == ".jsonl" else place / "metadata.jsonl"
    if source.where is not None or not (place.is_dir() or lines.is_file()):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if lines.is_file():
        with lines.open("rb") as opened:
            first = [line for line in islice(opened, 2 * rows) if line.strip()][:rows]
        for line in first:
            _copy_files(line, lines.parent, folder)
        (folder / lines.name).write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in first))
        return str(folder if place.is_dir() else folder / lines.name)
    for file in islice(_images_below(place), rows):
        for each in (file, file.with_suffix(".txt")):
            if each.is_file():
                _copy(each, folder / each.relative_to(place))
    return str(folder)


def _images_below(place: Path) -> Iterator[Path]:
    """The images of a folder, folder by folder, each in its order."""
    for above, inner, names in os.walk(place):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(above) / name for name in sorted(names) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."))


def _copy_files(line: bytes, place: Path, folder: Path) -> None:
    """Copy the files that a line of JSON names; a line that is none, and what lies elsewhere, is left to the source to judge."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    for value in row.values() if isinstance(row, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and len(name) < 1024 and "\0" not in name and ".." not in Path(name).parts and not os.path.isabs(name) and (place / name).is_file():
                _copy(place / name, folder / name)


def _copy(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)


# --- rows that are made -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    number: int
    size: Size
    prompt: str | None
    extra: Mapping[str, object]


def make_rows(name: str, source: Source, folder: Path, *, rows: int, side: int, several: bool) -> Made:
    """Write rows for a source's task into a folder, in the kind of place that its path names and under the columns that it names.

    rows: that are trained on, at least. side: the largest resolution that they are seen at. several: whether some rows may have more references than one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    where, take, count = source.where, source.take, rows
    if take is not None:
        if take.count is not None:
            take, count = take.model_copy(update={"count": rows}), rows + rows // 3
        elif take.fraction is not None:
            fraction = max(take.fraction, 0.25)
            take, count = take.model_copy(update={"fraction": fraction}), round(rows / fraction)
    columns = {} if take is None or take.column is None else {take.column: ("a", "b", "c")}
    made = _plain(count, side, source, columns, random.Random(key(0, "rows", name)))
    if where is not None:
        chosen = _fulfilling(made, where, source, columns)
        if chosen is None:
            notes.append(f"sources.{name}.where was left out: no made row fulfils `{where}`")
            where = None
        else:
            made = chosen
    kind = _kind(source, {extra for row in made for extra in row.extra})
    named = _names(source, kind)
    references = [_references(source, named, row.number, several and kind != "tar") for row in made]
    regions = [_regions(source, named, row.number, kind) for row in made]
    written = [dict(_cells(row, source, named, of_references, of_regions)) for row, of_references, of_regions in zip(made, references, regions, strict=True)]
    path = _WRITERS[kind](folder, written, named)
    changed = source.model_copy(update={"path": path, "where": where, "take": take, "split": "train", "rows": rows if source.rows is not None else None})
    if source.split != "train":
        notes.append(f"sources.{name}.split was left out: made rows have none")
    return Made(changed, rows, max(references, default=0), max(regions, default=0), tuple(notes))


def _plain(count: int, side: int, source: Source, columns: Mapping[str, Sequence[str]], draw: random.Random) -> list[_Row]:
    """Rows of a few aspects, somewhat larger than they are seen."""
    sizes = [(2 * side, 2 * side), (3 * side, 2 * side), (2 * side, 3 * side), (2 * side, 2 * side)]
    return [_Row(number, sizes[number % len(sizes)], _prompt(number, source), {name: draw.choice(values) for name, values in columns.items()}) for number in range(count)]


def _prompt(number: int, source: Source) -> str | None:
    """The words of a row, of those that tiny tokenizers know; none now and then, where the source gives a prompt for rows that have none."""
    if source.prompt is not None and number % 3 == 0:
        return None
    colour, shape = list(_COLOURS)[number % 3], _SHAPES[number % 2]
    if source.captions.shuffle_tags:
        return f"a {colour} {shape}, {colour}, {shape}, the same"
    return f"make it {colour}" if TASKS[source.task].references else f"a {colour} {shape}"


def _kind(source: Source, extra: set[str]) -> Kind:
    """What the rows are written as: what the path names; a dataset of the Hub as .parquet, and a folder with metadata where it must have columns."""
    kinds: Mapping[str, Kind] = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
    if source.path.startswith("hub/"):
        return "parquet"
    for suffix, kind in kinds.items():
        if source.path.endswith(suffix):
            return kind
    needs = source.columns or extra or TASKS[source.task].references or TASKS[source.task].regions
    return "metadata" if needs else "captioned"


@dataclass(frozen=True)
class _Names:
    """The columns of each role."""

    target: str
    references: tuple[str, ...]
    prompt: str
    entity_prompts: str
    entity_masks: tuple[str, ...]


def _names(source: Source, kind: Kind) -> _Names:
    def asked(role: str, otherwise: str) -> tuple[str, ...]:
        names = next((names for asked_for, names in source.columns.items() if asked_for == role), otherwise)
        return (names,) if isinstance(names, str) else tuple(names)

    usual_target = "png" if kind == "tar" else "file_name" if kind == "metadata" else "image"
    return _Names(
        asked("target", usual_target)[0],
        asked("reference", "reference"),
        asked("prompt", "txt" if kind == "tar" else "prompt")[0],
        asked("entity_prompts", "eligen_entity_prompts")[0],
        asked("entity_masks", "eligen_entity_masks"),
    )


def _references(source: Source, named: _Names, number: int, several: bool) -> int:
    if not TASKS[source.task].references or source.references == 0:
        return 0
    if source.stream:
        return source.references or len(named.references)
    if len(named.references) > 1:
        return len(named.references)
    return 2 if several and number % 3 == 2 and "<|image_" not in (source.prompt or "") else 1


def _regions(source: Source, named: _Names, number: int, kind: Kind) -> int:
    if not TASKS[source.task].regions:
        return 0
    if len(named.entity_masks) > 1 or kind == "tar":  # a member is one image
        return len(named.entity_masks)
    return 1 + number % 2


def _cells(row: _Row, source: Source, named: _Names, references: int, regions: int) -> Iterator[tuple[str, object]]:
    """The columns of a row: images as bytes."""
    yield named.target, _picture(row.number, row.size)
    pictures = [_picture(row.number + 1 + each, row.size) for each in range(references)]
    if references and len(named.references) == 1 and not source.stream:
        yield named.references[0], pictures if references > 1 else pictures[0]
    elif references:
        yield from zip(named.references, pictures, strict=len(named.references) == references)
    if row.prompt is not None:
        yield named.prompt, row.prompt
    if regions:
        masks = [_mask(each, row.size) for each in range(regions)]
        yield named.entity_prompts, [f"a {list(_COLOURS)[(row.number + each) % 3]} {_SHAPES[each % 2]}" for each in range(regions)]
        yield from zip(named.entity_masks, masks, strict=True) if len(named.entity_masks) > 1 else [(named.entity_masks[0], masks if regions > 1 else masks[0])]
    yield from row.extra.items()


def _picture(number: int, size: Size) -> bytes:
    """A PNG: a shape of one colour on another, of its own for each number."""
    width, height = size
    colours = list(_COLOURS.values())
    image = Image.new("RGB", size, (255 - number % 200, number * 7 % 256, 128))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if number % 2 == 0 else draw.ellipse)(box, fill=colours[number % 3])
    return _png(image)


def _mask(number: int, size: Size) -> bytes:
    """A PNG: light in one half."""
    width, height = size
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, width // 2, height) if number % 2 == 0 else (width // 2, height // 2, width, height))
    return _png(image)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


# --- conditions -------------------------------------------------------------------------------------------------------------------------


def _fulfilling(made: Sequence[_Row], where: str, source: Source, columns: Mapping[str, Sequence[str]]) -> list[_Row] | None:
    """As many rows that fulfil a condition, and a few that do not; None if none is found that does.

    Values are tried: what the condition compares with, and a little more or less of it.
    """
    import numpy as np
    import pyarrow as pa

    condition, draw = parse(where), random.Random(key(0, "where", where))
    numbers, texts = _constants(where)
    values = {name: list(columns.get(name, ())) or _candidates(name, where, numbers, texts) for name in sorted(condition.names - set(BUILT_IN))}
    sides = sorted({min(max(8, round(number)), _LARGEST_SIDE) for number in numbers if number >= 8} | {side for row in made for side in row.size})
    sizes = [row.size for row in made] + ([(wide, high) for wide in sides for high in sides] if condition.names & {"width", "height", "pixels", "aspect"} else [])
    words = [None, *texts] if "prompt" in condition.names else [None]
    tried: list[_Row] = []
    for number in range(_TRIED):
        plain = made[number % len(made)]
        added = draw.choice(words)
        prompt = plain.prompt if added is None else f"{plain.prompt or 'a square'} {added}"
        tried.append(_Row(number, draw.choice(sizes), prompt, {**plain.extra, **{name: draw.choice(each) for name, each in values.items()}}))
    table: dict[str, object] = {
        "width": np.asarray([row.size[0] for row in tried]),
        "height": np.asarray([row.size[1] for row in tried]),
        "pixels": np.asarray([row.size[0] * row.size[1] for row in tried]),
        "aspect": np.asarray([row.size[0] / row.size[1] for row in tried]),
        "references": np.asarray([1 if TASKS[source.task].references else 0] * len(tried), dtype=np.int64),
        "prompt": pa.array([row.prompt or source.prompt for row in tried], pa.string()),
    }
    try:
        table |= {name: pa.array([row.extra[name] for row in tried]) for name in values}
        holds = condition.holds({name: column for name, column in table.items() if name in condition.names}, len(tried))
    except (ValueError, pa.ArrowException):
        return None
    good = [row for row, does in zip(tried, holds.tolist(), strict=True) if does]
    bad = [row for row, does in zip(tried, holds.tolist(), strict=True) if not does]
    if not good:
        return None
    smallest = sorted(good, key=lambda row: row.size[0] * row.size[1])
    chosen = [smallest[number % len(smallest)] for number in range(len(made))] + sorted(bad, key=lambda row: row.size[0] * row.size[1])[: len(made) // 4]
    return [_Row(number, row.size, row.prompt, row.extra) for number, row in enumerate(chosen)]


def _constants(where: str) -> tuple[list[float], list[str]]:
    """The numbers and the texts that stand in a condition."""
    texts = [double or single for double, single in re.findall(r"\"([^\"]*)\"|'([^']*)'", where)]
    rest = re.sub(r"\"[^\"]*\"|'[^']*'|`[^`]*`", " ", where)
    numbers = [float(number.replace("_", "")) for number in re.findall(r"(?<![\w.])(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", rest)]
    return numbers, texts


def _candidates(name: str, where: str, numbers: Sequence[float], texts: Sequence[str]) -> list[object]:
    """Values of a column to try: by what stands behind its name, texts, numbers, or true and false."""
    at = rf"(?:`{re.escape(name)}`|(?<![\w`]){re.escape(name)}(?![\w`]))"
    if re.search(rf"{at}\s*(?:==|!=|(?:not\s+)?in\s*\[|(?:not\s+)?contains)\s*[\"']", where) or re.search(rf"[\"']\s*[!=]=\s*{at}", where):
        return [*texts, "another"]
    if re.search(rf"{at}\s*(?:[<>=!+\-*/]|(?:not\s+)?in\s*\[)", where) or re.search(rf"[<>=+\-*/]\s*{at}", where):
        if re.search(rf"{at}\s*[!=]=\s*(?:true|false)", where):
            return [True, False]
        return [near for number in numbers for near in (number - 1, number, number + 1, 2 * number)] or [0.0, 1.0]
    if re.search(rf"{at}\s+is\b", where):
        return [1.0, None]
    return [True, False]


# --- writing ----------------------------------------------------------------------------------------------------------------------------


def _write_captioned(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    for number, row in enumerate(rows):
        (folder / f"{number:04d}.png").write_bytes(_bytes(row[named.target]))
        if isinstance(prompt := row.get(named.prompt), str):
            (folder / f"{number:04d}.txt").write_text(prompt, encoding="utf-8")
    return str(folder)


def _write_metadata(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    _write_lines(folder / "metadata.jsonl", _as_files(folder, rows))
    return str(folder)


def _write_jsonl(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    return _write_lines(folder / "rows.jsonl", _as_files(folder, rows))


def _write_json(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    file = folder / "rows.json"
    file.write_text(json.dumps(list(_as_files(folder, rows))), encoding="utf-8")
    return str(file)


def _write_csv(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    file = folder / "rows.csv"
    values = [{name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in _as_files(folder, rows)]
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.DictWriter(opened, list(dict.fromkeys(name for row in values for name in row)))
        table.writeheader()
        table.writerows(values)
    return str(file)


def _write_lines(file: Path, rows: Iterator[dict[str, object]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def _as_files(folder: Path, rows: Sequence[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """The rows, each image written into a file and named by it."""
    (folder / "images").mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        values: dict[str, object] = {}
        for place, (name, value) in enumerate(row.items()):
            contents = value if isinstance(value, list) else [value]
            if not contents or not all(isinstance(content, bytes) for content in contents):
                values[name] = value
                continue
            files = [f"images/{number:04d}-{place}-{each}.png" for each in range(len(contents))]
            for file, content in zip(files, contents, strict=True):
                (folder / file).write_bytes(_bytes(content))
            values[name] = files if isinstance(value, list) else files[0]
        yield values


def _columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """The rows as columns; images as `datasets` stores them."""

    def stored(value: object) -> object:
        if isinstance(value, list):
            return [stored(each) for each in value]
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [stored(row.get(name)) for row in rows] for name in names}
    for name, values in columns.items():
        if any(isinstance(value, list) for value in values):
            columns[name] = [value if isinstance(value, list) or value is None else [value] for value in values]
    return columns


def _write_parquet(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(_columns(rows))
    for shard, start in enumerate(range(0, len(rows), _SHARD)):
        parquet.write_table(table.slice(start, _SHARD), folder / f"rows-{shard:03d}.parquet", row_group_size=_SHARD // 2)
    return str(folder / "*.parquet")


def _write_arrow(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    import pyarrow as pa

    table = pa.table(_columns(rows))
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return str(folder / "rows.arrow")


def _write_tar(folder: Path, rows: Sequence[Mapping[str, object]], named: _Names) -> str:
    """Members by their column's name; what can be none, a text or a number of another column than a caption's, goes into the row's .json."""
    for shard, start in enumerate(range(0, len(rows), _SHARD)):
        with tarfile.open(folder / f"rows-{shard:03d}.tar", "w") as tar:
            for number, row in enumerate(rows[start : start + _SHARD], start):
                fields: dict[str, object] = {}
                for name, value in row.items():
                    if isinstance(value, bytes):
                        _add(tar, f"{number:04d}.{name}", value)
                    elif name == named.prompt and isinstance(value, str) and name in ("txt", "caption"):
                        _add(tar, f"{number:04d}.{name}", value.encode())
                    else:
                        fields[name] = value
                if fields:
                    _add(tar, f"{number:04d}.json", json.dumps(fields).encode())
    return str(folder / "*.tar")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


_WRITERS = {
    "captioned": _write_captioned,
    "metadata": _write_metadata,
    "jsonl": _write_jsonl,
    "json": _write_json,
    "csv": _write_csv,
    "parquet": _write_parquet,
    "arrow": _write_arrow,
    "tar": _write_tar,
}
