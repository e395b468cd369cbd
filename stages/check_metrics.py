"""Check of `evaluate.metrics`: whether the models that metrics look with are of their kind, by the configs in their folders. The Hub is not asked, and torch not imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from stages.paths import missing, place_of, read_json
from stages.plan import MetricName
from stages.problems import Location, Problem, quoted, written
from stages.reader import ReadPlan
from stages.resolved import metric_models

KINDS: Mapping[MetricName, tuple[str, ...]] = {"clip_score": ("clip",), "dino_similarity": ("dinov2", "dinov2_with_registers")}
"""The kinds of models, as transformers names them, that a metric can look with."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "vocab.json")


def metric_problems(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """What is wrong with the metrics that the plan asks for."""
    asked, location = read.plan.evaluate.metrics, ("evaluate", "metrics")
    if isinstance(asked, list):
        for place, name in enumerate(asked):
            if name in asked[:place]:
                yield Problem(read.place(*location, place), written((*location, place)), f"{quoted(name)} stands there twice; name it once")
    for name, model in metric_models(read.plan).items():
        if (message := _wrong(name, model, root)) is not None:
            where = _where(read, name)
            yield Problem(read.place(*where), written(where), message)


def metric_notes(read: ReadPlan, root: Path) -> Iterator[Problem]:
    """That models on the Hub are not looked up."""
    for name, model in metric_models(read.plan).items():
        if _wrong(name, model, root) is None and not os.path.isdir(place_of(root, model)):
            where = _where(read, name)
            yield Problem(read.place(*where), written(where), f"{name} looks with {quoted(model)}, which is taken for a Hub id; the Hub was not asked")


def _where(read: ReadPlan, name: MetricName) -> Location:
    asked = read.plan.evaluate.metrics
    return ("evaluate", "metrics", asked.index(name)) if isinstance(asked, list) else ("evaluate", "metrics", name, "model")


def _wrong(name: MetricName, model: str, root: Path) -> str | None:
    """Why a metric cannot look with a model; None if it can, or if that is for the Hub to say."""
    folder, kinds = place_of(root, model), " or ".join(KINDS[name])
    if not os.path.isdir(folder):
        return None if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) else f"{missing(root, model)}; {name} looks with a Hub id or a folder of kind {kinds}"
    if not os.path.isfile(file := os.path.join(folder, "config.json")):
        return f"{quoted(model)} has no config.json; {name} looks with a folder as `save_pretrained` writes it, of kind {kinds}"
    config = read_json(file)
    if isinstance(config, str):
        return f"{quoted(model)} has a config.json that {config}"
    if config.get("model_type") not in KINDS[name]:
        return f"{quoted(model)} is of kind {quoted(str(config.get('model_type')))}, and {name} looks with {kinds}"
    lacks = [names for names in (_WEIGHTS, ("preprocessor_config.json",), *([_TOKENIZERS] if name == "clip_score" else [])) if not any(os.path.isfile(os.path.join(folder, each)) for each in names)]
    return f"{quoted(model)} has no {' or '.join(lacks[0])}; save the model, its image processor and its tokenizer there" if lacks else None
