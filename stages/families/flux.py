"""Flux (dev, schnell, Kontext): rectified flow over packed 2 x 2 latent patches; references are further tokens, as in Flux Kontext.

Works with any folder that diffusers' FluxPipeline reads. A folder whose VAE is null trains on pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from stages.families.base import Configs, Inputs, Text
from stages.families.patches import pack, unpack
from stages.families.regions import attention_mask, token_masks
from stages.families.schedules import flow_match_sigmas
from stages.families.shared import decode_kl, encode_kl, one_for_all, rectified_flow
from stages.sent import sent

# Full module names, matched whole. Attention of both streams, feed-forward of both, and the modulation that DiffSynth's EliGen recipe trains too.
_ATTENTION = (
    r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
)
_FEED_FORWARD = (
    r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",
)
_MODULATION = (r"(single_)?transformer_blocks\.\d+\.(norm|norm1|norm1_context)\.linear",)


class Flux:
    """Implements `stages.families.base.Architecture`."""

    name = "flux"
    transformer_class: Any = FluxTransformer2DModel
    vae_class: Any = AutoencoderKL
    prompt_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
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
        """T5's tokens [1, L, D] and CLIP's pooled vector [1, P]."""
        embeds, pooled, _ = pipeline.encode_prompt([prompt], prompt_2=None, device=device, max_sequence_length=model.sizes.text_tokens)
        return Text(embeds, pooled)

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. Reference k's tokens follow the target's and carry k as first position id."""
        height, width = inputs.noised.shape[2:]
        device, text = inputs.noised.device, inputs.text
        assert text.pooled is not None
        embeds, mask = text.embeds, None
        if (regions := inputs.regions) is not None:
            # Entity prompts stand before the prompt, as in EliGen; the pooled vector is the prompt's alone.
            embeds = torch.cat([*(entity.embeds for entity in regions.texts), text.embeds], dim=1)
            seen = token_masks(regions.masks, (height // 2, width // 2))
            others = sum(reference.shape[2] * reference.shape[3] // 4 for reference in inputs.references)
            mask = attention_mask(seen, [entity.embeds.shape[1] for entity in regions.texts], text.embeds.shape[1], others)
        images = [inputs.noised, *inputs.references]
        hidden = torch.cat([pack(image) for image in images], dim=1)
        grids = tuple((image.shape[2] // 2, image.shape[3] // 2) for image in images)
        out = transformer(
            hidden_states=hidden,
            timestep=inputs.t,
            guidance=None if model.guidance is None else torch.full_like(inputs.t, model.guidance),
            pooled_projections=text.pooled.float(),
            encoder_hidden_states=embeds.float(),
            txt_ids=_no_positions(embeds.shape[1], device),
            img_ids=_positions(grids, device, inputs.scale),
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
            return_dict=False,
        )[0]
        return unpack(out.float(), height, width)

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """FluxTransformer2DModel computes t x 1000 in its activations' dtype (diffusers 0.42.1): in bf16 a thousand timesteps become 500."""
        return t if compute == torch.float32 else (t.to(compute) * 1000).float() / 1000

    def shift(self, model: Configs, tokens: int) -> float:
        """exp(mu) where the scheduler shifts by the number of tokens (dev, Kontext), else its fixed shift (schnell: 1)."""
        config = model.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return float(torch.exp(torch.tensor(_mu(config, tokens), dtype=torch.float64)))

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As FluxPipeline: evenly from 1 to 1 / steps, then shifted by its scheduler."""
        return flow_match_sigmas(model.scheduler, torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), _mu(model.scheduler.config, tokens))


def _mu(config: Any, tokens: int) -> float:
    return float(calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift))


@lru_cache(maxsize=64)  # to make them anew takes a twentieth of a millisecond, and a GPU would be waited for
def _positions(grids: tuple[tuple[int, int], ...], device: torch.device, scale: float = 1.0) -> Tensor:
    """Position ids float32 [tokens, 3] of images one after another: which image, row, column. Not to be changed.

    grids: rows and columns of tokens of each. scale: a token of the first stands for so many by so many of the full grid, and lies in their middle.
    """
    positions = []
    for number, (height, width) in enumerate(grids):
        step = scale if number == 0 else 1.0
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        rows, columns = (step * ids.float() + (step - 1) / 2 for ids in (rows, columns))
        positions.append(torch.stack([torch.full_like(rows, number), rows, columns], dim=-1).reshape(-1, 3))
    return sent(torch.cat(positions), device)


@lru_cache(maxsize=64)
def _no_positions(number: int, device: torch.device) -> Tensor:
    """Those of so many tokens of text, all zeros. Not to be changed."""
    return torch.zeros(number, 3, device=device)
