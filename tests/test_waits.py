"""The host never waits for the device inside a step: on torch's meta device, where tensors have no values, a step is made all the same.

Only when all is computed, before the optimizer, it waits once (tests/test_guard.py).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixing.batch import MicroBatch
from mixing.keys import key
from mixing.reading import Images, Regions
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import ARCHITECTURES
from stages.objective import Objective
from stages.objectives.parts import errors_and_losses
from stages.plan import Stage
from stages.shown import show
from stages.window import CountedPart, Window

CPU, META = torch.device("cpu"), torch.device("meta")
SIDE = 16
ASKED = [
    pytest.param({}, id="plain"),
    pytest.param({"dropout": {"mode": "independent", "references": 0.5}}, id="references left out"),
    pytest.param({"pyramid": {"levels": 2}}, id="pyramid"),
    pytest.param({"loss": {"changed": {}, "weighting": "bell"}}, id="weighed"),
]


WAIT = ("lumina2", "omnigen")
"""The first asks its mask how many words there are (diffusers 0.42.1); of the second the words' numbers are needed on the host."""


class Kept:
    """Stands in for the cache: it counts, and has every prompt."""

    def __init__(self, text: Text) -> None:
        self.text_of_all = text

    def count(self, kind: str, is_hit: bool) -> None:
        assert is_hit

    def text(self, prompt: str) -> Text:
        return self.text_of_all

    def keep_text(self, prompt: str, text: Text) -> None:
        raise AssertionError("it was there")


def on_meta(folder: Path, name: str) -> tuple[Family, torch.nn.Module, tuple[int, ...]]:
    """A family whose device has no values, its transformer there, and the shape of latents."""
    import_module(f"stages.families.tiny.{name}").build(folder)
    real = Family(ARCHITECTURES[name], str(folder), None, None, CPU)
    family = Family(ARCHITECTURES[name], str(folder), None, None, META)
    side = SIDE * family.pixel_multiple // 2
    latents = real.encode_images(torch.zeros(1, 3, side, side)).shape[1:]
    one = real.encode_prompts(["a red disc"])
    kept = Kept(Text(*(None if part is None else part[0] for part in (one.embeds, one.pooled, one.mask))))  # type: ignore[arg-type]
    family.cache = kept  # type: ignore[assignment]
    family.texts.stored = kept
    return family, real.load_transformer(torch.float32, None).to(META).requires_grad_().train(), tuple(latents)


def read(family: Family, latents: tuple[int, ...], references: int, regions: int) -> MicroBatch:
    """Four images as they are read where everything is kept."""
    side = SIDE * family.pixel_multiple // 2
    images = Images((side, side), torch.empty((0, side, side, 3), dtype=torch.uint8), torch.ones(4, *latents), (True,) * 4, (b"",) * 4)
    parts = tuple(Regions(("a disc",) * 4, torch.ones(4, side, side, dtype=torch.bool)) for _ in range(regions))
    return MicroBatch(0, 0, (0, 1, 2, 3), ("a", "b") * 2, ("1", "2", "3", "4"), ("a red disc",) * 4, images, (images,) * references, step_images=4, regions=parts)


def make_step(family: Family, transformer: torch.nn.Module, batch: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """A step but for the optimizer: the gradients' norm, and what is counted."""
    drawn = objective.draw(batch, batch.targets.latents.shape[1:] if batch.targets.latents is not None else None, 0)
    shown = show(family, batch)
    window = Window(0.0)
    for part in objective.split(batch, shown, drawn):
        errors, losses = errors_and_losses(shown.predict_part(family, transformer, part), part)
        torch.autograd.backward(losses.sum() / 4)
        window.parts.append(CountedPart(tuple(batch.sources[row] for row in part.rows.tolist()), part.t, errors, losses.detach()))
    return torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0), window.sum_up(["a", "b"], family.device)


def asked_of(family: Family, asked: dict[str, object]) -> Objective:
    side = SIDE * family.pixel_multiple // 2
    stage = Stage.model_validate({"name": "s", "steps": 10, "lr": 0.1, "batch": 4, "resolution": side, "precision": "fp32", **asked})
    return Objective(family, stage, key(7, "stage", "s"), torch.float32, 40)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, torch.nn.Module, tuple[int, ...]]:
    return on_meta(tmp_path_factory.mktemp("flux"), "flux")


@pytest.mark.parametrize("asked", ASKED)
def test_step_is_made_without_a_look_at_a_value_on_the_device(flux: tuple[Family, torch.nn.Module, tuple[int, ...]], asked: dict[str, object]) -> None:
    family, transformer, latents = flux
    norm, sums = make_step(family, transformer, read(family, latents, 1, 2 if not asked else 0), asked_of(family, asked))
    assert norm.device == sums.device == META


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("flux", *WAIT)])
def test_family_predicts_without_a_look_at_a_value_on_the_device(tmp_path: Path, name: str) -> None:
    family, transformer, latents = on_meta(tmp_path, name)
    norm, _ = make_step(family, transformer, read(family, latents, 0, 0), asked_of(family, {}))
    assert norm.device == META
