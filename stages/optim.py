"""Optimizer, learning rate and moving average of a stage, each resumable bit for bit."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.plan import LearningRate, Optimizer
from stages.sharing import shared_like, whole

_FUSED_ON = ("cpu", "cuda", "mps", "xpu", "hpu")  # where torch 2.13 has AdamW as one kernel
_SECOND = ("exp_avg_sq", "state2")  # what an optimizer may call its second moment; every one has it from its first step
_FIRST = ("exp_avg", "state1", "absmax1")  # and its first; 8-bit numbers are times the largest of their block, so those of zero are zero
AVERAGED = ("exp_avg", "exp_avg_sq")
"""The moments of AdamW."""
_OF_ALL = ("d", "d_max", "d_numerator", "k")  # of Prodigy: one number each for all weights together


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a plan names over the named parameters, in their order; its rate is set before each step.

    AdamW is one fused kernel on devices that have it, else torch's own choice of the others; they differ by rounding. bitsandbytes keeps moments of fewer
    than 4,096 numbers in float32 (0.50.2). Prodigy warms up safely and corrects its moments' bias, as its authors advise for diffusion models.
    On the CPU all three repeat themselves bit for bit.
    """
    weights = list(parameters.values())
    if settings.name == "adamw":
        fused = True if all(weight.device.type in _FUSED_ON for weight in weights) else None
        return torch.optim.AdamW(weights, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=fused)
    made: torch.optim.Optimizer
    if settings.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # slow to import, and only here of use

        made = AdamW8bit(weights, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        return made
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled (1.1.2)
        made = Prodigy(
            weights,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            d0=settings.d0,
            d_coef=settings.d_coef,
            safeguard_warmup=True,
            use_bias_correction=True,
        )
    return made


def found_step_size(optimizer: torch.optim.Optimizer) -> float | None:
    """The rate that Prodigy's steps come to, its own estimate times the plan's factor; None for an optimizer that takes the plan's rate as it is."""
    group = optimizer.param_groups[0]
    return float(group["d"] * group["lr"]) if "d" in group else None


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
    """All that an optimizer knows, on the CPU: `NAME::FIELD` of each parameter (AdamW: `exp_avg`, `exp_avg_sq`, `step`), and `::FIELD` of all together.

    8-bit moments are uint8, with the largest of each block of 256 and the table of what the 256 numbers mean; Python's own numbers are int64 or float64.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for field, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
            tensors[f"{name}::{field}"] = _as_tensor(value).clone() if field.startswith("qmap") else _as_tensor(value)  # bitsandbytes has one table for all
    group = optimizer.param_groups[0]
    return tensors | {f"::{field}": torch.tensor(group[field], dtype=torch.float64) for field in _OF_ALL if field in group}


def _as_tensor(value: Tensor | int) -> Tensor:
    return whole(value) if isinstance(value, Tensor) else torch.tensor(value)


def by_name(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `optimizer_state` gave, of each parameter: name to field to value; of all together under the empty name."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, field = key.rpartition("::")
        saved.setdefault(name, {})[field] = value
    return saved


def load_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], *, zero_first: bool = False) -> list[str]:
    """Put saved state back where name and shape agree; return the names of the parameters that got none.

    zero_first: with the first moment set to zero (`handoff: {optimizer: keep_v}`). state: what the same optimizer saved. Prodigy's step size is reckoned
    from all of its weights, so where one got nothing, none does.
    """
    saved = by_name(state)
    fresh = [name for name, parameter in parameters.items() if not any(field in _SECOND and value.shape == parameter.shape for field, value in saved.get(name, {}).items())]
    of_all = saved.get("", {})
    if of_all and fresh:
        return list(parameters)
    for name, parameter in parameters.items():
        if name not in fresh:
            values = {field: _as_held(optimizer, parameter, field, value) for field, value in saved[name].items()}
            for field in _FIRST if zero_first else ():
                if field in values:
                    values[field].zero_()
            optimizer.state[parameter] = values
    for field, value in of_all.items():
        optimizer.param_groups[0][field] = int(value) if field == "k" else float(value)
    return fresh


def _as_held(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, field: str, value: Tensor) -> Any:
    """A saved value as the optimizer holds it, sharing no memory with what was saved."""
    if value.dtype == torch.int64:
        return int(value)
    counts_beside = field == "step" and not optimizer.param_groups[0].get("fused")  # AdamW that is not fused counts on the CPU
    if value.shape == parameter.shape:
        return shared_like(value, parameter)
    return value.to("cpu" if counts_beside else parameter.device, copy=True)


class Average:
    """An exponential moving average of parameters, float32, with the decay min(decay, (1 + n) / (10 + n)) at update n.

    Source of the warm-up: diffusers' EMAModel (0.42.1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take the values of a checkpoint, which are whole."""
        self.values = {name: shared_like(saved[name], value) for name, value in self.values.items()}

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
