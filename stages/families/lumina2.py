"""Lumina Image 2 (Lumina2Pipeline): rectified flow of image tokens that follow the prompt's in one stream; prompts by Gemma 2.

The transformer counts time from noise (0) to image (1) and predicts x - e: both are turned round in `predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, Lumina2Transformer2DModel
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.schedules import flow_match_sigmas
from stages.families.shared import decode_kl, encode_kl, one_for_all, rectified_flow

# The refiners see the image alone (noise) and the prompt alone (context) before the layers see both.
_ATTENTION = (r"(layers|noise_refiner|context_refiner)\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",)
_FEED_FORWARD = (r"(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.linear_[123]",)
_MODULATION = (r"(layers|noise_refiner)\.\d+\.norm1\.linear",)


class Lumina2:
    """Implements `stages.families.base.Architecture`."""

    name = "lumina2"
    transformer_class: Any = Lumina2Transformer2DModel
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
    loads_adapters = True

    path = staticmethod(rectified_flow)

    encode_image = staticmethod(encode_kl)
    decode_latents = staticmethod(decode_kl)

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """Gemma's last states but one [1, L, D], without the padding that the mask hides.

        Before the prompt stands the pipeline's own system prompt. The empty prompt stands alone, as the pipeline encodes it for classifier-free guidance.
        """
        length = model.sizes.text_tokens
        if prompt:
            embeds, mask, _, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=length)
        else:
            _, _, embeds, mask = pipeline.encode_prompt([""], do_classifier_free_guidance=True, device=device, max_sequence_length=length)
        words = int(mask.sum())
        return Text(embeds[:, :words], mask=mask[:, :words].bool())

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. References are not taken."""
        text = inputs.text
        assert text.mask is not None
        assert not inputs.references
        out: Tensor = transformer(
            hidden_states=inputs.noised,
            timestep=1 - inputs.t,
            encoder_hidden_states=text.embeds.float(),
            encoder_attention_mask=text.mask,
            return_dict=False,
        )[0]
        return -out.float()

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t: the sinusoids are taken of 1 - t in float32, whatever the transformer computes in (diffusers 0.42.1)."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's fixed shift; where it shifts dynamically, exp(mu) of the pipeline's mu, which is the same at all sizes."""
        config = model.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return float(torch.exp(torch.tensor(_mu(model), dtype=torch.float64)))

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As Lumina2Pipeline: evenly from 1 to 1 / steps, then shifted by its scheduler."""
        return flow_match_sigmas(model.scheduler, torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), _mu(model))


def _mu(model: Configs) -> float:
    """Lumina2Pipeline takes the latents' number of channels for that of tokens (diffusers 0.42.1, pipeline_lumina2.py, `latents.shape[1]`), and so do we,
    for the images that users see are sampled so; test_the_shift_is_the_pipelines_own[lumina2 dynamic] fails once it does not."""
    config = model.scheduler.config
    channels = int(model.transformer["in_channels"])
    return float(
        calculate_shift(channels, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096), config.get("base_shift", 0.5), config.get("max_shift", 1.15))
    )
