"""A tiny Qwen-Image, and its Edit models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from stages.families.tiny.parts import randomise, seeded
from stages.families.tiny.qwen_words import QWEN_WORDS, qwen_tokenizer


def build(folder: Path, *, pipeline: str = "QwenImagePipeline", clean_references: bool = False) -> Path:
    """A Qwen-Image of two blocks, whose VAE shrinks by 2 to 4 channels. Returns the folder.

    clean_references: whether the tokens of references are modulated as having no noise, as in the Edit model of November 2025 (`zero_cond_t`).
    """
    with seeded():
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=clean_references,
        )
        randomise(transformer, 0.1)
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.4, -0.2],
            latents_std=[2.8, 1.4, 0.6, 1.2],
        ).eval()
        encoder = _encoder()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, max_shift=0.9, shift_terminal=0.02)
    words = qwen_tokenizer()
    QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words, transformer=transformer).save_pretrained(folder)
    parts = {}
    if pipeline != "QwenImagePipeline":
        _save_processor(folder / "processor", words)
        parts = {"processor": ["transformers", "Qwen2VLProcessor"]}
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **parts, "_class_name": pipeline}))
    return folder


def _encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL: two layers for text, one for images."""
    token = {word: number for number, word in enumerate(QWEN_WORDS)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(token),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    encoder: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return encoder


def _save_processor(folder: Path, words: PreTrainedTokenizerFast) -> None:
    """As Qwen2VLProcessor's files are, which itself cannot be made without torchvision."""
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
