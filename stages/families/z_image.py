"""Z-Image (Base and Turbo): rectified flow, image and text in one stream of tokens, from noise at its t = 0 to the image at its t = 1.

Works with any folder that diffusers' ZImagePipeline reads. ZImageTransformer2DModel fills text and image up to multiples of 32 tokens with a learnt
one, and looks at those: the prediction depends on how many words are filled in, but not on the other prompts of a batch.

In fp16 nothing is clipped (diffusers 0.42.1), and the gated feed-forwards of published weights are made for bf16's range; fp16 is at one's own risk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.schedules import flow_match_sigmas, mu_of_tokens, shift_of
from stages.families.shared import decode_kl, encode_kl, one_for_all, rectified_flow

# Full module names, matched whole. The refiners are blocks too: one of the image before it meets the text, one of the text, which is not modulated.
_ATTENTION = (r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",)
_FEED_FORWARD = (r"(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.(w1|w2|w3)",)
_MODULATION = (r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.0",)


class ZImage:
    """Implements `stages.families.base.Architecture`."""

    name = "z_image"
    transformer_class: Any = ZImageTransformer2DModel
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
        """Qwen3's last hidden states but one, of the prompt as a chat's message, [1, L, D]."""
        embeds, _ = pipeline.encode_prompt([prompt], device=device, do_classifier_free_guidance=False, max_sequence_length=model.sizes.text_tokens)
        return Text(embeds[0][None])

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. The transformer predicts x - e, and its time runs from the noise to the image."""
        embeds, mask = inputs.text.embeds.float(), inputs.text.mask
        out = transformer(
            list(inputs.noised[:, :, None].unbind()),
            1 - inputs.t,
            list(embeds.unbind()) if mask is None else [words[counts] for words, counts in zip(embeds, mask, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([image[:, 0].float() for image in out])

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t itself: ZImageTransformer2DModel takes it in float32 and computes the embedding's angles so, whatever dtype it multiplies in (diffusers 0.42.1)."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's fixed shift; exp(mu) should it shift by the number of tokens."""
        return shift_of(model.scheduler, tokens)

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As ZImagePipeline: evenly from 1 to 1 / steps, then shifted by its scheduler."""
        return flow_match_sigmas(model.scheduler, torch.linspace(1.0, 1 / steps, steps).tolist(), mu_of_tokens(model.scheduler, tokens))
