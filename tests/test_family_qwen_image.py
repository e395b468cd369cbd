"""The qwen_image family: one step is the stock pipelines', the adapter is loaded by them, and what is prepared and encoded is their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from families import CPU, PROMPTS, adapted, largest, noise, our_first_step, pipelines_first_step, reloaded, without_gradient
from stages.adapter import matched
from stages.families.base import RegionTexts, Text
from stages.families.facts import UnsuitableModel, tasks_of
from stages.families.family import Family
from stages.families.patches import pack, unpack
from stages.families.qwen_image import QwenImage, told_of_images
from stages.families.tiny.qwen_image import build
from stages.families.tiny.qwen_words import QWEN_WORDS, qwen_tokenizer

SIZES = [(64, 64), (32, 96)]
"""Heights and widths that `scaled_down` leaves as they are."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(QwenImage(), str(build(tmp_path_factory.mktemp("qwen_image"))), None, None, CPU)


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(QwenImage(), str(build(tmp_path_factory.mktemp("edit"), pipeline="QwenImageEditPipeline")), None, None, CPU)


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(QwenImage(), str(build(tmp_path_factory.mktemp("plus"), pipeline="QwenImageEditPlusPipeline")), None, None, CPU)


@pytest.fixture(scope="module")
def transformer(family: Family) -> nn.Module:
    return family.load_transformer(torch.float32, None)


@pytest.fixture
def scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Edit pipelines scale references to 1024 x 1024 pixels in area, or 384 x 384; here it is 64 x 64, for the pipelines and for us."""
    whole = pipeline_qwenimage_edit.calculate_dimensions

    def smaller(area: int, ratio: float) -> tuple[int, int, None]:
        assert area == 1024 * 1024
        found: tuple[int, int, None] = whole(64 * 64, ratio)
        return found

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", smaller)
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, 64 * 64)


def picture(height: int, width: int, seed: int) -> tuple[Image.Image, Tensor]:
    """An image of random colours, as the pipelines are handed it and as we are."""
    colours = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(colours.numpy()), colours.permute(2, 0, 1)[None].float() / 127.5 - 1


def told(x: Tensor) -> dict[str, object]:
    return {"height": x.shape[2] * 2, "width": x.shape[3] * 2, "latents": pack(x), "num_inference_steps": 4, "true_cfg_scale": 1.0, "output_type": "latent"}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_one_step_equals_the_pipelines_own_step(family: Family, transformer: nn.Module, height: int, width: int, batch: int) -> None:
    pipe = family.stock_pipeline(transformer)
    assert isinstance(pipe, QwenImagePipeline)
    x = noise(batch, 4, height // 2, width // 2)
    after = pipelines_first_step(pipe, lambda note: pipe(prompt=PROMPTS[:batch], callback_on_step_end=note, **told(x)))
    assert torch.equal(family.sigmas(4, family.tokens(height, width)), pipe.scheduler.sigmas.float())
    ours = our_first_step(family, transformer, x, PROMPTS[:batch], steps=4)
    assert largest(ours, x) > 1e-2
    assert largest(pack(ours), after) <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("clean_references", [False, True], ids=["references at t", "references at 0"])
@pytest.mark.usefixtures("scaled_down")
def test_edit_one_step_equals_the_pipelines_own_step(tmp_path: Path, height: int, width: int, clean_references: bool, batch: int) -> None:
    family = Family(QwenImage(), str(build(tmp_path / "m", pipeline="QwenImageEditPipeline", clean_references=clean_references)), None, None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    pipe = family.stock_pipeline(transformer)
    assert isinstance(pipe, QwenImageEditPipeline)
    x, (image, tensor) = noise(batch, 4, 8, 12), picture(height, width, 3)
    images = tensor.expand(batch, -1, -1, -1)
    # With several prompts the pipeline fails in its processor, which is handed one image; with their encodings it takes them.
    text = family.encode_prompts(PROMPTS[:batch], (images,))
    prompts = {"prompt": PROMPTS[:1]} if batch == 1 else {"prompt_embeds": text.embeds, "prompt_embeds_mask": text.mask}
    with told_of_images(pipe.text_encoder):
        after = pipelines_first_step(pipe, lambda note: pipe(image=image, callback_on_step_end=note, **prompts, **told(x)))
    ours = our_first_step(family, transformer, x, PROMPTS[:batch], steps=4, references=(family.encode_images(images),), images=(images,))
    assert largest(pack(ours), after) <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES], ids=["one reference", "two references"])
@pytest.mark.usefixtures("scaled_down")
def test_edit_plus_one_step_equals_the_pipelines_own_step(plus: Family, sizes: list[tuple[int, int]], batch: int) -> None:
    transformer = plus.load_transformer(torch.float32, None)
    pipe = plus.stock_pipeline(transformer)
    assert isinstance(pipe, QwenImageEditPlusPipeline)
    x = noise(batch, 4, 8, 12)
    pictures = [[picture(*size, 10 * row + number) for number, size in enumerate(sizes)] for row in range(batch)]
    images = tuple(torch.cat([row[number][1] for row in pictures]) for number in range(len(sizes)))
    ours = our_first_step(plus, transformer, x, PROMPTS[:batch], steps=4, references=tuple(plus.encode_images(each) for each in images), images=images)
    for row in range(batch):  # the pipeline takes one prompt at a time
        own = x[row : row + 1]

        def call(note: object, row: int = row, own: Tensor = own) -> object:
            return pipe(image=[image for image, _ in pictures[row]], prompt=PROMPTS[row], callback_on_step_end=note, **told(own))

        with told_of_images(pipe.text_encoder):
            assert largest(pack(ours[row : row + 1]), pipelines_first_step(pipe, call)) <= 1e-5


def test_latents_are_the_pipelines_own(edit: Family) -> None:
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = edit.encode_images(images)
    assert latents.shape == (3, 4, 8, 12)
    pipe = edit.stock_pipeline(edit.load_transformer(torch.float32, None))
    with torch.no_grad():
        assert largest(latents, pipe._encode_vae_image(images[:, :, None], None)[:, :, 0]) <= 1e-5
    assert torch.equal(latents, torch.cat([edit.encode_images(image[None]) for image in images]))


def test_decoded_latents_are_the_pipelines_own(family: Family, transformer: nn.Module) -> None:
    pipe = family.stock_pipeline(transformer)
    last: list[Tensor] = []
    asked = {**told(noise(2, 4, 8, 12)), "num_inference_steps": 2, "output_type": "pt"}
    painted = pipe(prompt=PROMPTS[:2], callback_on_step_end=lambda pipeline, step, t, values: last.append(values["latents"].clone()) or values, **asked).images
    assert largest((family.decode_latents(unpack(last[-1], 8, 12)) + 1) / 2, painted) <= 1e-5


def test_encoded_prompts_are_the_pipelines_own_and_do_not_depend_on_the_batch(family: Family) -> None:
    together = family.encode_prompts(PROMPTS)
    theirs, mask = family.prompter.encode_prompt(list(PROMPTS), device=CPU)
    assert together.mask is not None
    assert torch.equal(together.mask, mask.bool())
    assert largest(together.embeds, theirs) <= 1e-5
    other = Family(QwenImage(), family.repo, None, None, CPU)
    for place, prompt in enumerate(PROMPTS):
        assert torch.equal(other.encode_prompts([prompt]).embeds[0], together.embeds[place][together.mask[place]])


@pytest.mark.parametrize("words", [0, 3, 5])
def test_the_templates_opening_words_are_left_out_and_no_more(family: Family, words: int) -> None:
    assert family.encode_prompts([" ".join(["red"] * words)]).embeds.shape[1] == words + len(["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"])


def test_an_empty_prompt_is_a_space(family: Family) -> None:
    theirs, _ = family.prompter.encode_prompt([" "], device=CPU)
    assert torch.equal(family.encode_prompts([""]).embeds, theirs)


@pytest.mark.usefixtures("scaled_down")
def test_edits_prompts_see_their_references_and_do_not_depend_on_the_batch(edit: Family, plus: Family) -> None:
    one, other = (torch.cat([picture(64, 64, seed + row)[1] for row in range(3)]) for seed in (1, 5))
    for family, seen in ((edit, (one,)), (plus, (one,)), (plus, (one, other))):
        together = family.encode_prompts(PROMPTS, seen)
        changed = family.encode_prompts(PROMPTS, (*seen[:-1], seen[-1].flip(0)))
        assert together.embeds.shape[1] > family.encode_prompts(PROMPTS).embeds.shape[1]
        assert together.mask is not None
        assert largest(together.embeds[0], changed.embeds[0]) > 1e-3
        fresh = Family(QwenImage(), family.repo, None, None, CPU)
        for place, prompt in enumerate(PROMPTS):
            alone = fresh.encode_prompts([prompt], [image[place : place + 1] for image in seen])
            assert torch.equal(alone.embeds[0], together.embeds[place][together.mask[place]])


@torch.no_grad()
def test_images_in_prompts_have_positions_in_rows_and_columns(plus: Family) -> None:
    image, tensor = picture(64, 64, 1)
    found = plus.encode_prompts(["it"], (tensor,)).embeds
    pipe = plus.prompter
    text = pipe.prompt_template_encode.format("Picture 1: <|vision_start|><|image_pad|><|vision_end|>it")
    given = pipe.processor(text=[text], images=[pipe.image_processor.resize(image, 384, 384)], return_tensors="pt")
    states = pipe.text_encoder(**given, output_hidden_states=True).hidden_states[-1]
    assert largest(found, states[:, pipe.prompt_template_encode_start_idx :]) <= 1e-5


@torch.no_grad()
def test_the_edit_pipelines_still_do_not_tell_of_images(plus: Family) -> None:
    small = picture(384, 384, 1)[0]
    plain, _ = plus.prompter.encode_prompt(["it"], image=[small], device=CPU)
    with told_of_images(plus.prompter.text_encoder):
        told_so, _ = plus.prompter.encode_prompt(["it"], image=[small], device=CPU)
    assert largest(plain, told_so) > 1e-2


def test_without_references_an_edit_models_prompt_is_that_of_text_to_image(family: Family, edit: Family, plus: Family) -> None:
    theirs, _ = QwenImagePipeline(scheduler=None, vae=None, text_encoder=plus.prompter.text_encoder, tokenizer=plus.prompter.tokenizer, transformer=None).encode_prompt([PROMPTS[2]], device=CPU)
    for each in (family, edit, plus):
        assert torch.equal(each.encode_prompts([PROMPTS[2]]).embeds, theirs)


def test_references_are_no_part_of_text_to_images_prompts(family: Family) -> None:
    image = picture(64, 64, 0)[1]
    assert torch.equal(family.encode_prompts(PROMPTS[:1], (image,)).embeds, family.encode_prompts(PROMPTS[:1]).embeds)


def test_edits_prompt_has_a_place_for_one_reference(edit: Family) -> None:
    image = picture(64, 64, 0)[1]
    with pytest.raises(ValueError, match="place for one reference, and was given 2; take a model of QwenImageEditPlusPipeline"):
        edit.encode_prompts(PROMPTS[:1], (image, image))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_the_processor_still_needs_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Qwen2VLProcessor, "get_attributes")
    with pytest.raises((AttributeError, ImportError, TypeError)):
        Qwen2VLProcessor(image_processor=Qwen2VLImageProcessorPil(), tokenizer=qwen_tokenizer())


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_other_prompts_of_the_batch(family: Family, transformer: nn.Module) -> None:
    x, t, reference = noise(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), noise(3, 4, 4, 8, seed=2)
    together = family.predict(transformer, x, t, family.encode_prompts(PROMPTS), (reference,))
    for place, prompt in enumerate(PROMPTS):
        own = slice(place, place + 1)
        assert largest(family.predict(transformer, x[own], t[own], family.encode_prompts([prompt]), (reference[own],)), together[own]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("clean_references", [False, True], ids=["references at t", "references at 0"])
def test_every_input_changes_the_output(tmp_path: Path, clean_references: bool) -> None:
    family = Family(QwenImage(), str(build(tmp_path / "m", clean_references=clean_references)), None, None, CPU)
    transformer = family.load_transformer(torch.float32, None)
    x, t, text = noise(1, 4, 8, 8), torch.tensor([0.5]), family.encode_prompts(PROMPTS[:1])
    one, other = noise(1, 4, 8, 8, seed=2), noise(1, 4, 4, 8, seed=3)
    mask = torch.ones(text.embeds.shape[:2], dtype=torch.bool)
    first, last = text.embeds.clone(), mask.clone()
    first[:, 0] += 0.5
    last[:, -1] = False
    plain = family.predict(transformer, x, t, text, (one, other))
    assert largest(family.predict(transformer, x, t, Text(text.embeds, None, mask), (one, other)), plain) <= 1e-6
    changed = {
        "noised": family.predict(transformer, x + 0.1, t, text, (one, other)),
        "t": family.predict(transformer, x, t + 0.01, text, (one, other)),
        "text": family.predict(transformer, x, t, Text(first), (one, other)),
        "mask": family.predict(transformer, x, t, Text(text.embeds, None, last), (one, other)),
        "prompt": family.predict(transformer, x, t, family.encode_prompts(PROMPTS[1:2]), (one, other)),
        "first reference": family.predict(transformer, x, t, text, (one + 0.1, other)),
        "second reference": family.predict(transformer, x, t, text, (one, other + 0.1)),
        "order": family.predict(transformer, x, t, text, (other, one)),
        "one reference": family.predict(transformer, x, t, text, (one,)),
        "no reference": family.predict(transformer, x, t, text),
    }
    assert {name: largest(value, plain) > 1e-4 for name, value in changed.items()} == dict.fromkeys(changed, True)


@pytest.mark.parametrize("pipeline", ["QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_published_adapter_loads_in_the_stock_pipeline(pipeline: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    family: Family = request.getfixturevalue({"QwenImagePipeline": "family", "QwenImageEditPipeline": "edit", "QwenImageEditPlusPipeline": "plus"}[pipeline])
    assert family.pipeline_class == pipeline
    trained = adapted(family)
    fresh, base = reloaded(family, trained, tmp_path / "adapter"), family.load_transformer(torch.float32, None)
    x, t, text, reference = noise(2, 4, 8, 12), torch.tensor([0.2, 0.8]), family.encode_prompts(PROMPTS[:2]), noise(2, 4, 8, 8, seed=2)
    predict: Callable[[nn.Module], Tensor] = lambda model: family.predict(model, x, t, text, (reference,))  # noqa: E731
    with torch.no_grad():
        assert largest(predict(trained), predict(base)) > 1e-2
        assert largest(predict(trained), predict(fresh)) <= 1e-5
    assert without_gradient(trained, predict) == []


def test_target_words_find_what_they_promise(family: Family, transformer: nn.Module) -> None:
    blocks = ("transformer_blocks.0", "transformer_blocks.1")
    unread = {f"{blocks[1]}.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
    attention = {f"{block}.attn.{name}" for block in blocks for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    feed_forward = {f"{block}.{stream}_mlp.net.{name}" for block in blocks for stream in ("img", "txt") for name in ("0.proj", "2")}
    modulation = {f"{block}.{stream}_mod.1" for block in blocks for stream in ("img", "txt")}
    found = {word: set(matched(transformer, patterns, word)) for word, patterns in family.target_patterns.items()}
    wanted = {"attention": attention, "blocks": attention | feed_forward, "linear": attention | feed_forward | modulation}
    assert found == {word: names - unread for word, names in wanted.items()}
    inside = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and name.startswith("transformer_blocks")}
    assert found["linear"] == inside - unread


def test_what_target_words_leave_out_gets_no_gradient(family: Family) -> None:
    model = family.load_transformer(torch.float32, None).requires_grad_(True)
    family.predict(model, noise(1, 4, 8, 8), torch.tensor([0.5]), family.encode_prompts(PROMPTS[:1])).square().mean().backward()
    grads = {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    without = {name for name, grad in grads.items() if grad is None or not bool(grad.any())}
    assert without == {f"transformer_blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}


def test_shift_is_the_schedulers_own(family: Family) -> None:
    shift, t = family.shift(16), torch.linspace(1, 0.25, 4)
    levels = shift * t / (1 + (shift - 1) * t)
    stretched = 1 - (1 - levels) * (1 - 0.02) / (1 - levels[-1])  # so that the last is shift_terminal
    assert torch.allclose(family.sigmas(4, 16)[:-1], stretched, atol=1e-6)
    assert family.shift(64) > shift > 1


def test_timesteps_are_rounded_as_the_transformer_rounds_them(family: Family, transformer: nn.Module) -> None:
    seen: list[Tensor] = []
    hook = transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    t, text = torch.linspace(0, 1, 101)[1:100:7], family.encode_prompts(PROMPTS[:1] * 15)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        family.predict(transformer, noise(len(t), 4, 4, 4), t, text)
        family.predict(transformer, noise(len(t), 4, 4, 4), family.seen_timestep(t, torch.bfloat16), text)
    hook.remove()
    assert torch.equal(seen[0].float(), family.seen_timestep(t, torch.bfloat16))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0].float(), t)
    assert torch.equal(family.seen_timestep(t, torch.float32), t)


def test_bf16_is_finite_and_close_to_fp32(family: Family, transformer: nn.Module) -> None:
    x, t, text, reference = noise(2, 4, 8, 8), torch.tensor([0.25, 0.75]), family.encode_prompts([PROMPTS[0], PROMPTS[2]]), noise(2, 4, 4, 8, seed=2)
    with torch.no_grad():
        exact = family.predict(transformer, x, t, text, (reference,))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = family.predict(transformer, x, t, text, (reference,))
    assert rounded.dtype == torch.float32
    assert bool(rounded.isfinite().all())
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


def test_facts_are_the_configs(family: Family, tmp_path: Path) -> None:
    assert (family.factor, family.pixel_multiple, family.text_tokens, family.model.guidance) == (2, 4, 512, None)
    assert "text_to_image" in tasks_of("QwenImageEditPlusPipeline")
    folder = build(tmp_path / "guided")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": True}))
    with pytest.raises(UnsuitableModel, match="guidance_embeds"):
        Family(QwenImage(), str(folder), None, None, CPU)


def test_the_tiny_tokenizer_knows_each_word_once() -> None:
    assert len(set(QWEN_WORDS)) == len(QWEN_WORDS) == len(qwen_tokenizer())


def test_packed_latents_are_the_pipelines_own() -> None:
    x = noise(2, 4, 6, 10)
    packed = QwenImagePipeline._pack_latents(x, 2, 4, 6, 10)
    assert torch.equal(pack(x), packed)
    assert torch.equal(unpack(packed, 6, 10), x)
    assert torch.equal(unpack(torch.cat([packed, packed], dim=1), 6, 10), x)


# --- regions ----------------------------------------------------------------------------------------------------------------------------

WORDS_OF_REGIONS = [["a red disc", "green", "a blue square"], ["a green square", "the same", "a"]]


def regions_of(family: Family, masks: Tensor) -> RegionTexts:
    """Prompts of unlike lengths. masks: bool [B, R, H, W]."""
    return RegionTexts(tuple(family.encode_prompts(prompts[: len(masks)]) for prompts in WORDS_OF_REGIONS[: masks.shape[1]]), masks)


def left_and_nothing(batch: int, width: int = 16) -> Tensor:
    """Masks of two regions: the left half, and nothing."""
    masks = torch.zeros(batch, 2, 16, width, dtype=torch.bool)
    masks[:, 0, :, : width // 2] = True
    return masks


def test_diffusers_own_processor_still_refuses_a_mask(family: Family) -> None:
    model, text = family.load_transformer(torch.float32, None), family.encode_prompts(PROMPTS[:1])
    with pytest.raises(ValueError, match="does not accept an external attention_mask"):
        model(pack(noise(1, 4, 4, 4)), text.embeds, None, torch.tensor([0.5]), [[(1, 2, 2)]], attention_kwargs={"attention_mask": torch.ones(1, 1, 4, 4)})


@torch.no_grad()
@pytest.mark.parametrize("num_regions", [0, 2], ids=["no region", "regions of nothing"])
def test_regions_that_nothing_belongs_to_change_nothing(family: Family, transformer: nn.Module, num_regions: int) -> None:
    x, t, text, reference = noise(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), family.encode_prompts(PROMPTS), noise(3, 4, 4, 8, seed=2)
    model = family.load_transformer(torch.float32, None)
    regions = regions_of(family, torch.zeros(3, num_regions, 16, 16, dtype=torch.bool))
    assert largest(family.predict(model, x, t, text, (reference,), regions=regions), family.predict(transformer, x, t, text, (reference,))) <= 1e-5
    assert torch.equal(family.predict(model, x, t, text, (reference,)), family.predict(transformer, x, t, text, (reference,)))  # without a mask it is diffusers' own


@torch.no_grad()
def test_a_regions_prompt_is_seen_inside_its_mask_alone(family: Family) -> None:
    model, x, t, text = family.load_transformer(torch.float32, None), noise(1, 4, 8, 8), torch.tensor([0.5]), family.encode_prompts(PROMPTS[:1])
    reference, masks = noise(1, 4, 4, 8, seed=2), left_and_nothing(1)
    seen: list[Tensor] = []
    hook = model.transformer_blocks[0].register_forward_hook(lambda module, args, given: seen.extend(given))
    plain = family.predict(model, x, t, text, (reference,), regions=regions_of(family, masks))
    one = regions_of(family, masks)
    other = RegionTexts((Text(one.texts[0].embeds + 0.5), one.texts[1]), masks)
    changed = family.predict(model, x, t, text, (reference,), regions=other)
    hook.remove()
    assert largest(changed, plain) > 1e-3
    words, tokens = ((after - before).abs().amax(dim=2)[0] > 1e-6 for before, after in zip(seen[:2], seen[2:], strict=True))
    lengths = [len(each.embeds[0]) for each in (*one.texts, text)]
    assert words.tolist() == [True] * lengths[0] + [False] * (lengths[1] + lengths[2])
    assert tokens.tolist() == [True, True, False, False] * 4 + [False] * 8


@torch.no_grad()
def test_regions_do_not_depend_on_the_other_images_of_the_batch(family: Family, transformer: nn.Module) -> None:
    x, t, masks = noise(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), left_and_nothing(3)
    masks[1], masks[2, 1, 8:] = masks[1].flip(0), True
    together = family.predict(transformer, x, t, family.encode_prompts(PROMPTS), regions=regions_of(family, masks))
    for row in range(3):
        texts = tuple(family.encode_prompts([prompts[row]]) for prompts in WORDS_OF_REGIONS)
        own = slice(row, row + 1)
        alone = family.predict(transformer, x[own], t[own], family.encode_prompts([PROMPTS[row]]), regions=RegionTexts(texts, masks[own]))
        assert largest(alone, together[own]) <= 1e-5


def test_gradients_with_regions_are_the_same_with_checkpoints(family: Family) -> None:
    found = []
    for checkpoints in (False, True):
        trained = adapted(family)
        if checkpoints:
            trained.enable_gradient_checkpointing()
        predict: Callable[[nn.Module], Tensor] = lambda model: family.predict(  # noqa: E731
            model, noise(2, 4, 8, 8), torch.tensor([0.2, 0.8]), family.encode_prompts(PROMPTS[:2]), regions=regions_of(family, left_and_nothing(2))
        )
        assert without_gradient(trained.train(), predict) == []
        found.append({name: weight.grad for name, weight in trained.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert largest(found[0], found[1]) <= 1e-6 * max(float(gradient.abs().max()) for gradient in found[0].values())


@torch.no_grad()
def test_bf16_with_regions_is_close_to_fp32(family: Family, transformer: nn.Module) -> None:
    x, t, text, regions = noise(2, 4, 8, 8), torch.tensor([0.25, 0.75]), family.encode_prompts(PROMPTS[:2]), regions_of(family, left_and_nothing(2))
    exact = family.predict(transformer, x, t, text, regions=regions)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = family.predict(transformer, x, t, text, regions=regions)
    assert bool(rounded.isfinite().all())
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
