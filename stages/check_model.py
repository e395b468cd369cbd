"""Check of the model: what its folder says of its family, and what of the plan does not fit it. A Hub id is not looked up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.check_computing import attention_problems
from stages.check_objectives import family_problems, known_problems, precision_notes
from stages.families.facts import DISTILLED, FAMILIES, KNOWN, PIPELINES, ModelSizes, UnsuitableModel, check_parts, tasks_of
from stages.hub.words import PREFIX
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
    sizes: ModelSizes
    experts: tuple[str, ...]
    """Transformers that share the noise levels among them; empty where there is one for all."""


def model_problems(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """What is wrong with `model`, and what does not fit it; and `start`."""
    repo, location = _repo(read)
    if read.plan.start is not None and not read.plan.start.startswith(PREFIX) and not os.path.exists(place_of(root, read.plan.start)):
        yield Problem(read.place("start"), "start", missing(root, read.plan.start))
    folder = place_of(root, repo)
    if not os.path.isdir(folder):
        if (message := _no_hub_id(root, repo)) is not None:
            yield Problem(read.place(*location), written(location), message)
        elif (pipeline := KNOWN.get(repo)) is not None:
            yield from _tasks(read, pipeline)
            yield from known_problems(read, PIPELINES[pipeline], pipeline)
            yield from attention_problems(read, PIPELINES[pipeline])
        return
    if isinstance(read.plan.model, Model) and read.plan.model.revision is not None:
        place = read.name_place("model", "revision")
        yield Problem(place, "model.revision", f"{quoted(repo)} is a folder, and only the Hub has revisions; remove it")
    try:
        model = read_folder(folder)
    except UnsuitableModel as error:
        yield Problem(read.place(*location), written(location), f"{quoted(repo)} {error}")
        return
    if isinstance(read.plan.model, Model) and read.plan.model.guidance is not None and not model.sizes.takes_guidance:
        message = "this model's transformer takes no guidance (guidance_embeds is false); remove it"
        yield Problem(read.name_place("model", "guidance"), "model.guidance", message)
    for index, stage in enumerate(read.plan.stages):
        sides: dict[Location, int] = {("resolution",): stage.resolution} if isinstance(stage.resolution, int) else {}
        if isinstance(stage.resolution, list):
            sides |= {("resolution", number, "pixels"): level.pixels for number, level in enumerate(stage.resolution)}
        for location, side in sides.items():
            if side % model.sizes.pixel_multiple:
                below = side // model.sizes.pixel_multiple * model.sizes.pixel_multiple
                near = [str(size) for size in (below, below + model.sizes.pixel_multiple) if size]
                message = f"{side} is not a multiple of {model.sizes.pixel_multiple}, as {model.pipeline} needs; try {' or '.join(near)}"
                yield Problem(read.place("stages", index, *location), written(("stages", index, *location)), message)
    yield from family_problems(read, model.family, model.pipeline, model.experts, model.sizes.pixel_multiple)
    yield from attention_problems(read, model.family)
    yield from _tasks(read, model.pipeline)


def _tasks(read: ReadPlan, pipeline: str) -> Iterator[Problem]:
    """Sources with a task that a model of this pipeline cannot be trained for."""
    for name, source in read.plan.sources.items():
        if source.task not in (can := tasks_of(pipeline)):
            message = f"{PIPELINES[pipeline]} cannot train task '{source.task}' (it can: {', '.join(can)}); remove source '{name}' or choose another model"
            yield Problem(read.place("sources", name, "task"), f"sources.{name}.task", message)


def model_notes(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """That a Hub id is not looked up, and what is known of the model's family in the precisions that are asked for."""
    repo, location = _repo(read)
    if os.path.isdir(folder := place_of(root, repo)):
        yield from precision_notes(read, read_folder(folder).family)
    if not os.path.isdir(place_of(root, repo)) and _no_hub_id(root, repo) is None:
        message = f"no folder {quoted(repo)} here, so it is taken for a Hub id; the Hub was not asked"
        yield Problem(read.place(*location), written(location), message)
        if repo in DISTILLED:
            message = f"{quoted(repo)} is distilled to sample in few steps, and training takes that from it; train the model that it was made of (docs/families.md)"
            yield Problem(read.place(*location), written(location), message)
        if (pipeline := KNOWN.get(repo)) is not None:
            yield from precision_notes(read, PIPELINES[pipeline])


def read_folder(folder: str) -> ModelFolder:
    """What the configs of a folder in the diffusers layout say. Raises UnsuitableModel."""
    index = _config(folder, "model_index.json", "so it is no folder in the diffusers layout")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise UnsuitableModel(f"is a {pipeline}; what can be trained is {', '.join(sorted(PIPELINES))}")
    check_parts(index)
    family = PIPELINES[pipeline]
    facts, second = FAMILIES[family], index.get("transformer_2")
    has_second = isinstance(second, list) and bool(second) and second[0] is not None
    return ModelFolder(pipeline, family, facts.sizes(lambda name, otherwise: _config(folder, name, otherwise)), facts.experts if has_second else ())


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
