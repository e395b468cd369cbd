"""The layout of ComfyUI: every linear of every family has a place, and a converted pair adds the same to the same rows of ComfyUI's weights.

Where ComfyUI puts a key is replayed here as its loader does it (rows, fused weights, swapped halves), and what comes out is turned back by diffusers' own
reader of single-file checkpoints, which knows nothing of our maps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from stages.comfyui import LayoutError, comfyui_layout, comfyui_places

MAPS = Path(__file__).parent.parent / "stages" / "comfyui_keys"
STORED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(MAPS.glob("*.json"))}

# The published widths (diffusers' converters take them for granted), few blocks, no memory: the models stand on the meta device.
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    "flux2": {"num_layers": 2, "num_single_layers": 2},
    "sd3": {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm", "caption_projection_dim": 1152},
    "lumina2": {"num_layers": 2, "num_refiner_layers": 2},
    "qwen_image": {"num_layers": 2},
    "z_image": {"n_layers": 2, "n_refiner_layers": 2, "siglip_feat_dim": 32},
    "pixart": {"num_layers": 2},
    "wan": {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120},
}
CONVERTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "lumina2": single_file_utils.convert_lumina2_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
}
# What ComfyUI reads of the diffusers layout, and what not: the other half of the answer.
AS_PUBLISHED = {"flux", "sd3", "qwen_image", "pixart"}


@cache
def linears(family: str) -> dict[str, int]:
    """Rows of every linear of the family's transformer by name."""
    with torch.device("meta"):
        model = getattr(diffusers, STORED[family]["transformer"])(**CONFIGS[family])
    found = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if family == "pixart":  # caption_projection is None in the default config
        found |= {"caption_projection.linear_1": 1152, "caption_projection.linear_2": 1152}
    return found


def pairs(widths: Mapping[str, int], *, prefix: str = "transformer.") -> dict[str, Tensor]:
    """A random pair a module, of ranks 1 to 3, on inputs cut down to 4."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (name, rows) in enumerate(widths.items()):
        rank = 1 + number % 3
        weights[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, 4, generator=generator)
        weights[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return weights


def products(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B A by the name that a pair's keys share."""
    stems = {key.rsplit(".lora_", 1)[0] for key in weights}
    return {stem: weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"] for stem in stems}


def swapped(stored: dict[str, Any], last: int, weight: str) -> bool:
    """Whether ComfyUI exchanges the halves of this weight as it reads diffusers' key."""
    return weight in {name.replace("{last}", str(last)) for name in stored["halves_swapped"]}


def applied(family: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ComfyUI adds to each of its weights: rows from top to bottom, or the whole weight."""
    blocks: dict[str, dict[int, Tensor]] = {}
    places = comfyui_places(family, weights)
    last = max((int(number) for name in places for number in re.findall(r"transformer_blocks\.(\d+)", name)), default=0)
    for stem, product in products(weights).items():
        place = places[stem]
        if place.row is not None and swapped(STORED[family], last, place.weight):
            product = torch.cat(product.chunk(2)[::-1])
        assert (place.row or 0) not in blocks.setdefault(place.weight, {}), f"two keys for the same rows of {place.weight}"
        blocks[place.weight][place.row or 0] = product
    return {weight: torch.cat([block[row] for row in sorted(block)]) for weight, block in blocks.items()}


class _Lenient(dict[str, Tensor]):
    """A checkpoint without norms and biases: diffusers' converters pop them by name, and their values are of no interest here."""

    def pop(self, key: str, *_: Any) -> Any:
        return super().pop(key, torch.zeros(7 * 3072 if key.endswith("linear1.bias") else 6))


@pytest.mark.parametrize("family", CONVERTERS)
def test_what_comfyui_adds_is_turned_back_by_diffusers_own_converter_into_every_original_product(family: str) -> None:
    weights = pairs(linears(family))
    own = applied(family, comfyui_layout(family, weights).weights)
    back = CONVERTERS[family](_Lenient({f"{name}.weight": value for name, value in own.items()}))
    for stem, product in products(weights).items():
        torch.testing.assert_close(back[stem.removeprefix("transformer.") + ".weight"], product, msg=lambda text, stem=stem: f"{stem}: {text}")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_linear_of_the_family_is_accounted_for_once(family: str) -> None:
    weights = pairs(linears(family))
    layout = comfyui_layout(family, weights)
    stored = STORED[family]
    places = comfyui_places(family, layout.weights)
    seen = []
    for place in places.values():
        pattern, number = next(
            (weight, found.group(1) if found.groups() else "")
            for weight in (stored["by_module"] | stored["by_weight"])
            if (found := re.fullmatch(r"(\d+)".join(map(re.escape, weight.split("{n}"))), place.weight))
        )
        modules = [module.replace("{n}", number) for module in (stored["by_module"] | stored["by_weight"])[pattern]]
        seen += modules if place.row is None else [modules[place.row]]
    assert sorted(seen) == sorted(linears(family))
    assert sum(value.shape[0] for key, value in layout.weights.items() if "lora_B" in key) == sum(linears(family).values())
    assert layout.source
    assert layout.reason


@pytest.mark.parametrize("family", CONFIGS)
def test_no_module_pattern_of_a_map_is_without_a_module_in_diffusers(family: str) -> None:
    present = {re.sub(r"(?<=(blocks|layers|efiner)\.)\d+", "{n}", name) if re.search(r"(blocks|layers|refiner)\.\d", name) else name for name in linears(family)}
    named = [module for section in ("by_module", "by_weight") for modules in STORED[family][section].values() for module in modules]
    assert sorted(named) == sorted(present)


@pytest.mark.parametrize("family", sorted(AS_PUBLISHED))
def test_a_family_that_comfyui_reads_as_diffusers_writes_it_is_left_alone(family: str) -> None:
    weights = pairs(linears(family))
    layout = comfyui_layout(family, weights)
    assert layout.answer == "as_published"
    assert layout.weights.keys() == weights.keys()
    assert all(layout.weights[key] is weights[key] for key in weights)


def test_of_flux2_only_modulation_and_time_embedding_are_renamed() -> None:
    weights = pairs(linears("flux2"))
    layout = comfyui_layout("flux2", weights)
    renamed = {key.split(".lora_")[0] for key in weights.keys() - layout.weights.keys()}
    assert layout.answer == "converted"
    assert renamed == {"transformer." + name for name in linears("flux2") if "modulation" in name or "time_guidance_embed" in name}
    attention = {key: value for key, value in weights.items() if ".attn." in key}
    assert comfyui_layout("flux2", attention).answer == "as_published"


def test_z_image_is_read_as_published_but_for_its_image_embedding_refiner() -> None:
    weights = pairs(linears("z_image"))
    assert comfyui_layout("z_image", {key: value for key, value in weights.items() if "siglip" not in key}).answer == "as_published"
    layout = comfyui_layout("z_image", weights)
    assert layout.answer == "converted"
    assert layout.weights["diffusion_model.siglip_refiner.1.attention.qkv.lora_B.weight"].shape == (3 * 3840, 6)


def test_wan_is_written_in_comfyuis_own_names_with_the_tensors_shared() -> None:
    weights = pairs(linears("wan"))
    layout = comfyui_layout("wan", weights)
    assert layout.answer == "converted"
    assert all(key.startswith("diffusion_model.") for key in layout.weights)
    for theirs, ours in (("blocks.1.self_attn.o", "blocks.1.attn1.to_out.0"), ("blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj"), ("head.head", "proj_out")):
        for side in ("lora_A.weight", "lora_B.weight"):
            assert layout.weights[f"diffusion_model.{theirs}.{side}"] is weights[f"transformer.{ours}.{side}"]


def test_a_fused_pair_is_the_stacked_products_of_its_parts_bit_for_bit_whatever_their_ranks() -> None:
    parts = {f"layers.3.attn.to_{name}": rows for name, rows in (("q", 6), ("k", 2), ("v", 2))}
    weights = {key: value.double() for key, value in pairs(parts).items()}
    layout = comfyui_layout("lumina2", weights)
    assert set(layout.weights) == {f"diffusion_model.layers.3.attention.qkv.lora_{side}.weight" for side in "AB"}
    (fused,) = products(layout.weights).values()
    made = products(weights)
    expected = torch.cat([made[f"transformer.{name}"] for name in parts])
    assert layout.weights["diffusion_model.layers.3.attention.qkv.lora_A.weight"].shape == (1 + 2 + 3, 4)
    assert layout.weights["diffusion_model.layers.3.attention.qkv.lora_A.weight"].dtype == torch.float64
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-15)


def test_a_module_that_the_adapter_leaves_out_of_a_fused_weight_keeps_its_rows_as_they_are() -> None:
    weights = pairs({"layers.0.attn.to_q": 6, "layers.0.attn.to_v": 2})
    widths = {"layers.0.attn.to_q": 6, "layers.0.attn.to_k": 2, "layers.0.attn.to_v": 2}
    (fused,) = products(comfyui_layout("lumina2", weights, widths).weights).values()
    made = products(weights)
    torch.testing.assert_close(fused, torch.cat([made["transformer.layers.0.attn.to_q"], torch.zeros(2, 4), made["transformer.layers.0.attn.to_v"]]))
    with pytest.raises(LayoutError, match=r"'layers\.0\.attn\.to_k' has no pair.*pass its width"):
        comfyui_layout("lumina2", weights)


@pytest.mark.parametrize("family", ["lumina2", "wan", "flux"])
def test_tensors_on_the_meta_device_tell_the_keys_before_there_are_weights(family: str) -> None:
    weights = pairs(linears(family))
    real = comfyui_layout(family, weights)
    planned = comfyui_layout(family, {key: value.to("meta") for key, value in weights.items()})
    assert planned.answer == real.answer
    assert {key: value.shape for key, value in planned.weights.items()} == {key: value.shape for key, value in real.weights.items()}


@pytest.mark.parametrize("family", ["sana", "omnigen"])
def test_a_family_without_a_model_in_comfyui_says_so_and_where_it_is_known_from(family: str) -> None:
    layout = comfyui_layout(family, pairs({"transformer_blocks.0.attn1.to_q": 4}))
    assert (layout.answer, dict(layout.weights)) == ("none", {})
    assert "no model of its own" in layout.reason
    assert "comfy/supported_models.py" in layout.source[0]


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_a_dora_has_no_layout_in_comfyui(end: str) -> None:
    name = "transformer_blocks.0.attn.to_q"
    layout = comfyui_layout("flux", pairs({name: 4}) | {f"transformer.{name}.{end}": torch.ones(4)})
    assert layout.answer == "none"
    assert "norm" in layout.reason


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_w", "blocks.0.attn1.to_q.0", "xtransformer_blocks.0.attn.to_q", "transformer_blocks.00.attn.to_q"])
def test_an_unknown_module_is_an_error_that_names_it_and_its_map(family: str, name: str) -> None:
    with pytest.raises(LayoutError, match=rf"'{re.escape(name)}' is not in the map of ComfyUI's keys \(comfyui_keys/{family}\.json\)"):
        comfyui_layout(family, pairs({name: 4}))


def test_an_unknown_family_key_or_half_a_pair_is_an_error_that_names_it() -> None:
    weights = pairs({"transformer_blocks.0.attn.to_q": 4})
    with pytest.raises(LayoutError, match="family 'flax' \\(families: flux, flux2, "):
        comfyui_layout("flax", weights)
    with pytest.raises(LayoutError, match=r"'transformer\.transformer_blocks\.0\.attn\.to_q\.alpha' is neither"):
        comfyui_layout("flux", weights | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.ones(())})
    with pytest.raises(LayoutError, match=r"has no 'transformer\.transformer_blocks\.0\.attn\.to_q\.lora_B\.weight' beside it"):
        comfyui_layout("flux", {key: value for key, value in weights.items() if "lora_A" in key})
    with pytest.raises(LayoutError, match=r"does not begin with 'transformer\.'"):
        comfyui_layout("flux", pairs({"transformer_blocks.0.attn.to_q": 4}, prefix=""))


def test_a_published_key_that_comfyui_would_pass_over_is_found() -> None:
    published = pairs({"blocks.0.attn1.to_q": 4})
    with pytest.raises(LayoutError, match=r"does not read 'transformer\.blocks\.0\.attn1\.to_q'; it reads 'diffusion_model\.blocks\.0\.self_attn\.q'"):
        comfyui_places("wan", published)
    with pytest.raises(LayoutError, match=r"ComfyUI has no 'diffusion_model\.blocks\.0\.self_attn\.w'"):
        comfyui_places("wan", pairs({"blocks.0.self_attn.w": 4}, prefix="diffusion_model."))


@pytest.mark.parametrize("family", STORED)
def test_every_map_names_repository_commit_file_and_function(family: str) -> None:
    stored = STORED[family]
    assert stored["family"] == family
    assert stored["reason"]
    assert stored["uncertain"]
    for source in stored["sources"]:
        assert source.keys() == {"repository", "commit", "file", "function"}
        assert re.fullmatch(r"[0-9a-f]{40}", source["commit"])
