"""Cells: what a mix draws from at the resolutions of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mixing.buckets import RowClass, Shapes, Signature
from mixing.order import Budget, Cell
from mixing.selected import Selection
from mixing.shares import Mix, weights


@dataclass(frozen=True)
class Level:
    """One resolution of a stage, and its share of the images."""

    shapes: Shapes
    share: float = 1.0


@dataclass(frozen=True)
class Micro:
    """What a micro-batch may hold, one forward and backward pass of one process: so many images, so many tokens, or no more than either."""

    images: int | None = None
    tokens: int | None = None


def cells(
    selections: Mapping[str, Selection], mix: Mix, levels: Sequence[Level], micro: Micro, tokens_of: Callable[[Signature], int], budget: Budget, drawn_before: Mapping[tuple[str, str], int]
) -> list[tuple[Cell, RowClass, Signature]]:
    """The cells that a mix draws from: a source's share is divided among its classes by their rows, and among the levels by their shares.

    Errors as `mixing.shares.weights`; ValueError too where an image has more tokens than a micro-batch or a step may have.
    """
    drawn = weights(mix, {name: selection.size for name, selection in selections.items()}, {name: selection.counted for name, selection in selections.items()})
    least = min(budget.first, budget.last)
    made = []
    for name, weight in drawn.items():
        selection = selections[name]
        rows = sum(len(rows) for rows in selection.training.values())
        for row_class, own in selection.training.items():
            for number, level in enumerate(levels):
                signature = level.shapes.signature(row_class)
                tokens = tokens_of(signature)
                if micro.tokens is not None and tokens > micro.tokens:
                    raise ValueError(f"an image of source '{name}', {signature} pixels, has {tokens:,} tokens, and a micro-batch at most {micro.tokens:,}; raise batch.micro.tokens to that, or lower the resolution")
                if budget.unit == "tokens" and tokens > least:
                    raise ValueError(f"an image of source '{name}', {signature} pixels, has {tokens:,} tokens, more than a step ({least:,}); raise batch.tokens, or lower the resolution")
                fitting = min(micro.images or 2**31, 2**31 if micro.tokens is None else micro.tokens // tokens)
                share = weight * Fraction(len(own), rows) * Fraction(repr(float(level.share)))
                cell = Cell(name, row_class.name, str(signature), len(own), share, fitting, tokens, drawn_before.get((name, row_class.name), 0), number)
                made.append((cell, row_class, signature))
    return made
