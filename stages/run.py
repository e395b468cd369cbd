"""A run: a plan being carried out in its run folder. What is done is read from the folder, so going on and starting are one path."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from rich.console import Console
from safetensors.torch import load_file, save_file

from mixing.bad_rows import SourceError
from mixing.buckets import Shapes
from mixing.keys import key
from mixing.mixture import TooManyBadRows
from mixing.selected import Selection
from mixing.share_out import TooFewImages
from stages.cache import Cache
from stages.checkpoint import Checkpoint, newest_checkpoint, write_whole
from stages.digests import FileDigests, file_digest
from stages.evaluate import Measured, evaluate
from stages.families.facts import tasks_of
from stages.families.family import Family
from stages.families.open import fingerprint, open_family
from stages.feed import Sizes, budget_of, main_shapes
from stages.finish import is_published
from stages.going_on import compare_names, compare_stage, recorded, stage_folder
from stages.handoff import Baton, other_experts, probe, probe_batches, probed_names, read_baton
from stages.ledger import dropped_rows
from stages.open_cache import open_cache
from stages.open_sources import index_folder, open_selections
from stages.plan import Plan, Stage
from stages.precision import DTYPES, StagePrecision, start_accelerator
from stages.prior import is_made, make_prior, prior_folder
from stages.problems import PlanError, RowsError, RunError
from stages.reader import to_yaml
from stages.resolved import main_resolution, resolved_storage, windows_of
from stages.sampler import Sampler
from stages.sampling import Judge, accuracy, fit_judge
from stages.start import read_start
from stages.track import Log, Trace

_VERSIONS = ("torch", "accelerate", "diffusers", "transformers", "peft", "datasets", "numpy", "safetensors")


class Stop:
    """Notes SIGTERM and SIGINT, so that the step under way can be finished and saved. A second one ends the process at once.

    `accelerate launch` with one process does not pass its own SIGTERM on (1.15): that the launcher is gone counts as one.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if _in_main_thread() else {}
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to stop. Every process must ask at the same step."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.signal = self.signal or int(signal.SIGTERM)
        if accelerator.num_processes > 1:
            told = reduce(torch.tensor([self.signal or 0], device=accelerator.device), reduction="sum")
            if int(told) and self.signal is None:
                self.signal = int(signal.SIGTERM)
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.signal or 0).name if self.signal else "nothing"

    @property
    def exit_code(self) -> int:
        """128 and the signal's number."""
        return 128 + (self.signal or 0)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


@dataclass
class Run:
    """What every part of a run is handed: the plan, the folder, the processes, the data, and the weights that pass from stage to stage."""

    plan: Plan
    folder: Path
    accelerator: Accelerator
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
        return {name: version(name) for name in _VERSIONS}

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

        Kept in evaluations/, and measured anew where a source has come since.
        """
        shapes = self.shapes(stage)
        folder, name = self.folder / "evaluations", f"base-{named(shapes)}{_way(stage)}"
        batches = probe_batches(self.selections, shapes)
        known = load_file(folder / f"{name}.safetensors") if (folder / f"{name}.safetensors").exists() else {}
        if not (known and self._covers(Measured.load(folder / f"{name}.json")) and batches.keys() <= probed_names(known)):
            precision = StagePrecision(stage.precision, self.accelerator.device)
            transformer = self.family.load_transformer(DTYPES[resolved_storage(stage)], None, stage.expert)
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
            )
            outputs = known | probe(self.family, transformer, batches, precision, self.plan.seed)
            untrained = None
            if self._is_judged(stage):
                untrained = self.judged(transformer, stage, self.sampler(stage, precision, {}))
            if self.accelerator.is_main_process:
                measured.save(folder / f"{name}.json")
                write_whole(folder / f"{name}-accuracy.json", json.dumps(untrained))
                save_file(outputs, folder / f".{name}.partial")
                (folder / f".{name}.partial").rename(folder / f"{name}.safetensors")
            self.accelerator.wait_for_everyone()
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


@contextmanager
def open_run(plan: Plan, folder: Path, *, trace: bool) -> Iterator[Run]:
    """Open the sources and the run folder, find what is done, and hand out the run. Raises PlanError where plan, data and folder do not fit."""
    stop = Stop()
    accelerator = start_accelerator(None if plan.track == "none" else plan.track)
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages").mkdir(exist_ok=True)
    (folder / "evaluations").mkdir(exist_ok=True)
    with _locked(folder, accelerator.is_main_process):
        for index, stage in enumerate(plan.stages):
            budget = budget_of(stage)
            if budget.unit == "images" and min(budget.first, budget.last) < accelerator.num_processes:
                least = min(budget.first, budget.last)
                message = f"a step of {least} image{'s' if least > 1 else ''} cannot be shared by {accelerator.num_processes} processes; start fewer, or make batch larger"
                raise PlanError.at(f"stages[{index}].batch", message)
        model = fingerprint(plan.model)
        priors = _priors(plan, model, folder, accelerator, console)
        selections = _opened(plan, accelerator, priors)
        for name, selection in selections.items():
            if selection.stream is not None and selection.stream.num_lanes < accelerator.num_processes:
                lanes = "1 lane" if selection.stream.num_lanes == 1 else f"{selection.stream.num_lanes} lanes"
                message = f"source '{name}' is read in {lanes}, fewer than the {accelerator.num_processes} processes; start fewer, or set sources.{name}.lanes: {accelerator.num_processes}"
                raise PlanError.at(f"sources.{name}", message)
        checkpoints: list[Checkpoint | None] = []
        said: list[str] = []
        for index, stage in enumerate(plan.stages):
            checkpoints.append(found := newest_checkpoint(stage_folder(folder, index, stage.name), said.append))
            if found:
                compare_stage(folder, index, stage, found, recorded(plan, stage, model, selections))
        compare_names(plan, folder)
        newest = next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint), None)
        # What a killed run wrote after its newest checkpoint is cut off, for it will be done again; a run that was published is done.
        last = checkpoints[-1]
        keep_bytes = sys.maxsize if last and is_published(folder, last) else newest.state["metrics_bytes"] if newest else 0
        log = Log(folder, accelerator, console, keep_bytes)
        written = Trace(folder, newest.state["trace_bytes"] if newest else 0) if trace and accelerator.is_main_process else None
        run = Run(plan, folder, accelerator, selections, checkpoints, log, trace, written, stop, model)
        for message in said:
            run.log.warn(message, "", 0)
        try:
            run.baton = read_start(plan, model) if plan.start else run.baton
        except ValueError as error:
            raise PlanError.at("", str(error)) from None
        if run.baton.adapter is not None and plan.stages[0].train == "full":
            raise PlanError.at("stages[0].train", f"'full', and start: {plan.start} brings an adapter, which belongs to the weights it was trained on; begin with a stage that trains the adapter")
        if accelerator.is_main_process:
            write_whole(folder / "plan.yaml", to_yaml(plan))
            write_whole(folder / "environment.json", json.dumps(environment(accelerator), indent=1))
        run.log.start_tracker(plan.name, folder.name, {"plan": to_yaml(plan)})
        say_hello(run, newest)
        accelerator.wait_for_everyone()
        try:
            yield run
        except (TooManyBadRows, TooFewImages, SourceError) as error:
            raise RowsError.at("", str(error)) from None
        except RuntimeError as error:
            if accelerator.num_processes > 1 and "closed by peer" in str(error):  # gloo's words (torch 2.13)
                raise RunError("another process has ended; what it says is the reason") from None
            raise
        finally:
            if run.cache:
                run.cache.close()
            run.log.close()
            if run.trace:
                run.trace.close()
            stop.close()


def _priors(plan: Plan, model: str, folder: Path, accelerator: Accelerator, console: Console) -> dict[str, Path]:
    """Where the images lie that the model makes itself; those that are not there are made."""
    places = {name: prior_folder(plan, name, model, Path.cwd(), folder) for name, source in plan.sources.items() if source.prior is not None}
    if missing := [name for name, place in places.items() if not is_made(place)]:
        family = open_family(plan.model, accelerator.device)
        accelerator.wait_for_everyone()  # all have seen what is missing before any of it is made
        for name in missing:
            make_prior(plan, name, places[name], family, accelerator, Path.cwd(), console.print if accelerator.is_main_process else lambda message: None)
    return places


def _opened(plan: Plan, accelerator: Accelerator, priors: Mapping[str, Path]) -> dict[str, Selection]:
    """The sources; the main process looks at them first, and the others read what it has noted."""
    if index_folder(plan) is None:
        return open_selections(plan, Path.cwd(), priors)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return open_selections(plan, Path.cwd(), priors)
    try:
        return open_selections(plan, Path.cwd(), priors)
    finally:
        accelerator.wait_for_everyone()  # also where the plan is wrong: then the others find that out too


def named(shapes: Shapes) -> str:
    """What shapes are called in file names: the resolution, and a hash where the buckets are not the usual ones."""
    usual = Shapes(shapes.pixels, shapes.multiple)
    return str(shapes.pixels) if shapes == usual else f"{shapes.pixels}-{key(json.dumps(asdict(shapes))):016x}"


def _way(stage: Stage) -> str:
    """What the way that a stage's held-out rows are measured on is called in file names; nothing for the straight one."""
    pyramid = "" if stage.pyramid is None else f"-{stage.pyramid.levels}-levels-{stage.pyramid.gamma:.6g}"
    return f"{pyramid}-{stage.expert}" if stage.expert else pyramid


@contextmanager
def _locked(folder: Path, main: bool) -> Iterator[None]:
    """Hold the folder against a second launch. The lock is the process's own and goes with it, however it ends."""
    if not main:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, its lock is not inherited by data workers that outlive a kill
        except OSError:
            raise PlanError.at(str(folder), "another launch is training in this folder; wait for it, or pass --out") from None
        yield


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the run was carried out with: no user name, no host name, no environment variable."""
    return {
        "versions": {name: version(name) for name in _VERSIONS},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device_name(accelerator),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _device_name(accelerator: Accelerator) -> str:
    return torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device.type


def say_hello(run: Run, newest: Checkpoint | None) -> None:
    """The first lines: what is trained, on what, and whether it is gone on with."""
    processes = run.accelerator.num_processes
    run.log.say(f"[bold]{run.plan.name}[/bold]: {len(run.plan.stages)} stages on {_device_name(run.accelerator)}, {processes} {'process' if processes == 1 else 'processes'}, into {run.folder}")
    for name, selection in run.selections.items():
        bad = f", {len(selection.source.bad)} bad rows left out" if selection.source.bad else ""
        rows = f"{selection.size:,} rows to train on" if selection.stream is None else f"a stream in {selection.stream.num_lanes} lanes"
        run.log.say(f"  source {name}: {rows}, {len(selection.held_out)} held out{bad}")
        for row in selection.source.bad[:5]:
            run.log.warn(f"source '{name}': {row.key}: {row.reason}", "", 0)
    resumed = {"stage": newest.state["stage"], "step": newest.step} if newest else None
    if not all(checkpoint and checkpoint.state["finished"] for checkpoint in run.checkpoints):
        run.log.write(
            {
                "event": "run",
                "name": run.plan.name,
                "seed": run.plan.seed,
                "model": run.plan.model if isinstance(run.plan.model, str) else run.plan.model.repo,
                "device": _device_name(run.accelerator),
                "processes": processes,
                "versions": {name: version(name) for name in _VERSIONS},
                "resumed_from": resumed,
            }
        )
    if newest and not newest.state["finished"]:
        run.log.say(f"going on with stage '{newest.state['stage']}' after step {newest.step}")
