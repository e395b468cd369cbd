"""Columns: which column of a table plays which role, by the names of the columns alone. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mixing.bad_rows import SourceError


@dataclass(frozen=True)
class TaskRoles:
    """Which roles the rows of a task have, beside prompt and target, which all have."""

    references: bool
    """Whether a row has one or more reference images; if not, it has none."""
    regions: bool = False
    """Whether a row has one or more regions, each a prompt and a mask; if not, it has none."""


Role = Literal["target", "reference", "prompt", "entity_prompts", "entity_masks"]

Asked = Mapping[Role, str | Sequence[str]]
"""Role to the column or columns that a plan names for it."""

TASKS: Mapping[str, TaskRoles] = MappingProxyType(
    {
        "text_to_image": TaskRoles(references=False),
        "subject": TaskRoles(references=True),
        "control": TaskRoles(references=True),
        "edit": TaskRoles(references=True),
        "other": TaskRoles(references=True),
        "entity": TaskRoles(references=False, regions=True),
    }
)

USUAL_NAMES: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        "target": ("image", "target", "output_image"),
        "reference": ("reference", "references", "input_images", "source"),
        "prompt": ("prompt", "text", "caption", "instruction"),
        "entity_prompts": ("eligen_entity_prompts",),
        "entity_masks": ("eligen_entity_masks",),
    }
)
"""Role to the columns that are taken for it where a plan does not name one."""

_OF_REGIONS: tuple[Role, Role] = ("entity_prompts", "entity_masks")


@dataclass(frozen=True)
class Columns:
    """Which column plays which role."""

    target: str
    references: tuple[str, ...]
    """Each holds an image, a list of images, or nothing."""
    prompt: str | None
    """None: no column does, and every row has the source's prompt. It holds text, or a list of texts: several captions of the same image."""
    entity_prompts: str | None = None
    """Holds a list of texts, one for each mask."""
    entity_masks: tuple[str, ...] = ()
    """Each holds an image or a list of images."""
    extra: tuple[str, ...] = ()
    """Further columns whose values are kept."""

    def used(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        named = (self.target, *self.references, self.prompt, self.entity_prompts, *self.entity_masks, *self.extra)
        return tuple(dict.fromkeys(name for name in named if name is not None))


def choose_columns(
    task: str, found: Iterable[str], asked: Asked, prompt: str | None, extra: Sequence[str] = ()
) -> Columns:
    """Say which of the columns found plays which role: the one asked for, or the only one with a usual name.

    A column `X_file_name` or `X_file_names` also answers to X, and `file_name` to image, as in a metadata.jsonl for
    `datasets`. prompt: that of rows that have none. extra: further columns whose values are kept. Raises SourceError if
    a role has none, or several could be it, or an extra column does not exist.
    """
    columns = tuple(dict.fromkeys(found))
    roles = TASKS[task]
    if "reference" in asked and not roles.references:
        raise SourceError(f"columns.reference: task '{task}' uses no references; leave it out, or choose another task")
    for role in _OF_REGIONS:
        if role in asked and not roles.regions:
            raise SourceError(f"columns.{role}: task '{task}' uses no regions; leave it out, or choose task entity")
    target = _one("target", columns, asked)
    references = _several("reference", columns, asked) if roles.references else ()
    if target is None:
        raise SourceError(_missing("target", columns))
    if roles.references and not references:
        raise SourceError(_missing("reference", columns) + f" Task '{task}' needs one or more references.")
    text = _one("prompt", columns, asked)
    if text is None and prompt is None:
        raise SourceError(_missing("prompt", columns) + " Or say `prompt:` for rows that have none.")
    entity_prompts = _one("entity_prompts", columns, asked) if roles.regions else None
    entity_masks = _several("entity_masks", columns, asked) if roles.regions else ()
    if roles.regions and (entity_prompts is None or not entity_masks):
        lacks: Role = "entity_prompts" if entity_prompts is None else "entity_masks"
        raise SourceError(_missing(lacks, columns) + f" Task '{task}' needs one or more regions.")
    for name in extra:
        if name not in columns:
            raise SourceError(f"no column '{name}' (columns: {listed(columns)}){nearest(name, columns)}")
    return Columns(target, references, text, entity_prompts, entity_masks, tuple(extra))


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the name most like this one, or nothing where none is like it."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _one(role: Role, columns: Sequence[str], asked: Asked) -> str | None:
    """The column of a role that has one, or None."""
    if role in asked:
        names = _names(asked[role])
        if len(names) != 1:
            raise SourceError(f"columns.{role}: {len(names)} columns named; one plays this role")
        return _existing(role, names[0], columns)
    return _usual(role, columns)


def _several(role: Role, columns: Sequence[str], asked: Asked) -> tuple[str, ...]:
    """The columns of a role that may have more than one."""
    if role in asked:
        return tuple(_existing(role, name, columns) for name in _names(asked[role]))
    column = _usual(role, columns)
    return () if column is None else (column,)


def _names(asked: str | Sequence[str]) -> tuple[str, ...]:
    return (asked,) if isinstance(asked, str) else tuple(asked)


def _usual(role: Role, columns: Sequence[str]) -> str | None:
    """The only column with a usual name of the role, or None. Raises SourceError if there are several."""
    present = [column for name in USUAL_NAMES[role] if (column := _answering(name, columns)) is not None]
    if len(present) > 1:
        raise SourceError(
            f"columns: {listed(present)} could each be the {role}; say which: columns: {{{role}: {present[0]}}}"
        )
    return present[0] if present else None


def _answering(name: str, columns: Sequence[str]) -> str | None:
    names = (name, f"{name}_file_name", f"{name}_file_names", *(("file_name",) if name == "image" else ()))
    return next((each for each in names if each in columns), None)


def _existing(role: Role, name: str, columns: Sequence[str]) -> str:
    column = _answering(name, columns)
    if column is None:
        raise SourceError(f"columns.{role}: no column '{name}' (columns: {listed(columns)}){nearest(name, columns)}")
    return column


def _missing(role: Role, columns: Sequence[str]) -> str:
    usual = USUAL_NAMES[role]
    names = f"usual names are {', '.join(usual)}" if len(usual) > 1 else f"its usual name is {usual[0]}"
    return (
        f"no column for the {role} (columns: {listed(columns)}); {names}; "
        f"say which: columns: {{{role}: NAME}}."
    )


def listed(names: Sequence[str]) -> str:
    """Names between quotes; of many, the first twenty."""
    return ", ".join(f"'{name}'" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
