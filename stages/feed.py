"""Feed: what a stage of a plan asks of the mixture, in the mixture's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixing.buckets import Shapes, Signature
from mixing.cells import Level, Micro
from mixing.mixture import StageMixture
from mixing.order import Budget
from mixing.reading import Latents
from mixing.selected import Selection
from mixing.shares import Mix, Ramp
from stages.plan import Change, MicroTokens, MixRamp, Stage
from stages.resolved import main_resolution, resolved_batch, resolved_levels

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

    def image_tokens(self, signature: Signature) -> int:
        """Tokens of a target and its references."""
        return sum((height // self.multiple) * (width // self.multiple) for height, width in (signature.target, *signature.references))

    def tokens(self, signature: Signature) -> int:
        """Tokens that the transformer computes on for one row: of its target, its references and its prompt."""
        return self.image_tokens(signature) + self.text_tokens


def shapes_at(stage: Stage, pixels: int, multiple: int) -> Shapes:
    """A stage's buckets at a resolution."""
    buckets = stage.buckets
    return Shapes(pixels, multiple, buckets.max_aspect, buckets.upscale, tuple(buckets.references or ()))


def main_shapes(stage: Stage, multiple: int) -> Shapes:
    """A stage's buckets at its largest resolution, at which held-out rows are seen."""
    return shapes_at(stage, main_resolution(stage), multiple)


def budget_of(stage: Stage) -> Budget:
    """What a step holds."""
    batch = resolved_batch(stage)
    unit: Literal["images", "tokens"] = "images" if batch.images is not None else "tokens"
    asked = batch.images if batch.images is not None else batch.tokens
    assert asked is not None
    first, last = (asked.first, asked.last) if isinstance(asked, Change) else (asked, asked)
    return Budget(unit, first, last if stage.steps > 1 else first, stage.steps)


def mix_of(stage: Stage) -> Mix | Ramp:
    """The shares."""
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
    stage: Stage, selections: Mapping[str, Selection], sizes: Sizes, *, seed: int, drawn_before: Mapping[tuple[str, str], int], latents: Latents | None = None
) -> StageMixture:
    """A stage's mixture. Raises ValueError where the mix draws nothing, or an image has more tokens than a micro-batch or a step may have."""
    return StageMixture(
        selections,
        mix=mix_of(stage),
        seed=seed,
        stage=stage.name,
        levels=[Level(shapes_at(stage, level.pixels, sizes.multiple), level.share) for level in resolved_levels(stage)],
        budget=budget_of(stage),
        micro=micro_of(stage, selections, sizes),
        tokens_of=sizes.tokens,
        drawn_before=drawn_before,
        latents=latents,
    )
