"""PixArt-alpha and PixArt-Sigma: diffusion with a table of betas, the noise predicted, over 2 x 2 latent patches; text from T5 by cross-attention.

Works with any folder that diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline read. Their transformers give a variance too, in the second half of their
channels, which no sampler of theirs looks at and which is not trained. In float16 T5-XXL overflows; Medley encodes prompts in float32 or bfloat16.
Prompts are put in lower case, as both pipelines do; where bs4 and ftfy are installed these also strip links and the like, unless told clean_caption=False.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.shared import decode_kl, encode_kl, one_for_all
from stages.objectives.path import Diffusion, Path, diffusion_of

# Full module names, matched whole. attn1 looks at the image, attn2 at the text; the modulation of all blocks is one layer that they share.
_ATTENTION = (r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)
_FEED_FORWARD = (r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",)
_MODULATION = (r"adaln_single\.linear",)


class PixArt:
    """Implements `stages.families.base.Architecture`."""

    name = "pixart"
    transformer_class: Any = PixArtTransformer2DModel
    vae_class: Any = AutoencoderKL
    prompt_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION + _FEED_FORWARD,
        "linear": _ATTENTION + _FEED_FORWARD + _MODULATION,
    }
    version = 1
    unread: tuple[str, ...] = ()
    empty_prompt = ""
    loads_adapters = False

    def path(self, model: Configs) -> Path:
        """The scheduler's own table. Raises ValueError if what it says is predicted is neither the noise nor v."""
        return _path(model)

    encode_image = staticmethod(encode_kl)
    decode_latents = staticmethod(decode_kl)

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """T5's tokens [1, L, D] and which of them are words."""
        embeds, mask, _, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=model.sizes.text_tokens)
        return Text(embeds, mask=mask.bool())

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The noise. The transformer of alpha's 1024 pixels is also told the size in pixels and height over width. References are not taken."""
        assert not inputs.references
        batch, channels, height, width = inputs.noised.shape
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if _is_told_sizes(model):
            pixels = [torch.full((batch, 1), float(side * model.sizes.factor), device=inputs.noised.device) for side in (height, width)]
            sizes = {"resolution": torch.cat(pixels, dim=1), "aspect_ratio": torch.full((batch, 1), height / width, device=inputs.noised.device)}
        out: Tensor = transformer(
            hidden_states=inputs.noised,
            encoder_hidden_states=inputs.text.embeds.float(),
            encoder_attention_mask=inputs.text.mask,
            timestep=_path(model).level(inputs.t),
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return out[:, :channels]

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t itself: `path` rounds it to the nearest of its levels wherever it is used, and the level's sines are computed in float32."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """1: the levels do not follow the number of tokens."""
        return 1.0

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """The levels of the scheduler's timesteps, counted from 1, over their number; then 0, or the least level if its last sigma is not zero."""
        fresh = type(model.scheduler).from_config(model.scheduler.config)
        fresh.set_timesteps(steps)
        number = int(model.scheduler.config.num_train_timesteps)
        levels: list[float] = [(timestep + 1) / number for timestep in fresh.timesteps.tolist()]
        return torch.tensor([*levels, 0.0 if model.scheduler.config.get("final_sigmas_type", "zero") == "zero" else 1 / number])


def _path(model: Configs) -> Diffusion:
    predicts = model.scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"scheduler/scheduler_config.json: prediction_type: '{predicts}' is not one of epsilon, v_prediction; choose another model")
    return diffusion_of(model.scheduler.betas.tolist(), predicts)


def _is_told_sizes(model: Configs) -> bool:
    """As PixArtTransformer2DModel decides it (diffusers 0.42.1)."""
    told = model.transformer.get("use_additional_conditions")
    return bool(told) if told is not None else model.transformer.get("sample_size") == 128
