"""Check of the model: what its folder says of its family, and what of the plan does not fit it. A Hub id is not looked up."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from stages.families import FAMILIES, FAMILY_TASKS
from stages.paths import missing, place_of, read_json
from stages.plan import Model
from stages.problems import Location, Problem, nearest, quoted, written
from stages.reader import ReadPlan


@dataclass(frozen=True)
class ModelFolder:
    """What the configs in a model's folder say."""

    pipeline: str
    """Class of the diffusers pipeline."""
    family: str
    pixel_multiple: int
    """Sides of images in pixels are multiples of this."""
    takes_guidance: bool
    text_tokens: int
    """Tokens of a prompt, padding included."""


class UnsuitableModel(ValueError):
    """A folder that holds no model that can be trained; the message says why."""


def model_problems(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """What is wrong with `model`, and what does not fit it; and `start`."""
    repo, location = _repo(read)
    if read.plan.start is not None and not os.path.exists(place_of(root, read.plan.start)):
        yield Problem(read.place("start"), "start", missing(root, read.plan.start))
    folder = place_of(root, repo)
    if not os.path.isdir(folder):
        if (message := _no_hub_id(root, repo)) is not None:
            yield Problem(read.place(*location), written(location), message)
        return
    if isinstance(read.plan.model, Model) and read.plan.model.revision is not None:
        place = read.name_place("model", "revision")
        yield Problem(place, "model.revision", f"{quoted(repo)} is a folder, and only the Hub has revisions; remove it")
    try:
        model = read_folder(folder)
    except UnsuitableModel as error:
        yield Problem(read.place(*location), written(location), f"{quoted(repo)} {error}")
        return
    if isinstance(read.plan.model, Model) and read.plan.model.guidance is not None and not model.takes_guidance:
        message = "this model's transformer takes no guidance (guidance_embeds is false); remove it"
        yield Problem(read.name_place("model", "guidance"), "model.guidance", message)
    for index, stage in enumerate(read.plan.stages):
        sides: dict[Location, int] = {("resolution",): stage.resolution} if isinstance(stage.resolution, int) else {}
        if isinstance(stage.resolution, list):
            sides |= {("resolution", number, "pixels"): level.pixels for number, level in enumerate(stage.resolution)}
        for location, side in sides.items():
            if side % model.pixel_multiple:
                below = side // model.pixel_multiple * model.pixel_multiple
                near = [str(size) for size in (below, below + model.pixel_multiple) if size]
                message = f"{side} is not a multiple of {model.pixel_multiple}, as {model.pipeline} needs; try {' or '.join(near)}"
                yield Problem(read.place("stages", index, *location), written(("stages", index, *location)), message)
    for name, source in read.plan.sources.items():
        if source.task not in FAMILY_TASKS[model.family]:
            message = f"{model.family} cannot train task '{source.task}' (it can: {', '.join(FAMILY_TASKS[model.family])}); remove source '{name}' or choose another model"
            yield Problem(read.place("sources", name, "task"), f"sources.{name}.task", message)


def model_notes(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """That a Hub id is not looked up."""
    repo, location = _repo(read)
    if not os.path.isdir(place_of(root, repo)) and _no_hub_id(root, repo) is None:
        message = f"no folder {quoted(repo)} here, so it is taken for a Hub id; the Hub was not asked"
        yield Problem(read.place(*location), written(location), message)


def read_folder(folder: str) -> ModelFolder:
    """What the configs of a folder in the diffusers layout say. Raises UnsuitableModel."""
    index = _config(folder, "model_index.json", "so it is no folder in the diffusers layout")
    pipeline = str(index.get("_class_name"))
    if pipeline not in FAMILIES:
        raise UnsuitableModel(f"is a {pipeline}; what can be trained is {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[pipeline]
    multiple, takes_guidance, text_tokens = _FAMILY_FACTS[family](folder, index)
    return ModelFolder(pipeline, family, multiple, takes_guidance, text_tokens)


def _flux(folder: str, index: Mapping[str, object]) -> tuple[int, bool, int]:
    """A token is 2 x 2 latents; a latent is as many pixels wide as the VAE halves its input, to the power of 2."""
    transformer = _config(folder, "transformer/config.json", "so there is nothing to train")
    vae = index.get("vae")
    halvings = 0
    if isinstance(vae, list) and vae and vae[0] is not None:
        channels = _config(folder, "vae/config.json", "which model_index.json promises").get("block_out_channels")
        if not isinstance(channels, list) or not channels:
            raise UnsuitableModel("has no list block_out_channels in vae/config.json")
        halvings = len(channels) - 1
    length = _config(folder, "tokenizer_2/tokenizer_config.json", "so it cannot read prompts").get("model_max_length", 512)
    return 2 * 2**halvings, bool(transformer.get("guidance_embeds")), min(512, int(length)) if isinstance(length, int | float) else 512


_FAMILY_FACTS: Mapping[str, Callable[[str, Mapping[str, object]], tuple[int, bool, int]]] = MappingProxyType({"flux": _flux})
"""Family to what gives a folder's pixel multiple, whether its transformer takes guidance, and the tokens of a prompt."""


def _config(folder: str, name: str, otherwise: str) -> Mapping[str, object]:
    file = os.path.join(folder, name)
    if not os.path.isfile(file):
        raise UnsuitableModel(f"has no {name}, {otherwise}")
    config = read_json(file)
    if isinstance(config, str):
        raise UnsuitableModel(f"has a {name} that {config}")
    return config


def _repo(read: ReadPlan) -> tuple[str, Location]:
    model = read.plan.model
    if isinstance(model, str):
        return model, ("model",)
    # `--set model.revision=...` over a bare name leaves the name's own place.
    return model.repo, ("model", "repo")


def _no_hub_id(root: Path, repo: str) -> str | None:
    """What to say of a name that is no folder and cannot be a Hub id either; None if it can be one."""
    first, _, second = repo.partition("/")
    if os.path.isfile(place_of(root, repo)):
        return f"{quoted(repo)} is a file; a model is a Hub id or a folder in the diffusers layout"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        return f"{missing(root, repo)}; a model is a Hub id, such as black-forest-labs/FLUX.1-dev, or a folder"
    if os.path.isdir(place_of(root, first)):
        hint = missing(root, repo)
        if nearest(second, os.listdir(place_of(root, first))):
            return hint
    return None
