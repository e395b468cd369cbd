"""Miniature: a plan in a few small steps, with everything kept that decides how its parts work together. Pure arithmetic on plans; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.placed import target_of
from stages.plan import Adapter, Batch, Cache, Change, Handoff, LearningRate, Level, MicroTokens, MixAdaptive, Plan, Power, Prior, Source, Stage
from stages.problems import listed
from stages.resolved import main_resolution, metric_models, num_held_out, resolved_batch, resolved_levels, resolved_plan, resolved_rate, still_mixes

STEPS = 6
"""Steps of a stage, at most."""
HELD_OUT = 2
SAVE_EVERY = 2

_LEAST, _MOST = 2, 12  # images of a step
_RANK = 8  # of the largest adapter
_SIDE = 4  # tokens along the side of a square of the smallest resolution; with a pyramid half of it, at the coarsest level
_SMALL_SIDE = 12  # tokens along the side up to which a resolution stays as it is
_FEWEST_ROWS, _MOST_ROWS, _USUAL_ROWS = 20, 60, 24  # of a source; a tenth of them can be held out
_SAMPLES = 8
_BLOCKS = 128  # numbers that a block may have in a pattern


@dataclass(frozen=True)
class Tiny:
    """The model that stands for the plan's."""

    folder: Path
    is_own: bool
    """Whether it is the plan's model itself."""
    multiple: int
    """Sides of images are multiples of so many pixels."""
    text_tokens: int
    """Tokens of a prompt."""
    takes_guidance: bool
    layers: tuple[str, ...]
    """Full names of the transformer's linear layers."""


@dataclass(frozen=True)
class SmallSource:
    """A source as the miniature has it."""

    source: Source
    rows: int
    """That are trained on, held-out ones among them."""
    references: int = 0
    """The most that a row has."""
    regions: int = 0
    """The same of regions."""
    is_made: bool = False
    """Whether its rows were made for the rehearsal."""
    note: str = ""
    """What its rows are, in words."""


def small_sides(plan: Plan, multiple: int, *, is_own: bool) -> Mapping[int, int]:
    """Every resolution of a plan to that of its miniature: as small as buckets and a pyramid's levels allow, and different ones stay different.

    multiple: of the tiny model. is_own: whether it is the plan's model; then resolutions that are small already stay.
    """
    sides = sorted({level.pixels for stage in plan.stages for level in resolved_levels(stage)})
    if is_own and sides[-1] <= _SMALL_SIDE * multiple:
        return {side: side for side in sides}
    levels = max((stage.pyramid.levels for stage in plan.stages if stage.pyramid is not None), default=1)
    unit, first = multiple * 2 ** (levels - 1), _SIDE if levels == 1 else _SIDE // 2
    return {side: unit * (first + number) for number, side in enumerate(sides)}


def small_numbers(rows: Mapping[str, int | None]) -> Mapping[str, int]:
    """How many rows each source has in the miniature, in proportion as far as two dozen to five dozen rows can show it. rows: None where that is not known."""
    largest = max((number for number in rows.values() if number), default=1)
    scale = min(1.0, _MOST_ROWS / largest)
    return {name: _USUAL_ROWS if number is None else min(max(number, 1), max(_FEWEST_ROWS, round(scale * number))) for name, number in rows.items()}


def small_ranks(plan: Plan) -> Mapping[int, int]:
    """Every rank of a resolved plan to that of its miniature; larger ones stay larger."""
    ranks = {plan.adapter.rank, *(settings.rank for settings in plan.adapters.values())}
    ranks |= {stage.handoff.rank for stage in plan.stages if stage.handoff.rank is not None}
    small: dict[int, int] = {}
    for rank in sorted(ranks):
        scaled = math.ceil(rank * _RANK / max(ranks)) if max(ranks) > _RANK else rank
        small[rank] = min(rank, max(2, scaled, max(small.values(), default=0) + 1))
    return small


def miniature(plan: Plan, tiny: Tiny, sources: Mapping[str, SmallSource], folder: Path) -> tuple[Plan, list[str]]:
    """The plan in miniature, and what of it was left out or changed in kind, in sentences.

    sources: every source of the plan, as `folder` holds it. The result is meant to be written, and to be read and checked as any plan.
    """
    notes: list[str] = []
    if plan.start is not None and not tiny.is_own:
        first = plan.stages[0].model_copy(update={"handoff": Handoff()})
        plan = plan.model_copy(update={"start": None, "stages": [first, *plan.stages[1:]]})
        notes.append("`start` was left out: what it names does not fit the tiny model, so the first stage began afresh")
    if plan.publish is not None:
        plan = plan.model_copy(update={"publish": None})
        notes.append("`publish` was left out: nothing of a rehearsal goes to the Hub")
    whole = resolved_plan(plan)
    sides, ranks = small_sides(plan, tiny.multiple, is_own=tiny.is_own), small_ranks(whole)
    stages = [_stage(stage, sides, ranks, tiny, sources, plan, notes) for stage in whole.stages]
    small = {
        "model": _model(plan, tiny, notes),
        "adapter": _adapter(whole.adapter, ranks, tiny, "adapter", notes),
        "adapters": {name: _adapter(settings, ranks, tiny, f"adapters.{name}", notes) for name, settings in whole.adapters.items()},
        "sources": {name: _with_prior(small.source, sides) for name, small in sources.items()},
        "stages": stages,
        "save_every": SAVE_EVERY,
        "log_every": 1,
        "workers": 0,
        "track": "none",
        "cache": "none" if plan.cache == "none" else Cache(folder=str(folder / "cache"), latents=plan.cache.latents, text=plan.cache.text),
        "previews": plan.previews.model_copy(update={"rows": min(plan.previews.rows, 1), "steps": min(plan.previews.steps, 2)}),
        "evaluate": _evaluate(plan, sides, sources, notes),
    }
    return whole.model_copy(update=small), notes


def _model(plan: Plan, tiny: Tiny, notes: list[str]) -> object:
    if tiny.is_own:
        return plan.model
    guidance = None if isinstance(plan.model, str) else plan.model.guidance
    if guidance is None:
        return str(tiny.folder)
    if not tiny.takes_guidance:
        notes.append("`model.guidance` was left out: a model of this class takes none")
        return str(tiny.folder)
    assert not isinstance(plan.model, str)
    return plan.model.model_copy(update={"repo": str(tiny.folder), "revision": None})


def _adapter(settings: Adapter, ranks: Mapping[int, int], tiny: Tiny, place: str, notes: list[str]) -> Adapter:
    rank = ranks.get(settings.rank, settings.rank)
    targets = settings.targets if isinstance(settings.targets, str) else _fitted(settings.targets, tiny.layers, f"{place}.targets", notes)
    return settings.model_copy(update={"rank": rank, "alpha": _alpha(settings, settings.rank, settings.alpha, rank), "targets": targets})


def _alpha(settings: Adapter, old: int, alpha: float | None, new: int) -> float:
    """The alpha under which a pair of another rank has the same scale."""
    of_old = alpha or float(old)
    return of_old * math.sqrt(new / old) if settings.variant == "rslora" else of_old * new / old


def _fitted(patterns: Sequence[str], layers: Sequence[str], place: str, notes: list[str], names: Sequence[str] = ()) -> list[str]:
    """Patterns for a model of fewer blocks: one that asks for certain blocks is tried on those that there are, as if they had those numbers.

    names: adapters that may stand before a pattern. A pattern for every block, or for none, stays as it is.
    """
    fitted = []
    for entry in patterns:
        adapter, pattern = target_of(entry, names)
        if pattern is None or not (meant := _meant(pattern, layers)):
            fitted.append(entry)
            continue
        notes.append(f"{place}: '{pattern}' asks for certain blocks, of which the tiny model has few; it was tried on {len(meant)} layers of those")
        chosen = "|".join(map(re.escape, meant))
        fitted.append(chosen if adapter is None else f"{adapter}:{chosen}")
    return fitted


def _meant(pattern: str, layers: Sequence[str]) -> list[str]:
    """The layers that stand for those of certain blocks; none for a pattern that does not tell blocks apart.

    The last block is left out where others stand for it too: in some models its last layers reach nothing, and the blocks that were asked for are not the last.
    """
    found = []
    for layer in layers:
        others = [bool(re.fullmatch(pattern, other)) for other in _renumbered(layer)]
        if any(others) and not all(others):
            found.append(layer)
    last = {stack: max(number for own, number in map(_block, found) if own == stack) for stack in {_block(layer)[0] for layer in found}}
    inner = [layer for layer in found if last[_block(layer)[0]] != _block(layer)[1] or last[_block(layer)[0]] == 0]
    return inner or found


def _block(layer: str) -> tuple[str, int]:
    """The stack of blocks that a layer is in, and the number of its block."""
    parts = _split(layer)
    return (parts[0], int(parts[1])) if len(parts) == 3 else (layer, 0)


def _split(layer: str) -> list[str]:
    return re.split(r"(?<=\.)(\d+)(?=\.)", layer, maxsplit=1)


def _renumbered(layer: str) -> Iterator[str]:
    """A layer's name with other numbers of its block, the first number in it."""
    parts = _split(layer)
    if len(parts) == 3:
        yield from (f"{parts[0]}{number}{parts[2]}" for number in range(_BLOCKS))


def _with_prior(source: Source, sides: Mapping[int, int]) -> Source:
    """A source whose images the model makes itself, with few of them; another as it is."""
    if (prior := source.prior) is None:
        return source
    prompts = prior.prompts[:4] if isinstance(prior.prompts, list) else prior.prompts
    side = None if prior.resolution is None else sides.get(prior.resolution, min(sides.values()))
    return source.model_copy(update={"prior": Prior(prompts=prompts, count=min(prior.count, 4), steps=min(prior.steps, 2), guidance=prior.guidance, resolution=side)})


def _evaluate(plan: Plan, sides: Mapping[int, int], sources: Mapping[str, SmallSource], notes: list[str]) -> object:
    evaluate, accuracy = plan.evaluate, plan.evaluate.accuracy
    if accuracy is not None:
        side = main_resolution(plan.stages[-1])
        if sides[side] == side and Path(accuracy.labelled).expanduser().is_dir() and not sources[accuracy.source].is_made:
            accuracy = accuracy.model_copy(update={"samples": min(accuracy.samples, _SAMPLES)})
        else:
            accuracy = None
            notes.append("`evaluate.accuracy` was left out: it needs its own data, at the plan's own resolution")
    longest = max(stage.steps for stage in plan.stages)
    follows = any(isinstance(stage.mix, MixAdaptive) for stage in plan.stages)  # then an evaluation after each step, so that there is something to follow
    every = 1 if follows else None if evaluate.every is None else max(1, min(STEPS // 2, round(evaluate.every * STEPS / max(longest, STEPS))))
    metrics = evaluate.metrics
    if away := [name for name, model in metric_models(plan).items() if not Path(model).expanduser().is_dir()]:
        metrics = []
        notes.append(f"`evaluate.metrics` was left out: the model of {listed(away)} is not in a folder here")
    samples = min(evaluate.samples, HELD_OUT)
    return evaluate.model_copy(update={"rows": min(num_held_out(plan), HELD_OUT), "every": every, "accuracy": accuracy, "metrics": metrics, "samples": samples})


def _stage(stage: Stage, sides: Mapping[int, int], ranks: Mapping[int, int], tiny: Tiny, sources: Mapping[str, SmallSource], plan: Plan, notes: list[str]) -> Stage:
    steps = min(stage.steps, STEPS)
    place = f"stages.{stage.name}.train"
    buckets = stage.buckets
    if buckets.references is not None:
        scale = sides[main_resolution(stage)] / main_resolution(stage)
        buckets = buckets.model_copy(update={"references": [max(tiny.multiple, round(scale * side / tiny.multiple) * tiny.multiple) for side in buckets.references]})
    handoff = stage.handoff
    if handoff.rank is not None:
        rank = ranks[handoff.rank]
        handoff = handoff.model_copy(update={"rank": rank, "alpha": _alpha(plan.adapter, handoff.rank, handoff.alpha, rank)})
    small = stage.model_copy(
        update={
            "steps": steps,
            "resolution": [Level(pixels=sides[level.pixels], share=level.share) for level in stage.resolution] if isinstance(stage.resolution, list) else sides[stage.resolution],
            "buckets": buckets,
            "lr": _rate(resolved_rate(stage), stage.steps, steps),
            "train": stage.train if isinstance(stage.train, str) else _fitted(stage.train, tiny.layers, place, notes, list(plan.adapters)),
            "handoff": handoff,
            "mix": stage.mix.model_copy(update={"lookback": 1}) if isinstance(stage.mix, MixAdaptive) else stage.mix,
            **_of_a_gpu(stage, notes),
        }
    )
    return small.model_copy(update={"batch": _batch(stage, small, sources, tiny)})


def _of_a_gpu(stage: Stage, notes: list[str]) -> dict[str, str | None]:
    """What stands in a miniature for that which a stage computes by and a CPU has not, or takes minutes for."""
    changed: dict[str, str | None] = {}
    if stage.precision == "fp8":
        changed |= {"precision": "bf16", "base": "bf16"}
        notes.append(f"precision fp8 of '{stage.name}': it became bf16 over a base in bf16, for a CPU is not made for it")
    if stage.attention != "auto":
        changed["attention"] = "auto"
        notes.append(f"attention {stage.attention} of '{stage.name}': it became auto, for most kernels are a GPU's")
    if stage.compile is True:
        changed["compile"] = "aot_eager"
        notes.append(f"what inductor makes of the blocks of '{stage.name}': they were taken apart and put together again (aot_eager), which takes seconds and not minutes")
    return changed


def _rate(rate: LearningRate, steps: int, few: int) -> LearningRate:
    """The same curve over few steps: a warm-up takes the same part of them, and at least one."""
    assert rate.warmup is not None
    warmup = 0 if rate.warmup == 0 else max(1, round(rate.warmup * few / steps))
    if rate.schedule != "constant" and warmup >= few - 1:
        warmup = max(0, few - 2)
    return rate.model_copy(update={"warmup": min(warmup, few)})


def _shares(stage: Stage, sources: Mapping[str, SmallSource]) -> list[float]:
    """The shares of the sources that the stage draws, on the mean over a ramp; rows as the miniature has them."""

    def of(mix: object) -> dict[str, float]:
        if isinstance(mix, Mapping):
            weights = {name: float(mix.get(name, 0.0)) for name in sources}
        else:
            power = mix.power if isinstance(mix, Power) else 1.0
            weights = {name: float((small.source.rows or small.rows) * small.source.repeat) ** power for name, small in sources.items()}
        return {name: weight / (sum(weights.values()) or 1.0) for name, weight in weights.items()}

    ends = [of(mix) for mix in still_mixes(stage)]
    means = [sum(end[name] for end in ends) / len(ends) for name in sources]
    return [share for share in means if share > 0]


def _batch(stage: Stage, small: Stage, sources: Mapping[str, SmallSource], tiny: Tiny) -> Batch:
    """A batch of few images, of as many micro-batches (one or two), that draws every source at least once where a dozen images a step are enough for that.

    stage: of the plan, resolved; small: the same in miniature, but for its batch.
    """
    batch = resolved_batch(stage)
    needed = math.ceil(1 / (min(_shares(small, sources), default=1.0) * small.steps)) + 1
    tokens = _most_tokens(small, sources, tiny.multiple, tiny.text_tokens)
    if batch.tokens is None:
        assert batch.images is not None
        first, last = (batch.images.first, batch.images.last) if isinstance(batch.images, Change) else (batch.images, batch.images)
        images = min(max(needed, _LEAST), _MOST, max(first, last))
        several = isinstance(batch.micro, int) and batch.micro < max(first, last) and images > 1
        if several:
            images += images % 2
        micro: int | MicroTokens = MicroTokens(tokens=tokens * (images // 2 or 1)) if isinstance(batch.micro, MicroTokens) else images // 2 if several else images
        if first == last or small.steps == 1:
            return Batch(images=images, micro=micro)
        less = max(1, images // 2)
        return Batch(images=Change.model_validate({"from": less, "to": less * 2} if first < last else {"from": less * 2, "to": less}), micro=micro)
    first, last = (batch.tokens.first, batch.tokens.last) if isinstance(batch.tokens, Change) else (batch.tokens, batch.tokens)
    side = main_resolution(stage)
    of_plan = max(1, round((side / 16) ** 2)) * (1 + max(each.references for each in sources.values())) + 512  # tokens of 16 pixels and a long prompt: most families'
    images = min(max(needed, _LEAST), _MOST, max(_LEAST, max(first, last) // of_plan))
    asked = images * tokens
    part = min(1.0, batch.micro.tokens / min(first, last)) if isinstance(batch.micro, MicroTokens) else None
    least = asked if first == last or small.steps == 1 else max(tokens, asked // 2)
    micro_tokens = None if part is None else MicroTokens(tokens=min(least, max(tokens, round(part * asked))))
    held = batch.micro if isinstance(batch.micro, int) else micro_tokens
    held = min(held, images) if isinstance(held, int) else held
    if first == last or small.steps == 1:
        return Batch(tokens=asked, micro=held)
    return Batch(tokens=Change.model_validate({"from": least, "to": 2 * least} if first < last else {"from": 2 * least, "to": least}), micro=held)


def _most_tokens(stage: Stage, sources: Mapping[str, SmallSource], multiple: int, text_tokens: int) -> int:
    """Tokens of the largest row that the stage may see."""
    side = main_resolution(stage)
    of_reference = max([side, *(stage.buckets.references or ())])
    most = max((side // multiple) ** 2 + each.references * (of_reference // multiple) ** 2 + text_tokens * (1 + each.regions) for each in sources.values())
    return int(most)
