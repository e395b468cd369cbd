"""Evaluation: the held-out loss of each source, on the same rows, timesteps and noise at every point of a run, so that differences are paired.

Rows of a source have a fixed order, by a hash of their names, of which the first n are measured. Row j is measured in stratum j mod 8 of the family's own timestep
density, where inside it follows from a key, and its noise from another, of (seed, source, row). Nothing depends on the batch size, the number of processes, or the stage.
Pairing is worth a factor of 30 in signal to noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mixing.bad_rows import BadRow
from mixing.batch import MicroBatch, read_rows
from mixing.buckets import Shapes
from mixing.keys import key, uniform
from mixing.reading import Latents
from mixing.selected import Selection
from mixing.selection import row_hashes
from stages.encode import kept_latents
from stages.engine import ALONE
from stages.families.family import Family
from stages.measured import Measured
from stages.objectives import flow, pyramid
from stages.objectives.parts import errors, whole
from stages.objectives.windows import Windows
from stages.precision import StagePrecision
from stages.shown import Shown, show

STRATA = 8
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Portion:
    """Held-out rows of one source that are read together, with as many references each."""

    source: str
    rows: tuple[int, ...]
    strata: tuple[int, ...]
    """Of each row, in [0, 8), 0 the least noise."""


def in_order(selection: Selection) -> list[int]:
    """The held-out rows of a source in the order in which they are measured and sampled: by the hash that held them out, so that the first n are what n rows would have been."""
    hashes = row_hashes(selection.source.name, selection.source.keys(selection.held_out))
    rows: list[int] = selection.held_out[np.argsort(hashes, kind="stable")].tolist()
    return rows


def portions(selections: Mapping[str, Selection], rows: int | None) -> list[Portion]:
    """The first rows of every source, in portions that processes share out. rows: how many; None for all that are held out."""
    found = []
    for name, selection in selections.items():
        ordered = in_order(selection)[:rows]
        references = selection.source.num_references[ordered].tolist()
        for count in sorted(set(references)):
            places = [place for place, its in enumerate(references) if its == count]
            for first in range(0, len(places), _ROWS_AT_ONCE):
                part = places[first : first + _ROWS_AT_ONCE]
                found.append(Portion(name, tuple(ordered[place] for place in part), tuple(place % STRATA for place in part)))
    return found


@dataclass(frozen=True)
class Chunk:
    """Some held-out rows of one source, of one signature. quantiles: of the timestep density, of each row, float64 in (0, 1)."""

    source: str
    batch: MicroBatch
    quantiles: torch.Tensor


def chunks(
    own: Iterable[Portion], selections: Mapping[str, Selection], shapes: Shapes, seed: int, unreadable: Callable[[BadRow], None], latents: Latents | None = None
) -> Iterator[Chunk]:
    """Read portions. unreadable: is told of each row that cannot be decoded; it is left out. latents: those that were made before."""
    for portion in own:
        selection = selections[portion.source]
        quantiles = {}
        for row, stratum in zip(portion.rows, portion.strata, strict=True):
            name = selection.source.key(row)
            within = uniform(np.asarray([key(seed, "evaluate t", portion.source, name)], dtype=np.uint64))
            quantiles[name] = (stratum + float(within[0])) / STRATA
        batches, bad = read_rows(selection, portion.rows, shapes, latents)
        for bad_row in bad:
            unreadable(bad_row)
        for batch in batches:
            yield Chunk(portion.source, batch, torch.tensor([quantiles[row] for row in batch.keys], dtype=torch.float64))


@dataclass(frozen=True)
class Way:
    """How held-out rows are measured in a stage."""

    shapes: Shapes
    precision: StagePrecision
    seed: int
    windows: Windows | None = None
    """The levels of the pyramid that rows are measured on, the strata being even parts of the whole way; None for the straight way."""
    t_range: tuple[float, float] = (0.0, 1.0)
    """The noise levels that they are measured at."""


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
    rows: int | None = None,
    in_step: AbstractContextManager[None] = ALONE,
) -> Measured:
    """Measure held-out rows of every source, shared out among the processes; the same result on each of them, and for any number of them.

    shapes, precision, seed, windows, t_range: as of `Way`. unreadable: is told of each of this process's rows that cannot be decoded, or that the autoencoder makes nan of; they are
    left out, lest one of them be all that is known of its source. rows: as of
    `portions`. in_step: what the processes share the rows out in, of `Engine.shared_out`.
    """
    way = Way(shapes, precision, seed, windows, t_range)
    rank, processes = accelerator.process_index, accelerator.num_processes
    found: list[tuple[str, str, float, float]] = []
    with in_step:
        for chunk in chunks(portions(selections, rows)[rank::processes], selections, way.shapes, way.seed, unreadable, kept_latents(family)):
            batch, shown = chunk.batch, show(family, chunk.batch)
            t, row_losses = measure(family, transformer, chunk, shown, way)
            for row, level, loss, is_number in zip(batch.keys, t, row_losses.tolist(), shown.are_numbers().tolist(), strict=True):
                if is_number:
                    found.append((chunk.source, row, level, loss))
                else:
                    unreadable(BadRow(chunk.source, row, "its latents hold values that are no numbers"))
    gathered = sorted(gather_object(found)) if processes > 1 else sorted(found)
    asked = {name: len(selection.held_out[:rows]) for name, selection in selections.items() if len(selection.held_out)}
    losses: dict[str, dict[str, float]] = {name: {} for name in asked}
    levels: dict[str, dict[str, float]] = {name: {} for name in asked}
    for source, row, level, loss in gathered:
        losses[source][row], levels[source][row] = loss, level
    return Measured(losses, levels, asked)


def measure(family: Family, transformer: nn.Module, chunk: Chunk, shown: Shown, way: Way) -> tuple[list[float], torch.Tensor]:
    """The noise level and the loss of each row of a chunk, which is shown as `shown`. The level is what the row asks for, before a precision rounds it, so that it is the same in every stage."""
    if way.windows is not None:
        levels, within = on_way(chunk.quantiles, way.windows)
        t = [way.windows.end(level) + float(place) * way.windows.width(level) for level, place in zip(levels, within, strict=True)]
        return t, level_losses(family, transformer, chunk.batch, shown, chunk.quantiles, way.windows, way.precision, way.seed)
    kind: Literal["logit_normal", "uniform"] = "uniform" if family.facts.objective == "epsilon" else "logit_normal"
    shift = family.shift(family.tokens(*chunk.batch.targets.size))
    at = flow.Density(kind, shift=shift, low=way.t_range[0], high=way.t_range[1]).t(chunk.quantiles)
    return at.tolist(), chunk_losses(family, transformer, chunk.batch, shown, at, way.precision, way.seed)


def chunk_losses(family: Family, transformer: nn.Module, batch: MicroBatch, shown: Shown, t: torch.Tensor, precision: StagePrecision, seed: int) -> torch.Tensor:
    """The loss of each row of a micro-batch at the given t, with noise keyed by (seed, source, row)."""
    x = shown.x
    part = whole(family.path, x, _noise(batch, x, seed), family.seen_timestep(t.to(x.device), precision.dtype))
    with precision.autocast():
        predicted = shown.predict_part(family, transformer, part)
    return errors(predicted, part)


def level_losses(
    family: Family, transformer: nn.Module, batch: MicroBatch, shown: Shown, places: torch.Tensor, windows: Windows, precision: StagePrecision, seed: int
) -> torch.Tensor:
    """The same on a pyramid. places: how far each row is on the way from image to noise, float64 [B] in (0, 1); each level has an equal part of it."""
    x = shown.x
    levels, within = on_way(places, windows)
    parts = pyramid.split(
        x, _noise(batch, x, seed), levels, within, windows, patch=family.model.sizes.patch, seen=lambda t: family.seen_timestep(t, precision.dtype)
    )
    found = torch.zeros(len(x), device=x.device)
    for part in parts:
        with precision.autocast():
            predicted = shown.predict_part(family, transformer, part)
        found[part.rows.to(x.device)] = errors(predicted, part)
    return found


def on_way(places: torch.Tensor, windows: Windows) -> tuple[list[int], torch.Tensor]:
    """The level of each place on the way from image to noise, and where inside it that is, float32 in [0, 1)."""
    scaled = places * windows.levels
    return [windows.levels - 1 - int(place) for place in scaled.tolist()], (scaled % 1).float()


def _noise(batch: MicroBatch, x: torch.Tensor, seed: int) -> torch.Tensor:
    return flow.noise(x.shape[1:], [key(seed, "evaluate", source, row) for source, row in zip(batch.sources, batch.keys, strict=True)]).to(x.device)
