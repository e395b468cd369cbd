"""Sent: tensors made on the CPU, on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device. To a GPU they go from page-locked memory, so that neither waits for the other; what was sent is not to be changed.

    A plain copy makes the CPU wait until the GPU has done all that it was given before.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
