"""What a run folder says, read into plain types for the report. Tolerant: what is missing, torn or of another type is left out.

Nothing here imports torch. The words of metrics.jsonl and ledger.json are those that `train.py` writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.log_files import log_bytes, log_lines
from stages.report.tally import Tally, levels, read_pages, selections, tallies
from stages.report.values import Event, finite, mapping, number, numbers, text, whole

LONG_FILE = 8 * 2**20
"""Bytes of metrics.jsonl, of all its parts, that are read line by line. Of more only every second, third ... line of a step is read."""
LONG_PLAN = 200_000
"""Characters of a plan up to which it is read; a longer one is only shown."""
_STEP_LINE = re.compile(rb'\{"event": ?"step"')
_KINDS = {"base": 0, "start": 1, "during": 2, "end": 3}


@dataclass(frozen=True)
class Step:
    """One logged optimizer step. Rates and losses that were not finite are nan."""

    step: int
    loss: float | None
    lr: float | None
    grad_norm: float | None
    images_per_second: float | None
    tokens_per_second: float | None
    data_wait: float | None
    memory_bytes: float | None
    multiplied_in: str
    losses: Mapping[str, float]
    drawn: Mapping[str, float]


@dataclass(frozen=True)
class Change:
    """A paired difference of held-out losses and its standard error."""

    value: float
    error: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the loss moved by more than three standard errors, else the empty string."""
        if not abs(self.value) > 3 * self.error:
            return ""
        return "better" if self.value < 0 else "worse"


@dataclass(frozen=True)
class Measured:
    """The held-out loss of one source at one evaluation."""

    loss: float
    rows: int | None
    by_timestep: tuple[float, ...]
    """By noise level, nan where no row lies: by tenth of t where `by_timestep_rows` counts them, else, in runs of former versions, by eighth of the probability of t."""
    by_timestep_rows: tuple[int, ...]
    by_timestep_error: tuple[float, ...]
    """Standard errors of the changes since the base, or else since the stage's start; nan where there is none."""
    since_base: Change | None
    since_start: Change | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of every source. `raw` holds the raw weights' losses where the moving average was measured beside them."""

    stage: str
    step: int
    kind: str
    weights: str
    sources: Mapping[str, Measured]
    raw: Mapping[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRecord:
    """One stage: what the plan says, what its start said, and what has been logged of it."""

    index: int
    name: str
    plan: Event
    event: Event
    ended: bool
    seconds: float | None
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    ledger: Mapping[str, Tally]
    """By source."""
    levels: Mapping[str, Tally] = field(default_factory=dict)
    """By resolution, where a stage has several."""
    selections: Mapping[str, Event] = field(default_factory=dict)
    """How the rows of a source were chosen, where some were left out."""

    @property
    def begun(self) -> bool:
        return bool(self.event or self.steps or self.evaluations)

    @property
    def planned(self) -> int | None:
        """Optimizer steps that the plan asks for."""
        value = finite(self.event.get("steps"))
        value = finite(self.plan.get("steps")) if value is None else value
        return None if value is None else int(value)

    @property
    def reached(self) -> int:
        """The last step that is known of."""
        if self.ended and self.planned is not None:
            return self.planned
        return max([0, *(s.step for s in self.steps[-1:]), *(e.step for e in self.evaluations)])

    @property
    def latest(self) -> Evaluation | None:
        """The evaluation at the stage's end or, before that, the last one."""
        return self.evaluations[-1] if self.evaluations else None


@dataclass(frozen=True)
class Record:
    """A run folder as far as it can be read."""

    folder: Path
    name: str
    sources: tuple[str, ...]
    stages: tuple[StageRecord, ...]
    bases: tuple[Evaluation, ...]
    """The model before any training, at every resolution that it was measured at."""
    launches: tuple[Event, ...]
    seconds: float
    events: Mapping[str, tuple[Event, ...]]
    plan: Event
    plan_text: str
    environment_text: str
    stride: int

    @property
    def run(self) -> Event:
        """The last launch's own line."""
        return self.launches[-1] if self.launches else {}

    def base_of(self, evaluation: Evaluation) -> Evaluation | None:
        """The base's evaluation that an evaluation was compared with: the one whose losses are those that its changes are counted from."""

        def apart(base: Evaluation) -> float:
            pairs = [
                (m, base.sources[name])
                for name, m in evaluation.sources.items()
                if m.since_base and name in base.sources
            ]
            return sum(abs(m.loss - m.since_base.value - b.loss) for m, b in pairs if m.since_base)

        return min(self.bases, key=apart, default=None)

    @property
    def begun(self) -> tuple[StageRecord, ...]:
        return tuple(stage for stage in self.stages if stage.begun)

    @property
    def done(self) -> bool:
        return bool(self.stages) and all(stage.ended for stage in self.stages)


def read_record(folder: Path) -> Record:
    """Everything that the report needs of a run folder; each file may be missing. Raises OSError only where the disk fails."""
    events, stride = _read_events(folder)
    of_kind: dict[str, list[Event]] = {}
    for event in events:
        of_kind.setdefault(text(event.get("event")), []).append(event)
    plan_text = _read_text(folder / "plan.yaml")
    plan = _parse_plan(plan_text)
    evaluations = _evaluations(of_kind.get("eval", []))
    stages = _stages(plan, of_kind, evaluations, read_pages(_read_text(folder / "ledger.json")))
    launches = tuple(of_kind.get("run", []))
    names: dict[str, None] = dict.fromkeys(str(name) for name in mapping(plan.get("sources")))
    for stage in stages:
        names.update(dict.fromkeys([*mapping(stage.event.get("mix")), *stage.ledger]))
        for step in stage.steps[-1:]:
            names.update(dict.fromkeys([*step.drawn, *step.losses]))
    for evaluation in evaluations:
        names.update(dict.fromkeys(evaluation.sources))
    return Record(
        folder=folder,
        name=(text(launches[-1].get("name")) if launches else "") or text(plan.get("name")) or folder.resolve().name,
        sources=tuple(names),
        stages=stages,
        bases=tuple(evaluation for evaluation in evaluations if evaluation.kind == "base"),
        launches=launches,
        seconds=_seconds(events),
        events={kind: tuple(found) for kind, found in of_kind.items()},
        plan=plan,
        plan_text=plan_text,
        environment_text=_read_text(folder / "environment.json"),
        stride=stride,
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@lru_cache(maxsize=1)
def _parse_plan(plan_text: str) -> Event:
    """What a plan says; a run reads its own several times, and parsing takes longer than all else of a short one's report."""
    if len(plan_text) > LONG_PLAN:
        return {}
    try:
        return mapping(YAML(typ="safe").load(plan_text))
    except YAMLError:
        return {}


def _lines(folder: Path, stride: int) -> Iterator[bytes]:
    """Lines of metrics.jsonl: of those of steps every stride-th, and always the last one before another event."""
    seen, held = 0, b""
    for line in log_lines(folder, "metrics"):
        if stride > 1 and _STEP_LINE.match(line):
            seen += 1
            if seen % stride:
                held = line
                continue
            held = b""
        elif held:
            yield held
            held = b""
        yield line
    if held:
        yield held


def _read_events(folder: Path) -> tuple[list[Event], int]:
    """The events in the order of writing, and how many lines of steps stand for one that was read. A torn line is passed over."""
    stride = 1 + log_bytes(folder, "metrics") // LONG_FILE
    events: list[Event] = []
    for line in _lines(folder, stride):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events, stride


def _seconds(events: list[Event]) -> float:
    """Wall time of all launches together: from the first to the last line of each."""
    total, first, last = 0.0, None, 0.0
    for event in events:
        time = finite(event.get("time"))
        if time is None:
            continue
        if first is None or event.get("event") == "run":
            total += 0.0 if first is None else max(0.0, last - first)
            first = time
        last = time
    return total + (0.0 if first is None else max(0.0, last - first))


def _change(value: Event, name: str) -> Change | None:
    change, error = finite(value.get(name)), finite(value.get(name + "_error"))
    return None if change is None or error is None else Change(change, abs(error))


def _listed(source: Event, name: str) -> tuple[float, ...]:
    """A list of numbers, nan for what is none; empty where there is no list."""
    listed = source.get(name)
    return tuple(math.nan if (n := number(item)) is None else n for item in listed) if isinstance(listed, list) else ()


def _measured(value: object) -> Measured | None:
    source = mapping(value)
    loss = number(source.get("loss"))
    if loss is None:
        return None
    by_timestep, rows_by_timestep = _listed(source, "by_timestep"), _listed(source, "by_timestep_rows")
    errors = _listed(source, "since_base_by_timestep_error") or _listed(source, "since_start_by_timestep_error")
    rows = finite(source.get("rows"))
    return Measured(
        loss=loss,
        rows=None if rows is None else int(rows),
        by_timestep=by_timestep,
        by_timestep_rows=tuple(whole(n) for n in rows_by_timestep) if len(rows_by_timestep) == len(by_timestep) else (),
        by_timestep_error=errors if len(errors) == len(by_timestep) else (),
        since_base=_change(source, "since_base"),
        since_start=_change(source, "since_start"),
    )


def _evaluations(events: list[Event]) -> list[Evaluation]:
    """One evaluation for each stage, step and kind: the moving average's where it was measured, else the raw weights'."""
    found: dict[tuple[str, int, str, int], dict[str, Event]] = {}
    for number_of_event, event in enumerate(events):
        kind = text(event.get("kind"))
        place = text(event.get("stage")), whole(event.get("step")), kind, number_of_event if kind == "base" else 0
        found.setdefault(place, {})[text(event.get("weights")) or "raw"] = (
            event  # the last one: a resumed run repeats some
        )
    evaluations = []
    for (stage, step, kind, _), by_weights in found.items():
        read = {
            weights: {name: m for name, s in mapping(event.get("sources")).items() if (m := _measured(s)) is not None}
            for weights, event in by_weights.items()
        }
        weights = "ema" if "ema" in read else next(iter(read))
        raw = read.get("raw", {}) if weights == "ema" else {}
        evaluations.append(Evaluation(stage, step, kind, weights, read[weights], raw))
    return sorted(evaluations, key=lambda e: (e.step, _KINDS.get(e.kind, 2)))


def _steps(events: list[Event]) -> dict[str, dict[int, Step]]:
    steps: dict[str, dict[int, Step]] = {}
    for event in events:
        step = whole(event.get("step"))
        steps.setdefault(text(event.get("stage")), {})[step] = Step(
            step=step,
            loss=number(event.get("loss")),
            lr=number(event.get("lr")),
            grad_norm=number(event.get("grad_norm")),
            images_per_second=finite(event.get("images_per_second")),
            tokens_per_second=finite(event.get("tokens_per_second")),
            data_wait=finite(event.get("data_wait")),
            memory_bytes=finite(event.get("memory_bytes", event.get("peak_memory_bytes"))),
            multiplied_in=text(event.get("multiplied_in")),
            losses=numbers(event.get("losses")),
            drawn=numbers(event.get("drawn")),
        )
    return steps


def _stages(
    plan: Event,
    of_kind: Mapping[str, list[Event]],
    evaluations: list[Evaluation],
    pages: Mapping[str, Event],
) -> tuple[StageRecord, ...]:
    """The plan's stages in its order, then those that only the metrics know of."""
    planned = plan.get("stages")
    plans = {text(p.get("name")): p for item in (planned if isinstance(planned, list) else []) if (p := mapping(item))}
    started: dict[str, Event] = {}
    ended: dict[str, Event] = {}
    for event in of_kind.get("stage", []):
        (ended if event.get("state") == "end" else started)[text(event.get("stage"))] = event
    steps = _steps(of_kind.get("step", []))
    evaluated: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.kind != "base":
            evaluated.setdefault(evaluation.stage, []).append(evaluation)
    ledger = tallies(pages)
    names = dict.fromkeys([*plans, *started, *ended, *steps, *evaluated, *ledger])
    return tuple(
        StageRecord(
            index=index,
            name=name,
            plan=plans.get(name, {}),
            event={**started.get(name, {}), **ended.get(name, {})},
            ended=name in ended,
            seconds=finite(ended[name].get("seconds")) if name in ended else None,
            steps=tuple(step for _, step in sorted(steps.get(name, {}).items())),
            evaluations=tuple(evaluated.get(name, [])),
            ledger=ledger.get(name, {}),
            levels=levels(pages.get(name, {})),
            selections=selections(pages.get(name, {})),
        )
        for index, name in enumerate(names, start=1)
    )
