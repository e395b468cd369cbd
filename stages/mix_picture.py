"""The order of a plan drawn before anything trains: what stands at which place, how far what is drawn is from what is asked, and how often rows are seen.

    from stages.mix_picture import mix_picture
    mix_picture(checked("plans/quickstart.yaml").plan)          # in a notebook it is shown; .save("order.png") writes it

No weights are loaded. The picture is of the very order that a run draws.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mixing.keys import key
from mixing.mixture import StageMixture
from stages.explain import UNKNOWN_SIZES
from stages.feed import stage_mixture
from stages.open_sources import open_selections
from stages.plan import Plan
from stages.prior import planned, priors_made
from stages.problems import PlanError
from stages.quiet import quiet_libraries

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#4d4d4d", "#bcbd22", "#17becf")  # the first six are told apart by the colour-blind
_MOST_POINTS = 400  # of a line
_MOST_NAMES = 12  # sources in a legend


@dataclass(frozen=True)
class Picture:
    """A picture as PNG."""

    png: bytes

    def save(self, path: str | Path) -> Path:
        """Write it to a file."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.png


def mix_picture(plan: Plan, *, stages: Sequence[str] = (), images: int = 240) -> Picture:
    """Draw the order of a plan's stages. stages: of these alone, by name; left out, of all. images: how many of a stage's first images are drawn one by one.

    Raises PlanError if a source or the model's configs cannot be read, and for a stage that is not there.
    """
    if unknown := set(stages) - (known := {stage.name for stage in plan.stages}):
        raise PlanError.at("stages", f"no stage '{min(unknown)}' (stages: {', '.join(sorted(known))})")
    chosen = [(stage, mixture) for stage, mixture in zip(plan.stages, stage_mixtures(plan), strict=True) if not stages or stage.name in stages]
    figure = Figure(figsize=(11.0, 4.2 * len(chosen) + 0.4), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(plan.sources)}
    for row, (stage, mixture) in zip(rows, chosen, strict=True):
        row.suptitle(f"{stage.name}: {stage.steps:,} steps, {mixture.images_before(stage.steps):,} images", fontsize=11, x=0.01, ha="left", fontweight="bold")
        panels = row.subplot_mosaic([["first", "first"], ["off", "epochs"]], height_ratios=[0.9, 1.4])
        names = list(mixture.sources)
        _draw_first(panels["first"], mixture, names, colours, images)
        _draw_off(panels["off"], mixture, names, colours, plan.seed)
        _draw_epochs(panels["epochs"], mixture, names, colours)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return Picture(written.getvalue())


def stage_mixtures(plan: Plan) -> list[StageMixture]:
    """The mixture of each stage, as a run has it. Raises PlanError if a source or the model's configs cannot be read, or if a stage draws nothing."""
    quiet_libraries()
    from stages.model_facts import model_facts  # imports diffusers

    opened = open_selections(plan, Path.cwd(), priors_made(plan, Path.cwd()))
    selections = {name: opened[name] if name in opened else planned(plan, name) for name in plan.sources}
    facts = model_facts(plan)
    mixtures: list[StageMixture] = []
    drawn: dict[tuple[str, str], int] = {}
    for stage in plan.stages:
        try:
            mixture = stage_mixture(stage, selections, facts.sizes if facts else UNKNOWN_SIZES, seed=plan.seed, drawn_before=drawn)
        except ValueError as error:
            raise PlanError.at("", str(error)) from None
        drawn |= mixture.order.drawn_after(stage.steps)
        mixtures.append(mixture)
    return mixtures


def counted(mixture: StageMixture, steps: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Images of each source that a stage has drawn after so many steps, each shaped as `steps`."""
    counts = mixture.order.counts(steps)
    sums = {name: np.zeros(steps.shape, dtype=np.int64) for name in mixture.sources}
    for number, cell in enumerate(mixture.order.cells):
        sums[cell.source] += counts[..., number]
    return sums


def _draw_first(axes: Axes, mixture: StageMixture, names: Sequence[str], colours: dict[str, str], images: int) -> None:
    """A mark for each of the first images, in the row of its source; lines between steps."""
    steps = 1
    while steps < mixture.budget.steps and mixture.images_before(steps) < images:
        steps += 1
    drawn = mixture.order.steps(0, steps)
    sources = np.asarray([names.index(cell.source) for cell in mixture.order.cells])[drawn.cell][:images]
    places = np.arange(len(sources))
    for number, name in enumerate(names):
        here = places[sources == number]
        axes.vlines(here + 0.5, number - 0.4, number + 0.4, colors=colours[name], linewidth=max(1.0, 650 / images))
    axes.vlines([start for start in drawn.starts.tolist() if start <= len(sources)], -0.6, len(names) - 0.4, colors="0.8", linewidth=0.6, zorder=0)
    asked = mixture.asked()
    axes.set_yticks(range(len(names)), [_named(name, asked[name]) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, len(sources))
    axes.set_title(f"the first {len(sources)} images, one mark each; lines between steps", fontsize=9, loc="left", color="0.3")
    _plain(axes)


def _draw_off(axes: Axes, mixture: StageMixture, names: Sequence[str], colours: dict[str, str], seed: int) -> None:
    """Images drawn beyond those asked for, of each source over the stage; pale, what independent draws by the same shares would have given."""
    steps = _over(mixture.budget.steps)
    counts = counted(mixture, steps)
    total = np.asarray([mixture.images_before(step) for step in steps.tolist()])
    step_shares = np.asarray([[share for share in mixture.order.asked_at(max(step - 1, 0)).values()] for step in steps.tolist()])
    generator = np.random.default_rng(key(seed, "independent draws"))
    drawn_apart = np.cumsum([generator.multinomial(number, shares / shares.sum()) for number, shares in zip(np.diff(total, prepend=0).tolist(), step_shares, strict=True)], axis=0)
    for number, name in enumerate(names):
        asked = np.asarray([mixture.order.asked(step)[name] for step in steps.tolist()]) * total
        axes.plot(steps, drawn_apart[:, number] - asked, color=colours[name], alpha=0.3, linewidth=1)
        axes.plot(steps, counts[name] - asked, color=colours[name], linewidth=1.6)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -2.0), max(high, 2.0))  # a source alone is never off: that shall not look like noise
    axes.set_title("images drawn beyond those asked for; pale: independent draws", fontsize=9, loc="left", color="0.3")
    axes.set_xlabel("step", fontsize=8)
    _plain(axes)


def _draw_epochs(axes: Axes, mixture: StageMixture, names: Sequence[str], colours: dict[str, str]) -> None:
    """How often each source's rows were seen, earlier stages counted."""
    steps = _over(mixture.budget.steps)
    counts = counted(mixture, steps)
    before = dict.fromkeys(names, 0)
    for cell in {(cell.source, cell.group): cell for cell in mixture.order.cells}.values():
        before[cell.source] += cell.drawn_before
    for name in names:
        if mixture.selections[name].stream is None and mixture.selections[name].size:
            axes.plot(steps, (before[name] + counts[name]) / mixture.selections[name].size, color=colours[name], linewidth=1.6, label=name)
    axes.set_title("epochs: how often a source's rows were seen so far", fontsize=9, loc="left", color="0.3")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylim(bottom=0)
    if len(names) <= _MOST_NAMES:
        axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _over(steps: int) -> NDArray[np.int64]:
    """Steps from the first to the last, evenly apart, as many as a line has points."""
    return np.unique(np.linspace(0, steps, min(steps, _MOST_POINTS) + 1).round().astype(np.int64))


def _named(name: str, share: float) -> str:
    short = name if len(name) <= 24 else f"{name[:23]}…"
    return f"{short}  {share:.1%}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)
