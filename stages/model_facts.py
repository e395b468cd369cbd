"""Facts about a model, from its configs alone: the transformer is laid out without its weights, and counted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from stages.adapter import choose_trainable, place_adapters
from stages.check_model import read_folder
from stages.explain import ModelFacts
from stages.families.base import targets_in, unread_in
from stages.families.open import ARCHITECTURES
from stages.feed import Sizes
from stages.hub.reach import hub_answers
from stages.placed import placed_adapters
from stages.plan import Model, Plan
from stages.storage import left_plain, stored_bytes


def model_facts(plan: Plan) -> ModelFacts | None:
    """What is known of the plan's model without its weights; None if it is on the Hub and its configs cannot be had.

    Raises ValueError if the model is of no family that can be trained, or a pattern of the plan matches nothing in it.
    """
    settings = plan.model if isinstance(plan.model, Model) else Model(repo=plan.model)
    folder = settings.repo
    if not os.path.isdir(folder):
        try:
            wanted = ["model_index.json", "*/config.json", "*/tokenizer_config.json", "*/scheduler_config.json"]
            folder = snapshot_download(settings.repo, revision=settings.revision, allow_patterns=wanted, local_files_only=not hub_answers())
        except (OSError, ValueError):  # unreachable, gated, no such model
            return None
    model = read_folder(folder)
    plain = _laid_out(folder, model.family)
    trainable = []
    for index, stage in enumerate(plan.stages):
        place = f"stages[{index}].train"
        if stage.train == "full":
            chosen = choose_trainable(plain, stage.train, place, unread=unread_in(ARCHITECTURES[model.family], _config(folder, model.family)))
        else:
            placed = placed_adapters(plan, index)
            adapted = _laid_out(folder, model.family)
            place_adapters(adapted, placed, targets_in(ARCHITECTURES[model.family], _config(folder, model.family)), plan.seed)
            chosen = choose_trainable(adapted, stage.train, place, frozen=[name for name, each in placed.items() if each.frozen])
        trainable.append(sum(parameter.numel() for parameter in chosen.values()))
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    return ModelFacts(
        family=model.family,
        parameters=parameters,
        base_bytes=stored_bytes(plain),
        trainable=tuple(trainable),
        sizes=Sizes(model.sizes.pixel_multiple, model.sizes.text_tokens),
        left_plain=left_plain(plain),
    )


def _config(folder: str, family: str) -> Mapping[str, Any]:
    """The config of a folder's transformer."""
    config: Mapping[str, Any] = ARCHITECTURES[family].transformer_class.load_config(folder, subfolder="transformer")
    return config


def _laid_out(folder: str, family: str) -> nn.Module:
    """The transformer of a folder on torch's meta device, which holds shapes and no values."""
    transformer = ARCHITECTURES[family].transformer_class
    with torch.device("meta"):
        model: nn.Module = transformer.from_config(_config(folder, family))
    return model
