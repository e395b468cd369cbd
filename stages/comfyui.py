"""The layout of ComfyUI: which keys of an adapter ComfyUI reads, from stored key maps that name their source.

stages/comfyui_keys/FAMILY.json says, for each of ComfyUI's weights, which diffusers modules make up its rows, from top to bottom; `{n}` is a block's
number. Under `by_module` stand the weights for which ComfyUI takes one key a module, in diffusers' own names (`transformer.MODULE`): such a key stays
as it is published. Under `by_weight` stand those for which it takes one key for the whole weight (`diffusion_model.WEIGHT`): such modules are renamed,
and several are fused into one pair. `halves_swapped` names the weights whose two halves ComfyUI exchanges itself while it reads diffusers' key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stages.problems import RunError

_MAPS = Path(__file__).with_name("comfyui_keys")
_PUBLISHED = "transformer."
_OWN = "diffusion_model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
_NO_DORA = "ComfyUI divides a DoRA's magnitude by the norm of the base's rows, peft by that of the base with the pair: the outputs would differ"
_NO_DORA_SOURCE = (
    "Comfy-Org/ComfyUI@a125cd84b054a57729b5eecab930ca9408719832 comfy/weight_adapter/base.py weight_decompose",
    "Comfy-Org/ComfyUI pull requests 13011 and 15458 (open in August 2026) weight_decompose",
)


class LayoutError(RunError):
    """A key of an adapter that has no place in ComfyUI's model, as far as the stored map knows."""


@dataclass(frozen=True)
class ComfyAdapter:
    """An adapter in the layout of ComfyUI, or why there is none."""

    answer: Literal["as_published", "converted", "none"]
    """as_published: ComfyUI reads the published file. converted: it reads `weights`. none: it reads neither."""
    weights: Mapping[str, Tensor]
    """The adapter in keys that ComfyUI reads; empty if the answer is none."""
    reason: str
    """Why, in one sentence."""
    source: tuple[str, ...]
    """Where that is known from: `repository@commit file function`, each."""


@dataclass(frozen=True)
class Place:
    """Where a key of an adapter goes in ComfyUI's model."""

    weight: str
    """ComfyUI's weight, without `diffusion_model.` and `.weight`."""
    row: int | None
    """Which of the blocks of rows that modules make up, counted from 0 at the top; None for all rows."""


@dataclass(frozen=True)
class _Entry:
    """One weight of a key map. Patterns hold `{n}` for a block's number."""

    weight: str
    modules: tuple[str, ...]
    by_weight: bool


@dataclass(frozen=True)
class _KeyMap:
    model: str | None
    reason: str
    source: tuple[str, ...]
    entries: tuple[_Entry, ...]


def comfyui_layout(family: str, weights: Mapping[str, Tensor], widths: Mapping[str, int] | None = None) -> ComfyAdapter:
    """The same adapter in keys that ComfyUI reads.

    family: as in `stages.families.FAMILIES`. weights: the published file's, `transformer.MODULE.lora_A.weight` [r, in] and `lora_B.weight` [out, r],
    the scale already multiplied into B: a file without alpha is read by ComfyUI with scale 1 (LoRAAdapter.load). widths: rows of the base's linears by module name;
    needed only where a fused weight has a module that the adapter leaves out. Fusing is exact: the As are stacked and the Bs stand on a block diagonal,
    so the rank of the pair is the sum of its parts' ranks. Renamed tensors are shared, not copied. Tensors on the meta device tell the answer before training.
    Raises LayoutError, naming it, for a module that the map does not know, a key that is no pair's, half a pair, or a width that is missing.
    """
    key_map = _key_map(family)
    if key_map.model is None:
        return ComfyAdapter("none", {}, key_map.reason, key_map.source)
    if any(key.rpartition(".lora_")[2].startswith("magnitude_vector") for key in weights):
        return ComfyAdapter("none", {}, _NO_DORA, _NO_DORA_SOURCE)
    written: dict[str, Tensor] = {}
    fused: dict[tuple[_Entry, str], dict[str, tuple[Tensor, Tensor]]] = {}
    for module, pair in _pairs(weights, f"the adapter of {family}").items():
        if not module.startswith(_PUBLISHED):
            raise LayoutError(f"the adapter of {family}: '{module}' does not begin with '{_PUBLISHED}'; pass the weights as they are published")
        name = module.removeprefix(_PUBLISHED)
        entry, number = _entry_of_module(key_map, name, family)
        if not entry.by_weight:
            written |= _as_keys(module, *pair)
        elif len(entry.modules) == 1:
            written |= _as_keys(_OWN + entry.weight.replace("{n}", number), *pair)
        else:
            fused.setdefault((entry, number), {})[name] = pair
    for (entry, number), parts in fused.items():
        modules = [pattern.replace("{n}", number) for pattern in entry.modules]
        written |= _as_keys(_OWN + entry.weight.replace("{n}", number), *_fuse(modules, parts, widths or {}))
    unchanged = written.keys() == weights.keys()
    return ComfyAdapter("as_published" if unchanged else "converted", written, key_map.reason, key_map.source)


def comfyui_places(family: str, keys: Iterable[str]) -> dict[str, Place]:
    """Where each key of a file goes in ComfyUI's model, by the key without `.lora_A.weight` or `.lora_B.weight`: every key is accounted for.

    keys: of a file in the layout of ComfyUI, converted or as published. Raises LayoutError for a key that ComfyUI does not read (it would only log a warning)
    or for half a pair.
    """
    key_map = _key_map(family)
    places: dict[str, Place] = {}
    for stem in _stems(keys, f"the file for {family}"):
        if stem.startswith(_PUBLISHED):
            entry, number = _entry_of_module(key_map, stem.removeprefix(_PUBLISHED), family)
            if entry.by_weight:
                raise LayoutError(f"the file for {family}: ComfyUI does not read '{stem}'; it reads '{_OWN}{entry.weight.replace('{n}', number)}'")
            row = [pattern.replace("{n}", number) for pattern in entry.modules].index(stem.removeprefix(_PUBLISHED))
            places[stem] = Place(entry.weight.replace("{n}", number), row)
        else:
            weight = stem.removeprefix(_OWN)
            if not stem.startswith(_OWN) or not any(_number(entry.weight, weight) is not None for entry in key_map.entries):
                raise LayoutError(f"the file for {family}: ComfyUI has no '{stem}', as far as {_MAPS.name}/{family}.json knows")
            places[stem] = Place(weight, None)
    return places


def _fuse(modules: Sequence[str], parts: Mapping[str, tuple[Tensor, Tensor]], widths: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """A of all parts stacked [sum of ranks, in], and their B on a block diagonal [sum of rows, sum of ranks]; a module without a part has rows of zeros.

    Raises LayoutError if the rows of a module without a part are not known.
    """
    rows, found = 0, []
    for module in modules:
        if module in parts:
            found.append((rows, *parts[module]))
            rows += parts[module][1].shape[0]
        elif module in widths:
            rows += widths[module]
        else:
            raise LayoutError(f"'{module}' has no pair, but ComfyUI keeps it in one weight with {', '.join(parts)}, and how many rows it has is not known; pass its width")
    stacked = torch.cat([down for _, down, _ in found])
    diagonal = stacked.new_zeros(rows, stacked.shape[0])
    column = 0
    for row, _, up in found:
        diagonal[row : row + up.shape[0], column : column + up.shape[1]] = up
        column += up.shape[1]
    return stacked, diagonal


def _as_keys(stem: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{stem}{_SIDES[0]}": down.contiguous(), f"{stem}{_SIDES[1]}": up.contiguous()}


def _pairs(weights: Mapping[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name that they share."""
    return {stem: (weights[stem + _SIDES[0]], weights[stem + _SIDES[1]]) for stem in _stems(weights, what)}


def _stems(keys: Iterable[str], what: str) -> list[str]:
    """What the pairs of keys share, each once, in order. Raises LayoutError for a key that is no pair's and for half a pair."""
    present = dict.fromkeys(keys)
    stems: dict[str, None] = {}
    for key in present:
        side = next((side for side in _SIDES if key.endswith(side)), None)
        if side is None:
            raise LayoutError(f"{what}: '{key}' is neither {_SIDES[0]} nor {_SIDES[1]} of a module; ComfyUI's layout is known for these alone")
        stem = key.removesuffix(side)
        missing = [stem + other for other in _SIDES if stem + other not in present]
        if missing:
            raise LayoutError(f"{what}: '{key}' has no '{missing[0]}' beside it")
        stems[stem] = None
    return list(stems)


def _entry_of_module(key_map: _KeyMap, module: str, family: str) -> tuple[_Entry, str]:
    """The weight that a module is in, and its block's number as text. Raises LayoutError if the map does not know the module."""
    for entry in key_map.entries:
        for pattern in entry.modules:
            number = _number(pattern, module)
            if number is not None:
                return entry, number
    raise LayoutError(
        f"the adapter of {family}: '{module}' is not in the map of ComfyUI's keys ({_MAPS.name}/{family}.json); leave it out of adapter.targets, or add it to the map with its source"
    )


def _number(pattern: str, name: str) -> str | None:
    """What stands for `{n}` in a name, "" for a pattern without; None if the name does not match."""
    found = re.fullmatch(r"(?P<n>0|[1-9]\d*)".join(re.escape(part) for part in pattern.split("{n}")), name)
    if found is None:
        return None
    return found.groupdict().get("n", "")


@cache
def _key_map(family: str) -> _KeyMap:
    """The stored map of a family. Raises LayoutError if there is none."""
    path = _MAPS / f"{family}.json"
    known = sorted(file.stem for file in _MAPS.glob("*.json"))
    if family not in known:
        raise LayoutError(f"no map of ComfyUI's keys for family '{family}' (families: {', '.join(known)}); add {_MAPS.name}/{path.name} with its source")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return _KeyMap(
        model=content["model"],
        reason=content["reason"],
        source=tuple(f"{source['repository']}@{source['commit']} {source['file']} {source['function']}" for source in content["sources"]),
        entries=tuple(
            _Entry(weight, tuple(modules), section == "by_weight") for section in ("by_module", "by_weight") for weight, modules in content[section].items()
        ),
    )
