"""YAML text of plain values, laid out as a person would write a plan.

Not ruamel's emitter: 0.19.1 writes U+0085 and U+2028 bare, and reads them back as spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from stages.document import resolve

_BARE = re.compile(r"[A-Za-z_./][\w./-]*( [\w./-]+)*", re.ASCII)
_YAML_1_1 = frozenset({"y", "n", "yes", "no", "on", "off"})  # words that other readers take for true and false
_WIDEST = 120  # characters of a mapping or list in one line
_ESCAPED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def to_text(value: Mapping[str, object]) -> str:
    """The YAML text of a mapping of text, numbers, booleans, None, lists and mappings."""
    return "".join(f"{line}\n" for line in _block(value, ""))


def _block(value: Mapping[str, object], indent: str) -> Iterator[str]:
    for name, inner in value.items():
        start = f"{indent}{_scalar(name)}:"
        if (line := _in_one_line(inner)) is not None and len(start) + len(line) < _WIDEST:
            yield f"{start} {line}"
        elif isinstance(inner, Mapping):
            yield start
            yield from _block(inner, indent + "  ")
        elif isinstance(inner, Sequence) and not isinstance(inner, str):
            yield start
            for item in inner:
                yield from _item(item, indent + "  ")
        else:
            yield f"{start} {_scalar(inner)}"


def _item(item: object, indent: str) -> Iterator[str]:
    if isinstance(item, Mapping) and item:
        first, *rest = _block(item, indent + "  ")
        yield f"{indent}- {first.lstrip()}"
        yield from rest
    else:
        yield f"{indent}- {in_flow(item)}"


def _in_one_line(value: object) -> str | None:
    """A mapping or list without mappings in it, between brackets; else None."""
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inner = list(value)
    else:
        return None
    return None if any(isinstance(each, Mapping) and each for each in inner) else in_flow(value)


def in_flow(value: object) -> str:
    """The YAML text of a value in one line, however long."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(name)}: {in_flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(in_flow(item) for item in value)}]"
    return _scalar(value)


def _scalar(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return repr(value)
        case float():
            digits = repr(value)
            return digits if "." in digits else digits.replace("e", ".0e")  # without the point YAML 1.1 reads a word
        case str():
            is_bare = _BARE.fullmatch(value) and isinstance(resolve(value), str) and value.lower() not in _YAML_1_1
            return value if is_bare else f'"{"".join(map(_escaped, value))}"'
    raise TypeError(f"a plan holds no {type(value).__name__}")


def _escaped(character: str) -> str:
    if character in _ESCAPED:
        return _ESCAPED[character]
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
