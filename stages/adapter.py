"""The adapter: low-rank pairs that peft puts beside linear layers, and what of a model trains in a stage.

Several adapters may stand on one model, all active. Of the plan's only adapter a pair is called `LAYER.lora_A.weight` and `LAYER.lora_B.weight`,
as peft saves it; of others the adapter's name and a colon stand before.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mixing.keys import key
from stages.placed import DEFAULT, Placed, target_of
from stages.plan import Adapter

NAME = DEFAULT


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


def add_adapter(
    model: nn.Module, settings: Adapter, words: Mapping[str, Sequence[str]], seed: int, *, name: str = NAME, turn: int = 0, place: str = "adapter"
) -> list[str]:
    """Put a fresh adapter on the model, active beside those that are there, and return the names of the layers that got a pair.

    A is uniform as in peft's default (Kaiming with a = sqrt 5), keyed by the seed, the adapter's name and turn, and the layer's name; B is zero, so
    the function is unchanged. Both, and the magnitudes of DoRA, are float32 whatever the model is stored in: in bf16 most updates of a small rate
    round away. words: what the words of `targets` stand for. place: where the settings stand in the plan, for the error of a pattern without a match.
    """
    targets = settings.targets
    names = matched(model, words[targets] if isinstance(targets, str) else targets, f"{place}.targets")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        target_modules=exactly(names),
        init_lora_weights=False,
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
    )
    with warnings.catch_warnings():  # that several adapters stand on the model is what is meant (peft 0.21)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=name)
    layers = lora_layers(model)
    for layer_name in names:
        layer = layers[layer_name]
        down, up = layer.lora_A[name], layer.lora_B[name]
        down.to(torch.float32)
        up.to(torch.float32)
        with torch.no_grad():
            down.weight.copy_(fresh_rows(down.weight.shape, fresh_key(seed, layer_name, name, turn)))
            up.weight.zero_()
        if name in layer.lora_magnitude_vector:  # peft has taken them from the pairs that stood there before
            layer.lora_magnitude_vector[name].update_layer(base_layer=layer.get_base_layer(), lora_A=down.weight, lora_B=up.weight, scaling=layer.scaling[name])
            layer.lora_magnitude_vector[name].to(torch.float32)
    for layer in layers.values():
        layer.set_adapter(list(layer.lora_A))  # a second one that is injected is not active (peft 0.21)
    return names


def place_adapters(model: nn.Module, placed: Mapping[str, Placed], words: Mapping[str, Sequence[str]], seed: int) -> None:
    """Put a stage's adapters on the model, fresh. Raises TargetError if a pattern matches nothing."""
    for name, each in placed.items():
        add_adapter(model, each.settings, words, seed, name=name, turn=each.turn, place=each.place)


def fresh_key(seed: int, layer: str, adapter: str, turn: int) -> int:
    """What a fresh A is drawn by. Of the plan's only adapter, at first, by seed and layer alone."""
    return key(seed, "adapter", layer) if adapter == NAME and turn == 0 else key(seed, "adapter", layer, adapter, turn)


def fresh_rows(shape: Sequence[int], drawn_by: int) -> Tensor:
    """Rows of a fresh A, float32 [rows, in], uniform in +-1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(drawn_by & (2**63 - 1))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def exactly(names: Sequence[str]) -> str:
    """A pattern that matches these names and no others: a list of names would match their endings too (peft 0.21)."""
    return "|".join(re.escape(name) for name in names)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that carry a pair, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters on a model, in the order in which they were put there."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A))


def saved_name(adapter: str, name: str) -> str:
    """What a tensor of an adapter is called in a checkpoint. name: `LAYER.lora_A.weight`."""
    return name if adapter == NAME else f"{adapter}:{name}"


def of_adapter(weights: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter of a checkpoint, without its name."""
    if adapter == NAME:
        return {name: value for name, value in weights.items() if ":" not in name}
    return {name.removeprefix(f"{adapter}:"): value for name, value in weights.items() if name.startswith(f"{adapter}:")}


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, str, nn.Parameter]]:
    """Adapter, layer, name in a checkpoint and parameter of everything that adapters have on a model.

    Not by peft's own get_peft_model_state_dict, which tells several adapters apart by looking for their names in those of the weights (0.21.2).
    """
    for layer_name, layer in lora_layers(model).items():
        for adapter in layer.lora_A:
            parts = {"lora_A.weight": layer.lora_A[adapter].weight, "lora_B.weight": layer.lora_B[adapter].weight}
            if adapter in layer.lora_magnitude_vector:
                parts["lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter].weight
            for part, parameter in parts.items():
                yield adapter, layer_name, saved_name(adapter, f"{layer_name}.{part}"), parameter


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """All adapters' pairs, float32 on the CPU, by the names that peft saves them by: `LAYER.lora_A.weight`, `LAYER.lora_B.weight`, and of DoRA
    `LAYER.lora_magnitude_vector`; an adapter's name stands before, but for the plan's only one."""
    return {name: parameter.detach().cpu().clone() for _, _, name, parameter in _parameters(model)}


def load_adapter_weights(model: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Put saved pairs on the model. Raises TargetError, naming `place`, if a pair is missing, left over, or of another shape."""
    own = {name: parameter for _, _, name, parameter in _parameters(model)}
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or extra or other:
        example = (missing + extra + other)[0]
        raise TargetError(f"{place}: its pairs are not those of this plan's adapter ({len(missing)} missing, {len(extra)} left over, {len(other)} of another shape, such as {example}); its rank and targets must be the plan's")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def choose_trainable(model: nn.Module, train: str | Sequence[str], place: str, *, frozen: Collection[str] = (), unread: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Set which parameters train, and return them by name, float32.

    train: `adapter` (all of them), `full` (every weight of the transformer but the adapters'), or a list whose entries are names of adapters or
    patterns on the names of adapted layers (`cond:PATTERN` on those of one adapter). frozen: adapters that do not train, whatever `train` says.
    unread: patterns on the names of weights that `full` leaves alone. place: where it stands in the plan, for the error. Raises TargetError if a pattern
    matches nothing.
    """
    chosen: set[int] = set()
    if train == "full":
        chosen = {id(parameter) for name, parameter in model.named_parameters() if ".lora_" not in name and not any(re.fullmatch(pattern, name) for pattern in unread)}
    else:
        pairs = [(adapter, layer, parameter) for adapter, layer, _, parameter in _parameters(model) if adapter not in frozen]
        names = [name for name in adapter_names(model) if name not in frozen]
        for entry in [None] if isinstance(train, str) else train:
            adapter, pattern = (None, None) if entry is None else target_of(entry, names)
            layers = list(dict.fromkeys(layer for owner, layer, _ in pairs if adapter in (None, owner)))
            hits = {layer for layer in layers if pattern is None or re.fullmatch(pattern, layer)}
            if not hits and layers:
                of = f" of adapter '{adapter}'" if adapter else ""
                raise TargetError(f"{place}: pattern '{pattern}' matches none of the {len(layers)} layers that carry a pair{of}, which are named like '{layers[0]}'")
            chosen |= {id(parameter) for owner, layer, parameter in pairs if layer in hits and adapter in (None, owner)}
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen:
            trainable[name] = parameter
    return trainable


def without_input_casts(model: nn.Module) -> None:
    """Stop peft from casting a pair's input up to float32, which autocast casts straight back down: the same numbers, a seventh less memory.

    Not where DoRA takes the lengths of rows: it takes them in the input's dtype, and in bf16 they are off by as much as an adapter changes.
    """
    for layer in lora_layers(model).values():
        layer.cast_input_dtype_enabled = bool(layer.lora_magnitude_vector)
