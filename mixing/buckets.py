"""Buckets: the few shapes that images of all sizes are scaled and cropped to.

A row has a *class*, which follows from the sizes of its images and the number of its regions alone: the nearest of some common aspects, how large
the image is where that is not large, the aspect of each reference, and how many regions there are. A stage's resolution turns each class into shapes in pixels. So a row keeps its class over all stages and
levels, and what is shown in one of them need not be shown again in the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
"""Height and width, in pixels."""

_WIDE = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "5:2", "3:1", "4:1")
ASPECTS: Mapping[str, float] = MappingProxyType(
    {name: float(Fraction(name.replace(":", "/"))) for name in (*(":".join(reversed(wide.split(":"))) for wide in _WIDE[:0:-1]), *_WIDE)}
)
"""Name to width / height, from narrow to wide: the common formats of photographs, screens and films."""

_NAMES = tuple(ASPECTS)
_VALUES = np.asarray(list(ASPECTS.values()))
_BETWEEN = np.sqrt(_VALUES[1:] * _VALUES[:-1])
SQUARE = _NAMES.index("1:1")

LARGEST = 44
"""Images of 2**22 pixels (2048 x 2048) and more are of one size."""

AS_TARGET = -1
"""A reference of its target's aspect, which is cropped as the target is, so that the two stay aligned."""

# Aspects that references are cropped to, by how many there are: more would mean a bucket of its own for every combination.
_OF_ONE = tuple(_NAMES.index(name) for name in ("1:2", "2:3", "1:1", "3:2", "2:1"))
_OF_TWO = tuple(_NAMES.index(name) for name in ("2:3", "1:1", "3:2"))
_OF_MORE = (SQUARE,)

MOST_TOLD_APART = 40
"""Of so many references it is told apart which are of their target's aspect; of more, all are cropped to squares."""


@dataclass(frozen=True, order=True)
class RowClass:
    """What the sizes of a row's images say of the shapes it can have."""

    aspect: int
    """Index into ASPECTS."""
    area: int
    """Pixels of the target, as floor(2 log2 of them), at most LARGEST."""
    references: tuple[int, ...]
    """Of each reference the index of its aspect, or AS_TARGET."""
    regions: int = 0
    """How many parts of the target have a prompt of their own."""

    @property
    def name(self) -> str:
        """What the class is called in keys and checkpoints, the same in every run: `3:2 34 +as +1:1`, or with two regions `3:2 34 2 regions`."""
        references = ("+as" if each == AS_TARGET else f"+{_NAMES[each]}" for each in self.references)
        return " ".join([_NAMES[self.aspect], str(self.area), *references, *([_counted(self.regions)] if self.regions else [])])


@dataclass(frozen=True, order=True)
class Signature:
    """The shapes, and the number of regions, that all rows of a micro-batch have in common."""

    target: Size
    references: tuple[Size, ...]
    regions: int = 0

    def __str__(self) -> str:
        sizes = " + ".join(f"{width}x{height}" for height, width in (self.target, *self.references))
        return f"{_counted(self.regions)} in {sizes}" if self.regions else sizes


@dataclass(frozen=True)
class Shapes:
    """How a resolution turns classes into shapes. An image's pixels come to at most `pixels` squared, its sides are multiples of `multiple`."""

    pixels: int
    """Side of a square of so many pixels."""
    multiple: int
    max_aspect: float = 2.0
    """Images that are wider, or narrower, are cropped to it; 1 crops all to squares."""
    upscale: float = 1.5
    """How much larger than on disk a side may become; smaller images get smaller shapes."""
    references: tuple[int, ...] = ()
    """Side of the square of pixels of each reference of a row that has one, two, three ... of them; the last also of more. Empty: as OmniGen2."""

    def signature(self, row_class: RowClass) -> Signature:
        """The shapes of rows of a class."""
        area = float(self.pixels**2)
        if row_class.area < LARGEST:
            area = min(area, 2.0 ** (row_class.area / 2) * self.upscale**2)
        aspect = min(max(float(_VALUES[row_class.aspect]), 1 / self.max_aspect), self.max_aspect)
        number = len(row_class.references)
        side = self.reference_side(number)
        shapes = []
        for each in row_class.references:
            own = aspect if each == AS_TARGET else min(max(float(_VALUES[each]), 1 / self.max_aspect), self.max_aspect)
            shapes.append(shape(min(float(side**2), area) if each == AS_TARGET else float(side**2), own, self.multiple))
        return Signature(shape(area, aspect, self.multiple), tuple(shapes), row_class.regions)

    def reference_side(self, number: int) -> int:
        """Side of the square of pixels of each of so many references.

        By default one or two get as many pixels as the target, three 9/16 of them, four and more a quarter: OmniGen2's budgets of 1, 1, 0.59 and
        0.26 million pixels beside a target of 1 million (its options/ft_lora.yml).
        """
        if self.references:
            return self.references[min(number, len(self.references)) - 1]
        return max(1, round(self.pixels * {1: 1.0, 2: 1.0, 3: 0.75}.get(number, 0.5)))


def shape(area: float, aspect: float, multiple: int) -> Size:
    """The height and width, multiples of `multiple`, of at most `area` pixels whose aspect (width / height) and area are nearest."""
    height, width = math.sqrt(area / aspect), math.sqrt(area * aspect)
    around = [[max(1, math.floor(side / multiple)) * multiple, max(1, math.ceil(side / multiple - 1e-9)) * multiple] for side in (height, width)]
    fitting = [(h, w) for h in around[0] for w in around[1] if h * w <= area * (1 + 1e-9)] or [(around[0][0], around[1][0])]
    return min(fitting, key=lambda size: (abs(math.log(size[0] * size[1] / area)) + 2 * abs(math.log(size[1] / size[0] / aspect)), size))


def classify(
    sizes: NDArray[np.uint32], num_references: NDArray[np.uint8], reference_sizes: NDArray[np.uint32], num_regions: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.int64], tuple[RowClass, ...]]:
    """The class of every row, as an index into the classes that occur, which are in order.

    sizes: [N, 2], height and width of each target. num_references: [N]. reference_sizes: [their sum, 2], row after row. num_regions: [N]; None where
    no row has any.
    """
    aspects = _nearest(sizes)
    areas = np.minimum(np.floor(2 * np.log2(np.maximum(sizes.astype(np.float64).prod(axis=1), 1)) + 1e-9), LARGEST).astype(np.int64)
    owner = np.repeat(np.arange(len(sizes)), num_references)
    of_reference = _nearest(reference_sizes)
    number = num_references.astype(np.int64)[owner]
    coarse = np.where(number == 1, _coarse(of_reference, _OF_ONE), np.where(number == 2, _coarse(of_reference, _OF_TWO), SQUARE))
    told = np.where((of_reference == aspects[owner]) & (number <= MOST_TOLD_APART), AS_TARGET, coarse)
    # A row's class as one number, so that numpy can find the different ones: its references in base 32, or of three and more as bits.
    first = np.cumsum(number_of := num_references.astype(np.int64)) - number_of
    place = np.arange(len(owner)) - first[owner]
    digit = np.where(number <= 2, (told + 1) * 32 ** np.minimum(place, 1), (told == AS_TARGET) * 2 ** np.minimum(place, MOST_TOLD_APART).astype(np.int64))
    packed = np.zeros(len(sizes), dtype=np.int64)
    np.add.at(packed, owner, digit)
    whole = ((packed * 256 + number_of) * 64 + areas) * 32 + aspects  # below 2**61
    _, example, index = np.unique(whole, return_index=True, return_inverse=True)
    regions = np.zeros(len(sizes), dtype=np.uint8) if num_regions is None else num_regions
    if regions.any():  # for these there is no room in the one number
        _, example, index = np.unique(index.ravel().astype(np.int64) * 256 + regions, return_index=True, return_inverse=True)
    classes = [
        RowClass(int(aspects[row]), int(areas[row]), tuple(told[first[row] : first[row] + number_of[row]].tolist()), int(regions[row])) for row in example.tolist()
    ]
    order = sorted(range(len(classes)), key=classes.__getitem__)
    rank = np.empty(len(classes), dtype=np.int64)
    rank[order] = np.arange(len(classes))
    return rank[index.ravel()], tuple(classes[each] for each in order)


def class_of(target: Size, references: Sequence[Size], regions: int = 0) -> RowClass:
    """The class of one row."""
    sizes, numbers = np.asarray([target], dtype=np.uint32), np.asarray([[len(references)], [regions]], dtype=np.uint8)
    _, classes = classify(sizes, numbers[0], np.asarray(references, dtype=np.uint32).reshape(-1, 2), numbers[1])
    return classes[0]


def stream_class(references: int) -> RowClass:
    """The class of every row of a stream, whose sizes are not known before it is read: squares, without regions."""
    return RowClass(SQUARE, LARGEST, (AS_TARGET,) * references)


def _counted(regions: int) -> str:
    return "1 region" if regions == 1 else f"{regions} regions"


def _nearest(sizes: NDArray[np.uint32]) -> NDArray[np.int64]:
    nearest: NDArray[np.int64] = np.searchsorted(_BETWEEN, sizes[:, 1] / np.maximum(sizes[:, 0], 1)).astype(np.int64)
    return nearest


def _coarse(aspects: NDArray[np.int64], allowed: Sequence[int]) -> NDArray[np.int64]:
    logs, chosen = np.log(_VALUES), np.asarray(allowed)
    coarse: NDArray[np.int64] = chosen[np.abs(logs[aspects][:, None] - logs[chosen]).argmin(axis=1)].astype(np.int64)
    return coarse
