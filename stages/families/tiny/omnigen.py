"""A tiny OmniGen."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenPipeline, OmniGenTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stages.families.tiny.parts import WORDS, kl_vae, randomise, seeded
from stages.families.torchvision_free import complete

_MARKS = ("<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>", "<cfg>")
_WORDS = ("<unk>", "<s>", "</s>", *_MARKS, *(word for word in WORDS if not word.startswith("<")))


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that begins a text as Llama's does."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(list(_MARKS))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def build(folder: Path, *, shift: float = 1.0) -> Path:
    """An OmniGen of two blocks with a VAE that shrinks by 8, as the pipeline takes for granted, to 4 channels. shift: its scheduler's. Returns the folder."""
    complete()
    with seeded():
        transformer = OmniGenTransformer2DModel(
            in_channels=4,
            patch_size=2,
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            num_layers=2,
            pad_token_id=2,
            vocab_size=len(_WORDS),
            rope_scaling={"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.0, 1.0, 1.0]},
            pos_embed_max_size=64,
            time_step_dim=16,
        )
        randomise(transformer)
        vae = kl_vae(shift=None, blocks=4)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1, shift=shift)
    OmniGenPipeline(transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=_tokenizer()).save_pretrained(folder)
    return folder
