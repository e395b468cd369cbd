"""Sana (SanaPipeline): rectified flow with linear attention on the latents of a deep-compression autoencoder, a token a latent; prompts by Gemma 2.

The self-attention's two products are written for float32: its processor casts queries, keys and values up (diffusers 0.42.1, models/attention_processor.py,
SanaLinearAttnProcessor2_0). Autocast casts them down again. In bf16 that costs next to nothing, for the range stays (0.3 % of the output either way). In fp16 the sum
over all tokens, by which the output is divided, goes beyond 65504 and the output to 0 without a warning: over 4096 tokens a third of it is lost at queries and keys
of deviation 2, and all is NaN at 4. So train it in bf16 or fp32, not in fp16.

Its feed-forwards are convolutions, which no adapter of ours sits on, so `blocks` finds what `attention` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.facts import UnsuitableModel
from stages.families.schedules import flow_match_sigmas
from stages.families.shared import one_for_all
from stages.objectives.path import Path, Straight

_ATTENTION = (r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)
_MODULATION = (r"time_embed\.linear",)  # of all blocks: they add tables of their own to what it gives


class Sana:
    """Implements `stages.families.base.Architecture`."""

    name = "sana"
    transformer_class: Any = SanaTransformer2DModel
    vae_class: Any = AutoencoderDC
    prompt_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION,
        "linear": _ATTENTION + _MODULATION,
    }
    version = 1
    unread: tuple[str, ...] = ()
    empty_prompt = ""
    loads_adapters = True

    def path(self, model: Configs) -> Path:
        """Rectified flow. Raises UnsuitableModel if the scheduler takes something else to be predicted."""
        predicts = model.scheduler.config.get("prediction_type", "flow_prediction")
        if predicts != "flow_prediction":
            raise UnsuitableModel(f"its scheduler says prediction_type '{predicts}', and a Sana is trained with 'flow_prediction'; choose a model whose scheduler says so")
        return Straight()

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        """What the autoencoder gives, which is no distribution, scaled, [1, C, H / 32, W / 32]."""
        latents: Tensor = vae.encode(image).latent * vae.config.scaling_factor
        return latents

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse."""
        images: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
        return images

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """Gemma's last states [1, L, D], without the padding that the mask hides.

        Before the prompt stands the instruction that the pipeline writes there by default, of which only the first token is kept. The empty prompt stands
        alone, as the pipeline encodes it for classifier-free guidance.
        """
        embeds, mask, _, _ = pipeline.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=model.sizes.text_tokens,
            complex_human_instruction=instruction(pipeline) if prompt else None,
        )
        words = int(mask.sum())
        return Text(embeds[:, :words], mask=mask[:, :words].bool())

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. Where the transformer has channels for a learned variance too, they are left out. References are not taken."""
        text = inputs.text
        assert text.mask is not None
        assert not inputs.references
        out: Tensor = transformer(
            hidden_states=inputs.noised,
            encoder_hidden_states=text.embeds.float(),
            encoder_attention_mask=text.mask.float(),
            timestep=inputs.t * model.scheduler.config.num_train_timesteps * model.transformer.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return out[:, : inputs.noised.shape[1]].float().contiguous()

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t: the sinusoids are taken of it in float32, whatever the transformer computes in (diffusers 0.42.1)."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's fixed shift: `flow_shift` of a solver such as DPMSolverMultistepScheduler, `shift` of FlowMatchEulerDiscreteScheduler."""
        config = model.scheduler.config
        return float(config["flow_shift"] if "flow_shift" in config else config["shift"])

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """The scheduler's own.

        DPMSolverMultistepScheduler tells the transformer 1000 sigma rounded down to a whole number, and starts a little below 1; what is told here is
        not rounded. Its first step is Euler's, the later ones look back at the one before.
        """
        return flow_match_sigmas(model.scheduler, None, None, steps)


def instruction(pipeline: Any) -> list[str]:
    """What the pipeline puts before a prompt unless told otherwise: lines that ask for a longer description."""
    lines: list[str] = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return lines
