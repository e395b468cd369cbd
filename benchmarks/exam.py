"""What a model makes of the test rows of the shapes world, which no run has seen: losses, and how many of its samples are right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.shapes import TASKS
from mixing.batch import read_rows
from mixing.buckets import Shapes
from mixing.keys import key
from mixing.selected import Selection
from mixing.source import open_source
from stages.checkpoint import newest_checkpoint
from stages.evaluate import evaluate
from stages.families.family import Family
from stages.families.open import open_family
from stages.going_on import stage_folder
from stages.handoff import build_model, read_baton
from stages.precision import StagePrecision, start_accelerator
from stages.reader import read_plan
from stages.sampler import Sampler, sample
from stages.shown import show

FIRST = 1_000_000
"""Number of the first test row; none is trained on."""
_SAMPLING_STEPS = 4
_AT_ONCE = 64  # samples


@dataclass(frozen=True)
class Examined:
    """What was found, by task."""

    losses: dict[str, float]
    right: dict[str, float]
    """Which part of the samples is right."""
    parts: dict[str, dict[str, float]]
    """The same by attribute."""


def examined(model: Path, folder: Path, run: Path | None = None) -> Examined:
    """Examine a model as it lies there, or with what a run has learnt on it. folder: of the test rows. Rows, noise levels and noise are the same for every model."""
    accelerator = start_accelerator()
    family, precision = open_family(str(model), accelerator.device), StagePrecision("fp32", accelerator.device)
    transformer = family.load_transformer(torch.float32, None) if run is None else _trained(family, run)
    transformer.requires_grad_(False).eval()
    tests = {task: _tests(folder / f"{task}.jsonl", task) for task in TASKS}
    squares = Shapes(shapes.SIDE, family.pixel_multiple)
    measured = evaluate(
        family, transformer, tests, shapes=squares, precision=precision, seed=key("tests") >> 1, accelerator=accelerator, unreadable=lambda row: None
    )
    parts = {}
    for task, selection in tests.items():
        rows = [shapes.row_of(0, task, FIRST + number) for number in selection.held_out.tolist()]
        parts[task] = shapes.score(task, _samples(family, transformer, selection, squares, precision), rows)
    losses = {task: float(np.mean(list(measured.losses[task].values()))) for task in TASKS}
    return Examined(losses, {task: found["right"] for task, found in parts.items()}, parts)


def _trained(family: Family, run: Path) -> torch.nn.Module:
    """The transformer as a run's last stage has left it."""
    plan = read_plan(run / "plan.yaml", ()).plan
    index = len(plan.stages) - 1
    checkpoint = newest_checkpoint(stage_folder(run, index, plan.stages[index].name), lambda message: None)
    assert checkpoint is not None
    return build_model(family, plan, plan.stages[index], f"stages[{index}]", read_baton(checkpoint))[0]


def _tests(file: Path, task: str) -> Selection:
    """The test rows of a task, all of them held out."""
    asked = shapes.source_of(file, task)
    source = open_source(task, path=asked["path"], task=asked["task"], columns=asked["columns"], prompt=None, split="train", on_bad_row="stop", root=Path.cwd())
    return Selection(source, {}, np.arange(len(source), dtype=np.int32))


def _samples(family: Family, transformer: torch.nn.Module, selection: Selection, squares: Shapes, precision: StagePrecision) -> shapes.Pixels:
    """A sample for each row, its noise the same for every model."""
    made = []
    for first in range(0, len(selection.held_out), _AT_ONCE):
        (batch,), _ = read_rows(selection, selection.held_out[first : first + _AT_ONCE].tolist(), squares)
        shown = show(family, batch)
        noise = [key("tests", selection.source.name, row) for row in batch.keys]
        made.append(family.decode_latents(sample(family, transformer, shown.x.shape[1:], noise, shown, Sampler(_SAMPLING_STEPS, precision))).cpu())
    pixels: shapes.Pixels = ((torch.cat(made).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels
