"""Facts about a model, from its configs alone: the transformer is laid out without its weights, and counted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub import snapshot_download
from torch import nn

from stages.adapter import add_adapter, choose_trainable
from stages.check_model import read_folder
from stages.explain import ModelFacts
from stages.families.flux import Flux
from stages.feed import Sizes
from stages.plan import Model, Plan

_FAMILIES: Mapping[str, tuple[Any, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {"flux": (FluxTransformer2DModel, Flux.target_patterns)}
)
"""Family to its transformer's class, and to the patterns that the words of `adapter.targets` stand for."""


def model_facts(plan: Plan) -> ModelFacts | None:
    """What is known of the plan's model without its weights; None if it is on the Hub and its configs cannot be had.

    Raises ValueError if the model is of no family that can be trained, or a pattern of the plan matches nothing in it.
    """
    settings = plan.model if isinstance(plan.model, Model) else Model(repo=plan.model)
    folder = settings.repo
    if not os.path.isdir(folder):
        try:
            folder = snapshot_download(settings.repo, revision=settings.revision, allow_patterns=["model_index.json", "*/config.json", "*/tokenizer_config.json"])
        except (OSError, ValueError):  # unreachable, gated, no such model
            return None
    model = read_folder(folder)
    plain = _laid_out(folder, model.family)
    adapted: nn.Module | None = None
    trainable = []
    for index, stage in enumerate(plan.stages):
        place = f"stages[{index}].train"
        if stage.train == "full":
            chosen = choose_trainable(plain, stage.train, place)
        else:
            if adapted is None:
                adapted = _laid_out(folder, model.family)
                add_adapter(adapted, plan.adapter, _FAMILIES[model.family][1], plan.seed)
            chosen = choose_trainable(adapted, stage.train, place)
        trainable.append(sum(parameter.numel() for parameter in chosen.values()))
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    return ModelFacts(
        family=model.family,
        parameters=parameters,
        base_bytes={"fp32": 4 * parameters, "bf16": 2 * parameters},
        trainable=tuple(trainable),
        sizes=Sizes(model.pixel_multiple, model.text_tokens),
    )


def _laid_out(folder: str, family: str) -> nn.Module:
    """The transformer of a folder on torch's meta device, which holds shapes and no values."""
    transformer, _ = _FAMILIES[family]
    with torch.device("meta"):
        model: nn.Module = transformer.from_config(transformer.load_config(folder, subfolder="transformer"))
    return model
