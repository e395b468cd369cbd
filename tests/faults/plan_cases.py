"""Cases of plans: what a number makes of the plan language's own schema and of every shipped plan, broken in every way that comes to mind.

A case follows from its number alone, so that one which fails can be made again. The strategies walk the JSON schema that pydantic makes of `stages.plan.Plan`:
a field that is added to the language is in the cases on the same day.
"""

from __future__ import annotations

import json
import random as randomness
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from faults.plan_tricks import TRICKS
from stages.document import parse
from stages.plan import Plan
from stages.problems import Problem
from stages.shape import Rules, Schema
from stages.yaml_text import to_text

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = tuple(sorted((ROOT / "plans").glob("*.yaml")))

NAMES = ("photos", "edits", "first", "second")
WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "path": ("data/photos", "data/photos", "data/edits.jsonl", "data/rows.parquet", "hub/someone/rows", "data/*.parquet"),
        "repo": ("model", "someone/model", "black-forest-labs/FLUX.1-dev"),
        "model": ("model", "someone/model", "black-forest-labs/FLUX.1-dev"),
        "where": ("width >= 8", 'prompt contains "red"', "pixels < 1e9 and aspect < 2"),
        "folder": ("cache", "data"),
        "start": ("data/photos",),
        "labelled": ("data/judge",),
        "source": NAMES,
        "column": ("text", "image", "style"),
        "reference": ("source",),
        "prompt": ("text", "a square"),
    }
)
"""What makes sense where text is asked for, by the field's name; elsewhere a name, a pattern or a sentence."""
TEXTS = (*NAMES, "a red square", r"transformer_blocks\.\d+\.attn\..*", ".*", "photos:.*")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -0.0, -1, 1, 2, 1.5, 10**9, 10**9 + 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e30, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan")),
    *("", " ", ".", "..", "/", "~", "../../x", "no", "1e-4", "0o17", "0x1F", "12:30:45", "2026-11-29", "<<", "*", "&a", "!!int 3", "[/]", "[red]", "{0..3}", "{,}" * 30, "\n", "\t", "\r\n"),
    *("é", "日本語", "\U0001f600", "\u202e", "\u0085", "\u2028", "a\u0301", "\x1b[31m", "a" * 65, "x" * 3_000, "(" * 500, "(a+)+$", "[", "*a", "\\", "<img src=x onerror=alert(1)>", "natural", "none", "auto", "full", "adapter"),
    *("\x1b]0;x\x07", "\r", "\x9b31m", "[/bold]", "\uff11\uff10", "\u0661", "steps\u200b", "NaN", "-inf", "010", "0b11", "true", "'10'", "2026-11-30 10:00:00", "\u00a0", "hf_" + "a" * 34, "https://user:token@host/x"),
    *([], {}, [None], [[]], [{}], {"": None}, {"from": 1, "to": 2}, {"power": 1}, {"photos": 1e308, "edits": 1e308}, {"photos": 5e-324, "edits": 1e308}),
)
RAW = (
    *("1e30", "1e999", "-0", "-0.0", ".inf", "-.inf", ".nan", ".NaN", "0x" + "F" * 60, "0o777", "0b101", "1_000", "1__0", "9" * 99, "9" * 101, "012", "12:30:45", "2026-11-29T12:00:00Z", "~", "", "null", "yes"),
    *("010", "+1", "1e", "0x", "0b", "!!float 1", "!!str 1", "!!int '1'", "!!null ''", "!!bool 1", "!!python/name:os.system", "!!python/object/new:os.system [touch canary]", "{<<: [{steps: 1}, {steps: 2}]}", "&a {<<: *a}", "{a: &a 1, b: *a}", "{'a': 1, a: 2}"),
    *('"\\e]0;x\\a"', '"\\x9b"', '"\\u202e"', "\u202ea", "\uff11", "a\u200bb", "\ufffea", "'a\\nb'", "a\u2028b"),
    *("*nowhere", "&here *here", "&a [*a]", "!!python/object:os.system x", "!!python/object/apply:os.system [touch canary]", "!!binary aGk=", "!!set {a}", "!<tag:yaml.org,2002:int> 3", "!local x"),
    *("{<<: *nowhere}", "{<<: [1, 2]}", "{<<: {steps: 3}, steps: 4}", "{a: 1, a: 2}", "{? [a]: b}", "{[a]: b}", "[", "]", "{", "}", "'", '"', "|", ">", "|9", ">-", "%", "@a", "`a", "#", "? a", "- a", "--- a", "...", "\\"),
    *('"\\x00"', '"\\uD800"', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\z"', '"\\0"', "a: b: c", "\ta", "\u00a0a", "\ufeffa", "'" + "''" * 999 + "'", "[" * 60 + "]" * 60, "{a: " * 60 + "1" + "}" * 60, "[" * 20_000, "- " * 3_000, "? " * 2_000),
)
"""What is written in the place of a value, as it stands."""


@dataclass(frozen=True)
class Case:
    """A plan file, and what is set on the command line."""

    name: str
    content: bytes
    settings: tuple[str, ...] = ()


_USUAL = ("path", "images")  # without one of which a source, and a batch, is nothing
RULES = Rules(Plan.model_json_schema())


@dataclass(frozen=True)
class Drawing:
    """Values by the schema. random: a source of numbers; the same one gives the same values."""

    random: randomness.Random
    odd: float
    """How often another value stands than the schema asks for."""
    optional: float
    """How often a field that may be left out is given."""

    def plan(self) -> dict[str, Any]:
        """A plan."""
        made: dict[str, Any] = self.value(RULES.schema, "")
        return made

    def value(self, schema: Schema, field: str) -> Any:
        """A value that a schema describes, or now and then another."""
        if self.random.random() < self.odd:
            return self.random.choice(ODD)
        way = self.random.choice(RULES.ways(schema))
        if "const" in way:
            return way["const"]
        if "enum" in way:
            return self.random.choice(way["enum"])
        match way.get("type"):
            case "integer" | "number" as kind:
                return self.number(way, whole=kind == "integer")
            case "string":
                return self.text(way, field)
            case "boolean":
                return self.random.random() < 0.5
            case "null":
                return None
            case "array":
                return self.items(way, field)
        return self.mapping(way)

    def number(self, way: Schema, *, whole: bool) -> int | float:
        """One of its limits, or one between."""
        least = way.get("minimum", way.get("exclusiveMinimum", -1))
        most = way.get("maximum", way.get("exclusiveMaximum", 1e300))
        near: list[int | float] = [least, most, least + 1, 8, 16, 100]
        if not whole:
            near += [least + (most - least) * 0.5, 0.1, 0.5, 1.0, 1e-4]
        kept = [number for number in near if least <= number <= most] if self.random.random() < 0.97 else near
        number = self.random.choice(kept if self.random.random() < 0.3 else kept[2:] or kept)
        return int(number) if whole else float(number)

    def text(self, way: Schema, field: str) -> str:
        """A word that fits the field."""
        if way.get("pattern", "").startswith("^[0-9]+"):
            return self.random.choice(("200GB", "1 MiB", "0.5TB"))
        return self.random.choice(NAMES if "pattern" in way else WORDS.get(field, TEXTS))

    def items(self, way: Schema, field: str) -> list[Any]:
        """A list."""
        if "prefixItems" in way:
            return [self.value(inner, field) for inner in way["prefixItems"]]
        least = way.get("minItems", 0)
        return [self.value(way["items"], field) for _ in range(self.random.randint(least, min(way.get("maxItems", 3), least + 2)))]

    def mapping(self, way: Schema) -> dict[str, Any]:
        """A mapping."""
        if "properties" in way:
            needed = way.get("required", ())
            return {name: self.value(inner, name) for name, inner in way["properties"].items() if name in needed or self.random.random() < (0.9 if name in _USUAL else self.optional)}
        inner = way.get("additionalProperties") or next(iter(way["patternProperties"].values()))
        words = way.get("propertyNames", {}).get("enum", NAMES)
        number = self.random.randint(way.get("minProperties", 0), 3)
        return {name: self.value(inner, name) for name in self.random.sample(list(words), min(number, len(words)))}


def _from_schema(random: randomness.Random) -> str:
    drawing = Drawing(random, odd=random.choice((0.0, 0.0, 0.01, 0.1)), optional=random.choice((0.02, 0.1, 0.5)))
    plan = drawing.plan()
    return to_text(plan) if isinstance(plan, dict) and random.random() < 0.7 else json.dumps(plan)


_NEEDED: Mapping[str, Any] = MappingProxyType({"steps": 7, "lr": 1e-4, "batch": 4, "resolution": 16, "path": "data/photos", "model": "model", "repo": "model"})


def mended(number: int, problems_of: Callable[[bytes], Sequence[Problem]]) -> Case | None:
    """A plan with many fields that is sound: made from the schema, and then what is complained of is taken out, or given as it must be. None if that does not come to an end.

    problems_of: what is wrong with a plan's file.
    """
    random = randomness.Random(number)
    plan = Drawing(random, odd=0, optional=random.choice((0.05, 0.1, 0.2))).plan()
    for stage, name in zip(plan["stages"], NAMES, strict=False):
        stage["name"] = name
    for _ in range(15):
        content = to_text(plan).encode()
        problems = problems_of(content)
        if not problems:
            return Case("sound, made from the schema", content)
        for problem in reversed(problems):  # the last items of lists first, so that the others keep their numbers
            location = [int(step[1:-1]) if step[0] == "[" else step for step in re.findall(r"[^.\[\]]+|\[\d+\]", problem.where)]
            if missing := re.match(r"field '(\w+)' is missing", problem.message):
                location.append(missing[1])
            _mend(plan, location)
    return None


def _mend(plan: Any, location: Sequence[Any]) -> None:
    """Give a value as it must be, or take it out."""
    *above, last = location or ["sources"]
    holder = plan
    for step in above:
        known = step in holder if isinstance(holder, dict) else isinstance(holder, list) and isinstance(step, int) and step < len(holder)
        if not known:
            return
        holder = holder[step]
    if isinstance(holder, dict) and last in _NEEDED and holder.get(last) != _NEEDED[last]:
        holder[last] = _NEEDED[last]
    elif isinstance(holder, dict):
        holder.pop(last, None)
    elif isinstance(holder, list) and isinstance(last, int) and last < len(holder):
        del holder[last]


def _changed_lines(random: randomness.Random, text: str) -> str:
    """Lines deleted, doubled, swapped, moved in; values and characters put in the place of others."""
    lines = text.split("\n")
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines))
        match random.randrange(8):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(at, lines[random.randrange(len(lines))])
            case 2:
                other = random.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = random.choice((" ", "  ", "\t", "- ")) + lines[at]
            case 4:
                place = random.randint(0, len(lines[at]))
                lines[at] = lines[at][:place] + random.choice("\0\x01\t\r\x85\u2028\ufeff:{}[]&*!|>'\"%@`#,?-\\\u00e9\U0001f600") + lines[at][place:]
            case 5:
                lines[at] = lines[at].rstrip()[: random.randint(0, len(lines[at]))]
            case _:
                lines[at] = re.sub(r"(?<=: )[^,{}\[\]]+|(?<=\[)[^,\]]+", lambda found: random.choice((random.choice(RAW), found.group())), lines[at])
    return "\n".join(lines)


def _places(value: Any, location: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield location
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*location, step))


def _changed_tree(random: randomness.Random, text: str) -> str:
    """Values deleted, doubled, retyped, swapped; fields renamed and put elsewhere."""
    root, _ = parse(text, lambda line, column: "")
    assert root is not None
    tree: Any = root.plain
    for _ in range(random.randint(1, 4)):
        places = [location for location in _places(tree) if location]
        if not places:
            break
        *above, last = random.choice(places)
        holder = tree
        for step in above:
            holder = holder[step]
        value = holder[last]
        match random.randrange(8):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, list):
                holder[last:last] = [value] * random.choice((1, 2, 2_000))
            case 2 if isinstance(holder, dict):
                holder[random.choice((f"{last}s", last[:-1] or "x", last.upper(), *NAMES, "é" * 70))] = holder.pop(last)
            case 3:
                *far, name = random.choice(places)
                other = tree
                for step in far:
                    other = other[step]
                if isinstance(other, dict):
                    other[name] = json.loads(json.dumps(value))
            case 4:
                holder[last] = random.choice(([value], {"x": value}, str(value), [value, value], {str(last): value}))
            case 5 if isinstance(value, int | float):
                holder[last] = random.choice((-value, value * 10**9, value / 3, value + 0.5, 10**30, str(value)))
            case _:
                holder[last] = random.choice(ODD)
    return to_text(tree) if random.random() < 0.5 else json.dumps(tree, ensure_ascii=False)


def _encoded(random: randomness.Random, text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.9:
        return content
    place = random.randint(0, len(content))
    return random.choice(
        (
            b"\xef\xbb\xbf" + content,
            content.replace(b"\n", b"\r\n"),
            content.replace(b"\n", b"\r"),
            text.encode("utf-16", "surrogatepass"),
            text.encode("latin-1", "replace"),
            content[:place],
            content[:place] + random.choice((b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1a")) + content[place:],
            content + b"\n---\n" + content,
            content + b"\n...\nmore: 1\n",
        )
    )


_PATHS = ("seed", "steps", "stages", "stages.0", "stages[0].steps", "stages.first.lr", "stages.0.lr.peak", "stages.0.mix", "stages[99999999999]", "sources", "sources.photos.path", "sources.photos.take.count")
_PATHS += ("model", "model.repo", "name", "adapter.rank", "adapters", "evaluate.rows", "cache", "", ".", "..", "a" * 300, "stages.-1.steps", "é.ü", "stages.0.stages.0.stages", "\udcff", "<<", "stages." * 2_000 + "x")


def _settings(random: randomness.Random) -> tuple[str, ...]:
    if random.random() < 0.7:
        return ()
    values = (*RAW, *(json.dumps(value) for value in ODD), "3", "x=y", "\udcff")
    return tuple(random.choice(_PATHS) + random.choice(("=", "=", "=", "==", "", " = ")) + random.choice(values) for _ in range(random.randint(1, 3)))


def case(number: int) -> Case:
    """The case of a number from 0 on: the tricks first, then others without end."""
    if number < len(TRICKS):
        name, make = TRICKS[number]
        return Case(name, make())
    random = randomness.Random(number)
    if number % 3 == 0:
        return Case("made from the schema", _encoded(random, _from_schema(random)), _settings(random))
    plan = random.choice(SHIPPED)
    text, change = plan.read_text(), random.choice((_changed_lines, _changed_tree))
    return Case(f"{plan.name}, {'lines' if change is _changed_lines else 'values'} changed", _encoded(random, change(random, text)), _settings(random))
