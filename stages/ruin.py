"""Ruin: weights, moments or averages that are no numbers are never saved; the last checkpoint is worth more."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.leg import Leg, TrainingError
from stages.sharing import part_of


def refuse_ruin(leg: Leg) -> None:
    """Raises TrainingError, on all processes, if a number that training has made is none. Every process must ask; each waits once for its device."""
    held = leg.training.held()
    if leg.average:
        held["moving average"] = [part_of(value) for value in leg.average.values.values()]
    everywhere = leg.run.processes.gathered(ruined(held))
    if found := list(dict.fromkeys(name for names in everywhere for name in names)):
        raise TrainingError(
            f"stage '{leg.stage.name}': after step {leg.step} the {' and '.join(found)} are not all numbers, so nothing of it is saved; {leg.run.room.standing()}. Lower the rate, or write "
            f"precision: fp32, and delete {leg.run.stage_folder(leg.index)} to train the stage anew"
        )


def ruined(held: dict[str, list[Tensor]]) -> list[str]:
    """The names of those among which a number is nan or infinite, of float tensors; all are looked at on the device, and it is waited for once."""
    largest = {name: _largest(tensors) for name, tensors in held.items()}
    known = {name: value for name, value in largest.items() if value is not None}
    found = torch.stack(list(known.values())).tolist() if known else []
    return [name for name, value in zip(known, found, strict=True) if not math.isfinite(value)]


def _largest(tensors: Sequence[Tensor]) -> Tensor | None:
    """The largest absolute value; nan if one is nan. None if there is nothing to look at: a counter of steps, which may lie on another device, is not."""
    looked_at = [value.detach() for value in tensors if value.is_floating_point() and value.dim() and value.numel()]
    return torch.stack([value.float() for value in torch._foreach_norm(looked_at, math.inf)]).max() if looked_at else None
