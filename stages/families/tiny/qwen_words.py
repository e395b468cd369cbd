"""A tokenizer of a few words that splits texts as Qwen's does, so that the pipelines' templates have as many tokens as the real ones."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.families.tiny.parts import WORDS

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_WORDS = (*WORDS, *SPECIAL, "user", "assistant", "\n", ":")
"""What the tokenizer knows; every other word is <unk>."""

_CHAT = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, endings such as 's, marks and line breaks are a token each."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(QWEN_WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"'s|\n|\w+|[^\s\w]+"), behavior="removed", invert=True)
    words = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", additional_special_tokens=list(SPECIAL))
    words.chat_template = _CHAT
    return words
