"""Tasks: what a row of a source asks for, and how a row becomes an Example."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from PIL import Image

from mixing.bad_rows import RowError, SourceError
from mixing.images import UnreadableImage, decode

Pixels = bytes | Path
"""An image that is not decoded yet: its content, or the file that holds it."""


@dataclass(frozen=True)
class TaskRoles:
    """Which roles the rows of a task have, beside prompt and target, which all have."""

    references: bool
    """Whether a row has one or more reference images; if not, it has none."""


Role = Literal["target", "reference", "prompt"]

Asked = Mapping[Role, str | Sequence[str]]
"""Role to the column or columns that a plan names for it."""

TASKS: Mapping[str, TaskRoles] = MappingProxyType(
    {
        "text_to_image": TaskRoles(references=False),
        "subject": TaskRoles(references=True),
        "control": TaskRoles(references=True),
        "edit": TaskRoles(references=True),
        "other": TaskRoles(references=True),
    }
)

USUAL_NAMES: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        "target": ("image", "target", "output_image"),
        "reference": ("reference", "references", "input_images", "source"),
        "prompt": ("prompt", "text", "caption", "instruction"),
    }
)
"""Role to the columns that are taken for it where a plan does not name one."""

MAX_REFERENCES = 255
"""Reference images of one row."""


@dataclass(frozen=True)
class Columns:
    """Which column plays which role."""

    target: str
    references: tuple[str, ...]
    """Each holds an image, a list of images, or nothing."""
    prompt: str | None
    """None: no column does, and every row has the source's prompt."""


@dataclass(frozen=True)
class Cells:
    """What a row holds for its task, images not decoded."""

    prompt: str
    target: Pixels
    references: tuple[Pixels, ...]

    def images(self) -> Iterator[tuple[str, Pixels]]:
        """Every image with what it is called in messages."""
        yield _called("target", self.target), self.target
        for number, reference in enumerate(self.references, 1):
            yield _called(f"reference {number}", reference), reference


@dataclass(frozen=True)
class Example:
    """A row, decoded. Images are RGB and upright, of the size that they have on disk."""

    key: str
    """The row's identity in its source."""
    prompt: str
    target: Image.Image
    references: tuple[Image.Image, ...]


def choose_columns(task: str, found: Iterable[str], asked: Asked, prompt: str | None) -> Columns:
    """Say which of the columns found plays which role: the one asked for, or the only one with a usual name.

    A column `X_file_name` or `X_file_names` also answers to X, and `file_name` to image, as in a metadata.jsonl for
    `datasets`. prompt: that of rows that have none. Raises SourceError if a role has none, or several could be it.
    """
    columns = tuple(dict.fromkeys(found))
    roles = TASKS[task]
    if "reference" in asked and not roles.references:
        raise SourceError(f"columns.reference: task '{task}' uses no references; leave it out, or choose another task")
    target = _one("target", columns, asked)
    references = _references(columns, asked) if roles.references else ()
    if target is None:
        raise SourceError(_missing("target", columns))
    if roles.references and not references:
        raise SourceError(_missing("reference", columns) + f" Task '{task}' needs one or more references.")
    text = _one("prompt", columns, asked)
    if text is None and prompt is None:
        raise SourceError(_missing("prompt", columns) + " Or say `prompt:` for rows that have none.")
    return Columns(target, references, text)


def to_cells(
    row: Mapping[str, object], task: str, columns: Columns, prompt: str | None, locate: Callable[[str], Path]
) -> Cells:
    """Take what the task needs out of a raw row (column to value).

    An image is bytes, a path, a mapping {bytes, path} as `datasets` stores it, or a list of these; a prompt is text,
    and is stripped. prompt: that of a row that has none. locate: gives the file of a path that a row names, or raises
    RowError. Raises RowError if the row lacks something or holds what is neither.
    """
    text = _prompt(row.get(columns.prompt) if columns.prompt is not None else None, columns.prompt, prompt)
    targets = tuple(_pixels(row.get(columns.target), columns.target, locate))
    if len(targets) != 1:
        raise RowError(f"'{columns.target}' holds {len(targets) or 'no'} images; it must hold one")
    references = tuple(pixels for name in columns.references for pixels in _pixels(row.get(name), name, locate))
    if columns.references and not references:
        raise RowError(f"no reference in {_listed(columns.references)}; task '{task}' needs one or more")
    if len(references) > MAX_REFERENCES:
        raise RowError(f"{len(references)} references; at most {MAX_REFERENCES} are read")
    return Cells(text, targets[0], references)


def to_example(key: str, cells: Cells) -> Example:
    """Decode a row's images. Raises UnreadableImage, naming the image."""
    decoded = []
    for name, pixels in cells.images():
        try:
            decoded.append(decode(pixels))
        except UnreadableImage as error:
            raise UnreadableImage(f"{name}: {error}") from error
    return Example(key, cells.prompt, decoded[0], tuple(decoded[1:]))


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the name most like this one, or nothing where none is like it."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _called(role: str, pixels: Pixels) -> str:
    return f"{role} {pixels.name!r}" if isinstance(pixels, Path) else role


def _prompt(value: object, column: str | None, instead: str | None) -> str:
    if value is not None and not isinstance(value, str):
        raise RowError(f"'{column}' holds {_kind(value)}, not text")
    text = (value or "").strip()
    if not text:
        if instead is None:
            raise RowError("no prompt" if column is None else f"no prompt in '{column}'")
        text = instead
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("the prompt is not valid Unicode: it holds half of a surrogate pair") from error
    return text


def _pixels(value: object, column: str, locate: Callable[[str], Path]) -> Iterator[Pixels]:
    """The images in one cell; none for None, an empty path or an empty list."""
    match value:
        case None | "":
            return
        case bytes():
            yield value
        case str():
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


def _one(role: Role, columns: Sequence[str], asked: Asked) -> str | None:
    """The column of a role that has one, or None."""
    if role in asked:
        names = _names(asked[role])
        if len(names) != 1:
            raise SourceError(f"columns.{role}: {len(names)} columns named; one plays this role")
        return _existing(role, names[0], columns)
    return _usual(role, columns)


def _references(columns: Sequence[str], asked: Asked) -> tuple[str, ...]:
    if "reference" in asked:
        return tuple(_existing("reference", name, columns) for name in _names(asked["reference"]))
    column = _usual("reference", columns)
    return () if column is None else (column,)


def _names(asked: str | Sequence[str]) -> tuple[str, ...]:
    return (asked,) if isinstance(asked, str) else tuple(asked)


def _usual(role: Role, columns: Sequence[str]) -> str | None:
    """The only column with a usual name of the role, or None. Raises SourceError if there are several."""
    present = [column for name in USUAL_NAMES[role] if (column := _answering(name, columns)) is not None]
    if len(present) > 1:
        raise SourceError(
            f"columns: {_listed(present)} could each be the {role}; say which: columns: {{{role}: {present[0]}}}"
        )
    return present[0] if present else None


def _answering(name: str, columns: Sequence[str]) -> str | None:
    names = (name, f"{name}_file_name", f"{name}_file_names", *(("file_name",) if name == "image" else ()))
    return next((each for each in names if each in columns), None)


def _existing(role: Role, name: str, columns: Sequence[str]) -> str:
    column = _answering(name, columns)
    if column is None:
        raise SourceError(f"columns.{role}: no column '{name}' (columns: {_listed(columns)}){nearest(name, columns)}")
    return column


def _missing(role: Role, columns: Sequence[str]) -> str:
    usual = ", ".join(USUAL_NAMES[role])
    return (
        f"no column for the {role} (columns: {_listed(columns)}); usual names are {usual}; "
        f"say which: columns: {{{role}: NAME}}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
