"""A tiny Z-Image."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from stages.families.tiny.parts import kl_vae, randomise, seeded
from stages.families.tiny.qwen_words import QWEN_WORDS, qwen_tokenizer


def build(folder: Path, *, dynamic: bool = False) -> Path:
    """A Z-Image of a block of each kind, whose VAE shrinks by 2 to 4 channels. dynamic: whether its scheduler shifts by the number of tokens. Returns the folder."""
    with seeded():
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=(4, 6, 6),
            axes_lens=(640, 64, 64),
        )
        randomise(transformer, 0.1)
        vae = kl_vae()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        encoder = Qwen3Model(Qwen3Config(vocab_size=len(QWEN_WORDS), pad_token_id=0, eos_token_id=1, **sizes)).eval()
        randomise(encoder, 0.3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    ZImagePipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=qwen_tokenizer(), transformer=transformer).save_pretrained(folder)
    return folder
