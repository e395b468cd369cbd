"""The model that learns the shapes world: diffusers' own Flux, small and untrained, on pixels, and text encoders that look words up."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from mixing.keys import key

TEXT_LENGTH = 10
"""Tokens of a prompt, the mark at its end among them."""
_TEXT_WIDTH = 32


def _drawn(name: str, *shape: int) -> Tensor:
    """The numbers that belong to a name, uniform in [-1, 1]."""
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(key("shapes model", name) >> 1)) - 1


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", vocabulary["[END]"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]", model_max_length=TEXT_LENGTH)


def _fill(module: nn.Module, name: str) -> None:
    """Draw a module's weights by their names, each as a linear layer's; biases are zero."""
    with torch.no_grad():
        for part, parameter in module.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(_drawn(f"{name}/{part}", *parameter.shape) / parameter.shape[1] ** 0.5)
            elif part.endswith("bias"):
                parameter.zero_()


def build(folder: Path, words: list[str], *, heads: int = 4, blocks: int = 2) -> Path:
    """Write it as a diffusers folder that knows these words. blocks: of either kind. Returns the folder; one that is there is left as it is.

    T5 has no layer, so a word is always the same vector; CLIP's one layer takes the mean of the words' vectors.
    """
    if folder.exists():
        return folder
    known = ["[PAD]", "[END]", "[UNK]", *words]
    vectors = torch.stack([_drawn(f"word/{word}", _TEXT_WIDTH) for word in known]) * 3**0.5
    vectors[:2] = 0
    sizes = {"vocab_size": len(known), "pad_token_id": 0, "eos_token_id": 1}
    t5 = T5EncoderModel(T5Config(d_model=_TEXT_WIDTH, d_kv=_TEXT_WIDTH, d_ff=1, num_layers=0, num_heads=1, dropout_rate=0.0, **sizes))
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=_TEXT_WIDTH, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=TEXT_LENGTH, projection_dim=_TEXT_WIDTH, bos_token_id=1, **sizes
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for parameter in (*t5.parameters(), *clip.parameters()):
            parameter.zero_()
        t5.get_input_embeddings().weight.copy_(vectors)
        t5.encoder.final_layer_norm.weight.fill_(1)
        clip.get_input_embeddings().weight.copy_(vectors)
        for name, parameter in clip.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            elif name.endswith(("v_proj.weight", "out_proj.weight")):
                parameter.copy_(torch.eye(_TEXT_WIDTH))
    _fill(transformer, "transformer")
    tokenizer = _tokenizer(known)
    partial = folder.with_name(folder.name + ".partial")
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=None,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    ).save_pretrained(partial)
    partial.rename(folder)
    return folder
