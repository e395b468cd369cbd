"""Explain: what a plan will do, said before it is done. No weights are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mixing.order import Quota
from mixing.shares import integers, shares, weights
from stages.plan import LearningRate, Plan, Stage, Storage, resolved_batch, resolved_rate, resolved_storage
from stages.problems import PlanError

MANY_EPOCHS = 20
_BYTES_OF_TRAINED = 16  # of each parameter: float32 weight, gradient and AdamW's two moments
_BYTES_OF_AVERAGE = 4
_WIDEST = 100  # characters


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading its weights."""

    family: str
    parameters: int
    """Of the transformer, the adapter not counted."""
    base_bytes: Mapping[Storage, int]
    """Of the transformer's weights, by what they are stored in."""
    trainable: tuple[int, ...]
    """Parameters that train, stage by stage."""
    tokens: tuple[int, ...]
    """Tokens of a target image, stage by stage."""


def explain(plan: Plan, sizes: Mapping[str, int], model: ModelFacts | None, console: Console) -> None:
    """Print what the plan will do: each stage, and what each source gives in all.

    sizes: rows of each source that are trained on, after `take` and without those held out. model: None if nothing is known of it.
    Raises ValueError if a stage draws from a source without rows.
    """
    repo = plan.model if isinstance(plan.model, str) else plan.model.repo
    known = f" ({model.family}, {_short(model.parameters)} parameters)" if model else ""
    stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
    _say(console, Text.assemble((plan.name, "bold"), f": {repo}{known}, {stages}, seed {plan.seed}"))
    total: Counter[str] = Counter()
    for index, stage in enumerate(plan.stages):
        images = _images(stage, sizes)
        total.update(images)
        console.print()
        _say(console, Text(f"{index + 1}  {stage.name}", style="bold"))
        _say(console, Padding(_facts(index, stage, model), (0, 0, 0, 3)))
        _say(console, Padding(_mix(stage, images, sizes), (0, 0, 0, 3)))
    console.print()
    _say(console, Text("In all", style="bold"))
    _say(console, Padding(_totals(plan, model, total, sizes), (0, 0, 0, 3)))
    for warning in _warnings(plan, total, sizes):
        _say(console, Text(warning, style="yellow"))


def explain_run(plan: Plan, console: Console) -> None:
    """Open the plan's sources, read its model's configs, and explain. Raises PlanError if either cannot be done, or if it does not fit.

    A Hub model whose configs cannot be had is explained without tokens and memory.
    """
    from stages.model_facts import model_facts  # imports torch, and so does the next
    from stages.run import open_selections

    sizes = {name: selection.size for name, selection in open_selections(plan, Path.cwd()).items()}
    try:
        explain(plan, sizes, model_facts(plan), console)
    except ValueError as error:
        raise PlanError.at("", str(error)) from None


def _say(console: Console, what: Text | Padding) -> None:
    console.print(what, width=min(_WIDEST, console.width))


def _images(stage: Stage, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many images each source gives, rounded to add up; the order keeps within a micro-batch of it."""
    whole = integers(weights(stage.mix, sizes))
    counts = Quota(list(whole.values())).counts(np.asarray(stage.steps * resolved_batch(stage).images))
    return dict(zip(whole, counts.tolist(), strict=True))


def _facts(index: int, stage: Stage, model: ModelFacts | None) -> Table:
    batch, storage = resolved_batch(stage), resolved_storage(stage)
    assert batch.micro is not None
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    images = stage.steps * batch.images
    micro = batch.images // batch.micro
    made_of = f"one micro-batch of {batch.micro}" if micro == 1 else f"{micro:,} micro-batches of {batch.micro}"
    rows = {"steps": f"{stage.steps:,}, each of {_counted(batch.images)} in {made_of}: {_counted(images)}"}
    seen = f"{stage.resolution} x {stage.resolution} pixels"
    if model:
        seen += f", {model.tokens[index]:,} tokens each: {_short(images * model.tokens[index])} target tokens"
    rows["images"] = seen
    rows["trains"] = _trains(stage, model.trainable[index] if model else None)
    rows["computes"] = f"in {stage.precision}, {'weights' if stage.train == 'full' else 'base'} stored in {storage}"
    rows["rate"] = _rate(resolved_rate(stage), stage.steps)
    if model:
        size = _in_bytes(_bytes(index, stage, model))
        rows["memory"] = f"{size}: weights, gradients and optimizer; activations come on top"
    for name, fact in rows.items():
        facts.add_row(name, Text(fact))  # a Text, so that the brackets of a pattern are no markup
    return facts


def _counted(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"


def _trains(stage: Stage, parameters: int | None) -> str:
    count = f", {_short(parameters)} parameters" if parameters is not None else ""
    if stage.train == "full":
        what = "the transformer's own weights"
    elif stage.train == "adapter":
        what = "the adapter"
    else:
        what = f"the adapter where {' or '.join(stage.train)} matches"
    average = f", with a moving average (decay {stage.ema:g})" if stage.ema is not None else ""
    return what + count + average


def _bytes(index: int, stage: Stage, model: ModelFacts) -> int:
    trained = model.trainable[index] * (_BYTES_OF_TRAINED + (_BYTES_OF_AVERAGE if stage.ema is not None else 0))
    return trained + (0 if stage.train == "full" else model.base_bytes[resolved_storage(stage)])


def _rate(rate: LearningRate, steps: int) -> str:
    """From the first step to the last."""
    peak = _scientific(rate.peak)
    start = f"{_scientific(rate.warmup_from)} at step 0, {peak} from step {rate.warmup:,}" if rate.warmup else f"{peak} from the first step"
    if rate.schedule == "constant":
        return f"{start} to the last"
    way = "by a cosine" if rate.schedule == "cosine" else "in a straight line"
    return f"{start}, then {way} to {_scientific(rate.floor or 0.0)} at step {steps - 1:,}"


def _mix(stage: Stage, images: Mapping[str, int], sizes: Mapping[str, int]) -> Table:
    if isinstance(stage.mix, str):
        heading = "natural: by size"
    elif isinstance(stage.mix, Mapping):
        heading = "shares as given"
    else:
        heading = f"by size to the power {stage.mix.power:g}"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"mix ({heading})", overflow="fold", max_width=48)
    for name in ("asked", "images", "rows", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    asked = shares(stage.mix, sizes)
    for name, count in images.items():
        table.add_row(Text(name), f"{asked[name]:.2%}", f"{count:,}", f"{sizes[name]:,}", _epochs(count, sizes[name]))
    return table


def _totals(plan: Plan, model: ModelFacts | None, total: Mapping[str, int], sizes: Mapping[str, int]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_footer=True, footer_style="bold")
    steps = sum(stage.steps for stage in plan.stages)
    images = sum(total.values())
    table.add_column("source", "sum", overflow="fold", max_width=40)
    table.add_column("task", f"{steps:,} steps", no_wrap=True)
    table.add_column("images", f"{images:,}", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    for name, source in plan.sources.items():
        count = total.get(name, 0)
        many = "yellow" if count > MANY_EPOCHS * sizes[name] else ""
        table.add_row(Text(name), source.task, f"{count:,}", f"{sizes[name]:,}", Text(_epochs(count, sizes[name]), style=many))
    if model:
        tokens = sum(
            stage.steps * resolved_batch(stage).images * each for stage, each in zip(plan.stages, model.tokens, strict=True)
        )
        table.columns[0].footer = f"sum, {_short(tokens)} target tokens"
    return table


def _warnings(plan: Plan, total: Mapping[str, int], sizes: Mapping[str, int]) -> Iterator[str]:
    for name in plan.sources:
        if not total.get(name):
            yield f"no stage draws from source '{name}'"
        elif total[name] > MANY_EPOCHS * sizes[name]:
            epochs = _epochs(total[name], sizes[name])
            yield (
                f"each row of source '{name}' will be seen {epochs} times; a smaller share, fewer steps or more rows "
                "guard against learning them by heart"
            )


def _epochs(images: int, rows: int) -> str:
    if not rows:
        return "-"
    epochs = images / rows
    if 0 < epochs < 0.005:
        return "<0.01"
    return f"{epochs:.2f}" if epochs < 10 else f"{epochs:,.0f}"


def _scientific(value: float) -> str:
    """1e-4, 2.5e-5, 0.01, 0."""
    if value == 0 or 1e-2 <= value < 1e3:
        return f"{value:g}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _short(number: int) -> str:
    """531 k, 11.9 B."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def _in_bytes(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 2**10:.3g} KiB"
