"""A tiny PixArt."""

from __future__ import annotations

from pathlib import Path

from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn

from stages.families.tiny.parts import kl_vae, randomise, seeded, t5, tokenizer


def build(folder: Path, *, alpha: bool = False) -> Path:
    """A PixArt of two blocks with a VAE that shrinks by 2 to 4 channels. alpha: alpha of 1024 pixels, which is told sizes; else Sigma. Returns the folder."""
    with seeded():
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=128 if alpha else 32,
            caption_channels=16,
            use_additional_conditions=None if alpha else False,
        )
        randomise(transformer)
        nn.init.normal_(transformer.scale_shift_table)
        pipeline = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
        vae, encoder = kl_vae(shift=None), t5()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    pipeline(tokenizer=tokenizer(8), text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler).save_pretrained(folder)
    return folder
