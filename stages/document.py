"""Document: YAML text becomes a tree in which every value knows its place.

The scanner and parser are those of ruamel.yaml (YAML 1.2). What plain scalars mean is the core schema of YAML 1.2,
section 10.3.2, written out below: `no` is a word, `1e-4` a number; beyond it, `1_000` is a number too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.reader import ReaderError

from stages.problems import Problem, quoted

MOST_BYTES = 2**17  # a slow machine reads so much in a second and a half
MOST_VALUES = 20_000  # after aliases are followed; a slow machine reads so many in a second
DEEPEST = 50

Scalar = str | int | float | bool | None
Places = Callable[[int, int], str]
"""Line and column, counted from 0, to a place."""

_INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST_NUMBER = 100  # characters; anything longer is a word
_WORDS: Mapping[str, Scalar] = MappingProxyType(
    {
        **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
        **dict.fromkeys(("true", "True", "TRUE"), True),
        **dict.fromkeys(("false", "False", "FALSE"), False),
    }
)

_PLAIN_WORDS = (
    ("mapping values are not", "a second ':' in this line, or an indentation that fits nothing above; quote text with ': '"),
    ("found character '\\t'", "a tab; YAML indents with spaces"),
    ("found character", "a value cannot begin with FOUND; put it in quotes"),
    ("but found '}'", "a '}' with no '{' before it"),
    ("but found ']'", "a ']' with no '[' before it"),
    ("but found ','", "a ',' outside of [ ] and { }"),
    ("expected <block end>", "the indentation fits nothing above; fields, and items, that belong together begin in one column"),
    ("expected the node content", "a value is missing here"),
)


@dataclass(frozen=True)
class Node:
    """A value of the document."""

    value: Scalar | tuple[Node, ...] | Mapping[str, Entry]
    place: str
    text: str = ""
    """Of a scalar: as it is written."""
    is_quoted: bool = False
    size: int = 1
    """How many values it holds, itself among them."""

    @property
    def plain(self) -> object:
        """The value as Python's own types."""
        if isinstance(self.value, Mapping):
            return {key: entry.node.plain for key, entry in self.value.items()}
        if isinstance(self.value, tuple):
            return [item.plain for item in self.value]
        return self.value

    @property
    def shown(self) -> str:
        """The value as messages show it."""
        if isinstance(self.value, Mapping):
            return "a mapping"
        if isinstance(self.value, tuple):
            return "a list"
        if isinstance(self.value, str):
            return quoted(self.value)
        return "nothing" if self.value is None else self.text


@dataclass(frozen=True)
class Entry:
    """A field of a mapping."""

    place: str
    """Of its name."""
    node: Node


def parse(text: str, places: Places, most_values: int = MOST_VALUES) -> tuple[Node | None, list[Problem]]:
    """The tree of a YAML text, and what is wrong with the text. No tree if it is empty, or broken off at a problem.

    places: gives the place of a line and column. most_values: beyond so many it is broken off.
    """
    builder = _Builder(text, places, most_values)
    try:
        return builder.document(), builder.problems
    except _Stop:
        return None, builder.problems
    except MarkedYAMLError as error:
        return None, [*builder.problems, builder.syntax_problem(error)]
    except ReaderError as error:
        line, column = _line_and_column(text, error.position)
        character = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
        message = f"the character {character} cannot stand in YAML; remove it"
        return None, [*builder.problems, Problem(places(line, column), "", message)]
    except (OverflowError, ValueError):
        # ruamel.yaml 0.19.1, scanner.py:1424, hands the number of an escape to chr() as it stands.
        message = 'an escape such as "\\U00110000" names no character'
        return None, [*builder.problems, Problem(builder.last_place, "", message)]


def resolve(text: str) -> Scalar:
    """What an unquoted scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _NUMBER.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


class _Stop(Exception):
    """The text cannot be read on; the problem is noted."""


class _Builder:
    """Builds the tree from ruamel's events: its composer does not count what aliases make, nor name every double key."""

    def __init__(self, text: str, places: Places, most_values: int) -> None:
        self.text = text
        self.places = places
        self.most_values = most_values
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}  # None: not complete yet
        self.depth = 0
        self.count = 0
        self.last_place = places(0, 0)
        self.events: Iterator[Event] = YAML(typ="safe", pure=True).parse(text)

    def document(self) -> Node | None:
        """The one document of the text; None if there is none."""
        for event in self.events:
            if isinstance(event, StreamEndEvent):
                return None
            if isinstance(event, DocumentStartEvent):
                break
        root = self.node(next(self.events))
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                self.note(event, "a second document begins here; a plan is one document")
                break
            assert isinstance(event, DocumentEndEvent | StreamEndEvent), event
        return root

    def node(self, event: Event) -> Node:
        """The value that an event begins."""
        self.count += 1
        if self.count > self.most_values:
            self.stop(event, f"the plan holds more than {self.most_values:,} values")
        if isinstance(event, AliasEvent):
            return self.aliased(event)
        assert isinstance(event, NodeEvent), event
        anchor: str | None = event.anchor
        if anchor is not None:
            self.anchors[anchor] = None
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.note(event, f"the tag {quoted(str(tag))} means nothing in a plan; remove it")
        if isinstance(event, ScalarEvent):
            node = self.scalar(event)
        else:
            self.depth += 1
            if self.depth > DEEPEST:
                self.stop(event, f"nested more than {DEEPEST} deep")
            node = self.sequence(event) if isinstance(event, SequenceStartEvent) else self.mapping(event)
            self.depth -= 1
        if node.size > self.most_values:
            self.stop(event, f"with its aliases the plan holds more than {self.most_values:,} values")
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def aliased(self, event: AliasEvent) -> Node:
        name = str(event.anchor)
        if name not in self.anchors:
            self.note(event, f"no anchor '&{name}' stands above this '*{name}'")
        elif (node := self.anchors[name]) is not None:
            return node
        else:
            self.note(event, f"'*{name}' stands inside '&{name}' itself")
        raise _Stop

    def scalar(self, event: ScalarEvent) -> Node:
        text = str(event.value)
        is_plain = event.style is None or event.style == ""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.stop(event, "half of a surrogate pair is no character")
        if "\0" in text:
            self.stop(event, "a zero character cannot stand in a plan")
        return Node(resolve(text) if is_plain else text, self.place(event), text, not is_plain)

    def sequence(self, start: Event) -> Node:
        items: list[Node] = []
        for event in self.events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self.node(event))
        return Node(tuple(items), self.place(start), size=1 + sum(item.size for item in items))

    def mapping(self, start: Event) -> Node:
        entries: dict[str, Entry] = {}
        merged: list[Node] = []
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            if not isinstance(event, ScalarEvent):
                self.stop(event, "the name of a field is a word")
            key, place = str(event.value), self.place(event)
            name = self.scalar(event)  # refuses what cannot stand in a word
            value = self.node(next(self.events))
            if value.value is None and not value.text:
                value = replace(value, place=place)  # nothing is written: the parser is at the next line already
            if key == "<<" and not name.is_quoted:
                merged += value.value if isinstance(value.value, tuple) else (value,)
            elif key in entries:
                self.note(event, f"{quoted(key)} is given twice; the first is at {entries[key].place}")
            else:
                entries[key] = Entry(place, value)
        for node in merged:
            if not isinstance(node.value, Mapping):
                message = f"'<<' takes over the fields of a mapping; this is {node.shown}"
                self.problems.append(Problem(node.place, "", message))
                continue
            for key, entry in node.value.items():
                entries.setdefault(key, entry)
        size = 1 + sum(entry.node.size for entry in entries.values())
        return Node(MappingProxyType(entries), self.place(start), size=size)

    def place(self, event: Event) -> str:
        self.last_place = self.places(event.start_mark.line, event.start_mark.column)
        return self.last_place

    def note(self, event: Event, message: str) -> None:
        self.problems.append(Problem(self.place(event), "", message))

    def stop(self, event: Event, message: str) -> NoReturn:
        """Note a problem after which nothing more is read."""
        self.note(event, message)
        raise _Stop

    def syntax_problem(self, error: MarkedYAMLError) -> Problem:
        """A syntax error in plain words, at the place to look at."""
        mark, opened = error.problem_mark or error.context_mark, error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        lines = self.text.splitlines()
        for number, content in enumerate(lines[: line + 1]):
            if "\t" in (indent := content[: len(content) - len(content.lstrip())]) and content.strip():
                return Problem(self.places(number, indent.index("\t")), "", "a tab; YAML indents with spaces")
        said = str(error.problem or error.context or "this is not YAML")
        at_end = "<stream end>" in said or "end of stream" in said
        if opened is not None and at_end:
            opening = lines[opened.line][opened.column : opened.column + 1]
            if opening in ("[", "{", "'", '"'):
                return Problem(self.places(opened.line, opened.column), "", f"this {opening} is never closed")
        found = repr(lines[line][column]) if line < len(lines) and column < len(lines[line]) else "the end of the line"
        if "could not find expected ':'" in said and opened is not None:
            return Problem(self.places(opened.line, opened.column), "", "a field without ':'")
        for fragment, plain in _PLAIN_WORDS:
            if fragment in said:
                return Problem(self.places(line, column), "", plain.replace("FOUND", found))
        if opened is not None and said.startswith("expected ',' or"):
            said += f"; is the bracket at {self.places(opened.line, opened.column)} closed?"
        return Problem(self.places(line, column), "", f"not YAML: {said}")


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n"), position - (before.rfind("\n") + 1)
