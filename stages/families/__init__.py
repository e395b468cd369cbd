"""Families of transformers. Importing this package imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FAMILY_TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType({"flux": ("text_to_image", "subject", "control", "edit", "other")})
"""Family to the tasks that it can train."""

FAMILIES: Mapping[str, str] = MappingProxyType({"FluxPipeline": "flux", "FluxKontextPipeline": "flux"})
"""The class that a model's model_index.json names to the family that trains it."""
