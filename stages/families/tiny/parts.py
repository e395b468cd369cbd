"""Parts that tiny models share: tokenizers of a few words, text encoders and VAEs of a few numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "green", "blue", "square", "disc", "make", "it", "the", "same")
"""What the tokenizers know; every other word is <unk>."""


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Inside, torch's random numbers are those of a seed; after it they go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tokenizer(length: int, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words between spaces, which ends a text by </s>. length: the most tokens that it allows."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length)


def randomise(module: nn.Module, std: float = 0.2) -> None:
    """Give every weight but those of norms normal values: nothing is zero, so everything counts."""
    for name, parameter in module.named_parameters():
        if "norm" not in name or parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)


def kl_vae(*, channels: int = 4, shift: float | None = 0.1, scaling: float = 0.4, blocks: int = 2) -> AutoencoderKL:
    """A VAE that shrinks by 2 to the power of blocks - 1."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8)[:blocks],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift,
        scaling_factor=scaling,
    )


_SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}


def clip(width: int = 8) -> CLIPTextModel:
    """CLIP's text encoder of one layer, for texts of 8 tokens."""
    return CLIPTextModel(_clip_config(width)).eval()


def clip_with_projection(width: int = 8) -> CLIPTextModelWithProjection:
    """The same with its projection, as SD3 has it."""
    return CLIPTextModelWithProjection(_clip_config(width)).eval()


def _clip_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=8, projection_dim=width, bos_token_id=1, **_SIZES)


def t5(width: int = 16) -> T5EncoderModel:
    """T5's encoder of one layer."""
    return T5EncoderModel(T5Config(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **_SIZES)).eval()


def umt5(width: int = 16) -> UMT5EncoderModel:
    """UMT5's encoder of one layer."""
    return UMT5EncoderModel(UMT5Config(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **_SIZES)).eval()


def gemma2(width: int = 16) -> Gemma2Model:
    """Gemma 2 of two layers."""
    return Gemma2Model(
        Gemma2Config(hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=1, **_SIZES)
    ).eval()
