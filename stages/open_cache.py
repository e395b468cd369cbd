"""Open the cache of what a family has encoded."""

from __future__ import annotations

from pathlib import Path

from stages.cache import Cache
from stages.families.family import Family
from stages.plan import Cache as Asked
from stages.problems import PlanError
from stages.resolved import in_bytes


def open_cache(folder: Path, family: Family, asked: Asked, writer: str) -> Cache:
    """What is kept of a family's encodings. Raises PlanError if the folder cannot be made, or the limit leaves no room."""
    limit = None if asked.limit is None else in_bytes(asked.limit)
    if limit == 0:
        raise PlanError.at("cache.limit", f"'{asked.limit}' is less than a byte; give more, or say cache: none to keep nothing")
    try:
        return Cache(folder, latents_identity=family.latents_identity, text_identity=family.text_identity, limit_bytes=limit, writer=writer)
    except OSError as error:
        raise PlanError.at("cache.folder", f"{folder} cannot be used: {error.strerror or error}; name a folder that can be written, or say cache: none") from None
