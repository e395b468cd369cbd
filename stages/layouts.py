"""Layouts: one transformer's adapter as files that diffusers, peft and ComfyUI load, the scale multiplied into B so that no reader needs metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.adapter import exactly
from stages.comfyui import LayoutError, comfyui_layout, comfyui_places
from stages.families.family import Family
from stages.header import sort_header
from stages.pairs import layers_of, ranks_of, rescaled
from stages.peft_layout import WEIGHTS_FILE, write_peft_adapter
from stages.placed import scale_of
from stages.plan import Adapter

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""Of the only transformer, or of the first of two."""
SECOND_FILE = "pytorch_lora_weights_2.safetensors"
"""Of the second of two transformers."""
_COMFYUI = {ADAPTER_FILE: "comfyui.safetensors", SECOND_FILE: "comfyui_2.safetensors"}


def file_of(family: Family, expert: str | None) -> str:
    """The name of the file that holds a transformer's adapter; any file of these says what the adapter was made from."""
    if not family.architecture.loads_adapters:
        return WEIGHTS_FILE
    return SECOND_FILE if expert is not None and family.expert_part(expert) != "transformer" else ADAPTER_FILE


def write_layouts(folder: Path, family: Family, weights: Mapping[str, Tensor], adapter: Adapter, notes: Mapping[str, str], expert: str | None, transformer: nn.Module) -> str:
    """Write an adapter for its own pipeline, and for ComfyUI where that reads another layout. Returns what to say of ComfyUI.

    weights: as peft names them. transformer: the one that it belongs to, for the widths of its layers.
    """
    name = file_of(family, expert)
    if family.architecture.loads_adapters:
        write_adapter(folder / name, weights, adapter, notes)
    else:
        write_peft_adapter(folder, rescaled(weights, scale_of(adapter)), rank=adapter.rank, target_modules=layers_of(weights), metadata=notes)
    widths = {layer: module.out_features for layer, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    published = {f"transformer.{each}": value for each, value in rescaled(weights, scale_of(adapter)).items()}
    try:
        layout = comfyui_layout(family.name, published, widths)
        if layout.answer == "converted":
            comfyui_places(family.name, layout.weights)
    except LayoutError as error:
        return f"No file for ComfyUI: {error}."
    if layout.answer != "converted":
        return f"ComfyUI reads `{name}`." if layout.answer == "as_published" else f"No file for ComfyUI: {layout.reason}."
    save_file({each: value.contiguous() for each, value in layout.weights.items()}, folder / _COMFYUI[name], metadata={"format": "pt", **notes})
    sort_header(folder / _COMFYUI[name])
    return f"`{_COMFYUI[name]}` is the same adapter for ComfyUI: {layout.reason}."


def load_back(folder: Path, family: Family, fresh: nn.Module, expert: str | None) -> None:
    """Put what was written on a fresh transformer, as a user does it."""
    name = file_of(family, expert)
    if not family.architecture.loads_adapters:
        PeftModel.from_pretrained(fresh, folder)  # it changes the transformer in place
        return
    if name == SECOND_FILE:
        # The loader asks the first transformer for its config even so (diffusers 0.42.1); one stands in both places.
        pipeline = family.stock_pipeline(fresh, encoders=False, expert=expert, others={"high": fresh})
        pipeline.load_lora_weights(folder, weight_name=name, load_into_transformer_2=True)
    else:
        family.stock_pipeline(fresh, encoders=False, expert=expert).load_lora_weights(folder, weight_name=name)


def loading_lines(family: Family, experts: tuple[str | None, ...], place: str) -> list[str]:
    """The lines of Python that put a published adapter on a pipeline. place: the folder or the repository of the Hub that it lies in."""
    if not family.architecture.loads_adapters:
        return ["from peft import PeftModel", f'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {json.dumps(place)})']
    lines = []
    for expert in experts:
        name = file_of(family, expert)
        into = ", load_into_transformer_2=True" if name == SECOND_FILE else ""
        lines.append(f'pipe.load_lora_weights({json.dumps(place)}, weight_name="{name}"{into})')
    return lines


def write_adapter(path: Path, weights: Mapping[str, Tensor], adapter: Adapter, notes: Mapping[str, str]) -> None:
    """Write the pairs in the layout that `load_lora_weights` reads: the scale is multiplied into B, and alpha is the rank.

    A file without metadata whose alpha is not its rank loads at the wrong strength in silence (diffusers 0.42.1, peft 0.21.2); the metadata
    is there all the same. weights: of one adapter. notes: further strings of the header (plan, ledger).
    """
    scale = scale_of(adapter)
    baked = {f"transformer.{name}": (value * scale if ".lora_B." in name else value).contiguous() for name, value in weights.items()}
    modules = sorted({name.split(".lora_")[0] for name in weights})
    config: dict[str, Any] = {"transformer.r": adapter.rank, "transformer.lora_alpha": adapter.rank, "transformer.target_modules": exactly(modules)}
    # Adapters with other targets, joined, have other ranks in places. A pattern is matched against a name's end unless it begins with ^ (peft 0.21).
    if ranks := {f"^{re.escape(layer)}": rank for layer, rank in ranks_of(weights).items() if rank != adapter.rank}:
        config |= {"transformer.rank_pattern": ranks, "transformer.alpha_pattern": ranks}
    if adapter.variant == "dora":
        config["transformer.use_dora"] = True
    save_file(baked, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True), **notes})
    sort_header(path)
