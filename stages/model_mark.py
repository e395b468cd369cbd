"""The mark of a published model: from which checkpoint's weights it was made."""

from __future__ import annotations

import json
from pathlib import Path

from stages.checkpoint import write_whole

_MARK = "medley.json"


def write_model_mark(model_folder: Path, weights: str) -> None:
    """Say of a model in its folder from which weights it was made, by their SHA-256 in a checkpoint."""
    write_whole(model_folder / _MARK, json.dumps({"checkpoint": weights, "bytes": _bytes(model_folder)}))


def model_mark(model_folder: Path) -> str | None:
    """What was said of a model; None of one that Medley did not publish, whose mark cannot be read, or whose files of weights are not as long as they were."""
    try:
        said = json.loads((model_folder / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("checkpoint"), str):
        return None
    return said["checkpoint"] if said.get("bytes") in (None, _bytes(model_folder)) else None


def _bytes(model_folder: Path) -> dict[str, int]:
    """How long each file of weights is: enough to see that one is missing or cut, and no hash, which would read a large model at every launch."""
    return {path.relative_to(model_folder).as_posix(): path.stat().st_size for path in sorted(model_folder.rglob("*.safetensors"))}
