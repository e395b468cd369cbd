"""OmniGen: rectified flow by one transformer that reads words, input images and the noisy image as one sequence; it has no text encoder.

Works with any folder that diffusers' OmniGenPipeline reads. A prompt may say where each reference stands in it (`<img><|image_1|></img>`); if it does not,
they stand before its words. Its own convention is the reverse of Medley's: its t is 1 - t, and it predicts x - e.
Source: Xiao et al. 2024, arXiv:2409.11340; the sequence is that of diffusers' processor_omnigen.py (0.42.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, OmniGenTransformer2DModel
from torch import Tensor, nn

from mixing.tasks import MAX_REFERENCES
from stages.families.base import Configs, Inputs, Text
from stages.families.schedules import flow_match_sigmas
from stages.families.shared import decode_kl, encode_kl, one_for_all, rectified_flow
from stages.families.torchvision_free import complete

complete()

# Full module names, matched whole. Nothing inside a block is modulated.
_ATTENTION = (r"layers\.\d+\.self_attn\.(to_q|to_k|to_v|to_out\.0)",)
_FEED_FORWARD = (r"layers\.\d+\.mlp\.(gate_up_proj|down_proj)",)

_BEFORE = "<|user|>\nGenerate an image according to the following instructions\n"
_AFTER = "<|end|>\n<|assistant|>\n<|diffusion|>"
_BEGIN, _PAD = 1, 2  # token ids that the processor has in it as numbers
_IMAGE = re.compile(r"(?:<img>\s*)?<\|image_0*([0-9]+)\|>(?:\s*</img>)?")

# In an encoded prompt -k stands for the k-th reference. A prompt that names none is kept in four parts, divided by _DIVISION, since the words between
# images are not divided into tokens as they would be alone: the whole of it without references; what stands before the first; what stands between two;
# what stands behind the last.
_DIVISION = -MAX_REFERENCES - 1


class OmniGen:
    """Implements `stages.families.base.Architecture`."""

    name = "omnigen"
    transformer_class: Any = OmniGenTransformer2DModel
    vae_class: Any = AutoencoderKL
    prompt_parts: tuple[str, ...] = ("tokenizer",)
    target_patterns: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "blocks": _ATTENTION + _FEED_FORWARD,
        "linear": _ATTENTION + _FEED_FORWARD,
    }
    version = 1
    unread: tuple[str, ...] = ()
    # Source: OmniGen's train_helper/data.py, where a dropped instruction becomes these letters and its images are dropped with it.
    empty_prompt = "<cfg>"
    loads_adapters = False

    path = staticmethod(rectified_flow)

    encode_image = staticmethod(encode_kl)
    decode_latents = staticmethod(decode_kl)

    def encode_prompt(self, pipeline: Any, prompt: str, references: Sequence[Tensor], model: Configs, device: torch.device) -> Text:
        """Token ids [1, L], with negative numbers where references stand. Raises ValueError for an image's number that none can have."""
        numbers = [int(number) for number in _IMAGE.findall(prompt)]
        if not all(1 <= number <= MAX_REFERENCES for number in numbers):
            raise ValueError(f"a prompt names image {next(number for number in numbers if not 1 <= number <= MAX_REFERENCES)}; images are numbered from 1 to {MAX_REFERENCES}")
        if numbers:
            words = [f"{before}<img>" if place < len(numbers) else before for place, before in enumerate(_IMAGE.split(prompt)[::2])]
            words[1:] = [f"</img>{piece}" for piece in words[1:]]
            words[0], words[-1] = _BEFORE + words[0], words[-1] + _AFTER
            pieces = _tokens(pipeline.tokenizer, words)
            ids = [*pieces[0], *(one for number, piece in zip(numbers, pieces[1:], strict=True) for one in (-number, *piece))]
        else:
            (alone,) = _tokens(pipeline.tokenizer, [f"{_BEFORE}{prompt}{_AFTER}"])
            behind = "" if prompt == self.empty_prompt else f" {prompt}"
            around = _tokens(pipeline.tokenizer, [f"{_BEFORE}<img>", "</img> <img>", f"</img>{behind}{_AFTER}"])
            ids = [*alone, *(one for piece in around for one in (_DIVISION, *piece))]
        return Text(torch.tensor([ids], device=device), mask=torch.ones(1, len(ids), dtype=torch.bool, device=device))

    def predict(self, transformer: nn.Module, inputs: Inputs, model: Configs) -> Tensor:
        """The velocity. References enter as latents; a row whose prompt names images must have them all."""
        noised, patch = inputs.noised, model.sizes.patch
        lengths = [(reference.shape[-2] // patch) * (reference.shape[-1] // patch) for reference in inputs.references]
        rows = [_filled(ids, lengths) for ids in _rows(inputs.text)]
        longest = max(len(row.ids) for row in rows)
        padding = [longest - len(row.ids) for row in rows]
        places = {number: [[start + pad, end + pad] for _, start, end in row.images] for number, (row, pad) in enumerate(zip(rows, padding, strict=True)) if row.images}
        tokens = (noised.shape[-2] // patch) * (noised.shape[-1] // patch)
        # The library takes the first row's positions for all rows (OmniGenSuScaledRotaryEmbedding, diffusers 0.42.1), which is wrong where that row has
        # more padding than another. Only distances count, so positions that begin at the padding are right for every row.
        positions = torch.arange(longest + 1 + tokens, device=noised.device).expand(len(rows), -1)
        out: Tensor = transformer(
            hidden_states=noised,
            timestep=(1 - inputs.t) * model.scheduler.config.num_train_timesteps,
            input_ids=torch.tensor([[_PAD] * pad + row.ids for row, pad in zip(rows, padding, strict=True)], device=noised.device),
            input_img_latents=[inputs.references[image][number : number + 1] for number, row in enumerate(rows) for image, _, _ in row.images],
            input_image_sizes=places,
            attention_mask=_seen(padding, places, longest, tokens, noised.device),
            position_ids=positions,
            return_dict=False,
        )[0]
        return -out

    def seen_timestep(self, t: Tensor, compute: torch.dtype) -> Tensor:
        """t itself: its sines are computed in float32 (diffusers 0.42.1), and only they are rounded."""
        return t

    def shift(self, model: Configs, tokens: int) -> float:
        """The scheduler's fixed shift (1.0 in the published model)."""
        return float(model.scheduler.config.shift)

    t_range = staticmethod(one_for_all)

    def sigmas(self, model: Configs, steps: int, tokens: int) -> Tensor:
        """As OmniGenPipeline: evenly from 1 to 1 / steps, shifted by its scheduler, whose own levels are of the image and not of the noise."""
        levels = flow_match_sigmas(model.scheduler, torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1].tolist(), None)
        return 1 - levels if model.scheduler.config.invert_sigmas else levels


@dataclass(frozen=True)
class _Row:
    """One row's words and input images as token ids."""

    ids: list[int]
    """Zeros where images stand."""
    images: list[tuple[int, int, int]]
    """Which reference, and its first place and the one behind its last."""


def _tokens(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Token ids of pieces of one prompt: only the first begins as a text begins."""
    found: list[list[int]] = [list(tokenizer(piece).input_ids) for piece in pieces]
    return [ids[1:] if number and ids[:1] == [_BEGIN] else ids for number, ids in enumerate(found)]


def _rows(text: Text) -> list[list[int]]:
    """Each prompt's encoded ids, without padding."""
    assert text.mask is not None
    return [[one for one, counts in zip(ids, mask, strict=True) if counts] for ids, mask in zip(text.embeds.tolist(), text.mask.tolist(), strict=True)]


def _filled(encoded: Sequence[int], lengths: Sequence[int]) -> _Row:
    """A prompt with its references put in. lengths: tokens of each reference. Raises ValueError if the prompt names one that there is not."""
    if _DIVISION in encoded:
        alone, first, between, last = _divided(encoded)
        encoded = alone
        if lengths:
            encoded = [*first, -1, *(one for number in range(2, len(lengths) + 1) for one in (*between, -number)), *last]
    row = _Row([], [])
    for one in encoded:
        if one >= 0:
            row.ids.append(one)
        elif -one > len(lengths):
            raise ValueError(f"a prompt names image {-one}, and there are {len(lengths)} references; each is named by its number, from 1")
        else:
            row.images.append((-one - 1, len(row.ids), len(row.ids) + lengths[-one - 1]))
            row.ids.extend([0] * lengths[-one - 1])
    return row


def _divided(encoded: Sequence[int]) -> list[list[int]]:
    """The parts between divisions."""
    parts: list[list[int]] = [[]]
    for one in encoded:
        if one == _DIVISION:
            parts.append([])
        else:
            parts[-1].append(one)
    return parts


def _seen(padding: Sequence[int], places: Mapping[int, Sequence[Sequence[int]]], longest: int, tokens: int, device: torch.device) -> Tensor:
    """Which token looks at which, bool [B, 1, S, S], S = longest + 1 + tokens: padding, words and input images, the time, the noisy image.

    Words and the time look back, tokens of an input image at its others too, those of the noisy image at everything but padding. As bool and with its
    fourth dimension the transformer hands it to the attention as it is, at a quarter of the memory. Padding looks everywhere: nobody looks at it.
    """
    place = torch.arange(longest + 1 + tokens, device=device)
    starts = torch.tensor(padding, device=device).view(-1, 1, 1)
    looks_back = (place[None, :] <= place[:, None]) | (place[:, None] > longest)
    seen = (looks_back & (place >= starts)) | (place[:, None] < starts)
    for number, images in places.items():
        for start, end in images:
            seen[number, start:end, start:end] = True
    return seen[:, None]
