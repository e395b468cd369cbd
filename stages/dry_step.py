"""The dry step: each stage's largest micro-batch once forwards and backwards, on made-up images, before anything trains.

What does not fit into memory, and what leaves the range of the stage's precision, is known in the first minutes, not when the stage begins at hour nine. The model is
loaded for it and dropped, so no weight and no moment of the run changes.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from mixing.batch import MicroBatch
from mixing.keys import key
from mixing.reading import Images
from stages.adapter import TargetError
from stages.attention import NoSuchAttention, name_attention
from stages.dropout import add_dropout
from stages.encode import encode
from stages.engine import Engine, TorchTraining
from stages.evaluation_size import now
from stages.explain import byte_words
from stages.families.family import Family
from stages.feed import stage_mixture
from stages.handoff import Baton, build_model
from stages.largest import Largest, largest_micro_batch, made_up
from stages.objective import LeftOut, Objective
from stages.objectives.parts import losses
from stages.optim import Average, make_optimizer
from stages.placed import placed_adapters
from stages.plan import Plan, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError, RunError
from stages.recomputation import recompute
from stages.resolved import resolved_batch, resolved_storage
from stages.run import Run
from stages.sent import sent
from stages.shown import Shown

_STEPS = 2  # the second one has the optimizer's moments beside its activations


class OutOfMemory(RunError):
    """A stage's largest micro-batch, or its weights alone, do not fit into the device's memory."""


class NoNumbers(RunError):
    """What a stage computes for its largest micro-batch is not all numbers."""


def dry_steps(run: Run) -> None:
    """Make a dry step of every stage that is not finished, if the plan asks for it, or says nothing and there is a GPU.

    Of stages that differ in nothing that takes memory only the one with the most tokens is tried. Raises OutOfMemory, on all processes, if one of them has too little
    memory, NoNumbers if what one of them computes is none, and PlanError where plan, data and model do not fit.
    """
    device, processes = run.accelerator.device, run.accelerator.num_processes
    if not (run.plan.dry_step if run.plan.dry_step is not None else device.type == "cuda"):
        return
    left = [index for index, checkpoint in enumerate(run.checkpoints) if checkpoint is None or not checkpoint.state["finished"]]
    tried: dict[str, tuple[int, Largest]] = {}
    like: dict[int, str] = {}
    for index in left:
        stage = run.plan.stages[index]
        try:
            largest = largest_micro_batch(stage_mixture(stage, run.selections, run.sizes, seed=run.plan.seed, drawn_before={}), processes)
        except ValueError as error:
            raise PlanError.at(f"stages[{index}]", str(error)) from None
        alike = repr((stage.model_dump(include=_TAKES_MEMORY), resolved_storage(stage), placed_adapters(run.plan, index), bool(largest.signature.regions)))
        like[index], size = alike, largest.images * largest.tokens
        if alike not in tried or size > tried[alike][1].images * tried[alike][1].tokens:
            tried[alike] = index, largest
    for index, largest in sorted(tried.values(), key=lambda each: each[0]):
        stage = run.plan.stages[index]
        failed: RunError | None = None
        peak: int | None = None
        seconds = 0.0
        try:
            peak, seconds = dry_step(run.family, run.plan, index, largest, processes, run.engine if run.engine.is_sharded else None)
        except torch.OutOfMemoryError as error:
            failed = OutOfMemory(out_of_memory_words(stage, index, largest, str(error).split("\n", 1)[0]))
        except NoNumbers as error:
            failed = error
        except TargetError as error:
            raise PlanError.at("", str(error)) from None
        except NoSuchAttention as error:
            raise PlanError.at(f"stages[{index}].attention", str(error)) from None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        everywhere = run.processes.gathered(failed)
        if found := next(filter(None, everywhere), None):
            raise found
        own = [other for other, alike in like.items() if alike == like[index]]
        run.dry_seconds |= dict.fromkeys(own, seconds / (largest.images * largest.tokens))
        record = {"event": "memory", "stage": stage.name, "step": 0, "kind": "dry_step", "images": largest.images, "shape": str(largest.signature), "tokens": largest.tokens}
        run.log.write({**record, "peak_bytes": peak})
        took = f", {byte_words(peak)} at its peak" if peak is not None else ""
        run.log.say(f"[dim]dry step of '{stage.name}': {largest}{took}[/dim]")


_TAKES_MEMORY = {"precision", "base", "attention", "checkpointing", "offload", "train", "optimizer", "ema", "expert", "pyramid", "dropout", "loss"}
"""Fields of a stage, beside its batch and shapes, that decide how much memory a step takes."""


def dry_step(family: Family, plan: Plan, index: int, largest: Largest, processes: int, engine: Engine | None = None) -> tuple[int | None, float]:
    """Load a stage's model, make its largest micro-batch up, and train on it as the stage would; nothing of it is kept. Gives the peak in bytes on a GPU, else None, and the seconds
    that the last of its steps took.

    What accelerate keeps for several processes, one more gradient, is set aside; nothing is exchanged, so a process that runs out of memory leaves none waiting.
    engine: one that shards the model, which every process then has to do at once; None for none. Raises torch.OutOfMemoryError, and NoNumbers if predictions, losses or the gradient are none.
    """
    device = family.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # peft draws the weights of fresh pairs, though others take their place.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seconds = _train(family, plan, index, largest, processes, engine)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None, seconds


def _train(family: Family, plan: Plan, index: int, largest: Largest, processes: int, engine: Engine | None) -> float:
    stage, device = plan.stages[index], family.device
    model, trainable = build_model(family, plan, stage, f"stages[{index}]", Baton(None, None, "the dry step"), engine.loads_on if engine else None)
    drawing = add_dropout(model, placed_adapters(plan, index), trainable.values())
    name_attention(model, stage.attention)
    recompute(model, stage.checkpointing, device)
    precision, stage_key = StagePrecision(stage.precision, device), key(plan.seed, "dry step", stage.name)
    unscaled = StagePrecision("fp32", device)  # a loss scaled up for fp16 may leave its range, and then no step is made
    make = partial(make_optimizer, settings=stage.optimizer)
    training = engine.train(model, trainable, make, unscaled if stage.precision == "fp16" else precision) if engine else TorchTraining(model, trainable, make(trainable), unscaled, nullcontext)
    with training.gathered():
        beside = [Average(training.trainable, stage.ema)] if stage.ema is not None else []
    buckets = [torch.empty_like(parameter) for parameter in trainable.values()] if processes > 1 and not engine else []
    batch, shown = _made_up(family, largest, stage_key)
    none = (False,) * largest.images
    computed: dict[str, list[torch.Tensor]] = {"predictions": [], "losses": [], "gradient": []}
    for _ in range(_STEPS):
        began = now(device)
        for part in Objective(family, stage, stage_key, precision.dtype, largest.images).parts(batch, shown, LeftOut(none, none), 0):
            with drawing.of([key(stage_key, "dropout", row) for row in part.rows.tolist()]):
                with precision.autocast():
                    predicted = shown.predict_part(family, training.wrapped, part)
                found = losses(predicted, part)
                training.backward(found.sum())
            # One number of each: no number if one of them is none.
            computed["predictions"].append(predicted.detach().float().abs().amax())
            computed["losses"].append(found.detach().sum())
        computed["gradient"].append(sent(training.clip(stage.clip), device))
        training.step()
    seconds = now(device) - began
    is_number = torch.stack([torch.stack(values).isfinite().all() for values in computed.values()]).tolist()
    if engine:
        engine.release(model)
    del beside, buckets  # until here they take the memory that they would
    if wrong := [name for name, holds in zip(computed, is_number, strict=True) if not holds]:
        raise NoNumbers(no_numbers_words(stage, index, largest, wrong))
    return seconds


def _made_up(family: Family, largest: Largest, stage_key: int) -> tuple[MicroBatch, Shown]:
    """A micro-batch and what it shows: noise in the place of latents, and the longest prompt that the family takes.

    One small image and the prompt are really encoded, for how many channels and numbers they have; both are kept in the cache, where there is one.
    """
    images, signature = largest.images, largest.signature
    side = 2 * family.pixel_multiple
    small = encode(family, Images((side, side), torch.zeros(1, side, side, 3, dtype=torch.uint8), None, (False,), (None,)))
    pixels = [torch.zeros(1, 3, height, width) for height, width in signature.references] if family.prompts_see_references else []
    text = family.encode_prompts([" ".join(["word"] * max(1, family.text_tokens))], pixels).rows(torch.zeros(images, dtype=torch.int64, device=family.device))
    return made_up(family, largest, stage_key, small.shape[1], text)


def no_numbers_words(stage: Stage, index: int, largest: Largest, wrong: Sequence[str]) -> str:
    """What happened, and what of the plan has a wider range. wrong: of predictions, losses and gradient those that are not all numbers; what follows from the first is not named."""
    place = f"stages[{index}]"
    cures = {
        "fp16": f"They leave the range of fp16, which ends at 65,504: set {place}.precision: bf16, which has the range of fp32, or fp32",
        "fp32": f"In fp32 that is no matter of range: look at the model's weights, and at {place}.loss",
    }
    cure = cures.get(stage.precision, f"Set {place}.precision: fp32; if that does not help, the model's weights are no numbers themselves")
    return f"stage '{stage.name}' computes what is no number: the {wrong[0]} of {largest}, made up of noise, in {stage.precision} over a base in {resolved_storage(stage)}. {cure}"


def out_of_memory_words(stage: Stage, index: int, largest: Largest, found: str) -> str:
    """What happened, and what of the plan takes less memory, what costs the least speed for it first. found: the library's own first line."""
    batch, place = resolved_batch(stage), f"stages[{index}]"
    cures = []
    if largest.images > 1:
        smaller = largest.images // 2
        if isinstance(batch.images, int):
            smaller = max(size for size in range(1, smaller + 1) if batch.images % size == 0)
        cures.append(f"{place}.batch.micro: {smaller}")
    if stage.train == "full":
        if stage.optimizer.name != "adamw8bit":
            cures.append(f"{place}.optimizer.name: adamw8bit")
        if stage.ema is not None:
            cures.append(f"no {place}.ema")
    elif resolved_storage(stage) == "fp32":
        cures.append(f"{place}.base: bf16, with precision: bf16")
    if stage.checkpointing != "full":
        cures.append(f"{place}.checkpointing: full")
    if stage.train != "full" and resolved_storage(stage) == "bf16":
        cures.append(f"{place}.base: nf4")
    if stage.train != "full" and not stage.offload:
        cures.append(f"{place}.offload: true")
    cures.append(f"a {place}.resolution below {stage.resolution}" if isinstance(stage.resolution, int) else f"smaller {place}.resolution")
    if stage.train == "full":
        cures.append(f"{place}.train: adapter")
    return f"stage '{stage.name}' does not fit into the device's memory: {largest}, in {stage.precision} over a base in {resolved_storage(stage)}, ran out of it ({found}). Set {', or '.join(cures)}"
