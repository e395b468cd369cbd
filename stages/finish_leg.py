"""Finish a leg: the stage's last duties, which are to evaluate, sample, save, report, and let go of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.aside import Stopped
from stages.checkpoint import Checkpoint, read_checkpoint, step_folder
from stages.compiled import forget_compiled
from stages.estimate import run_estimate
from stages.evaluate_leg import evaluate_leg
from stages.handoff import probe, probe_batches
from stages.leg import Leg
from stages.memory import peak_bytes
from stages.problems import RunError
from stages.ruin import refuse_ruin
from stages.sampling import Preview, sheet
from stages.save_leg import save_leg
from stages.stage_event import stage_event
from stages.tell_quality import tell_quality
from stages.tiles import write_image, write_tiles
from stages.untrained import say_time_taken, untrained


def finish_leg(leg: Leg) -> Checkpoint | None:
    """Carry them out. Returns the stage's last checkpoint, or None if a signal broke it off: its steps are saved then, and all of this is done when the run goes on."""
    run, stage = leg.run, leg.stage
    leg.lanes.close()
    refuse_ruin(leg)  # before time is taken to measure it
    logged = run.log.place()
    run.processes.wait()  # as in `Leg.evaluate`
    try:
        _carry_out(leg)
    except Stopped:
        save_leg(leg, logged=logged)
        run.log.say(f"stopped by {run.stop.name} after the last step of '{stage.name}', saved; the same command goes on with measuring it")
        return None
    run.processes.wait()
    run.engine.release(leg.model)
    run.accelerator.free_memory()
    if stage.compile:
        forget_compiled()
    try:
        return read_checkpoint(step_folder(run.stage_folder(leg.index), stage.steps))
    except ValueError as error:
        raise RunError(f"{error}, though it was just written: its disk does not keep what it is given, or somebody took it away. See to that, and the same command goes on") from None


def _carry_out(leg: Leg) -> None:
    """Evaluate, sample, save and report. Raises Stopped if a signal comes before it is saved."""
    run, stage, plan = leg.run, leg.stage, leg.run.plan
    _log_memory(leg)
    evaluate_leg(leg, "end")
    with leg.averaged():
        sampler = run.sampler(stage, leg.precision, leg.carried) if plan.previews.rows or run.judge is not None or run.metrics else None
        if plan.previews.rows and sampler is not None:
            run.log.now("sampling previews")
            shown = run.previews(leg.model, stage, sampler)
            if run.accelerator.is_main_process and shown:
                file = run.folder / "previews" / f"{leg.index + 1}-{stage.name}.png"
                rows = run.room.must(f"the previews of '{stage.name}'", lambda: _write_previews(leg, file, shown))
                run.log.write({"event": "preview", "stage": stage.name, "step": leg.step, "file": str(file.relative_to(run.folder)), "rows": rows})
            run.processes.wait()  # as in `Leg.evaluate`
        judged = run.judged(leg.model, stage, sampler) if sampler is not None else None
        found = run.quality(leg.model, stage, sampler) if sampler is not None else None
    if found is not None:
        tell_quality(leg, found)
    if judged and plan.evaluate.accuracy:
        before = untrained(run, stage).accuracy
        record = {"event": "accuracy", "stage": stage.name, "step": leg.step, "source": plan.evaluate.accuracy.source, "samples": plan.evaluate.accuracy.samples, **judged, "untrained": before}
        run.log.write(record)
        run.log.say(
            f"  accuracy of {record['source']}: [bold]{judged['accuracy']:.1%}[/bold] of {record['samples']} samples "
            f"(judge on real images {judged['judge_on_real']:.1%}, shuffled captions {judged['shuffled_captions']:.1%}, untrained model {before or 0:.1%})"
        )
    with leg.still():
        probed = probe(run.family, leg.model, probe_batches(run.selections, run.shapes(stage)), leg.precision, plan.seed)
    leg.note_released(leg.rest.aside())
    encoded = leg.encoded()
    run.log.write({**stage_event(leg), "state": "end", "seconds": round(leg.seconds_before + time.monotonic() - leg.began, 3), "encoded": encoded})
    if said := [f"{made:,} {what} encoded, {kept:,} found" for what, (kept, made) in encoded.items() if kept or made]:
        run.log.say(f"  cache so far in this launch: {'; '.join(said)}")
    if leg.index + 1 == len(plan.stages):
        say_time_taken(run)
    run.log.now("saving, and writing the report")
    save_leg(leg, finished=True, probed=probed)
    run.report()


def _write_previews(leg: Leg, file: Path, shown: Sequence[Preview]) -> list[dict[str, Any]]:
    """Write the sheet of a stage's previews, and its tiles; gives what metrics.jsonl says of the tiles."""
    file.parent.mkdir(exist_ok=True)
    write_image(file, sheet(shown))
    return write_tiles(leg.run.folder, f"{leg.index + 1}-{leg.stage.name}", shown, base=leg.run.base_name(leg.stage))


_LEAST_TO_ESTIMATE = 10_000_000  # parameters of a transformer below which nobody asks whether it fits, and a run takes no second to find out


def _log_memory(leg: Leg) -> None:
    """Log the most memory that the stage took until now in this launch, and what it was estimated at: a process on the CPU may keep much of what was freed besides."""
    run, device = leg.run, leg.run.accelerator.device
    peak = peak_bytes(device)
    if peak is not None:
        peak = max(peak, leg.most_bytes)
    parameters = sum(parameter.numel() for parameter in leg.model.parameters())
    if not run.accelerator.is_main_process or peak is None:
        return
    record = {"event": "memory", "stage": leg.stage.name, "step": leg.step, "kind": "peak", "peak_bytes": peak - leg.held_before}
    if parameters >= _LEAST_TO_ESTIMATE and not run.engine.is_sharded:
        found = run_estimate(run.plan, leg.index, leg.mixture, device, run.accelerator.num_processes)
        record |= {"estimated_bytes": found.peak, "estimated_encoder_bytes": found.encoders}
    run.log.write(record)
