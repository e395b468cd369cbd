"""Noise levels of diffusers' schedulers, as the pipelines set them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def flow_match_sigmas(scheduler: Any, sigmas: Sequence[float] | None, mu: float | None, steps: int | None = None) -> Tensor:
    """The levels of a FlowMatchEulerDiscreteScheduler, from the noisiest to 0. sigmas: before the shift; left out, `steps` of the scheduler's own."""
    fresh = type(scheduler).from_config(scheduler.config)
    if sigmas is None:
        fresh.set_timesteps(steps, mu=mu) if mu is not None else fresh.set_timesteps(steps)
    else:
        fresh.set_timesteps(sigmas=list(sigmas), mu=mu)
    levels: Tensor = fresh.sigmas
    return levels.to(torch.float32)


def mu_of_tokens(scheduler: Any, tokens: int) -> float:
    """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) of the scheduler's config, which pipelines hand to it as mu."""
    config = scheduler.config
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}  # the pipelines' own defaults (diffusers 0.42.1)
    few, many, low, high = (float(config.get(name, otherwise)) for name, otherwise in names.items())
    return low + (tokens - few) * (high - low) / (many - few)


def shift_of(scheduler: Any, tokens: int) -> float:
    """The shift s of a FlowMatchEulerDiscreteScheduler, t to s t / (1 + (s - 1) t): exp(mu), or mu itself, by `mu_of_tokens` where it shifts dynamically; else its fixed one."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    mu = mu_of_tokens(scheduler, tokens)
    return mu if config.time_shift_type == "linear" else math.exp(mu)
