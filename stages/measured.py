"""Measured: the held-out losses of one evaluation, row by row, and what they sum up to. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.checked import DamagedError, checked, ignore, read_checked
from stages.checkpoint import write_whole

VERSION = "2"
"""Of the way that rows are measured. Losses of another version are of other noise levels, and nothing is paired with them."""

TENTHS = 10

Rows = Mapping[str, Mapping[str, float]]
"""Source to row key to a number."""


@dataclass(frozen=True)
class Measured:
    """One evaluation."""

    losses: Rows
    t: Rows
    """The noise level of each row, in (0, 1)."""
    asked: Mapping[str, int] = field(default_factory=dict)
    """How many rows of each source were to be measured, those that cannot be read among them."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(exist_ok=True)
        write_whole(path, checked({"version": VERSION, **asdict(self)}))

    @staticmethod
    def load(path: Path, say: Callable[[str], object] = ignore) -> Measured | None:
        """Read what `save` wrote; None where there is no such file, where another version measured otherwise, and where it is damaged, which is said through `say`."""
        try:
            saved = read_checked(path)
        except DamagedError as error:
            say(str(error))
            return None
        if saved is None or saved.get("version") != VERSION:
            return None
        if not all(isinstance(saved.get(name), dict) for name in ("losses", "t", "asked")):
            say(f"{path} holds no evaluation")
            return None
        return Measured(saved["losses"], saved["t"], saved["asked"])

    def summary(self, base: Measured | None, start: Measured | None) -> dict[str, dict[str, Any]]:
        """Per source that has any: loss and rows; the same by tenth of t, [0, 0.1), ..., None where a tenth has no row; and the change since the base, and since the stage's start,
        as a whole and by tenth, each with its standard error, over the rows that both have at the same t. A change needs two rows."""
        table: dict[str, dict[str, Any]] = {}
        for source, losses in self.losses.items():
            if not losses:
                continue
            at = self.t[source]
            by_tenth = _by_tenth(losses, at)
            entry: dict[str, Any] = {"loss": mean(list(losses.values())), "rows": len(losses)}
            entry["by_timestep"] = [mean(tenth) if tenth else None for tenth in by_tenth]
            entry["by_timestep_rows"] = [len(tenth) for tenth in by_tenth]
            for name, other in (("since_base", base), ("since_start", start)):
                if other is None:
                    continue
                changes = self._changes(source, other)
                if len(changes) > 1:
                    entry[name], entry[f"{name}_error"] = mean(list(changes.values())), standard_error(list(changes.values()))
                    changed = [(mean(tenth), standard_error(tenth)) if len(tenth) > 1 else (None, None) for tenth in _by_tenth(changes, at)]
                    entry[f"{name}_by_timestep"], entry[f"{name}_by_timestep_error"] = (list(column) for column in zip(*changed, strict=True))
            table[source] = entry
        return table

    def _changes(self, source: str, other: Measured) -> dict[str, float]:
        """How the rows of a source have changed since another evaluation: those that were measured at the same noise level."""
        at, before, before_at = self.t[source], other.losses.get(source, {}), other.t.get(source, {})
        return {row: loss - before[row] for row, loss in self.losses[source].items() if row in before and before_at[row] == at[row]}


def _by_tenth(values: Mapping[str, float], t: Mapping[str, float]) -> list[list[float]]:
    """Values of rows by the tenth that the row's t falls into."""
    tenths: list[list[float]] = [[] for _ in range(TENTHS)]
    for row, value in values.items():
        tenths[min(int(t[row] * TENTHS), TENTHS - 1)].append(value)
    return tenths


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of at least two numbers."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))
