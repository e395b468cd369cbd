"""Shape: whether a document has the fields and the types of the plan language, said in words.

The rules are the JSON schema that pydantic makes of `stages.plan.Plan`, the one that editors read too. They are walked here, and not
left to pydantic's own errors, because a field that may be written in several ways (`lr: 1e-4`, `lr: {peak: 1e-4}`) must give one message,
about the way that was taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages.document import Entry, Node, resolve
from stages.plan import BYTES_PATTERN
from stages.problems import Location, Problem, listed, nearest, quoted, written

Schema = Mapping[str, Any]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
_NAME = "a name: letters, digits, '_', '.' and '-', at most 64, the first a letter or a digit"


@dataclass(frozen=True)
class Rules:
    """A JSON schema with its definitions."""

    schema: Schema

    def ways(self, schema: Schema) -> list[Schema]:
        """The ways in which a value may be written, references followed."""
        if "$ref" in schema:
            return self.ways(self.schema["$defs"][schema["$ref"].rsplit("/", 1)[1]])
        if "anyOf" in schema:
            return [way for inner in schema["anyOf"] for way in self.ways(inner)]
        return [schema]

    def problems(self, root: Node) -> Iterator[Problem]:
        """Everything that is wrong with the shape of a document."""
        yield from self._value(root, self.schema, (), root.place)

    def allowed(self, schema: Schema) -> str:
        """What may be written here, in words; null, which is the same as nothing written, is left out."""
        return ", or ".join(_in_words(way) for way in self.ways(schema) if way.get("type") != "null")

    def _value(self, node: Node, schema: Schema, location: Location, begins: str) -> Iterator[Problem]:
        """begins: the place of the value's name, or of the value if it has none."""
        ways = self.ways(schema)
        way = _way_taken(node, ways)
        if way is None:
            yield Problem(node.place, written(location), _wrong_kind(node, ways))
        elif isinstance(node.value, Mapping):
            if "properties" in way:
                yield from self._fields(node.value, way, location, begins)
            else:
                yield from self._entries(node.value, way, location, begins)
        elif isinstance(node.value, tuple):
            yield from self._items(node, node.value, way, location)
        elif (message := _wrong_scalar(node, way, ways)) is not None:
            yield Problem(node.place, written(location), message)

    def _fields(self, found: Mapping[str, Entry], way: Schema, location: Location, begins: str) -> Iterator[Problem]:
        """A mapping whose fields have names of their own."""
        fields: Mapping[str, Schema] = way["properties"]
        for name, entry in found.items():
            if name in fields:
                yield from self._value(entry.node, fields[name], (*location, name), entry.place)
            else:
                hint = _missing_space(name, entry) or nearest(name, fields)
                yield Problem(entry.place, written(location), f"no field {quoted(name)} (fields: {', '.join(fields)}){hint}")
        for name in way.get("required", ()):
            if name not in found:
                yield Problem(begins, written(location), f"field '{name}' is missing; it is {self.allowed(fields[name])}")

    def _entries(self, found: Mapping[str, Entry], way: Schema, location: Location, begins: str) -> Iterator[Problem]:
        """A mapping whose names the user gives."""
        inner: Schema = way.get("additionalProperties") or next(iter(way["patternProperties"].values()))
        names: Schema = way.get("propertyNames", {})
        pattern = next(iter(way.get("patternProperties", {})), None)
        if len(found) < way.get("minProperties", 0):
            yield Problem(begins, written(location), "is empty; name at least one")
        if len(found) > (most := way.get("maxProperties", math.inf)):
            yield Problem(begins, written(location), f"{len(found):,} names are given; at most {most}")
        for name, entry in found.items():
            if hint := _missing_space(name, entry):
                yield Problem(entry.place, written(location), f"{quoted(name)} has no value{hint}")
                continue
            if "enum" in names and name not in names["enum"]:
                hint = nearest(name, names["enum"])
                yield Problem(entry.place, written(location), f"{quoted(name)} is not one of {', '.join(names['enum'])}{hint}")
            elif pattern and not (re.fullmatch(pattern, name) and len(name) <= names.get("maxLength", math.inf)):
                yield Problem(entry.place, written(location), f"{quoted(name)} is not {_NAME}")
            yield from self._value(entry.node, inner, (*location, name), entry.place)

    def _items(self, node: Node, items: tuple[Node, ...], way: Schema, location: Location) -> Iterator[Problem]:
        least, most = way.get("minItems", 0), way.get("maxItems", math.inf)
        if not least <= len(items) <= most:
            needed = f"{least} are needed" if least == most else f"at least {least} is needed" if len(items) < least else f"at most {most}"
            yield Problem(node.place, written(location), f"{_counted(len(items))}; {needed}" if items else f"is empty; {needed}")
        each: list[Schema] = way.get("prefixItems", [])
        for index, item in enumerate(items):
            schema = each[index] if index < len(each) else way.get("items")
            if schema is not None:
                yield from self._value(item, schema, (*location, index), item.place)


def _missing_space(name: str, entry: Entry) -> str:
    """A hint for `{edit:1}`, which is one long name to YAML."""
    return "; write a space after the ':'" if ":" in name and entry.node.value is None else ""


def _counted(number: int) -> str:
    return "1 value is given" if number == 1 else f"{number} values are given"


def _way_taken(node: Node, ways: list[Schema]) -> Schema | None:
    """The way of writing that a value takes, judged by its kind; None if it is of another kind than all of them."""
    fitting = [way for way in ways if _is_kind(node, way)]
    if not isinstance(node.value, Mapping) or len(fitting) < 2:
        return fitting[0] if fitting else None
    names = node.value.keys()
    whole = [way for way in fitting if "properties" in way and names and names <= way["properties"].keys()]
    free = [way for way in fitting if "properties" not in way]
    return (whole or free or sorted(fitting, key=lambda way: -len(names & way["properties"].keys())))[0]


def _is_kind(node: Node, way: Schema) -> bool:
    value, kind = node.value, way.get("type")
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float):
        return kind in ("integer", "number")
    kinds: dict[type, str] = {str: "string", tuple: "array", type(None): "null"}
    return kind == ("object" if isinstance(value, Mapping) else kinds[type(value)])


def _wrong_kind(node: Node, ways: list[Schema]) -> str:
    written_ways = [way for way in ways if way.get("type") != "null"]
    allowed = ", nor ".join(_in_words(way) for way in written_ways)
    hint = ""
    if isinstance(node.value, str):
        takes_numbers = any(way.get("type") in ("integer", "number") for way in written_ways)
        if node.is_quoted and takes_numbers and isinstance(resolve(node.text), int | float):
            hint = "; remove the quotes"
        else:
            hint = nearest(node.value, [word for way in written_ways for word in _choices(way)])
    if node.value is None:
        return f"nothing is given; it must be {', or '.join(_in_words(way) for way in written_ways)}"
    if isinstance(node.value, bool) and any(way.get("type") == "string" for way in written_ways):
        hint = "; put it in quotes if it is meant as a word"
    if isinstance(node.value, int | float) and not isinstance(node.value, bool) and any(_is_text(way) for way in written_ways):
        hint = f'; put it in quotes: "{node.text}"'
    return f"{node.shown} is not {allowed}{hint}"


def _wrong_scalar(node: Node, way: Schema, ways: list[Schema]) -> str | None:
    """What is wrong with a word or number of the right kind, or None."""
    value = node.value
    if isinstance(value, str):
        return _wrong_word(value, node, way, ways)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if way["type"] == "integer" and isinstance(value, float):
            hint = f"; write {int(value)}" if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else ""
            return f"{node.shown} is not {_in_words(way)}{hint}"
        if not _is_in_range(value, way):
            return f"{node.shown} is not {_in_words(way)}"
    return None


def _wrong_word(value: str, node: Node, way: Schema, ways: list[Schema]) -> str | None:
    if any(value in _choices(each) for each in ways):
        return None
    if _choices(way):
        return _wrong_kind(node, ways)
    pattern, most = way.get("pattern"), way.get("maxLength", math.inf)
    if pattern is not None and (not re.fullmatch(pattern, value) or len(value) > most):
        return f"{node.shown} is not {_in_words(way)}"
    if len(value) > most:
        return f"{node.shown} has {len(value):,} characters; at most {most:,}"
    return None


def _is_in_range(value: int | float, way: Schema) -> bool:
    return (
        math.isfinite(value)
        and way.get("minimum", -math.inf) <= value <= way.get("maximum", math.inf)
        and way.get("exclusiveMinimum", -math.inf) < value < way.get("exclusiveMaximum", math.inf)
    )


def _choices(way: Schema) -> tuple[str, ...]:
    """The words that may be written, if only some may."""
    return (way["const"],) if "const" in way else tuple(way.get("enum", ()))


def _is_text(way: Schema) -> bool:
    return way.get("type") == "string" and not _choices(way)


def _in_words(way: Schema) -> str:
    """A way of writing a value, in words."""
    choices = _choices(way)
    if choices:
        return f"one of {', '.join(choices)}" if len(choices) > 1 else f"'{choices[0]}'"
    match way.get("type"):
        case "integer":
            return f"a whole number{_range_in_words(way, whole=True)}"
        case "number":
            return f"a number{_range_in_words(way, whole=False)}"
        case "string":
            return {NAME_PATTERN: _NAME, BYTES_PATTERN: "a size such as 200GB (MB, GB, TB, MiB, GiB, TiB)"}.get(str(way.get("pattern")), "text")
        case "boolean":
            return "true or false"
        case "array":
            return f"a list of {way['minItems']}" if "prefixItems" in way else "a list"
        case "object" if "properties" in way:
            return f"a mapping ({listed(way['properties'])})"
        case "object":
            return "a mapping of names to values"
    raise AssertionError(f"the plan language has a type that has no words: {way}")


def _range_in_words(way: Schema, *, whole: bool) -> str:
    least, above = way.get("minimum"), way.get("exclusiveMinimum")
    most, below = way.get("maximum"), way.get("exclusiveMaximum")
    if whole and below is not None:
        most, below = below - 1, None
    lower = f"from {least:,}" if least is not None else f"above {above:,}" if above is not None else ""
    joined = " to " if least is not None else ", at most "
    upper = f"{joined}{most:,.15g}" if isinstance(most, float) else f"{joined}{most:,}" if most is not None else ""
    if least is not None and not upper:
        lower = f"of at least {least:,}"
    ending = f"{lower}{upper}{f', and below {below:,}' if below is not None else ''}"
    return f" {ending}" if ending else ""
