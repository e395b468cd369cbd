"""Tiny random models in the diffusers layout, made from configs: the real classes, milliseconds a step."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "blue", "square", "disc", "make", "it", "the", "same"]


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length)


def tiny_flux(folder: Path, *, pixels: bool, guidance: bool = False, pipeline: str = "FluxPipeline") -> Path:
    """A Flux of two blocks. pixels: without a VAE, on 3 channels; else with one that shrinks by 2 to 4 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=12 if pixels else 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
        for name, parameter in transformer.named_parameters():
            if "norm" not in name or parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        vae = None
        if not pixels:
            vae = AutoencoderKL(
                block_out_channels=(4, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=2,
                layers_per_block=1,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.1,
                scaling_factor=0.4,
            )
        sizes = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=8, projection_dim=8, bos_token_id=1, **sizes))
        t5 = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **sizes))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=not pixels, base_image_seq_len=4, max_image_seq_len=64)
    pipe = FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=clip.eval(), tokenizer=_tokenizer(8), text_encoder_2=t5.eval(), tokenizer_2=_tokenizer(8), transformer=transformer
    )
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    return folder
