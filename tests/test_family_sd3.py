"""The sd3 family: one Euler step with our `predict` is one step of its own pipeline, and an adapter of ours is loaded by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step
from stages.adapter import adapter_weights, lora_layers, matched
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import sd3
from stages.layouts import write_adapter
from stages.plan import Adapter

KINDS = {"3.0": {"later": False}, "3.5": {"later": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: sd3.build(root / kind, **choices) for kind, choices in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Family]:
    return open_family(str(folders[request.param]), CPU)


@pytest.fixture(scope="module")
def later(folders: dict[str, Path]) -> Family:
    return open_family(str(folders["3.5"]), CPU)


@torch.no_grad()
def predicted(family: Family, model: nn.Module, x: Tensor, text: Text, t: float = 0.6) -> Tensor:
    return family.predict(model, x, torch.full((len(x),), t), text)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_one_step_equals_the_pipelines_own_step(family: Family, height: int, width: int, batch: int) -> None:
    transformer, prompts = family.load_transformer(torch.float32, None), PROMPTS[:batch]
    pipe = family.stock_pipeline(transformer)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    x = noise(batch, 4, height // 2, width // 2)
    theirs = pipelines_first_step(
        pipe,
        lambda note: pipe(prompts, height=height, width=width, guidance_scale=1.0, num_inference_steps=4, latents=x, output_type="latent", callback_on_step_end=note),
    )
    assert largest(our_first_step(family, transformer, x, prompts, steps=4), theirs) <= 1e-5
    assert largest(family.sigmas(4, family.tokens(height, width)), pipe.scheduler.sigmas) <= 1e-6


def test_one_step_equals_the_pipelines_own_step_where_the_shift_follows_the_tokens(tmp_path: Path) -> None:
    family = open_family(str(sd3.build(tmp_path / "m", dynamic=True)), CPU)
    transformer, x = family.load_transformer(torch.float32, None), noise(1, 4, 4, 12)
    pipe = family.stock_pipeline(transformer)
    theirs = pipelines_first_step(
        pipe, lambda note: pipe(PROMPTS[0], height=8, width=24, guidance_scale=1.0, num_inference_steps=4, latents=x, output_type="latent", callback_on_step_end=note)
    )
    assert largest(our_first_step(family, transformer, x, PROMPTS[:1], steps=4), theirs) <= 1e-5
    assert largest(family.sigmas(4, 12), pipe.scheduler.sigmas) <= 1e-6
    assert family.shift(12) == pytest.approx(math.exp(0.5 + (1.15 - 0.5) * (12 - 4) / (64 - 4)))


def test_latents_are_the_pipelines_own(later: Family) -> None:
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = later.encode_images(images)
    assert torch.equal(latents, torch.cat([later.encode_images(image[None]) for image in images]))
    vae = later.vae
    with torch.no_grad():  # as StableDiffusion3Img2ImgPipeline encodes, but for its draw from the distribution
        assert largest(latents, (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor) <= 1e-5
    pipe = later.stock_pipeline(later.load_transformer(torch.float32, None))
    pipe.set_progress_bar_config(disable=True)
    # The image that the pipeline makes of what it gives as latents.
    call = {"prompt": PROMPTS[0], "height": 16, "width": 24, "guidance_scale": 1.0, "num_inference_steps": 1, "latents": noise(1, 4, 8, 12)}
    ended, shown = pipe(**call, output_type="latent").images, pipe(**call, output_type="pt").images
    assert largest(later.decode_latents(ended) / 2 + 0.5, shown) <= 1e-5


def test_prompts_are_the_pipelines_own_and_do_not_depend_on_each_other(family: Family) -> None:
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    text = family.encode_prompts(PROMPTS)
    assert text.pooled is not None
    assert text.mask is None
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        assert torch.equal(text.embeds[number], embeds[0])
        assert torch.equal(text.pooled[number], pooled[0])
    assert text.embeds.shape[1] == 8 + 256


def test_every_input_changes_the_output(family: Family) -> None:
    model, text, x = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS[:2]), noise(2, 4, 8, 8)
    assert text.pooled is not None
    plain = predicted(family, model, x, text)
    others = {
        "x": predicted(family, model, x + 0.1, text),
        "t": predicted(family, model, x, text, 0.4),
        "embeds": predicted(family, model, x, Text(text.embeds.flip(0), text.pooled)),
        "pooled": predicted(family, model, x, Text(text.embeds, text.pooled.flip(0))),
        "the empty prompt": predicted(family, model, x, family.encode_prompts(["", ""])),
    }
    assert {name for name, other in others.items() if largest(plain, other) < 1e-3} == set()
    assert largest(plain[:1], predicted(family, model, x[:1], text.rows(torch.tensor([0])))) <= 1e-5


def test_published_adapter_loads_in_the_stock_pipeline(family: Family, tmp_path: Path) -> None:
    model = adapted(family)
    text, x = family.encode_prompts(PROMPTS), noise(3, 4, 8, 8)
    settings = Adapter(rank=2, targets="linear")
    write_adapter(tmp_path / "adapter.safetensors", adapter_weights(model), settings, {})
    fresh = family.load_transformer(torch.float32, None)
    plain = predicted(family, fresh, x, text)
    family.stock_pipeline(fresh, encoders=False).load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    trained = predicted(family, model, x, text)
    assert largest(predicted(family, fresh, x, text), trained) <= 1e-5
    assert largest(plain, trained) > 1e-2


# Attention: 8 projections a block, without what the text asks and the way out of it in the last block, which drops it, and 4 of a second attention;
# feed-forwards: 4 a block, but of the text in the last; modulation: 2 a block.
COUNTS = {"3.0": (16 - 2, 8 - 2, 4), "3.5": (16 - 2 + 4, 8 - 2, 4)}


@pytest.mark.parametrize("kind", COUNTS)
def test_every_word_finds_the_layers_that_it_promises(folders: dict[str, Path], kind: str) -> None:
    family = open_family(str(folders[kind]), CPU)
    model = family.load_transformer(torch.float32, None)
    found = {word: set(matched(model, patterns, "targets")) for word, patterns in family.target_patterns.items()}
    attention, feed_forward, modulation = COUNTS[kind]
    assert [len(found[word]) for word in ("attention", "blocks", "linear")] == [attention, attention + feed_forward, attention + feed_forward + modulation]
    in_blocks = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")}
    in_blocks.remove("transformer_blocks.1.attn.add_q_proj")
    assert found["linear"] == in_blocks
    assert found["attention"] == {name for name in in_blocks if ".attn" in name}


def test_a_gradient_reaches_every_pair_and_not_what_the_text_asks_in_the_last_block(family: Family) -> None:
    model = adapted(family).train()
    left_out = model.transformer_blocks[1].attn.add_q_proj.requires_grad_(True)
    family.predict(model, noise(2, 4, 8, 8), torch.tensor([0.2, 0.8]), family.encode_prompts(PROMPTS[:2])).square().mean().backward()
    assert all(float(part["default"].weight.grad.abs().max()) > 0 for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B))
    assert float(left_out.weight.grad.abs().max()) == 0  # or it could be a target


def test_the_shift_is_the_schedulers_own(later: Family) -> None:
    assert later.shift(16) == later.shift(4096) == 3.0
    shifted = type(later.model.scheduler).from_config(later.model.scheduler.config)
    shifted.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    t = torch.tensor([0.9, 0.5, 0.1])
    assert largest(3 * t / (1 + 2 * t), shifted.sigmas[:3]) <= 1e-6


def test_the_transformer_sees_t_itself_in_half_precision(later: Family) -> None:
    t = torch.linspace(0, 1, 1001)
    assert torch.equal(later.seen_timestep(t, torch.bfloat16), t)
    model = later.load_transformer(torch.bfloat16, None)
    seen: list[Tensor] = []
    handle = model.time_text_embed.time_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        predicted(later, model, noise(1, 4, 8, 8), later.encode_prompts(PROMPTS[:1]), 0.6004)
        predicted(later, model, noise(1, 4, 8, 8), later.encode_prompts(PROMPTS[:1]), 0.6)
    handle.remove()
    assert seen[0].dtype == torch.float32
    assert largest(seen[0], seen[1]) > 0.1


def test_bf16_autocast_is_finite_and_near_float32(family: Family) -> None:
    model, text, x = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS), noise(3, 4, 8, 8)
    exact = predicted(family, model, x, text)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predicted(family, model, x, text)
    assert rounded.dtype == torch.float32
    assert bool(rounded.isfinite().all())
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
