"""Settings: `--set stages.refine.steps=50` changes a document before it is looked at, and is itself the place of what it wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from stages.document import DEEPEST, Entry, Node, parse
from stages.problems import Location, PlanError, Problem, listed, nearest, quoted, written

BARE: Mapping[str, str] = MappingProxyType({"lr": "peak", "batch": "images", "model": "repo"})
"""Fields that may be written bare to the field of their mapping that the bare value is: `lr: 1e-4` is `lr: {peak: 1e-4}`."""


def apply_setting(root: Node, setting: str) -> Node:
    """The document with one setting carried out.

    setting: PATH=VALUE. The path is dotted (`stages.refine.steps`, `stages.0.steps` or `stages[0].steps`); a stage is named by its name
    or counted from 0; mappings on the way that are not there are made. The value is YAML. Raises PlanError.
    """
    flag = f"--set {setting}"
    path, equals, text = setting.partition("=")
    steps = re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
    if not equals or not all(steps):
        raise PlanError.at(flag, "a setting is written PATH=VALUE, such as stages.refine.steps=50")
    if len(steps) > DEEPEST:
        raise PlanError.at(f"--set {path[:40]}...", f"the path has {len(steps):,} parts; at most {DEEPEST} are read")
    value, problems = parse(text, lambda line, column: flag)
    if problems:
        raise PlanError(problems)
    return _changed(root, steps, value or Node(None, flag), flag, ())


def _changed(node: Node, steps: Sequence[str], value: Node, flag: str, location: Location) -> Node:
    if not steps:
        return value
    if isinstance(node.value, tuple):
        index, taken = _item(node.value, steps, flag, location)
        changed = _changed(node.value[index], steps[taken:], value, flag, (*location, index))
        return Node((*node.value[:index], changed, *node.value[index + 1 :]), node.place)
    fields: dict[str, Entry] = {}
    place = node.place
    if isinstance(node.value, Mapping):
        fields.update(node.value)
    elif node.value is None:
        place = flag
    elif location and (first := BARE.get(str(location[-1]))) is not None:
        fields[first] = Entry(node.place, node)
    else:
        start = flag.removeprefix("--set ").partition("=")[0]
        message = f"{node.shown} has no fields; give {written(location)} as a whole, not {quoted(start)}"
        raise PlanError([Problem(flag, written(location), message)])
    name, taken = _longest(steps, fields) or (steps[0], 1)
    before = fields.get(name, Entry(flag, Node(None, flag)))
    after = _changed(before.node, steps[taken:], value, flag, (*location, name))
    fields[name] = Entry(before.place if before.node.place != flag and taken < len(steps) else flag, after)
    return Node(MappingProxyType(fields), place)


def _longest(steps: Sequence[str], names: Mapping[str, object]) -> tuple[str, int] | None:
    """The name that the most steps spell, and how many; names may hold dots."""
    for taken in range(len(steps), 0, -1):
        if (name := ".".join(steps[:taken])) in names:
            return name, taken
    return None


def _item(items: tuple[Node, ...], steps: Sequence[str], flag: str, location: Location) -> tuple[int, int]:
    """Which item of a list the next steps name, and how many steps that takes."""
    named: dict[str, int] = {}
    for index, item in enumerate(items):
        if isinstance(item.value, Mapping) and "name" in item.value:
            named.setdefault(str(item.value["name"].node.value), index)
    if (found := _longest(steps, named)) is not None:
        return named[found[0]], found[1]
    if steps[0].isascii() and steps[0].isdigit() and len(steps[0]) < 10 and int(steps[0]) < len(items):
        return int(steps[0]), 1
    numbers = f"a number from 0 to {len(items) - 1}" if items else "it is empty"
    known = f"{listed(named)}; or {numbers}" if named else numbers
    raise PlanError([Problem(flag, written(location), f"no {quoted(steps[0])} ({known}){nearest(steps[0], named)}")])
