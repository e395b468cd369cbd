"""Sharing: tensors of which each process holds a part, gathered and parted again. Whole ones pass through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """All of a tensor, on the CPU, apart from its graph. Of one that is shared out every process must ask."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def shared_like(value: Tensor, held: Tensor) -> Tensor:
    """A copy of a whole tensor on the device of another, and shared out as that one is; in its own dtype. Every process has all of it."""
    placed = value.to(held.device, copy=True)
    return distribute_tensor(placed, held.device_mesh, held.placements, src_data_rank=None) if isinstance(held, DTensor) else placed


def part_of(value: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def plain(value: Tensor) -> Tensor:
    """A number that is the same on all processes, such as a norm, as a tensor of this one."""
    return value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)


def numbers(value: Tensor) -> int:
    """How many numbers a tensor has over all processes."""
    return int(getattr(value, "ds_numel", value.numel()))  # a weight that ZeRO-3 has parted is empty between its uses, and says what it was
