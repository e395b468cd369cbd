"""Headers of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from stages.problems import RunError


def sort_header(path: Path) -> None:
    """Put a safetensors file's metadata in order: the library (0.8) writes it in another order each time, and equal runs must end in equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RunError(f"{path}: its header cannot be put in order")
        file.seek(8)
        file.write(text.ljust(length))
