"""Metrics: what models that know nothing of this run see in images and captions. Every metric is a comparison of two directions.

clip_score: 100 max(cos, 0) of CLIP's embeddings of an image and a caption. Source: Hessel et al. 2021, arXiv:2104.08718, without its factor of 2.5, as it is mostly told.
dino_similarity: the cosine of DINOv2's class tokens of two images. Source: Ruiz et al. 2023, arXiv:2208.12242, which looks with DINO.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from stages.check_metrics import KINDS
from stages.paths import place_of
from stages.plan import MetricName, Plan
from stages.problems import PlanError, quoted
from stages.resolved import metric_models


@dataclass(frozen=True)
class Sampled:
    """What was sampled of some rows, all of one source."""

    prompts: Sequence[str]
    samples: Sequence[Image.Image]
    targets: Sequence[Image.Image]
    again: Sequence[Image.Image]
    """The targets encoded and decoded, which is the most like them that a sample can be."""
    references: Sequence[Image.Image] | None
    """The first of each row, where it is the subject; then samples are compared with it."""


@dataclass(frozen=True)
class Directions:
    """What a metric sees in some rows, float32 [rows, d] each, of length 1."""

    of_sample: Tensor
    of_other: Tensor
    """What the sample is compared with."""
    of_real: Tensor
    """In the sample's place, what is real."""


class Metric(Protocol):
    """One way to look at samples."""

    @property
    def model(self) -> nn.Module:
        """What it looks with; images and captions are sent to where it is."""

    def look(self, sampled: Sampled) -> Directions:
        """What it sees in some rows."""

    def score(self, one: Tensor, other: Tensor) -> Tensor:
        """The score of each pair of directions, [rows]."""


@dataclass(frozen=True)
class ClipScore:
    """How well an image fits a caption."""

    model: Any
    processor: Any
    tokenizer: Any

    def look(self, sampled: Sampled) -> Directions:
        """Samples against captions; real are the targets."""
        model, device = self.model, self.model.device
        texts = self.tokenizer(list(sampled.prompts), padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors="pt").to(device)
        captions = model.get_text_features(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).pooler_output
        samples, real = (model.get_image_features(pixel_values=_pixels(self.processor, images, device)).pooler_output for images in (sampled.samples, sampled.targets))
        return Directions(_unit(samples), _unit(captions), _unit(real))

    def score(self, one: Tensor, other: Tensor) -> Tensor:
        """In [0, 100]."""
        return 100 * (one * other).sum(dim=-1).clamp(min=0)


@dataclass(frozen=True)
class DinoSimilarity:
    """How like an image is to another."""

    model: Any
    processor: Any

    def look(self, sampled: Sampled) -> Directions:
        """Samples against the subject's reference, real being the target; else against the target, real being what encoding leaves of it."""
        model, device = self.model, self.model.device
        others, real = (sampled.targets, sampled.again) if sampled.references is None else (sampled.references, sampled.targets)
        seen = [_unit(model(pixel_values=_pixels(self.processor, images, device)).pooler_output) for images in (sampled.samples, others, real)]
        return Directions(*seen)

    def score(self, one: Tensor, other: Tensor) -> Tensor:
        """In [-1, 1]."""
        return (one * other).sum(dim=-1)


def _pixels(processor: Any, images: Sequence[Image.Image], device: torch.device) -> Tensor:
    pixels: Tensor = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    return pixels.to(device)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


def open_metrics(plan: Plan, root: Path) -> dict[MetricName, Metric]:
    """The metrics that a plan asks for, their models in float32 on the CPU. root: the folder that relative paths start from. Raises PlanError where a model cannot be opened, or is of another kind."""
    metrics: dict[MetricName, Metric] = {}
    for name, model in metric_models(plan).items():
        folder = place_of(root, model)
        source = folder if os.path.isdir(folder) else model
        try:
            kind = AutoConfig.from_pretrained(source).model_type
            if kind not in KINDS[name]:
                raise ValueError(f"is of kind '{kind}', and {name} looks with {' or '.join(KINDS[name])}")
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")  # the other backend wants torchvision
            opened = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
            metrics[name] = ClipScore(opened, processor, AutoTokenizer.from_pretrained(source)) if name == "clip_score" else DinoSimilarity(opened, processor)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise PlanError.at("evaluate.metrics", f"{name} cannot look with {quoted(model)}: {reason}") from None
    return metrics
