"""The adapter: low-rank pairs that peft puts beside linear layers, and what of a model trains in a stage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mixing.keys import key
from stages.plan import Adapter

NAME = "default"


class TargetError(ValueError):
    """A pattern of the plan that matches nothing in the model, or saved pairs that do not fit it."""


def matched(model: nn.Module, patterns: Sequence[str], place: str) -> list[str]:
    """Full names of the linear layers that the patterns match whole, in the model's order.

    place: where the patterns stand in the plan, for the error. Raises TargetError if a pattern matches no linear layer.
    """
    linears = [name.replace(".base_layer", "") for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in linears if re.fullmatch(pattern, name)}
        if not hits:
            raise TargetError(f"{place}: pattern '{pattern}' matches none of the {len(linears)} linear layers, which are named like '{linears[0]}' and '{linears[-1]}'")
        found |= hits
    return [name for name in linears if name in found]


def add_adapter(model: nn.Module, settings: Adapter, words: Mapping[str, Sequence[str]], seed: int) -> list[str]:
    """Put a fresh adapter on the model and return the names of the layers that got a pair.

    A is uniform as in peft's default (Kaiming with a = sqrt 5), keyed by the seed and the layer's name; B is zero, so the function is
    unchanged. Both are float32 whatever the model is stored in: in bf16 most updates of a small rate round away.
    """
    targets = settings.targets
    names = matched(model, words[targets] if isinstance(targets, str) else targets, "adapter.targets")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha or settings.rank, target_modules=exactly(names), init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, layer in lora_layers(model).items():
        down, up = layer.lora_A[NAME], layer.lora_B[NAME]
        down.to(torch.float32)
        up.to(torch.float32)
        generator = torch.Generator().manual_seed(key(seed, "adapter", name) & (2**63 - 1))
        bound = 1 / math.sqrt(down.in_features)
        with torch.no_grad():
            down.weight.copy_(torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator))
            up.weight.zero_()
    return names


def exactly(names: Sequence[str]) -> str:
    """A pattern that matches these names and no others: a list of names would match their endings too (peft 0.21)."""
    return "|".join(re.escape(name) for name in names)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that carry a pair, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The pairs, float32 on the CPU, under the names that peft saves them by: `LAYER.lora_A.weight`."""
    return {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(model, adapter_name=NAME).items()}


def load_adapter_weights(model: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Put saved pairs on the model. Raises TargetError, naming `place`, if a pair is missing, left over, or of another shape."""
    own = get_peft_model_state_dict(model, adapter_name=NAME)
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or extra or other:
        example = (missing + extra + other)[0]
        raise TargetError(f"{place}: its pairs are not those of this plan's adapter ({len(missing)} missing, {len(extra)} left over, {len(other)} of another shape, such as {example}); its rank and targets must be the plan's")
    set_peft_model_state_dict(model, dict(weights), adapter_name=NAME)


def choose_trainable(model: nn.Module, train: str | Sequence[str], place: str) -> dict[str, nn.Parameter]:
    """Set which parameters train, and return them by name, float32.

    train: `adapter`, `full` (every weight of the transformer but the adapter's), or patterns on the names of adapted layers.
    place: where it stands in the plan, for the error. Raises TargetError if a pattern matches nothing.
    """
    if train == "full":
        chosen = {name for name, _ in model.named_parameters() if ".lora_" not in name}
    else:
        layers = lora_layers(model)
        names = set(layers)
        if not isinstance(train, str):
            names = set()
            for pattern in train:
                hits = {name for name in layers if re.fullmatch(pattern, name)}
                if not hits:
                    raise TargetError(f"{place}: pattern '{pattern}' matches none of the {len(layers)} layers that carry a pair, which are named like '{next(iter(layers))}'")
                names |= hits
        chosen = {name for name, _ in model.named_parameters() if ".lora_" in name and name.split(".lora_")[0] in names}
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            trainable[name] = parameter
    return trainable


def without_input_casts(model: nn.Module) -> None:
    """Stop peft from casting a pair's input up to float32, which autocast casts straight back down: the same numbers, a seventh less memory."""
    for layer in lora_layers(model).values():
        layer.cast_input_dtype_enabled = False
