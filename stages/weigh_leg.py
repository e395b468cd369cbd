"""Weigh a leg: before the optimizer makes a step, all processes agree on whether its losses and its gradient are numbers, and name the rows where they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from torch import Tensor

from stages.guard import COUNTED, LASTING, Verdict
from stages.leg import Leg, TrainingError
from stages.weighed import Row, Weighed

MOST_LISTED = 64
"""Rows of a step that metrics.jsonl names."""
_MOST_NAMED = 3  # in a line on the console
_MOST_SAID = 10  # lines of one launch of a stage
_OF_A_SPIKE = 8  # rows with the largest losses that a spike names


def weigh_leg(leg: Leg, norm: Tensor) -> bool:
    """Whether the optimizer may make the step under way: on all processes the same. Every process takes part, and waits once for its device.

    norm: of the gradient, before it was clipped. Raises TrainingError, on all processes, if more steps were skipped than the plan lets pass.
    """
    run, step, weighed = leg.run, leg.step + 1, leg.weighed
    own = weighed.total(norm).tolist()
    norms, losses = run.stop.exchanged(run.accelerator, own)
    leg.norm = own[0]
    loss, length = losses / leg.step_images, norms / run.accelerator.num_processes
    verdict = leg.guard.judge(step, loss, length)
    leg.weighed = Weighed()
    if verdict.not_finite or verdict.spikes:
        everywhere = run.processes.gathered(weighed.rows())
        rows = _chosen([row for rows in everywhere for row in rows], verdict)
        _record(leg, step, verdict, loss, length, rows)
        # Of a stage without a step nothing would be learnt, however short it is.
        if not verdict.is_made and (leg.guard.is_over_limit or leg.skipped + 1 == leg.stage.steps):
            raise TrainingError(_over_limit(leg, step, verdict, rows))
    return verdict.is_made


def _chosen(rows: Sequence[Row], verdict: Verdict) -> list[Row]:
    """Those to be named: whose loss or latents are no numbers; else, of a gradient that is none, all; of a spike, those with the largest losses."""
    if "loss" in verdict.not_finite:
        return sorted((row for row in rows if row.what), key=lambda row: row.position)
    if verdict.not_finite:
        return sorted(rows, key=lambda row: row.position)
    return sorted(rows, key=lambda row: (-row.loss, row.position))[:_OF_A_SPIKE]


def _record(leg: Leg, step: int, verdict: Verdict, loss: float, norm: float, rows: Sequence[Row]) -> None:
    """Write the event, and of the first ones of a launch a line on the console."""
    log, guard = leg.run.log, leg.guard
    listed = [{"source": row.source, "key": row.key, "loss": _number(row.loss), **({"not_finite": row.what} if row.what else {})} for row in rows[:MOST_LISTED]]
    record: dict[str, Any] = {"event": "guard", "stage": leg.stage.name, "step": step, "skipped": not verdict.is_made, "not_finite": list(verdict.not_finite), "spikes": list(verdict.spikes)}
    usual = {name: guard.usual(name) for name in verdict.spikes}
    log.write({**record, "loss": _number(loss), "grad_norm": _number(norm), "usual": usual, "num_rows": len(rows), "rows": listed})
    leg.guard_said += 1
    if leg.guard_said <= _MOST_SAID:
        said = f"{_not_finite_words(leg, verdict, rows)}; the step is skipped, and the data goes on" if verdict.not_finite else _spike_words(leg, verdict, {"loss": loss, "gradient": norm}, usual, rows)
        log.say(f"[yellow]warning:[/yellow] step {step} of '{leg.stage.name}': {escape(said)}")
    elif leg.guard_said == _MOST_SAID + 1:
        log.say("[dim]further ones of this stage stand in metrics.jsonl, as events 'guard'[/dim]")


def _number(value: float) -> float | None:
    """A number as JSON has it."""
    return value if math.isfinite(value) else None


def _not_finite_words(leg: Leg, verdict: Verdict, rows: Sequence[Row]) -> str:
    """What is no number, and of which rows."""
    if "loss" not in verdict.not_finite:
        return f"its gradient is no number, though every loss is one; its rows were {_named(rows)}"
    if len(rows) == leg.step_images > 1:
        return f"all {len(rows)} losses are no numbers, those of {_named(rows)}"
    of_latents, of_loss = ([row for row in rows if row.what == what] for what in ("latents", "loss"))
    said = [f"the latents of {_named(of_latents)} are no numbers"] if of_latents else []
    if of_loss:
        said.append(f"the loss of {_named(of_loss)} is no number" if len(of_loss) == 1 else f"the losses of {_named(of_loss)} are no numbers")
    return " and ".join(said)


def _spike_words(leg: Leg, verdict: Verdict, values: Mapping[str, float], usual: Mapping[str, float | None], rows: Sequence[Row]) -> str:
    """How far it stands above the usual, and in which rows."""
    names = {"loss": "its loss", "gradient": "its gradient's norm"}
    said = [f"{names[name]} is {values[name]:.4g}" + (f" ({mostly:.4g} is usual)" if (mostly := usual[name]) is not None else f", the {LASTING}th in a row so far above the others, which is taken for usual now") for name in verdict.spikes]
    largest = f"the largest losses are those of {_named(rows, with_loss=True)}"
    return f"{' and '.join(said)}; {largest}{'' if verdict.is_made else '; the step is skipped, and the data goes on'}"


def _named(rows: Sequence[Row], *, with_loss: bool = False) -> str:
    names = [f"{row.source}: {row.key}" + (f" ({row.loss:.4g})" if with_loss else "") for row in rows[:_MOST_NAMED]]
    return ", ".join(names) + (f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else "")


def _over_limit(leg: Leg, step: int, verdict: Verdict, rows: Sequence[Row]) -> str:
    """Why the run stops, and what to do."""
    stage, skips = leg.stage, leg.stage.guard.skips
    what = _not_finite_words(leg, verdict, rows) if verdict.not_finite else f"its largest losses are those of {_named(rows, with_loss=True)}"
    if leg.guard.is_over_limit:
        counted = f"{leg.guard.num_skipped} of the last {min(step, COUNTED)} steps were skipped, and guard.skips lets {skips or 'none'} pass"
    else:
        counted = f"all {step} steps of the stage were skipped"
    cures = {"fp32": "lower the rate", "fp16": "lower the rate, or write precision: bf16 or fp32"}.get(stage.precision, "lower the rate, or write precision: fp32")
    looked_at = "look at the model's own weights" if len(rows) == leg.step_images else "repair or remove the rows"
    return (
        f"stage '{stage.name}', step {step}: {what}; {counted}; {leg.run.room.standing()}. Once the cause is gone, or with a larger guard.skips, the same command goes on from there; else {looked_at}, "
        f"{cures}, and delete {leg.run.stage_folder(leg.index)} to train the stage anew. The events 'guard' of metrics.jsonl say which rows"
    )
