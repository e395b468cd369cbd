"""Start: what a plan begins from in the place of a new adapter. Another run's stage, or a published adapter, of Medley or of another trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stages.adapter import of_adapter, saved_name
from stages.checkpoint import newest_checkpoint
from stages.formats import FormatError
from stages.handoff import Baton, read_baton
from stages.layouts import ADAPTER_FILE
from stages.model_mark import is_made_from
from stages.pairs import joined, layers_of, rescaled
from stages.peft_layout import CONFIG_FILE, WEIGHTS_FILE
from stages.placed import DEFAULT, placed_adapters, scale_of
from stages.plan import Adapter, Model, Plan

_PREFIXES = ("base_model.model.", "transformer.")


def read_start(plan: Plan, fingerprint: str, place: Path | None = None) -> Baton:
    """What `start:` names: a run's folder (its last finished stage), one stage's folder, or a published adapter (its folder or file).

    place: where that lies on this machine, if it is not what the plan says. The pairs are given at the plan's own scale. Raises ValueError if there is none of these, if it was trained on another model, or if its adapter has
    another rank or variant, unless the first stage's handoff changes the rank.
    """
    place = place or Path(plan.start or "")
    files = [place / ADAPTER_FILE, place / WEIGHTS_FILE] if place.is_dir() else [place]
    for file in files:
        if file.is_file() and file.suffix == ".safetensors":
            return _from_file(plan, file, fingerprint)
    if (place / "stages").is_dir():
        folders = sorted((folder for folder in (place / "stages").iterdir() if re.match(r"[0-9]+-", folder.name)), key=lambda folder: int(folder.name.split("-")[0]))
    else:
        folders = [place]
    for folder in reversed(folders):
        passed_over: list[str] = []
        try:
            checkpoint = newest_checkpoint(folder, passed_over.append)
        except FormatError as error:
            raise ValueError(f"start: {error}; {error.cure}") from None
        if checkpoint is None or not checkpoint.state["finished"]:
            if passed_over:  # it may be the one that is meant
                raise ValueError(f"start: {passed_over[0].removeprefix('skipping a checkpoint: ')}; restore it, or name the folder of the stage to begin from")
            continue
        recorded = checkpoint.state["plan"]
        if recorded["fingerprint"] != fingerprint:
            raise ValueError(f"start: {folder} was trained on another model than the plan's")
        baton = read_baton(checkpoint)
        if baton.adapter is None:
            return Baton(baton.base, None, str(folder))
        trained = {name: Adapter(**settings) for name, settings in (checkpoint.state.get("adapters") or {DEFAULT: recorded["adapter"]}).items()}
        return Baton(baton.base, _at_the_plans_scale(plan, baton.adapter, trained, folder), str(folder))
    raise ValueError(f"start: {place} is neither a run's folder with a finished stage, nor a finished stage's folder, nor an adapter ({ADAPTER_FILE})")


def _at_the_plans_scale(plan: Plan, weights: Mapping[str, Tensor], trained: Mapping[str, Adapter], folder: Path) -> dict[str, Tensor]:
    """The pairs of a run under the names and at the scales of this plan's adapters. trained: the settings of the run's, by name."""
    wanted = placed_adapters(plan, -1)
    if not plan.adapters and len(trained) > 1:  # several, of which the plan knows one: what all of them add together
        one = joined([(of_adapter(weights, name), scale_of(settings)) for name, settings in trained.items()])
        rank = sum(settings.rank for settings in trained.values())
        weights, trained = one, {DEFAULT: Adapter().model_copy(update={"rank": rank, "alpha": float(rank)})}
    elif not plan.adapters:
        ((name, settings),) = trained.items()
        weights, trained = of_adapter(weights, name), {DEFAULT: settings}
    if unknown := sorted(trained.keys() - wanted.keys()):
        raise ValueError(f"start: {folder} has an adapter '{unknown[0]}', which the plan has not (adapters: {', '.join(wanted)}); add it")
    found: dict[str, Tensor] = {}
    for name, settings in trained.items():
        asked = wanted[name].settings
        own = "the adapter" if name == DEFAULT else f"adapter '{name}'"
        if (settings.variant == "dora") != (asked.variant == "dora"):
            raise ValueError(f"start: {own} of {folder} is of variant {settings.variant}, the plan asks for {asked.variant}; restore the variant")
        if settings.rank != asked.rank and plan.stages[0].handoff.adapter not in ("grow", "shrink", "merge"):
            cure = "" if plan.adapters else ", or let the first stage change it: handoff: {adapter: grow}, or shrink"
            raise ValueError(f"start: {own} of {folder} has rank {settings.rank}, the plan asks for {asked.rank}; restore the rank{cure}")
        factor = scale_of(settings) / wanted[name].scale
        found |= {saved_name(name, each): value for each, value in rescaled(of_adapter(weights, name), factor).items()}
    return found


def _from_file(plan: Plan, file: Path, fingerprint: str) -> Baton:
    """The pairs of a safetensors file.

    Their strength is what stands beside them says: `.alpha` tensors; alphas in the metadata, as diffusers writes them, or in peft's
    adapter_config.json; or nothing, then it is that of the product, as diffusers takes it. Medley's own files hold the scale in B and say alpha = rank.
    """
    try:
        with safe_open(file, framework="pt") as header:
            notes = header.metadata() or {}
        given = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"start: {file} is no safetensors file ({error})") from None
    if "medley.base" in notes:  # its run trained the model's own weights first
        if not _stands_on(plan.model, notes, fingerprint):
            raise ValueError(
                f"start: {file} belongs to the weights that its run had trained before it, and the plan's model has others, or is damaged; begin from the run's folder, or write `model:` with the trained model that the run published beside it"
            )
    elif notes.get("medley.model", fingerprint) != fingerprint:
        raise ValueError(f"start: {file} was trained on another model than the plan's")
    wanted = placed_adapters(plan, -1)
    if list(wanted) != [DEFAULT]:
        raise ValueError(f"start: {file} brings one adapter without a name, and the plan names its adapters ({', '.join(wanted)}); begin from a run's folder, or give the plan one `adapter`")
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in given.items():
        own = _plain(name)
        if own.endswith(".alpha"):
            alphas[own.removesuffix(".alpha")] = float(value)
        elif re.search(r"\.lora_[AB]\.weight$|\.lora_magnitude_vector$", own):
            weights[own] = value.float()
        else:
            raise ValueError(f"start: {file} holds '{name}'; what can be read is LAYER.lora_A.weight, LAYER.lora_B.weight and LAYER.alpha, named as diffusers names the layers")
    dora = any(name.endswith(".lora_magnitude_vector") for name in weights)
    if dora != (wanted[DEFAULT].settings.variant == "dora"):
        raise ValueError(f"start: {file} is {'a DoRA' if dora else 'no DoRA'}, the plan asks for variant {wanted[DEFAULT].settings.variant}; restore the variant")
    for layer in sorted({name.split(".lora_")[0] for name in weights}):
        for part in ("lora_A.weight", "lora_B.weight"):
            if f"{layer}.{part}" not in weights:
                raise ValueError(f"start: {file}: layer '{layer}' has no {part}")
    config = _config(file, notes)
    scales = {layer: _file_scale(layer, weights[f"{layer}.lora_A.weight"].shape[0], alphas, config, file) for layer in layers_of(weights)}
    return Baton(None, {name: value / (wanted[DEFAULT].scale / scales[name.split(".lora_")[0]]) if ".lora_B." in name else value for name, value in weights.items()}, str(file))


def _stands_on(model: str | Model, notes: Mapping[str, str], fingerprint: str) -> bool:
    """Whether the plan's model is the one that a run trained and published, of whose adapter these are the notes. Of a model on the Hub only that it is not the untrained one."""
    folder = Path(model.repo if isinstance(model, Model) else model)
    return is_made_from(folder, notes["medley.base"]) if folder.is_dir() else fingerprint != notes.get("medley.model")


def _plain(name: str) -> str:
    """A tensor's name without what trainers put around it: `base_model.model.`, `transformer.`, and the adapter's name (`lora_A.default.weight`)."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    name = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", name)
    return re.sub(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$", ".lora_magnitude_vector", name)


def _config(file: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """What peft calls the adapter's config, from the metadata or from the file beside; empty where there is none."""
    beside = file.with_name(CONFIG_FILE)
    text = notes.get("lora_adapter_metadata") or (beside.read_text(encoding="utf-8") if file.name == WEIGHTS_FILE and beside.is_file() else "{}")
    try:
        config: dict[str, Any] = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"start: {file}: its config is not JSON") from None
    return config


def _file_scale(layer: str, rank: int, alphas: Mapping[str, float], config: Mapping[str, Any], file: Path) -> float:
    """What a layer's product is multiplied by."""
    if layer in alphas:
        return alphas[layer] / rank
    alpha = config.get("lora_alpha", rank)
    try:
        for pattern, own in config.get("alpha_pattern", {}).items():  # peft takes the first that matches the name's end
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = own
                break
        return scale_of(Adapter(rank=rank, alpha=float(alpha), variant="rslora" if config.get("use_rslora") else "lora"))
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"start: {file}: its config cannot be understood ({str(error).splitlines()[0]})") from None
