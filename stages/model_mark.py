"""The mark of a published model: from which checkpoint's weights it was made, and the hashes of its own."""

from __future__ import annotations

import json
from pathlib import Path

from stages.checkpoint import write_whole
from stages.digests import file_digest

_MARK = "medley.json"


def write_model_mark(model_folder: Path, weights: str) -> None:
    """Say of a model in its folder from which weights it was made, by their SHA-256 in a checkpoint, and what the files of its own weights hold."""
    write_whole(model_folder / _MARK, json.dumps({"checkpoint": weights, "sha256": {name: file_digest(path) for name, path in _files(model_folder).items()}}))


def is_made_from(model_folder: Path, weights: str) -> bool:
    """Whether a model is what Medley published of these weights, and the files of its own are all there and as they were written; they are read if the mark says so.

    A former version wrote how long they are, or nothing of them, and no hashes: then that is all that is asked of them.
    """
    try:
        said = json.loads((model_folder / _MARK).read_text(encoding="utf-8"))
        if not isinstance(said, dict) or said.get("checkpoint") != weights:
            return False
        files = _files(model_folder)
        if "sha256" in said:
            return bool(said["sha256"] == {name: file_digest(path) for name, path in files.items()})
        return said.get("bytes") in (None, {name: path.stat().st_size for name, path in files.items()})
    except (OSError, ValueError, RecursionError):
        return False


def _files(model_folder: Path) -> dict[str, Path]:
    return {path.relative_to(model_folder).as_posix(): path for path in sorted(model_folder.rglob("*.safetensors"))}
