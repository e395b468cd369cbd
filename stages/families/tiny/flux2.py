"""A tiny FLUX.2, dev and klein."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from stages.families.tiny.parts import WORDS, randomise, seeded, tokenizer

_TEMPLATES = {
    "dev": "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}",
    "klein": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
}


def build(folder: Path, *, klein: bool = False, dynamic: bool = True) -> Path:
    """A FLUX.2 of a block of each kind, whose latents have 16 channels and are a quarter as wide as the image. Returns the folder.

    klein: with Qwen 3 and without a guidance, in the place of Mistral 3 with one. dynamic: whether its scheduler shifts by the number of tokens.
    """
    with seeded():
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=not klein,
        )
        randomise(transformer)
        vae = AutoencoderKLFlux2(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            sample_size=64,
            mid_block_add_attention=False,
        ).eval()
        vae.bn.running_mean.copy_(torch.randn(16))
        vae.bn.running_var.copy_(torch.rand(16) + 0.5)
        encoder = _qwen3() if klein else _mistral3()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    words = _tokenizer("klein" if klein else "dev")
    pipeline = Flux2KleinPipeline if klein else Flux2Pipeline
    pipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words, transformer=transformer).save_pretrained(folder)
    return folder


def _tokenizer(model: str) -> PreTrainedTokenizerFast:
    """In the real dev this is a PixtralProcessor, which needs torchvision and without images does the same."""
    made = tokenizer(512)
    made.chat_template = _TEMPLATES[model]
    return made


def _qwen3() -> Qwen3ForCausalLM:
    """Qwen 3 of so many layers that the pipeline finds the last that it takes."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), num_hidden_layers=28, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, **sizes)).eval()


def _mistral3() -> Mistral3ForConditionalGeneration:
    """The same of Mistral 3, with eyes that are never used."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    text = MistralConfig(
        vocab_size=len(WORDS), num_hidden_layers=31, num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, sliding_window=None, **sizes
    )
    vision = PixtralVisionConfig(image_size=32, patch_size=16, num_hidden_layers=1, **sizes)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=2)).eval()
