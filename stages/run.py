"""A run: a plan being carried out in its run folder. What is done is read from the folder, so going on and starting are one path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from mixing.buckets import Shapes
from mixing.keys import key
from mixing.selected import Selection
from stages.cache import Cache
from stages.checkpoint import Checkpoint, write_whole
from stages.digests import FileDigests, file_digest
from stages.engine import Engine
from stages.evaluate import Measured, evaluate
from stages.families.facts import tasks_of
from stages.families.family import Family
from stages.families.open import open_family
from stages.feed import Sizes, main_shapes
from stages.going_on import recorded, stage_folder
from stages.handoff import Baton, other_experts, probe, probe_batches, probed_names, read_baton
from stages.ledger import dropped_rows
from stages.open_cache import open_cache
from stages.plan import Plan, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.processes import Processes
from stages.resolved import main_resolution, quantised, windows_of
from stages.sampler import Sampler
from stages.sampling import Judge, accuracy, fit_judge
from stages.stop import Stop
from stages.storage import load_stored, stored
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
    baton: Baton = field(default_factory=lambda: Baton(None, None, "the model"))
    last: Checkpoint | None = None
    """The last checkpoint of the stage before this one."""
    cache: Cache | None = None
    """What is encoded once and kept, once the family is open."""

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

    def finished(self, index: int) -> Checkpoint | None:
        """The last checkpoint of a stage that is finished, else None."""
        checkpoint = self.checkpoints[index]
        if checkpoint is None or not checkpoint.state["finished"]:
            return None
        self.log.say(f"[dim]stage {index + 1}/{len(self.plan.stages)} '{self.plan.stages[index].name}' is finished[/dim]")
        return checkpoint

    def baton_from(self, checkpoint: Checkpoint) -> None:
        """Take over what a stage's last checkpoint hands on."""
        self.last, self.baton = checkpoint, read_baton(checkpoint)
        self.checkpoints[int(checkpoint.state["index"])] = checkpoint

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

    def steps_before(self, index: int) -> int:
        """Steps of all earlier stages: the tracker counts on over stages."""
        return sum(stage.steps for stage in self.plan.stages[:index])

    def recorded(self, stage: Stage) -> dict[str, Any]:
        """What decides a stage's result."""
        return recorded(self.plan, stage, self.fingerprint, self.selections)

    def base(self, stage: Stage) -> tuple[Measured, dict[str, torch.Tensor], float | None]:
        """What the model does before any training, at a stage's resolution: held-out losses, outputs on fixed inputs, and the judge's verdict.

        Over a quantised base it is another function, and measured for itself, so that what is counted since the base is what was learnt. Kept in evaluations/, and measured anew where a source has come since.
        """
        shapes = self.shapes(stage)
        folder, name = self.folder / "evaluations", f"base-{named(shapes)}{_way(stage)}"
        batches = probe_batches(self.selections, shapes)
        known = load_file(folder / f"{name}.safetensors") if (folder / f"{name}.safetensors").exists() else {}
        if not (known and self._covers(Measured.load(folder / f"{name}.json")) and batches.keys() <= probed_names(known)):
            precision = StagePrecision(stage.precision, self.accelerator.device)
            loaded = load_stored(self.family, stored(stage), None, stage.expert, self.engine.loads_on)
            self.processes.wait()  # a machine may have had to fetch it first
            transformer = self.engine.place(loaded)
            measured = evaluate(
                self.family,
                transformer,
                self.selections,
                shapes=shapes,
                precision=precision,
                seed=self.plan.seed,
                accelerator=self.accelerator,
                unreadable=lambda row: None,  # the stage's first evaluation reads the same rows and names them
                windows=windows_of(stage),
                t_range=self.t_range(stage),
                in_step=self.engine.shared_out(transformer),
            )
            outputs = known | probe(self.family, transformer, batches, precision, self.plan.seed)
            untrained = None
            if self._is_judged(stage):
                untrained = self.judged(transformer, stage, self.sampler(stage, precision, {}))
            self.engine.release(transformer)
            if self.accelerator.is_main_process:
                measured.save(folder / f"{name}.json")
                write_whole(folder / f"{name}-accuracy.json", json.dumps(untrained))
                save_file(outputs, folder / f".{name}.partial")
                (folder / f".{name}.partial").rename(folder / f"{name}.safetensors")
            self.processes.wait()
        judged = json.loads((folder / f"{name}-accuracy.json").read_text(encoding="utf-8"))
        return Measured.load(folder / f"{name}.json"), load_file(folder / f"{name}.safetensors"), judged["accuracy"] if judged else None

    def _covers(self, measured: Measured) -> bool:
        """Whether an evaluation has seen every source that has held-out rows."""
        return {name for name, selection in self.selections.items() if len(selection.held_out)} <= measured.losses.keys()

    def judged(self, transformer: torch.nn.Module, stage: Stage, sampler: Sampler) -> dict[str, float] | None:
        """The judge's verdict on samples of a transformer, if the plan asks for one and this stage has its resolution."""
        asked = self.plan.evaluate.accuracy
        if not asked or not self.judge or not self._is_judged(stage):
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
            in_step=self.engine.shared_out(transformer),
        )

    def t_range(self, stage: Stage) -> tuple[float, float]:
        """The noise levels that a stage's transformer is for."""
        return (0.0, 1.0) if stage.expert is None else self.family.expert_range(stage.expert)

    def _is_judged(self, stage: Stage) -> bool:
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
