"""The flux family, what tests/test_flux.py leaves out: latents, adapters and inputs of both pipelines, Kontext's step at two aspect ratios."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step, reloaded, without_gradient
from stages.families.base import RegionTexts, Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny.flux import build

PIPELINES = ("FluxPipeline", "FluxKontextPipeline")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {pipeline: open_family(str(build(tmp_path_factory.mktemp("model") / "m", guidance=True, pipeline=pipeline)), CPU) for pipeline in PIPELINES}


def predict(
    family: Family, transformer: nn.Module, *, t: float = 0.5, text: Text | None = None, x: Tensor | None = None, references: tuple[Tensor, ...] = (), regions: RegionTexts | None = None,
    guidance: float | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    x = noise(3, 4, 8, 12) if x is None else x
    return family.predict(transformer, x, torch.full((len(x),), t), text or family.encode_prompts(PROMPTS), references, regions=regions, guidance=guidance, scale=scale)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_one_step_equals_the_kontext_pipelines_own_step_with_references(families: dict[str, Family], height: int, width: int, batch: int) -> None:
    family = families["FluxKontextPipeline"]
    transformer = family.load_transformer(torch.float32, None)
    x, reference = noise(batch, 4, height // 2, width // 2), noise(batch, 4, 6, 10, seed=2)
    pipe = family.stock_pipeline(transformer)
    packed = FluxPipeline._pack_latents(x, batch, 4, *x.shape[2:])
    after = pipelines_first_step(
        pipe,
        lambda note: pipe(
            image=reference, prompt=PROMPTS[:batch], height=height, width=width, max_area=height * width, _auto_resize=False, guidance_scale=1.0, latents=packed, num_inference_steps=4,
            output_type="latent", callback_on_step_end=note, max_sequence_length=8,
        ),
    )  # fmt: skip
    ours = our_first_step(family, transformer, x, PROMPTS[:batch], steps=4, references=(reference,))
    assert largest(FluxPipeline._pack_latents(ours, batch, 4, *x.shape[2:]), after) <= 1e-5
    assert largest(ours, our_first_step(family, transformer, x, PROMPTS[:batch], steps=4)) > 1e-3


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_latents_are_the_pipelines_own(families: dict[str, Family], pipeline: str) -> None:
    family = families[pipeline]
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    packed = FluxPipeline._pack_latents(latents, *latents.shape)
    if pipeline == "FluxKontextPipeline":
        assert largest(latents, pipe._encode_vae_image(images, None)) <= 1e-5

    def put(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**values, "latents": packed}

    # What the pipeline decodes is taken from it, by a run whose last step is made to end at these latents.
    pipe.set_progress_bar_config(disable=True)
    sizes = {"max_area": 16 * 24} if pipeline == "FluxKontextPipeline" else {}
    decoded = pipe(prompt=PROMPTS, height=16, width=24, num_inference_steps=1, output_type="pt", callback_on_step_end=put, max_sequence_length=8, **sizes).images
    assert largest(family.decode_latents(latents) / 2 + 0.5, decoded) <= 1e-5


@torch.no_grad()
def test_every_input_changes_the_output(families: dict[str, Family]) -> None:
    family = families["FluxKontextPipeline"]
    transformer, text = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS)
    one, two = noise(3, 4, 8, 8, seed=2), noise(3, 4, 8, 8, seed=3)
    assert text.pooled is not None
    other = family.encode_prompts(["green", "the same", "it"])
    masks = torch.zeros(3, 1, 16, 24, dtype=torch.bool)
    masks[..., :12] = True
    plain = predict(family, transformer, text=text)
    others = {
        "t": predict(family, transformer, t=0.6, text=text),
        "words": predict(family, transformer, text=Text(other.embeds, text.pooled)),
        "pooled": predict(family, transformer, text=Text(text.embeds, -text.pooled)),
        "latents": predict(family, transformer, text=text, x=noise(3, 4, 8, 12) + 0.1),
        "guidance": predict(family, transformer, text=text, guidance=3.5),
        "reference": predict(family, transformer, text=text, references=(one,)),
        "regions": predict(family, transformer, text=text, regions=RegionTexts((other,), masks)),
        "scale": predict(family, transformer, text=text, scale=2.0),
    }
    both, swapped = (predict(family, transformer, text=text, references=references) for references in ((one, two), (two, one)))
    assert {name: largest(plain, different) > 1e-3 for name, different in others.items()} == dict.fromkeys(others, True)
    assert min(largest(both, others["reference"]), largest(both, swapped)) > 1e-3


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_published_adapter_loads_in_the_stock_pipeline(families: dict[str, Family], pipeline: str, tmp_path: Path) -> None:
    family = families[pipeline]
    trained = adapted(family)
    fresh = reloaded(family, trained, tmp_path / "adapter")
    references = (noise(3, 4, 8, 8, seed=2),)
    with torch.no_grad():
        wanted, plain = (predict(family, model, references=references) for model in (trained, family.load_transformer(torch.float32, None)))
        assert largest(predict(family, fresh, references=references), wanted) <= 1e-5
        assert largest(plain, wanted) > 1e-2


def test_a_gradient_reaches_every_pair(families: dict[str, Family]) -> None:
    family = families["FluxPipeline"]
    assert without_gradient(adapted(family), lambda model: predict(family, model)) == []
