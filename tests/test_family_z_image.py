"""The z_image family: one step is the stock pipeline's, the adapter is loaded by it, and what is prepared and encoded is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step, reloaded, without_gradient
from stages.adapter import matched
from stages.families.base import Text
from stages.families.facts import tasks_of
from stages.families.family import Family
from stages.families.tiny.z_image import build
from stages.families.z_image import ZImage

LONG = "a red disc make it the same a green square and a blue disc make it the same a red square make it the same"  # more than 32 tokens with the template


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(ZImage(), str(build(tmp_path_factory.mktemp("z_image"))), None, None, CPU)


@pytest.fixture(scope="module")
def transformer(family: Family) -> nn.Module:
    return family.load_transformer(torch.float32, None)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, [LONG, PROMPTS[0], LONG + " red"]], ids=["batch 1", "batch 3", "batch 3 of unlike lengths"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 28)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed shift", "shift by tokens"])
def test_one_step_equals_the_pipelines_own_step(tmp_path: Path, height: int, width: int, prompts: list[str], dynamic: bool) -> None:
    family = Family(ZImage(), str(build(tmp_path / "m", dynamic=dynamic)), None, None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    assert isinstance(pipe, ZImagePipeline)
    x = noise(len(prompts), 4, height // 2, width // 2)
    told = {"height": height, "width": width, "latents": x, "num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "latent"}
    after = pipelines_first_step(pipe, lambda note: pipe(prompt=list(prompts), callback_on_step_end=note, **told))
    assert torch.equal(family.sigmas(4, family.tokens(height, width)), pipe.scheduler.sigmas.float())
    ours = our_first_step(family, transformer, x, prompts, steps=4)
    assert largest(ours, x) > 1e-2
    assert largest(ours, after) <= 1e-5


def test_latents_are_the_pipelines_own(family: Family, transformer: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (3, 4, 8, 12)
    vae = family.vae
    # ZImageImg2ImgPipeline shifts and scales so; it draws from the distribution where we take its mode.
    assert torch.allclose(latents, (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor, atol=1e-6)
    assert torch.equal(latents, torch.cat([family.encode_images(image[None]) for image in images]))
    pipe = family.stock_pipeline(transformer)
    last: list[Tensor] = []
    told = {"height": 16, "width": 24, "latents": noise(2, 4, 8, 12), "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "pt", "prompt": PROMPTS[:2]}
    painted = pipe(callback_on_step_end=lambda pipeline, step, t, values: last.append(values["latents"].clone()) or values, **told).images
    assert largest((family.decode_latents(last[-1]) + 1) / 2, painted) <= 1e-5


def test_encoded_prompts_are_the_pipelines_own_and_do_not_depend_on_the_batch(family: Family) -> None:
    prompts = [*PROMPTS, LONG]
    together = family.encode_prompts(prompts)
    theirs, _ = family.prompter.encode_prompt(list(prompts), device=CPU, do_classifier_free_guidance=False)
    assert together.mask is not None
    for embeds, mask, own in zip(together.embeds, together.mask, theirs, strict=True):
        assert largest(embeds[mask], own) <= 1e-5
        assert not bool(embeds[~mask].any())
    other = Family(ZImage(), family.repo, None, None, CPU)
    for place, prompt in enumerate(prompts):
        alone = other.encode_prompts([prompt])
        assert torch.equal(alone.embeds[0], together.embeds[place][together.mask[place]])


def test_an_empty_prompt_is_the_pipelines_own_negative_prompt(family: Family) -> None:
    _, negative = family.prompter.encode_prompt(["a red disc"], device=CPU)
    assert torch.equal(family.encode_prompts([""]).embeds[0], negative[0])


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_other_prompts_of_the_batch(family: Family, transformer: nn.Module) -> None:
    x, t = noise(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    prompts = [LONG, PROMPTS[0], LONG + " red"]
    together = family.predict(transformer, x, t, family.encode_prompts(prompts))
    for place, prompt in enumerate(prompts):
        assert largest(family.predict(transformer, x[place : place + 1], t[place : place + 1], family.encode_prompts([prompt])), together[place : place + 1]) <= 1e-5


@torch.no_grad()
def test_every_input_changes_the_output(family: Family, transformer: nn.Module) -> None:
    x, t, text = noise(1, 4, 8, 8), torch.tensor([0.5]), family.encode_prompts(PROMPTS[:1])
    mask = torch.ones(text.embeds.shape[:2], dtype=torch.bool)
    first, last = text.embeds.clone(), mask.clone()
    first[:, 0] += 0.5
    last[:, -1] = False
    plain = family.predict(transformer, x, t, text)
    assert largest(family.predict(transformer, x, t, Text(text.embeds, None, mask)), plain) <= 1e-6
    changed = {
        "noised": family.predict(transformer, x + 0.1, t, text),
        "t": family.predict(transformer, x, t + 0.01, text),
        "text": family.predict(transformer, x, t, Text(first)),
        "mask": family.predict(transformer, x, t, Text(text.embeds, None, last)),
        "prompt": family.predict(transformer, x, t, family.encode_prompts(PROMPTS[1:2])),
    }
    assert {name: largest(value, plain) > 1e-3 for name, value in changed.items()} == dict.fromkeys(changed, True)


def test_published_adapter_loads_in_the_stock_pipeline(family: Family, transformer: nn.Module, tmp_path: Path) -> None:
    trained = adapted(family)
    fresh = reloaded(family, trained, tmp_path / "adapter")
    x, t, text = noise(2, 4, 8, 12), torch.tensor([0.2, 0.8]), family.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        ours, theirs, base = (family.predict(model, x, t, text) for model in (trained, fresh, transformer))
    assert largest(ours, base) > 1e-2
    assert largest(ours, theirs) <= 1e-5
    assert without_gradient(trained, lambda model: family.predict(model, x, t, text)) == []


def test_target_words_find_what_they_promise(family: Family, transformer: nn.Module) -> None:
    blocks = ("layers.0", "noise_refiner.0", "context_refiner.0")
    attention = {f"{block}.attention.{name}" for block in blocks for name in ("to_q", "to_k", "to_v", "to_out.0")}
    feed_forward = {f"{block}.feed_forward.{name}" for block in blocks for name in ("w1", "w2", "w3")}
    modulation = {f"{block}.adaLN_modulation.0" for block in blocks[:2]}
    found = {word: set(matched(transformer, patterns, word)) for word, patterns in family.target_patterns.items()}
    assert found == {"attention": attention, "blocks": attention | feed_forward, "linear": attention | feed_forward | modulation}
    inside = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and name.startswith(blocks)}
    assert found["linear"] == inside


def test_shift_is_the_schedulers_own(tmp_path: Path, family: Family) -> None:
    assert family.architecture.shift(family.model, 16) == 3.0
    dynamic = Family(ZImage(), str(build(tmp_path / "d", dynamic=True)), None, None, CPU)
    shift, t = dynamic.architecture.shift(dynamic.model, 16), torch.linspace(1, 0.25, 4)
    assert torch.allclose(dynamic.sigmas(4, 16)[:-1], shift * t / (1 + (shift - 1) * t), atol=1e-6)
    assert dynamic.architecture.shift(dynamic.model, 64) > shift > 1


def test_the_timestep_is_seen_as_it_is_in_bf16(family: Family, transformer: nn.Module) -> None:
    seen: list[Tensor] = []
    hook = transformer.t_embedder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    t = torch.linspace(0, 1, 101)[1:100:7]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        family.predict(transformer, noise(len(t), 4, 4, 4), t, family.encode_prompts(PROMPTS[:1] * len(t)))
    hook.remove()
    assert seen[0].dtype == torch.float32
    assert largest(1 - seen[0] / 1000, family.seen_timestep(t, torch.bfloat16)) <= 1e-6
    assert torch.equal(family.seen_timestep(t, torch.bfloat16), t)


def test_bf16_is_finite_and_close_to_fp32(family: Family, transformer: nn.Module) -> None:
    x, t, text = noise(2, 4, 8, 8), torch.tensor([0.2, 0.8]), family.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        exact = family.predict(transformer, x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = family.predict(transformer, x, t, text)
    assert rounded.dtype == torch.float32
    assert bool(rounded.isfinite().all())
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


def test_facts_are_the_configs(family: Family) -> None:
    assert (family.factor, family.pixel_multiple, family.text_tokens, family.model.guidance) == (2, 4, 512, None)
    assert tasks_of("ZImagePipeline") == ("text_to_image",)
