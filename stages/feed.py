"""Feed: what a stage of a plan asks of the mixture, in the mixture's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from mixing.buckets import Shapes, Signature
from mixing.cells import Level, Micro
from mixing.mixture import StageMixture
from mixing.order import Budget
from mixing.reading import Latents
from mixing.selected import Selection
from mixing.shares import Changing, Mix, Ramp
from stages.plan import Change, MicroTokens, MixAdaptive, MixRamp, Stage
from stages.resolved import level_shares, main_resolution, resolved_batch, resolved_levels

Changes = Mapping[int, Mapping[str, Fraction]]
"""From which step on which shares."""
_NO_CHANGES: Changes = MappingProxyType({})

# Where the plan does not say, a micro-batch has at most so many images, or as many tokens as so many of the largest ...
_MICRO = 4
# ... and then at most so many images: a source's share is kept to within a micro-batch.
_MOST = 16


@dataclass(frozen=True)
class Sizes:
    """What a model makes of an image's size."""

    multiple: int
    """Sides of images are multiples of so many pixels."""
    text_tokens: int
    """Tokens of a prompt, padding included."""
    coarse: float = 1.0
    """What of a target's tokens an image has on the mean of the levels that it is trained at; below 1 with a pyramid."""

    def image_tokens(self, signature: Signature) -> int:
        """Tokens of a target and its references."""
        target, *references = ((height // self.multiple) * (width // self.multiple) for height, width in (signature.target, *signature.references))
        return max(1, round(self.coarse * target)) + sum(references)

    def tokens(self, signature: Signature) -> int:
        """Tokens that the transformer computes on for one row: of its target, its references, its prompt and that of each region."""
        return self.image_tokens(signature) + self.text_tokens * (1 + signature.regions)


def sizes_at(stage: Stage, sizes: Sizes) -> Sizes:
    """The same with the levels of a stage's pyramid, at its beginning."""
    return replace(sizes, coarse=_coarse(stage)[0])


def _coarse(stage: Stage) -> tuple[float, float]:
    """What of a target's tokens an image has on the mean, in the first step of a stage and in the last."""
    if stage.pyramid is None:
        return 1.0, 1.0
    first, last, _ = level_shares(stage, 1)
    of_levels = [4.0 ** (level + 1 - stage.pyramid.levels) for level in range(stage.pyramid.levels)]
    begins, ends = (sum(share * part for share, part in zip(shares, of_levels, strict=True)) / sum(shares) for shares in (first, last or first))
    return begins, ends


def shapes_at(stage: Stage, pixels: int, multiple: int) -> Shapes:
    """A stage's buckets at a resolution; under a pyramid sides that can be halved for each of its levels."""
    buckets = stage.buckets
    multiple *= 1 if stage.pyramid is None else 2 ** (stage.pyramid.levels - 1)
    return Shapes(pixels, multiple, buckets.max_aspect, buckets.upscale, tuple(buckets.references or ()))


def main_shapes(stage: Stage, multiple: int) -> Shapes:
    """A stage's buckets at its largest resolution, at which held-out rows are seen."""
    return shapes_at(stage, main_resolution(stage), multiple)


def budget_of(stage: Stage, sizes: Sizes | None = None) -> Budget:
    """What a step holds. sizes: the model's. Where the shares of a pyramid's levels change, so do an image's tokens, and a step of as many tokens holds other
    images: the order, which counts every image as in the first step, is asked for more or fewer."""
    batch = resolved_batch(stage)
    unit: Literal["images", "tokens"] = "images" if batch.images is not None else "tokens"
    asked = batch.images if batch.images is not None else batch.tokens
    assert asked is not None
    first, last = (asked.first, asked.last) if isinstance(asked, Change) else (asked, asked)
    if unit == "tokens" and sizes is not None and stage.pyramid is not None:
        side = main_resolution(stage)
        square = Signature((side, side), (), 0)
        begins, ends = (replace(sizes, coarse=coarse).tokens(square) for coarse in _coarse(stage))
        last = round(last * begins / ends)
    return Budget(unit, first, last if stage.steps > 1 else first, stage.steps)


def mix_of(stage: Stage, changes: Changes = _NO_CHANGES, every: int = 0) -> Mix | Ramp | Changing:
    """The shares. changes, every: of an adaptive mix, what was changed so far, and after how many steps it can be; with 0 it stays what it begins with."""
    if isinstance(stage.mix, MixAdaptive):
        return Changing(stage.mix.adaptive, every or stage.steps, changes)
    return Ramp(stage.mix.first, stage.mix.last) if isinstance(stage.mix, MixRamp) else stage.mix


def micro_of(stage: Stage, selections: Mapping[str, Selection], sizes: Sizes) -> Micro:
    """What a micro-batch may hold: what the plan says; or four images; or with a budget of tokens as many as the four largest images have, and 16 images."""
    batch = resolved_batch(stage)
    if isinstance(batch.micro, MicroTokens):
        return Micro(tokens=batch.micro.tokens)
    if batch.micro is not None:
        return Micro(images=batch.micro)
    if batch.images is not None:
        return Micro(images=_MICRO)
    shapes = [shapes_at(stage, level.pixels, sizes.multiple) for level in resolved_levels(stage)]
    largest = max(sizes.tokens(each.signature(row_class)) for selection in selections.values() for row_class in selection.training for each in shapes)
    return Micro(_MOST, _MICRO * largest)


def stage_mixture(
    stage: Stage,
    selections: Mapping[str, Selection],
    sizes: Sizes,
    *,
    seed: int,
    drawn_before: Mapping[tuple[str, str], int],
    latents: Latents | None = None,
    changes: Changes = _NO_CHANGES,
    every: int = 0,
) -> StageMixture:
    """A stage's mixture. sizes: the model's. changes, every: as of `mix_of`. Raises ValueError where the mix draws nothing, or an image has more tokens than a micro-batch or a step may have."""
    of_stage = sizes_at(stage, sizes)
    return StageMixture(
        selections,
        mix=mix_of(stage, changes, every),
        seed=seed,
        stage=stage.name,
        levels=[Level(shapes_at(stage, level.pixels, sizes.multiple), level.share) for level in resolved_levels(stage)],
        budget=budget_of(stage, sizes),
        micro=micro_of(stage, selections, of_stage),
        tokens_of=of_stage.tokens,
        drawn_before=drawn_before,
        latents=latents,
    )
