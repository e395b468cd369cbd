"""Models of a family with random weights in several sizes, and images to train them on: what `benchmarks.step` measures with."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from stages.families.tiny.parts import WORDS, kl_vae, randomise, seeded, t5


@dataclass(frozen=True)
class Size:
    """How large a Flux is."""

    double_blocks: int
    single_blocks: int
    heads: int
    axes: tuple[int, int, int]
    """Numbers of a head that each axis of the positions turns; their sum is a head's width."""
    channels: int
    """Of the latents."""
    vae_blocks: int
    """The VAE shrinks by 2 to the power of one less."""
    text_width: int
    pooled_width: int
    text_tokens: int
    std: float
    """Of the random weights."""
    guided: bool = False
    """Whether the transformer is told a guidance, as FLUX.1-dev is."""
    stored: torch.dtype = torch.float32
    """What its weights are stored in."""


FLUX: Mapping[str, Size] = {
    "tiny": Size(1, 1, 2, (2, 2, 4), 4, 2, 16, 8, 8, 0.2),
    "small": Size(2, 4, 4, (4, 14, 14), 4, 2, 128, 32, 8, 0.05),
    "full": Size(19, 38, 24, (16, 56, 56), 16, 4, 4096, 768, 512, 0.02, guided=True, stored=torch.bfloat16),
}
"""The test suite's; one whose products are a part of the time on a CPU; and that of FLUX.1-dev."""


def build_flux(folder: Path, size: Size, device: torch.device, *, heavy_text: bool = False) -> Path:
    """A Flux with random weights, of which a `full` one has 24 GB. Returns the folder.

    heavy_text: with a T5 encoder of about as many numbers as the transformer. Else its text encoders have one layer: Medley encodes a prompt once.
    """
    before = torch.get_default_dtype()
    with seeded():
        torch.set_default_dtype(size.stored)
        try:
            with device:
                transformer = FluxTransformer2DModel(
                    patch_size=1,
                    in_channels=4 * size.channels,
                    num_layers=size.double_blocks,
                    num_single_layers=size.single_blocks,
                    attention_head_dim=sum(size.axes),
                    num_attention_heads=size.heads,
                    joint_attention_dim=size.text_width,
                    pooled_projection_dim=size.pooled_width,
                    guidance_embeds=size.guided,
                    axes_dims_rope=size.axes,
                )
        finally:
            torch.set_default_dtype(before)
        randomise(transformer, size.std)
        vae = kl_vae(channels=size.channels, blocks=size.vae_blocks)
        encoder_2 = _large_t5(size, sum(parameter.numel() for parameter in transformer.parameters())) if heavy_text else t5(size.text_width)
        with torch.no_grad():
            vae.encoder.conv_out.bias[size.channels :] = -20.0  # whoever draws from its distribution, as pipelines do, gets its mode
        tokenizer, encoder = _clip(size.pooled_width)
    tokenizer_2 = T5Tokenizer(
        vocab=[*((word, 0.0) for word in WORDS[:3]), *((f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in WORDS[3:])], extra_ids=0, model_max_length=size.text_tokens
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def build_tiny(folder: Path, family: str) -> Path:
    """The test suite's tiny model of a family. Returns the folder."""
    built: Path = import_module(f"stages.families.tiny.{family}").build(folder)
    return built


def _large_t5(size: Size, numbers: int) -> T5EncoderModel:
    """A T5 encoder of about so many numbers, its layers in the usual proportions: 12 width^2 each."""
    width = size.text_width
    layers = max(1, round(numbers / (12 * width**2)))
    return T5EncoderModel(
        T5Config(d_model=width, d_kv=width // size.heads, d_ff=4 * width, num_layers=layers, num_heads=size.heads, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1)
    ).eval()


def _clip(width: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """CLIP's text encoder of one layer and its tokenizer, of letters. Texts of 77 tokens: other trainers write that number down."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer, CLIPTextModel(config).eval()


def make_images(folder: Path, number: int, side: int) -> Path:
    """Square images of that side with a caption each, as `metadata.jsonl` says. Returns the folder."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = []
    for count in range(number):
        picture = Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{count:04d}.png")
        lines.append(json.dumps({"file_name": f"{count:04d}.png", "text": " ".join(draw.choice(WORDS[3:], 6))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
