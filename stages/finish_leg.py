"""Finish a leg: the stage's last duties, which are to evaluate, sample, save, report, and let go of the model."""

from __future__ import annotations

import time

from stages.checkpoint import Checkpoint, read_checkpoint, step_folder
from stages.compiled import forget_compiled
from stages.estimate import run_estimate
from stages.handoff import probe, probe_batches
from stages.leg import Leg
from stages.memory import peak_bytes
from stages.report import write_report
from stages.sampling import previews, sheet
from stages.save_leg import save_leg
from stages.stage_event import stage_event


def finish_leg(leg: Leg) -> Checkpoint:
    """Carry them out. Returns the stage's last checkpoint."""
    run, stage, plan = leg.run, leg.stage, leg.run.plan
    run.log.end_bar()
    leg.lanes.close()
    _log_memory(leg)
    leg.evaluate("end")
    with leg.averaged():
        sampler = run.sampler(stage, leg.precision, leg.carried) if plan.previews.rows or run.judge is not None else None
        if plan.previews.rows and sampler is not None:
            shown = previews(
                run.family,
                leg.model,
                run.selections,
                rows=plan.previews.rows,
                shapes=run.shapes(stage),
                sampler=sampler,
                seed=plan.seed,
                accelerator=run.accelerator,
                in_step=run.engine.shared_out(leg.model),
            )
            if run.accelerator.is_main_process and shown:
                file = run.folder / "previews" / f"{leg.index + 1}-{stage.name}.png"
                file.parent.mkdir(exist_ok=True)
                sheet(shown).save(file)
                run.log.write({"event": "preview", "stage": stage.name, "step": leg.step, "file": str(file.relative_to(run.folder))})
        judged = run.judged(leg.model, stage, sampler) if sampler is not None else None
    if judged and plan.evaluate.accuracy:
        untrained = run.base(stage)[2]
        record = {"event": "accuracy", "stage": stage.name, "step": leg.step, "source": plan.evaluate.accuracy.source, "samples": plan.evaluate.accuracy.samples, **judged, "untrained": untrained}
        run.log.write(record)
        run.log.say(
            f"  accuracy of {record['source']}: [bold]{judged['accuracy']:.1%}[/bold] of {record['samples']} samples "
            f"(judge on real images {judged['judge_on_real']:.1%}, shuffled captions {judged['shuffled_captions']:.1%}, untrained model {untrained or 0:.1%})"
        )
    with leg.still():
        probed = probe(run.family, leg.model, probe_batches(run.selections, run.shapes(stage)), leg.precision, plan.seed)
    leg.note_released(leg.rest.aside())
    encoded = leg.encoded()
    run.log.write({**stage_event(leg), "state": "end", "seconds": round(leg.seconds_before + time.monotonic() - leg.began, 3), "encoded": encoded})
    if said := [f"{made:,} {what} encoded, {kept:,} found" for what, (kept, made) in encoded.items() if kept or made]:
        run.log.say(f"  cache so far in this launch: {'; '.join(said)}")
    save_leg(leg, finished=True, probed=probed)
    if run.accelerator.is_main_process:
        write_report(run.folder)
    run.processes.wait()
    run.engine.release(leg.model)
    run.accelerator.free_memory()
    if stage.compile:
        forget_compiled()
    return read_checkpoint(step_folder(run.stage_folder(leg.index), stage.steps))


_LEAST_TO_ESTIMATE = 10_000_000  # parameters of a transformer below which nobody asks whether it fits, and a run takes no second to find out


def _log_memory(leg: Leg) -> None:
    """Log the most memory that the stage took until now in this launch, and what it was estimated at: a process on the CPU may keep much of what was freed besides."""
    run, device = leg.run, leg.run.accelerator.device
    peak = peak_bytes(device)
    parameters = sum(parameter.numel() for parameter in leg.model.parameters())
    if not run.accelerator.is_main_process or peak is None:
        return
    record = {"event": "memory", "stage": leg.stage.name, "step": leg.step, "kind": "peak", "peak_bytes": peak - leg.held_before}
    if parameters >= _LEAST_TO_ESTIMATE and not run.engine.is_sharded:
        found = run_estimate(run.plan, leg.index, leg.mixture, device, run.accelerator.num_processes)
        record |= {"estimated_bytes": found.peak, "estimated_encoder_bytes": found.encoders}
    run.log.write(record)
