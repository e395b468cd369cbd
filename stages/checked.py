"""Checked: JSON objects on disk that say by a checksum whether they are as they were written. Imports no torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHECK = "crc32"


class DamagedError(ValueError):
    """A file that is there, and is not what was written."""


def checked(value: Mapping[str, Any]) -> str:
    """The text of an object, with its checksum."""
    text = json.dumps(value)
    return f'{text[:-1]}{", " if value else ""}"{_CHECK}": "{zlib.crc32(text.encode()):08x}"}}'


def read_checked(file: Path) -> dict[str, Any] | None:
    """The object that a file holds; None if there is no such file. One without a checksum, as former versions wrote them, is believed.

    Raises DamagedError, naming the file, if it cannot be read, holds no object, or another one than was written.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} cannot be read ({error})") from None
    if found is None:  # so a former version wrote an empty one
        return {}
    if not isinstance(found, dict):
        raise DamagedError(f"{file} holds no JSON object")
    said = found.pop(_CHECK, None)
    if said is not None and said != f"{zlib.crc32(json.dumps(found).encode()):08x}":
        raise DamagedError(f"{file} is not what was written (its checksum differs)")
    return found


def ignore(message: str) -> None:
    """For a reader that has nobody to tell."""
