"""Evaluation: the held-out loss of each source, on the same rows, timesteps and noise at every point of a run, so that differences are paired.

Row j of a source is measured at the middle of stratum j mod 8 of the family's own timestep density, with noise keyed by (seed, source, row).
Nothing depends on the batch size, the number of processes, or the stage. Pairing is worth a factor of 30 in signal to noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mixing.bad_rows import BadRow
from mixing.batch import MicroBatch, read_rows
from mixing.buckets import Shapes
from mixing.keys import key
from mixing.reading import Latents
from mixing.selected import Selection
from stages.checkpoint import write_whole
from stages.encode import kept_latents
from stages.engine import ALONE
from stages.families.family import Family
from stages.objectives import flow, pyramid
from stages.objectives.parts import errors, whole
from stages.objectives.windows import Windows
from stages.precision import StagePrecision
from stages.shown import show

STRATA = 8
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Measured:
    """One evaluation. losses: source to row key to loss; strata: source to row key to stratum in [0, 8), 0 the least noise."""

    losses: Mapping[str, Mapping[str, float]]
    strata: Mapping[str, Mapping[str, int]]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"losses": self.losses, "strata": self.strata}))

    @staticmethod
    def load(path: Path) -> Measured:
        """Read what `save` wrote."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Measured(saved["losses"], saved["strata"])

    def summary(self, base: Measured | None, start: Measured | None) -> dict[str, dict[str, Any]]:
        """Per source that has any: loss, rows, loss by stratum (None where a stratum has no row), and the paired change since the base and since the stage's start with its standard error."""
        table: dict[str, dict[str, Any]] = {}
        for source, losses in self.losses.items():
            if not losses:
                continue
            entry: dict[str, Any] = {"loss": _mean(list(losses.values())), "rows": len(losses)}
            strata = [[loss for row, loss in losses.items() if self.strata[source][row] == stratum] for stratum in range(STRATA)]
            entry["by_timestep"] = [_mean(stratum) if stratum else None for stratum in strata]
            for name, other in (("since_base", base), ("since_start", start)):
                if other is not None and source in other.losses:
                    pairs = [loss - other.losses[source][row] for row, loss in losses.items() if row in other.losses[source]]
                    if len(pairs) > 1:
                        entry[name], entry[f"{name}_error"] = _mean(pairs), _standard_error(pairs)
            table[source] = entry
        return table


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: list[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Chunk:
    """Some held-out rows of one source, of one signature. strata: of each row."""

    source: str
    batch: MicroBatch
    strata: tuple[int, ...]


def chunks(selections: Mapping[str, Selection], shapes: Shapes, mine: Callable[[int], bool], unreadable: Callable[[BadRow], None], latents: Latents | None = None) -> Iterator[Chunk]:
    """The held-out rows in fixed chunks; chunk number n is read only where mine(n) says so, so that processes can share them.

    unreadable: is told of each row that cannot be decoded; it is left out. latents: those that were made before.
    """
    number = 0
    for name, selection in selections.items():
        references = selection.source.num_references[selection.held_out]
        for count in sorted(set(references.tolist())):
            rows = selection.held_out[references == count].tolist()
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                if mine(number):
                    part = rows[first : first + _ROWS_AT_ONCE]
                    strata = {selection.source.key(row): (first + place) % STRATA for place, row in enumerate(part)}
                    batches, bad = read_rows(selection, part, shapes, latents)
                    for bad_row in bad:
                        unreadable(bad_row)
                    for batch in batches:
                        yield Chunk(name, batch, tuple(strata[row] for row in batch.keys))
                number += 1


@torch.no_grad()
def evaluate(
    family: Family,
    transformer: nn.Module,
    selections: Mapping[str, Selection],
    *,
    shapes: Shapes,
    precision: StagePrecision,
    seed: int,
    accelerator: Accelerator,
    unreadable: Callable[[BadRow], None],
    windows: Windows | None = None,
    t_range: tuple[float, float] = (0.0, 1.0),
    in_step: AbstractContextManager[None] = ALONE,
) -> Measured:
    """Measure every source's held-out rows, shared out among the processes; the same result on each of them, and for any number of them.

    windows: the levels of the pyramid that the rows are measured on, its strata being even parts of the whole way; None for the straight way.
    t_range: the noise levels that they are measured at. unreadable: is told of each of this process's rows that cannot be decoded; they are left out. in_step: what the processes share
    the rows out in, of `Engine.shared_out`.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    rows: list[tuple[str, str, float, int]] = []
    with in_step:
        for chunk in chunks(selections, shapes, lambda number: number % processes == rank, unreadable, kept_latents(family)):
            middles = (torch.tensor(chunk.strata, dtype=torch.float64) + 0.5) / STRATA
            if windows is not None:
                row_losses = level_losses(family, transformer, chunk.batch, middles, windows, precision, seed)
            else:
                kind: Literal["logit_normal", "uniform"] = "uniform" if family.facts.objective == "epsilon" else "logit_normal"
                shift = family.shift(family.tokens(*chunk.batch.targets.size))
                density = flow.Density(kind, shift=shift, low=t_range[0], high=t_range[1])
                row_losses = chunk_losses(family, transformer, chunk.batch, density.t(middles), precision, seed)
            rows += zip([chunk.source] * len(chunk.strata), chunk.batch.keys, row_losses.tolist(), chunk.strata, strict=True)
    gathered = sorted(gather_object(rows)) if processes > 1 else sorted(rows)
    losses: dict[str, dict[str, float]] = {name: {} for name in selections if len(selections[name].held_out)}
    strata: dict[str, dict[str, int]] = {name: {} for name in losses}
    for source, row, loss, stratum in gathered:
        losses[source][row], strata[source][row] = loss, stratum
    return Measured(losses, strata)


def chunk_losses(family: Family, transformer: nn.Module, batch: MicroBatch, t: torch.Tensor, precision: StagePrecision, seed: int) -> torch.Tensor:
    """The loss of each row of a micro-batch at the given t, with noise keyed by (seed, source, row)."""
    shown = show(family, batch)
    x = shown.x
    part = whole(family.path, x, _noise(batch, x, seed), family.seen_timestep(t.to(x.device), precision.dtype))
    with precision.autocast():
        predicted = shown.predict_part(family, transformer, part)
    return errors(predicted, part)


def level_losses(family: Family, transformer: nn.Module, batch: MicroBatch, places: torch.Tensor, windows: Windows, precision: StagePrecision, seed: int) -> torch.Tensor:
    """The same on a pyramid. places: how far each row is on the way from image to noise, float64 [B] in (0, 1); each level has an equal part of it."""
    shown = show(family, batch)
    x = shown.x
    on_way = places * windows.levels
    levels = [windows.levels - 1 - int(place) for place in on_way.tolist()]
    parts = pyramid.split(
        x, _noise(batch, x, seed), levels, (on_way % 1).float(), windows, patch=family.model.sizes.patch, seen=lambda t: family.seen_timestep(t, precision.dtype)
    )
    found = torch.zeros(len(x), device=x.device)
    for part in parts:
        with precision.autocast():
            predicted = shown.predict_part(family, transformer, part)
        found[part.rows.to(x.device)] = errors(predicted, part)
    return found


def _noise(batch: MicroBatch, x: torch.Tensor, seed: int) -> torch.Tensor:
    return flow.noise(x.shape[1:], [key(seed, "evaluate", source, row) for source, row in zip(batch.sources, batch.keys, strict=True)]).to(x.device)
