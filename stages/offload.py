"""Offload: the weights of the blocks' frozen linear layers stay in the CPU's memory, and come to the device for each product, forwards and again backwards.

Not by diffusers' group offloading: it is made for inference, and where gradients are taken autograd keeps each weight that it brought (0.42.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Phase = Literal["still", "forwards", "backwards"]
"""In which a product is made: without gradients, or on the way to them, or back."""
Whole = Callable[[Mapping[str, Tensor], torch.Size, torch.dtype], Tensor]
"""Makes the weight that is multiplied by, of a shape [out, in] and a dtype, from a layer's tensors on the device."""


class Arrival(Protocol):
    """Tensors on their way."""

    def wait(self) -> list[Tensor]:
        """Them, once what comes after on the device finds them there. What is not needed after all has to be waited for too."""


class Lane(Protocol):
    """A way to the device."""

    sets_out_early: bool
    """Whether a copy can go on beside other work, so that the next layer's sets out before it is needed."""

    def send(self, tensors: Sequence[Tensor]) -> Arrival:
        """Set out."""


class _Arrived:
    """Tensors that are there."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[Tensor]:
        return self._tensors


class _Direct:
    """Copies when it is asked to, and copies nothing to where it is."""

    sets_out_early = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, tensors: Sequence[Tensor]) -> _Arrived:
        return _Arrived([tensor.to(self._device) for tensor in tensors])


class _OnItsWay:
    """Tensors that a side stream copies."""

    def __init__(self, tensors: list[Tensor], copied: torch.cuda.Event) -> None:
        self._tensors, self._copied = tensors, copied

    def wait(self) -> list[Tensor]:
        torch.cuda.current_stream(self._tensors[0].device).wait_event(self._copied)
        return self._tensors


class _SideStream:
    """Copies from pinned memory on a stream of its own, beside the products."""

    sets_out_early = True

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensors: Sequence[Tensor]) -> _OnItsWay:
        # The room comes from the stream that computes, which may still be at work on what was there before; what is queued after this goes on beside the copy.
        there = [torch.empty_like(tensor, device=self._device) for tensor in tensors]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._stream):
            for place, tensor in zip(there, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
        return _OnItsWay(there, self._stream.record_event())


def _on(stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream)


class Carrier:
    """Brings a model's weights to the device, the next layer's before it is asked for.

    The order is learnt as products are made: what came after a product the last time comes after it again. Blocks that are computed again come in another
    order than at first, so products after the first backward one are told apart from those before it. A wrong guess costs a copy.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        """lane: left out, a side stream on a GPU and plain copies elsewhere."""
        self.device = device
        self._lane: Lane = lane or (_SideStream(device) if device.type == "cuda" else _Direct(device))
        self._after: dict[tuple[int, Phase, bool], tuple[OffloadedLinear, Phase]] = {}
        self._before: tuple[int, Phase, bool] | None = None
        self._coming: tuple[OffloadedLinear, Arrival] | None = None
        self._first: OffloadedLinear | None = None
        self._turned = False

    def bring(self, layer: OffloadedLinear, phase: Phase) -> list[Tensor]:
        """A layer's tensors on the device, for one product."""
        if not self._lane.sets_out_early:
            return self._lane.send(layer.kept).wait()
        self._first = self._first or layer
        self._turned = phase == "backwards" or (self._turned and layer is not self._first)
        now = (id(layer), phase, self._turned)
        if self._before is not None:
            self._after[self._before] = layer, phase
        self._before = now
        coming, self._coming = self._coming, None
        found = coming[1].wait() if coming is not None else None
        tensors = found if coming is not None and coming[0] is layer and found is not None else self._lane.send(layer.kept).wait()
        if (expected := self._after.get(now)) is not None and expected[0] is not layer:
            self._coming = expected[0], self._lane.send(expected[0].kept)
        return tensors


class OffloadedLinear(nn.Linear):
    """A frozen linear layer whose weight is on the CPU and is brought for each product; autograd keeps none of it.

    Its bias is where the rest of the model is. An nn.Linear by name only, since peft puts pairs beside nothing else. Moving the model leaves the weight where
    it is.
    """

    def __init__(self, layer: nn.Linear, carrier: Carrier, whole: Whole) -> None:
        """layer: plain or quantised, on any device; all its parameters but the bias are kept on the CPU, pinned where the device is a GPU. whole: what
        makes the weight of them."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._carrier, self._whole = carrier, whole
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(carrier.device), requires_grad=False)
        for name, parameter in layer.named_parameters(recurse=False):
            if name != "bias":
                # Past register_parameter, for which the property `weight` stands in the way.
                self._parameters[name] = nn.Parameter(_kept(parameter.detach(), carrier.device), requires_grad=False)
        self._names = [name for name in self._parameters if name != "bias"]

    @property
    def kept(self) -> list[Tensor]:
        """What is on the CPU."""
        return [tensor for name in self._names if (tensor := self._parameters[name]) is not None]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it is stored, brought to the device: DoRA takes the lengths of its rows, and peft looks where it is."""
        return self.kept[0].to(self._carrier.device)

    def whole(self, dtype: torch.dtype, phase: Phase) -> Tensor:
        """The weight that the layer multiplies by, [out, in], on the device."""
        return self._whole(dict(zip(self._names, self._carrier.bring(self, phase), strict=True)), torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]; gives [..., out] in the dtype of the product: autocast's, outside of it the input's."""
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self, "forwards" if torch.is_grad_enabled() else "still")  # type: ignore[no-untyped-call]
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedLinear:
        """`.to` and its like, for the bias alone."""
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self


class _Product(torch.autograd.Function):
    """x W^T + b, bringing the weight for the backward pass anew."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: OffloadedLinear, phase: Phase) -> Tensor:
        context.layer = layer
        return nn.functional.linear(x, layer.whole(x.dtype, phase), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ context.layer.whole(gradient.dtype, "backwards"), None, None


def _kept(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU; pinned where copies go to a GPU, whose driver reads nothing else while others work."""
    held = tensor.to("cpu")
    return held.pin_memory() if device.type == "cuda" else held


def offload(model: nn.Module, layers: Iterable[tuple[str, nn.Linear, Whole]], device: torch.device, lane: Lane | None = None) -> nn.Module:
    """Put `OffloadedLinear` in the place of a frozen model's layers, one after the other; everything else stays where it is. Gives the model.

    layers: full names and what is kept there, such as a quantised form of the layer that stands there, with what makes the weight of its tensors.
    """
    carrier = Carrier(device, lane)
    for name, layer, whole in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, OffloadedLinear(layer, carrier, whole))
    return model


def off_device_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights that are kept off the device."""
    return sum(tensor.nbytes for layer in model.modules() if isinstance(layer, OffloadedLinear) for tensor in layer.kept)


def leave_out_of_ddp(model: nn.Module) -> None:
    """Let DDP overlook what is kept off the device: it takes modules on one device only, and sends their weights around when it starts (torch 2.13).

    To be called once the adapters stand on the model, which changes the names of weights.
    """
    names = [f"{name}.{own}" for name, layer in model.named_modules() if isinstance(layer, OffloadedLinear) for own in layer._names]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
