"""Paths in a plan: where they lead, and what to say if they lead nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stages.problems import nearest, quoted


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
        with open(file, encoding="utf-8") as stream:
            value = json.load(stream)
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return value if isinstance(value, dict) else "is JSON, but not an object {...}"
