"""A tiny Lumina Image 2."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from stages.families.tiny.parts import gemma2, kl_vae, randomise, seeded, tokenizer


def build(folder: Path, *, dynamic: bool = False) -> Path:
    """A Lumina of a block of each kind, over a VAE that shrinks by 2 to 4 channels. dynamic: whether its scheduler shifts dynamically. Returns the folder."""
    with seeded():
        transformer = Lumina2Transformer2DModel(
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 64, 64),
            cap_feat_dim=16,
        )
        randomise(transformer)
        vae, encoder = kl_vae(), gemma2()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic)
    Lumina2Pipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer(256), transformer=transformer).save_pretrained(folder)
    return folder
