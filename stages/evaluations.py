"""Evaluations as they lie in a run folder, row by row. Imports no torch.

`evaluations/` keeps of every stage its first evaluation (`2-expose-start.json`) and those after so many steps (`2-expose-step-000200.json`), each with
the loss of every held-out row; of a long stage not of every evaluation, see `thin_out`. Rows have the same noise and noise level in every evaluation of one seed, so losses of the same row may be subtracted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MOST_BETWEEN = 100
"""Of how many evaluations inside a stage, those at its start and end not counted, the rows are kept, beside the newest one."""

RowValues = Mapping[str, Mapping[str, float]]
"""Source to held-out row to a number."""


@dataclass(frozen=True)
class Rows:
    """One evaluation, row by row."""

    losses: RowValues
    t: RowValues
    """The noise level of each row."""
    version: str
    """Of the way that rows are measured."""


def rows_file(folder: Path, index: int, stage: str, step: int | None) -> Path:
    """Where the rows of an evaluation lie. index: of the stage, from 0. step: steps of the stage made; None for its start."""
    return folder / "evaluations" / (f"{index + 1}-{stage}-start.json" if step is None else f"{index + 1}-{stage}-step-{step:06d}.json")


def thin_out(folder: Path, index: int, stage: str, steps: int, every: int) -> None:
    """Take away rows of evaluations inside a stage where there are more than MOST_BETWEEN: of every second one, then of every fourth, and so on.

    steps: made so far, which is where the newest one stands. every: steps between evaluations. What stays follows from these two alone, so two runs of one plan keep the same
    ones, and of two that stand apart the shorter one has all of the longer one's that it has come to. All of them stand in metrics.jsonl.
    """
    apart = every
    while steps // apart > MOST_BETWEEN:
        apart *= 2
    if apart > every:
        for file in rows_file(folder, index, stage, steps).parent.glob(f"{index + 1}-{stage}-step-*.json"):
            step = file.stem.rpartition("-")[2]
            if step.isdigit() and int(step) < steps and int(step) % apart:
                file.unlink(missing_ok=True)


def read_rows(file: Path) -> Rows | None:
    """What `Measured.save` wrote; None if there is no such file, or it is none of ours."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return Rows(_values(saved["losses"]), _values(saved["t"]), str(saved["version"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _values(saved: RowValues) -> dict[str, dict[str, float]]:
    return {source: {row: float(value) for row, value in rows.items()} for source, rows in saved.items()}


def paired_rows(first: Rows, second: Rows, source: str) -> list[tuple[float, float]]:
    """The losses of the rows of a source that two evaluations both measured, at the same noise level."""
    before, after = first.t.get(source, {}), second.t.get(source, {})
    losses = second.losses.get(source, {})
    return [(loss, losses[row]) for row, loss in first.losses.get(source, {}).items() if row in losses and before.get(row) == after.get(row)]
