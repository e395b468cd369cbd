"""Open a model: find its family and load everything but the transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stages.digests import file_digest
from stages.families.base import Architecture
from stages.families.facts import PIPELINES, UnsuitableModel, check_named, check_parts
from stages.families.family import Family
from stages.hub.reach import hub_answers
from stages.plan import Model
from stages.problems import PlanError

_CLASSES = {
    "flux": "Flux",
    "flux2": "Flux2",
    "lumina2": "Lumina2",
    "sana": "Sana",
    "omnigen": "OmniGen",
    "pixart": "PixArt",
    "sd3": "SD3",
    "wan": "Wan",
    "qwen_image": "QwenImage",
    "z_image": "ZImage",
}
"""Of each family's file."""


class _Architectures(Mapping[str, Architecture]):
    """A family's file is imported once it is asked for: all of them bring 20 MB of pipelines along."""

    def __getitem__(self, name: str) -> Architecture:
        made: Architecture = getattr(import_module(f"stages.families.{name}"), _CLASSES[name])()
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


ARCHITECTURES: Mapping[str, Architecture] = _Architectures()
"""The families by name."""


class ModelError(PlanError):
    """The plan's model cannot be had, or cannot be trained."""


def open_family(model: str | Model, device: torch.device, digest: Callable[[Path], str] = file_digest) -> Family:
    """The model's family; its frozen parts are loaded onto `device` when they are first used. digest: SHA-256 of a file of weights.

    Raises ModelError if its configs cannot be had, if Medley does not know the pipeline's class, or if one of its parts is code of its own.
    """
    settings = model if isinstance(model, Model) else Model(repo=model)
    try:
        is_away = not Path(settings.repo).is_dir() and not hub_answers()
        index = DiffusionPipeline.load_config(settings.repo, revision=settings.revision, local_files_only=is_away)
        check_parts(index)
        check_named(index)
        name = str(index["_class_name"])
        if name not in PIPELINES:
            raise UnsuitableModel(f"is a {name}; Medley trains {', '.join(sorted(PIPELINES))}")
        return Family(ARCHITECTURES[PIPELINES[name]], settings.repo, settings.revision, settings.guidance, device, digest)
    except OSError as error:
        raise ModelError.at("model", f"{settings.repo}: its configs cannot be had: {' '.join(str(error).split())[:300]}") from None
    except UnsuitableModel as error:
        raise ModelError.at("model", f"{settings.repo} {str(error).removeprefix(f'{settings.repo} ')}") from None


def fingerprint(model: str | Model) -> str:
    """What a model is told apart by: of a folder, the names and sizes of its files and the bytes of those below 64 MiB; of a Hub id, id and revision."""
    settings = model if isinstance(model, Model) else Model(repo=model)
    folder = Path(settings.repo)
    if not folder.is_dir():
        return f"{settings.repo}@{settings.revision or 'main'}"
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(json.dumps([path.relative_to(folder).as_posix(), size]).encode())
        if size < 64 * 2**20:
            digest.update(path.read_bytes())
    return digest.hexdigest()
