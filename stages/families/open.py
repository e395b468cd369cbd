"""Open a model: find its family and load everything but the transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stages.digests import file_digest
from stages.families.base import Architecture
from stages.families.facts import PIPELINES
from stages.families.family import Family
from stages.families.flux import Flux
from stages.families.flux2 import Flux2
from stages.families.lumina2 import Lumina2
from stages.families.omnigen import OmniGen
from stages.families.pixart import PixArt
from stages.families.qwen_image import QwenImage
from stages.families.sana import Sana
from stages.families.sd3 import SD3
from stages.families.wan import Wan
from stages.families.z_image import ZImage
from stages.plan import Model

ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in (Flux(), Flux2(), Lumina2(), Sana(), OmniGen(), PixArt(), SD3(), Wan(), QwenImage(), ZImage())}
"""The families by name."""


class ModelError(ValueError):
    """The plan's model cannot be trained."""


def open_family(model: str | Model, device: torch.device, digest: Callable[[Path], str] = file_digest) -> Family:
    """The model's family; its frozen parts are loaded onto `device` when they are first used. digest: SHA-256 of a file of weights.

    Raises ModelError if Medley does not know the pipeline's class.
    """
    settings = model if isinstance(model, Model) else Model(repo=model)
    name = str(DiffusionPipeline.load_config(settings.repo, revision=settings.revision)["_class_name"])
    if name not in PIPELINES:
        raise ModelError(f"{settings.repo} is a {name}; Medley trains {', '.join(sorted(PIPELINES))}")
    return Family(ARCHITECTURES[PIPELINES[name]], settings.repo, settings.revision, settings.guidance, device, digest)


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
