"""Attention: which of the kernels that diffusers knows by name computes a transformer's attention (0.42.1, models/attention_dispatch.py)."""

from __future__ import annotations

from typing import get_args

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import nn

from stages.plan import Attention, Plan
from stages.precision import DTYPES
from stages.problems import PlanError


class NoSuchAttention(ValueError):
    """A transformer cannot be told by which kernel it computes attention."""


_SIZE = 64  # of a head; flash and cuDNN take multiples of 8


def name_attention(model: nn.Module, asked: Attention) -> int:
    """Let a transformer compute its attention by the named kernel, nothing at all with `auto`. Gives how many of its attentions do.

    Raises NoSuchAttention for a transformer whose attention in diffusers is torch's own function and nothing else.
    """
    if asked == "auto":
        return 0
    with attention_backend("native"):  # which puts back, at its end, what the call below sets for the whole process
        model.set_attention_backend(asked)  # type: ignore[operator]
    named = sum(getattr(getattr(module, "processor", None), "_attention_backend", None) is not None for module in model.modules())
    if not named:
        raise NoSuchAttention(f"a {type(model).__name__} computes its attention by torch's own function, and no other can be chosen; leave `attention` out")
    return named


def check_attention(plan: Plan, device: torch.device) -> None:
    """Raises PlanError if a stage asks for a kernel that does not work on a device."""
    for index, stage in enumerate(plan.stages):
        dtype = DTYPES[stage.precision]
        if reason := why_not(stage.attention, device, dtype):
            choices = ", ".join(usable_attention(device, dtype))
            raise PlanError.at(f"stages[{index}].attention", f"'{stage.attention}' does not work on this {device.type} in {stage.precision}: {reason} (here: {choices})")


def usable_attention(device: torch.device, dtype: torch.dtype) -> list[Attention]:
    """The names that work on a device in a dtype, tried forwards and backwards on a few numbers; `auto` first."""
    return ["auto", *(name for name in get_args(Attention) if name != "auto" and not why_not(name, device, dtype))]


def why_not(asked: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel does not work on a device in a dtype, in the library's own words: a package is missing, the device or the dtype is another. Empty if it does."""
    if asked == "auto":
        return ""
    query, key, value = (torch.randn(1, 16, 2, _SIZE, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_() for seed in range(3))
    try:
        with attention_backend(asked):
            dispatch_attention_fn(query, key, value).float().sum().backward()
    except (RuntimeError, ValueError, ImportError) as error:
        return str(error).split("\n", 1)[0]
    return ""
