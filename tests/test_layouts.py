"""The files of a published adapter: their names, how they are loaded, and what is said of ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stages.layouts
from families import CPU, adapted
from stages.adapter import adapter_weights
from stages.comfyui import LayoutError
from stages.families.open import open_family
from stages.families.tiny import flux, pixart, sana, wan
from stages.layouts import ADAPTER_FILE, SECOND_FILE, file_of, loading_lines, write_layouts
from stages.plan import Adapter

SETTINGS = Adapter(rank=2, targets="linear")


def test_each_transformer_has_a_file_of_its_own_and_is_loaded_from_it(tmp_path: Path) -> None:
    one, two, peft = (open_family(str(folder), CPU) for folder in (flux.build(tmp_path / "f"), wan.build(tmp_path / "w", experts=True), pixart.build(tmp_path / "p")))
    assert [file_of(one, None), file_of(two, "high"), file_of(two, "low"), file_of(peft, None)] == [ADAPTER_FILE, ADAPTER_FILE, SECOND_FILE, "adapter_model.safetensors"]
    assert loading_lines(one, (None,), "user/name") == [f'pipe.load_lora_weights("user/name", weight_name="{ADAPTER_FILE}")']
    assert loading_lines(two, ("high", "low"), "user/name") == [
        f'pipe.load_lora_weights("user/name", weight_name="{ADAPTER_FILE}")',
        f'pipe.load_lora_weights("user/name", weight_name="{SECOND_FILE}", load_into_transformer_2=True)',
    ]
    assert loading_lines(peft, (None,), "user/name") == ["from peft import PeftModel", 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "user/name")']


def test_what_comfyui_reads_is_said(tmp_path: Path) -> None:
    said = {}
    for name, build in (("flux", flux.build), ("wan", wan.build), ("sana", sana.build)):
        family = open_family(str(build(tmp_path / name)), CPU)
        model = adapted(family)
        (tmp_path / f"{name}-adapter").mkdir()
        said[name] = write_layouts(tmp_path / f"{name}-adapter", family, adapter_weights(model), SETTINGS, {}, None, family.load_transformer(torch.float32, None))
        has_own = (tmp_path / f"{name}-adapter" / "comfyui.safetensors").exists()
        assert has_own == (name == "wan")
    assert said["flux"] == f"ComfyUI reads `{ADAPTER_FILE}`."
    assert said["wan"].startswith("`comfyui.safetensors` is the same adapter for ComfyUI: ")
    assert said["sana"].startswith("No file for ComfyUI: ")


def test_an_adapter_that_has_no_place_in_comfyui_is_published_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern of one's own may reach a layer that the stored map does not know; hours of training are not lost over that."""
    family = open_family(str(flux.build(tmp_path / "m")), CPU)

    def unknown(*arguments: object) -> None:
        raise LayoutError("no place for x_embedder")

    monkeypatch.setattr(stages.layouts, "comfyui_layout", unknown)
    model = adapted(family)
    said = write_layouts(tmp_path, family, adapter_weights(model), SETTINGS, {}, None, family.load_transformer(torch.float32, None))
    assert said == "No file for ComfyUI: no place for x_embedder."
    assert (tmp_path / ADAPTER_FILE).exists()
