"""What a family of transformers owes to the loop: one file a family answers to this protocol, and nothing else in Medley knows the family."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stages.cache import Cache


@dataclass(frozen=True)
class Text:
    """Encoded prompts. embeds: [B, L, D]; pooled: [B, P]. float32 on the CPU, the encoders' own dtype on a GPU."""

    embeds: Tensor
    pooled: Tensor


class TextStore(Protocol):
    """Where encoded prompts are kept beyond this process, such as `stages.cache.Cache`. One prompt's text: embeds [L, D], pooled [P]."""

    def text(self, prompt: str) -> Text | None:
        """A kept encoded prompt, or None."""

    def keep_text(self, prompt: str, text: Text) -> None:
        """Keep an encoded prompt."""


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
    encodes_images: bool
    """Whether `encode_images` changes anything: False for a model that trains on pixels, whose latents are not worth keeping."""
    texts: TextCache
    """The encoded prompts at hand; its `stored` is where more are kept."""
    cache: Cache | None
    """Where latents are kept; None keeps none."""
    device: torch.device
    """Where everything is computed."""

    @property
    def latents_identity(self) -> str:
        """What `encode_images` gives depends on the image and on this: the VAE's weights, the dtype, and Medley's own way of encoding."""

    @property
    def text_identity(self) -> str:
        """What `encode_prompts` gives depends on the prompt and on this."""

    def release_encoders(self) -> None:
        """Drop the VAE and the text encoders from memory; they come back at their next use."""

    def load_transformer(self, storage: torch.dtype, weights: Path | None) -> nn.Module:
        """A frozen transformer from the model's folder, or with the weights of a safetensors file in their place."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised latents of images, float32; each image's own, bit for bit, whatever else is in the batch. No gradient."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images of normalised latents, float32, clipped to [-1, 1]. No gradient."""

    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Encoded prompts; each prompt's own, bit for bit, whatever else is in the batch. No gradient."""

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

    def stock_pipeline(self, transformer: nn.Module, *, encoders: bool = True) -> Any:
        """The diffusers pipeline itself, `pipeline_class`, around a transformer. encoders: whether with VAE and text encoders, which are loaded for it."""

    def save_model(self, folder: Path, transformer: nn.Module) -> None:
        """Write the whole pipeline with this transformer as a diffusers folder."""


class TextCache:
    """Encoded prompts by their text, the least recently used leaving first once they take more than `limit` bytes."""

    def __init__(self, limit: int = 256 * 2**20, device: torch.device | None = None) -> None:
        """device: where texts from `stored` are moved to, the CPU if None."""
        self._limit, self._bytes = limit, 0
        self._device = device or torch.device("cpu")
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self.stored: TextStore | None = None
        """Where a prompt that is not at hand is looked for, and put once it is encoded."""

    def encode(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Text]) -> Text:
        """Encode prompts; each that is neither at hand nor stored with an `encode` of its own, so that its bits depend on no other prompt."""
        at_hand: dict[str, Text] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = one = self._stored_or(prompt, encode)
                self._bytes += one.embeds.nbytes + one.pooled.nbytes
            self._texts.move_to_end(prompt)
            at_hand[prompt] = self._texts[prompt]
        while self._bytes > self._limit:
            _, old = self._texts.popitem(last=False)
            self._bytes -= old.embeds.nbytes + old.pooled.nbytes
        return Text(torch.stack([at_hand[p].embeds for p in prompts]), torch.stack([at_hand[p].pooled for p in prompts]))

    def _stored_or(self, prompt: str, encode: Callable[[Sequence[str]], Text]) -> Text:
        if self.stored is not None and (kept := self.stored.text(prompt)) is not None:
            return Text(kept.embeds.to(self._device), kept.pooled.to(self._device))
        fresh = encode([prompt])
        one = Text(fresh.embeds[0].clone(), fresh.pooled[0].clone())
        if self.stored is not None:
            self.stored.keep_text(prompt, one)
        return one
