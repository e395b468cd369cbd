"""Wan 2.1 and 2.2 (WanPipeline): rectified flow over clips, 1 x 2 x 2 latents a token; an image is a clip of one frame.

Latents of images are [B, C, h, w], of clips [B, C, F', h, w]; F' is 1 + (F - 1) / 4 of F frames. Wan 2.2 A14B has two transformers, its experts: `transformer` for
the noise levels from `boundary_ratio` on (0.875), and `transformer_2` for those below. Wan 2.2 5B (`expand_timesteps`) tells a timestep to each
token, the same to all while nothing is given but text; told once for all, the transformer gives the same without keeping a modulation for each token.

A prompt is 512 tokens of UMT5, zeros after its words, and the transformer is not told which they are: the zeros are looked at too.

In float16, UMT5 overflows unless its `wo` stays in float32 (Medley encodes prompts in float32 or bfloat16), and the transformer's residual stream is float16 and
clipped nowhere: train in bfloat16. Norms, time embedder and modulation stay in float32 whatever the weights are stored in. The VAE is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.facts import UnsuitableModel
from stages.families.schedules import flow_match_sigmas
from stages.objectives.path import Path, Straight

# Full module names, matched whole. attn1 is self-attention, attn2 looks at the text. A block's modulation is a table, not a layer, so `linear` is `blocks`.
_ATTENTION = (r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)
_FEED_FORWARD = (r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",)


class Wan:
    """Implements `stages.families.base.Architecture`."""

    name = "wan"
    transformer_class: Any = WanTransformer3DModel
    vae_class: Any = AutoencoderKLWan
    prompt_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION + _FEED_FORWARD,
        "linear": _ATTENTION + _FEED_FORWARD,
    }
    version = 1
    unread: tuple[str, ...] = ()
    empty_prompt = ""
    loads_adapters = True

    def path(self, model: Configs) -> Path:
        """Rectified flow. Raises UnsuitableModel if the scheduler is of another process."""
        config = model.scheduler.config
        if not _tells_real_timesteps(model) and (not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction"):
            found = f"use_flow_sigmas {config.get('use_flow_sigmas')} and prediction_type {config.get('prediction_type')!r}"
            raise UnsuitableModel(f"has a {type(model.scheduler).__name__} with {found} in scheduler/scheduler_config.json; Wan needs use_flow_sigmas true and 'flow_prediction'")
        return Straight()

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        """The mode of the VAE's distribution, each channel centred and scaled: [1, C, h, w] of an image [1, 3, H, W], [1, C, F', h, w] of a clip [1, 3, F, H, W]."""
        mean, inverse = _statistics(vae, image)
        latents: Tensor = (vae.encode(_as_clip(image)).latent_dist.mode() - mean) * inverse
        return latents if image.ndim == 5 else latents[:, :, 0]

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse."""
        mean, inverse = _statistics(vae, latents)
        clips: Tensor = vae.decode(_as_clip(latents) / inverse + mean).sample
        return clips if latents.ndim == 5 else clips[:, :, 0]

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """UMT5's tokens [1, 512, D], zeros after the words. `encode_prompt` alone would give 226 of them, which is not what the pipeline runs with."""
        embeds, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=model.sizes.text_tokens)
        return Text(embeds)

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity, [B, C, h, w] or [B, C, F', h, w] as the latents are. References are not taken."""
        assert not inputs.references
        velocity: Tensor = transformer(
            hidden_states=_as_clip(inputs.noised),
            timestep=_timestep(inputs.t, model),
            encoder_hidden_states=inputs.text.embeds.float(),
            return_dict=False,
        )[0]
        return velocity if inputs.noised.ndim == 5 else velocity[:, :, 0]

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t itself: its sines are computed in float32 (diffusers 0.42.1), and only they are rounded."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's fixed shift."""
        config = model.scheduler.config
        return float(config.shift if _tells_real_timesteps(model) else config.flow_shift)

    def t_range(self, model: Configs, expert: str | None) -> tuple[float, float]:
        """With two experts, high (or None) has the noise levels from the boundary on, low those below. Raises UnsuitableModel if there is no boundary."""
        if not (model.index.get("transformer_2") or [None])[0]:
            return 0.0, 1.0
        boundary = model.index.get("boundary_ratio")
        if boundary is None:
            raise UnsuitableModel("has a transformer_2 but no boundary_ratio in model_index.json, so it would never be used; give it one, such as 0.875")
        return (0.0, float(boundary)) if expert == "low" else (float(boundary), 1.0)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As WanPipeline: its scheduler's own."""
        return flow_match_sigmas(model.scheduler, None, None, steps)


def _as_clip(images: Tensor) -> Tensor:
    """[B, C, h, w] to a clip of one frame, [B, C, 1, h, w]."""
    return images if images.ndim == 5 else images[:, :, None]


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of each latent channel, [1, C, 1, 1, 1], computed as the pipeline does."""
    mean, deviation = (torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, 1.0 / deviation


def _tells_real_timesteps(model: Configs) -> bool:
    """Whether the scheduler's timesteps are real numbers: those of UniPC and the other solvers that Wan runs with are whole, rounded down (diffusers 0.42.1)."""
    return isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler)


def _timestep(t: Tensor, model: Configs) -> Tensor:
    """What the pipeline tells the transformer at a noise level, float32 [B]: training shows it what sampling shows it. A level that is a whole thousandth may
    come out one lower or higher than the scheduler's float64 does, which over 1 to 100 steps happens at shift 1 alone, and at none that Wan was published with."""
    timestep: Tensor = t * model.scheduler.config.num_train_timesteps
    return timestep if _tells_real_timesteps(model) else timestep.floor()
