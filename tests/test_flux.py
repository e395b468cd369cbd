"""The flux family: one Euler step with our `predict` is one step of its own pipeline, and the hand-written parts are the library's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from models import tiny_flux
from stages.families.flux import Flux
from stages.families.open import ModelError, fingerprint, open_family

CPU = torch.device("cpu")
PROMPTS = ["a red disc", "a blue square", "make it the same"]


def first_step(pipe: FluxPipeline | FluxKontextPipeline, inputs: dict[str, object], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Packed latents after the pipeline's first step, and its noise levels."""
    seen: list[Tensor] = []

    def note(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return values

    pipe.set_progress_bar_config(disable=True)
    pipe(**inputs, latents=latents, num_inference_steps=4, output_type="latent", callback_on_step_end=note, max_sequence_length=8)
    return seen[0], pipe.scheduler.sigmas


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
@pytest.mark.parametrize("pixels", [True, False])
def test_one_step_equals_the_pipelines_own_step(tmp_path: Path, pixels: bool, height: int, width: int, batch: int) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=pixels, guidance=not pixels)), None, 2.5 if not pixels else None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    factor = family.factor
    x = torch.randn(batch, 3 if pixels else 4, height // factor, width // factor, generator=torch.Generator().manual_seed(1))
    pipe = FluxPipeline(**{**family.pipeline.components, "transformer": transformer})
    times = pipe.vae_scale_factor // factor  # without a VAE the pipeline takes pixels to be 8 to a latent
    packed = FluxPipeline._pack_latents(x, batch, x.shape[1], x.shape[2], x.shape[3])
    after, sigmas = first_step(pipe, {"prompt": PROMPTS[:batch], "height": height * times, "width": width * times, "guidance_scale": 2.5}, packed)
    ours = family.sigmas(4, family.tokens(height, width))
    assert torch.allclose(ours, sigmas.float(), atol=1e-6)
    with torch.no_grad():
        v = family.predict(transformer, x, ours[:1].expand(batch), family.encode_prompts(PROMPTS[:batch]), ())
    step = x + (ours[1] - ours[0]) * v
    assert (FluxPipeline._pack_latents(step, batch, x.shape[1], x.shape[2], x.shape[3]) - after).abs().max() <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_one_step_with_a_reference_equals_the_kontext_pipelines_own_step(tmp_path: Path, batch: int) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=False, guidance=True, pipeline="FluxKontextPipeline")), None, 3.5, CPU)
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    assert isinstance(pipe, FluxKontextPipeline)
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    image = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    reference = family.encode_images(image)
    packed = FluxPipeline._pack_latents(x, batch, 4, 8, 8)
    inputs = {"image": reference, "prompt": PROMPTS[:batch], "height": 16, "width": 16, "guidance_scale": 3.5, "_auto_resize": False, "max_area": 256}
    after, _ = first_step(pipe, inputs, packed)
    sigmas = family.sigmas(4, family.tokens(16, 16))
    with torch.no_grad():
        v = family.predict(transformer, x, sigmas[:1].expand(batch), family.encode_prompts(PROMPTS[:batch]), (reference,))
    step = x + (sigmas[1] - sigmas[0]) * v
    assert (FluxPipeline._pack_latents(step, batch, 4, 8, 8) - after).abs().max() <= 1e-5


def test_references_change_the_prediction_and_their_order_counts(tmp_path: Path) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    x, one, other = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text, t = family.encode_prompts(PROMPTS[:2]), torch.full((2,), 0.5)
    with torch.no_grad():
        none, first, both, swapped = (family.predict(transformer, x, t, text, refs) for refs in ((), (one,), (one, other), (other, one)))
    for a, b in ((none, first), (first, both), (both, swapped)):
        assert (a - b).abs().max() > 1e-3


def test_latents_and_images_are_each_others_inverse_up_to_the_vae(tmp_path: Path) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=False)), None, None, CPU)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    assert family.vae is not None
    raw = latents / 0.4 + 0.1
    assert torch.allclose(family.decode_latents(latents), family.vae.decode(raw).sample.clamp(-1, 1), atol=1e-6)
    pixels = Flux(str(tiny_flux(tmp_path / "p", pixels=True)), None, None, CPU)
    assert torch.equal(pixels.decode_latents(pixels.encode_images(images)), images)


def test_timesteps_are_rounded_as_the_transformer_rounds_them(tmp_path: Path) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    t = torch.linspace(0, 1, 1001)
    seen = family.seen_timestep(t, torch.bfloat16)
    assert len(seen.unique()) < 600  # a thousand timesteps collapse in bf16
    assert torch.equal((seen * 1000).round(decimals=3), (t.to(torch.bfloat16) * 1000).float().round(decimals=3))
    assert torch.equal(family.seen_timestep(t, torch.float32), t)


def test_shift_is_the_schedulers_own(tmp_path: Path) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=False)), None, None, CPU)
    config = family.pipeline.scheduler.config
    mu = calculate_shift(16, 4, 64, config.base_shift, config.max_shift)
    assert family.shift(16) == pytest.approx(float(torch.tensor(mu).exp()))
    fixed = Flux(str(tiny_flux(tmp_path / "p", pixels=True)), None, None, CPU)
    assert fixed.shift(16) == 1.0


def test_encoded_prompts_come_from_memory_unchanged(tmp_path: Path) -> None:
    family = Flux(str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    fresh = family._encode(PROMPTS)
    for _ in range(2):
        text = family.encode_prompts([*PROMPTS, PROMPTS[0]])
        assert torch.allclose(text.embeds[:3], fresh.embeds, atol=1e-6)
        assert torch.equal(text.embeds[3], text.embeds[0])
        assert torch.allclose(text.pooled[:3], fresh.pooled, atol=1e-6)


def test_a_pipeline_that_medley_does_not_train_is_refused(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "m", pixels=True, pipeline="StableDiffusionPipeline")
    with pytest.raises(ModelError, match="StableDiffusionPipeline; Medley trains Flux"):
        open_family(str(folder), CPU)


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "m", pixels=True)
    before = fingerprint(str(folder))
    assert fingerprint(str(folder)) == before
    (folder / "transformer" / "config.json").write_text((folder / "transformer" / "config.json").read_text() + " ")
    assert fingerprint(str(folder)) != before
