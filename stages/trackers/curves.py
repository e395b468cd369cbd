"""Curves: what a tracker owes, and what it is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.points import Point, Rows


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with."""

    folder: Path
    """The run's."""
    project: str
    settings: Mapping[str, Any]
    """The resolved plan."""
    plan_text: str
    """The same as YAML."""
    online: bool
    """Whether it may send what it is given."""
    known: Mapping[str, str]
    """The `notes` of a former launch; empty at the first."""


class Curves(Protocol):
    """An open tracker, which holds a run's points in their order."""

    @property
    def notes(self) -> Mapping[str, str]:
        """Under which name the run goes there, for the next launch."""

    def held(self) -> int:
        """How many points it has from former launches."""

    def cut(self, number: int) -> None:
        """Go on after so many points, which are fewer than it has."""

    def add(self, point: Point) -> None:
        """Take the next point."""

    def close(self) -> None:
        """Write what is left."""


def markdown(table: Rows) -> str:
    """A table in Markdown."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
