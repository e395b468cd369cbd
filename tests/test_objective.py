"""What a stage asks for each image: its noise level, what dropout leaves it, and how much its error counts; all of it from the image's place in the stage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixing.batch import MicroBatch
from mixing.keys import key
from mixing.reading import Images
from models import tiny_flux
from stages.families.family import Family
from stages.families.flux import Flux
from stages.objective import LeftOut, Objective, bell, changed_weights
from stages.objectives import flow, parts
from stages.objectives.flow import Density
from stages.plan import Changed, Stage
from stages.shown import show

CPU = torch.device("cpu")
BASE = {"name": "s", "steps": 10, "lr": 0.1, "batch": 8, "resolution": 8, "precision": "fp32"}
EVENLY = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=True)), None, None, CPU)


def objective(family: Family, **stage: object) -> Objective:
    return Objective(family, Stage.model_validate({**BASE, **stage}), key(7, "stage", "s"), torch.float32, 80)


def images(number: int, seed: int) -> Images:
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (number, 8, 8, 3), dtype=np.uint8))
    return Images((8, 8), pixels, None, (False,) * number, (None,) * number)


def batch_of(number: int = 8, first: int = 0, references: int = 0, sources: tuple[str, ...] = ("a", "b")) -> MicroBatch:
    named = tuple(sources[place % len(sources)] for place in range(number))
    return MicroBatch(
        0, 0, tuple(range(first, first + number)), named, tuple(f"row{place}" for place in range(number)), ("a red disc",) * number,
        images(number, 1), tuple(images(number, 2 + each) for each in range(references)), step_images=number,
    )  # fmt: skip


# --- what is left out ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["joint", "nested", "independent"])
def test_as_often_as_asked_prompts_and_references_are_left_out_together_nested_or_each_by_itself(family: Family, mode: str) -> None:
    dropout = {"mode": mode, "prompt": 0.3} | ({} if mode == "joint" else {"references": 0.4})
    asked = objective(family, dropout=dropout)
    gone = [asked.left_out(batch_of(100, first, references=1)) for first in range(0, 20_000, 100)]
    prompts, references = (np.array([flag for each in gone for flag in getattr(each, name)]) for name in ("prompts", "references"))
    assert abs(prompts.mean() - 0.3) < 0.015
    assert abs(references.mean() - {"joint": 0.3, "nested": 0.12, "independent": 0.4}[mode]) < 0.015
    both = (prompts & references).mean()
    assert abs(both - {"joint": 0.3, "nested": 0.12, "independent": 0.12}[mode]) < 0.015
    assert asked.left_out(batch_of(50, 100, references=1)).prompts == asked.left_out(batch_of(100, 100, references=1)).prompts[:50], "it depends on the image alone"


def test_rows_without_references_lose_their_prompt_alone(family: Family) -> None:
    gone = objective(family, dropout={"mode": "joint", "prompt": 0.5}).left_out(batch_of(40))
    assert any(gone.prompts)
    assert not any(gone.references)


def test_images_whose_references_are_left_out_go_in_a_call_of_their_own(family: Family) -> None:
    batch, asked = batch_of(6, references=2), objective(family)
    shown = show(family, batch)
    without = (True, False, False, True, False, True)
    split = asked.parts(batch, shown, LeftOut((False,) * 6, without), 0)
    whole = asked.parts(batch, shown, LeftOut((False,) * 6, (False,) * 6), 0)
    assert [(part.rows.tolist(), part.has_references) for part in split] == [([1, 2, 4], True), ([0, 3, 5], False)]
    model = family.load_transformer(torch.float32, None)
    for part in split:
        assert torch.equal(part.noised, whole[0].noised[part.rows])
        with torch.no_grad():
            predicted = shown.predict_part(family, model, part)
            alone = family.predict(model, part.noised, part.t, shown.text.rows(part.rows), [r[part.rows] for r in shown.references] if part.has_references else ())
        assert torch.allclose(predicted, alone, atol=1e-6)


# --- noise levels -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", "mode"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_range_keeps_the_densitys_shape_inside_and_nothing_outside(kind: str, shift: float) -> None:
    whole = Density(kind, shift=shift).t(EVENLY).double()  # type: ignore[arg-type]
    inside = Density(kind, shift=shift, low=0.3, high=0.875).t(EVENLY).double()  # type: ignore[arg-type]
    assert float(inside.min()) >= 0.3
    assert float(inside.max()) <= 0.875
    kept = whole[(whole >= 0.3) & (whole <= 0.875)]
    for share in (0.1, 0.5, 0.9):
        assert abs(float(torch.quantile(inside, share)) - float(torch.quantile(kept, share))) < 2e-3


def test_mode_density_is_sd3s() -> None:
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform (Esser et al. 2024, section 3.1)."""
    u = 1 - EVENLY
    for scale in (-0.5, 0.0, 1.29):
        wanted = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert torch.allclose(Density("mode", scale=scale).t(EVENLY).double(), wanted, atol=1e-6)


def test_a_stratified_step_has_one_image_in_every_stratum_in_an_order_of_its_own() -> None:
    orders = []
    for step in range(30):
        places = flow.stratified(5, range(step * 16, step * 16 + 16), step * 16, 16)
        strata = (places * 16).floor().long().tolist()
        assert sorted(strata) == list(range(16))
        orders.append(tuple(strata))
        assert torch.equal(flow.stratified(5, range(step * 16 + 4, step * 16 + 9), step * 16, 16), places[4:9]), "a part of a step is the same part"
    assert len(set(orders)) == 30


# --- how much an error counts -------------------------------------------------------------------------------------------------------------


def test_the_bell_is_diffsynths_with_mean_one(family: Family) -> None:
    """DiffSynth: y = exp(-2 ((t - 500) / 1000)^2) on its 1000 shifted timesteps, less its minimum, times 1000 over the sum."""
    asked = objective(family, loss={"weighting": "bell"}, timesteps={"density": "uniform", "shift": 3.0})
    batch = batch_of(8)
    (part,) = asked.parts(batch, show(family, batch), asked.left_out(batch), 0)
    sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[:-1]
    grid = 1000 * 3 * sigmas / (1 + 2 * sigmas)
    weights = torch.exp(-2 * ((grid - 500) / 1000) ** 2)
    weights = weights - weights.min()
    scale = 1000 / weights.sum()
    wanted = (torch.exp(-2 * (part.t.double() - 0.5) ** 2) - math.exp(-0.5)) * scale
    assert torch.allclose(part.weight.double(), wanted, rtol=5e-3)
    assert float(bell(torch.tensor([0.5]))) == pytest.approx(1 - math.exp(-0.5))


def test_sources_and_tokens_weigh_as_asked_and_the_loss_is_the_weighted_error(family: Family) -> None:
    asked = objective(family, loss={"sources": {"b": 0.25}, "per": "token"}, resolution=16)
    batch = batch_of(4)
    shown = show(family, batch)
    (part,) = asked.parts(batch, shown, asked.left_out(batch), 0)
    assert part.weight.tolist() == [0.25, 0.0625, 0.25, 0.0625]  # 8 x 8 images have a quarter of the tokens of 16 x 16 ones
    predicted = torch.zeros_like(part.target)
    assert torch.allclose(parts.losses(predicted, part), part.weight * parts.errors(predicted, part))


def test_edits_are_weighed_where_they_change_and_equal_pairs_and_new_pictures_are_not() -> None:
    x = torch.zeros(4, 3, 4, 4)
    reference = x.clone()
    reference[1, :, 0, 0] = 1.0  # one place of sixteen: mean difference 1/16
    reference[2] = 2.0  # everything
    reference[3, :, 0, :2] = 0.05  # less than the threshold
    weight, places = changed_weights(x, reference, Changed())
    assert weight.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert float(places[1, 0, 0, 0]) == 16.0
    assert float(places[1].sum()) == 16.0 + 15
    assert bool((places[2] == 1).all())
    assert bool((places[3] == 1).all())
    narrow = changed_weights(x, reference, Changed(limits=(5.0, 8.0)))[1]
    assert float(narrow[1, 0, 0, 0]) == 8.0


def test_an_edits_changed_places_reach_the_loss(family: Family) -> None:
    batch = batch_of(2, references=1)
    batch = replace(batch, references=(replace(batch.targets, pixels=batch.targets.pixels.clone()),))
    batch.references[0].pixels[:, :2, :2] = 255 - batch.references[0].pixels[:, :2, :2]
    shown = show(family, batch)
    (plain,) = objective(family).parts(batch, shown, LeftOut((False,) * 2, (False,) * 2), 0)
    (weighed,) = objective(family, loss={"changed": {}}).parts(batch, shown, LeftOut((False,) * 2, (False,) * 2), 0)
    assert torch.equal(plain.noised, weighed.noised)
    predicted = torch.randn(plain.target.shape, generator=torch.Generator().manual_seed(0))
    assert bool((parts.losses(predicted, weighed) > parts.losses(predicted, plain)).all())
    assert torch.equal(parts.errors(predicted, weighed), parts.errors(predicted, plain)), "what is logged is the plain error"


# --- pyramid ------------------------------------------------------------------------------------------------------------------------------


def test_a_pyramid_trains_each_level_of_a_micro_batch_in_a_call_of_its_own(family: Family) -> None:
    asked = objective(family, pyramid={"levels": 2, "shares": [1, 3]}, batch=8)
    batch = batch_of(8)
    shown = show(family, batch)
    made = asked.parts(batch, shown, asked.left_out(batch), 0)
    assert [(tuple(part.noised.shape[2:]), len(part.rows), part.scale) for part in made] == [((4, 4), 2, 2.0), ((8, 8), 6, 1.0)]
    model = family.load_transformer(torch.float32, None)
    for part in made:
        assert shown.predict_part(family, model, part).shape == part.noised.shape
