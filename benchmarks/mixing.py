"""What the mixture costs, and what other libraries' mixing costs, side by side in one run on the same rows.

    python -m benchmarks.mixing                       # in some minutes on two cores
    python -m benchmarks.mixing --quick               # the same in miniature: that it runs
    options: --rows N  --seconds S  --json FILE

Five tables: rows per second beside bare random reads of the same rows; positions per second of the order alone; time to the first batch far into a
stage; memory by sources and rows; how far the images drawn are from the shares asked for. What is compared takes turns (A/B/A/B), and medians are
shown with the lowest and the highest. Other libraries are measured where they are installed (`benchmarks.peers` says how).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.memory import Held, measure, mixed_shares, mixture_of, per_row
from benchmarks.peers import BATCH, PEERS, First, in_turns
from benchmarks.rows import SHARES, computed_facts, computed_sources, load_tables, make_folders, make_tables, open_folder
from mixing.buckets import Shapes, Signature
from mixing.images import decode, fit
from mixing.mixture import Level, Micro, MicroBatch, StageMixture
from mixing.order import Budget
from mixing.selected import Choice, Selection, select

OURS = "Medley"
IMAGES = 64  # of a step
ROUNDS = 7
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rows: int
    """Of the tables with images."""
    seconds: float
    """For each of what is compared in throughput, about."""
    draws: int
    """Images over which shares are counted."""
    position: int
    """Where a stage is resumed."""
    repeats: int
    """How often the first batch is timed."""
    sources: tuple[int, ...]
    lengths: tuple[int, ...]
    """Rows of the mixtures whose memory is measured."""


FULL = Settings(1500, 7.0, 200_000, 1_000_000, 25, (5, 50, 500), (10**3, 10**4, 10**5, 10**6, 10**7))
QUICK = Settings(150, 0.3, 6_400, 20_000, 5, (5, 50), (10**3, 10**5))


# --- rows per second -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lap:
    """Some batches of one contender."""

    rows: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of this process, all threads."""


@dataclass(frozen=True)
class Speed:
    """Rows per second of one contender, and how often as many as bare reads of the same rows: medians over rounds, and the extremes."""

    case: str
    contender: str
    rows_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_cpu: float
    """The same by processor time, which other processes on the machine disturb less."""


def stage(selections: Mapping[str, Selection], side: int, steps: int) -> StageMixture:
    """The sources in their shares, all images cropped to squares."""
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
    """Of these steps, read in this process."""
    with closing(mixture.batches(first, last, rank=0, processes=1, workers=0, pin_memory=False)) as reading:
        yield from reading


def row_numbers(batch: MicroBatch) -> list[tuple[str, int]]:
    """The source and the number of each row: what stands at the end of its key, `train:12` or `000012.jpg`."""
    return [(source, int(key.removesuffix(".jpg").rsplit(":", 1)[-1])) for source, key in zip(batch.sources, batch.keys, strict=True)]


def medleys_picture(stored: Mapping[str, Any], size: tuple[int, int]) -> Picture:
    """A stored image as Medley decodes and crops it."""
    content = stored["bytes"] or Path(stored["path"])
    return np.asarray(fit(decode(content, size), *size))


def pillows_picture(stored: Mapping[str, Any], size: tuple[int, int]) -> Picture:
    """A stored image as the shortest code would decode and crop it: no look at its format, its orientation, transparency or damage."""
    height, width = size
    with Image.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
        image.draft("RGB", (2 * width, 2 * height))
        colours = image.convert("RGB")
    scale = max(width / colours.width, height / colours.height)
    seen_width, seen_height = width / scale, height / scale
    left, top = (colours.width - seen_width) / 2, (colours.height - seen_height) / 2
    if scale == 1.0:
        return np.asarray(colours.crop((int(left), int(top), int(left) + width, int(top) + height)))
    return np.asarray(colours.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + seen_width, top + seen_height)))


def stacked(rows: Sequence[Mapping[str, Any]], size: tuple[int, int], picture: Callable[[Mapping[str, Any], tuple[int, int]], Picture]) -> torch.Tensor:
    """Rows as one tensor, uint8 [B, H, W, 3]."""
    return torch.from_numpy(np.stack([picture(row["image"], size) for row in rows]))


def throughput(case: str, mixture: StageMixture, tables: Mapping[str, datasets.Dataset], settings: Settings, folder: Path | None) -> list[Speed]:
    """Rows per second of the mixture, and of bare `dataset[i]` of the same rows; of the others too, where there is a folder for their copies."""
    size = mixture.signatures[0].target
    start = time.perf_counter()
    for _ in micro_batches(mixture, 0, 2):  # files are in the page cache from here on
        pass
    length = max(1, round(settings.seconds / ROUNDS / (time.perf_counter() - start) * 2))  # steps of a round
    batches = [row_numbers(batch) for batch in micro_batches(mixture, 0, length * ROUNDS)]
    own: Callable[[], Iterator[Sequence[Any]]] = lambda: (batch.keys for batch in micro_batches(mixture, 0, length * ROUNDS))  # noqa: E731
    bare = (([tables[name][row] for name, row in batch], pictures) for pictures in () for batch in batches)  # noqa: F841
    contenders: dict[str, Iterator[Any]] = {OURS: own()}
    for name, picture in (("bare dataset[i], the same decoding", medleys_picture), ("bare dataset[i], Pillow's own calls alone", pillows_picture)):
        contenders[name] = (stacked([tables[source][row] for source, row in batch], size, picture) for batch in batches)
    if folder is not None:
        for name, peer in PEERS.items():
            if peer.is_installed():
                contenders[name] = (stacked(rows, size, medleys_picture) for rows in peer.read(tables, SHARES, folder))
    return speeds(case, race(contenders, length * IMAGES // BATCH, ROUNDS))
