"""Columns: whether a table has what a task needs, judged by the names of its columns alone.

The verdict is that of mixing.tasks.choose_columns, which cannot be imported without torch; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from stages.problems import listed, nearest, quoted

USUAL_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "target": ("image", "target", "output_image"),
        "reference": ("reference", "references", "input_images", "source"),
        "prompt": ("prompt", "text", "caption", "instruction"),
    }
)
"""Role to the columns that are taken for it where a plan does not name one."""


def column_problem(
    task: str, columns: Sequence[str], asked: Mapping[str, str | Sequence[str]], has_prompt: bool
) -> tuple[str, str] | None:
    """What a task lacks in a table: the field of the source to look at, and the message; None if it lacks nothing.

    columns: those that the table has. asked: the source's `columns`. has_prompt: whether the source gives a `prompt`.
    """
    roles = ["target", *(["reference"] if task != "text_to_image" else []), "prompt"]
    for role in roles:
        if role in asked:
            names = [asked_for] if isinstance(asked_for := asked[role], str) else list(asked_for)
            if not names or (len(names) > 1 and role != "reference"):
                return f"columns.{role}", f"{len(names)} columns are named; one plays this role"
            for each in names:
                if _answering(each, columns) is None:
                    return f"columns.{role}", f"no column {quoted(each)} (columns: {listed(columns)}){nearest(each, columns)}"
            continue
        present = [name for usual in USUAL_NAMES[role] if (name := _answering(usual, columns)) is not None]
        if len(present) > 1:
            return "columns", f"{listed(present)} could each be the {role}; say which: columns: {{{role}: {present[0]}}}"
        if not present and not (role == "prompt" and has_prompt):
            cure = f"say which it is, columns: {{{role}: NAME}}" + (", or give `prompt`" if role == "prompt" else "")
            usual = " or ".join(USUAL_NAMES[role])
            return "path", f"task {task} needs a {role}, and no column is called {usual} (columns: {listed(columns)}); {cure}"
    return None


def _answering(name: str, columns: Sequence[str]) -> str | None:
    """The column that a name means: `X_file_name` answers to X, and `file_name` to image, as in the metadata.jsonl of `datasets`."""
    names = (name, f"{name}_file_name", f"{name}_file_names", *(("file_name",) if name == "image" else ()))
    return next((each for each in names if each in columns), None)
