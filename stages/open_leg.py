"""Open a leg: build a stage from what the last one handed on, or from its own newest checkpoint; measure the handoff; say what will happen."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.table import Table
from torch import Tensor

from mixing.keys import key
from stages.adapter import TargetError, load_adapter_weights, lora_layers
from stages.attention import NoSuchAttention, name_attention
from stages.checkpoint import Checkpoint, read_checkpoint, step_folder, write_checkpoint
from stages.compiled import compile_blocks
from stages.dropout import add_dropout
from stages.encode import kept_latents
from stages.engine import Training
from stages.evaluate_leg import evaluate_if_due, evaluate_leg
from stages.evaluations import rows_file
from stages.explain import byte_words
from stages.feed import stage_mixture
from stages.follower import changes_every, changes_of, open_follower
from stages.guard import Guard
from stages.handoff import MERGED, Baton, HandedOn, build_model, carried, cause_of_change, deltas, exact_within, hand_on, probe, probe_batches, probed_names, stage_changes
from stages.leg import Leg, TrainingError
from stages.measured import Measured
from stages.memory import EncoderRest, let_go, restart_peak
from stages.objective import Objective
from stages.offload import off_device_bytes
from stages.open_lanes import open_lanes
from stages.optim import Average, make_optimizer
from stages.placed import DEFAULT, newest, placed_adapters
from stages.plan import Stage
from stages.precision import StagePrecision
from stages.reader import PlanError
from stages.recomputation import recomputation_words, recompute
from stages.resolved import objective_words, quantised, resolution_words, resolved_rate, resolved_storage, step_words
from stages.run import Run
from stages.sampling import JudgeError
from stages.sharing import numbers, shared_like
from stages.stage_event import stage_event
from stages.untrained import say_size, untrained
from stages.window import Window


def open_leg(run: Run, index: int, stage: Stage) -> Leg:
    """Build a stage from what the last one handed on, or from its own newest checkpoint.

    Raises PlanError where plan, data and model do not fit, and Stopped if a signal comes while something is measured.
    """
    device, place = run.accelerator.device, f"stages[{index}]"
    run.log.now(f"building stage '{stage.name}'")
    checkpoint, held = run.checkpoints[index], let_go(run.accelerator.device)
    try:
        followed = checkpoint.state["adaptive"] if checkpoint else None
        mixture = stage_mixture(
            stage,
            run.selections,
            run.sizes,
            seed=run.plan.seed,
            drawn_before=run.drawn_before(),
            latents=kept_latents(run.family),
            changes=changes_of(followed),
            every=changes_every(run.plan, stage),
        )
        follower = open_follower(run.plan, stage, mixture, run.selections, followed)
        lanes = open_lanes(run, mixture, checkpoint or run.last)
    except ValueError as error:
        raise PlanError.at(place, str(error)) from None
    try:
        base = untrained(run, stage)
        if not checkpoint and (run.shapes(stage), quantised(stage)) not in {(run.shapes(earlier), quantised(earlier)) for earlier in run.plan.stages[:index]}:
            record = {"event": "eval", "stage": "", "step": 0, "kind": "base", "weights": "raw", "seconds": round(base.seconds, 3)}
            run.log.write({**record, "sources": base.measured.summary(None, None)})
            if base.quality is not None:
                run.log.write({"event": "quality", "stage": "", "step": 0, "sources": base.quality.summary(None, None)})
        handed = _handed_on(run, index, stage, checkpoint)
        baton = handed.baton
        model, whole = build_model(run.family, run.plan, stage, place, baton, run.engine.loads_on)
        others = carried(run.plan, stage, baton.adapter or {})
        if checkpoint and stage.train != "full":
            weights = checkpoint.tensors("adapter")
            others = carried(run.plan, stage, weights)
            load_adapter_weights(model, {name: value for name, value in weights.items() if name not in others}, str(checkpoint.folder))
        drawing = add_dropout(model, placed_adapters(run.plan, index), whole.values())
        attentions = name_attention(model, stage.attention)
        every = recompute(model, stage.checkpointing, device)
        compiled = compile_blocks(model, stage.compile)
    except (TargetError, JudgeError) as error:
        raise PlanError.at("", str(error)) from None
    except NoSuchAttention as error:
        raise PlanError.at(f"{place}.attention", str(error)) from None
    precision, stage_key = StagePrecision(stage.precision, device), key(run.plan.seed, "stage", stage.name)
    run.processes.wait()  # a machine may have had to fetch the model first
    training = run.engine.train(model, whole, lambda parameters: make_optimizer(parameters, stage.optimizer), precision)
    average = None
    if stage.ema is not None:
        with training.gathered():
            average = Average(training.trainable, stage.ema)
    if checkpoint:
        training.load_optimizer_state(checkpoint.tensors("optimizer"))
        if average:
            average.load(checkpoint.tensors("ema"))
            average.updates = int(checkpoint.state["ema_updates"])
        precision.load_scale(checkpoint.state["scaler"])
    kept: list[str] = []
    if run.last and not checkpoint:
        kept = _keep(run.last, stage, training, average)
    guard = Guard(stage.guard, scales=stage.precision == "fp16")
    if checkpoint:
        guard.load(checkpoint.state["guard"])
    restart_peak(device)  # what loading took is over
    leg = Leg(
        run=run,
        index=index,
        stage=stage,
        base_file=baton.base,
        carried=others,
        drawing=drawing,
        mixture=mixture,
        lanes=lanes,
        precision=precision,
        model=model,
        training=training,
        average=average,
        key=stage_key,
        objective=Objective(run.family, stage, stage_key, precision.dtype, mixture.images_before(stage.steps)),
        follower=follower,
        rest=EncoderRest(run.family),
        step=checkpoint.step if checkpoint else 0,
        first_step=checkpoint.step if checkpoint else 0,
        held_before=held,
        images=dict(checkpoint.state["images"]) if checkpoint and run.accelerator.is_main_process else {},
        tokens=dict(checkpoint.state["tokens"]) if checkpoint and run.accelerator.is_main_process else {},
        levels=list(checkpoint.state["levels"]) if checkpoint and run.accelerator.is_main_process else [0] * len(mixture.levels),
        to_evaluate=bool(checkpoint.state["to_evaluate"]) if checkpoint else False,
        named_rows={(name, row) for name, rows in checkpoint.state["bad"].items() for row in rows} if checkpoint else set(),
        bad={name: dict(rows) for name, rows in checkpoint.state["bad"].items()} if checkpoint else {},
        skipped=int(checkpoint.state["skipped"]) if checkpoint else 0,
        skipped_in_a_row=int(checkpoint.state["skipped_in_a_row"]) if checkpoint else 0,
        guard=guard,
        seconds_before=float(checkpoint.state["seconds"]) if checkpoint else 0.0,
        began=time.monotonic(),
        window=Window(time.monotonic()),
        base=base.measured,
        start=None,
    )
    if checkpoint:
        damaged: list[str] = []
        leg.start = Measured.load(rows_file(run.folder, index, stage.name, None), damaged.append)
        if leg.start is None and follower is not None:
            raise PlanError.at(place, f"its shares follow evaluations that are gone or damaged, or that a former version made at other noise levels; delete {run.stage_folder(index)} to train that stage anew")
        for message in damaged:
            run.log.warn(f"{message}; changes since the stage began are left out", stage.name, checkpoint.step)
    else:
        show_stage(leg)
        if index == 0 and run.size is not None:
            say_size(run, run.size)
        if every:
            run.log.say(f"  activations of {recomputation_words(every)} are computed again for the gradient")
        if attentions:
            run.log.say(f"  attention by {stage.attention}")
        if compiled:
            run.log.say(f"  {compiled} blocks are compiled at the first step, which takes a while")
        if stage.offload:
            run.log.say(f"  {byte_words(off_device_bytes(model))} of the base's weights are kept on the CPU, and come to the device for each product")
        run.log.write({**stage_event(leg), "state": "start", "recomputed_every": every, "compiled_blocks": compiled, "attention": stage.attention, "off_device_bytes": off_device_bytes(model)})
        if handed.errors and run.last is None:  # of a start there is nothing to compare the function with
            record = {"event": "handoff", "from": run.baton.origin, "to": stage.name, "kept": [_carried(leg)], "exact": False, "cause": "the adapter was shrunk"}
            run.log.write({**record, "way": "shrink", "errors": dict(handed.errors), "error": say_errors(leg, handed.errors)})
        if run.last:
            run.log.write({"event": "memory", "stage": stage.name, "step": 0, "kind": "between", "bytes": held})
            measure_handoff(leg, kept, base.outputs, handed)
        leg.start = evaluate_leg(leg, "start")
    evaluate_if_due(leg)  # what a signal has broken off before
    leg.window = Window(time.monotonic())
    run.log.begin_stage(index, leg.step, run.sizes.multiple)
    return leg


def _keep(last: Checkpoint, stage: Stage, training: Training, average: Average | None) -> list[str]:
    """Carry over what `handoff` asks for beside the weights; returns what was kept, for the log. Raises PlanError if nothing that was asked for could be."""
    kept: list[str] = []
    if stage.handoff.optimizer != "reset":
        fresh, trainable = training.load_optimizer_state(last.tensors("optimizer"), zero_first=stage.handoff.optimizer == "keep_v"), training.trainable
        if len(fresh) == len(trainable):
            raise PlanError.at(f"stages.{stage.name}.handoff.optimizer", f"'{stage.handoff.optimizer}' finds no state: stage '{last.state['stage']}' trained other weights; write 'reset'")
        kept.append(f"optimizer of {len(trainable) - len(fresh)} of {len(trainable)} weights ({stage.handoff.optimizer})")
    if stage.handoff.ema == "keep" and average:
        saved = last.tensors("ema") if last.has("ema") else {}
        agreeing = [name for name, value in average.values.items() if name in saved and saved[name].shape == value.shape]
        for name in agreeing:
            average.values[name].copy_(shared_like(saved[name], average.values[name]))
        kept.append(f"average of {len(agreeing)} weights")
    return kept


def _handed_on(run: Run, index: int, stage: Stage, checkpoint: Checkpoint | None) -> HandedOn:
    """What a stage begins with, or goes on from. A base that the adapter was folded into is written once, into the stage's folder.

    Raises PlanError where a rank does not fit what `start` names.
    """
    if checkpoint and stage.train == "full":
        return HandedOn(Baton(checkpoint.file("transformer"), None, stage.name))
    folder = run.stage_folder(index) / MERGED
    if checkpoint:
        # A checkpoint brings its adapter itself. Its base is made again, from the same parts, where it was damaged.
        if stage.handoff.adapter != "merge" or run.baton.adapter is None:
            return HandedOn(Baton(run.baton.base, None, stage.name))
        try:
            return HandedOn(Baton(read_checkpoint(step_folder(folder, 0)).file("transformer"), None, stage.name))
        except ValueError as error:
            run.log.warn(f"{error}; it is made again", stage.name, checkpoint.step)
    try:
        handed = hand_on(run.family, run.plan, stage, run.baton)
    except ValueError as error:
        raise PlanError.at(f"stages[{index}].handoff", str(error)) from None
    if handed.merged is None:
        return handed
    if run.accelerator.is_main_process:
        merged, origin = handed.merged, run.baton.origin
        run.room.must(f"the folder of '{stage.name}'", lambda: folder.parent.mkdir(exist_ok=True))
        size = sum(value.nbytes for value in merged.values())
        run.room.must("the base with the adapter folded in", lambda: write_checkpoint(folder, 0, {"transformer": merged}, {"stage": stage.name, "merged": origin}), size=size)
    run.processes.wait()
    return HandedOn(Baton(step_folder(folder, 0) / "transformer.safetensors", None, run.baton.origin))


def say_errors(leg: Leg, errors: Mapping[str, float]) -> dict[str, float]:
    """Print by how much shrinking changed the layers' products; gives the worst and the mean, for the log."""
    said = {"worst": max(errors.values()), "mean": sum(errors.values()) / len(errors)}
    rank = newest(placed_adapters(leg.run.plan, leg.index)).settings.rank
    leg.run.log.say(f"  shrunk to rank {rank}: a layer's product changed by {said['worst']:.1%} of itself at worst, {said['mean']:.1%} on average")
    return said


def _carried(leg: Leg) -> str:
    """In which form the weights were handed on, in words."""
    placed = placed_adapters(leg.run.plan, leg.index)
    rank = newest(placed).settings.rank
    return {
        "continue": "weights",
        "grow": f"the adapter, grown to rank {rank}",
        "shrink": f"the adapter, shrunk to rank {rank}",
        "stack": f"the adapter, frozen, and a fresh one of rank {rank} beside it",
        "merge": "the adapter, folded into the base, and a fresh one" + (f" of rank {rank}" if len(placed) == 1 else " in each place"),
    }[leg.stage.handoff.adapter]


def measure_handoff(leg: Leg, kept: list[str], base_outputs: Mapping[str, Tensor], handed: HandedOn) -> None:
    """Compare the new stage's model with what the last one gave on fixed inputs. Raises TrainingError if it must be the same and is not."""
    run, last = leg.run, leg.run.last
    assert last is not None
    before = run.plan.stages[int(last.state["index"])]
    cause, kept = cause_of_change(before, leg.stage), [_carried(leg), *kept]
    # Another expert is another transformer: what the last stage's gave says nothing of this one.
    old = last.tensors("probe") if before.expert == leg.stage.expert else {}
    with leg.still():
        outputs = probe(run.family, leg.model, probe_batches(run.selections, run.shapes(before), probed_names(old)), leg.precision, run.plan.seed)
    alike = run.shapes(before) == run.shapes(leg.stage) and quantised(before) == quantised(leg.stage)
    base = base_outputs if alike else untrained(run, before).outputs  # what was learnt is counted from the base that it was learnt over
    delta = deltas(outputs, old, base)
    record = {"event": "handoff", "from": before.name, "to": leg.stage.name, "kept": kept, "delta": delta, "exact": cause is None, "cause": cause, "changes": stage_changes(before, leg.stage)}
    if leg.stage.handoff.adapter != "continue":
        record["way"] = leg.stage.handoff.adapter
    if handed.errors:
        record |= {"errors": dict(handed.errors), "error": say_errors(leg, handed.errors)}
    run.log.write(record)
    if not delta and before.expert != leg.stage.expert:
        run.log.say(f"  handed on from '{before.name}': {', '.join(kept)} ({cause})")
        return
    if not delta:
        run.log.warn(f"handoff from '{before.name}': the rows that it was measured on are gone, so the change of the function is not known", leg.stage.name, 0)
        return
    largest = max(delta.values())
    run.log.say(f"  handed on from '{before.name}': {', '.join(kept)}; the function changed by {largest:.1e} of what was learnt" + (f" ({cause})" if cause else ""))
    if cause is not None or leg.stage.precision != "fp32":
        return
    for t, most in exact_within(outputs, old, base, same_launch=run.last_is_new).items():
        if not delta[t] <= most:
            raise TrainingError(f"handoff from '{before.name}' to '{leg.stage.name}': the function changed by {delta[t]:.2e} of what was learnt at t = {t}, and nothing in the plan changes it (at most {most:.2g})")


def _trains(leg: Leg) -> str:
    """What trains, in words: `every weight`, `the adapter, 19 layers`, `3 layers of the adapter`, `adapter 'core', 19 layers`."""
    if leg.stage.train == "full":
        return "every weight"
    training = {id(parameter) for parameter in leg.training.trainable.values()}
    layers = lora_layers(leg.model)
    of = {name: [bool({id(layer.lora_A[name].weight), id(layer.lora_B[name].weight)} & training) for layer in layers.values() if name in layer.lora_A] for name in placed_adapters(leg.run.plan, leg.index)}
    said = []
    for name, trains in of.items():
        called = "the adapter" if name == DEFAULT else f"adapter '{name}'"
        if any(trains):
            said.append(f"{called}, {len(trains)} layers" if all(trains) else f"{sum(trains)} layers of {called}")
    return " and ".join(said)


def show_stage(leg: Leg) -> None:
    """Print what a stage will do: its settings, what trains, and what each source gives."""
    stage, run = leg.stage, leg.run
    rate = resolved_rate(stage)
    trained = sum(numbers(parameter) for parameter in leg.training.trainable.values())
    what = _trains(leg)
    by = "" if stage.optimizer.name == "adamw" else f", by {stage.optimizer.name}"
    run.log.say("")
    run.log.say(
        f"[bold]stage {leg.index + 1}/{len(run.plan.stages)} {stage.name}[/bold]: {stage.steps:,} steps of {step_words(stage)} at {resolution_words(stage)} pixels, "
        f"in {stage.precision} over a base in {resolved_storage(stage)}; trains {what} ({trained:,} numbers) at {rate.peak:g}, {rate.schedule}{by}"
    )
    if asks := objective_words(stage):
        run.log.say(f"  {asks}")
    if run.engine.is_sharded and (held := run.engine.held_share(leg.model)) < 1:
        run.log.say(f"  sharded by {run.engine.words}: this process holds {held:.1%} of the model's numbers")
    table = Table(box=None, pad_edge=True, header_style="dim")
    for column in ("source", "rows", "share", "images", "epochs"):
        table.add_column(column, justify="left" if column == "source" else "right")
    total = leg.mixture.images_before(stage.steps)
    for name, share in leg.mixture.asked().items():
        rows = None if run.selections[name].stream else run.selections[name].size
        table.add_row(name, "a stream" if rows is None else f"{rows:,}", f"{share:.1%}", f"{share * total:,.0f}", "" if rows is None else f"{share * total / rows:.1f}")
    run.log.show(table)

