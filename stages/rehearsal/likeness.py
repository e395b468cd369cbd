"""Likeness: which pipeline the plan's model is, and a tiny random model of the same class in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stages.families.facts import KNOWN, PIPELINES
from stages.hub.reach import SECONDS, hub_answers
from stages.paths import place_of, read_json
from stages.plan import Model, Plan
from stages.problems import PlanError, nearest, quoted

LARGEST_OWN = 64 * 2**20
"""Bytes: a model in a folder of at most so many is rehearsed with itself."""

_CONFIGS = ("model_index.json", "transformer/config.json")

Config = Mapping[str, object]


@dataclass(frozen=True)
class Likeness:
    """What is known of the plan's model, as far as a tiny one can be made like it."""

    repo: str
    pipeline: str
    """Class of the diffusers pipeline."""
    source: str
    """How the class was found out, in words."""
    index: Config = field(default_factory=dict)
    """model_index.json, as far as it could be had."""
    transformer: Config = field(default_factory=dict)
    """transformer/config.json, as far as it could be had."""
    own: Path | None = None
    """The model's own folder, where it is small enough to be used itself."""

    @property
    def family(self) -> str:
        """The family that trains it."""
        return PIPELINES[self.pipeline]


def likeness_of(model: str | Model, root: Path) -> Likeness:
    """Find out the pipeline's class of a plan's model: from its folder, from the Hub (or what of it lies here), or by its name.

    root: the folder that relative paths start from. Raises PlanError if that is not known, or is none that can be trained.
    """
    settings = model if isinstance(model, Model) else Model(repo=model)
    place = Path(place_of(root, settings.repo))
    if place.is_dir():
        configs = [_of_folder(place, name) for name in _CONFIGS]
        found = "its folder"
    else:
        configs = [_of_hub(settings, name) for name in _CONFIGS[:1]]
        configs += [_of_hub(settings, name) for name in _CONFIGS[1:]] if configs[0] else [{}]
        found = "the Hub"
    index, transformer = configs
    pipeline = str(index.get("_class_name", ""))
    if not index and settings.repo in KNOWN:
        pipeline, found = KNOWN[settings.repo], "its name (the Hub could not be asked)"
    elif not index and not place.is_dir():
        cure = "type the command where the Hub can be reached, or give `model` a folder in the diffusers layout"
        raise PlanError.at("model", f"{quoted(settings.repo)} is no folder here, the Hub says nothing of it, and it is none of the models known by name{nearest(settings.repo, KNOWN)}; {cure}")
    if pipeline not in PIPELINES:
        what = f"is a {pipeline}" if pipeline else "has no model_index.json that names a pipeline"
        raise PlanError.at("model", f"{quoted(settings.repo)} {what}; what can be trained is {', '.join(sorted(PIPELINES))}")
    own = place if place.is_dir() and _bytes_below(place) <= LARGEST_OWN else None
    return Likeness(settings.repo, pipeline, found, index, transformer, own)


def build_likeness(likeness: Likeness, plan: Plan, folder: Path) -> Path:
    """Build the tiny model, or take the plan's own where it is small; returns its folder."""
    if likeness.own is not None:
        return likeness.own
    from stages.families.tiny import flux, flux2, lumina2, omnigen, pixart, qwen_image, sana, sd3, wan, z_image  # takes seconds

    pipeline, name, transformer = likeness.pipeline, likeness.repo.lower(), likeness.transformer
    asked = plan.model.guidance is not None if isinstance(plan.model, Model) else False
    match likeness.family:
        case "flux":
            guided = asked or bool(transformer.get("guidance_embeds", "schnell" not in name))
            return flux.build(folder, guidance=guided, pipeline=pipeline, pixels="vae" not in likeness.index if likeness.index else False)
        case "flux2":
            return flux2.build(folder, klein=pipeline == "Flux2KleinPipeline")
        case "lumina2":
            return lumina2.build(folder)
        case "omnigen":
            return omnigen.build(folder)
        case "pixart":
            return pixart.build(folder, alpha=pipeline == "PixArtAlphaPipeline")
        case "qwen_image":
            return qwen_image.build(folder, pipeline=pipeline, clean_references=bool(transformer.get("zero_cond_t", "2511" in name)))
        case "sana":
            return sana.build(folder, query_norm=bool(transformer.get("qk_norm", "sana1.5" in name)))
        case "sd3":
            return sd3.build(folder, later=bool(transformer.get("qk_norm", "3.5" in name)))
        case "wan":
            second = likeness.index.get("transformer_2")
            has_second = isinstance(second, list) and bool(second) and second[0] is not None
            experts = has_second or "a14b" in name or any(stage.expert is not None for stage in plan.stages)
            return wan.build(folder, experts=experts, five_b=bool(likeness.index.get("expand_timesteps", "5b" in name)))
        case "z_image":
            return z_image.build(folder)
        case family:
            raise PlanError.at("model", f"no tiny model of family {family} can be made")


def _of_folder(folder: Path, name: str) -> Config:
    file = folder / name
    if not file.is_file():
        return {}
    config = read_json(str(file))
    if isinstance(config, str):
        raise PlanError.at("model", f"{file} {config}")
    return config


def _of_hub(model: Model, name: str) -> Config:
    """A model's JSON file as it lies here from an earlier time, or from the Hub; empty if neither can be had."""
    from huggingface_hub import hf_hub_download

    for is_here in (True, False):
        if not is_here and not hub_answers():
            break
        try:
            file = hf_hub_download(model.repo, name, revision=model.revision, etag_timeout=SECONDS, local_files_only=is_here)
        except (OSError, ValueError):  # not here; gated, no such model, no such name
            continue
        config = read_json(file)
        return {} if isinstance(config, str) else config
    return {}


def _bytes_below(folder: Path) -> int:
    """The bytes of a folder's files, counted up to a little more than matters."""
    total = 0
    for above, _, files in os.walk(folder):
        total += sum((Path(above) / name).stat().st_size for name in files if (Path(above) / name).is_file())
        if total > LARGEST_OWN:
            break
    return total
