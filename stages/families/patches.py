"""Latents as tokens of 2 x 2, as Flux and Qwen-Image have them."""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h/2 x w/2, 4 C], row by row; of each token's numbers, the channels vary slowest."""
    batch, channels, height, width = latents.shape
    return latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse: the first h/2 x w/2 of [B, L, 4 C] to [B, C, h, w]; what follows them, such as references, is left out."""
    batch, channels = tokens.shape[0], tokens.shape[2] // 4
    own = tokens[:, : (height // 2) * (width // 2)]
    return own.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
