"""Tell quality: what the metrics say of a stage's end, in metrics.jsonl and on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from stages.quality import Quality
from stages.untrained import untrained

if TYPE_CHECKING:
    from stages.leg import Leg


def tell_quality(leg: Leg, found: Quality) -> None:
    """Keep what was found, and say it, with what has changed since the untrained model and since the last stage's end."""
    run, folder = leg.run, leg.run.folder / "evaluations"
    last = None if leg.index == 0 else Quality.load(folder / f"{leg.index}-{run.plan.stages[leg.index - 1].name}-quality.json")
    if run.accelerator.is_main_process:
        file = folder / f"{leg.index + 1}-{leg.stage.name}-quality.json"
        run.room.must(f"what the metrics say, {file.name},", lambda: found.save(file))
    summary = found.summary(untrained(run, leg.stage).quality, last)
    run.log.write({"event": "quality", "stage": leg.stage.name, "step": leg.step, "sources": summary})
    for metric in found.scores:
        table = Table(box=None, header_style="dim")
        for column in (metric, "mean", "real", "shuffled", "since last stage", "since the base"):
            table.add_column(column, justify="left" if column == metric else "right")
        for source, metrics in summary.items():
            entry = metrics[metric]
            changes = [f"{entry[since]:+.3f} ± {entry[f'{since}_error']:.3f}" if since in entry else "" for since in ("since_last", "since_base")]
            table.add_row(source, _number(entry["mean"]), _number(entry["ceiling"]), _number(entry["floor"]), *changes)
        run.log.show(table)


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.3f}"
