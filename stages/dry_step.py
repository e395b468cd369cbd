"""The dry step: each stage's largest micro-batch once forwards and backwards, on made-up images, before anything trains.

What does not fit into memory is known in the first minutes, not when the stage begins at hour nine. The model is loaded for it and dropped, so no weight and no
moment of the run changes.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import nn

from mixing.batch import MicroBatch
from mixing.buckets import Signature, Size
from mixing.keys import key
from mixing.mixture import StageMixture
from mixing.reading import Images
from stages.adapter import TargetError
from stages.dropout import add_dropout
from stages.encode import encode
from stages.explain import byte_words
from stages.families.base import RegionTexts
from stages.families.family import Family
from stages.feed import stage_mixture
from stages.handoff import Baton, build_model
from stages.objective import LeftOut, Objective
from stages.objectives import flow
from stages.objectives.parts import losses
from stages.optim import Average, make_optimizer
from stages.placed import placed_adapters
from stages.plan import Plan, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError, RunError
from stages.recomputation import recompute
from stages.resolved import resolved_batch, resolved_storage
from stages.run import Run
from stages.shown import Shown

_STEPS = 2  # the second one has the optimizer's moments beside its activations


class OutOfMemory(RunError):
    """A stage's largest micro-batch, or its weights alone, do not fit into the device's memory."""


@dataclass(frozen=True)
class Largest:
    """The micro-batch with the most tokens that one process computes at a time."""

    source: str
    signature: Signature
    images: int
    tokens: int
    """Of each image."""
    level: int

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        return f"a micro-batch of {images} of source '{self.source}', {self.signature} pixels, {self.tokens:,} tokens each"


def largest_micro_batch(mixture: StageMixture, processes: int) -> Largest:
    """The largest that a stage has. A process has no more images of a step than fall to it where they are shared out evenly."""
    budget = mixture.budget
    found = []
    for cell, signature in zip(mixture.order.cells, mixture.signatures, strict=True):
        step = max(budget.first, budget.last) // (1 if budget.unit == "images" else cell.tokens)
        images = min(cell.micro, math.ceil(step / processes))
        found.append(Largest(cell.source, signature, images, cell.tokens, cell.level))
    return max(found, key=lambda each: (each.images * each.tokens, each.signature.regions))


def dry_steps(run: Run) -> None:
    """Make a dry step of every stage that is not finished, if the plan asks for it, or says nothing and there is a GPU.

    Of stages that differ in nothing that takes memory only the one with the most tokens is tried. Raises OutOfMemory, on all processes, if one of them has too little
    memory, and PlanError where plan, data and model do not fit.
    """
    device, processes = run.accelerator.device, run.accelerator.num_processes
    if not (run.plan.dry_step if run.plan.dry_step is not None else device.type == "cuda"):
        return
    left = [index for index, checkpoint in enumerate(run.checkpoints) if checkpoint is None or not checkpoint.state["finished"]]
    tried: dict[str, tuple[int, Largest]] = {}
    for index in left:
        stage = run.plan.stages[index]
        try:
            largest = largest_micro_batch(stage_mixture(stage, run.selections, run.sizes, seed=run.plan.seed, drawn_before={}), processes)
        except ValueError as error:
            raise PlanError.at(f"stages[{index}]", str(error)) from None
        alike = repr((stage.model_dump(include=_TAKES_MEMORY), resolved_storage(stage), placed_adapters(run.plan, index), bool(largest.signature.regions)))
        size = largest.images * largest.tokens
        if alike not in tried or size > tried[alike][1].images * tried[alike][1].tokens:
            tried[alike] = index, largest
    for index, largest in sorted(tried.values(), key=lambda each: each[0]):
        stage, failed = run.plan.stages[index], ""
        peak: int | None = None
        try:
            peak = dry_step(run.family, run.plan, index, largest, processes)
        except torch.OutOfMemoryError as error:
            failed = out_of_memory_words(stage, index, largest, str(error).split("\n", 1)[0])
        except TargetError as error:
            raise PlanError.at("", str(error)) from None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        everywhere: list[str] = gather_object([failed]) if processes > 1 else [failed]
        if failed := next(filter(None, everywhere), ""):
            raise OutOfMemory(failed)
        record = {"event": "memory", "stage": stage.name, "step": 0, "kind": "dry_step", "images": largest.images, "shape": str(largest.signature), "tokens": largest.tokens}
        run.log.write({**record, "peak_bytes": peak})
        took = f", {byte_words(peak)} at its peak" if peak is not None else ""
        run.log.say(f"[dim]dry step of '{stage.name}': {largest}{took}[/dim]")


_TAKES_MEMORY = {"precision", "base", "checkpointing", "train", "optimizer", "ema", "expert", "pyramid", "dropout", "loss"}
"""Fields of a stage, beside its batch and shapes, that decide how much memory a step takes."""


def dry_step(family: Family, plan: Plan, index: int, largest: Largest, processes: int) -> int | None:
    """Load a stage's model, make its largest micro-batch up, and train on it as the stage would; nothing of it is kept. Gives the peak in bytes on a GPU, else None.

    What accelerate keeps for several processes, one more gradient, is set aside; nothing is exchanged, so a process that runs out of memory leaves none waiting.
    Raises torch.OutOfMemoryError.
    """
    device = family.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # peft draws the weights of fresh pairs, though others take their place.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _train(family, plan, index, largest, processes)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _train(family: Family, plan: Plan, index: int, largest: Largest, processes: int) -> None:
    stage, device = plan.stages[index], family.device
    model, trainable = build_model(family, plan, stage, f"stages[{index}]", Baton(None, None, "the dry step"))
    drawing = add_dropout(model, placed_adapters(plan, index), trainable.values())
    recompute(model, stage.checkpointing, device)
    precision, stage_key = StagePrecision(stage.precision, device), key(plan.seed, "dry step", stage.name)
    optimizer = make_optimizer(trainable, stage.optimizer)
    beside = [Average(trainable, stage.ema)] if stage.ema is not None else []
    buckets = [torch.empty_like(parameter) for parameter in trainable.values()] if processes > 1 else []
    batch, shown = _made_up(family, largest, stage_key)
    none = (False,) * largest.images
    for _ in range(_STEPS):
        for part in Objective(family, stage, stage_key, precision.dtype, largest.images).parts(batch, shown, LeftOut(none, none), 0):
            with drawing.of([key(stage_key, "dropout", row) for row in part.rows.tolist()]):
                with precision.autocast():
                    predicted = shown.predict_part(family, model, part)
                losses(predicted, part).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainable.values(), stage.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del beside, buckets  # until here they take the memory that they would


def _made_up(family: Family, largest: Largest, stage_key: int) -> tuple[MicroBatch, Shown]:
    """A micro-batch and what it shows: noise in the place of latents, and the longest prompt that the family takes.

    One small image and the prompt are really encoded, for how many channels and numbers they have; both are kept in the cache, where there is one.
    """
    images, signature = largest.images, largest.signature
    side = 2 * family.pixel_multiple
    small = encode(family, Images((side, side), torch.zeros(1, side, side, 3, dtype=torch.uint8), None, (False,), (None,)))
    pixels = [torch.zeros(1, 3, height, width) for height, width in signature.references] if family.prompts_see_references else []
    text = family.encode_prompts([" ".join(["word"] * max(1, family.text_tokens))], pixels).rows(torch.zeros(images, dtype=torch.int64, device=family.device))

    def latents(size: Size, word: str) -> torch.Tensor:
        shape = (small.shape[1], size[0] // family.factor, size[1] // family.factor)
        return flow.noise(shape, [key(stage_key, word, place) for place in range(images)]).to(family.device)

    x = latents(signature.target, "target")
    references = tuple(latents(size, f"reference {number}") for number, size in enumerate(signature.references))
    regions = None
    if signature.regions:
        regions = RegionTexts((text,) * signature.regions, torch.ones(images, signature.regions, *signature.target, dtype=torch.bool, device=family.device))
    unread = [Images(size, torch.empty(0, *size, 3, dtype=torch.uint8), None, (), ()) for size in (signature.target, *signature.references)]
    names = ("",) * images
    batch = MicroBatch(
        0, 0, tuple(range(images)), (largest.source,) * images, names, names, unread[0], tuple(unread[1:]), tokens=largest.tokens, level=largest.level, step_images=images
    )
    return batch, Shown(x, text, references, regions)


def out_of_memory_words(stage: Stage, index: int, largest: Largest, found: str) -> str:
    """What happened, and what of the plan takes less memory. found: the library's own first line."""
    batch, place = resolved_batch(stage), f"stages[{index}]"
    cures = []
    if largest.images > 1:
        smaller = largest.images // 2
        if isinstance(batch.images, int):
            smaller = max(size for size in range(1, smaller + 1) if batch.images % size == 0)
        cures.append(f"{place}.batch.micro: {smaller}")
    if stage.checkpointing != "full":
        cures.append(f"{place}.checkpointing: full")
    cures.append(f"a {place}.resolution below {stage.resolution}" if isinstance(stage.resolution, int) else f"smaller {place}.resolution")
    if stage.train != "full" and resolved_storage(stage) == "fp32":
        cures.append(f"{place}.base: bf16, with precision: bf16")
    elif stage.train != "full" and resolved_storage(stage) == "bf16":
        cures.append(f"{place}.base: nf4")
    elif stage.train == "full":
        cures.append(f"{place}.train: adapter")
    return f"stage '{stage.name}' does not fit into the device's memory: {largest}, in {stage.precision} over a base in {resolved_storage(stage)}, ran out of it ({found}). Set {', or '.join(cures)}"
