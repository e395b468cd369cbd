"""The report's plan: as the run resolved it, with what stands there by default in grey; and the environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby

from pydantic import BaseModel

from stages.plan import Plan, Source, Stage
from stages.report.page import count, folded, section
from stages.report.record import Record
from stages.report.values import Event, mapping

MOST_TEXT = 60_000
"""Characters of the plan and of the environment that are shown."""


def plan(record: Record) -> str:
    """Both texts, folded away."""
    parts = []
    if record.plan_text:
        note = '<p class="note">Every field that took part is written out. Grey lines are defaults.</p>'
        parts.append(folded("plan.yaml", f"{note}<pre>{_marked(record)}{_rest(record.plan_text, 'plan.yaml')}</pre>"))
    if record.environment_text:
        content = record.environment_text
        parts.append(folded("environment.json", f"<pre>{escape(content[:MOST_TEXT])}{_rest(content, 'environment.json')}</pre>"))
    return section("plan", "Plan and environment", "", "".join(parts)) if parts else ""


def _rest(content: str, name: str) -> str:
    left = len(content) - MOST_TEXT
    return f"\n... ({count(left)} more characters in {name})" if left > 0 else ""


def _marked(record: Record) -> str:
    """The plan as HTML, lines that hold a default in grey."""
    groups = groupby(_with_defaults(record.plan_text[:MOST_TEXT].split("\n"), record.plan), key=lambda line: line[1])
    texts = [("\n".join(line for line, _ in group), is_default) for is_default, group in groups]
    return "\n".join(f'<span class="soft">{escape(lines)}</span>' if is_default else escape(lines) for lines, is_default in texts)


def _with_defaults(lines: list[str], plan: Event) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is a field of the plan, of a source or of a stage that has its default. plan: what the lines hold."""
    of_plan, of_source, of_stage = _defaults(Plan), _defaults(Source), _defaults(Stage)
    listed = plan.get("stages")
    stages = [mapping(stage) for stage in listed] if isinstance(listed, list) else []
    part, held, defaults, number = "", plan, of_plan, 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        name = line.strip().split(":")[0].strip('"')
        if indent == 0:
            part, held, defaults = name, plan, of_plan
        elif part == "sources" and indent == 2:
            held, defaults = mapping(mapping(plan.get("sources")).get(name)), of_source
        elif part == "stages" and line.startswith("  - "):
            held, defaults = stages[number] if number < len(stages) else {}, of_stage
            number += 1
        is_field = indent == (0 if defaults is of_plan else 4)
        yield line, is_field and name in held and name in defaults and _is_default(held[name], defaults[name])


def _is_default(value: object, default: object) -> bool:
    """Whether a value is the default. Fields that a plan does not heed are not written out, so a mapping may hold fewer than its default."""
    if isinstance(value, Mapping) and isinstance(default, Mapping) and bool(value) is bool(default):
        return all(key in default and _is_default(inner, default[key]) for key, inner in value.items())
    return value == default


def _defaults(kind: type[BaseModel]) -> dict[str, object]:
    """The defaults of a type's fields, as YAML holds them."""
    found = {name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items() if not field.is_required()}
    return {name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value for name, value in found.items()}
