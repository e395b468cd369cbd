"""OmniGenPipeline without torchvision, which diffusers 0.42.1 needs for four of its functions and Medley does not require.

Where torchvision is not installed, diffusers leaves OmniGenMultiModalProcessor out of pipelines/omnigen/pipeline_omnigen.py (line 30), and the pipeline
cannot even be made, not for its tokenizer alone. `complete` puts it there, with those four functions. It changes nothing where torchvision is installed;
test_the_processor_is_still_missing_without_torchvision fails once diffusers no longer needs this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Compose:
    """One function after the other."""

    transforms: Sequence[Callable[[Any], Any]]

    def __call__(self, image: Any) -> Any:
        """What the last one gives."""
        for transform in self.transforms:
            image = transform(image)
        return image


@dataclass(frozen=True)
class Lambda:
    """A function."""

    lambd: Callable[[Any], Any]

    def __call__(self, image: Any) -> Any:
        """What it gives."""
        return self.lambd(image)


@dataclass(frozen=True)
class ToTensor:
    """An image as numbers."""

    def __call__(self, image: Image.Image) -> Tensor:
        """float32 [3, H, W] in [0, 1] of an image of 8 bits in RGB."""
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 255


@dataclass(frozen=True)
class Normalize:
    """Numbers less their mean, over their deviation."""

    mean: Sequence[float]
    std: Sequence[float]
    inplace: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        """float32 [C, H, W]."""
        return (image - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)


def complete(pipeline: Any = pipeline_omnigen, processor: Any = processor_omnigen) -> None:
    """Give diffusers' module of the pipeline its processor, and the processor's its functions, if they lack them."""
    if not hasattr(pipeline, "OmniGenMultiModalProcessor"):
        processor.transforms = SimpleNamespace(Compose=Compose, Lambda=Lambda, ToTensor=ToTensor, Normalize=Normalize)
        pipeline.OmniGenMultiModalProcessor = processor.OmniGenMultiModalProcessor
