"""Untrained: what the model does before any training, at a stage's resolution. What was learnt is counted from it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixing.batch import MicroBatch
from stages.checked import DamagedError, checked, ignore, read_checked
from stages.checkpoint import write_whole
from stages.evaluate import Way, evaluate
from stages.evaluation_size import Size, choose, passes_of, stage_costs, time_rows, time_taken
from stages.feed import sizes_at
from stages.handoff import probe, probe_batches, probed_names
from stages.measured import Measured
from stages.plan import Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.quality import Quality
from stages.resolved import windows_of
from stages.storage import load_stored, stored
from stages.tensor_shards import raw_bytes
from stages.tiles import write_tiles

if TYPE_CHECKING:
    from stages.run import Run

_CHECK = "crc32"


@dataclass(frozen=True)
class Untrained:
    """The model before any training."""

    measured: Measured
    outputs: Mapping[str, Tensor]
    """On fixed inputs, as `stages.handoff.probe` gives them."""
    accuracy: float | None
    """The judge's verdict."""
    quality: Quality | None
    seconds: float
    """That measuring held-out rows took in this call; 0 where they had been measured before."""


def untrained(run: Run, stage: Stage) -> Untrained:
    """The model as a stage would measure it before any training: held-out losses, outputs on fixed inputs, and what samples are worth.

    Over a quantised base it is another function, and measured for itself, so that what is counted since the base is what was learnt. Kept in evaluations/, and measured anew where a
    source has come since, or where it is to be measured otherwise. Raises PlanError where plan and data do not fit.
    """
    metrics = run.metrics  # whose models are opened here, long before the first sample, and where a stage is gone on with too
    batches = probe_batches(run.selections, run.shapes(stage))
    kept = _kept(run, stage, batches)
    if all(run.processes.gathered(kept is not None)) and kept is not None:  # a network drive may show it to some later than to others
        return kept
    folder, name = run.folder / "evaluations", run.base_name(stage)
    known = _kept_outputs(folder / f"{name}.safetensors") or {}
    precision = StagePrecision(stage.precision, run.accelerator.device)
    loaded = load_stored(run.family, stored(stage), None, stage.expert, run.engine.loads_on)
    run.processes.wait()  # a machine may have had to fetch it first
    transformer = run.engine.place(loaded)
    began = time.monotonic()
    if run.size is None and not run.measures_all:
        _choose_size(run, stage, transformer, precision)
    measured = evaluate(
        run.family,
        transformer,
        run.selections,
        shapes=run.shapes(stage),
        precision=precision,
        seed=run.plan.seed,
        accelerator=run.accelerator,
        unreadable=lambda row: None,  # the stage's first evaluation reads the same rows and names them
        windows=windows_of(stage),
        t_range=run.t_range(stage),
        rows=run.rows,
        in_step=run.aside(transformer),
    )
    seconds = time.monotonic() - began
    outputs = known | probe(run.family, transformer, batches, precision, run.plan.seed)
    judged = found = None
    if run.plan.previews.rows or run.is_judged(stage) or metrics:
        sampler = run.sampler(stage, precision, {})
        judged, found = run.judged(transformer, stage, sampler), run.quality(transformer, stage, sampler)
        shown = run.previews(transformer, stage, sampler) if run.plan.previews.rows else []
        if run.accelerator.is_main_process:
            run.room.must("the previews of the untrained model", lambda: write_tiles(run.folder, name, shown))
    run.engine.release(transformer)
    if run.accelerator.is_main_process:
        run.room.must("what the untrained model was measured to do", lambda: _keep(folder, name, measured, judged, found, outputs))
    run.processes.wait()
    return Untrained(measured, outputs, judged["accuracy"] if judged else None, found, seconds)


def _kept(run: Run, stage: Stage, batches: Mapping[str, MicroBatch]) -> Untrained | None:
    """What was measured before; None unless it is all there, of every row that is to be measured."""
    folder, name = run.folder / "evaluations", run.base_name(stage)

    def say(message: str) -> None:
        run.log.say(f"[yellow]{escape(message)}[/yellow]; the untrained model is measured anew")

    measured, found = Measured.load(folder / f"{name}.json", say), Quality.load(folder / f"{name}-quality.json", say)
    outputs = _kept_outputs(folder / f"{name}.safetensors", say)
    try:
        judged = read_checked(folder / f"{name}-accuracy.json")
    except DamagedError as error:
        say(str(error))
        return None
    if measured is None or outputs is None or judged is None or (run.size is None and not run.measures_all):
        return None
    covers = all(measured.asked.get(source, 0) >= len(selection.held_out[: run.rows]) for source, selection in run.selections.items())
    if not covers or not batches.keys() <= probed_names(outputs) or (run.metrics and (found is None or found.how != run.how_sampled)):
        return None
    return Untrained(measured, outputs, judged.get("accuracy"), found if run.metrics else None, 0.0)


def _keep(folder: Path, name: str, measured: Measured, judged: Mapping[str, float] | None, found: Quality | None, outputs: Mapping[str, Tensor]) -> None:
    """Keep what was measured, so that a later stage and a later launch find it."""
    measured.save(folder / f"{name}.json")
    write_whole(folder / f"{name}-accuracy.json", checked(judged or {}))
    if found is not None:
        found.save(folder / f"{name}-quality.json")
    save_file({key: value.contiguous() for key, value in outputs.items()}, folder / f".{name}.partial", metadata={_CHECK: _checksum(outputs)})
    (folder / f".{name}.partial").rename(folder / f"{name}.safetensors")


def _kept_outputs(file: Path, say: Callable[[str], object] = ignore) -> dict[str, Tensor] | None:
    """The outputs on fixed inputs that were kept; None if there are none, and where the file is damaged, which is said through `say`."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as header:
            check = (header.metadata() or {}).get(_CHECK)
        outputs: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        say(f"{file} cannot be read ({error})")
        return None
    if check is not None and check != _checksum(outputs):  # a former version wrote none
        say(f"{file} is not what was written (its checksum differs)")
        return None
    return outputs


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    check = 0
    for name in sorted(tensors):
        check = zlib.crc32(raw_bytes(tensors[name].contiguous()), check)
    return f"{check:08x}"


def _choose_size(run: Run, stage: Stage, transformer: nn.Module, precision: StagePrecision) -> None:
    """Choose how many held-out rows are measured, alike on every process, and keep it in the run folder. Raises PlanError where plan and data do not fit."""
    held_out = max(len(selection.held_out) for selection in run.selections.values())
    plan, device = run.plan, run.accelerator.device
    way = Way(run.shapes(stage), precision, plan.seed, windows_of(stage), run.t_range(stage))
    own = time_rows(run.family, transformer, run.selections, way, sizes_at(stage, run.sizes), run.aside(transformer))
    timed = run.processes.gathered((own.row, own.forward))
    row, forward = max(each[0] for each in timed), max(each[1] for each in timed)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    dry = run.processes.gathered(run.dry_seconds)[0]
    per_token = [dry.get(index, forward * passes_of(each, parameters, device)) for index, each in enumerate(plan.stages)]
    try:
        costs = stage_costs(plan, run.selections, run.sizes, per_token, run.processes.number, [run.base_name(each) for each in plan.stages])
    except ValueError as error:
        raise PlanError.at("stages", str(error)) from None
    size = choose(costs, row, held_out, plan.evaluate.time, "dry steps" if len(dry) == len(plan.stages) else "forward passes")
    if run.accelerator.is_main_process:
        run.room.must("how many rows are measured", lambda: size.save(run.folder))
    run.processes.wait()
    run.size = size


def say_time_taken(run: Run) -> None:
    """Say what part of the time of training evaluations have really taken, in all launches."""
    if not run.accelerator.is_main_process or not any(len(selection.held_out) for selection in run.selections.values()):
        return
    seconds, training = time_taken(run.folder)
    if seconds and training:
        limit = None if run.measures_all else run.plan.evaluate.time
        run.log.write({"event": "evaluation", "kind": "took", "seconds": round(seconds, 3), "training_seconds": round(training, 3), "share": seconds / training, "limit": limit})
        asked = f", at most {limit:.1%} was asked for" if limit else ""
        run.log.say(f"  evaluations took {seconds / training:.1%} of the time of training ({seconds:,.1f} of {training:,.1f} s{asked})")


def say_size(run: Run, size: Size) -> None:
    """Say how many held-out rows are measured, and why."""
    limit = run.plan.evaluate.time
    which = f"{size.rows} of {size.held_out}" if size.rows < size.held_out else f"all {size.held_out}"
    run.log.write({"event": "evaluation", "kind": "size", **asdict(size), "share": size.share, "limit": limit})
    takes = f"{size.evaluations} evaluations take about {size.share:.1%} of the time of training"
    if size.share > limit:
        run.log.warn(f"even with {size.rows} held-out rows of each source {takes}, more than evaluate.time ({limit:.1%}), for the stages are short", "", 0)
    else:
        run.log.say(f"  measures {which} held-out rows of each source: {takes} (at most {limit:.1%}, evaluate.time)")
