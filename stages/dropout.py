"""Dropout of an adapter's inputs, whose masks follow from the image and the layer: the same after a restart, in a recomputation, and on any process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixing.keys import key
from stages.adapter import lora_layers
from stages.placed import Placed


class Drawing:
    """Which images the model computes now, as keys; none while nothing is dropped."""

    def __init__(self) -> None:
        self._keys: Sequence[int] | None = None
        self.is_used = False
        """Whether anything is dropped at all."""

    @property
    def keys(self) -> Sequence[int] | None:
        """One key for each image of the micro-batch, or None."""
        return self._keys

    @contextmanager
    def of(self, keys: Sequence[int]) -> Iterator[None]:
        """Inside, inputs of adapters are dropped by these keys. It must hold the backward pass too, where a checkpointed layer is computed again."""
        self._keys = keys
        try:
            yield
        finally:
            self._keys = None


class KeyedDropout(nn.Module):
    """Sets a share of its input to zero and scales up the rest, as torch's Dropout does; the mask is drawn from the keys of the images and the layer's name.

    Outside of `Drawing.of` it gives its input, in training mode too.
    """

    def __init__(self, share: float, name: str, drawing: Drawing) -> None:
        """share: of the numbers that are dropped, in (0, 1). name: of the adapter and layer."""
        super().__init__()
        self._share, self._name, self._drawing = share, name, drawing

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ..., D] with the images of the micro-batch along B, each with a mask of its own; where B is something else, one mask for all."""
        keys = self._drawing.keys
        if keys is None:
            return x
        if len(keys) == x.shape[0]:
            kept = torch.stack([self._kept(x.shape[1:], one, x.device) for one in keys])
        else:
            kept = self._kept(x.shape, key(*keys), x.device)
        return torch.where(kept, x / (1 - self._share), torch.zeros((), dtype=x.dtype, device=x.device))

    def _kept(self, shape: Sequence[int], image: int, device: torch.device) -> Tensor:
        # On the device itself: on the CPU a large model's masks would take longer to draw than the step takes.
        generator = torch.Generator(device).manual_seed(key(image, self._name) & (2**63 - 1))
        return torch.rand(tuple(shape), generator=generator, device=device) >= self._share


def add_dropout(model: nn.Module, placed: Mapping[str, Placed], trainable: Collection[nn.Parameter]) -> Drawing:
    """Drop inputs of the pairs that train, where their adapter's settings ask for it; returns what must be told which images are computed.

    trainable: what trains. A frozen pair belongs to the function that is trained on, and loses nothing.
    """
    drawing, training = Drawing(), {id(parameter) for parameter in trainable}
    for layer_name, layer in lora_layers(model).items():
        for adapter in layer.lora_A:
            share = placed[adapter].settings.dropout
            parts = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
            if share > 0 and any(id(part) in training for part in parts):
                drawing.is_used = True
                layer.lora_dropout[adapter] = KeyedDropout(share, f"{adapter}:{layer_name}", drawing)
    return drawing
