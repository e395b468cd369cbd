"""A tiny Flux."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from stages.families.tiny.parts import clip, kl_vae, randomise, seeded, t5, tokenizer


def build(folder: Path, *, pixels: bool = False, guidance: bool = False, pipeline: str = "FluxPipeline") -> Path:
    """A Flux of two blocks. pixels: without a VAE, on 3 channels; else with one that shrinks by 2 to 4 channels. Returns the folder."""
    with seeded():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=12 if pixels else 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
        randomise(transformer)
        vae = None if pixels else kl_vae()
        encoder, encoder_2 = clip(), t5()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=not pixels, base_image_seq_len=4, max_image_seq_len=64)
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer(8), text_encoder_2=encoder_2, tokenizer_2=tokenizer(8), transformer=transformer)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    return folder
