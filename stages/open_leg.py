"""Open a leg: build a stage from what the last one handed on, or from its own newest checkpoint; measure the handoff; say what will happen."""

from __future__ import annotations

import time

import torch
from rich.table import Table
from torch import Tensor, nn

from mixing.keys import key
from stages.adapter import TargetError, load_adapter_weights, lora_layers
from stages.checkpoint import Checkpoint
from stages.encode import kept_latents
from stages.evaluate import Measured
from stages.feed import stage_mixture
from stages.handoff import EXACT, build_model, cause_of_change, deltas, probe, probe_batches, probed_names, stage_changes
from stages.leg import Leg, TrainingError, Window
from stages.open_lanes import open_lanes
from stages.optim import Average, load_optimizer_state, make_optimizer
from stages.plan import Stage
from stages.precision import StagePrecision
from stages.reader import PlanError
from stages.resolved import resolution_words, resolved_rate, resolved_storage, step_words
from stages.run import Run
from stages.sampling import JudgeError
from stages.stage_event import stage_event


def open_leg(run: Run, index: int, stage: Stage) -> Leg:
    """Build a stage from what the last one handed on, or from its own newest checkpoint. Raises PlanError where plan, data and model do not fit."""
    device, place = run.accelerator.device, f"stages[{index}]"
    checkpoint = run.checkpoints[index]
    try:
        mixture = stage_mixture(stage, run.selections, run.sizes, seed=run.plan.seed, drawn_before=run.drawn_before(), latents=kept_latents(run.family))
        lanes = open_lanes(run, mixture, checkpoint or run.last)
    except ValueError as error:
        raise PlanError.at(place, str(error)) from None
    try:
        began = time.monotonic()
        base, base_outputs, _ = run.base(stage)
        if not checkpoint and run.shapes(stage) not in {run.shapes(earlier) for earlier in run.plan.stages[:index]}:
            seconds = round(time.monotonic() - began, 3)
            run.log.write({"event": "eval", "stage": "", "step": 0, "kind": "base", "weights": "raw", "seconds": seconds, "sources": base.summary(None, None)})
        baton = run.baton
        if checkpoint and stage.train == "full":
            baton = type(baton)(checkpoint.file("transformer"), None, stage.name)
        model, trainable = build_model(run.family, run.plan, stage, place, baton)
        if checkpoint and stage.train != "full":
            load_adapter_weights(model, checkpoint.tensors("adapter"), str(checkpoint.folder))
    except (TargetError, JudgeError) as error:
        raise PlanError.at("", str(error)) from None
    precision = StagePrecision(stage.precision, device)
    average = Average(trainable, stage.ema) if stage.ema is not None else None
    optimizer = make_optimizer(trainable, stage.optimizer)
    if checkpoint:
        load_optimizer_state(optimizer, trainable, checkpoint.tensors("optimizer"))
        if average:
            average.values = {name: value.to(device) for name, value in checkpoint.tensors("ema").items()}
            average.updates = int(checkpoint.state["ema_updates"])
        if precision.mode == "fp16":
            precision.scaler.load_state_dict(checkpoint.state["scaler"])
    kept: list[str] = []
    if run.last and not checkpoint:
        kept = _keep(run.last, stage, optimizer, trainable, average)
    leg = Leg(
        run=run,
        index=index,
        stage=stage,
        mixture=mixture,
        lanes=lanes,
        precision=precision,
        model=model,
        wrapped=run.accelerator.prepare_model(model),
        trainable=trainable,
        optimizer=optimizer,
        average=average,
        key=key(run.plan.seed, "stage", stage.name),
        step=checkpoint.step if checkpoint else 0,
        first_step=checkpoint.step if checkpoint else 0,
        images=dict(checkpoint.state["images"]) if checkpoint and run.accelerator.is_main_process else {},
        tokens=dict(checkpoint.state["tokens"]) if checkpoint and run.accelerator.is_main_process else {},
        levels=list(checkpoint.state["levels"]) if checkpoint and run.accelerator.is_main_process else [0] * len(mixture.levels),
        bad={name: dict(rows) for name, rows in checkpoint.state["bad"].items()} if checkpoint else {},
        seconds_before=float(checkpoint.state["seconds"]) if checkpoint else 0.0,
        began=time.monotonic(),
        window=Window(time.monotonic()),
        base=base,
        start=None,
    )
    started = run.folder / "evaluations" / f"{index + 1}-{stage.name}-start.json"
    if checkpoint:
        leg.start = Measured.load(started)
    else:
        show_stage(leg)
        run.log.write({**stage_event(leg), "state": "start"})
        if run.last:
            measure_handoff(leg, kept, base_outputs)
        leg.start = leg.evaluate("start")
        if run.accelerator.is_main_process:
            leg.start.save(started)
    leg.window = Window(time.monotonic())
    run.log.start_bar(stage.name, leg.step, stage.steps)
    return leg


def _keep(last: Checkpoint, stage: Stage, optimizer: torch.optim.Optimizer, trainable: dict[str, nn.Parameter], average: Average | None) -> list[str]:
    """Carry over what `handoff` asks for; returns what was kept, for the log. Raises ValueError if nothing that was asked for could be."""
    kept = ["weights"]
    if stage.handoff.optimizer != "reset":
        fresh = load_optimizer_state(optimizer, trainable, last.tensors("optimizer"), zero_first=stage.handoff.optimizer == "keep_v")
        if len(fresh) == len(trainable):
            raise PlanError.at(f"stages.{stage.name}.handoff.optimizer", f"'{stage.handoff.optimizer}' finds no state: stage '{last.state['stage']}' trained other weights; write 'reset'")
        kept.append(f"optimizer of {len(trainable) - len(fresh)} of {len(trainable)} weights ({stage.handoff.optimizer})")
    if stage.handoff.ema == "keep" and average:
        saved = last.tensors("ema") if last.has("ema") else {}
        agreeing = [name for name, value in average.values.items() if name in saved and saved[name].shape == value.shape]
        for name in agreeing:
            average.values[name].copy_(saved[name])
        kept.append(f"average of {len(agreeing)} weights")
    return kept


def measure_handoff(leg: Leg, kept: list[str], base_outputs: dict[str, Tensor]) -> None:
    """Compare the new stage's model with what the last one gave on fixed inputs. Raises TrainingError if it must be the same and is not."""
    run, last = leg.run, leg.run.last
    assert last is not None
    before = run.plan.stages[int(last.state["index"])]
    cause = cause_of_change(before, leg.stage)
    old = last.tensors("probe")
    outputs = probe(run.family, leg.model, probe_batches(run.selections, run.shapes(before), probed_names(old)), leg.precision, run.plan.seed)
    base = run.base(before)[1] if run.shapes(before) != run.shapes(leg.stage) else base_outputs
    delta = deltas(outputs, old, base)
    run.log.write(
        {"event": "handoff", "from": before.name, "to": leg.stage.name, "kept": kept, "delta": delta, "exact": cause is None, "cause": cause, "changes": stage_changes(before, leg.stage)}
    )
    if not delta:
        run.log.warn(f"handoff from '{before.name}': the rows that it was measured on are gone, so the change of the function is not known", leg.stage.name, 0)
        return
    largest = max(delta.values())
    run.log.say(f"  handed on from '{before.name}': {', '.join(kept)}; the function changed by {largest:.1e} of what was learnt" + (f" ({cause})" if cause else ""))
    if cause is None and leg.stage.precision == "fp32" and not largest <= EXACT:
        raise TrainingError(f"handoff from '{before.name}' to '{leg.stage.name}': the function changed by {largest:.2e} of what was learnt, and nothing in the plan changes it (at most {EXACT:g})")


def show_stage(leg: Leg) -> None:
    """Print what a stage will do: its settings, what trains, and what each source gives."""
    stage, run = leg.stage, leg.run
    rate = resolved_rate(stage)
    trained = sum(parameter.numel() for parameter in leg.trainable.values())
    what = f"the adapter, {len(lora_layers(leg.model))} layers" if stage.train == "adapter" else "every weight" if stage.train == "full" else f"{len(leg.trainable) // 2} layers of the adapter"
    run.log.say("")
    run.log.say(
        f"[bold]stage {leg.index + 1}/{len(run.plan.stages)} {stage.name}[/bold]: {stage.steps:,} steps of {step_words(stage)} at {resolution_words(stage)} pixels, "
        f"in {stage.precision} over a base in {resolved_storage(stage)}; trains {what} ({trained:,} numbers) at {rate.peak:g}, {rate.schedule}"
    )
    table = Table(box=None, pad_edge=True, header_style="dim")
    for column in ("source", "rows", "share", "images", "epochs"):
        table.add_column(column, justify="left" if column == "source" else "right")
    total = leg.mixture.images_before(stage.steps)
    for name, share in leg.mixture.asked.items():
        rows = None if run.selections[name].stream else run.selections[name].size
        table.add_row(name, "a stream" if rows is None else f"{rows:,}", f"{share:.1%}", f"{share * total:,.0f}", "" if rows is None else f"{share * total / rows:.1f}")
    run.log.show(table)

