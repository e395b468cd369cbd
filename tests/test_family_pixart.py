"""The pixart family: one step with our `predict` is the first of its pipeline's own solver, and an adapter of ours is loaded by peft into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from peft import PeftModel
from torch import Tensor, nn

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step
from stages.adapter import adapter_weights, lora_layers, matched
from stages.families.base import Text
from stages.families.facts import FAMILIES
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import pixart
from stages.objectives.path import Diffusion
from stages.peft_layout import write_peft_adapter

PIPELINES = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    return open_family(str(pixart.build(tmp_path_factory.mktemp(kind) / "m", alpha=kind == "alpha")), CPU)


@torch.no_grad()
def predicted(family: Family, model: nn.Module, x: Tensor, text: Text, t: float = 0.6) -> Tensor:
    return family.predict(model, x, torch.full((len(x),), t), text)


def first_step(pipe: Any, prompts: list[str], x: Tensor, height: int, width: int, steps: int) -> Tensor:
    """The latents after the pipeline's first step. It has an older kind of callback than the others, and puts sizes into bins unless told not to."""
    seen: list[Tensor] = []
    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompts,
        height=height,
        width=width,
        guidance_scale=1.0,
        num_inference_steps=steps,
        latents=x,
        output_type="latent",
        callback=lambda step, timestep, latents: seen.append(latents.clone()),
        use_resolution_binning=False,
        clean_caption=False,
    )
    return seen[0]


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_one_step_equals_the_pipelines_own_step(kind: str, family: Family, height: int, width: int, batch: int, steps: int) -> None:
    transformer, prompts = family.load_transformer(torch.float32, None), PROMPTS[:batch]
    pipe = family.stock_pipeline(transformer)
    assert type(pipe) is PIPELINES[kind]
    x = noise(batch, 4, height // 2, width // 2)
    theirs = first_step(pipe, prompts, x, height, width, steps)
    ours = our_first_step(family, transformer, x, prompts, steps=steps)
    assert largest(ours, theirs) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert family.sigmas(steps, family.tokens(height, width)).tolist() == pytest.approx([*((pipe.scheduler.timesteps + 1) / 1000).tolist(), 0.0])


def test_the_path_is_the_schedulers_own(family: Family) -> None:
    path = family.path
    assert isinstance(path, Diffusion)
    assert path.predicts == "epsilon"
    assert FAMILIES[family.name].objective == "epsilon"
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02)
    x, e = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=2)
    levels = torch.tensor([0, 300, 700, 999])
    t = (levels + 1) / 1000
    assert torch.equal(path.level(t), levels)
    assert largest(path.blend(x, e, t), scheduler.add_noise(x, e, levels)) <= 1e-5
    assert torch.equal(path.target(x, e, t), e)


def test_another_kind_of_prediction_is_refused(family: Family) -> None:
    folder = Path(family.repo) / "scheduler" / "scheduler_config.json"
    config = json.loads(folder.read_text())
    folder.write_text(json.dumps({**config, "prediction_type": "sample"}))
    try:
        with pytest.raises(ValueError, match="prediction_type: 'sample' is not one of epsilon, v_prediction"):
            open_family(family.repo, CPU)
    finally:
        folder.write_text(json.dumps(config))


def test_a_last_sigma_that_is_not_zero_ends_at_the_least_level(family: Family) -> None:
    family.model.scheduler.register_to_config(final_sigmas_type="sigma_min")
    try:
        assert float(family.sigmas(4, 16)[-1]) == pytest.approx(1 / 1000)
    finally:
        family.model.scheduler.register_to_config(final_sigmas_type="zero")
    assert float(family.sigmas(4, 16)[-1]) == 0


def test_the_variance_that_the_transformer_gives_too_is_left_out(family: Family) -> None:
    transformer, x = family.load_transformer(torch.float32, None), noise(1, 4, 8, 8)
    given: list[Tensor] = []
    handle = transformer.register_forward_hook(lambda module, inputs, out: given.append(out[0]))
    out = predicted(family, transformer, x, family.encode_prompts(PROMPTS[:1]))
    handle.remove()
    assert given[0].shape == (1, 8, 8, 8)
    assert torch.equal(out, given[0][:, :4])


def test_latents_are_the_pipelines_own(family: Family) -> None:
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = family.encode_images(images)
    assert torch.equal(latents, torch.cat([family.encode_images(image[None]) for image in images]))
    with torch.no_grad():  # neither pipeline takes an image; this is the inverse of how they decode
        assert largest(latents, family.vae.encode(images).latent_dist.mode() * family.vae.config.scaling_factor) <= 1e-5
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "height": 16, "width": 24, "guidance_scale": 1.0, "num_inference_steps": 2, "latents": noise(1, 4, 8, 12), "use_resolution_binning": False}
    ended, shown = pipe(**call, clean_caption=False, output_type="latent").images, pipe(**call, clean_caption=False, output_type="pt").images
    assert largest(family.decode_latents(ended) / 2 + 0.5, shown) <= 1e-5


def test_prompts_are_the_pipelines_own_and_do_not_depend_on_each_other(kind: str, family: Family) -> None:
    text = family.encode_prompts(PROMPTS)
    assert text.mask is not None
    assert text.embeds.shape[1] == {"alpha": 120, "sigma": 300}[kind]
    assert text.mask.sum(dim=1).tolist() == [4, 4, 5]
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            embeds, mask, _, _ = family.prompter.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert torch.equal(text.embeds[number], embeds[0])
        assert torch.equal(text.mask[number], mask[0].bool())
    assert torch.equal(family.encode_prompts(["A Red DISC"]).embeds, text.embeds[:1])  # both pipelines write prompts in lower case


def test_every_input_changes_the_output(kind: str, family: Family) -> None:
    model, text, x = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS[:2]), noise(2, 4, 8, 8)
    assert text.mask is not None
    plain = predicted(family, model, x, text)
    others = {
        "x": predicted(family, model, x + 0.1, text),
        "t": predicted(family, model, x, text, 0.4),
        "embeds": predicted(family, model, x, Text(text.embeds.flip(0), mask=text.mask)),
        "mask": predicted(family, model, x, Text(text.embeds, mask=None)),
        "the empty prompt": predicted(family, model, x, family.encode_prompts(["", ""])),
    }
    assert {name for name, other in others.items() if largest(plain, other) < 1e-3} == set()
    behind = text.embeds.clone()
    behind[~text.mask] += 1.0
    assert largest(plain, predicted(family, model, x, Text(behind, mask=text.mask))) <= 1e-5  # padding does not count
    assert largest(plain[:1], predicted(family, model, x[:1], text.rows(torch.tensor([0])))) <= 1e-5


def test_alphas_transformer_is_told_the_size_and_sigmas_is_not(kind: str, family: Family) -> None:
    model, text = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS[:1])
    told: list[dict[str, Any]] = []
    handle = model.adaln_single.register_forward_pre_hook(lambda module, given: told.append(given[1]))
    predicted(family, model, noise(1, 4, 4, 12), text)
    handle.remove()
    if kind == "sigma":
        assert told == [{"resolution": None, "aspect_ratio": None}]
    else:
        assert (told[0]["resolution"].tolist(), told[0]["aspect_ratio"].tolist()) == ([[8.0, 24.0]], [[pytest.approx(1 / 3)]])


def test_published_adapter_loads_in_the_stock_pipeline(kind: str, family: Family, tmp_path: Path) -> None:
    model, text, x = adapted(family), family.encode_prompts(PROMPTS), noise(3, 4, 8, 8)
    weights = adapter_weights(model)
    write_peft_adapter(tmp_path / "adapter", weights, rank=2, target_modules=list(lora_layers(model)), metadata={})
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    assert not hasattr(pipe, "load_lora_weights")
    assert not family.architecture.loads_adapters
    plain, before = predicted(family, pipe.transformer, x, text), first_step(pipe, PROMPTS, x, 16, 16, 4)
    wrapped = PeftModel.from_pretrained(pipe.transformer, tmp_path / "adapter")
    trained = predicted(family, model, x, text)
    assert largest(predicted(family, wrapped, x, text), trained) <= 1e-5
    assert largest(predicted(family, pipe.transformer, x, text), trained) <= 1e-5
    assert largest(plain, trained) > 1e-2
    wanted = our_first_step(family, model, x, PROMPTS, steps=4)
    assert largest(first_step(pipe, PROMPTS, x, 16, 16, 4), wanted) <= 1e-5 * float(wanted.abs().max())
    assert largest(before, wanted) > 1e-2


def test_every_word_finds_the_layers_that_it_promises(family: Family) -> None:
    model = family.load_transformer(torch.float32, None)
    found = {word: set(matched(model, patterns, "targets")) for word, patterns in family.target_patterns.items()}
    in_blocks = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")}
    assert found["attention"] == {name for name in in_blocks if ".attn" in name}
    assert len(found["attention"]) == 16
    assert found["blocks"] == in_blocks
    assert len(in_blocks) == 20
    assert found["linear"] == in_blocks | {"adaln_single.linear"}


def test_a_gradient_reaches_every_pair(family: Family) -> None:
    model = adapted(family).train()
    family.predict(model, noise(2, 4, 8, 8), torch.tensor([0.2, 0.8]), family.encode_prompts(PROMPTS[:2])).square().mean().backward()
    assert all(float(part["default"].weight.grad.abs().max()) > 0 for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B))


def test_t_is_seen_as_the_level_that_noise_is_mixed_at(family: Family) -> None:
    t = torch.linspace(0, 1, 997)
    assert torch.equal(family.seen_timestep(t, torch.bfloat16), t)
    assert family.shift(16) == family.shift(4096) == 1.0
    model = family.load_transformer(torch.bfloat16, None)
    seen: list[Tensor] = []
    handle = model.adaln_single.emb.time_proj.register_forward_hook(lambda module, given, out: seen.extend(given))
    with torch.autocast("cpu", torch.bfloat16):
        predicted(family, model, noise(1, 4, 8, 8), family.encode_prompts(PROMPTS[:1]), 0.6004)
    handle.remove()
    assert isinstance(family.path, Diffusion)
    assert torch.equal(seen[0], family.path.level(torch.tensor([0.6004])))
    assert seen[0].tolist() == [599]


def test_bf16_autocast_is_finite_and_near_float32(family: Family) -> None:
    model, text, x = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS), noise(3, 4, 8, 8)
    exact = predicted(family, model, x, text)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predicted(family, model, x, text)
    assert rounded.dtype == torch.float32
    assert bool(rounded.isfinite().all())
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


def test_a_config_of_the_older_class_is_read(family: Family, tmp_path: Path) -> None:
    """As published: the transformer's config and model_index.json name Transformer2DModel."""
    folder = tmp_path / "m"
    pixart.build(folder, alpha=family.pipeline_class == "PixArtAlphaPipeline")
    for file, place in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((folder / file).read_text())
        content[place] = ["diffusers", "Transformer2DModel"] if place == "transformer" else "Transformer2DModel"
        if place == "_class_name":
            content |= {"num_vector_embeds": None, "only_cross_attention": False, "double_self_attention": False, "use_linear_projection": False}
        (folder / file).write_text(json.dumps(content))
    older = open_family(str(folder), CPU)
    x = noise(1, 4, 8, 8)
    model, own = older.load_transformer(torch.float32, None), family.load_transformer(torch.float32, None)
    assert torch.equal(predicted(older, model, x, older.encode_prompts(PROMPTS[:1])), predicted(family, own, x, family.encode_prompts(PROMPTS[:1])))
    assert type(older.stock_pipeline(model)) is type(family.stock_pipeline(own))
