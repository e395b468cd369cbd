"""A run: a plan being carried out in its run folder. What is done is read from the folder, so going on and starting are one path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.markup import escape

from mixing.buckets import Shapes
from mixing.keys import key
from mixing.selected import Selection
from stages.aside import aside
from stages.cache import Cache
from stages.checkpoint import Checkpoint
from stages.digests import FileDigests, file_digest
from stages.engine import Engine
from stages.evaluation_size import Size
from stages.families.facts import tasks_of
from stages.families.family import Family
from stages.families.open import open_family
from stages.feed import Sizes, main_shapes
from stages.going_on import recorded, stage_folder
from stages.handoff import Baton, other_experts, read_baton
from stages.hub.run import Hub
from stages.ledger import dropped_rows
from stages.metrics import Metric, open_metrics
from stages.open_cache import open_cache
from stages.plan import MetricName, Plan, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.processes import Processes
from stages.quality import Quality, quality
from stages.report import write_report
from stages.resolved import main_resolution, measures_all, metric_models, quantised, windows_of
from stages.room import Room
from stages.sampler import Sampler
from stages.sampling import Judge, Preview, accuracy, fit_judge, previews
from stages.stop import Stop
from stages.track import Log, Trace

VERSIONS = ("torch", "accelerate", "diffusers", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "safetensors")


@dataclass
class Run:
    """What every part of a run is handed: the plan, the folder, the processes, the data, and the weights that pass from stage to stage."""

    plan: Plan
    folder: Path
    accelerator: Accelerator
    processes: Processes
    engine: Engine
    """How the processes train a model together."""
    selections: Mapping[str, Selection]
    checkpoints: list[Checkpoint | None]
    """The newest of each stage, or None."""
    log: Log
    tracing: bool
    """Whether every row drawn is written to trace.jsonl."""
    trace: Trace | None
    """The file, on the main process."""
    stop: Stop
    fingerprint: str
    """Of the model."""
    room: Room
    """What is written into the run's folder goes through it, on the main process."""
    baton: Baton = field(default_factory=lambda: Baton(None, None, "the model"))
    last: Checkpoint | None = None
    last_is_new: bool = False
    """Whether this launch made it; if not, another machine may have."""
    """The last checkpoint of the stage before this one."""
    cache: Cache | None = None
    """What is encoded once and kept, once the family is open."""
    hub: Hub | None = None
    """The way to the Hub, on the main process, if the plan publishes."""
    dry_seconds: dict[int, float] = field(default_factory=dict)
    """What training takes for a token on one process, of the stages that a dry step was made of in this launch."""
    size: Size | None = None
    """How many held-out rows are measured, where that follows from the time it takes, and once it is chosen."""

    @cached_property
    def family(self) -> Family:
        """The model without its transformer; opened when first needed, so that a finished run is answered at once."""
        kept = None if self.plan.cache == "none" else self.plan.cache
        digest = file_digest if kept is None else FileDigests(Path(kept.folder) / "digests.json").digest
        family = open_family(self.plan.model, self.accelerator.device, digest)
        for name, source in self.plan.sources.items():  # of a model on the Hub this is not known before
            if source.task not in (can := tasks_of(family.pipeline_class)):
                raise PlanError.at(f"sources.{name}.task", f"{family.name} cannot train task '{source.task}' (it can: {', '.join(can)}); remove source '{name}' or choose another model")
        if family.pipeline_class in family.facts.one_reference:
            for name, selection in self.selections.items():
                if any(len(row_class.references) > 1 for row_class in selection.training):
                    raise PlanError.at(f"sources.{name}", f"rows have several references, and {family.pipeline_class} takes one; write `where: references == 1`, or choose a model of QwenImageEditPlusPipeline")
        if kept is not None and (kept.text or (kept.latents and family.encodes_images)):
            self.cache = open_cache(Path(kept.folder), family, kept, f"rank{self.accelerator.process_index}")
            family.texts.stored = self.cache if kept.text else None
            family.cache = self.cache if kept.latents and family.encodes_images else None
        return family

    @cached_property
    def sizes(self) -> Sizes:
        """What the model makes of an image's size."""
        return Sizes(self.family.pixel_multiple, self.family.text_tokens)

    def shapes(self, stage: Stage) -> Shapes:
        """The shapes in which a stage sees held-out rows."""
        return main_shapes(stage, self.sizes.multiple)

    @cached_property
    def judge(self) -> Judge | None:
        """The classifier that the plan asks for."""
        asked = self.plan.evaluate.accuracy
        return fit_judge(Path(asked.labelled), main_resolution(self.plan.stages[-1])) if asked else None

    @cached_property
    def metrics(self) -> dict[MetricName, Metric]:
        """What looks at samples, opened when first asked for. Raises PlanError where a model cannot be opened."""
        return open_metrics(self.plan, Path.cwd())

    @property
    def how_sampled(self) -> dict[str, Any]:
        """What decides about the samples that `metrics` looks at, and about what it sees."""
        return {"models": metric_models(self.plan), "samples": self.plan.evaluate.samples, "steps": self.plan.previews.steps, "guidance": self.plan.previews.guidance}

    @property
    def measures_all(self) -> bool:
        """Whether every held-out row is measured, or there is none to choose from."""
        return measures_all(self.plan) or not any(len(selection.held_out) for selection in self.selections.values())

    @property
    def rows(self) -> int | None:
        """How many held-out rows of each source an evaluation measures; None for all of them."""
        return None if self.size is None else self.size.rows

    def aside(self, transformer: torch.nn.Module) -> AbstractContextManager[None]:
        """In what processes evaluate and sample; as `stages.aside.aside`."""
        return aside(transformer, self.stop, self.accelerator, self.engine)

    def finished(self, index: int) -> Checkpoint | None:
        """The last checkpoint of a stage that is finished, else None."""
        checkpoint = self.checkpoints[index]
        if checkpoint is None or not checkpoint.state["finished"]:
            return None
        self.log.say(f"[dim]stage {index + 1}/{len(self.plan.stages)} '{self.plan.stages[index].name}' is finished[/dim]")
        return checkpoint

    def baton_from(self, checkpoint: Checkpoint) -> None:
        """Take over what a stage's last checkpoint hands on."""
        index = int(checkpoint.state["index"])
        self.last, self.baton = checkpoint, read_baton(checkpoint)
        self.last_is_new = checkpoint is not self.checkpoints[index]
        self.checkpoints[index] = checkpoint

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries beneath."""
        return {name: version(name) for name in VERSIONS}

    def stage_folder(self, index: int) -> Path:
        """Where a stage's checkpoints lie."""
        return stage_folder(self.folder, index, self.plan.stages[index].name)

    def drawn_before(self) -> dict[tuple[str, str], int]:
        """Images that finished stages have drawn of each (source, signature)."""
        saved: dict[str, dict[str, int]] = self.last.state["drawn"] if self.last else {}
        return {(source, signature): count for source, counts in saved.items() for signature, count in counts.items()}

    def ledger(self, current: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All pages of the ledger: those of finished stages, and the current one's."""
        pages = [checkpoint.state["ledger"] for checkpoint in self.checkpoints if checkpoint and checkpoint.state["finished"]]
        pages = [page for page in pages if current is None or page["stage"] != current["stage"]]
        opened = {name: dropped_rows(selection.source.bad) for name, selection in self.selections.items() if selection.source.bad}
        return {"stages": [*pages, *([current] if current else [])], "left_out_at_opening": opened}

    def report(self, *, is_said: bool = False) -> None:
        """Write report.html on the main process, if the disk lets it. is_said: whether it is printed where it lies."""
        if self.accelerator.is_main_process:
            cure = f"python -m stages.report {self.folder} writes it"
            written = self.room.may("report.html", lambda: write_report(self.folder), lambda message: self.log.warn(message, "", 0), cure)
            if written is not None and is_said:
                self.log.say(f"report: {escape(str(written))}")

    def steps_before(self, index: int) -> int:
        """Steps of all earlier stages: the tracker counts on over stages."""
        return sum(stage.steps for stage in self.plan.stages[:index])

    def recorded(self, stage: Stage) -> dict[str, Any]:
        """What decides a stage's result."""
        return recorded(self.plan, stage, self.fingerprint, self.selections)

    def base_name(self, stage: Stage) -> str:
        """What the model before any training, as a stage measures it, is called in file names."""
        return f"base-{named(self.shapes(stage))}{_way(stage)}"

    def previews(self, transformer: torch.nn.Module, stage: Stage, sampler: Sampler) -> list[Preview]:
        """Samples of a stage's transformer for the first held-out rows of each source, as the plan asks."""
        return previews(
            self.family,
            transformer,
            self.selections,
            rows=self.plan.previews.rows,
            shapes=self.shapes(stage),
            sampler=sampler,
            seed=self.plan.seed,
            accelerator=self.accelerator,
            in_step=self.aside(transformer),
        )

    def judged(self, transformer: torch.nn.Module, stage: Stage, sampler: Sampler) -> dict[str, float] | None:
        """The judge's verdict on samples of a transformer, if the plan asks for one and this stage has its resolution."""
        asked = self.plan.evaluate.accuracy
        if not asked or not self.judge or not self.is_judged(stage):
            return None
        return accuracy(
            self.family,
            transformer,
            self.selections[asked.source],
            self.judge,
            samples=asked.samples,
            sampler=sampler,
            seed=self.plan.seed,
            accelerator=self.accelerator,
            in_step=self.aside(transformer),
        )

    def quality(self, transformer: torch.nn.Module, stage: Stage, sampler: Sampler) -> Quality | None:
        """What the plan's metrics say of samples of a transformer; None if it asks for none."""
        if not self.metrics:
            return None
        return quality(
            self.family,
            transformer,
            self.selections,
            self.metrics,
            self.how_sampled,
            samples=self.plan.evaluate.samples,
            shapes=self.shapes(stage),
            sampler=sampler,
            seed=self.plan.seed,
            accelerator=self.accelerator,
            in_step=self.aside(transformer),
        )

    def t_range(self, stage: Stage) -> tuple[float, float]:
        """The noise levels that a stage's transformer is for."""
        return (0.0, 1.0) if stage.expert is None else self.family.expert_range(stage.expert)

    def is_judged(self, stage: Stage) -> bool:
        """Whether samples of a stage are judged: where it has the resolution that the judge knows."""
        return self.judge is not None and self.judge.resolution == main_resolution(stage)

    def sampler(self, stage: Stage, precision: StagePrecision, carried: Mapping[str, torch.Tensor]) -> Sampler:
        """How samples are made in a stage. carried: what the model's other transformers have learnt so far; they are loaded for it."""
        others = other_experts(self.family, self.plan, stage, carried)
        return Sampler(self.plan.previews.steps, precision, self.plan.previews.guidance, windows_of(stage), others)


def named(shapes: Shapes) -> str:
    """What shapes are called in file names: the resolution, and a hash where the buckets are not the usual ones."""
    usual = Shapes(shapes.pixels, shapes.multiple)
    return str(shapes.pixels) if shapes == usual else f"{shapes.pixels}-{key(json.dumps(asdict(shapes))):016x}"


def _way(stage: Stage) -> str:
    """What the way that a stage's held-out rows are measured on is called in file names; nothing for the straight one over a base that is not quantised."""
    pyramid = "" if stage.pyramid is None else f"-{stage.pyramid.levels}-levels-{stage.pyramid.gamma:.6g}"
    return "-".join([pyramid, *filter(None, (stage.expert, quantised(stage)))])
