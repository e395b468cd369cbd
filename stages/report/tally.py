"""Tallies: what the ledger says of each source, of each resolution, and of how rows were chosen. Tolerant, as `stages.report.record` is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from stages.report.values import Event, finite, mapping, numbers, text


@dataclass(frozen=True)
class Tally:
    """What the ledger says about one source in one stage."""

    asked: float | None
    drawn: float | None
    images: float | None
    tokens: float | None
    epochs: float | None
    unique_rows: float | None
    dropped: Mapping[str, float]


def read_pages(content: str) -> dict[str, Event]:
    """The ledger's pages, by stage. content: that of ledger.json; empty if there is none."""
    try:
        stages = mapping(json.loads(content or "{}")).get("stages")
    except (ValueError, RecursionError):
        return {}
    return {text(mapping(item).get("stage")): mapping(item) for item in (stages if isinstance(stages, list) else [])}


def levels(page: Event) -> dict[str, Tally]:
    """What each resolution of a stage gave, where it has several."""
    found = page.get("levels")
    return {
        f"{finite(level.get('pixels')) or 0:.0f} px": Tally(finite(level.get("asked")), finite(level.get("drawn")), finite(level.get("images")), None, None, None, {})
        for level in map(mapping, found if isinstance(found, list) else [])
    }


def selections(page: Event) -> dict[str, Event]:
    """How the rows of a source were chosen, where some were left out."""
    return {name: chosen for name, value in mapping(page.get("sources")).items() if (chosen := mapping(mapping(value).get("selection")))}


def tallies(pages: Mapping[str, Event]) -> dict[str, dict[str, Tally]]:
    """What each source gave, by stage and source."""
    ledger: dict[str, dict[str, Tally]] = {}
    for name_of_stage, stage in pages.items():
        ledger[name_of_stage] = {
            name: Tally(
                asked=finite((source := mapping(value)).get("asked")),
                drawn=finite(source.get("drawn")),
                images=finite(source.get("images")),
                tokens=finite(source.get("tokens")),
                epochs=finite(source.get("epochs")),
                unique_rows=finite(source.get("unique_rows")),
                dropped=numbers(source.get("dropped")),
            )
            for name, value in mapping(stage.get("sources")).items()
        }
    return ledger
