"""One kind of broken or odd data: how it is written, and what must come of it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[np.uint8]
"""Pixels, [H, W, 3]."""

FILLERS = 100
"""Good rows beside a bad one, so that it is less than 1 % of its source."""


@dataclass(frozen=True)
class Row:
    """What a row must be read as."""

    prompts: tuple[str, ...]
    target: Values | tuple[int, int]
    """Its pixels, or where these need no comparing its height and width."""
    tolerance: int = 0
    """By how much a pixel may be off."""
    references: tuple[Values, ...] = ()
    """The pixels of its references."""


@dataclass(frozen=True)
class Case:
    """A kind. Whatever is not said to be bad must be read right."""

    name: str
    """What it is one of, and which: `bomb: a JPEG of 10,000 scans`."""
    write: Callable[[Path], None]
    """Writes it into an empty folder; the same bytes each time."""
    path: str = "rows"
    """What a plan names, relative to the folder."""
    rows: Mapping[str, Row] = field(default_factory=dict)
    """Good rows by key."""
    bad: Mapping[str, str] = field(default_factory=dict)
    """Rows that are refused when the source is opened: their place, and words of the reason."""
    broken: Mapping[str, str] = field(default_factory=dict)
    """Rows whose pixels are refused when they are decoded: their key, and words of the reason."""
    refused: str = ""
    """Words with which the source as a whole is refused; empty: it is not."""
    fillers: int = 0
    """How many further good rows there are."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What else the plan says of the source: task, columns, prompt, where, ..."""
    streams: bool = False
    """Whether it is also read as a stream, and must come out the same."""
    checked: str = ""
    """Words with which `--check` refuses it; empty: it passes, for names, headers and first rows do not tell."""
    needs: str = ""
    """`root`: only root can make such a file. `nobody`: read as a user who may not read all."""


def colours(height: int = 6, width: int = 9, seed: int = 0) -> Values:
    """Pixels that are all different, so that an image that is turned, mirrored or shifted shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored(pixels: NDArray[Any] | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **options)
    return file.getvalue()


GOOD = stored(colours())


def put(path: Path, content: bytes | str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(rows: Sequence[Mapping[str, object] | str]) -> str:
    """A .jsonl; a row that is text stands in it as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def several(*parts: Callable[[Path], object]) -> Callable[[Path], None]:
    """Carries out one after the other on the same folder."""

    def write(folder: Path) -> None:
        for part in parts:
            part(folder)

    return write


def fill(folder: Path, number: int = FILLERS) -> None:
    """So many good images."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "filler000.png"
    first.write_bytes(GOOD)
    for each in range(1, number):
        os.link(first, folder / f"filler{each:03}.png")
