"""A plan as two tables: its sources, and its stages with what each asks for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stages.plan import MixAdaptive, MixRamp, Plan, Stage, StillMix
from stages.resolved import objective_words, resolution_words, resolved_rate, resolved_storage, step_words


def plan_tables(plan: Plan) -> list[Text | Padding]:
    """A line about the plan, a table of its sources, and one of its stages."""
    model = plan.model if isinstance(plan.model, str) else plan.model.repo
    return [Text.assemble((plan.name, "bold"), f": {model}, seed {plan.seed}"), Padding(_sources(plan), (0, 0, 0, 1)), Padding(_stages(plan), (0, 0, 0, 1))]


def _sources(plan: Plan) -> Table:
    table = Table("source", "task", "rows from", "which of them", box=None, header_style="dim")
    for name, source in plan.sources.items():
        chosen = [source.where or "", f"of them {source.take.model_dump_json(exclude_unset=True)}" if source.take else "", f"counted {source.repeat} times" if source.repeat != 1 else ""]
        came_from = f"{source.prior.count} images that the model makes" if source.prior else source.path
        table.add_row(Text(name), source.task, Text(came_from), Text(", ".join(filter(None, chosen)) or "all"))
    return table


def _stages(plan: Plan) -> Table:
    columns = {
        "steps": [f"{stage.steps:,}" for stage in plan.stages],
        "a step": [step_words(stage) for stage in plan.stages],
        "pixels": [resolution_words(stage) for stage in plan.stages],
        "mix": [_mix(stage) for stage in plan.stages],
        "learning rate": [_rate(stage) for stage in plan.stages],
        "computes in": [_computes(stage) for stage in plan.stages],
        "trains": [stage.train if isinstance(stage.train, str) else ", ".join(stage.train) for stage in plan.stages],
        "asks": [objective_words(stage) for stage in plan.stages],
    }
    said = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table("stage", box=None, header_style="dim")
    for name in said:
        table.add_column(name, justify="right" if name == "steps" else "left")
    for stage, *cells in zip(plan.stages, *said.values(), strict=True):
        table.add_row(Text(stage.name), *map(Text, cells))
    return table


def _rate(stage: Stage) -> str:
    rate = resolved_rate(stage)
    return f"{rate.peak:g}" + ("" if rate.schedule == "constant" else f", {rate.schedule} to {rate.floor:g}")


def _computes(stage: Stage) -> str:
    stored = resolved_storage(stage)
    return stage.precision if stored == stage.precision else f"{stage.precision}, base in {stored}"


def _mix(stage: Stage) -> str:
    if isinstance(stage.mix, MixRamp):
        return f"from {_still(stage.mix.first)} to {_still(stage.mix.last)}"
    return f"{_still(stage.mix.adaptive)}, following {stage.mix.follows}" if isinstance(stage.mix, MixAdaptive) else _still(stage.mix)


def _still(mix: StillMix) -> str:
    if isinstance(mix, str):
        return mix
    if isinstance(mix, Mapping):
        total = sum(mix.values()) or 1.0
        return ", ".join(f"{name} {share / total:.1%}" for name, share in mix.items())
    return f"by size to the power {mix.power:g}"
