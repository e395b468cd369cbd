"""Storage: a transformer whose blocks hold their weights in 4 or 8 bits, and multiply in whatever the stage computes in; those in fp8 multiply in fp8.

Not by the layers of bitsandbytes, whose numbers these are (0.50.2). Linear4bit keeps the dtype of its first product, gives its result in the dtype of its
input, float32 after a norm under autocast, and on a CPU with bf16 instructions packs its weights for good when it is evaluated. Linear8bitLt rounds the
inputs to fp16 and then to 8 bits, which is another function than the stage's precision asks for, and on a CPU does so in evaluation and not in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from stages.families.family import Family
from stages.offload import Lane, offload
from stages.plan import Quantised, Stage, Storage
from stages.precision import DTYPES
from stages.resolved import plain_storage, quantised

_BLOCK = 64
"""Numbers of nf4 that share a scale. Source: Dettmers et al. 2023, arXiv:2305.14314, section 3."""
_LARGEST = 127
"""The largest number of int8, of those that are as many below zero as above."""
_FP8 = torch.float8_e4m3fn
"""Of weights and inputs. Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3."""
_LARGEST_FP8 = torch.finfo(_FP8).max  # 448
_LEAST_SCALE = 2.0**-100


@dataclass(frozen=True)
class Stored:
    """What a stage's frozen transformer is stored in."""

    dtype: torch.dtype
    """Of all weights, or of those that stay as they are beside quantised ones."""
    blocks: Quantised | None
    """What the linear layers of the blocks are quantised to; None leaves them as they are."""
    is_offloaded: bool = False
    """Whether the weights of these layers are kept on the CPU and brought for each product."""


def stored(stage: Stage) -> Stored:
    """What a stage's base is stored in."""
    return Stored(DTYPES[plain_storage(stage)], quantised(stage), stage.offload)


def load_stored(family: Family, wanted: Stored, weights: Path | None, expert: str | None = None, device: torch.device | None = None) -> nn.Module:
    """A frozen transformer in evaluation mode, stored as is wanted; arguments as of `Family.load_transformer`.

    It is quantised layer by layer on its way to the family's device, which never holds it whole in its own dtype.
    """
    if wanted.blocks is None and not wanted.is_offloaded:
        return family.load_transformer(wanted.dtype, weights, expert, device=device)
    model = family.load_transformer(wanted.dtype, weights, expert, device=torch.device("cpu"))
    if wanted.is_offloaded:
        return keep_off(model, wanted.blocks, family.device).to(family.device)
    if wanted.blocks is not None:
        quantise(model, wanted.blocks, family.device)
    return model.to(device or family.device)


def keep_off(model: nn.Module, storage: Quantised | None, device: torch.device, lane: Lane | None = None) -> nn.Module:
    """Keep the weights of the layers of `block_layers` on the CPU, quantised on the device if they are to be; everything else stays where it is.

    lane: how they come to the device; left out, as `stages.offload.Carrier` has it. Gives the model.
    """
    layers = block_layers(model)
    if storage is None:
        return offload(model, ((name, layer, _plain) for name, layer in layers.items()), device, lane)

    def whole(tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return _made_whole(storage, tensors["weight"], tensors["scale"], shape, dtype)

    return offload(model, ((name, QuantisedLinear(layer, storage, device), whole) for name, layer in layers.items()), device, lane)


def _plain(tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return tensors["weight"].to(dtype)


def _made_whole(storage: Quantised, numbers: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that quantised numbers stand for, of a shape [out, in], in a floating-point dtype."""
    if storage == "nf4":
        # As one row: of several, whose length is no multiple of a block, the CPU's kernel takes the wrong scales (bitsandbytes 0.50.2).
        state = QuantState(absmax=scale, shape=torch.Size((shape.numel(),)), dtype=dtype, blocksize=_BLOCK, quant_type="nf4")
        made: Tensor = dequantize_4bit(numbers, state)
        return made.view(shape)
    return (numbers.view(_FP8) if storage == "fp8" else numbers).to(dtype) * scale.to(dtype)


def quantise(model: nn.Module, storage: Quantised, device: torch.device) -> list[str]:
    """Put `QuantisedLinear`, on the device, in the place of the layers of `block_layers`; everything else stays where it is. Returns their names.

    Adapters may stand on the model; their pairs are left alone. The same weights give the same bits on the same kind of device.
    """
    layers = block_layers(model)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QuantisedLinear(layer, storage, device))
    return list(layers)


def block_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that nf4 and int8 change, by full name: all those inside the lists of blocks that stand on the model itself, adapters' pairs aside.

    So embedders, modulation that all blocks share and the last projection stay as they are, and so does what a model's class keeps in float32.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        f"{name}.{inner}": module
        for name, blocks in model.named_children()
        if isinstance(blocks, nn.ModuleList)
        for inner, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in f".{inner}" and not kept & {name, *inner.split(".")}
    }


def stored_bytes(model: nn.Module) -> dict[Storage, int]:
    """Bytes of a transformer's weights in each storage, counted from shapes, so on torch's meta device too. Beside nf4, int8 and fp8 the rest is in bf16."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    layers = block_layers(model).values()
    rest = 2 * (whole - sum(layer.weight.numel() for layer in layers))
    four = sum(math.ceil(layer.weight.numel() / 2) + 4 * math.ceil(layer.weight.numel() / _BLOCK) for layer in layers)
    eight = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    return {"fp32": 4 * whole, "bf16": 2 * whole, "nf4": rest + four, "int8": rest + eight, "fp8": rest + eight}


def left_plain(model: nn.Module) -> int:
    """How many of a transformer's numbers nf4 and int8 leave in the plain storage."""
    return sum(parameter.numel() for parameter in model.parameters()) - sum(layer.weight.numel() for layer in block_layers(model).values())


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in nf4 or int8, and makes it anew in the dtype of the product, forwards and again backwards; or in fp8, and
    multiplies by it as it is on the way forwards.

    An nn.Linear by name only, since peft puts pairs beside nothing else. What it holds are parameters: DDP sends buffers around at every step. The dtype of
    the product is autocast's, outside of it the input's, as for a plain layer.
    """

    def __init__(self, layer: nn.Linear, storage: Quantised, device: torch.device) -> None:
        """layer: in float32, bf16 or fp16, on any device."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.storage = layer.in_features, layer.out_features, storage
        weight = layer.weight.detach().to(device)
        numbers, scale = {"nf4": _to_nf4, "int8": _to_int8, "fp8": _to_fp8}[storage](weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer multiplies by, [out, in], in a floating-point dtype."""
        return _made_whole(self.storage, self.weight, self.scale, torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]; gives [..., out] in the dtype of the product."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = (_ScaledProduct if self.storage == "fp8" else _Product).apply(x, self)  # type: ignore[no-untyped-call]
        return product


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers in a byte, uint8 [in * out / 2, 1], and the largest size of every `_BLOCK` of them, float32 [blocks]."""
    numbers, state = quantize_4bit(weight.contiguous(), blocksize=_BLOCK, quant_type="nf4")
    return numbers, state.absmax


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, int8 [out, in], and what each row is multiplied by, float32 [out, 1].

    The scale is one that bf16 can say, so that a weight made anew in bf16 is rounded once.
    """
    whole = weight.float()
    scale = (whole.abs().amax(dim=1, keepdim=True) / _LARGEST).bfloat16().float().clamp(min=torch.finfo(torch.float32).tiny)
    return (whole / scale).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in float8 e4m3 as their bytes, uint8 [out, in], for not every way of sending tensors between processes knows the dtype; and what each row is multiplied
    by, float32 [out, 1].

    The scale is a power of two: in whatever the weight is made anew, it is exactly what the product in fp8 multiplies by.
    """
    whole = weight.float()
    largest = whole.abs().amax(dim=1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST_FP8))).clamp(min=_LEAST_SCALE)
    return (whole / scale).clamp(-_LARGEST_FP8, _LARGEST_FP8).to(_FP8).view(torch.uint8), scale


def scaled_product(x: Tensor, layer: QuantisedLinear) -> Tensor:
    """x W^T + b of a layer in fp8, x rounded to fp8 too, each row (a token) with a scale of its own; bf16 [..., out]. x: [..., in], of any floating-point dtype.

    A GPU's kernels ask for in and out that 16 divides. Source of a scale for each row: the rowwise recipe of torchao (0.18, torchao/float8).
    """
    rows = x.reshape(-1, layer.in_features)
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / _LARGEST_FP8).clamp(min=_LEAST_SCALE)
    numbers = (rows.float() / scale).clamp(-_LARGEST_FP8, _LARGEST_FP8).to(_FP8)
    bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
    with torch.autocast(x.device.type, enabled=False):  # a CPU's way to do it is made of products that autocast would round once more (torch 2.13)
        product: Tensor = torch._scaled_mm(numbers, layer.weight.view(_FP8).t(), scale_a=scale, scale_b=layer.scale.t(), bias=bias, out_dtype=torch.bfloat16)
    return product.view(*x.shape[:-1], layer.out_features)


class _ScaledProduct(torch.autograd.Function):
    """`scaled_product` forwards. The gradient goes back through the same weight in a dtype of its own, bf16: e4m3 has not the range of gradients, e5m2 has two bits
    of fraction (the paper above, section 3), and all that the pairs learn comes by it."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        context.layer = layer
        return scaled_product(x, layer).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.whole(gradient.dtype), None


class _Product(torch.autograd.Function):
    """x W^T + b, keeping the quantised weight for the backward pass and not the one that is made from it."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        context.layer = layer
        return nn.functional.linear(x, layer.whole(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.whole(gradient.dtype), None
