"""The sana family: one Euler step with our `predict` is one step of its own pipeline, and the parts around it are the library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step, reloaded, without_gradient
from stages.adapter import matched
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import ModelError, open_family
from stages.families.sana import instruction
from stages.families.tiny.sana import build

KINDS = {
    "sana": {},
    "sana euler": {"euler": True},
    "sana timestep_scale": {"euler": True, "timestep_scale": 0.001},
    "sana learned variance": {"euler": True, "learns_variance": True},
    "sana query norm": {"euler": True, "query_norm": True},
}
SIZES = [(32, 32), (32, 96)]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {kind: open_family(str(build(tmp_path_factory.mktemp("model") / "m", **settings)), CPU) for kind, settings in KINDS.items()}


@pytest.fixture
def sana(families: dict[str, Family]) -> Family:
    return families["sana"]


def latents_of(family: Family, height: int, width: int, batch: int) -> Tensor:
    return noise(batch, 4, height // family.factor, width // family.factor)


def predict(family: Family, transformer: nn.Module, *, t: float = 0.5, text: Text | None = None, x: Tensor | None = None) -> Tensor:
    x = latents_of(family, 32, 48, 3) if x is None else x
    return family.predict(transformer, x, torch.full((len(x),), t), text or family.encode_prompts(PROMPTS))


def pipelines_step(family: Family, pipe: SanaPipeline, x: Tensor, height: int, width: int, prompts: list[str]) -> Tensor:
    return pipelines_first_step(
        pipe,
        lambda note: pipe(
            prompts,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=x,
            use_resolution_binning=False,
            output_type="latent",
            callback_on_step_end=note,
        ),
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sana"])
def test_one_step_equals_the_pipelines_own_step(families: dict[str, Family], kind: str, height: int, width: int, batch: int) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    x = latents_of(family, height, width, batch)
    theirs = pipelines_step(family, pipe, x, height, width, PROMPTS[:batch])
    assert largest(family.sigmas(4, family.latent_tokens(x)), pipe.scheduler.sigmas.float()) <= 1e-6
    assert largest(our_first_step(family, transformer, x, PROMPTS[:batch], steps=4), theirs) <= 1e-5
    assert largest(theirs, x) > 1e-2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_one_step_equals_the_pipelines_own_step_with_dpm_solver_at_its_whole_timestep(sana: Family, height: int, width: int, batch: int) -> None:
    """DPM-Solver tells the transformer a timestep that it has rounded down; told the same, we give the same."""
    transformer = sana.load_transformer(torch.float32, None)
    pipe = sana.stock_pipeline(transformer)
    x = latents_of(sana, height, width, batch)
    theirs = pipelines_step(sana, pipe, x, height, width, PROMPTS[:batch])
    sigmas = sana.sigmas(4, sana.latent_tokens(x))
    assert largest(sigmas, pipe.scheduler.sigmas.float()) <= 1e-6
    told, now, then = (level.expand(batch) for level in (pipe.scheduler.timesteps[0] / 1000, *sigmas[:2]))
    assert told[0] == float((now[0] * 1000).floor() / 1000)
    with torch.no_grad():
        v = sana.predict(transformer, x, told, sana.encode_prompts(PROMPTS[:batch]))
    assert largest(sana.path.step(x, v, now, then), theirs) <= 1e-5


@pytest.mark.parametrize("kind", ["sana"])
def test_latents_are_the_pipelines_own(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    images = torch.rand(3, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (3, 4, 8, 16)
    assert torch.equal(latents[1:2], family.encode_images(images[1:2]))
    raw = family.vae.encode(images).latent
    assert largest(latents, raw * family.vae.config.scaling_factor) <= 1e-5
    # SanaPipeline encodes no images; what it decodes is taken from it, by a run whose last step is made to end at these latents.
    pipe = family.stock_pipeline(family.load_transformer(torch.float32, None))

    def put(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**values, "latents": latents}

    pipe.set_progress_bar_config(disable=True)
    images = pipe(PROMPTS, height=32, width=64, num_inference_steps=1, guidance_scale=1.0, use_resolution_binning=False, output_type="pt", callback_on_step_end=put).images
    assert largest(family.decode_latents(latents) / 2 + 0.5, images) <= 1e-5


def test_prompts_are_the_pipelines_own_with_its_instruction_and_do_not_depend_on_the_batch(sana: Family) -> None:
    text = sana.encode_prompts(PROMPTS)
    embeds, mask, _, _ = sana.prompter.encode_prompt(PROMPTS, do_classifier_free_guidance=False, device=CPU, complex_human_instruction=instruction(sana.prompter))
    assert embeds.shape[1] == sana.text_tokens == 300
    assert text.mask is not None
    assert torch.equal(text.mask.sum(1), mask.sum(1))
    assert len(text.mask.sum(1).unique()) == 2
    for ours, theirs, theirs_mask in zip(text.embeds, embeds, mask, strict=True):
        assert largest(ours[: int(theirs_mask.sum())], theirs[theirs_mask.bool()]) <= 1e-5
    assert len(instruction(sana.prompter)) == 8
    other = open_family(sana.repo, CPU)
    assert torch.equal(other.encode_prompts(PROMPTS[:1]).embeds[0], text.embeds[0, :5])
    bare = sana.prompter.encode_prompt(PROMPTS, do_classifier_free_guidance=False, device=CPU)[0]
    assert largest(bare[:, :5], text.embeds[:, :5]) > 1e-2


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(sana: Family) -> None:
    _, _, embeds, mask = sana.prompter.encode_prompt(["a red disc"], device=CPU, negative_prompt="", complex_human_instruction=instruction(sana.prompter))
    text = sana.encode_prompts([""])
    assert text.embeds.shape[1] == int(mask.sum()) == 1
    assert largest(text.embeds, embeds[:, :1]) <= 1e-5


def test_padding_that_is_left_out_changes_nothing(sana: Family) -> None:
    transformer = sana.load_transformer(torch.float32, None)
    text = sana.encode_prompts(PROMPTS)
    assert text.mask is not None
    padded = Text(nn.functional.pad(text.embeds, (0, 0, 0, 294), value=3.0), mask=nn.functional.pad(text.mask, (0, 294)))
    with torch.no_grad():
        assert largest(predict(sana, transformer, text=padded), predict(sana, transformer, text=text)) <= 1e-5


@pytest.mark.parametrize("kind", ["sana", "sana query norm"])
def test_every_input_changes_the_output(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    transformer = family.load_transformer(torch.float32, None)
    text = family.encode_prompts(PROMPTS)
    assert text.mask is not None
    unmasked = Text(text.embeds, mask=torch.ones_like(text.mask))
    with torch.no_grad():
        plain = predict(family, transformer, text=text)
        others = {
            "t": predict(family, transformer, t=0.6, text=text),
            "text": predict(family, transformer, text=family.encode_prompts(["green", "the same", "it"])),
            "mask": predict(family, transformer, text=unmasked),
            "latents": predict(family, transformer, text=text, x=latents_of(family, 32, 48, 3) + 0.1),
        }
    assert plain.is_contiguous()  # safetensors writes no other
    assert {name: largest(plain, other) > 1e-3 for name, other in others.items()} == dict.fromkeys(others, True)
    with pytest.raises(AssertionError):
        family.predict(transformer, latents_of(family, 32, 48, 3), torch.full((3,), 0.5), text, (latents_of(family, 32, 48, 3),))


@pytest.mark.parametrize("kind", ["sana", "sana query norm"])
def test_published_adapter_loads_in_the_stock_pipeline(families: dict[str, Family], kind: str, tmp_path: Path) -> None:
    family = families[kind]
    trained = adapted(family)
    fresh = reloaded(family, trained, tmp_path / "adapter")
    with torch.no_grad():
        wanted, plain = predict(family, trained), predict(family, family.load_transformer(torch.float32, None))
        assert largest(predict(family, fresh), wanted) <= 1e-5
        assert largest(plain, wanted) > 1e-2


def test_target_words_find_what_they_promise_and_a_gradient_reaches_every_pair(sana: Family) -> None:
    transformer = sana.load_transformer(torch.float32, None)
    found = {word: matched(transformer, patterns, word) for word, patterns in sana.target_patterns.items()}
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {name for name in linears if name.startswith("transformer_blocks.")}
    assert set(found["attention"]) == set(found["blocks"]) == in_blocks  # the feed-forwards are convolutions
    assert set(found["linear"]) == in_blocks | {"time_embed.linear"}
    assert len(in_blocks) == 2 * 8
    assert without_gradient(adapted(sana), lambda model: predict(sana, model)) == []


def test_the_shift_is_the_schedulers_own(families: dict[str, Family]) -> None:
    for kind in ("sana", "sana euler"):
        assert families[kind].shift(100) == families[kind].shift(4096) == 3.0
    even = 0.999 * torch.tensor([1, 0.75, 0.5, 0.25, 0])  # DPM-Solver's levels, before they are shifted
    assert largest(families["sana"].sigmas(4, 100), 3 * even / (1 + 2 * even)) <= 1e-6


def test_the_timestep_is_seen_as_it_is_in_half_precision(sana: Family) -> None:
    transformer = sana.load_transformer(torch.float32, None)
    seen: list[Tensor] = []
    transformer.get_submodule("time_embed.emb.time_proj").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.123456, 0.5004883, 0.9999])
    x, text = latents_of(sana, 32, 32, 3), sana.encode_prompts(PROMPTS)
    for compute in (torch.float32, torch.bfloat16, torch.float16):
        seen.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
            sana.predict(transformer, x, t, text)
        assert torch.equal(seen[0].float(), sana.seen_timestep(t, compute) * 1000)


class BatchedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dtypes of the batched matrix products made inside it, which in a Sana are the linear attention's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("aten::bmm"):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_takes_the_linear_attention_from_float32_again(sana: Family, compute: torch.dtype) -> None:
    transformer = sana.load_transformer(torch.float32, None)
    text = sana.encode_prompts(PROMPTS)
    with torch.no_grad(), BatchedProducts() as products, torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
        predict(sana, transformer, text=text)
    assert products.dtypes == {compute}


@pytest.mark.parametrize(("compute", "off"), [(torch.bfloat16, (0.0, 0.01)), (torch.float16, (0.2, 1.0))], ids=["bf16", "fp16"])
def test_fp16_autocast_overflows_the_linear_attention_and_stays_finite(compute: torch.dtype, off: tuple[float, float]) -> None:
    """4096 tokens, as at 2048 x 2048 pixels, with queries and keys of deviation 2. Fails once the library keeps its float32 under autocast."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        attention = Attention(query_dim=128, heads=4, dim_head=32, bias=False, processor=SanaLinearAttnProcessor2_0())
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            nn.init.orthogonal_(layer.weight, gain=1 if layer is attention.to_v else 2)
        tokens = torch.randn(1, 4096, 128)
        wanted = attention(tokens)
        with torch.autocast("cpu", dtype=compute):
            found = attention(tokens).float()
    assert found.isfinite().all()
    assert off[0] <= float((found - wanted).norm() / wanted.norm()) <= off[1]


def test_bf16_is_finite_and_close_to_fp32(sana: Family) -> None:
    transformer = sana.load_transformer(torch.float32, None)
    with torch.no_grad():
        wanted = predict(sana, transformer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = predict(sana, transformer)
    assert found.dtype == torch.float32
    assert largest(found, wanted) <= 0.1 * float(wanted.abs().max())


def test_a_scheduler_that_predicts_something_else_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "m")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("flow_prediction", "epsilon"))
    with pytest.raises(ModelError, match="prediction_type 'epsilon'"):
        open_family(str(folder), CPU)


def test_a_model_of_sana_has_its_sizes(sana: Family) -> None:
    assert (sana.factor, sana.pixel_multiple, sana.text_tokens, sana.model.guidance, sana.usual_guidance) == (4, 4, 300, None, 4.5)
