"""What several families do alike; a family takes it as it is, `encode_image = staticmethod(encode_kl)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stages.families.base import Configs
from stages.objectives.path import Path, Straight


def rectified_flow(model: Configs) -> Path:
    """The straight path, of which the velocity is predicted."""
    return Straight()


def one_for_all(model: Configs, expert: str | None) -> tuple[float, float]:
    """All noise levels: there is one transformer."""
    return 0.0, 1.0


def encode_kl(vae: Any, image: Tensor) -> Tensor:
    """The mode of an AutoencoderKL's distribution, shifted where its config says so, and scaled, [1, C, H / f, W / f]. Pipelines draw from the distribution."""
    latents: Tensor = (vae.encode(image).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return latents


def decode_kl(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `encode_kl`."""
    images: Tensor = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    return images
