"""A tiny Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from stages.families.tiny.parts import clip_with_projection, kl_vae, randomise, seeded, t5, tokenizer


def build(folder: Path, *, later: bool = True, dynamic: bool = False) -> Path:
    """An SD3 of two blocks with a VAE that shrinks by 2 to 4 channels.

    later: as 3.5, with a second attention in the first block and normalised queries and keys; else as 3.0. dynamic: whether its
    scheduler shifts by the number of tokens. Returns the folder.
    """
    with seeded():
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=64,
            dual_attention_layers=(0,) if later else (),
            qk_norm="rms_norm" if later else None,
        )
        randomise(transformer)
        vae = kl_vae()
        encoder, encoder_2 = clip_with_projection(8), clip_with_projection(12)
        encoder_3 = t5(32)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic, base_image_seq_len=4, max_image_seq_len=64),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer(8),
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer(8),
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer(8),
    ).save_pretrained(folder)
    return folder
