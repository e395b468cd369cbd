"""Qwen2VLProcessor without torchvision, which Medley does not require: transformers 5.23 cannot make it without a video processor, nor that without torchvision.

Qwen-Image-Edit shows its text encoder images and no videos. Where torchvision is not installed, `leave_out_videos` takes the video processor out of what a
Qwen2VLProcessor is made of, and transformers scales the images with Pillow. It changes nothing where torchvision is installed;
test_the_processor_still_needs_torchvision fails once transformers no longer needs this.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor
from transformers.utils import is_torchvision_available


def _parts(cls: Any) -> list[str]:
    """What a processor is made of, in the order of its arguments."""
    return ["image_processor", "tokenizer"]


def leave_out_videos(processor: Any = Qwen2VLProcessor) -> None:
    """Make a class of processors do without videos, if it has to."""
    if not is_torchvision_available():
        processor.get_attributes = classmethod(_parts)
