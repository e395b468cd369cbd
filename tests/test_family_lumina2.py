"""The lumina2 family: one Euler step with our `predict` is one step of its own pipeline, and the parts around it are the library's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor, nn

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step, reloaded, without_gradient
from stages.adapter import matched
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny.lumina2 import build

SIZES = [(32, 32), (16, 64)]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {name: open_family(str(build(tmp_path_factory.mktemp("model") / "m", dynamic=dynamic)), CPU) for name, dynamic in (("lumina2", False), ("lumina2 dynamic", True))}


@pytest.fixture
def lumina2(families: dict[str, Family]) -> Family:
    return families["lumina2"]


def latents_of(family: Family, height: int, width: int, batch: int) -> Tensor:
    return noise(batch, 4, height // family.factor, width // family.factor)


def predict(family: Family, transformer: nn.Module, *, t: float = 0.5, text: Text | None = None, x: Tensor | None = None) -> Tensor:
    x = latents_of(family, 16, 24, 3) if x is None else x
    return family.predict(transformer, x, torch.full((len(x),), t), text or family.encode_prompts(PROMPTS))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kind", ["lumina2", "lumina2 dynamic"])
def test_one_step_equals_the_pipelines_own_step(families: dict[str, Family], kind: str, height: int, width: int, batch: int) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    x = latents_of(family, height, width, batch)
    call = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": 1.0, "latents": x, "output_type": "latent"}
    theirs = pipelines_first_step(pipe, lambda note: pipe(PROMPTS[:batch], **call, callback_on_step_end=note))
    assert largest(family.sigmas(4, family.latent_tokens(x)), pipe.scheduler.sigmas.float()) <= 1e-6
    assert largest(our_first_step(family, transformer, x, PROMPTS[:batch], steps=4), theirs) <= 1e-5
    assert largest(theirs, x) > 1e-2


@pytest.mark.parametrize("kind", ["lumina2"])
def test_latents_are_the_pipelines_own(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    images = torch.rand(3, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (3, 4, 8, 16)
    assert torch.equal(latents[1:2], family.encode_images(images[1:2]))
    config = family.vae.config
    assert largest(latents, (family.vae.encode(images).latent_dist.mode() - config.shift_factor) * config.scaling_factor) <= 1e-5
    # Lumina2Pipeline encodes no images; what it decodes is taken from it, by a run whose last step is made to end at these latents.
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))

    def put(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**values, "latents": latents}

    pipe.set_progress_bar_config(disable=True)
    images = pipe(PROMPTS, height=16, width=32, num_inference_steps=1, guidance_scale=1.0, output_type="pt", callback_on_step_end=put).images
    assert largest(family.decode_latents(latents) / 2 + 0.5, images) <= 1e-5


def test_prompts_are_the_pipelines_own_with_its_system_prompt_and_do_not_depend_on_the_batch(lumina2: Family) -> None:
    text = lumina2.encode_prompts(PROMPTS)
    embeds, mask, _, _ = lumina2.prompter.encode_prompt(PROMPTS, do_classifier_free_guidance=False, device=CPU)
    assert embeds.shape[1] == lumina2.text_tokens == 256
    assert text.mask is not None
    assert torch.equal(text.mask.sum(1), mask.sum(1))
    assert len(text.mask.sum(1).unique()) == 2
    for ours, theirs, theirs_mask in zip(text.embeds, embeds, mask, strict=True):
        assert largest(ours[: int(theirs_mask.sum())], theirs[theirs_mask.bool()]) <= 1e-5
    other = open_family(lumina2.repo, CPU)
    alone = other.encode_prompts(PROMPTS[:1]).embeds[0]
    assert torch.equal(alone, text.embeds[0, : len(alone)])
    assert len(alone) > 20  # most of it is the system prompt


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(lumina2: Family) -> None:
    _, _, embeds, mask = lumina2.prompter.encode_prompt(["a red disc"], device=CPU, negative_prompt="")
    text = lumina2.encode_prompts([""])
    assert text.embeds.shape[1] == int(mask.sum()) == 1
    assert largest(text.embeds, embeds[:, :1]) <= 1e-5


def test_padding_that_is_left_out_changes_nothing(lumina2: Family) -> None:
    transformer = lumina2.load_transformer(torch.float32, None)
    text = lumina2.encode_prompts(PROMPTS)
    assert text.mask is not None
    more = 256 - text.embeds.shape[1]
    padded = Text(nn.functional.pad(text.embeds, (0, 0, 0, more), value=3.0), mask=nn.functional.pad(text.mask, (0, more)))
    with torch.no_grad():
        assert largest(predict(lumina2, transformer, text=padded), predict(lumina2, transformer, text=text)) <= 1e-5


@pytest.mark.parametrize("kind", ["lumina2"])
def test_every_input_changes_the_output(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    text = family.encode_prompts(PROMPTS)
    assert text.mask is not None
    with torch.no_grad():
        plain = predict(family, transformer, text=text)
        others = {
            "t": predict(family, transformer, t=0.6, text=text),
            "text": predict(family, transformer, text=family.encode_prompts(["green", "the same", "it"])),
            "mask": predict(family, transformer, text=Text(text.embeds, mask=torch.ones_like(text.mask))),
            "latents": predict(family, transformer, text=text, x=latents_of(family, 16, 24, 3) + 0.1),
        }
    assert plain.is_contiguous()  # safetensors writes no other
    assert {name: largest(plain, other) > 1e-3 for name, other in others.items()} == dict.fromkeys(others, True)
    with pytest.raises(AssertionError):
        family.predict(transformer, latents_of(family, 16, 24, 3), torch.full((3,), 0.5), text, (latents_of(family, 16, 24, 3),))


@pytest.mark.parametrize("kind", ["lumina2"])
def test_published_adapter_loads_in_the_stock_pipeline(families: dict[str, Family], kind: str, tmp_path: Path) -> None:
    family = families[kind]
    trained = adapted(family)
    fresh = reloaded(family, trained, tmp_path / "adapter")
    with torch.no_grad():
        wanted, plain = predict(family, trained), predict(family, family.load_transformer(torch.float32, None))
        assert largest(predict(family, fresh), wanted) <= 1e-5
        assert largest(plain, wanted) > 1e-2


def test_target_words_find_what_they_promise_and_a_gradient_reaches_every_pair(lumina2: Family) -> None:
    transformer = lumina2.load_transformer(torch.float32, None)
    found = {word: set(matched(transformer, patterns, word)) for word, patterns in lumina2.target_patterns.items()}
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {name for name in linears if name.startswith(("layers.", "noise_refiner.", "context_refiner."))}
    assert found["linear"] == in_blocks
    assert found["attention"] == {name for name in in_blocks if ".attn." in name}
    assert found["blocks"] - found["attention"] == {name for name in in_blocks if ".feed_forward." in name}
    assert found["linear"] - found["blocks"] == {"layers.0.norm1.linear", "noise_refiner.0.norm1.linear"}
    assert (len(found["attention"]), len(found["blocks"])) == (12, 21)
    assert without_gradient(adapted(lumina2), lambda model: predict(lumina2, model)) == []


@pytest.mark.parametrize("kind", ["lumina2", "lumina2 dynamic"])
def test_the_shift_is_the_pipelines_own(families: dict[str, Family], kind: str) -> None:
    """Shifted by s, the evenly spaced levels are those of the pipeline's scheduler, at every size."""
    family = families[kind]
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    even = torch.linspace(1, 0, 5)
    for height, width in ((16, 16), (64, 64)):
        pipe.set_progress_bar_config(disable=True)
        pipe(PROMPTS[:1], height=height, width=width, num_inference_steps=4, guidance_scale=1.0, latents=latents_of(family, height, width, 1), output_type="latent")
        s = family.architecture.shift(family.model, (height // 4) * (width // 4))
        shifted = s * even[:4] / (1 + (s - 1) * even[:4])
        assert largest(shifted, pipe.scheduler.sigmas[:4].float()) <= 1e-6
    wanted = 6.0 if kind == "lumina2" else float(torch.tensor(calculate_shift(4, 256, 4096, 0.5, 1.15)).exp())
    assert s == pytest.approx(wanted, rel=1e-6)


def test_the_timestep_is_seen_as_it_is_in_half_precision(lumina2: Family) -> None:
    transformer = lumina2.load_transformer(torch.float32, None)
    seen: list[Tensor] = []
    transformer.get_submodule("time_caption_embed.time_proj").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.123456, 0.5004883, 0.9999])
    x, text = latents_of(lumina2, 16, 16, 3), lumina2.encode_prompts(PROMPTS)
    for compute in (torch.float32, torch.bfloat16, torch.float16):
        seen.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
            lumina2.predict(transformer, x, t, text)
        assert torch.equal(seen[0], 1 - lumina2.seen_timestep(t, compute))


def test_bf16_is_finite_and_close_to_fp32(lumina2: Family) -> None:
    transformer = lumina2.load_transformer(torch.float32, None)
    with torch.no_grad():
        wanted = predict(lumina2, transformer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = predict(lumina2, transformer)
    assert found.dtype == torch.float32
    assert largest(found, wanted) <= 0.1 * float(wanted.abs().max())


def test_a_model_of_lumina2_has_its_sizes(lumina2: Family) -> None:
    assert (lumina2.factor, lumina2.pixel_multiple, lumina2.text_tokens, lumina2.model.guidance, lumina2.usual_guidance) == (2, 4, 256, None, 4.0)
