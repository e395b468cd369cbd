"""Rows to measure on: JPEG images in Arrow tables and in folders, and sources of any length that hold no images of their own."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from mixing.buckets import ASPECTS
from mixing.selected import Choice, Selection, select
from mixing.source import Source, open_source
from mixing.tasks import Cells

SHARES: Mapping[str, int] = {"photos": 50, "art": 20, "screens": 10, "sketches": 10, "scans": 10}
"""The sources of the rows with images, and their shares in percent."""

_ROWS_AT_ONCE = 1 << 20
_AREA = 512**2  # pixels of the images that computed rows claim to have


def jpeg(height: int, width: int, seed: int, quality: int = 90) -> bytes:
    """A JPEG as large in bytes as a photograph of the size: smooth colours and a little noise."""
    draw = np.random.default_rng(seed)
    colours = Image.fromarray(draw.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(colours, dtype=np.int16) + draw.integers(-12, 13, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _sizes(side: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths of images that are cropped, or scaled and cropped, to a square of so many pixels."""
    return ((side, side), (side, side * 9 // 8), (side * 5 // 4, side)) if side <= 256 else ((side, side), (side * 9 // 8, side * 5 // 4), (side * 5 // 4, side * 9 // 8))


def make_tables(folder: Path, rows: int, side: int) -> None:
    """Save an Arrow table for each source, as `datasets` does, with so many rows in all."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "height": datasets.Value("int32"), "width": datasets.Value("int32")})
    for place, name in enumerate(SHARES):
        columns: dict[str, list[object]] = {"image": [], "text": [], "height": [], "width": []}
        for row in range(rows // len(SHARES)):
            height, width = _sizes(side)[row % 3]
            for column, value in zip(columns, ({"bytes": jpeg(height, width, row * len(SHARES) + place), "path": None}, f"{name} number {row}", height, width), strict=True):
                columns[column].append(value)
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / name))


def load_tables(folder: Path) -> dict[str, datasets.Dataset]:
    """The tables, images as they are stored."""
    return {name: datasets.load_from_disk(str(folder / name)).cast_column("image", datasets.Image(decode=False)) for name in SHARES}


def make_folders(tables: Mapping[str, datasets.Dataset], folder: Path) -> dict[str, datasets.Dataset]:
    """Write the rows of tables as folders of JPEG files with captions; returns tables that name the files."""
    named = {}
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        files = [folder / name / f"{number:06d}.jpg" for number in range(len(table))]
        for file, row in zip(files, table, strict=True):
            file.write_bytes(row["image"]["bytes"])
            file.with_suffix(".txt").write_text(row["text"])
        columns = {"image": [str(file) for file in files], "text": table["text"][:]}
        named[name] = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    return named


def open_folder(folder: Path, index: Path) -> dict[str, Selection]:
    """All rows of the sources in a folder, opened as a run opens them."""
    return {name: select(_opened(name, folder / name, index), Choice(), 0, folder=index) for name in SHARES}


def _opened(name: str, path: Path, index: Path) -> Source:
    return open_source(name, path=str(path), task="text_to_image", columns={}, prompt=None, split="train", on_bad_row="stop", root=path.parent, index=index)


@cache
def _picture() -> bytes:
    return jpeg(256, 256, 0)


@dataclass(frozen=True)
class ComputedRows:
    """Rows whose keys are their numbers, and which show one picture: nothing is held for each."""

    num_references: NDArray[np.uint8]

    def key(self, index: int) -> str:
        """Its number."""
        return f"{index:08d}"

    def keys(self, indices: NDArray[Any]) -> list[str]:
        """Their numbers."""
        return [f"{index:08d}" for index in indices.tolist()]

    def cells(self, index: int) -> Cells:
        """A picture, and as many references as the row has."""
        return Cells((f"row {index}",), _picture(), (_picture(),) * int(self.num_references[index]))

    def saved(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}


def computed_facts(folder: Path, rows: int, aspects: int = 1, references: int = 0) -> None:
    """Write what rows say of their images into numpy files, as the data index keeps it: so many aspects in turn, and 0 to so many references."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = list(ASPECTS.values())[len(ASPECTS) // 2 - aspects // 2 :][:aspects]
    shapes = np.asarray([(round((_AREA / aspect) ** 0.5), round((_AREA * aspect) ** 0.5)) for aspect in wide], dtype=np.uint32)
    sizes = open_memmap(folder / "sizes.npy", mode="w+", dtype=np.uint32, shape=(rows, 2))
    number = open_memmap(folder / "num_references.npy", mode="w+", dtype=np.uint8, shape=(rows,))
    for start in range(0, rows, _ROWS_AT_ONCE):
        numbers = np.arange(start, min(start + _ROWS_AT_ONCE, rows))
        sizes[numbers] = shapes[numbers % aspects]
        number[numbers] = numbers // aspects % (references + 1)
    of_references = open_memmap(folder / "reference_sizes.npy", mode="w+", dtype=np.uint32, shape=(max(1, int(number.sum(dtype=np.int64))), 2))
    of_references[:] = 512


def computed_sources(folder: Path, names: list[str]) -> list[Source]:
    """Sources that divide the rows of `computed_facts` among themselves, all but equally; everything of them is mapped into memory."""
    sizes, number, of_references = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("sizes", "num_references", "reference_sizes"))
    ends = np.arange(len(names) + 1) * len(sizes) // len(names)
    sources, before = [], 0
    for name, start, end in zip(names, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        own = number[start:end]
        after = before + int(own.sum(dtype=np.int64))
        sources.append(Source(name, "text_to_image", own, sizes[start:end], (), "", ComputedRows(own), of_references[before:after]))
        before = after
    return sources
