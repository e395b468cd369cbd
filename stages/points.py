"""Points: what a tracker is given of a line of metrics.jsonl. A curve is a copy of that file, so a tracker can be brought to what it holds at any time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.log_files import log_events

Cell = str | float | int | None

_OF_STEP = ("loss", "lr", "grad_norm", "images_per_second", "tokens_per_second", "data_wait", "loss_scale", "skipped", "step_size", "memory_bytes")
_OF_ACCURACY = ("accuracy", "judge_on_real", "shuffled_captions", "untrained")


@dataclass(frozen=True)
class Rows:
    """A table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Picture:
    """An image file of the run folder."""

    file: str
    caption: str


@dataclass(frozen=True)
class Point:
    """What belongs to one place of the curves."""

    step: int
    """Counted over all stages."""
    stage: int
    """From 1; 0 before the first."""
    name: str
    """Of the stage; empty before the first."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Rows] = field(default_factory=dict)
    pictures: Mapping[str, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class Stages:
    """Where a plan's stages begin. steps: of each, by its name, in order."""

    steps: Mapping[str, int]

    def place(self, stage: str) -> tuple[int, int]:
        """A stage's number, from 1, and the steps of all before it; zeros for a name that is not in the plan, such as the empty one."""
        before = 0
        for number, (name, steps) in enumerate(self.steps.items(), 1):
            if name == stage:
                return number, before
            before += steps
        return 0, 0


def point(event: Mapping[str, Any], stages: Stages) -> Point | None:
    """What a line of metrics.jsonl brings to the curves, or None."""
    kind = event["event"]
    if kind not in _OF_EVENT:
        return None
    number, before = stages.place(event["stage"])
    numbers, tables, pictures = _OF_EVENT[kind](event)
    finite = {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}
    return Point(before + event["step"], number, event["stage"], finite, tables, pictures)


_Found = tuple[Mapping[str, float | None], Mapping[str, Rows], Mapping[str, Picture]]


def _step(event: Mapping[str, Any]) -> _Found:
    drawn, losses = event["drawn"], event["losses"]
    total = sum(drawn.values())
    of_sources = {f"loss/{name}": loss for name, loss in losses.items()} | {f"drawn/{name}": count / total for name, count in drawn.items() if total}
    return {**{name: event.get(name) for name in _OF_STEP}, **of_sources}, {}, {}


def _held_out(event: Mapping[str, Any]) -> _Found:
    sources = event["sources"]
    columns = ("loss", "since_base", "since_base_error", "since_start", "since_start_error")
    numbers = {f"held_out/{name}": entry["loss"] for name, entry in sources.items()}
    numbers |= {f"held_out_since_base/{name}": entry["since_base"] for name, entry in sources.items() if "since_base" in entry}
    table = Rows(("source", *columns), tuple((name, *(entry.get(column) for column in columns)) for name, entry in sources.items()))
    return numbers, {"held_out": table} if sources else {}, {}


def _ledger(event: Mapping[str, Any]) -> _Found:
    columns = ("asked", "drawn", "images", "tokens", "epochs", "unique_rows")
    rows = tuple((name, *(entry.get(column) for column in columns)) for name, entry in event["sources"].items())
    return {}, {"ledger": Rows(("source", *columns), rows)}, {}


def _quality(event: Mapping[str, Any]) -> _Found:
    measured = [(source, metric, found) for source, metrics in event["sources"].items() for metric, found in metrics.items()]
    columns = ("mean", "error", "rows", "ceiling", "floor", "since_base", "since_base_error")
    table = Rows(("source", "metric", *columns), tuple((source, metric, *(found.get(column) for column in columns)) for source, metric, found in measured))
    return {f"{metric}/{source}": found.get("mean") for source, metric, found in measured}, {"quality": table} if measured else {}, {}


def _preview(event: Mapping[str, Any]) -> _Found:
    rows = {f"previews/{row['source']}-{row['row']}": Picture(row["output"], row["prompt"]) for row in event.get("rows", ())}
    return {}, {}, {"previews": Picture(event["file"], f"after {event['stage']}"), **rows}


_OF_EVENT: Mapping[str, Callable[[Mapping[str, Any]], _Found]] = {
    "step": _step,
    "eval": _held_out,
    "ledger": _ledger,
    "quality": _quality,
    "preview": _preview,
    "accuracy": lambda event: ({f"accuracy/{name}": event.get(name) for name in _OF_ACCURACY}, {}, {}),
    "shares": lambda event: ({f"asked/{name}": share for name, share in event["shares"].items()}, {}, {}),
}


def points(folder: Path, stages: Stages) -> Iterator[Point]:
    """Those of the whole metrics.jsonl of a run folder, in order; a torn last line is none."""
    for event in log_events(folder, "metrics"):
        if found := point(event, stages):
            yield found
