"""Explain: what a plan will do, said before it is done: on the console, or as tables in a notebook. No weights are loaded."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mixing.buckets import Signature
from mixing.mixture import StageMixture
from mixing.selected import Selection
from stages.as_html import to_html
from stages.feed import Sizes, stage_mixture
from stages.placed import newest, placed_adapters, target_of
from stages.plan import LearningRate, MixAdaptive, MixRamp, Plan, Stage, Storage
from stages.problems import PlanError
from stages.recomputation import recomputation_words, recomputed_every
from stages.resolved import objective_words, plain_storage, quantised, resolution_words, resolved_rate, resolved_storage, step_words

MANY_EPOCHS = 20
BYTES_OF_TRAINED = {"adamw": 16, "adamw8bit": 10, "prodigy": 24}  # of each parameter: float32 weight and gradient; two moments; of prodigy also its start and a sum of gradients
_BYTES_OF_AVERAGE = 4
_WIDEST = 100  # characters


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading its weights."""

    family: str
    parameters: int
    """Of the transformer, the adapter not counted."""
    base_bytes: Mapping[Storage, int]
    """Of the transformer's weights, by what they are stored in; what nf4 and int8 leave as it is counts as bf16."""
    trainable: tuple[int, ...]
    """Parameters that train, stage by stage."""
    sizes: Sizes
    """What it makes of an image's size."""
    left_plain: int
    """Parameters of the transformer that nf4 and int8 leave as they are."""


UNKNOWN_SIZES = Sizes(16, 0)
"""Of a model whose configs cannot be had: most ask for multiples of 16 pixels."""


Part = Text | Padding
"""A line, or a table that is moved in."""


@dataclass(frozen=True)
class Explanation:
    """What a plan will do, in lines and tables."""

    parts: tuple[Part, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return to_html(self.parts)

    def __str__(self) -> str:
        console = Console(width=_WIDEST, file=io.StringIO(), record=True)
        show(self.parts, console)
        return console.export_text()


def show(parts: Iterable[Part], console: Console) -> None:
    """Print an explanation as it is made, not wider than is read with ease."""
    for part in parts:
        console.print(part, width=min(_WIDEST, console.width))


def explain(plan: Plan, selections: Mapping[str, Selection], model: ModelFacts | None, memory: Callable[[int, StageMixture], str] | None = None) -> Iterator[Part]:
    """Say what the plan will do: each stage, and what each source gives in all.

    model: None if nothing is known of it. memory: what a stage's steps take, in words, by its number from 0 and its mixture; None if only weights are counted. Raises ValueError if a stage draws from a source without rows, or if an image has more tokens than a
    micro-batch or a step may have.
    """
    repo = plan.model if isinstance(plan.model, str) else plan.model.repo
    known = f" ({model.family}, {short(model.parameters)} parameters)" if model else ""
    stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
    yield Text.assemble((plan.name, "bold"), f": {repo}{known}, {stages}, seed {plan.seed}")
    total: Counter[str] = Counter()
    tokens = 0
    drawn: dict[tuple[str, str], int] = {}
    for index, stage in enumerate(plan.stages):
        mixture = stage_mixture(stage, selections, model.sizes if model else UNKNOWN_SIZES, seed=plan.seed, drawn_before=drawn)
        drawn |= mixture.order.drawn_after(stage.steps)
        images = Counter(dict.fromkeys(mixture.sources, 0))
        for cell, count in zip(mixture.order.cells, mixture.order.counts(np.asarray(stage.steps)).tolist(), strict=True):
            images[cell.source] += count
        total.update(images)
        tokens += mixture.tokens_before(stage.steps)
        yield Text()
        yield Text(f"{index + 1}  {stage.name}", style="bold")
        yield Padding(_facts(plan, index, mixture, model, memory), (0, 0, 0, 3))
        yield Padding(_mix(stage, mixture, images), (0, 0, 0, 3))
        yield Padding(_buckets(mixture, knows_tokens=model is not None), (0, 0, 0, 3))
        for warning in _about_steps(mixture) if model else ():
            yield Padding(Text(warning, style="yellow"), (0, 0, 0, 3))
    yield Text()
    yield Text("In all", style="bold")
    yield Padding(_totals(plan, tokens if model else None, total, selections), (0, 0, 0, 3))
    for name, selection in selections.items():
        yield _refused(name, selection)
    for warning in _warnings(plan, total, selections):
        yield Text(warning, style="yellow")


_OPERATIONS_A_SECOND = 1e14


def explain_run(plan: Plan) -> Iterator[Part]:
    """Open the plan's sources, read its model's configs, and explain, part by part as they are known. Raises PlanError if either cannot be done, or if it does not fit.

    A Hub model whose configs cannot be had is explained without tokens and memory.
    """
    from stages.estimate import memory_words
    from stages.families.open import open_family
    from stages.model_facts import model_facts  # imports diffusers
    from stages.open_sources import open_selections
    from stages.prior import planned, priors_made
    from stages.verify_cache import kept

    selections = open_selections(plan, Path.cwd(), priors_made(plan, Path.cwd()))
    missing = [name for name in plan.sources if name not in selections]
    everything = {name: selections[name] if name in selections else planned(plan, name) for name in plan.sources}
    try:
        facts = model_facts(plan)
        if facts is None:
            yield from explain(plan, everything, None)
        else:
            family = open_family(plan.model, torch.device("cpu"))
            yield from explain(plan, everything, facts, lambda index, mixture: memory_words(family, plan, index, mixture))
        for name in missing:
            yield Text(f"source {name}: its images are made by the model before training, which takes time too", style="dim")
        for line in kept(plan, selections):
            yield Text(line, style="dim")
    except ValueError as error:
        raise PlanError.at("", str(error)) from None


def _facts(plan: Plan, index: int, mixture: StageMixture, model: ModelFacts | None, memory: Callable[[int, StageMixture], str] | None) -> Table:
    stage = plan.stages[index]
    storage, order = resolved_storage(stage), mixture.order
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    images = mixture.images_before(stage.steps)
    made_of = f"micro-batches of {_between(sorted({cell.micro for cell in order.cells}))}"
    rows = {"steps": f"{stage.steps:,}, each of {step_words(stage)} in {made_of}: {_counted(images)}"}
    seen = f"at {resolution_words(stage)} pixels"
    if model:
        tokens = sorted({cell.tokens for cell in order.cells})
        seen += f", {_between(tokens)} tokens each with references and prompt: {short(mixture.tokens_before(stage.steps))} tokens"
    rows["images"] = seen
    if stage.handoff.adapter != "continue":
        rows["adapter"] = _handed_on(plan, index)
    if asks := objective_words(stage):
        rows["asks"] = asks
    rows["trains"] = _trains(stage, list(plan.adapters), model.trainable[index] if model else None)
    by = (f", attention by {stage.attention}" if stage.attention != "auto" else "") + (", the blocks compiled" if stage.compile else "")
    rows["computes"] = f"in {stage.precision}, {'weights' if stage.train == 'full' else 'base'} stored in {storage}{by}"
    rows["rate"] = rate_words(resolved_rate(stage), stage.steps)
    if model:
        size = byte_words(stage_bytes(index, stage, model))
        rows["memory"] = f"{size}: weights, gradients and optimizer; activations come on top" if memory is None else memory(index, mixture)
        if again := recomputation_words(recomputed_every(stage.checkpointing, model.parameters, torch.device("cuda"))):
            rows["activations"] = f"those of {again} are computed again for the gradient" + (", on a GPU" if stage.checkpointing == "auto" else "")
        rows["work"] = work_words(stage, model, mixture.tokens_before(stage.steps))
    for name, fact in rows.items():
        facts.add_row(name, Text(fact))  # a Text, so that the brackets of a pattern are no markup
    return facts


def _between(numbers: Sequence[int]) -> str:
    """4, or 256 to 1,024."""
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _counted(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"


def _handed_on(plan: Plan, index: int) -> str:
    """In which form a stage takes over the adapter."""
    placed = placed_adapters(plan, index)
    rank = newest(placed).settings.rank
    fresh = f"a fresh one of rank {rank}" if len(placed) == 1 or not plan.adapters else "each begins anew"
    return {
        "grow": f"grown to rank {rank}; the function stays the same",
        "shrink": f"shrunk to rank {rank} by SVD; the error is reported",
        "stack": f"what was learnt is frozen, and a fresh one of rank {rank} put beside it",
        "merge": f"what was learnt is folded into the base; {fresh}",
    }[plan.stages[index].handoff.adapter]


def _trains(stage: Stage, names: Sequence[str], parameters: int | None) -> str:
    count = f", {short(parameters)} parameters" if parameters is not None else ""
    if stage.train == "full":
        what = "the transformer's own weights"
    elif stage.train == "adapter":
        what = f"the adapters {' and '.join(names)}" if names else "the adapter"
    elif not names:
        what = f"the adapter where {' or '.join(stage.train)} matches"
    else:
        parts = []
        for name, pattern in (target_of(entry, names) for entry in stage.train):
            of = f"adapter {name}" if name else "every adapter"
            parts.append(of if pattern is None else f"{of} where {pattern} matches")
        what = " and ".join(parts)
    average = f", with a moving average (decay {stage.ema:g})" if stage.ema is not None else ""
    return what + count + average


def stage_bytes(index: int, stage: Stage, model: ModelFacts) -> int:
    """Bytes of a stage's weights, gradients and optimizer; activations come on top. index: the stage's number, from 0."""
    trained = model.trainable[index] * (BYTES_OF_TRAINED[stage.optimizer.name] + (_BYTES_OF_AVERAGE if stage.ema is not None else 0))
    in_fp32 = 2 * model.left_plain if quantised(stage) and plain_storage(stage) == "fp32" else 0  # more than they take in bf16
    return trained + in_fp32 + (0 if stage.train == "full" else model.base_bytes[resolved_storage(stage)])


def work_words(stage: Stage, model: ModelFacts, tokens: int) -> str:
    """The floating-point operations of a stage, and how long a device takes that makes 100 million million of them a second. tokens: of the whole stage.

    Arithmetic, not measured: 2 for each weight and token forwards, 2 backwards to the inputs, and 2 to the weights where those train; attention between tokens,
    encoders, evaluation and recomputed activations come on top.
    """
    operations = (6 if stage.train == "full" else 4) * model.parameters * tokens
    hours = operations / _OPERATIONS_A_SECOND / 3600
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.0f} minutes" if hours >= 1 / 60 else "less than a minute"
    return f"about {operations:.1e} operations, {took} at 100 TFLOP/s; attention and encoders come on top"


def rate_words(rate: LearningRate, steps: int) -> str:
    """A learning rate from the first step to the last, in words."""
    peak = _scientific(rate.peak)
    start = f"{_scientific(rate.warmup_from)} at step 0, {peak} from step {rate.warmup:,}" if rate.warmup else f"{peak} from the first step"
    if rate.schedule == "constant":
        return f"{start} to the last"
    way = "by a cosine" if rate.schedule == "cosine" else "in a straight line"
    return f"{start}, then {way} to {_scientific(rate.floor or 0.0)} at step {steps - 1:,}"


def _mix(stage: Stage, mixture: StageMixture, images: Mapping[str, int]) -> Table:
    if isinstance(stage.mix, str):
        heading = "natural: by size"
    elif isinstance(stage.mix, Mapping):
        heading = "shares as given"
    elif isinstance(stage.mix, MixRamp):
        heading = "changing over the stage"
    elif isinstance(stage.mix, MixAdaptive):
        heading = f"to begin with; then within a factor of {stage.mix.band:g}, as held-out losses say ({stage.mix.follows})"
    else:
        heading = f"by size to the power {stage.mix.power:g}"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"mix ({heading})", overflow="fold", max_width=48)
    changes = isinstance(stage.mix, MixRamp)
    for name in (*(("first step", "last step") if changes else ()), "asked", "images", "rows", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    asked = mixture.asked()
    ends = [mixture.order.asked_at(step) for step in ((0, stage.steps - 1) if changes else ())]
    for name, count in images.items():
        selection = mixture.selections[name]
        rows = ["a stream", ""] if selection.stream else [f"{selection.size:,}", _epochs(count, selection.size)]
        table.add_row(Text(name), *(f"{end[name]:.2%}" for end in ends), f"{asked[name]:.2%}", f"{count:,}", *rows)
    return table


_MOST_BUCKETS = 24  # lines; the others are added up
_MOST_COLUMNS = 6  # sources that are told apart


def _buckets(mixture: StageMixture, *, knows_tokens: bool) -> Table | Text:
    """Width x height of target and references, with what each source has in it; a line where there is one shape."""
    counted: dict[tuple[int, Signature], Counter[str]] = {}
    for cell, signature in zip(mixture.order.cells, mixture.signatures, strict=True):
        counted.setdefault((cell.level, signature), Counter())[cell.source] += cell.rows
    if len(counted) == 1:
        return Text(f"every image is {next(iter(counted))[1]} pixels", style="dim")
    tokens = {(cell.level, signature): cell.tokens for cell, signature in zip(mixture.order.cells, mixture.signatures, strict=True)}
    # A column for each source; of many that would not fit, only how many rows a bucket has, and from how many sources.
    names = list(mixture.sources)
    narrow = len(names) > _MOST_COLUMNS
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("bucket", no_wrap=True)
    if knows_tokens:
        table.add_column("tokens", justify="right", no_wrap=True, min_width=6)
    for name in ("rows", "sources") if narrow else names:
        table.add_column(Text(name, overflow="fold"), justify="right", min_width=9)  # a count of millions is never cut
    ranked = sorted(counted, key=lambda bucket: (bucket[0], -counted[bucket].total()))
    shown = ranked if len(ranked) <= _MOST_BUCKETS else sorted(ranked, key=lambda bucket: -counted[bucket].total())[: _MOST_BUCKETS - 1]
    for bucket in (each for each in ranked if each in shown):
        table.add_row(str(bucket[1]), *([f"{tokens[bucket]:,}"] if knows_tokens else []), *_bucket(mixture, names, counted[bucket], narrow))
    if others := [bucket for bucket in ranked if bucket not in shown]:
        table.add_row(f"and {len(others)} others", *([""] if knows_tokens else []), *_bucket(mixture, names, sum((counted[bucket] for bucket in others), Counter[str]()), narrow))
    return table


def _bucket(mixture: StageMixture, names: Sequence[str], counted: Counter[str], narrow: bool) -> list[str]:
    """What each source has in a bucket; or narrow, its rows and the number of its sources."""
    if narrow:
        return [f"{counted.total():,}", str(sum(counted[name] > 0 for name in names))]
    return [_rows(mixture, name, counted[name]) for name in names]


def _rows(mixture: StageMixture, name: str, count: int) -> str:
    if not count:
        return ""
    return "all" if mixture.selections[name].stream else f"{count:,}"


def _about_steps(mixture: StageMixture) -> Iterator[str]:
    """What a stage's steps cannot hold to."""
    budget = mixture.budget
    largest, least = max(cell.tokens for cell in mixture.order.cells), min(budget.first, budget.last)
    if budget.unit == "tokens" and largest > 0.05 * least:
        yield (
            f"an image has up to {largest:,} tokens, {largest / least:.0%} of a step: its tokens stay within that of what was asked, and not always within 5 %; "
            f"{20 * largest:,} tokens a step would be enough"
        )


def _totals(plan: Plan, tokens: int | None, total: Mapping[str, int], selections: Mapping[str, Selection]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_footer=True, footer_style="bold")
    steps = sum(stage.steps for stage in plan.stages)
    images = sum(total.values())
    table.add_column("source", "sum", overflow="fold", max_width=40)
    table.add_column("task", f"{steps:,} steps", no_wrap=True)
    table.add_column("images", f"{images:,}", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    for name, source in plan.sources.items():
        count, selection = total.get(name, 0), selections[name]
        many = "yellow" if not selection.stream and count > MANY_EPOCHS * selection.size else ""
        rows = ["a stream", ""] if selection.stream else [f"{selection.size:,}", Text(_epochs(count, selection.size), style=many)]
        table.add_row(Text(name), source.task, f"{count:,}", *rows)
    if tokens is not None:
        table.columns[0].footer = f"sum, {short(tokens)} tokens"
    return table


def _refused(name: str, selection: Selection) -> Text:
    """The rows of a source that cannot be used, each with its reason; of many the first ten."""
    bad = selection.source.bad
    lines = [f"{len(bad):,} rows of source '{name}' are refused:"] + [f"  {row.key if row.key.isprintable() else repr(row.key)}: {row.reason}" for row in bad[:10]]
    more = [f"  and {len(bad) - 10:,} more"] if len(bad) > 10 else []
    return Text("\n".join([*lines, *more]) if bad else f"no row of source '{name}' is refused", style="yellow" if bad else "dim")


def _warnings(plan: Plan, total: Mapping[str, int], selections: Mapping[str, Selection]) -> Iterator[str]:
    for name in plan.sources:
        size = selections[name].size
        if not total.get(name):
            yield f"no stage draws from source '{name}'"
        elif not selections[name].stream and total[name] > MANY_EPOCHS * size:
            epochs = _epochs(total[name], size)
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


def short(number: int) -> str:
    """A number in few digits: 531 k, 11.9 B."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def byte_words(size: int) -> str:
    """A number of bytes in words: 22.2 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 2**10:.3g} KiB"
