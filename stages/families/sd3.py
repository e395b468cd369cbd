"""Stable Diffusion 3 and 3.5: rectified flow over 2 x 2 latent patches, its text from two CLIPs and T5.

Works with any folder that diffusers' StableDiffusion3Pipeline reads: 3.0, 3.5 medium (whose first blocks have a second attention) and 3.5 large (whose
queries and keys are normalised). diffusers 0.42.1 does not open a folder without T5. The transformer is not told which text tokens are padding. In float16
T5-XXL overflows; Medley encodes prompts in float32 or bfloat16. The transformer clips nothing, so float16 is at its owner's risk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.schedules import flow_match_sigmas
from stages.families.shared import decode_kl, encode_kl, one_for_all, rectified_flow

# Full module names, matched whole. attn2 is the second attention of 3.5 medium. The last block drops its text, so what the text asks there, its
# add_q_proj, gets no gradient: {last} is left out.
_ATTENTION = (r"transformer_blocks\.(\d+\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj|to_add_out)|(?!{last}\.)\d+\.attn\.add_q_proj)",)
_FEED_FORWARD = (r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",)
_MODULATION = (r"transformer_blocks\.\d+\.norm1(_context)?\.linear",)


class SD3:
    """Implements `stages.families.base.Architecture`."""

    name = "sd3"
    transformer_class: Any = SD3Transformer2DModel
    vae_class: Any = AutoencoderKL
    prompt_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
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
        """The tokens of both CLIPs side by side, then T5's, [1, L, D], and the CLIPs' pooled vectors side by side, [1, P]."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [prompt], prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False, max_sequence_length=model.sizes.text_tokens
        )
        return Text(embeds, pooled)

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. References are not taken."""
        text = inputs.text
        assert text.pooled is not None
        assert not inputs.references
        velocity: Tensor = transformer(
            hidden_states=inputs.noised,
            timestep=inputs.t * model.scheduler.config.num_train_timesteps,
            encoder_hidden_states=text.embeds.float(),
            pooled_projections=text.pooled.float(),
            return_dict=False,
        )[0]
        return velocity

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t itself: its sines are computed in float32 (diffusers 0.42.1), and only they are rounded."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's fixed shift (3.0 in every published model), or exp(mu) where it shifts by the number of tokens."""
        config = model.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return float(torch.exp(torch.tensor(_mu(config, tokens), dtype=torch.float64)))

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As StableDiffusion3Pipeline: its scheduler's own."""
        config = model.scheduler.config
        return flow_match_sigmas(model.scheduler, None, _mu(config, tokens) if config.use_dynamic_shifting else None, steps)


def _mu(config: Any, tokens: int) -> float:
    return float(calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift))
