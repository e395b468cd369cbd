"""What a family of transformers owes: one file a family answers to `Architecture`, and nothing else in Medley knows the family.

`stages.families.family.Family` is a model of it: it loads the parts, remembers prompts, and says what the architecture says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stages.families.facts import ModelSizes
from stages.objectives.path import Path


@dataclass(frozen=True)
class Text:
    """Encoded prompts, padded at the end to the longest. In the encoders' own dtype; whole numbers where the transformer itself embeds words."""

    embeds: Tensor
    """[B, L, ...]"""
    pooled: Tensor | None = None
    """[B, P], where the family has such a vector."""
    mask: Tensor | None = None
    """bool [B, L]: which are words; None where all count, or the transformer is not told."""

    def rows(self, rows: Tensor) -> Text:
        """Those of some prompts. rows: int64."""
        return Text(self.embeds[rows], None if self.pooled is None else self.pooled[rows], None if self.mask is None else self.mask[rows])

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(part.nbytes for part in (self.embeds, self.pooled, self.mask) if part is not None)


def stacked(texts: Sequence[Text]) -> Text:
    """Single prompts (embeds [L, ...], pooled [P], mask [L]) as one batch, the shorter ones padded with zeros; then there is a mask, if there was none."""
    longest = max(len(text.embeds) for text in texts)
    pooled = [text.pooled for text in texts if text.pooled is not None]
    of_all = torch.stack(pooled) if pooled else None
    if all(text.mask is None and len(text.embeds) == longest for text in texts):
        return Text(torch.stack([text.embeds for text in texts]), of_all)
    embeds, masks = [], []
    for text in texts:
        missing = longest - len(text.embeds)
        padding = (0, 0) * (text.embeds.ndim - 1) + (0, missing)
        embeds.append(nn.functional.pad(text.embeds, padding) if missing else text.embeds)
        mask = torch.ones(len(text.embeds), dtype=torch.bool, device=text.embeds.device) if text.mask is None else text.mask
        masks.append(nn.functional.pad(mask, (0, missing)))
    return Text(torch.stack(embeds), of_all, torch.stack(masks))


@dataclass(frozen=True)
class RegionTexts:
    """Parts of targets that have prompts of their own. R: regions of each target."""

    texts: tuple[Text, ...]
    """[R], each of B prompts."""
    masks: Tensor
    """bool [B, R, H, W], at the target's size in pixels."""

    def rows(self, rows: Tensor) -> RegionTexts:
        """Those of some targets. rows: int64."""
        return RegionTexts(tuple(text.rows(rows) for text in self.texts), self.masks[rows])


@dataclass(frozen=True)
class Inputs:
    """What a transformer is shown. B: images."""

    noised: Tensor
    """Latents x_t, float32 [B, C, h, w]."""
    t: Tensor
    """Noise levels, float32 [B] in [0, 1]."""
    text: Text
    references: Sequence[Tensor] = ()
    """Latents without noise, each [B, C, h', w']."""
    regions: RegionTexts | None = None
    scale: float = 1.0
    """How far apart neighbouring tokens lie on the grid of positions: 2 at half the resolution of a pyramid's finest level."""


@dataclass(frozen=True)
class Configs:
    """What the files of a model say, its weights apart."""

    index: Mapping[str, Any]
    """model_index.json"""
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    """Empty where there is none: the model trains on pixels."""
    scheduler: Any
    """The pipeline's own scheduler."""
    sizes: ModelSizes
    guidance: float | None
    """What the transformer is told; None if it takes no guidance."""


class Architecture(Protocol):
    """What a family owes. Latents are [B, C, h, w], images float32 [B, 3, H, W] in [-1, 1]."""

    name: str
    """As in `stages.families.facts.FAMILIES`."""
    transformer_class: Any
    """The diffusers class."""
    vae_class: Any
    """The diffusers class."""
    prompt_parts: tuple[str, ...]
    """Parts of the pipeline, which are its sub-folders, that encoding a prompt needs."""
    target_patterns: Mapping[str, tuple[str, ...]]
    """What the words of `adapter.targets` stand for: patterns on full module names, matched whole; {last} in one is the number of the last block."""
    version: int
    """Of `encode_image` and `encode_prompt`: raised when what they give changes, so that no older entry of a cache is used."""
    unread: tuple[str, ...]
    """Weights whose output nothing reads, so that they cannot learn: patterns on full names, matched whole, with {last} as in `target_patterns`."""
    empty_prompt: str
    """What the family was trained with where there is no prompt."""
    loads_adapters: bool
    """Whether the pipeline itself has `load_lora_weights`; if not, the adapter is written as peft's own."""

    def path(self, model: Configs) -> Path:
        """How noise and image are mixed, and what of them is predicted."""

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        """Normalised latents [1, C, h, w] of an image [1, 3, H, W]."""

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Its inverse."""

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """A prompt, [1, ...]. pipeline: the stock one with its prompt parts. references: images [1, 3, H, W], for a family whose prompts see them."""

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """What `path` says is predicted, of the target alone, [B, C, h, w]. transformer: called, and not looked into: it may be wrapped."""

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """The t that the transformer's embedding really sees when it computes in this dtype."""

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's shift s of the noise levels at this number of target tokens: t becomes s t / (1 + (s - 1) t)."""

    def t_range(self, model: Configs, expert: str | None) -> tuple[float, float]:
        """The noise levels, from and up to, that this of the model's transformers is for. expert: one of `FamilyFacts.experts`; None is the only one, or the first."""

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """Noise levels that the pipeline visits, from the noisiest to 0, [steps + 1]."""


def targets_in(architecture: Architecture, transformer: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """What the words of `adapter.targets` stand for in a transformer with this config."""
    last = str(int(transformer.get("num_layers", 0)) - 1)
    return {word: tuple(pattern.replace("{last}", last) for pattern in patterns) for word, patterns in architecture.target_patterns.items()}


def unread_in(architecture: Architecture, transformer: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns of weights that nothing reads in a transformer with this config."""
    last = str(int(transformer.get("num_layers", 0)) - 1)
    return tuple(pattern.replace("{last}", last) for pattern in architecture.unread)


class TextStore(Protocol):
    """Where encoded prompts are kept beyond this process, such as `stages.cache.Cache`. One prompt's text: embeds [L, ...], pooled [P], mask [L]."""

    def text(self, prompt: str) -> Text | None:
        """A kept encoded prompt, or None."""

    def keep_text(self, prompt: str, text: Text) -> None:
        """Keep an encoded prompt."""


class TextCache:
    """Encoded prompts by their name, the least recently used leaving first once they take more than `limit` bytes."""

    def __init__(self, limit: int = 256 * 2**20, device: torch.device | None = None) -> None:
        """device: where texts from `stored` are moved to, the CPU if None."""
        self._limit, self._bytes = limit, 0
        self._device = device or torch.device("cpu")
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self.stored: TextStore | None = None
        """Where a prompt that is not at hand is looked for, and put once it is encoded."""

    def encode(self, names: Sequence[str], encode: Callable[[int], Text]) -> Text:
        """Encoded prompts by name, which is the prompt where that decides everything. encode: gives the one at a place in `names`, [1, ...]; it is asked for each
        that is neither at hand nor stored, one at a time, so that its bits depend on no other prompt."""
        at_hand: dict[str, Text] = {}
        for place, name in enumerate(names):
            if name in at_hand:
                continue
            if name not in self._texts:
                self._texts[name] = one = self._stored_or(name, place, encode)
                self._bytes += one.nbytes
            self._texts.move_to_end(name)
            at_hand[name] = self._texts[name]
        while self._bytes > self._limit:
            _, old = self._texts.popitem(last=False)
            self._bytes -= old.nbytes
        return stacked([at_hand[name] for name in names])

    def _stored_or(self, name: str, place: int, encode: Callable[[int], Text]) -> Text:
        if self.stored is not None and (kept := self.stored.text(name)) is not None:
            return Text(*(None if part is None else part.to(self._device) for part in (kept.embeds, kept.pooled, kept.mask)))  # type: ignore[arg-type]
        fresh = encode(place)
        one = Text(*(None if part is None else part[0].clone() for part in (fresh.embeds, fresh.pooled, fresh.mask)))  # type: ignore[arg-type]
        if self.stored is not None:
            self.stored.keep_text(name, one)
        return one
