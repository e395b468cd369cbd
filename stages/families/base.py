"""What a family of transformers owes to the loop: one file a family answers to this protocol, and nothing else in Medley knows the family."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Text:
    """Encoded prompts. embeds: [B, L, D]; pooled: [B, P]. float32 on the CPU, the encoders' own dtype on a GPU."""

    embeds: Tensor
    pooled: Tensor


class Family(Protocol):
    """A model of one family without its transformer, and what is done with the transformer. Latents are [B, C, h, w], images [B, 3, H, W] in [-1, 1]."""

    name: str
    """As in `stages.families.FAMILIES`."""
    pixel_multiple: int
    """Sides of images in pixels are multiples of this."""
    target_patterns: Mapping[str, tuple[str, ...]]
    """What the words of `adapter.targets` stand for: patterns on full module names."""
    pipeline_class: str
    """The diffusers pipeline that loads the published adapter."""

    def load_transformer(self, storage: torch.dtype, weights: Path | None) -> nn.Module:
        """A frozen transformer from the model's folder, or with the weights of a safetensors file in their place."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised latents of images, float32. No gradient."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images of normalised latents, float32, clipped to [-1, 1]. No gradient."""

    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Encoded prompts. No gradient."""

    def predict(self, transformer: nn.Module, noised: Tensor, t: Tensor, text: Text, references: Sequence[Tensor]) -> Tensor:
        """The velocity v = e - x that the transformer predicts at x_t = (1 - t) x + t e, float32, shape as `noised`.

        t: float32 [B] in [0, 1]. references: latents, none or more, each [B, C, h', w'].
        """

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """The t that the transformer's embedding really sees when it computes in this dtype: noise with this one."""

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of so many pixels."""

    def latent_tokens(self, latents: Tensor) -> int:
        """Tokens of each of these latents."""

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt."""

    def shift(self, tokens: int) -> float:
        """The scheduler's shift s of the noise levels at this number of target tokens: t becomes s t / (1 + (s - 1) t)."""

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """Noise levels that the model's own sampler visits, from 1 to 0, float32 [steps + 1]."""

    def stock_pipeline(self, transformer: nn.Module) -> Any:
        """The diffusers pipeline itself, `pipeline_class`, around a transformer."""

    def save_model(self, folder: Path, transformer: nn.Module) -> None:
        """Write the whole pipeline with this transformer as a diffusers folder."""


class TextCache:
    """Encoded prompts by their text, the least recently used leaving first once they take more than `limit` bytes."""

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self._limit, self._bytes = limit, 0
        self._texts: OrderedDict[str, Text] = OrderedDict()

    def encode(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Text]) -> Text:
        """Encode prompts, those that are not at hand with `encode`, each prompt once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        at_hand = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        if missing:
            fresh = encode(missing)
            for number, prompt in enumerate(missing):
                one = Text(fresh.embeds[number].clone(), fresh.pooled[number].clone())
                at_hand[prompt] = self._texts[prompt] = one
                self._bytes += one.embeds.nbytes + one.pooled.nbytes
        for prompt in prompts:
            if prompt in self._texts:
                self._texts.move_to_end(prompt)
        while self._bytes > self._limit:
            _, old = self._texts.popitem(last=False)
            self._bytes -= old.embeds.nbytes + old.pooled.nbytes
        return Text(torch.stack([at_hand[p].embeds for p in prompts]), torch.stack([at_hand[p].pooled for p in prompts]))
