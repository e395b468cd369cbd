"""Columns: whether a table has what a task needs, judged by the names of its columns alone.

The verdict is that of mixing.columns.choose_columns, in the words of a plan's check; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from mixing.columns import TASKS, USUAL_NAMES, Role
from stages.problems import listed, nearest, quoted

_SEVERAL = ("reference", "entity_masks")  # roles that several columns may play together
_CALLED: Mapping[Role, str] = {"entity_prompts": "list of entity prompts", "entity_masks": "list of entity masks"}


def column_problem(
    task: str, columns: Sequence[str], asked: Mapping[str, str | Sequence[str]], has_prompt: bool
) -> tuple[str, str] | None:
    """What a task lacks in a table: the field of the source to look at, and the message; None if it lacks nothing.

    columns: those that the table has. asked: the source's `columns`, of which those for roles that the task does not have are passed over
    (`stages.unheeded` refuses them). has_prompt: whether the source gives a `prompt`.
    """
    has = TASKS[task]
    unused = {"reference": not has.references, "entity_prompts": not has.regions, "entity_masks": not has.regions}
    roles: list[Role] = [role for role in get_args(Role) if not unused.get(role, False)]
    for role in roles:
        if role in asked:
            names = [asked_for] if isinstance(asked_for := asked[role], str) else list(asked_for)
            if not names or (len(names) > 1 and role not in _SEVERAL):
                return f"columns.{role}", f"{len(names)} columns are named; one plays this role"
            for each in names:
                if _answering(each, columns) is None:
                    return f"columns.{role}", f"no column {quoted(each)} (columns: {listed(columns)}){nearest(each, columns)}"
            continue
        present = [name for usual in USUAL_NAMES[role] if (name := _answering(usual, columns)) is not None]
        if len(present) > 1:
            return "columns", f"{listed(present)} could each be the {_CALLED.get(role, role)}; say which: columns: {{{role}: {present[0]}}}"
        if not present and not (role == "prompt" and has_prompt):
            cure = f"say which it is, columns: {{{role}: NAME}}" + (", or give `prompt`" if role == "prompt" else "")
            usual = " or ".join(USUAL_NAMES[role])
            return "path", f"task {task} needs a {_CALLED.get(role, role)}, and no column is called {usual} (columns: {listed(columns)}); {cure}"
    return None


def _answering(name: str, columns: Sequence[str]) -> str | None:
    """The column that a name means: `X_file_name` answers to X, and `file_name` to image, as in the metadata.jsonl of `datasets`."""
    names = (name, f"{name}_file_name", f"{name}_file_names", *(("file_name",) if name == "image" else ()))
    return next((each for each in names if each in columns), None)
