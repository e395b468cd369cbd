"""One side of a comparison: a run folder at one of its evaluations, with what it took to get there. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.evaluations import Rows, read_rows, rows_file
from stages.plan import Plan
from stages.problems import PlanError
from stages.reader import read_plan
from stages.report.page import count
from stages.report.paired import images_at
from stages.report.record import Evaluation, Record, read_record
from stages.report.values import Event, finite, mapping, text


@dataclass(frozen=True)
class OpenedRun:
    """A run folder as a comparison reads it."""

    folder: Path
    record: Record
    plan: Plan
    """The plan that it was carried out by, every default written out."""
    environment: Event

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def fingerprint(self) -> str:
        """What the model is told apart by; its name where a run has not written it."""
        return text(self.record.run.get("fingerprint")) or (self.plan.model if isinstance(self.plan.model, str) else self.plan.model.repo)

    def rows_fingerprint(self, source: str) -> str:
        """What the rows of a source are told apart by; empty where a run has not written it."""
        return text(mapping(self.record.run.get("rows")).get(source))

    @property
    def evaluations(self) -> list[Evaluation]:
        """What was measured after some training, in the order of the plan's stages."""
        stages = [stage for stage in self.record.stages if stage.name in self.stage_names]
        return [evaluation for stage in stages for evaluation in stage.evaluations if evaluation.step > 0 and evaluation.sources]

    @property
    def stage_names(self) -> list[str]:
        """The plan's stages."""
        return [stage.name for stage in self.plan.stages]


@dataclass(frozen=True)
class Cost:
    """What a run took until an evaluation. None is not known."""

    images: Mapping[str, float]
    """Of each source."""
    seconds: float | None
    """In its stages, all that belongs to them among it."""
    images_per_second: float | None
    """While it trained."""
    peak_bytes: float | None
    """The most memory that a stage took."""


@dataclass(frozen=True)
class Side:
    """A run at one of its evaluations."""

    run: OpenedRun
    evaluation: Evaluation
    rows: Rows
    cost: Cost

    @property
    def where(self) -> str:
        """`the end of stage 'refine' (step 500)`."""
        place = "the end" if self.evaluation.kind == "end" else "a part"
        return f"{place} of stage '{self.evaluation.stage}' (step {count(self.evaluation.step)})"


def open_side(folder: Path) -> OpenedRun:
    """Read a run folder. Raises PlanError if it is none, or if its plan cannot be read any more."""
    if not folder.is_dir():
        raise PlanError.at(str(folder), "no such folder; name the folder of a run, such as runs/quickstart")
    if not (folder / "plan.yaml").is_file():
        raise PlanError.at(str(folder), "this is no run's folder, for no plan.yaml lies in it; name the folder of a run, such as runs/quickstart")
    opened = OpenedRun(folder, read_record(folder), read_plan(folder / "plan.yaml", written_out=True).plan, _environment(folder))
    if not opened.evaluations:
        cure = "with `evaluate: {rows: 0}` nothing is held out" if opened.plan.evaluate.rows == 0 else "let it come to the end of a stage, or set `evaluate: {every: N}`"
        raise PlanError.at(str(folder), f"nothing was measured in this run after its first step; {cure}")
    return opened


def side_file(run: OpenedRun, evaluation: Evaluation) -> Path:
    """Where the losses of the rows of one of its evaluations lie, if they are kept."""
    return rows_file(run.folder, run.stage_names.index(evaluation.stage), evaluation.stage, evaluation.step)


def side_at(run: OpenedRun, evaluation: Evaluation) -> Side:
    """A run at one of its evaluations. Raises PlanError if the losses of its rows are not there, or are another evaluation's."""
    file = side_file(run, evaluation)
    rows = read_rows(file)
    if rows is None:
        raise PlanError.at(str(file), "the losses of held-out rows are not there, or cannot be read; a run of a version that did not keep them has to be carried out anew")
    for source, measured in evaluation.sources.items():
        losses = rows.losses.get(source, {})
        if not losses or not math.isclose(math.fsum(losses.values()) / len(losses), measured.loss, rel_tol=1e-6, abs_tol=1e-12):
            raise PlanError.at(str(file), f"its rows of source '{source}' are not those of metrics.jsonl; the stage was begun anew since, and has not come to step {evaluation.step} again")
    return Side(run, evaluation, rows, _cost(run.record, evaluation))


def _environment(folder: Path) -> Event:
    try:
        return mapping(json.loads((folder / "environment.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _cost(record: Record, evaluation: Evaluation) -> Cost:
    """What was spent in the stages until an evaluation."""
    images: dict[str, float] = {}
    trained, spent, seconds = 0.0, 0.0, 0.0
    known = True
    last = next(number for number, stage in enumerate(record.stages) if stage.name == evaluation.stage)
    for number, stage in enumerate(record.stages[: last + 1]):
        until = evaluation.step if number == last else stage.reached
        for source, drawn in images_at(stage, until).items():
            images[source] = images.get(source, 0.0) + drawn
        steps = [step for step in stage.steps if step.step <= until]
        before = 0.0
        for step in steps:
            drawn = sum(step.drawn.values())
            if step.images_per_second:
                trained, spent = trained + drawn - before, spent + (drawn - before) / step.images_per_second
            before = drawn
        known = known and stage.seconds is not None and until == stage.reached
        seconds += stage.seconds or 0.0
    names = {stage.name for stage in record.stages[: last + 1]}
    peaks = [peak for event in record.events.get("memory", ()) if text(event.get("stage")) in names and (peak := finite(event.get("peak_bytes"))) is not None]
    return Cost(images, seconds if known else None, trained / spent if spent else None, max(peaks, default=None))
