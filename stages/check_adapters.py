"""Check adapters: whether a plan's adapters, what its stages train of them, and how they are handed on, can be carried out. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stages.placed import newest, placed_adapters, target_of, total_rank
from stages.plan import MOST_RANK, Stage
from stages.problems import Location, Problem, listed, nearest, quoted, written
from stages.reader import ReadPlan
from stages.resolved import quantised, resolved_storage

_WORDS = ("adapter", "full", "default", "pytorch_lora_weights")


def adapter_problems(read: ReadPlan) -> Iterator[Problem]:
    """What is wrong with adapters and with handing them on."""
    yield from _names(read)
    yield from _experts(read)
    taught = read.plan.start is not None  # whether an adapter has come as far as this stage
    for index, stage in enumerate(read.plan.stages):
        if stage.train == "full":
            continue
        yield from _entries(read, index, stage)
        yield from _variants(read, index, stage)
        if index > 0 or read.plan.start is not None:
            yield from _way(read, index, stage, taught=taught)
        taught = True


def _at(read: ReadPlan, location: Location, message: str) -> Problem:
    return Problem(read.place(*location), written(location), message)


def _names(read: ReadPlan) -> Iterator[Problem]:
    """What several adapters may be called and be."""
    adapters = read.plan.adapters
    for name, settings in adapters.items():
        place = read.name_place("adapters", name)
        if name in _WORDS:
            yield Problem(place, written(("adapters", name)), f"'{name}' is a word of Medley's own; give the adapter another name")
        elif "." in name or "lora_" in name:
            yield Problem(place, written(("adapters", name)), f"a name that weights are told apart by has no '.' and no 'lora_' in it; write {re.sub('[.]|lora_', '', name) or 'another'}")
        if settings.variant == "dora" and len(adapters) > 1:
            yield _at(read, ("adapters", name, "variant"), "several adapters are published as one, and DoRA cannot be joined with others; choose lora or rslora, or give the plan one adapter")


def _experts(read: ReadPlan) -> Iterator[Problem]:
    """Whether each adapter belongs to one of a model's experts, where stages train several."""
    plan = read.plan
    experts = list(dict.fromkeys(stage.expert for stage in plan.stages if stage.train != "full"))
    if len(experts) < 2 or None in experts:
        return
    for index, stage in enumerate(plan.stages):
        location: Location = ("stages", index, "train")
        if stage.train == "full":
            continue
        if not plan.adapters:
            if stage.expert != experts[0]:
                yield _at(read, location, f"expert {stage.expert} is a transformer of its own, and stages before train the plan's one adapter on {experts[0]}; name an adapter for each in `adapters`, and write train: [NAME]")
            continue
        names = [target_of(entry, list(plan.adapters))[0] for entry in (stage.train if isinstance(stage.train, list) else ["adapter"])]
        if None in names:
            yield _at(read, location, f"the model's experts have adapters of their own; name those that expert {stage.expert} has, train: [NAME] (adapters: {listed(plan.adapters)})")
        for name in dict.fromkeys(name for name in names if name is not None):
            others = [other for other in plan.stages[:index] if other.expert != stage.expert and isinstance(other.train, list) and any(target_of(entry, list(plan.adapters))[0] == name for entry in other.train)]
            if others:
                yield _at(read, location, f"adapter '{name}' is trained on expert {others[0].expert} in stage '{others[0].name}', and expert {stage.expert} is another transformer; give it an adapter of its own")
        if stage.handoff.adapter == "merge":
            yield _at(read, ("stages", index, "handoff", "adapter"), "'merge' folds adapters into one transformer, and stages of this plan train two; choose continue")


def _entries(read: ReadPlan, index: int, stage: Stage) -> Iterator[Problem]:
    """What a list in `train` names."""
    names = list(read.plan.adapters)
    for number, entry in enumerate(stage.train if isinstance(stage.train, list) else ()):
        location: Location = ("stages", index, "train", number)
        name, pattern = target_of(entry, names)
        before = entry.partition(":")[0]
        if name is None and ":" in entry and re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", before):
            has = f"adapters: {listed(names)}" if names else "the plan has one, which has no name"
            yield _at(read, location, f"no adapter {quoted(before)} stands before the colon ({has}){nearest(before, names)}")
        elif name is None and re.fullmatch("[A-Za-z0-9_-]+", entry) and (meant := nearest(entry, names)):
            yield _at(read, location, f"no adapter {quoted(entry)} (adapters: {listed(names)}){meant}")
        elif name is not None and pattern == "":
            yield _at(read, location, f"no pattern stands behind the colon; write {name} for the whole adapter")


def _variants(read: ReadPlan, index: int, stage: Stage) -> Iterator[Problem]:
    """Whether a stage's adapters can stand on what its base is stored in."""
    placed = placed_adapters(read.plan, index)
    if (blocks := quantised(stage)) and (found := [name for name, each in placed.items() if each.settings.variant == "dora"]):
        of = f"adapter '{found[0]}'" if read.plan.adapters else "the adapter"
        yield _at(read, ("stages", index, "base"), f"{of} is a DoRA, which needs the lengths of the base's rows, and {blocks} has no rows to read; choose bf16 or fp32, or variant lora or rslora")


def _way(read: ReadPlan, index: int, stage: Stage, *, taught: bool) -> Iterator[Problem]:
    """How a stage hands the adapter on, against what stands before it."""
    plan, handoff, way = read.plan, stage.handoff, stage.handoff.adapter
    location: Location = ("stages", index, "handoff")
    at_way = (*location, "adapter")
    if way == "continue":
        return
    if not taught:
        yield _at(read, at_way, f"'{way}', and no stage before this one trains an adapter; remove it")
        return
    if plan.adapters and way != "merge":
        instead = "give the plan one `adapter`" if way != "stack" else "those stand beside each other already: say in `train` which of them train here"
        yield _at(read, at_way, f"'{way}' is for a plan with one `adapter`, and this one names its `adapters`; {instead}")
        return
    before, placed = placed_adapters(plan, index - 1), placed_adapters(plan, index)
    if not before or not placed:
        yield _at(read, at_way, f"'{way}', and none of the plan's `adapters` is one of {'this' if before else 'the former'} stage's expert; remove it, or name in `train` those that its stages train")
        return
    rank, old = newest(placed).settings.rank, newest(before).settings.rank
    if plan.adapter.variant == "dora" and way in ("shrink", "stack") and not plan.adapters:
        why = "the lengths of its rows are no product" if way == "shrink" else "DoRA cannot be joined with others, and they are published as one"
        yield _at(read, at_way, f"'{way}' of a DoRA: {why}; choose continue, grow or merge")
    elif rank > MOST_RANK:
        yield _at(read, at_way, f"'{way}' to rank {rank:,}, twice what there was, is above {MOST_RANK:,}; give a rank")
    elif index > 0 and way == "grow" and rank <= old:
        yield _at(read, (*location, "rank"), f"'grow' to rank {rank}, and the adapter has rank {old}; give a larger rank" + (", or choose shrink" if rank < old else ""))
    elif index > 0 and way == "shrink" and rank >= total_rank(before) and (len(before) == 1 or rank > total_rank(before)):
        held = f"the adapters have rank {total_rank(before)} together" if len(before) > 1 else f"the adapter has rank {old}"
        yield _at(read, (*location, "rank"), f"'shrink' to rank {rank}, and {held}; give a smaller rank" + (", or choose grow" if rank > old and len(before) == 1 else ""))
    if way == "merge" and (blocks := quantised(stage)):
        message = f"'merge' into a base stored in {blocks} rounds away most of what was learnt; choose stack or continue, or give the stage base: fp32, or bf16 with lossy: true"
        yield _at(read, at_way, message)
    elif way == "merge" and resolved_storage(stage) != "fp32" and not handoff.lossy:
        message = f"'merge' into a base stored in {resolved_storage(stage)} rounds away a quarter to two thirds of what was learnt; give the stage base: fp32, choose stack, or say lossy: true"
        yield _at(read, at_way, message)
    if index > 0:  # after `start` nothing else comes along
        for field, asked in (("optimizer", handoff.optimizer), ("ema", handoff.ema if stage.ema is not None else "reset")):
            if asked != "reset" and not (way == "grow" and plan.adapter.variant == "dora"):
                yield _at(read, (*location, field), f"'{asked}', and with adapter: {way} every pair is another than before, so nothing could be kept; choose reset")
