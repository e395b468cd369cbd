"""FLUX.2 (dev: Flux2Pipeline with Mistral 3; klein: Flux2KleinPipeline with Qwen 3): rectified flow; references are further tokens.

Latents are those that the transformer sees: 2 x 2 patches of the VAE's, normalised channel by channel by its running statistics, [B, 128, H / 16, W / 16].
So a latent is a token.

In fp16 the library clips both streams to the largest number (diffusers 0.42.1, transformer_flux2.py, where it tests for float16), and no gradient passes
where it does; use bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.schedules import flow_match_sigmas
from stages.families.shared import one_for_all, rectified_flow

# In a single-stream block one layer makes queries, keys, values and the feed-forward's input, and one takes both outputs.
_ATTENTION = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
)
_FEED_FORWARD = (r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)",)
_MODULATION = (r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear",)  # all blocks of a stream share one

_TIME_OF_REFERENCES = 10
"""How far apart the images lie on the first axis of positions."""
_TRAINING_STEPS = 50
"""Steps by which `shift` is taken; see there."""


class Flux2:
    """Implements `stages.families.base.Architecture`."""

    name = "flux2"
    transformer_class: Any = Flux2Transformer2DModel
    vae_class: Any = AutoencoderKLFlux2
    prompt_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION + _FEED_FORWARD,
        "linear": _ATTENTION + _FEED_FORWARD + _MODULATION,
    }
    version = 1
    unread: tuple[str, ...] = ()
    empty_prompt = ""
    loads_adapters = True

    path = staticmethod(rectified_flow)

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        """The mode of the VAE's distribution in 2 x 2 patches, normalised, [1, 4 C, H / 16, W / 16]."""
        mean, deviation = _statistics(vae)
        latents: Tensor = (nn.functional.pixel_unshuffle(vae.encode(image).latent_dist.mode(), 2) - mean) / deviation
        return latents

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse."""
        mean, deviation = _statistics(vae)
        images: Tensor = vae.decode(nn.functional.pixel_shuffle(latents * deviation + mean, 2)).sample
        return images

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """Three inner layers' states side by side [1, L, 3 D], padded to the full length: the transformer looks at the padding too."""
        embeds, _ = pipeline.encode_prompt([prompt], device=device, max_sequence_length=model.sizes.text_tokens)
        return Text(embeds)

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. Positions are image, row, column, word; references follow the target, at 10, 20, ... on the first axis."""
        batch, channels, height, width = inputs.noised.shape
        device, embeds = inputs.noised.device, inputs.text.embeds
        images = [inputs.noised, *inputs.references]
        out = transformer(
            hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1),
            encoder_hidden_states=embeds.float(),
            timestep=inputs.t,
            img_ids=_positions(tuple((image.shape[2], image.shape[3]) for image in images), device),
            txt_ids=_of_words(embeds.shape[1], device),
            guidance=None if model.guidance is None else torch.full_like(inputs.t, model.guidance),
            return_dict=False,
        )[0]
        own: Tensor = out[:, : height * width].float()
        return own.transpose(1, 2).reshape(batch, channels, height, width).contiguous()

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t: Flux2Transformer2DModel computes t x 1000 in the dtype of the latents that it is given, which here is float32 (diffusers 0.42.1).

        A pipeline that is loaded in bf16 gives it bf16, so when sampling a thousand timesteps become about 500, as with FLUX.1.
        """
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """exp(mu) where the scheduler shifts by the number of tokens, else its fixed shift.

        FLUX.2's mu depends on the number of steps too, so that few steps stay longer where there is much noise. Here it is that of 50 steps, the pipelines'
        default: these are the noise levels that samples are made from, and at 4 steps, for distilled models, they lie near (at 1024 x 1024 pixels s is 7.6
        for 50 steps, 9.9 for 4, and 3.2 for 200, where mu is FLUX.1's). Above 4300 tokens mu is that of 200 steps whatever the number: there s falls at once.
        """
        config = model.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return float(torch.exp(torch.tensor(compute_empirical_mu(tokens, _TRAINING_STEPS), dtype=torch.float64)))

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As the pipelines: evenly from 1 to 1 / steps, then shifted by their scheduler with the mu of this number of steps."""
        return flow_match_sigmas(model.scheduler, torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), compute_empirical_mu(tokens, steps))


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the VAE's latents in patches, each [1, 4 C, 1, 1]."""
    mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


@lru_cache(maxsize=64)
def _positions(grids: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Position ids float32 [tokens, 4] of images one after another: which image, times 10, row, column, 0. grids: rows and columns of each. Not to be changed."""
    positions = []
    for number, (height, width) in enumerate(grids):
        rows, columns = torch.meshgrid(torch.arange(height, device=device).float(), torch.arange(width, device=device).float(), indexing="ij")
        positions.append(torch.stack([torch.full_like(rows, _TIME_OF_REFERENCES * number), rows, columns, torch.zeros_like(rows)], dim=-1).reshape(-1, 4))
    return torch.cat(positions)


@lru_cache(maxsize=64)
def _of_words(number: int, device: torch.device) -> Tensor:
    """Those of so many words, float32 [number, 4]. Not to be changed."""
    words = torch.zeros(number, 4, device=device)
    words[:, 3] = torch.arange(number, device=device)
    return words
