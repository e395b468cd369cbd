"""Check of what a stage computes by: compiled blocks and the kernel of attention, with one another, with the sources, and with the model's family. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from stages.families.facts import FAMILIES
from stages.plan import Plan, Stage
from stages.problems import Location, Problem, written
from stages.reader import ReadPlan

_TAKE_NO_MASK = ("_native_flash", "flash")
_HALF_ONLY = ("_native_cudnn", "flash")


def computing_problems(read: ReadPlan) -> Iterator[Problem]:
    """What is wrong with it whatever the model."""
    for index, stage in enumerate(read.plan.stages):
        for field, message in _of_stage(stage, read.plan):
            yield _at(read, index, field, message)


def attention_problems(read: ReadPlan, family: str) -> Iterator[Problem]:
    """Where the attention of a family cannot be computed as a stage asks for it."""
    facts = FAMILIES[family]
    for index, stage in enumerate(read.plan.stages):
        if stage.attention == "auto":
            continue
        if not facts.names_attention:
            able = ", ".join(name for name, other in FAMILIES.items() if other.names_attention)
            yield _at(read, index, "attention", f"{family}'s transformer calls torch's attention and no other (diffusers 0.42.1); remove it. These can be told: {able}")
        elif facts.masks_prompts and stage.attention in _TAKE_NO_MASK:
            yield _at(read, index, "attention", f"'{stage.attention}' takes no mask, and {family} masks prompts of different length in one micro-batch; choose native, or leave it out")
        elif facts.masks_prompts and _has_regions(read.plan):
            yield _at(read, index, "attention", f"rows with regions go through Medley's own attention in {family}, which would not heed it; leave it out")


def _of_stage(stage: Stage, plan: Plan) -> Iterator[tuple[str, str]]:
    if stage.precision == "fp8" and stage.train == "full":
        yield "precision", "'fp8' is for weights that stay as they are, and train: full changes them; choose bf16, or train the adapter"
    elif stage.precision == "fp8" and stage.base not in (None, "fp8"):
        yield "base", f"'{stage.base}', and precision fp8 multiplies weights that are stored in fp8; leave it out, or choose precision bf16"
    elif stage.precision != "fp8" and stage.base == "fp8":
        yield "base", f"'fp8' is for products in fp8, and the stage computes in {stage.precision}; choose precision fp8, or base int8"
    if stage.precision == "fp8" and stage.offload:
        yield "offload", "weights that come to the device for each product are not multiplied in fp8; remove it, or choose precision bf16"
    if stage.compile and stage.offload:
        yield "compile", "weights that come to the device for each product (`offload`) cannot be part of compiled code; leave one of the two out"
    if stage.attention in _HALF_ONLY and stage.precision == "fp32":
        yield "attention", f"'{stage.attention}' computes in 16 bits, and the stage in fp32; choose native, or precision bf16"
    if stage.attention in _TAKE_NO_MASK and _has_regions(plan):
        yield "attention", f"'{stage.attention}' takes no mask, and rows of task entity come with one; choose native, or leave it out"


def _has_regions(plan: Plan) -> bool:
    return any(source.task == "entity" for source in plan.sources.values())


def _at(read: ReadPlan, index: int, field: str, message: str) -> Problem:
    location: Location = ("stages", index, field)
    return Problem(read.place(*location), written(location), message)
