"""Evaluate a leg: measure held-out rows at its start, its end and in between, keep and show what was found, and let adaptive shares follow."""

from __future__ import annotations

import time

from rich.table import Table

from stages.evaluate import evaluate
from stages.evaluations import rows_file, thin_out
from stages.leg import Leg
from stages.measured import Measured
from stages.resolved import resolved_rate


def evaluate_leg(leg: Leg, kind: str) -> Measured:
    """Measure the held-out rows and log them. kind: start, during or end."""
    began = time.monotonic()
    run = leg.run
    run.log.now("measuring held-out rows")
    with leg.averaged() as weights:
        measured = evaluate(
            run.family,
            leg.model,
            run.selections,
            shapes=run.shapes(leg.stage),
            precision=leg.precision,
            seed=run.plan.seed,
            accelerator=run.accelerator,
            unreadable=leg.note_bad,
            windows=leg.objective.windows,
            t_range=run.t_range(leg.stage),
            rows=run.rows,
            in_step=run.aside(leg.model),
        )
    summary = measured.summary(leg.base, leg.start)
    if run.accelerator.is_main_process:
        file = rows_file(run.folder, leg.index, leg.stage.name, None if kind == "start" else leg.step)
        run.room.must(f"the evaluation {file.name}", lambda: measured.save(file))
        if kind == "during" and run.plan.evaluate.every:
            every = run.plan.evaluate.every
            run.room.must("what older evaluations leave", lambda: thin_out(run.folder, leg.index, leg.stage.name, leg.step, every))
    run.processes.wait()  # for the main one may have to wait for room, longer than a collective waits for it
    run.log.write({"event": "eval", "stage": leg.stage.name, "step": leg.step, "kind": kind, "weights": weights, "seconds": round(time.monotonic() - began, 3), "sources": summary})
    if kind != "start" and summary:
        table = Table(box=None, header_style="dim")
        table.add_column("held-out loss")
        for column in (f"after step {leg.step}", "since the stage began", "since the base"):
            table.add_column(column, justify="right")
        for name, entry in summary.items():
            changes = [f"{entry[since]:+.4f} ± {entry[f'{since}_error']:.4f}" if since in entry else "" for since in ("since_start", "since_base")]
            table.add_row(name, f"{entry['loss']:.4f}", *changes)
        run.log.show(table)
    leg.note_released(leg.rest.aside())
    leg.evaluation_seconds = time.monotonic() - began
    leg.window.began += leg.evaluation_seconds  # it is no time of training
    return measured


def evaluate_if_due(leg: Leg) -> None:
    """Measure held-out rows where it is due, and let shares follow. Raises Stopped if a signal breaks it off; then it still is."""
    if leg.to_evaluate:
        _follow(leg, evaluate_leg(leg, "during"))
        leg.to_evaluate = False


def _follow(leg: Leg, measured: Measured) -> None:
    """Let an adaptive mix follow an evaluation; steps from here on are drawn by the shares that it leads to."""
    if leg.follower is None:
        return
    run, stage = leg.run, leg.stage
    before = leg.follower.following.shares
    warmup = resolved_rate(stage).warmup or 0
    decision = leg.follower.after(measured, leg.mixture, leg.step, warming=leg.step - leg.skipped < warmup)
    shares = decision.following.shares
    record = {"event": "shares", "stage": stage.name, "step": leg.step, "changed": decision.changed, "why": decision.why, "shares": dict(shares), "before": dict(before)}
    run.log.write({**record, "signals": dict(decision.signals), "at_limit": list(decision.at_limit)})
    if not decision.changed:
        return
    moved = ", ".join(f"{name} {before[name]:.1%} -> {share:.1%}" for name, share in shares.items())
    run.log.say(f"  shares from here on: {moved} ({decision.why})")
    leg.mixture = leg.mixture.changed(leg.step, decision.shares)
