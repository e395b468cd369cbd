"""In what two plans differ, field by field. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages.plan import Plan
from stages.reader import resolved
from stages.yaml_text import in_flow

_ABSENT = object()


@dataclass(frozen=True)
class PlanChange:
    """A field in which two plans differ."""

    field: str
    """`stages.refine.lr`; stages are called by their names."""
    before: str
    """As YAML; the empty string where a plan has no such field."""
    after: str


def plan_changes(before: Plan, after: Plan) -> list[PlanChange]:
    """Every field in which two plans differ, their defaults written out. The plans' own names are left out."""
    return list(differences(_by_name(before), _by_name(after)))


def differences(before: Mapping[str, Any], after: Mapping[str, Any], above: str = "") -> Iterator[PlanChange]:
    """Every field in which two mappings differ, in the order of the first. above: what stands in front of the fields' names."""
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        field = f"{above}.{name}" if above else str(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, field)
        elif old != new:
            yield PlanChange(field, _said(old), _said(new))


def _said(value: object) -> str:
    return "" if value is _ABSENT else value if isinstance(value, str) else in_flow(value)


def _by_name(plan: Plan) -> dict[str, Any]:
    """A plan with its stages by name, and their order beside."""
    written = resolved(plan)
    del written["name"]
    stages = {stage.pop("name"): stage for stage in written.pop("stages")}
    return {**written, "stages": stages, "order of the stages": list(stages)}
