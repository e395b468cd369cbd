"""The flux family: one Euler step with our `predict` is one step of its own pipeline, and the hand-written parts are the library's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from models import tiny_flux
from stages.cache import Cache
from stages.families.base import RegionTexts, Text
from stages.families.family import Family
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
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=pixels, guidance=not pixels)), None, 2.5 if not pixels else None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    factor = family.factor
    x = torch.randn(batch, 3 if pixels else 4, height // factor, width // factor, generator=torch.Generator().manual_seed(1))
    pipe = family.stock_pipeline(transformer)
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
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=False, guidance=True, pipeline="FluxKontextPipeline")), None, 3.5, CPU)
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
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    x, one, other = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text, t = family.encode_prompts(PROMPTS[:2]), torch.full((2,), 0.5)
    with torch.no_grad():
        none, first, both, swapped = (family.predict(transformer, x, t, text, refs) for refs in ((), (one,), (one, other), (other, one)))
    for a, b in ((none, first), (first, both), (both, swapped)):
        assert (a - b).abs().max() > 1e-3


def test_latents_and_images_are_each_others_inverse_up_to_the_vae(tmp_path: Path) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=False)), None, None, CPU)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    assert family.vae is not None
    raw = latents / 0.4 + 0.1
    assert torch.allclose(family.decode_latents(latents), family.vae.decode(raw).sample.clamp(-1, 1), atol=1e-6)
    pixels = Family(Flux(), str(tiny_flux(tmp_path / "p", pixels=True)), None, None, CPU)
    assert torch.equal(pixels.decode_latents(pixels.encode_images(images)), images)


def test_timesteps_are_rounded_as_the_transformer_rounds_them(tmp_path: Path) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    t = torch.linspace(0, 1, 1001)
    seen = family.seen_timestep(t, torch.bfloat16)
    assert len(seen.unique()) < 600  # a thousand timesteps collapse in bf16
    assert torch.equal((seen * 1000).round(decimals=3), (t.to(torch.bfloat16) * 1000).float().round(decimals=3))
    assert torch.equal(family.seen_timestep(t, torch.float32), t)


def test_shift_is_the_schedulers_own(tmp_path: Path) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=False)), None, None, CPU)
    config = family.model.scheduler.config
    mu = calculate_shift(16, 4, 64, config.base_shift, config.max_shift)
    assert family.shift(16) == pytest.approx(float(torch.tensor(mu).exp()))
    fixed = Family(Flux(), str(tiny_flux(tmp_path / "p", pixels=True)), None, None, CPU)
    assert fixed.shift(16) == 1.0


def test_encoded_prompts_come_from_memory_unchanged(tmp_path: Path) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    embeds, pooled, _ = family.prompter.encode_prompt(PROMPTS, prompt_2=None, device=CPU, max_sequence_length=8)
    fresh = Text(embeds, pooled)
    assert fresh.pooled is not None
    for _ in range(2):
        text = family.encode_prompts([*PROMPTS, PROMPTS[0]])
        assert torch.allclose(text.embeds[:3], fresh.embeds, atol=1e-6)
        assert torch.equal(text.embeds[3], text.embeds[0])
        assert torch.allclose(text.pooled[:3], fresh.pooled, atol=1e-6)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the encoders that were loaded."""
    names: list[str] = []
    for encoder in (AutoencoderKL, CLIPTextModel, T5EncoderModel):
        load = encoder.from_pretrained.__func__

        def counted(cls: type, *arguments: object, load: Callable[..., object] = load, **named: object) -> object:
            names.append(cls.__name__)
            return load(cls, *arguments, **named)

        monkeypatch.setattr(encoder, "from_pretrained", classmethod(counted))
    return names


def open_cache(folder: Path, family: Family) -> Cache:
    cache = Cache(folder, latents_identity=family.latents_identity, text_identity=family.text_identity, limit_bytes=None, writer="rank0")
    family.texts.stored = cache
    return cache


def test_with_everything_cached_no_encoder_is_loaded_and_the_bits_are_the_same(tmp_path: Path, loaded: list[str]) -> None:
    folder = tiny_flux(tmp_path / "m", pixels=False, guidance=True)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    velocities = []
    for cached in (False, True):
        loaded.clear()
        family = Family(Flux(), str(folder), None, 2.5, CPU)
        transformer = family.load_transformer(torch.float32, None)
        family.shift(16), family.sigmas(4, 16), family.tokens(16, 16)
        cache = open_cache(tmp_path / "cache", family)
        assert loaded == []
        latents = torch.stack([cache.encode_image(cache.latents_key(bytes([number]) * 16, "16x16"), image, family.encode_images) for number, image in enumerate(images)])
        text = family.encode_prompts(PROMPTS[:2])
        with torch.no_grad():
            velocities.append(family.predict(transformer, latents, torch.full((2,), 0.5), text, (latents,)))
        cache.close()
        assert cache.take_warnings() == []
        assert sorted(loaded) == ([] if cached else ["AutoencoderKL", "CLIPTextModel", "T5EncoderModel"])
    assert torch.equal(*velocities)


def test_each_encoder_is_loaded_once_when_it_is_needed_and_again_after_release(tmp_path: Path, loaded: list[str]) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=False)), None, None, CPU)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = family.encode_images(image)
    family.decode_latents(latents)
    assert loaded == ["AutoencoderKL"]
    text = family.encode_prompts(PROMPTS)
    family.encode_prompts([PROMPTS[0], "green"])
    assert sorted(loaded[1:]) == ["CLIPTextModel", "T5EncoderModel"]
    family.release_encoders()
    assert torch.equal(family.encode_prompts(PROMPTS).embeds, text.embeds)
    assert len(loaded) == 3  # the prompts were at hand
    assert torch.equal(family.encode_images(image), latents)
    family.stock_pipeline(family.load_transformer(torch.float32, None))
    assert sorted(loaded[3:]) == ["AutoencoderKL", "CLIPTextModel", "T5EncoderModel"]


def test_an_image_and_a_prompt_have_the_same_bits_alone_and_in_a_batch(tmp_path: Path) -> None:
    folder = str(tiny_flux(tmp_path / "m", pixels=False))
    family, other = Family(Flux(), folder, None, None, CPU), Family(Flux(), folder, None, None, CPU)
    images = torch.rand(5, 3, 24, 16) * 2 - 1
    assert torch.equal(family.encode_images(images), torch.cat([family.encode_images(image[None]) for image in images]))
    together, alone = family.encode_prompts(PROMPTS), [other.encode_prompts([prompt]) for prompt in PROMPTS]
    assert torch.equal(together.embeds, torch.cat([text.embeds for text in alone]))
    assert torch.equal(together.pooled, torch.cat([text.pooled for text in alone]))


def test_a_model_on_pixels_has_no_latents_to_keep(tmp_path: Path, loaded: list[str]) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    assert (family.encodes_images, family.factor, family.vae, loaded) == (False, 1, None, [])
    latent = Family(Flux(), str(tiny_flux(tmp_path / "l", pixels=False)), None, None, CPU)
    assert (latent.encodes_images, latent.factor, latent.text_tokens) == (True, 2, 8)
    assert latent.latents_identity != family.latents_identity


def test_identities_follow_the_encoders_own_files_and_no_others(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "m", pixels=False)

    def identities() -> tuple[str, str]:
        family = Family(Flux(), str(folder), None, None, CPU)
        return family.latents_identity, family.text_identity

    latents, text = identities()
    assert identities() == (latents, text)
    for name in ("README.md", "transformer/config.json", "scheduler/scheduler_config.json"):
        (folder / name).write_text((folder / name).read_text() + " " if (folder / name).exists() else "words")
    assert identities() == (latents, text)
    moved = folder.rename(tmp_path / "moved")
    folder = moved
    assert identities() == (latents, text)
    flip_last_byte(folder / "vae" / "diffusion_pytorch_model.safetensors")
    other_latents, same_text = identities()
    assert (other_latents != latents, same_text == text) == (True, True)
    for name in ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json"):
        before = identities()
        flip_last_byte(folder / name) if name.endswith("safetensors") else (folder / name).write_text((folder / name).read_text() + " ")
        assert (identities()[0], identities()[1] != before[1]) == (other_latents, True)


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_model_on_the_hub_is_told_apart_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--user--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    tiny_flux(place / "snapshots" / commit, pixels=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    family = Family(Flux(), "user/tiny", None, None, CPU)
    assert family.revision == commit
    assert f"user/tiny@{commit} " in family.latents_identity
    assert f"user/tiny@{commit} " in family.text_identity
    assert (family.factor, family.text_tokens) == (2, 8)
    assert family.encode_images(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    assert family.encode_prompts(["a"]).embeds.shape == (1, 8, 16)


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


def test_a_prompt_that_names_its_images_says_so_in_words_to_a_model_that_knows_no_placeholders(tmp_path: Path) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    named, said = (family.encode_prompts([prompt]) for prompt in ("make <img><|image_1|></img> red", "make image 1 red"))
    assert torch.equal(named.embeds, said.embeds)
    assert family.said("make <img><|image_1|></img> red") == "make image 1 red"


def test_regions_are_shown_their_own_prompts_where_their_masks_are(tmp_path: Path) -> None:
    """After the whole transformer everything has changed a little by way of the image; nothing but the region's prompt was changed."""
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    x, t, text = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5), family.encode_prompts(PROMPTS[:2])
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[:, 0, :4] = True

    def predict(prompt: str, masks: Tensor) -> Tensor:
        with torch.no_grad():
            return family.predict(transformer, x, t, text, (), regions=RegionTexts((family.encode_prompts([prompt] * 2),), masks))

    red, blue = predict("a red disc", masks), predict("a blue square", masks)
    changed = (red - blue).abs().amax(dim=1)
    assert float(changed.max()) > 1e-3
    assert float(changed[:, :4].mean()) > float(changed[:, 4:].mean())
    none = torch.zeros_like(masks)
    assert torch.equal(predict("a red disc", none), predict("a blue square", none)), "a region without a place reaches nothing"
