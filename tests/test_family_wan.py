"""The wan family: one Euler step with our `predict` is one step of its own pipeline, for images and clips and by both experts, and the parts around it are the library's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanVideoToVideoPipeline
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import save_file
from torch import Tensor, nn

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, reloaded, without_gradient
from stages.adapter import adapter_weights, add_adapter, lora_layers, matched
from stages.families.base import Text
from stages.families.facts import UnsuitableModel
from stages.families.family import Family
from stages.families.open import ModelError, open_family
from stages.families.tiny.wan import build
from stages.layouts import write_adapter
from stages.objectives.path import Diffusion, Straight
from stages.objectives.path import Path as NoisePath
from stages.plan import Adapter
from stages.problems import RunError

KINDS = {
    "wan 2.1": {},
    "wan 2.1 euler": {"euler": True},
    "wan 2.2 A14B": {"experts": True},
    "wan 2.2 A14B euler": {"experts": True, "euler": True},
    "wan 2.2 5B": {"five_b": True},
}
SIZES = [(64, 64), (32, 96)]
FRAMES = [1, 5]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that share tensors of a few numbers wait for each other, on a busy machine fifty times as long as they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {kind: open_family(str(build(tmp_path_factory.mktemp("model") / "m", **settings)), CPU) for kind, settings in KINDS.items()}


@pytest.fixture(scope="module")
def pipes(families: dict[str, Family]) -> dict[str, WanPipeline]:
    return {kind: pipeline_of(family) for kind, family in families.items()}


@pytest.fixture
def wan(families: dict[str, Family]) -> Family:
    return families["wan 2.1"]


@pytest.fixture
def pair(families: dict[str, Family]) -> Family:
    return families["wan 2.2 A14B"]


def pipeline_of(family: Family, **transformers: nn.Module) -> WanPipeline:
    """The stock pipeline with everything. transformers: by expert, in the place of the model's own."""
    made = {name: transformers.get(name) or family.load_transformer(torch.float32, None, name) for name in family.experts}
    first = made.pop("high") if made else family.load_transformer(torch.float32, None)
    pipe: WanPipeline = family.stock_pipeline(first, others=made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(family: Family, height: int, width: int, batch: int, frames: int | None = None) -> Tensor:
    """Of images [B, C, h, w], of clips of so many frames [B, C, F', h, w]."""
    depth = () if frames is None else ((frames - 1) // 4 + 1,)
    return noise(batch, len(family.model.vae["latents_mean"]), *depth, height // family.factor, width // family.factor)


def as_clip(x: Tensor) -> Tensor:
    return x if x.ndim == 5 else x[:, :, None]


def predict(family: Family, transformer: nn.Module, *, t: float = 0.5, text: Text | None = None, x: Tensor | None = None) -> Tensor:
    x = latents_of(family, 64, 64, 3) if x is None else x
    return family.predict(transformer, x, torch.full((len(x),), t), text or family.encode_prompts(PROMPTS))


def pipelines_steps(pipe: WanPipeline, x: Tensor, prompts: list[str], *, factor: int, steps: int = 4) -> list[Tensor]:
    """The latents after each of a pipeline's steps, [B, C, F', h, w]."""
    seen: list[Tensor] = []

    def note(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return values

    clip = as_clip(x)
    pipe(
        prompts,
        height=clip.shape[-2] * factor,
        width=clip.shape[-1] * factor,
        num_frames=4 * clip.shape[2] - 3,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=clip,
        output_type="latent",
        callback_on_step_end=note,
    )
    return seen


# --- one step ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("frames", FRAMES, ids=["image", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_equals_the_pipelines_own_step(families: dict[str, Family], pipes: dict[str, WanPipeline], kind: str, frames: int, height: int, width: int, batch: int) -> None:
    """With UniPC too: its first step is Euler's. A clip of 5 frames has 2 latent ones."""
    family, pipe = families[kind], pipes[kind]
    x = latents_of(family, height, width, batch, None if frames == 1 else frames)
    theirs = pipelines_steps(pipe, x, PROMPTS[:batch], factor=family.factor)[0]
    assert largest(family.sigmas(4, family.latent_tokens(x)), pipe.scheduler.sigmas.float()) == 0
    ours = our_first_step(family, pipe.transformer, x, PROMPTS[:batch], steps=4)
    assert ours.shape == x.shape
    assert largest(as_clip(ours), theirs) <= 1e-5
    assert largest(theirs, as_clip(x)) > 1e-2


@pytest.mark.parametrize("frames", FRAMES, ids=["image", "clip"])
def test_one_step_equals_the_pipelines_own_step_by_either_expert(families: dict[str, Family], pipes: dict[str, WanPipeline], frames: int) -> None:
    """With FlowMatchEuler each of the pipeline's steps is Euler's; `transformer` takes those from the boundary on, and `transformer_2` those below."""
    family, pipe = families["wan 2.2 A14B euler"], pipes["wan 2.2 A14B euler"]
    x = latents_of(family, 32, 64, 3, None if frames == 1 else frames)
    steps = pipelines_steps(pipe, x, PROMPTS, factor=family.factor, steps=8)
    sigmas, text = family.sigmas(8, family.latent_tokens(x)), family.encode_prompts(PROMPTS)
    experts, taken = {name: family.load_transformer(torch.float32, None, name) for name in family.experts}, []
    for now, then, after in zip(sigmas[:-1], sigmas[1:], steps, strict=True):
        (expert,) = [name for name in family.experts if in_range(float(now), family.expert_range(name))]
        taken.append(expert)
        with torch.no_grad():
            predicted = family.predict(experts[expert], x, now.expand(3), text)
        x = family.path.step(x, predicted, now.expand(3), then.expand(3))
        assert largest(as_clip(x), after) <= 1e-5
        x = after if x.ndim == 5 else after[:, :, 0]
    assert taken == ["high"] * 3 + ["low"] * 5


def in_range(t: float, ends: tuple[float, float]) -> bool:
    return ends[0] <= t < ends[1] or t == ends[1] == 1


@pytest.mark.parametrize("frames", FRAMES, ids=["image", "clip"])
def test_what_unipc_asks_of_each_expert_is_what_we_predict(pair: Family, frames: int) -> None:
    """After its first step UniPC looks back, so what is compared is what its transformers gave, at the whole timestep that it told them."""
    pipe = pipeline_of(pair)
    asked: list[tuple[str, dict[str, Tensor], Tensor]] = []
    for name, transformer in (("high", pipe.transformer), ("low", pipe.transformer_2)):

        def note(module: nn.Module, args: object, inputs: dict[str, Tensor], output: tuple[Tensor], name: str = name) -> None:
            asked.append((name, inputs, output[0]))

        transformer.register_forward_hook(note, with_kwargs=True)
    x = latents_of(pair, 32, 64, 3, None if frames == 1 else frames)
    pipelines_steps(pipe, x, PROMPTS, factor=pair.factor, steps=6)
    text = pair.encode_prompts(PROMPTS)
    assert [name for name, _, _ in asked] == ["high"] * 2 + ["low"] * 4
    for sigma, (name, inputs, output) in zip(pair.sigmas(6, pair.latent_tokens(x)), asked, strict=False):
        seen = inputs["hidden_states"] if x.ndim == 5 else inputs["hidden_states"][:, :, 0]
        assert in_range(float(sigma), pair.expert_range(name))
        with torch.no_grad():
            ours = pair.predict(pair.load_transformer(torch.float32, None, name), seen, sigma.expand(3), text)
        assert largest(as_clip(ours), output) <= 1e-5


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0, 12.0])
def test_the_whole_timesteps_of_unipc_are_those_that_we_tell(wan: Family, shift: float) -> None:
    told: list[Tensor] = []

    class Listener(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
            told.append(timestep)
            return (hidden_states,)

    scheduler = UniPCMultistepScheduler.from_config(wan.model.scheduler.config, flow_shift=shift)
    for steps in range(1, 61):
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas[:-1]
        wan.predict(Listener(), torch.zeros(steps, 4, 2, 2), sigmas, Text(torch.zeros(steps, 1, 16)))
        assert torch.equal(told.pop(), scheduler.timesteps.float())


def test_a_clip_of_one_frame_is_an_image_bit_for_bit(wan: Family) -> None:
    transformer, x = wan.load_transformer(torch.float32, None), latents_of(wan, 64, 64, 3)
    with torch.no_grad():
        assert torch.equal(predict(wan, transformer, x=x), predict(wan, transformer, x=x[:, :, None])[:, :, 0])


@pytest.mark.parametrize("path", [Straight(), Diffusion((0.9, 0.5, 0.1)), Diffusion((0.9, 0.5, 0.1), "v_prediction")], ids=["straight", "epsilon", "v"])
def test_a_clips_path_is_that_of_each_of_its_frames(path: NoisePath) -> None:
    x, e = noise(3, 4, 2, 5, 6, seed=1), noise(3, 4, 2, 5, 6, seed=2)
    t, then = torch.tensor([0.3, 0.6, 1.0]), torch.tensor([0.0, 0.3, 0.6])
    gives: list[Callable[[Tensor, Tensor], Tensor]] = [lambda x, e: path.blend(x, e, t), lambda x, e: path.target(x, e, t), lambda x, e: path.step(x, e, t, then)]
    for give in gives:
        assert torch.equal(give(x, e), torch.stack([give(x[:, :, frame], e[:, :, frame]) for frame in range(2)], dim=2))
    assert path.snr(t).shape == path.weight_of_x(t).shape == (3,)


# --- latents and prompts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", FRAMES, ids=["image", "clip"])
@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2 5B"])
def test_latents_are_the_pipelines_own(families: dict[str, Family], pipes: dict[str, WanPipeline], kind: str, frames: int) -> None:
    """What is encoded is WanVideoToVideoPipeline's, what is decoded WanPipeline's."""
    family, pipe = families[kind], pipes[kind]
    shape = (2, 3, 32, 32) if frames == 1 else (2, 3, frames, 32, 32)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == latents_of(family, 32, 32, 2, None if frames == 1 else frames).shape
    assert torch.equal(latents[1:], family.encode_images(images[1:]))

    encoder: Any = WanVideoToVideoPipeline(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, transformer=pipe.transformer, vae=family.vae, scheduler=silent_scheduler())
    theirs = encoder.prepare_latents(as_clip(images), batch_size=2, num_channels_latents=latents.shape[1], height=32, width=32, dtype=torch.float32, device=CPU)
    assert torch.equal(as_clip(latents), theirs)

    def put(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**values, "latents": as_clip(latents)}

    sizes = {"height": 32, "width": 32, "num_frames": frames, "latents": as_clip(torch.zeros_like(latents))}
    decoded = pipe(PROMPTS[:2], **sizes, num_inference_steps=1, guidance_scale=1.0, output_type="pt", callback_on_step_end=put).frames
    ours = family.decode_latents(latents)
    assert ours.shape == images.shape
    assert largest(as_clip(ours) / 2 + 0.5, decoded.transpose(1, 2)) <= 1e-5
    assert float(ours.std()) > 1e-2


def silent_scheduler() -> Any:
    """A scheduler that adds no noise, so that what is encoded can be seen."""
    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.add_noise = lambda latents, noise, timestep: latents
    return scheduler


def test_prompts_are_the_pipelines_own_and_do_not_depend_on_the_batch(wan: Family, pipes: dict[str, WanPipeline]) -> None:
    text = wan.encode_prompts(PROMPTS)
    theirs, _ = pipes["wan 2.1"].encode_prompt(PROMPTS, do_classifier_free_guidance=False, device=CPU, max_sequence_length=512)
    assert text.embeds.shape == (3, 512, 16) == theirs.shape
    assert largest(text.embeds, theirs) <= 1e-5
    assert (text.mask, text.pooled) == (None, None)
    words = [len(prompt.split()) + 1 for prompt in PROMPTS]
    assert len(set(words)) == 2
    assert [int(row.abs().amax(-1).gt(0).sum()) for row in text.embeds] == words
    other = open_family(wan.repo, CPU)
    assert torch.equal(other.encode_prompts(PROMPTS[2:]).embeds, text.embeds[2:])


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(wan: Family, pipes: dict[str, WanPipeline]) -> None:
    _, unconditional = pipes["wan 2.1"].encode_prompt(["a red disc"], device=CPU, max_sequence_length=512)
    assert largest(wan.encode_prompts([""]).embeds, unconditional) <= 1e-5


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2 5B"])
def test_every_input_changes_the_output(families: dict[str, Family], kind: str) -> None:
    family = families[kind]
    transformer, text = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS)
    x = latents_of(family, 64, 64, 3, 5)
    with torch.no_grad():
        plain = predict(family, transformer, text=text, x=x)
        others = {
            "t": predict(family, transformer, t=0.6, text=text, x=x),
            "text": predict(family, transformer, text=family.encode_prompts(["green", "the same", "it"]), x=x),
            "zeros after the words": predict(family, transformer, text=Text(text.embeds[:, :226]), x=x),
            "latents": predict(family, transformer, text=text, x=x + 0.1),
            "order of frames": predict(family, transformer, text=text, x=x.flip(2)).flip(2),
        }
    assert {name: largest(plain, other) > 1e-3 for name, other in others.items()} == dict.fromkeys(others, True)
    with pytest.raises(AssertionError):
        family.predict(transformer, x, torch.full((3,), 0.5), text, (x,))


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2 5B"])
def test_published_adapter_loads_in_the_stock_pipeline(families: dict[str, Family], kind: str, tmp_path: Path) -> None:
    family = families[kind]
    trained = adapted(family)
    fresh = reloaded(family, trained, tmp_path / "adapter")
    with torch.no_grad():
        wanted, plain = predict(family, trained), predict(family, family.load_transformer(torch.float32, None))
        assert largest(predict(family, fresh), wanted) <= 1e-5
        assert largest(plain, wanted) > 1e-2


def test_published_adapter_loads_in_the_stock_pipeline_for_each_expert(pair: Family, tmp_path: Path) -> None:
    """Both adapters in one pipeline, each in its own expert, and the pipeline samples with them as it does with the trained experts."""
    trained, wanted = {}, {}
    for seed, name in enumerate(pair.experts):
        trained[name] = with_adapter(pair, name, seed)
        write_adapter(tmp_path / f"{name}.safetensors", adapter_weights(trained[name]), Adapter(rank=2, targets="linear"), {})
        wanted[name] = predict(pair, trained[name]).detach()
    pipe = pipeline_of(pair)
    plain = {name: predict(pair, transformer).detach() for name, transformer in zip(pair.experts, (pipe.transformer, pipe.transformer_2), strict=True)}
    pipe.load_lora_weights(tmp_path, weight_name="high.safetensors", adapter_name="high")
    assert lora_layers(pipe.transformer_2) == {}
    pipe.load_lora_weights(tmp_path, weight_name="low.safetensors", adapter_name="low", load_into_transformer_2=True)
    for name, transformer in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        with torch.no_grad():
            assert largest(predict(pair, transformer), wanted[name]) <= 1e-5
        assert largest(plain[name], wanted[name]) > 1e-2
    x = latents_of(pair, 32, 32, 2)
    assert largest(*(pipelines_steps(one, x, PROMPTS[:2], factor=8)[-1] for one in (pipe, pipeline_of(pair, **trained)))) <= 1e-4
    unadapted = pipelines_steps(pipeline_of(pair), x, PROMPTS[:2], factor=8)[-1]
    assert largest(unadapted, pipelines_steps(pipe, x, PROMPTS[:2], factor=8)[-1]) > 1e-2


def with_adapter(family: Family, expert: str, seed: int) -> nn.Module:
    model = family.load_transformer(torch.float32, None, expert)
    add_adapter(model, Adapter(rank=2, targets="linear"), family.target_patterns, seed)
    for number, layer in enumerate(lora_layers(model).values()):
        up = layer.lora_B["default"].weight
        up.data = 0.3 * noise(*up.shape, seed=100 * seed + number)
    return model


def test_the_low_experts_adapter_loads_only_beside_a_high_one(pair: Family, tmp_path: Path) -> None:
    """WanPipeline asks its `transformer` for a config, whichever expert the adapter is for (diffusers 0.42.1): so a pipeline that is to load one is given both."""
    low = with_adapter(pair, "low", 1)
    write_adapter(tmp_path / "low.safetensors", adapter_weights(low), Adapter(rank=2, targets="linear"), {})
    fresh = pair.load_transformer(torch.float32, None, "low")
    with pytest.raises(AttributeError, match="config"):
        pair.stock_pipeline(fresh, encoders=False, expert="low").load_lora_weights(tmp_path, weight_name="low.safetensors", load_into_transformer_2=True)
    pair.stock_pipeline(fresh, encoders=False, expert="low", others={"high": fresh}).load_lora_weights(tmp_path, weight_name="low.safetensors", load_into_transformer_2=True)
    with torch.no_grad():
        assert largest(predict(pair, fresh), predict(pair, low)) <= 1e-5


def test_target_words_find_what_they_promise_and_a_gradient_reaches_every_pair(wan: Family) -> None:
    transformer = wan.load_transformer(torch.float32, None)
    found = {word: set(matched(transformer, patterns, word)) for word, patterns in wan.target_patterns.items()}
    in_blocks = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")}
    assert found["linear"] == found["blocks"] == in_blocks
    assert found["attention"] == {name for name in in_blocks if ".attn" in name}
    assert (len(found["attention"]), len(in_blocks)) == (2 * 8, 2 * 10)
    assert without_gradient(adapted(wan), lambda model: predict(wan, model)) == []


# --- experts ----------------------------------------------------------------------------------------------------------------------------


def test_experts_are_two_transformers_with_their_own_noise_levels(pair: Family, wan: Family) -> None:
    assert (pair.experts, wan.experts) == (("high", "low"), ())
    assert [pair.expert_range(name) for name in ("high", "low", None)] == [(0.875, 1.0), (0.0, 0.875), (0.875, 1.0)]
    assert wan.expert_range(None) == (0.0, 1.0)
    high, low, first = (pair.load_transformer(torch.float32, None, name) for name in ("high", "low", None))
    assert torch.equal(last_layer(high), last_layer(first))
    assert not torch.equal(last_layer(high), last_layer(low))


def last_layer(transformer: nn.Module) -> Tensor:
    return transformer.get_parameter("proj_out.weight")


def test_an_expert_that_the_model_has_not_is_an_error_that_says_which_it_has(pair: Family, wan: Family, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no expert 'middle': its experts are high, low"):
        pair.load_transformer(torch.float32, None, "middle")
    with pytest.raises(RunError, match="no expert 'low': it has one transformer"):
        wan.expert_range("low")
    folder = build(tmp_path / "m", experts=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(UnsuitableModel, match="no boundary_ratio"):
        open_family(str(folder), CPU).expert_range("low")


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_saved_model_has_the_trained_expert_and_the_other_as_it_was(pair: Family, expert: str, tmp_path: Path) -> None:
    other = "low" if expert == "high" else "high"
    trained = pair.load_transformer(torch.float32, None, expert)
    last_layer(trained).data += 1
    pair.save_model(tmp_path / "m", trained, expert)
    saved = open_family(str(tmp_path / "m"), CPU)
    assert saved.experts == pair.experts
    assert torch.equal(last_layer(saved.load_transformer(torch.float32, None, expert)), last_layer(trained))
    assert torch.equal(last_layer(saved.load_transformer(torch.float32, None, other)), last_layer(pair.load_transformer(torch.float32, None, other)))
    assert saved.expert_range(expert) == pair.expert_range(expert)


# --- schedules and precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_the_shift_is_the_schedulers_own(families: dict[str, Family], scheduler: str, tmp_path: Path) -> None:
    family = open_family(str(build(tmp_path / "m", euler=scheduler == "euler", shift=5.0)), CPU)
    assert family.shift(100) == family.shift(4096) == 5.0
    levels = torch.linspace(1, 0.001, 9, dtype=torch.float64)[:-1] if scheduler == "unipc" else None
    if levels is not None:
        assert largest(family.sigmas(8, 16)[:-1], (5 * levels / (1 + 4 * levels)).float()) <= 2e-6  # UniPC's first is 1 - 1e-6
    else:
        theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
        theirs.set_timesteps(8)
        assert largest(family.sigmas(8, 16), theirs.sigmas) == 0


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_timestep_is_seen_as_it_is_in_half_precision(families: dict[str, Family], compute: torch.dtype) -> None:
    family = families["wan 2.1 euler"]
    transformer = family.load_transformer(torch.float32, None)
    seen: list[Tensor] = []
    transformer.get_submodule("condition_embedder.timesteps_proj").register_forward_hook(lambda module, inputs, output: seen.append(output))
    t = torch.tensor([0.123456, 0.5004883, 0.9999])
    with torch.no_grad(), torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32):
        family.predict(transformer, latents_of(family, 32, 32, 3), t, family.encode_prompts(PROMPTS))
    wanted = get_timestep_embedding(family.seen_timestep(t, compute) * 1000, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2 5B"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bf16_is_finite_and_close_to_fp32(families: dict[str, Family], kind: str, storage: torch.dtype) -> None:
    family = families[kind]
    with torch.no_grad():
        wanted = predict(family, family.load_transformer(torch.float32, None))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = predict(family, family.load_transformer(storage, None))
    assert found.dtype == torch.float32
    assert largest(found, wanted) <= 0.1 * float(wanted.abs().max())


def test_weights_of_a_file_are_stored_as_the_models_own_and_what_must_stay_float32_does(wan: Family, tmp_path: Path) -> None:
    save_file(wan.load_transformer(torch.float32, None).state_dict(), tmp_path / "base.safetensors")
    own, of_file = (wan.load_transformer(torch.bfloat16, weights) for weights in (None, tmp_path / "base.safetensors"))
    states: list[dict[str, Tensor]] = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in (own, of_file)]
    assert {name: value.dtype for name, value in states[0].items()} == {name: value.dtype for name, value in states[1].items()}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    kept = {name for name, value in states[1].items() if value.dtype == torch.float32}
    for name in ("condition_embedder.time_embedder.linear_1.weight", "blocks.0.scale_shift_table", "scale_shift_table", "blocks.1.norm2.weight", "rope.freqs_cos"):
        assert name in kept
    assert "blocks.0.attn1.to_q.weight" not in kept


# --- what a model must be ---------------------------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_model_of_wan_has_its_sizes(families: dict[str, Family], tmp_path: Path) -> None:
    assert {(kind, family.factor, family.pixel_multiple) for kind, family in families.items()} == {(kind, *((16, 32) if "5B" in kind else (8, 16))) for kind in KINDS}
    assert {(family.text_tokens, family.model.guidance) for family in families.values()} == {(512, None)}
    folder = build(tmp_path / "m")
    edit(folder / "vae" / "config.json", lambda config: config.pop("scale_factor_spatial"))
    assert open_family(str(folder), CPU).factor == 8


def test_a_scheduler_of_another_process_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "m")
    edit(folder / "scheduler" / "scheduler_config.json", lambda config: config.update(prediction_type="epsilon"))
    with pytest.raises(ModelError, match="UniPCMultistepScheduler with use_flow_sigmas True and prediction_type 'epsilon'"):
        open_family(str(folder), CPU)
