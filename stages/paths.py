"""Paths in a plan: where they lead, and what to say if they lead nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mixing.plain_file import open_plain
from stages.problems import nearest, quoted

_MOST_JSON = 64 * 2**20  # bytes of a .json that is read as a whole; what describes a model or a dataset has a few thousand


def place_of(root: Path, path: str) -> str:
    """Where a path of a plan leads; `~` is the user's folder."""
    return os.path.join(root, os.path.expanduser(path))


def missing(root: Path, path: str) -> str:
    """That nothing lies where a path leads: the first part of it that does not exist, and what stands in its place."""
    above, part = os.path.split(place_of(root, path).rstrip("/"))
    while part and above and not os.path.isdir(above):
        above, part = os.path.split(above)
    try:
        beside = os.listdir(above)
    except OSError:
        beside = []
    wrong = "" if part == os.path.basename(path.rstrip("/")) else f": no {quoted(part)} there"
    return f"{quoted(path)} does not exist{wrong}{nearest(part, beside)}"


def read_json(file: str) -> dict[str, object] | str:
    """The JSON object in a file, or what is wrong with it."""
    try:
        with open_plain(file) as stream:
            content = stream.read(_MOST_JSON + 1)
        if len(content) > _MOST_JSON:
            return f"is larger than {_MOST_JSON // 2**20} MiB"
        value = json.loads(content.decode("utf-8"))
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return value if isinstance(value, dict) else "is JSON, but not an object {...}"
