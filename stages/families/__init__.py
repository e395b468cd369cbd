"""Families of transformers. Importing this package imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FAMILIES: Mapping[str, str] = MappingProxyType({"FluxPipeline": "flux", "FluxKontextPipeline": "flux"})
"""The class that a model's model_index.json names to the family that trains it."""
