"""Tasks: what a row of a source asks for, and how a row becomes an Example."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mixing.bad_rows import RowError
from mixing.columns import TASKS, USUAL_NAMES, Asked, Columns, Role, TaskRoles, choose_columns, listed, nearest
from mixing.images import UnreadableImage, decode

__all__ = [
    "MAX_REFERENCES", "TASKS", "USUAL_NAMES", "Asked", "Cells", "Columns", "Example", "ExampleRegion", "Pixels", "Region", "Role", "TaskRoles",
    "choose_columns", "nearest", "to_cells", "to_example", "without_placeholders",
]  # fmt: skip

Pixels = bytes | Path
"""An image that is not decoded yet: its content, or the file that holds it."""


MAX_REFERENCES = 255
"""Reference images of one row."""

MAX_REGIONS = 255
"""Regions of one row."""

_PLACEHOLDER = re.compile(r"(?:<img>\s*)?<\|image_0*([0-9]+)\|>(?:\s*</img>)?")
"""Stands in an instruction for an input image, by number from 1. Source: OmniGen/processor.py."""


@dataclass(frozen=True)
class Region:
    """A part of the target with a prompt of its own."""

    prompt: str
    mask: Pixels
    """Light where the region is; of the target's size."""


@dataclass(frozen=True)
class Cells:
    """What a row holds for its task, images not decoded."""

    prompts: tuple[str, ...]
    """One or more captions of the same image."""
    target: Pixels
    references: tuple[Pixels, ...]
    regions: tuple[Region, ...] = ()
    extra: tuple[object, ...] = ()
    """Values of the further columns that were asked for, in that order: text, numbers, true and false, None."""
    size: tuple[int, int] | None = None
    """Height and width of the upright target, where they are known; else they stand in its header."""
    unread: int | None = None
    """While a source is opened: the bytes of a target whose `size` is known, and which was left out (`target` is empty)."""

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.prompts[0]

    def images(self) -> Iterator[tuple[str, Pixels]]:
        """Every image with what it is called in messages: the target, then the references, then the masks."""
        yield _called("target", self.target), self.target
        for number, reference in enumerate(self.references, 1):
            yield _called(f"reference {number}", reference), reference
        for number, region in enumerate(self.regions, 1):
            yield _called(f"mask {number}", region.mask), region.mask

    def are_references(self) -> slice:
        """Which of `images()` are references."""
        return slice(1, 1 + len(self.references))

    def misfit(self, sizes: Sequence[tuple[int, int]]) -> str | None:
        """The first mask that is not of the target's size, and what is wrong with it; None if all are.

        sizes: height and width of each of `images()`.
        """
        height, width = sizes[0]
        for (name, _), size in list(zip(self.images(), sizes, strict=True))[1 + len(self.references) :]:
            if size != (height, width):
                return f"{name}: {size[1]} x {size[0]} pixels, and the target has {width} x {height}; a mask has the target's size"
        return None


@dataclass(frozen=True)
class ExampleRegion:
    """A region, decoded."""

    prompt: str
    mask: Image.Image
    """Mode L, upright, of the target's size: light where the region is. What is transparent is light."""


@dataclass(frozen=True)
class Example:
    """A row, decoded. Images are RGB and upright, of the size that they have on disk."""

    key: str
    """The row's identity in its source."""
    prompts: tuple[str, ...]
    """One or more captions of the same image."""
    target: Image.Image
    references: tuple[Image.Image, ...]
    regions: tuple[ExampleRegion, ...] = ()

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.prompts[0]


def to_cells(
    row: Mapping[str, object], task: str, columns: Columns, prompt: str | None, locate: Callable[[str], Path]
) -> Cells:
    """Take what the task needs out of a raw row (column to value).

    An image is bytes, a path, a mapping {bytes, path} as `datasets` stores it, or a list of these (as JSON too, for a
    .csv holds no lists); a prompt is text, or a list of texts of which those that are not empty count, and is stripped.
    Where prompts name images (`<img><|image_1|></img>`), they name each reference by its number, and no other.
    prompt: that of a row that has none. locate: gives the file of a path that a row names, or raises RowError. Raises
    RowError if the row lacks something or holds what is neither.
    """
    prompts = _prompts(row.get(columns.prompt) if columns.prompt is not None else None, columns.prompt, prompt)
    targets = tuple(_pixels(row.get(columns.target), columns.target, locate))
    if len(targets) != 1:
        raise RowError(f"'{columns.target}' holds {len(targets) or 'no'} images; it must hold one")
    references = tuple(pixels for name in columns.references for pixels in _pixels(row.get(name), name, locate))
    if columns.references and not references:
        raise RowError(f"no reference in {listed(columns.references)}; task '{task}' needs one or more")
    if len(references) > MAX_REFERENCES:
        raise RowError(f"{len(references)} references; at most {MAX_REFERENCES} are read")
    for text in prompts:
        _look_at_placeholders(text, len(references))
    extra = tuple(_extra(row.get(name), name) for name in columns.extra)
    return Cells(prompts, targets[0], references, _regions(row, columns, locate), extra)


def to_example(key: str, cells: Cells) -> Example:
    """Decode a row's images. Raises UnreadableImage, naming the image."""
    decoded = []
    for name, pixels in cells.images():
        try:
            decoded.append(decode(pixels))
        except UnreadableImage as error:
            raise UnreadableImage(f"{name}: {error}") from error
    if (misfit := cells.misfit([(image.height, image.width) for image in decoded])) is not None:
        raise UnreadableImage(misfit)
    masks = decoded[1 + len(cells.references) :]
    regions = tuple(ExampleRegion(region.prompt, mask.convert("L")) for region, mask in zip(cells.regions, masks, strict=True))
    return Example(key, cells.prompts, decoded[0], tuple(decoded[cells.are_references()]), regions)


def without_placeholders(prompt: str) -> str:
    """The prompt with `image 1` where `<img><|image_1|></img>` stood, for models to which the placeholder means nothing."""
    return _PLACEHOLDER.sub(r"image \1", prompt) if "<|" in prompt else prompt


def _called(role: str, pixels: Pixels) -> str:
    return f"{role} {pixels.name!r}" if isinstance(pixels, Path) else role


def _prompts(value: object, column: str | None, instead: str | None) -> tuple[str, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    texts = []
    for each in values:
        if each is not None and not isinstance(each, str):
            inside = "a list with " if each is not value else ""
            raise RowError(f"'{column}' holds {inside}{_kind(each)}, not text")
        if each and (text := each.strip()):
            texts.append(text)
    if not texts:
        if instead is None:
            raise RowError("no prompt" if column is None else f"no prompt in '{column}'")
        texts = [instead]
    for text in texts:
        _look_at_text(text, "the prompt")
    return tuple(texts)


def _look_at_text(text: str, called: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{called} is not valid Unicode: it holds half of a surrogate pair") from error
    if "\0" in text:  # so UTF-16 looks when it is read as UTF-8, which no decoder refuses
        raise RowError(f"{called} holds a zero character; if it is UTF-16, save it as UTF-8")


def _look_at_placeholders(prompt: str, num_references: int) -> None:
    """Raise RowError unless the images that a prompt names are all references, each one; a prompt may name none."""
    if "<|image_" not in prompt:
        return
    named = set(_PLACEHOLDER.findall(prompt))
    needed = {str(number) for number in range(1, num_references + 1)}
    if not named or named == needed:
        return
    unknown, unnamed = (sorted(some, key=lambda number: (len(number), number)) for some in (named - needed, needed - named))
    there = f"the row has {num_references or 'no'} reference{'s' if num_references != 1 else ''}"
    if unknown:
        raise RowError(f"the prompt names image {', '.join(number[:20] for number in unknown[:5])}, and {there}; each is named by its number, from 1")
    raise RowError(f"the prompt names images, but not image {', '.join(unnamed[:5])}, and {there}; name all of them, or none")


def _regions(row: Mapping[str, object], columns: Columns, locate: Callable[[str], Path]) -> tuple[Region, ...]:
    if columns.entity_prompts is None:
        return ()
    prompts = _texts(row.get(columns.entity_prompts), columns.entity_prompts)
    masks = [mask for name in columns.entity_masks for mask in _pixels(row.get(name), name, locate)]
    if len(prompts) != len(masks):
        raise RowError(
            f"'{columns.entity_prompts}' holds {len(prompts)} prompts and {listed(columns.entity_masks)} {len(masks)} masks; "
            "each region has one of both"
        )
    if not prompts:
        raise RowError(f"no region in '{columns.entity_prompts}'; task 'entity' needs one or more")
    if len(prompts) > MAX_REGIONS:
        raise RowError(f"{len(prompts)} regions; at most {MAX_REGIONS} are read")
    return tuple(map(Region, prompts, masks))


def _texts(value: object, column: str) -> tuple[str, ...]:
    """The texts of a list, or of a JSON list, stripped. Raises RowError for anything else, and for an empty text."""
    if isinstance(value, str) and value.strip():
        value = _json_list(value)
        if value is None:
            raise RowError(f"'{column}' holds text that is not a JSON list; write [\"...\", \"...\"]")
    if value is None or value == "":
        return ()
    if not isinstance(value, list | tuple):
        raise RowError(f"'{column}' holds {_kind(value)}, not a list of texts")
    texts = []
    for number, each in enumerate(value, 1):
        if not isinstance(each, str):
            raise RowError(f"'{column}' holds a list with {_kind(each)}, not texts alone")
        if not (text := each.strip()):
            raise RowError(f"prompt {number} in '{column}' is empty")
        _look_at_text(text, f"prompt {number} in '{column}'")
        texts.append(text)
    return tuple(texts)


def _json_list(text: str) -> list[object] | None:
    """The list that a text is in JSON, or None."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _extra(value: object, column: str) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            _look_at_text(value, f"'{column}'")
            return value
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            raise RowError(f"'{column}' holds {_kind(value)}; what can be compared is text, numbers, true and false")


def _pixels(value: object, column: str, locate: Callable[[str], Path]) -> Iterator[Pixels]:
    """The images in one cell; none for None, an empty path or an empty list."""
    match value:
        case None | "":
            return
        case bytes():
            yield value
        case str():
            if (names := _json_list(value)) is not None and all(isinstance(name, str) for name in names):
                yield from _pixels(names, column, locate)
            else:
                yield locate(value)
        case {"bytes": bytes() as content}:
            yield content
        case {"path": str() as path}:
            yield from _pixels(path, column, locate)
        case {"bytes": None} | {"path": None}:
            return
        case list() | tuple():
            for inner in value:
                yield from _pixels(inner, column, locate)
        case _:
            raise RowError(f"'{column}' holds {_kind(value)}, not an image or a path")


def _kind(value: object) -> str:
    words = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return words.get(type(value), type(value).__name__)
