"""Captions: which of a row's captions is learned from in an epoch, and what is done to it.

All of it follows from (seed, source, row, epoch): in whatever order rows are asked for, on whatever process, a row's caption is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixing.keys import key, uniform


@dataclass(frozen=True)
class CaptionRules:
    """What a plan's `captions` says; as it stands here, nothing is done to a caption."""

    trigger: str | None = None
    """Words put before the caption, with a comma between."""
    dropout: float = 0.0
    """How often the caption is left out, and with it the prompts of all regions, in [0, 1)."""
    shuffle_tags: bool = False
    """Whether the parts between commas change places."""
    keep_tags: int = 0
    """How many of the first parts stay where they are when tags are shuffled."""


def caption(prompts: Sequence[str], rules: CaptionRules, *, seed: int, source: str, row: str, epoch: int) -> str:
    """The caption of a row in an epoch, counted from 0.

    prompts: one or more captions of the same image. Each gets its turn before any comes again: once in every len(prompts) epochs, in an order
    keyed by row. Dropout gives "" and no trigger. Tags are stripped, empty ones dropped, and joined by ", ".
    """
    if is_dropped(rules, seed=seed, source=source, row=row, epoch=epoch):
        return ""
    chosen = prompts[_turn(len(prompts), seed, source, row, epoch)].strip()
    if not rules.shuffle_tags:
        return _with_trigger(chosen, rules.trigger)
    tags, trigger, kept = _tags(chosen), _words(rules.trigger), rules.keep_tags
    has_trigger = bool(trigger) and _starts_with(chosen, trigger)
    if has_trigger:
        kept = max(kept, len(_tags(trigger)))  # what the caption brings along in front stays there
    elif trigger:
        tags = [tag for tag in tags if tag != trigger]  # else it would stand in front and again among the others
    moved = sorted(range(kept, len(tags)), key=lambda place: (key(seed, "caption tag", source, row, epoch, place), place))
    in_front = [trigger] if trigger and not has_trigger else []
    return ", ".join([*in_front, *tags[:kept], *(tags[place] for place in moved)])


def entity_captions(prompts: Sequence[str], rules: CaptionRules, *, seed: int, source: str, row: str, epoch: int) -> tuple[str, ...]:
    """The prompts of a row's regions in an epoch: as they are, or all "" where its caption is left out. A trigger and the order of tags are the caption's alone."""
    return ("",) * len(prompts) if is_dropped(rules, seed=seed, source=source, row=row, epoch=epoch) else tuple(prompts)


def is_dropped(rules: CaptionRules, *, seed: int, source: str, row: str, epoch: int) -> bool:
    """Whether all words of a row are left out in an epoch."""
    return bool(rules.dropout and uniform(np.asarray([key(seed, "caption dropout", source, row, epoch)], dtype=np.uint64))[0] < rules.dropout)


def plain(prompts: Sequence[str], rules: CaptionRules) -> str:
    """The caption by which a row is evaluated: its first, with the trigger, nothing left out or shuffled."""
    return _with_trigger(prompts[0].strip(), rules.trigger)


def _turn(number: int, seed: int, source: str, row: str, epoch: int) -> int:
    """Which of a row's captions has its turn: a keyed order for every cycle of `number` epochs."""
    assert number > 0
    if number == 1:
        return 0
    cycle, place = divmod(epoch, number)
    return sorted(range(number), key=lambda each: (key(seed, "caption", source, row, cycle, each), each))[place]


def _tags(text: str) -> list[str]:
    return [tag for part in text.split(",") if (tag := part.strip())]


def _words(trigger: str | None) -> str:
    """A trigger without the space and commas around it, for a comma is put after it."""
    return (trigger or "").strip(" \t\r\n,")


def _starts_with(text: str, trigger: str) -> bool:
    """Whether a text begins with these words, and not with a longer one (`sks dogma` does not begin with `sks dog`)."""
    after = text[len(trigger) : len(trigger) + 1]
    return text.startswith(trigger) and not (trigger[-1].isalnum() and (after.isalnum() or after == "_"))


def _with_trigger(text: str, trigger: str | None) -> str:
    words = _words(trigger)
    if not words or _starts_with(text, words):
        return text
    return f"{words}, {text}" if text else words
