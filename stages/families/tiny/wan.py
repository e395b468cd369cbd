"""A tiny Wan."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from stages.families.tiny.parts import randomise, seeded, tokenizer, umt5


def build(folder: Path, *, experts: bool = False, five_b: bool = False, euler: bool = False, shift: float = 3.0) -> Path:
    """A Wan of two blocks over a VAE that shrinks by 8 to 4 channels. experts: two transformers, as 2.2 A14B, else one, as 2.1.

    five_b: as 2.2 5B, a timestep for each token, and a VAE that shrinks by 16 to 6 channels. euler: FlowMatchEulerDiscreteScheduler in the place of UniPC. Returns the folder.
    """
    channels = 6 if five_b else 4
    with seeded():
        transformers = [_transformer(channels) for _ in range(2 if experts else 1)]
        vae, encoder = _vae(channels, five_b), umt5()
        randomise(encoder, 0.5)  # of the size that UMT5 begins with, all prompts would look alike
    pipe = WanPipeline(
        tokenizer=tokenizer(512),
        text_encoder=encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift) if euler else UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts else None,
        boundary_ratio=0.875 if experts else None,
        expand_timesteps=five_b,
    )
    pipe.save_pretrained(folder)
    return folder


def _transformer(channels: int) -> WanTransformer3DModel:
    made = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    randomise(made)
    return made


def _vae(channels: int, five_b: bool) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1 * number - 0.2 for number in range(channels)],
        latents_std=[0.5 + 0.1 * number for number in range(channels)],
        is_residual=five_b,
        in_channels=12 if five_b else 3,
        out_channels=12 if five_b else 3,
        patch_size=2 if five_b else None,
        scale_factor_spatial=16 if five_b else 8,
    )
