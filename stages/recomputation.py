"""Recomputation: blocks of a transformer that let go of their activations in the forward pass and compute them again in the backward pass.

The gradients are the same to the bit; memory is paid for with time. Which calls of a transformer are blocks is diffusers' own knowledge
(`enable_gradient_checkpointing`, diffusers 0.42.1): it hands each of them over, and here it is decided what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.plan import Checkpointing, Every

_LARGE = 2_000_000_000  # parameters of a transformer whose activations seldom fit beside it


def recomputed_every(asked: Checkpointing, parameters: int, device: torch.device) -> int:
    """Of how many blocks one is computed again: 1 for every block, 0 for none. parameters: the transformer's, which `auto` goes by."""
    if isinstance(asked, Every):
        return asked.every
    if asked == "auto":
        return 1 if device.type == "cuda" and parameters > _LARGE else 0
    return {"none": 0, "full": 1}[asked]


def recompute(model: nn.Module, asked: Checkpointing, device: torch.device) -> int:
    """Let a transformer compute blocks again as a stage asks for it; gives `recomputed_every`. Nothing changes where no gradients are taken.

    Raises ValueError if diffusers knows of no blocks in a transformer of this class.
    """
    every = recomputed_every(asked, sum(parameter.numel() for parameter in model.parameters()), device)
    if every:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=_each(every))  # type: ignore[operator]
    return every


def _each(every: int) -> Callable[..., Any]:
    """What calls a block. Blocks are numbered as they are called first, and those whose number `every` divides are computed again."""
    numbers: dict[int, int] = {}

    def call(block: nn.Module, *inputs: Any) -> Any:
        number = numbers.setdefault(id(block), len(numbers))
        if number % every:
            return block(*inputs)
        # In the recomputation autocast is what it was, and so is the state of torch's generators, which nothing here draws from.
        return checkpoint(block.__call__, *inputs, use_reentrant=False)

    return call


def recomputation_words(every: int) -> str:
    """In words: `every block`, `every 2nd block`; empty for none."""
    if every <= 1:
        return "every block" if every else ""
    ending = "th" if every % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(every % 10, "th")
    return f"every {every}{ending} block"
