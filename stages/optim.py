"""Optimizer, learning rate and moving average of a stage, each resumable bit for bit, each float32."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.plan import LearningRate, Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the named parameters, in their order; its rate is set before each step."""
    return torch.optim.AdamW(list(parameters.values()), lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True)


def rate_at(step: int, steps: int, rate: LearningRate) -> float:
    """The learning rate of step `step`, counted from 0, of a stage of `steps`. rate: resolved, so that its warm-up is a number.

    Linear from `warmup_from` at step 0 to `peak` at step `warmup`; from there to `floor` at the last step, straight, by a cosine, or not at all.
    """
    warmup = rate.warmup
    assert warmup is not None
    if step < warmup:
        return rate.warmup_from + (rate.peak - rate.warmup_from) * step / warmup
    if rate.schedule == "constant":
        return rate.peak
    floor = rate.floor if rate.floor is not None else 0.0
    done = (step - warmup) / max(1, steps - 1 - warmup)
    left = 1 - done if rate.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (rate.peak - floor) * left


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments of each parameter under its name: `NAME::exp_avg`, `NAME::exp_avg_sq`, `NAME::step`."""
    return {
        f"{name}::{moment}": optimizer.state[parameter][moment].detach().cpu()
        for name, parameter in parameters.items()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], *, zero_first: bool = False) -> list[str]:
    """Put saved moments back where name and shape agree; return the names of the parameters that got none.

    zero_first: with the first moment set to zero (`handoff: {optimizer: keep_v}`).
    """
    fresh = []
    for name, parameter in parameters.items():
        saved = state.get(f"{name}::exp_avg")
        if saved is None or saved.shape != parameter.shape:
            fresh.append(name)
            continue
        moments = {moment: state[f"{name}::{moment}"].to(parameter.device, torch.float32, copy=True) for moment in _MOMENTS}
        if zero_first:
            moments["exp_avg"].zero_()
        optimizer.state[parameter] = moments
    return fresh


class Average:
    """An exponential moving average of parameters, float32, with the decay min(decay, (1 + n) / (10 + n)) at update n.

    Source of the warm-up: diffusers' EMAModel (0.42.1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move towards the parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        values = list(self.values.values())
        torch._foreach_lerp_(values, [parameters[name].detach().float() for name in self.values], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Exchange the parameters with the average; a second call exchanges them back, bit for bit."""
        for name, value in self.values.items():
            held = parameters[name].detach().clone()
            parameters[name].data.copy_(value)
            self.values[name] = held
