"""Qwen-Image and Qwen-Image-Edit: rectified flow over packed 2 x 2 latent patches; references are further tokens, and Edit's prompts see them too.

Works with any folder that diffusers' QwenImagePipeline, QwenImageEditPipeline (one reference) or QwenImageEditPlusPipeline (any number) reads.

In fp16 the two streams are clipped to +-65504 after each block of QwenImageTransformer2DModel (diffusers 0.42.1), for they overflow: a gradient
there is zero. bf16 has no such limit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.patches import pack, unpack
from stages.families.qwen_attention import take_masks
from stages.families.qwen_processor import leave_out_videos
from stages.families.regions import attention_mask, token_masks
from stages.families.schedules import flow_match_sigmas, mu_of_tokens, shift_of
from stages.families.shared import one_for_all, rectified_flow

leave_out_videos()

# Full module names, matched whole. What the last block makes of the text is read by nothing, so it gets no gradient: {last} is left out.
_ATTENTION = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)",
    r"transformer_blocks\.(?!{last}\.)\d+\.attn\.(add_q_proj|to_add_out)",
)
_FEED_FORWARD = (
    r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)",
    r"transformer_blocks\.(?!{last}\.)\d+\.txt_mlp\.net\.(0\.proj|2)",
)
_MODULATION = (r"transformer_blocks\.\d+\.(img|txt)_mod\.1",)


class QwenImage:
    """Implements `stages.families.base.Architecture`."""

    name = "qwen_image"
    transformer_class: Any = QwenImageTransformer2DModel
    vae_class: Any = AutoencoderKLQwenImage
    prompt_parts: tuple[str, ...] = ("text_encoder", "tokenizer", "processor")
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION + _FEED_FORWARD,
        "linear": _ATTENTION + _FEED_FORWARD + _MODULATION,
    }
    version = 1
    unread: tuple[str, ...] = (r"transformer_blocks\.{last}\.(attn\.to_add_out|txt_mlp\..*)\.(weight|bias)",)
    empty_prompt = " "
    """The negative prompt of the models' own cards."""
    loads_adapters = True

    path = staticmethod(rectified_flow)

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        """The mode of the VAE's distribution, each channel less its mean and over its deviation, [1, C, H / f, W / f]. An image is a video of one frame."""
        mean, deviation = _statistics(vae, image)
        latents: Tensor = (vae.encode(image[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / deviation
        return latents

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse."""
        mean, deviation = _statistics(vae, latents)
        images: Tensor = vae.decode((latents * deviation + mean)[:, :, None]).sample[:, :, 0]
        return images

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """Qwen2.5-VL's last hidden states of the prompt in the pipeline's template, its opening words left out, [1, L, D].

        Without references an Edit model is told what QwenImagePipeline would tell it, for no other pipeline makes images from its text alone. The
        references are scaled as the pipeline scales them: to 1024 x 1024 pixels in area for Edit, to 384 x 384 for Edit Plus. Raises ValueError for
        more references than Edit's template has a place for, which is one.
        """
        if not references:
            plain = QwenImagePipeline(scheduler=pipeline.scheduler, vae=None, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, transformer=None)
            return Text(plain.encode_prompt([prompt], device=device, max_sequence_length=model.sizes.text_tokens)[0])
        images = [_picture(reference) for reference in references]
        if model.index["_class_name"] == "QwenImageEditPlusPipeline":
            small = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
            sizes = [pipeline_qwenimage_edit_plus.calculate_dimensions(small, image.width / image.height) for image in images]
            scaled = [pipeline.image_processor.resize(image, height, width) for image, (width, height) in zip(images, sizes, strict=True)]
            with told_of_images(pipeline.text_encoder):
                return Text(pipeline.encode_prompt([prompt], image=scaled, device=device)[0])
        if len(images) > 1:
            raise ValueError(f"a prompt of QwenImageEditPipeline has a place for one reference, and was given {len(images)}; take a model of QwenImageEditPlusPipeline for more")
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, images[0].width / images[0].height)
        with told_of_images(pipeline.text_encoder):
            return Text(pipeline.encode_prompt([prompt], image=pipeline.image_processor.resize(images[0], height, width), device=device)[0])

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. Reference k's tokens follow the target's and carry k as their frame. The prompts of regions stand before the prompt, each with positions of its own."""
        images = [inputs.noised, *inputs.references]
        grids = [(image.shape[2] // 2, image.shape[3] // 2) for image in images]
        embeds, mask, attention = inputs.text.embeds, inputs.text.mask, None
        if (regions := inputs.regions) is not None:
            take_masks(transformer)
            texts = (*regions.texts, inputs.text)
            lengths = [text.embeds.shape[1] for text in texts]
            valid = torch.cat([torch.ones_like(text.embeds[:, :, 0], dtype=torch.bool) if text.mask is None else text.mask for text in texts], dim=1)
            others = sum(rows * columns for rows, columns in grids[1:])
            attention = {"attention_mask": attention_mask(token_masks(regions.masks, grids[0]), lengths[:-1], lengths[-1], others, valid), "prompt_lengths": lengths}
            embeds, mask = torch.cat([text.embeds for text in texts], dim=1), None
        out = transformer(
            hidden_states=torch.cat([pack(image) for image in images], dim=1),
            timestep=inputs.t,
            encoder_hidden_states=embeds.float(),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, rows, columns) for rows, columns in grids]] * len(inputs.noised),
            attention_kwargs=attention,
            return_dict=False,
        )[0]
        return unpack(out.float(), inputs.noised.shape[2], inputs.noised.shape[3])

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """QwenImageTransformer2DModel turns t, in [0, 1], into its activations' dtype (diffusers 0.42.1), and computes the embedding's angles from it in float32."""
        return t.to(compute).float()

    def shift(self, model: Configs, tokens: int) -> float:
        """exp(mu), mu by the number of tokens. That sampling stretches its levels to end at `shift_terminal` is no part of it."""
        return shift_of(model.scheduler, tokens)

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As QwenImagePipeline: evenly from 1 to 1 / steps, then shifted, and stretched to end at `shift_terminal`, by its scheduler."""
        return flow_match_sigmas(model.scheduler, torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu_of_tokens(model.scheduler, tokens))


@contextmanager
def told_of_images(encoder: Any) -> Iterator[None]:
    """Inside, Qwen2.5-VL knows which tokens are images', and gives them positions in rows and columns, as it and Qwen-Image-Edit were trained.

    Since transformers 5 it has to be told by `mm_token_type_ids`, and takes an image for a line of words if it is not. The Edit pipelines of diffusers
    0.42.1 do not tell it (pipeline_qwenimage_edit.py, line 248; huggingface/diffusers issue 14194). test_the_edit_pipelines_still_do_not_tell_of_images
    fails once this is no longer needed.
    """

    def tell(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given.get("image_grid_thw") is not None and given.get("mm_token_type_ids") is None and takes_it:
            given = {**given, "mm_token_type_ids": (given["input_ids"] == module.config.image_token_id).int()}
        return args, given

    takes_it = "mm_token_type_ids" in inspect.signature(encoder.forward).parameters
    hook = encoder.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the VAE's latents, [1, C, 1, 1]."""
    mean, deviation = (torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, deviation


def _picture(image: Tensor) -> Image.Image:
    """An image [1, 3, H, W] in [-1, 1] with 8 bits a colour, which is how the pipeline is handed it."""
    return Image.fromarray(((image[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())
