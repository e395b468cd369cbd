"""Tiny random models in the diffusers layout, made from configs: the real classes, milliseconds a step."""

from __future__ import annotations

from pathlib import Path

from stages.families.tiny import flux


def tiny_flux(folder: Path, *, pixels: bool, guidance: bool = False, pipeline: str = "FluxPipeline") -> Path:
    """A Flux of two blocks. pixels: without a VAE, on 3 channels; else with one that shrinks by 2 to 4 channels."""
    return flux.build(folder, pixels=pixels, guidance=guidance, pipeline=pipeline)
