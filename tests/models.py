"""Tiny random models in the diffusers layout, made from configs: the real classes, milliseconds a step."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stages.families.tiny import flux
from stages.families.tiny.parts import WORDS, randomise, seeded, tokenizer


def tiny_flux(folder: Path, *, pixels: bool, guidance: bool = False, pipeline: str = "FluxPipeline") -> Path:
    """A Flux of two blocks. pixels: without a VAE, on 3 channels; else with one that shrinks by 2 to 4 channels."""
    return flux.build(folder, pixels=pixels, guidance=guidance, pipeline=pipeline)


_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_clip(folder: Path) -> Path:
    """A CLIP of random weights that looks at 16 x 16 pixels and knows the tiny models' words."""
    with seeded():
        text = {**_SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config={**_SMALL, "image_size": 16, "patch_size": 8}, projection_dim=12))
        randomise(model)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer(77).save_pretrained(folder)
    return folder


def tiny_dino(folder: Path) -> Path:
    """A DINOv2 of random weights that looks at 16 x 16 pixels."""
    with seeded():
        model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8))
        randomise(model)
    model.save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
