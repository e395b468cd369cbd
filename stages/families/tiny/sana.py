"""A tiny Sana."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

from stages.families.tiny.parts import gemma2, randomise, seeded, tokenizer


def build(folder: Path, *, euler: bool = False, timestep_scale: float = 1.0, learns_variance: bool = False, query_norm: bool = False) -> Path:
    """A Sana of two blocks over an autoencoder that shrinks by 4 to 4 channels. Returns the folder.

    euler: with the scheduler of Euler's method in the place of Sana's DPM-Solver. learns_variance: with twice the channels in the output.
    query_norm: with norms of queries and keys, as Sana 1.5.
    """
    with seeded():
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=8 if learns_variance else 4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            qk_norm="rms_norm_across_heads" if query_norm else None,
            timestep_scale=timestep_scale,
        )
        randomise(transformer)
        vae = AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41407,
        )
        encoder = gemma2()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    SanaPipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer(512), transformer=transformer).save_pretrained(folder)
    return folder
