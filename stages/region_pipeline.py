"""Sampling with regions by the stock pipeline: what an adapter that learnt entities is called with.

    inputs = region_inputs(pipe, "a table", [("a red apple", left), ("a green pear", right)], height=1024, width=1024)
    image = pipe(**inputs, num_inference_steps=28).images[0]

left and right are masks, PIL images that are light where the region is. FluxPipeline and QwenImagePipeline, without a negative prompt: a mask would not fit it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from stages.families.qwen_attention import take_masks
from stages.families.regions import attention_mask, token_masks

_DARK = 127


def region_inputs(pipe: Any, prompt: str, regions: Sequence[tuple[str, Image.Image]], *, height: int, width: int, max_sequence_length: int = 512) -> dict[str, Any]:
    """The arguments to call a pipeline with, so that each region's prompt reaches the part of the image that its mask says, as in training.

    prompt: of the whole image. regions: prompt and mask of each; masks of any size, light inside. height, width: of the image, in pixels.
    max_sequence_length: tokens of each prompt, as training had them. Raises ValueError for a pipeline that takes no regions.
    """
    name, device = type(pipe).__name__, pipe._execution_device
    if name not in ("FluxPipeline", "PyramidFluxPipeline", "QwenImagePipeline"):
        raise ValueError(f"{name} takes no regions; FluxPipeline and QwenImagePipeline do")
    if not regions:
        raise ValueError("no region is given; give one or more, or call the pipeline with the prompt alone")
    side = pipe.vae_scale_factor * 2
    masks = torch.stack([torch.from_numpy(np.asarray(mask.convert("L").resize((width, height), Image.Resampling.NEAREST)) > _DARK) for _, mask in regions])[None]
    places = token_masks(masks.to(device), (height // side, width // side))
    entities = [text for text, _ in regions]
    if name == "QwenImagePipeline":
        texts = [pipe.encode_prompt(text, device=device, max_sequence_length=max_sequence_length) for text in [*entities, prompt]]
        lengths = [embeds.shape[1] for embeds, _ in texts]
        valid = torch.cat([torch.ones(embeds.shape[:2], dtype=torch.bool, device=device) if mask is None else mask.bool() for embeds, mask in texts], dim=1)
        take_masks(pipe.transformer)
        mask = attention_mask(places, lengths[:-1], lengths[-1], 0, valid)
        return {
            "prompt_embeds": torch.cat([embeds for embeds, _ in texts], dim=1), "prompt_embeds_mask": None, "height": height, "width": width,
            "true_cfg_scale": 1.0, "attention_kwargs": {"attention_mask": mask, "prompt_lengths": lengths},
        }  # fmt: skip
    embeds, pooled = [], None
    for text in [*entities, prompt]:
        encoded, pooled, _ = pipe.encode_prompt(text, prompt_2=None, device=device, max_sequence_length=max_sequence_length)
        embeds.append(encoded)
    mask = attention_mask(places, [each.shape[1] for each in embeds[:-1]], embeds[-1].shape[1])
    return {"prompt_embeds": torch.cat(embeds, dim=1), "pooled_prompt_embeds": pooled, "height": height, "width": width, "joint_attention_kwargs": {"attention_mask": mask}}
