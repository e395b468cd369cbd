"""The flux2 family, dev and klein: one Euler step with our `predict` is one step of its own pipeline, and the parts around it are the library's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step, reloaded, without_gradient
from stages.adapter import matched
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny.flux2 import build

KINDS = {"flux2 dev": {}, "flux2 klein": {"klein": True}}
SIZES = [(32, 32), (16, 64)]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {kind: open_family(str(build(tmp_path_factory.mktemp("model") / "m", **settings)), CPU) for kind, settings in KINDS.items()}


@pytest.fixture
def klein(families: dict[str, Family]) -> Family:
    return families["flux2 klein"]


def latents_of(family: Family, height: int, width: int, batch: int) -> Tensor:
    return noise(batch, 16, height // family.factor, width // family.factor)


def pictures(number: int) -> list[Image.Image]:
    """The pipelines take none that is narrower than 64 pixels."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in ((64, 64), (96, 64))[:number]]


def as_tensor(picture: Image.Image) -> Tensor:
    """float32 [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def predict(family: Family, transformer: nn.Module, *, t: float = 0.5, text: Text | None = None, x: Tensor | None = None, references: tuple[Tensor, ...] = ()) -> Tensor:
    x = latents_of(family, 16, 24, 3) if x is None else x
    return family.predict(transformer, x, torch.full((len(x),), t), text or family.encode_prompts(PROMPTS), references)


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_one_step_equals_the_pipelines_own_step(families: dict[str, Family], kind: str, height: int, width: int, batch: int, references: int) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    assert isinstance(pipe, Flux2KleinPipeline if "klein" in kind else Flux2Pipeline)
    x = latents_of(family, height, width, batch)
    shown = pictures(references)
    seen = tuple(family.encode_images(as_tensor(picture)).expand(batch, -1, -1, -1) for picture in shown)
    call = {"image": shown or None, "height": height, "width": width, "num_inference_steps": 4, "guidance_scale": 1.0, "latents": x, "output_type": "latent"}
    packed = pipelines_first_step(pipe, lambda note: pipe(prompt=PROMPTS[:batch], **call, callback_on_step_end=note))
    theirs = packed.transpose(1, 2).reshape(x.shape)
    assert largest(family.sigmas(4, family.latent_tokens(x)), pipe.scheduler.sigmas.float()) <= 1e-6
    assert largest(our_first_step(family, transformer, x, PROMPTS[:batch], steps=4, references=seen), theirs) <= 1e-5
    assert largest(theirs, x) > 1e-2


def test_one_step_equals_the_pipelines_own_step_at_another_guidance(families: dict[str, Family]) -> None:
    family = Family(families["flux2 dev"].architecture, families["flux2 dev"].repo, None, 2.5, CPU)
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    x = latents_of(family, 16, 16, 1)
    call = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 2.5, "latents": x, "output_type": "latent"}
    packed = pipelines_first_step(pipe, lambda note: pipe(prompt=PROMPTS[:1], **call, callback_on_step_end=note))
    ours = our_first_step(family, transformer, x, PROMPTS[:1], steps=4)
    assert largest(ours, packed.transpose(1, 2).reshape(x.shape)) <= 1e-5
    assert largest(ours, our_first_step(families["flux2 dev"], transformer, x, PROMPTS[:1], steps=4)) > 1e-3


@pytest.mark.parametrize("kind", list(KINDS))
def test_latents_are_the_pipelines_own(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    images = torch.rand(3, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (3, 16, 4, 8)
    assert torch.equal(latents[1:2], family.encode_images(images[1:2]))
    assert largest(latents, pipe._encode_vae_image(images, None)) <= 1e-5
    assert float(family.vae.bn.running_var.std()) > 0.1  # the statistics differ between channels

    def put(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**values, "latents": latents.flatten(2).transpose(1, 2)}

    # What the pipeline decodes is taken from it, by a run whose last step is made to end at these latents.
    pipe.set_progress_bar_config(disable=True)
    decoded = pipe(prompt=PROMPTS, height=16, width=32, num_inference_steps=1, guidance_scale=1.0, output_type="pt", callback_on_step_end=put).images
    assert largest(family.decode_latents(latents) / 2 + 0.5, decoded) <= 1e-5


@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_are_the_pipelines_own_padding_included_and_do_not_depend_on_the_batch(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    text = family.encode_prompts([*PROMPTS, ""])
    embeds, _ = family.prompter.encode_prompt([*PROMPTS, ""], device=CPU)
    assert text.mask is None
    assert text.embeds.shape == embeds.shape == (4, family.text_tokens, 24) == (4, 512, 24)
    assert largest(text.embeds, embeds) <= 1e-5
    assert torch.equal(open_family(family.repo, CPU).encode_prompts(PROMPTS[:1]).embeds, text.embeds[:1])
    assert family.architecture.empty_prompt == ""


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_input_changes_the_output(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    text = family.encode_prompts(PROMPTS)
    one, other = noise(3, 16, 4, 4, seed=2), noise(3, 16, 4, 4, seed=3)
    padding = Text(torch.cat([text.embeds[:, :-100], 1 + text.embeds[:, -100:]], dim=1))
    with torch.no_grad():
        plain = predict(family, transformer, text=text)
        others = {
            "t": predict(family, transformer, t=0.6, text=text),
            "text": predict(family, transformer, text=family.encode_prompts(["green", "the same", "it"])),
            "padding": predict(family, transformer, text=padding),
            "latents": predict(family, transformer, text=text, x=latents_of(family, 16, 24, 3) + 0.1),
            "reference": predict(family, transformer, text=text, references=(one,)),
        }
        both, swapped, twice = (predict(family, transformer, text=text, references=refs) for refs in ((one, other), (other, one), (one, one)))
    assert plain.is_contiguous()  # safetensors writes no other
    assert {name: largest(plain, different) > 1e-3 for name, different in others.items()} == dict.fromkeys(others, True)
    assert min(largest(both, others["reference"]), largest(both, swapped), largest(twice, others["reference"])) > 1e-3


@pytest.mark.parametrize("kind", list(KINDS))
def test_published_adapter_loads_in_the_stock_pipeline(families: dict[str, Family], kind: str, tmp_path: Path) -> None:
    family = families[kind]
    trained = adapted(family)
    fresh = reloaded(family, trained, tmp_path / "adapter")
    reference = (noise(3, 16, 4, 4, seed=2),)
    with torch.no_grad():
        wanted, plain = predict(family, trained, references=reference), predict(family, family.load_transformer(torch.float32, None), references=reference)
        assert largest(predict(family, fresh, references=reference), wanted) <= 1e-5
        assert largest(plain, wanted) > 1e-2


def test_target_words_find_what_they_promise_and_a_gradient_reaches_every_pair(klein: Family) -> None:
    transformer = klein.load_transformer(torch.float32, None)
    found = {word: set(matched(transformer, patterns, word)) for word, patterns in klein.target_patterns.items()}
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {name for name in linears if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    assert found["blocks"] == in_blocks
    assert found["attention"] == {name for name in in_blocks if ".attn." in name}
    assert found["linear"] - in_blocks == {"double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear"}
    assert (len(found["attention"]), len(found["blocks"]), len(found["linear"])) == (10, 14, 17)
    assert without_gradient(adapted(klein), lambda model: predict(klein, model)) == []


def test_the_shift_is_that_of_the_pipelines_default_number_of_steps(families: dict[str, Family], tmp_path: Path) -> None:
    """Shifted by s, the evenly spaced levels are those of a run that names no number of steps."""
    family = families["flux2 klein"]
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt=PROMPTS[:1], height=16, width=16, guidance_scale=1.0, latents=latents_of(family, 16, 16, 1), output_type="latent")
    steps = len(pipe.scheduler.timesteps)
    even, s = torch.linspace(1, 1 / steps, steps), family.architecture.shift(family.model, 16)
    assert steps == 50
    assert largest(s * even / (1 + (s - 1) * even), pipe.scheduler.sigmas[:-1].float()) <= 1e-6
    assert [round(float(np.exp(compute_empirical_mu(4096, number))), 1) for number in (50, 4, 200)] == [7.6, 9.9, 3.2]
    assert family.architecture.shift(family.model, 4096) == pytest.approx(7.6, abs=0.05)
    assert family.architecture.shift(family.model, 4301) == pytest.approx(float(np.exp(compute_empirical_mu(4301, 4))))
    assert family.architecture.shift(family.model, 4301) < family.architecture.shift(family.model, 4300) / 2
    assert largest(family.sigmas(4, 16)[1:4], family.sigmas(8, 16)[2:8:2]) > 1e-3  # the number of steps counts when sampling
    fixed = open_family(str(build(tmp_path / "m", klein=True, dynamic=False)), CPU)
    assert fixed.architecture.shift(fixed.model, 16) == fixed.architecture.shift(fixed.model, 4096) == 3.0


def test_the_timestep_is_seen_as_it_is_in_half_precision(families: dict[str, Family]) -> None:
    family = families["flux2 dev"]
    transformer = family.load_transformer(torch.float32, None)
    seen: list[Tensor] = []
    transformer.get_submodule("time_guidance_embed.time_proj").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.123456, 0.5004883, 0.9999])
    x, text = latents_of(family, 16, 16, 3), family.encode_prompts(PROMPTS)
    for compute in (torch.float32, torch.bfloat16, torch.float16):
        seen.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
            family.predict(transformer, x, t, text)
        assert torch.equal(seen[0], family.seen_timestep(t, compute) * 1000)


@pytest.mark.parametrize("kind", list(KINDS))
def test_bf16_is_finite_and_close_to_fp32(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    with torch.no_grad():
        wanted = predict(family, transformer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = predict(family, transformer)
    assert found.dtype == torch.float32
    assert largest(found, wanted) <= 0.1 * float(wanted.abs().max())


def test_a_model_of_flux2_has_its_sizes(families: dict[str, Family]) -> None:
    for kind, told, usual in (("flux2 dev", 1.0, 4.0), ("flux2 klein", None, 1.0)):
        family = families[kind]
        assert (family.factor, family.pixel_multiple, family.text_tokens, family.model.guidance, family.usual_guidance) == (4, 4, 512, told, usual)
        assert family.tokens(64, 32) == family.latent_tokens(latents_of(family, 64, 32, 1)) == 128


def test_klein_is_told_no_guidance_even_by_a_transformer_that_could_be(tmp_path: Path) -> None:
    folder = build(tmp_path / "m", klein=True)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"guidance_embeds": false', '"guidance_embeds": true'))
    assert open_family(str(folder), CPU).model.guidance is None


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_the_processor_of_dev_needs_torchvision() -> None:
    """So the tiny model has a plain tokenizer in its place. Fails once transformers no longer asks for torchvision."""
    from transformers import PixtralProcessor

    with pytest.raises(ImportError, match="Torchvision"):
        PixtralProcessor()
