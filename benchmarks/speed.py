"""Speed: rows per second of the mixture, of bare random reads of the same rows, and of other libraries' mixing, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers import BATCH, PEERS, Rows
from benchmarks.rows import SHARES
from mixing.batch import MicroBatch
from mixing.buckets import Shapes, Signature
from mixing.cells import Level, Micro
from mixing.images import decode, fit
from mixing.mixture import StageMixture
from mixing.order import Budget
from mixing.selected import Selection

OURS = "Medley"
BARE = "bare dataset[i], decoded as Medley does"
SHORTEST = "bare dataset[i], Pillow's calls alone"
IMAGES = 64
"""Of a step."""

Picture = NDArray[np.uint8]
PictureOf = Callable[[Mapping[str, Any], tuple[int, int]], Picture]
"""What makes a picture of an image as it is stored (bytes, path) and a height and width."""


@dataclass(frozen=True)
class Lap:
    """Some batches of one contender."""

    rows: int
    wall: float
    """Seconds."""
    processor: float
    """Seconds of this process, all threads."""


@dataclass(frozen=True)
class Speed:
    """Rows per second of one contender. Medians over rounds; ratios are to bare reads of the same rows in the same round."""

    case: str
    contender: str
    rows_per_second: float
    ratio: float
    lowest: float
    highest: float
    processor_ratio: float
    """The ratio by processor time, which other work on the machine disturbs less."""


def throughput(
    case: str, selections: Mapping[str, Selection], tables: Mapping[str, datasets.Dataset], side: int, seconds: float, rounds: int, folder: Path | None = None
) -> list[Speed]:
    """Rows per second of the mixture and of bare `dataset[i]`; of the others too where there is a folder for their copies.

    tables: the same rows as those of the selections. side: of the squares to which images are scaled and cropped. seconds: for each, about.
    """
    mixture = stage(selections, side, 10**6)
    (size,) = {signature.target for signature in mixture.signatures}
    start = time.perf_counter()
    for _ in micro_batches(mixture, 0, 2):
        pass
    steps = max(1, round(2 * seconds / rounds / (time.perf_counter() - start)))
    order = [row_numbers(batch) for batch in micro_batches(mixture, 0, steps * rounds)]  # and the files are in the page cache from here on
    contenders: dict[str, Iterator[Any]] = {
        OURS: micro_batches(mixture, 0, steps * rounds),
        BARE: bare_batches(order, tables, size, medleys_picture),
        SHORTEST: bare_batches(order, tables, size, pillows_picture),
    }
    if folder is not None:
        for name, peer in PEERS.items():
            if peer.is_installed():
                contenders[name] = peer_batches(peer.read(tables, SHARES, folder), size)
    laps = race(contenders, steps * IMAGES // BATCH, rounds)
    return [_speed(case, name, own, laps[BARE]) for name, own in laps.items()]


def race(contenders: Mapping[str, Iterator[Any]], batches: int, rounds: int) -> dict[str, list[Lap]]:
    """Draw so many batches from each contender in every round, another one first each time."""
    names, laps = list(contenders), dict[str, list[Lap]]((name, []) for name in contenders)
    for turn in range(rounds):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            wall, processor = time.perf_counter(), time.process_time()
            drawn = sum(1 for _ in islice(contenders[name], batches))
            laps[name].append(Lap(drawn * BATCH, time.perf_counter() - wall, time.process_time() - processor))
            assert drawn == batches
    for contender in contenders.values():
        if close := getattr(contender, "close", None):
            close()
    return laps


def _speed(case: str, name: str, own: Sequence[Lap], bare: Sequence[Lap]) -> Speed:
    ratios = [theirs.wall / lap.wall for lap, theirs in zip(own, bare, strict=True)]
    return Speed(
        case,
        name,
        median(lap.rows / lap.wall for lap in own),
        median(ratios),
        min(ratios),
        max(ratios),
        median(theirs.processor / lap.processor for lap, theirs in zip(own, bare, strict=True)),
    )


def stage(selections: Mapping[str, Selection], side: int, steps: int) -> StageMixture:
    """The sources in their shares, all images scaled and cropped to squares."""
    return StageMixture(
        selections,
        mix={name: float(share) for name, share in SHARES.items()},
        seed=1,
        stage="only",
        levels=[Level(Shapes(side, 16, max_aspect=1.0))],
        budget=Budget("images", IMAGES, IMAGES, steps),
        micro=Micro(images=BATCH),
        tokens_of=_tokens,
        drawn_before={},
    )


def _tokens(signature: Signature) -> int:
    return sum(height * width // 256 for height, width in (signature.target, *signature.references))


def micro_batches(mixture: StageMixture, first: int, last: int) -> Iterator[MicroBatch]:
    """Those of some steps, read in this process."""
    with closing(mixture.batches(first, last, rank=0, processes=1, workers=0, pin_memory=False)) as reading:
        yield from reading


def row_numbers(batch: MicroBatch) -> list[tuple[str, int]]:
    """Source and number of each row: what stands at the end of its key, `photos:12` or `000012.jpg`."""
    return [(source, int(name.removesuffix(".jpg").rsplit(":", 1)[-1])) for source, name in zip(batch.sources, batch.keys, strict=True)]


def bare_batches(order: Sequence[Sequence[tuple[str, int]]], tables: Mapping[str, datasets.Dataset], size: tuple[int, int], picture: PictureOf) -> Iterator[torch.Tensor]:
    """The rows of an order, each read by its number: uint8 [B, H, W, 3]."""
    for batch in order:
        yield _stacked([tables[source][row] for source, row in batch], size, picture)


def peer_batches(rows: Iterator[Rows], size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Rows of another library, decoded as Medley does: uint8 [B, H, W, 3]."""
    with closing(rows):  # type: ignore[type-var]
        for batch in rows:
            yield _stacked(batch, size, medleys_picture)


def _stacked(rows: Sequence[Mapping[str, Any]], size: tuple[int, int], picture: PictureOf) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(row["image"], size) for row in rows]))


def medleys_picture(stored: Mapping[str, Any], size: tuple[int, int]) -> Picture:
    """An image as Medley decodes, scales and crops it."""
    return np.asarray(fit(decode(stored["bytes"] or Path(stored["path"]), size), *size))


def pillows_picture(stored: Mapping[str, Any], size: tuple[int, int]) -> Picture:
    """The same in the fewest calls: no look at orientation, transparency, grey of 16 bits, claimed size or damage."""
    height, width = size
    with Image.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
        colours = image.convert("RGB")
    scale = max(width / colours.width, height / colours.height)
    left, top = (colours.width - width / scale) / 2, (colours.height - height / scale) / 2
    if scale == 1.0:
        return np.asarray(colours.crop((int(left), int(top), int(left) + width, int(top) + height)))
    box = (left, top, left + width / scale, top + height / scale)
    return np.asarray(colours.resize((width, height), Image.Resampling.LANCZOS, box=box))
