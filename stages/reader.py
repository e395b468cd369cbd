"""Reader: a plan's YAML becomes a `Plan`; every problem with its text, its fields and its types is found at once.

What the plan means is asked by `stages.check`, when the shape is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from mixing.plain_file import open_plain
from stages.document import MOST_BYTES, MOST_VALUES, Entry, Node, parse
from stages.plan import Plan
from stages.problems import MOST_TOLD, Location, PlanError, Problem, written
from stages.settings import apply_setting
from stages.shape import Rules
from stages.unheeded import unheeded
from stages.yaml_text import to_text

__all__ = ["PlanError", "Problem", "ReadPlan", "read_plan", "resolved", "to_yaml"]

_LARGER = 20  # times what a person may write: of a plan that holds nothing else, 200 stages come to 12,000 values
_EMPTY = "the plan is empty; the shortest one stands at the top of docs/plan.md"


@dataclass(frozen=True)
class ReadPlan:
    """A plan, and where everything that is written in it stands."""

    plan: Plan
    places: Mapping[Location, str]
    """The place of every value that is given: ("stages", 1, "mix", "edit") to `plans/x.yaml:18:16` or `--set stages.refine.steps=50`."""
    names: Mapping[Location, str]
    """The place of the name of every field that is given."""

    def _repr_html_(self) -> str:
        """What a notebook shows: the plan."""
        return self.plan._repr_html_()

    def place(self, *location: str | int) -> str:
        """The place of a value, or if it is not given, of the nearest one around it."""
        return self._nearest(self.places, location)

    def name_place(self, *location: str | int) -> str:
        """The place of a field's name, or if it has none, of the nearest value around it."""
        return self.names.get(location) or self._nearest(self.places, location)

    def _nearest(self, places: Mapping[Location, str], location: Location) -> str:
        while location not in places:
            location = location[:-1]
        return places[location]


def read_plan(path: Path, settings: Sequence[str] = (), *, written_out: bool = False) -> ReadPlan:
    """Read a plan from a file. Defaults are filled in; a plan without a name gets the file's.

    settings: changes as `--set` takes them, PATH=VALUE, carried out in their order. written_out: whether Medley wrote the file, with every default, so that it may be
    larger than what a person writes. Raises PlanError with every problem found, up to 500.
    """
    larger = _LARGER if written_out else 1
    root, problems = parse(_text(path, MOST_BYTES * larger), lambda line, column: f"{path}:{line + 1}:{column + 1}", MOST_VALUES * larger)
    if root is None or root.value is None:
        raise PlanError(problems or [Problem(f"{path}:1:1", "", _EMPTY)])
    if not isinstance(root.value, Mapping):
        message = f"a plan is a mapping ({', '.join(Plan.model_fields)}); this is {root.shown}"
        raise PlanError([*problems, Problem(root.place, "", message)])
    for setting in settings:
        try:
            root = apply_setting(root, setting)
        except PlanError as error:
            problems += error.problems
    problems += islice(_rules().problems(root), MOST_TOLD)
    if problems:
        raise PlanError(problems)
    assert isinstance(root.value, Mapping)
    named = {"name": Entry(root.place, Node(_name(path), root.place)), **root.value}
    places: dict[Location, str] = {}
    names: dict[Location, str] = {}
    for location, node, name_place in _values(root, ()):
        places[location] = node.place
        if name_place is not None:
            names[location] = name_place
    try:
        plan = Plan.model_validate({name: entry.node.plain for name, entry in named.items()})
    except ValidationError as error:
        raise PlanError(_left_over(error, places)) from error
    return ReadPlan(plan, MappingProxyType(places), MappingProxyType(names))


def resolved(plan: Plan) -> dict[str, Any]:
    """The plan with every default written out, as YAML and JSON hold it.

    Fields that this plan does not heed, and which would be refused if they were given, are left out; so what is written can be read back,
    and is an equal plan.
    """
    written_out = plan.model_dump(mode="json")
    for location, _ in unheeded(plan):
        inner: Any = written_out
        for step in location[:-1]:
            inner = inner[step]
        inner.pop(location[-1], None)
    return written_out


def to_yaml(plan: Plan) -> str:
    """The plan with every default written out, as YAML."""
    return to_text(resolved(plan))


@cache
def _rules() -> Rules:
    """The plan language's; pydantic takes longer to make them than most plans take to be read."""
    return Rules(Plan.model_json_schema())


def _text(path: Path, most_bytes: int) -> str:
    """The file's text. Raises PlanError if there is none to be had."""
    try:
        with open_plain(path) as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise PlanError.at(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:  # a zero character in the path
        raise PlanError.at(repr(str(path)), f"cannot be read: {error}") from error
    if len(content) > most_bytes:
        raise PlanError.at(str(path), f"the file is larger than {most_bytes // 2**10:,} KiB; a plan is YAML text, written by hand")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig", "replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        raise PlanError([Problem(f"{path}:{line}:{column}", "", message)]) from error


def _name(path: Path) -> str:
    """The file's name, made to be a plan's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip("-._")[:64] or "plan"


def _values(node: Node, location: Location, name_place: str | None = None) -> Iterator[tuple[Location, Node, str | None]]:
    """Every value, with the place of its name if it has one."""
    yield location, node, name_place
    if isinstance(node.value, Mapping):
        for name, entry in node.value.items():
            yield from _values(entry.node, (*location, name), entry.place)
    elif isinstance(node.value, tuple):
        for index, item in enumerate(node.value):
            yield from _values(item, (*location, index))


def _left_over(error: ValidationError, places: Mapping[Location, str]) -> Iterator[Problem]:
    """What pydantic refuses though the shape is right, such as a number too large for a float."""
    for each in error.errors(include_url=False, include_context=False):
        location: Location = each["loc"]
        while location not in places:
            location = location[:-1]
        yield Problem(places[location], written(location), each["msg"])
