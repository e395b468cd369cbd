"""The shapes world: pictures of 16 x 16 pixels for five tasks, whose every attribute can be read off a sample exactly.

    python -m benchmarks.shapes        # prints what real pictures, shuffled ones and a picture of noise score

A picture shows one of 4 shapes in one of 6 colours at one of 9 places in one of 2 sizes, moved by up to half a pixel. Everything of a row is a pure function of
(seed, task, index). The tasks: text to image (the caption names all four), subject (a reference shows shape and colour, the prompt asks for place and size), control
(a reference shows the outline, the prompt a colour), edit (a reference shows the picture, the prompt another colour), other (a reference shows the picture, its mask is asked for).

Samples are judged by the nearest of 10,800 pictures: each of the 432 combinations, moved in 5 x 5 ways. Without the moves real pictures would be judged wrong (a small
circle half a pixel off is nearer to a square), and a number would say nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixing.keys import key, keys, uniform

Pixels = NDArray[np.uint8]
"""[..., 16, 16, 3]."""
Numbers = NDArray[np.float64]

TASKS = ("t2i", "subject", "control", "edit", "other")
SIDE = 16
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 235), "yellow": (240, 215, 40), "purple": (170, 60, 210), "cyan": (50, 205, 215),
}  # fmt: skip
PLACES: Mapping[str, tuple[float, float]] = {
    "top left": (4, 4), "top": (8, 4), "top right": (12, 4), "left": (4, 8), "middle": (8, 8), "right": (12, 8), "bottom left": (4, 12), "bottom": (8, 12), "bottom right": (12, 12),
}  # fmt: skip
"""Across and down, in pixels."""
SIZES: Mapping[str, float] = {"small": 2.3, "large": 3.6}
"""Radius in pixels."""
ATTRIBUTES = ("shape", "colour", "place", "size")

_MOVE = 0.5  # pixels at the most
_MOVES = (-0.4, -0.2, 0.0, 0.2, 0.4)  # of the pictures that are compared with
_RIM = 1.2  # width of an outline, pixels
_FINE = 4  # points across and down that a pixel is the mean of
_OVERLAP = 0.8  # of two masks, from which they count as the same


@dataclass(frozen=True)
class Thing:
    """What a picture shows."""

    shape: str
    colour: str
    place: str
    size: str
    moved: tuple[float, float] = (0.0, 0.0)
    """From the middle of its place, across and down, in pixels."""


@dataclass(frozen=True)
class Row:
    """One row of a task."""

    prompt: str
    target: Thing
    reference: Thing | None
    """What the reference is drawn from; None for text to image."""


def row_of(seed: int, task: str, index: int) -> Row:
    """The row that belongs to these."""
    drawn = uniform(keys(key(seed, "shapes", task, index), np.arange(12, dtype=np.int64))).tolist()

    def one_of(options: Sequence[str] | Mapping[str, object], place: int) -> str:
        return list(options)[int(drawn[place] * len(options))]

    thing = Thing(
        one_of(SHAPES, 0), one_of(COLOURS, 1), one_of(PLACES, 2), one_of(SIZES, 3), ((2 * drawn[4] - 1) * _MOVE, (2 * drawn[5] - 1) * _MOVE)
    )  # fmt: skip
    match task:
        case "t2i":
            return Row(f"a {thing.size} {thing.colour} {thing.shape} at the {thing.place}", thing, None)
        case "subject":
            elsewhere = Thing(thing.shape, thing.colour, one_of(PLACES, 6), one_of(SIZES, 7), ((2 * drawn[8] - 1) * _MOVE, (2 * drawn[9] - 1) * _MOVE))
            return Row(f"the same thing, {thing.size}, at the {thing.place}", thing, elsewhere)
        case "control":
            return Row(f"fill this outline with {thing.colour}", thing, thing)
        case "edit":
            others = [colour for colour in COLOURS if colour != thing.colour]
            return Row(f"make it {thing.colour}", thing, replace(thing, colour=one_of(others, 6)))
        case "other":
            return Row("show the mask of the thing", thing, thing)
        case _:
            raise AssertionError(task)


# --- pictures ----------------------------------------------------------------------------------------------------------------------------


def _inside(shape: str, across: Numbers, down: Numbers, radius: float) -> NDArray[np.bool_]:
    """Which points lie in a shape around the origin."""
    match shape:
        case "circle":
            return np.asarray(across**2 + down**2 <= radius**2)
        case "square":
            return np.asarray(np.maximum(abs(across), abs(down)) <= 0.88 * radius)
        case "triangle":
            return np.asarray((down <= 0.8 * radius) & (abs(across) <= 0.62 * (down + radius)))
        case "cross":
            return np.asarray((np.minimum(abs(across), abs(down)) <= 0.36 * radius) & (np.maximum(abs(across), abs(down)) <= radius))
        case _:
            raise AssertionError(shape)


def coverage(thing: Thing, shrunk: float = 0.0) -> Numbers:
    """How much of each pixel a thing covers, in [0, 1], [16, 16]. shrunk: by so many pixels all around."""
    points = (np.arange(SIDE * _FINE) + 0.5) / _FINE
    (across, down), (moved_across, moved_down) = PLACES[thing.place], thing.moved
    radius = max(SIZES[thing.size] - shrunk, 0.1)
    inside = _inside(thing.shape, points[None, :] - across - moved_across, points[:, None] - down - moved_down, radius)
    return np.asarray(inside.reshape(SIDE, _FINE, SIDE, _FINE).mean(axis=(1, 3)))


def picture(thing: Thing) -> Pixels:
    """The thing on black."""
    return _painted(coverage(thing), COLOURS[thing.colour])


def outline(thing: Thing) -> Pixels:
    """Its rim, white on black."""
    return _painted(coverage(thing) - coverage(thing, _RIM), (255, 255, 255))


def mask(thing: Thing) -> Pixels:
    """White where it is."""
    return _painted(coverage(thing), (255, 255, 255))


def _painted(covered: Numbers, colour: tuple[int, int, int]) -> Pixels:
    painted: Pixels = np.rint(covered[..., None] * np.asarray(colour)).astype(np.uint8)
    return painted


def target_of(task: str, row: Row) -> Pixels:
    """What a row asks for."""
    return mask(row.target) if task == "other" else picture(row.target)


def reference_of(task: str, row: Row) -> Pixels | None:
    """What it shows, if anything."""
    if row.reference is None:
        return None
    return outline(row.reference) if task == "control" else picture(row.reference)


# --- files -------------------------------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, seed: int, rows: Mapping[str, range]) -> Path:
    """Write rows as anybody's files: for each task a .jsonl of instruction, target and reference, and PNGs. Returns the folder; one that is there is left as it is."""
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for task, numbers in rows.items():
        (partial / task).mkdir(parents=True)
        lines = []
        for number in numbers:
            row = row_of(seed, task, number)
            line = {"instruction": row.prompt, "target": f"{task}/{number:06d}.png"}
            Image.fromarray(target_of(task, row)).save(partial / line["target"])
            if (shown := reference_of(task, row)) is not None:
                line["reference"] = f"{task}/{number:06d}-reference.png"
                Image.fromarray(shown).save(partial / line["reference"])
            lines.append(json.dumps(line))
        (partial / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(folder)
    return folder


def source_of(file: Path, task: str) -> dict[str, Any]:
    """How a plan names the rows of a task."""
    columns = {"prompt": "instruction", "target": "target"} | ({} if task == "t2i" else {"reference": "reference"})
    return {"path": str(file), "task": "text_to_image" if task == "t2i" else task, "columns": columns}


def words() -> list[str]:
    """Every word that a prompt can hold, sorted."""
    said = {"a", "at", "the", "same", "thing", "fill", "this", "outline", "with", "make", "it", "show", "mask", "of"}
    return sorted(said.union(SHAPES, COLOURS, SIZES, *(place.split() for place in PLACES)))


# --- judging -----------------------------------------------------------------------------------------------------------------------------


@cache
def _bank() -> tuple[NDArray[np.float32], tuple[Thing, ...]]:
    """Pictures of every combination, moved in 25 ways, as rows of numbers in [0, 1], and what they show."""
    pictures, shown = [], []
    for shape in SHAPES:
        for place in PLACES:
            for size in SIZES:
                for across in _MOVES:
                    for down in _MOVES:
                        covered = coverage(Thing(shape, "red", place, size, (across, down)))
                        for colour, value in COLOURS.items():
                            pictures.append(_painted(covered, value).reshape(-1))
                            shown.append(Thing(shape, colour, place, size, (across, down)))
    return np.stack(pictures).astype(np.float32) / np.float32(255), tuple(shown)


def seen(pictures: Pixels) -> list[Thing]:
    """What pictures [n, 16, 16, 3] show: the nearest of the bank."""
    bank, shown = _bank()
    flat = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    nearest = ((bank**2).sum(axis=1) - 2 * flat @ bank.T).argmin(axis=1)
    return [shown[number] for number in nearest.tolist()]


def score(task: str, samples: Pixels, rows: Sequence[Row]) -> dict[str, float]:
    """Which part of the samples is right, in all attributes and in each; of masks, which part covers what it should by 0.8 of both together, and the mean of that."""
    if task == "other":
        overlaps = [_overlap(sample.mean(axis=-1) >= 127.5, coverage(row.target) >= 0.5) for sample, row in zip(samples, rows, strict=True)]
        return {"right": float(np.mean([overlap > _OVERLAP for overlap in overlaps])), "overlap": float(np.mean(overlaps))}
    found = seen(samples)
    hits = {name: [getattr(thing, name) == getattr(row.target, name) for thing, row in zip(found, rows, strict=True)] for name in ATTRIBUTES}
    return {"right": float(np.mean(np.all(list(hits.values()), axis=0))), **{name: float(np.mean(hit)) for name, hit in hits.items()}}


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def floors(seed: int, number: int) -> dict[str, dict[str, float]]:
    """Of each task, which part is right: of real targets, of the targets of other rows, and of the references handed back as they are."""
    found: dict[str, dict[str, float]] = {}
    for task in TASKS:
        rows = [row_of(seed, task, index) for index in range(number)]
        real = np.stack([target_of(task, row) for row in rows])
        found[task] = {"real": score(task, real, rows)["right"], "shuffled": score(task, np.roll(real, 1, axis=0), rows)["right"]}
        if rows[0].reference is not None:
            found[task]["reference"] = score(task, np.stack([shown for row in rows if (shown := reference_of(task, row)) is not None]), rows)["right"]
    return found


def main() -> None:
    """Print the ceiling and the floors."""
    print(f"{'right, of 1,000 rows':22}{'real pictures':>15}{'other rows':>12}{'the reference':>15}")
    for task, parts in floors(0, 1000).items():
        print(f"{task:22}{parts['real']:>15.1%}{parts['shuffled']:>12.1%}{parts['reference']:>15.1%}" if "reference" in parts else f"{task:22}{parts['real']:>15.1%}{parts['shuffled']:>12.1%}")


if __name__ == "__main__":
    main()
