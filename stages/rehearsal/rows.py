"""Rows: made of the right shape for a source's task, under the columns that it names, so that its condition holds for most of them."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mixing.columns import TASKS
from mixing.keys import key
from mixing.where import BUILT_IN, parse
from stages.plan import Source
from stages.rehearsal.writing import WRITERS, Kind, Names

Size = tuple[int, int]
"""Width and height in pixels."""

_COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220)}
_SHAPES = ("square", "disc")
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
    path = WRITERS[kind](folder, written, named)
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


def _names(source: Source, kind: Kind) -> Names:
    def asked(role: str, otherwise: str) -> tuple[str, ...]:
        names = next((names for asked_for, names in source.columns.items() if asked_for == role), otherwise)
        return (names,) if isinstance(names, str) else tuple(names)

    usual_target = "png" if kind == "tar" else "file_name" if kind == "metadata" else "image"
    return Names(
        asked("target", usual_target)[0],
        asked("reference", "reference"),
        asked("prompt", "txt" if kind == "tar" else "prompt")[0],
        asked("entity_prompts", "eligen_entity_prompts")[0],
        asked("entity_masks", "eligen_entity_masks"),
    )


def _references(source: Source, named: Names, number: int, several: bool) -> int:
    if not TASKS[source.task].references or source.references == 0:
        return 0
    if source.stream:
        return source.references or len(named.references)
    if len(named.references) > 1:
        return len(named.references)
    return 2 if several and number % 3 == 2 and "<|image_" not in (source.prompt or "") else 1


def _regions(source: Source, named: Names, number: int, kind: Kind) -> int:
    if not TASKS[source.task].regions:
        return 0
    if len(named.entity_masks) > 1 or kind == "tar":  # a member is one image
        return len(named.entity_masks)
    return 1 + number % 2


def _cells(row: _Row, source: Source, named: Names, references: int, regions: int) -> Iterator[tuple[str, object]]:
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


# --- conditions -----------------------------------------------------------------------------------------------------------------------


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
