"""Regions: which tokens of a transformer attend to which, where parts of an image have prompts of their own.

A sequence of tokens is the prompts of the regions in their order, then the image's own prompt, then the image, then its references. The prompt of a
region attends to itself and to the image inside its mask, both ways, and to nothing else: not to the image's prompt, to the other regions' prompts or
to references. All others attend to one another. Source of the rule: EliGen, as DiffSynth-Studio has it (diffsynth/models/flux_dit.py), which has no
references; and which reduces a mask to latents by their nearest pixel first, where thin parts are lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.sent import sent


def token_masks(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which of an image's tokens are inside of which region, bool [B, R, rows x columns]: those of whose pixels any is.

    masks: bool [B, R, H, W]. grid: rows and columns of tokens. Raises ValueError for masks of another kind, or that the grid does not divide.
    """
    rows, columns = grid
    if masks.ndim != 4 or masks.dtype != torch.bool:
        raise ValueError(f"masks: bool [B, R, H, W] is needed, this is {masks.dtype} {list(masks.shape)}; compare pixels with a threshold first")
    batch, regions, height, width = masks.shape
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(f"masks of {height} x {width} pixels do not divide into {rows} x {columns} tokens; give the grid of the image that they belong to")
    blocks = masks.reshape(batch, regions, rows, height // rows, columns, width // columns)
    return blocks.any(dim=5).any(dim=3).reshape(batch, regions, rows * columns)


def attention_mask(token_masks: Tensor, entity_tokens: int | Sequence[int], prompt_tokens: int, reference_tokens: int = 0, text_valid: Tensor | None = None) -> Tensor:
    """Which token attends to which, bool [B, 1, L, L], symmetric; every token attends to itself, so that no row is empty.

    token_masks: bool [B, R, image tokens], True inside; a region without any is attended to by itself alone. entity_tokens: of the prompt of each
    region, or of all alike. prompt_tokens: of the image's own prompt. reference_tokens: of all references together. text_valid: bool [B, all text
    tokens], False for padding, which then attends to itself alone; None: all count. L is the sum of all tokens. Raises ValueError for other shapes.
    """
    if token_masks.ndim != 3 or token_masks.dtype != torch.bool:
        raise ValueError(f"token_masks: bool [B, R, image tokens] is needed, this is {token_masks.dtype} {list(token_masks.shape)}")
    batch, regions, image_tokens = token_masks.shape
    lengths = [entity_tokens] * regions if isinstance(entity_tokens, int) else list(entity_tokens)
    if len(lengths) != regions:
        raise ValueError(f"entity_tokens: {len(lengths)} lengths for {regions} regions; give one for each, or one number for all")
    if min(*lengths, prompt_tokens, reference_tokens, 0) < 0:
        raise ValueError(f"numbers of tokens are 0 or more; found {lengths} of regions, {prompt_tokens} of the prompt, {reference_tokens} of references")
    device = token_masks.device
    whose = sent(torch.repeat_interleave(torch.arange(regions + 1), torch.tensor([*lengths, prompt_tokens])), device)
    text = len(whose)
    if text_valid is not None and (text_valid.dtype != torch.bool or text_valid.shape != (batch, text)):
        raise ValueError(f"text_valid: bool [{batch}, {text}] is needed, this is {text_valid.dtype} {list(text_valid.shape)}")
    length = text + image_tokens + reference_tokens
    # What each prompt sees of the image and of the references: [B, R + 1, image + reference tokens], the image's own prompt last.
    seen = torch.zeros(batch, regions + 1, image_tokens + reference_tokens, dtype=torch.bool, device=device)
    seen[:, :regions, :image_tokens] = token_masks
    seen[:, regions] = True
    of_text = seen[:, whose]
    allowed = torch.ones(batch, length, length, dtype=torch.bool, device=device)
    allowed[:, :text, :text] = whose[:, None] == whose[None, :]
    allowed[:, :text, text:] = of_text
    allowed[:, text:, :text] = of_text.transpose(1, 2)
    if text_valid is not None:
        padding = ~text_valid
        allowed[:, :text].masked_fill_(padding[:, :, None], False)
        allowed[:, :, :text].masked_fill_(padding[:, None, :], False)
        allowed.diagonal(dim1=1, dim2=2).fill_(True)
    return allowed[:, None]
