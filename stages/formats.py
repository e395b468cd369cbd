"""Formats: what each new format of checkpoints changed, and how the state of a former one is brought up to today's. Imports no torch.

A checkpoint carries the number of its format, in its manifest and in its state. Whatever is added to a state, and whatever the plan language gets that a state records, makes a new number,
an entry in `_UPGRADES` that says what former versions did in its place, and a frozen run of the former one (tests/frozen.py), which all later versions go on with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FORMAT = 3
"""1 kept no lanes, tokens and levels, and drew in another order. 2 had no guard against numbers that are none, evaluated a step before anything could stop it, and wrote logs in one part."""


class FormatError(ValueError):
    """A checkpoint of a format that this version does not read: whole, maybe, but it cannot be told."""

    def __init__(self, place: object, found: int) -> None:
        is_later = found > FORMAT
        super().__init__(f"{place}: written in format {found}, by {'a later' if is_later else 'an early'} version of Medley; this one reads {OLDEST} to {FORMAT}")
        self.cure = "update Medley" if is_later else "go on with the version that wrote it"


def _from_2(state: dict[str, Any]) -> dict[str, Any]:
    return {"guard": None, "to_evaluate": False, "metrics_part": 1, "trace_part": 1, **state}


_UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {2: _from_2}
"""By the format that each of them is for; it gives a state of the next."""

OLDEST = min(_UPGRADES)


def check_format(place: object, found: object) -> int:
    """The number of a format that is read. place: of the checkpoint. Raises FormatError if it is another, and ValueError if it is no number."""
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"{place}: its format is {found!r}, which is no number")
    if not OLDEST <= found <= FORMAT:
        raise FormatError(place, found)
    return found


def upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of any format that is read, as today's code would have written it. state: has "format"."""
    upgraded = dict(state)
    while (found := upgraded["format"]) < FORMAT:
        upgraded = {**_UPGRADES[found](upgraded), "format": found + 1}
    return upgraded
