"""Suggestion: what the next stage could draw, from how the held-out losses of the last one moved. A rule of thumb, and a pure function of a run folder.

It reads the later half of a stage, paired row by row: what a source gained is the fall of its loss, in absolute numbers, since the level of a flow-matching loss
says how noisy a task is and not how much is left to learn; its gain per draw is that fall over the root of its part of the images, the credit that ADO gives
(Jiang et al. 2024, arXiv:2410.11820), for some of it came from the other sources' draws. A share moves only where a source's gain per draw differs
from the mean one by more than three standard errors, and by no more than a factor of 1.5. Every source counts alike, whatever its share: what should
count more is for the user to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mixing.adaptive import Rule, projected
from stages.evaluations import Rows, paired_rows, read_rows, rows_file
from stages.report.paired import images_at, mean_change
from stages.report.record import Change, Evaluation, Record, StageRecord
from stages.report.values import mapping, numbers, text, whole

BAND = 1.5
"""By which factor a share is moved at most."""
_SURE = 3.0  # standard errors, as everywhere in a report
_LEAST_PART = 0.02  # of the images: a source that was drawn less has no more credit for its gain
_TOLERANCE = 0.1  # relative rise of a loss above its lowest that is let pass
_MANY_EPOCHS = 10.0  # after which a rising loss is overfitting
_RETURNING = 0.05  # share of a source that was not drawn and got clearly worse

Word = Literal["more", "less", "keep", "none"]
WORDS: Mapping[Word, str] = MappingProxyType({"more": "more", "less": "less", "keep": "keep", "none": "–"})


@dataclass(frozen=True)
class Suggestion:
    """What the next stage could draw of one source."""

    source: str
    share: float
    """That of the stage looked at; 0 if it was not drawn."""
    images: float
    """Drawn of it between the two evaluations."""
    moved: Change | None
    """Its held-out loss between them, below 0 if it fell; None if it has not two rows that both measured."""
    word: Word
    """Of its share; `none` if it was not drawn, and need not be."""
    suggested: float
    why: str

    @property
    def per_thousand(self) -> Change | None:
        """How far the loss moved for each thousand images drawn of the source; None where none was."""
        return Change(self.moved.value * 1000 / self.images, self.moved.error * 1000 / self.images) if self.moved and self.images >= 1 else None


@dataclass(frozen=True)
class Advice:
    """What the next stage could draw."""

    stage: str
    """The one that was looked at: the last with two evaluations."""
    first: int
    """The step of the earlier evaluation that was compared, and of the later one."""
    last: int
    suggestions: tuple[Suggestion, ...]
    verdict: str
    """In a sentence, what there is to go by."""
    planned: str
    """The stage of the plan that comes next, and what it asks for; empty if there is none."""

    @property
    def moves(self) -> bool:
        """Whether any share is moved."""
        return any(each.word in ("more", "less") for each in self.suggestions)

    @property
    def line(self) -> str:
        """The line of YAML to paste."""
        digits = 2 if self.moves else 6
        shares = {each.source: 100 * each.suggested for each in self.suggestions if each.suggested > 0}
        return "mix: {" + ", ".join(f"{name}: {share:.0f}" if digits == 2 and share >= 10 else f"{name}: {share:.{digits}g}" for name, share in shares.items()) + "}"


def advice_of(record: Record) -> Advice | None:
    """What a run's next stage could draw; None where nothing was measured twice inside a stage."""
    for stage in reversed(record.begun):
        window = _window(record, stage)
        if window is not None:
            return _advised(record, stage, *window)
    return None


def _window(record: Record, stage: StageRecord) -> tuple[Evaluation, Rows, Evaluation, Rows] | None:
    """The two evaluations of a stage that are compared, with their rows: its last one, and the latest that stands in its first half and after the warm-up; else the earliest one after it, else its first."""
    files = {evaluation.step: rows_file(record.folder, stage.index - 1, stage.name, None if evaluation.kind == "start" else evaluation.step) for evaluation in stage.evaluations}
    found = [evaluation for evaluation in stage.evaluations if evaluation.sources and files[evaluation.step].is_file()]
    if len(found) < 2:
        return None
    *earlier, last = found
    warmup = whole(mapping(stage.plan.get("lr")).get("warmup"))
    warm = [evaluation for evaluation in earlier if evaluation.step >= max(warmup, 1)]
    halves = [evaluation for evaluation in warm if evaluation.step <= last.step / 2]
    first = halves[-1] if halves else warm[0] if warm else earlier[0]
    rows = [read_rows(files[evaluation.step]) for evaluation in (first, last)]
    return None if rows[0] is None or rows[1] is None else (first, rows[0], last, rows[1])


@dataclass(frozen=True)
class _Seen:
    """A source between the two evaluations."""

    share: float
    images: float
    part: float
    """Of all images drawn, at least a fiftieth."""
    moved: Change
    now: float
    """Its loss."""
    lowest: float
    """The lowest that its stage measured."""
    epochs: float

    @property
    def gain(self) -> Change:
        """Per draw; 0 where the loss rose."""
        root = math.sqrt(self.part)
        return Change(max(0.0, -self.moved.value) / root, self.moved.error / root)

    @property
    def is_clear(self) -> bool:
        """Whether the loss moved by more than three standard errors."""
        return abs(self.moved.value) > _SURE * self.moved.error

    @property
    def is_lost(self) -> bool:
        """Whether it clearly rose, and further than is let pass."""
        return self.is_clear and self.moved.value > 0 and self.now > (1 + _TOLERANCE) * self.lowest


def _advised(record: Record, stage: StageRecord, first: Evaluation, first_rows: Rows, last: Evaluation, last_rows: Rows) -> Advice:
    shares = _shares(record, stage)
    before, after = images_at(stage, first.step), images_at(stage, last.step)
    drawn = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**shares, **last_rows.losses}}
    total = sum(drawn.values()) or 1.0
    seen: dict[str, _Seen] = {}
    for name in last_rows.losses:
        moved = mean_change([new - old for old, new in paired_rows(first_rows, last_rows, name)])
        if moved is None:
            continue
        losses = [evaluation.sources[name].loss for evaluation in stage.evaluations if name in evaluation.sources]
        tally = stage.ledger.get(name)
        epochs = (tally.epochs if tally else None) or 0.0
        seen[name] = _Seen(shares.get(name, 0.0), drawn[name], max(drawn[name] / total, _LEAST_PART), moved, losses[-1], min(losses), epochs)
    mixed = {name: each for name, each in seen.items() if each.share > 0}
    weight = sum(each.share for each in mixed.values())  # below 1 where a source has no held-out rows: its share stays
    begins = {name: each.share / weight for name, each in mixed.items()}
    words = {name: _word(name, begins, mixed) if name in mixed else _of_undrawn(each) for name, each in seen.items()}
    suggested = _suggested(begins, mixed, {name: word for name, (word, _) in words.items()})
    found = [
        Suggestion(name, weight * begins.get(name, 0.0), each.images, each.moved, words[name][0], weight * suggested.get(name, 0.0), words[name][1]) for name, each in seen.items()
    ]
    unseen = {name: share for name, share in shares.items() if share > 0 and name not in seen}
    found += [Suggestion(name, share, drawn.get(name, 0.0), None, "keep", share, "too few held-out rows to say") for name, share in unseen.items()]
    return Advice(stage.name, first.step, last.step, tuple(found), _verdict(found, first, len(begins)), _planned(record, stage))


def _shares(record: Record, stage: StageRecord) -> dict[str, float]:
    """A stage's shares, adding up to 1: those in force at its end where they followed evaluations, else those that it asked for."""
    followed = [numbers(event.get("shares")) for event in record.events.get("shares", ()) if text(event.get("stage")) == stage.name]
    shares = {name: share for name, share in (followed[-1] if followed else numbers(stage.event.get("mix"))).items() if 1e-9 < share < 1e9}
    total = sum(shares.values()) or 1.0
    return {name: share / total for name, share in shares.items()}


def _word(name: str, shares: Mapping[str, float], mixed: Mapping[str, _Seen]) -> tuple[Word, str]:
    """Whether a source that is drawn should get more, and why, in words."""
    own = mixed[name]
    if len(mixed) == 1:
        return "keep", "the only source that was drawn"
    if own.is_lost and own.epochs > _MANY_EPOCHS:
        return "less", f"its loss rises after {own.epochs:.0f} epochs, which is overfitting: more rows would help, more draws do not"
    if own.is_lost:
        return "more", f"its loss rose further above its lowest than the tenth that is let pass ({own.lowest:.3f})"
    if own.is_clear and own.moved.value > 0:
        return "keep", "its loss rose, by less than the tenth that is let pass"
    apart = _apart(name, shares, mixed)
    sure = abs(apart.value) / apart.error if apart.error > 0 else math.inf if apart.value else 0.0
    if sure <= _SURE:
        return "keep", "gains about as much per draw as the sources do on average" if own.is_clear else "no clear change"
    how = f"by {sure:.1f} standard errors" if math.isfinite(sure) else "on every row"
    return ("more", f"gains more per draw than the sources do on average, {how}") if apart.value > 0 else ("less", f"gains less per draw than the sources do on average, {how}")


def _apart(name: str, shares: Mapping[str, float], mixed: Mapping[str, _Seen]) -> Change:
    """How far a source's gain is above the mean one. It is part of that mean itself, so their errors are not independent."""
    gains = {other: each.gain for other, each in mixed.items()}
    mean = math.fsum(shares[other] * gain.value for other, gain in gains.items())
    parts = [((1 - shares[other]) if other == name else shares[other]) * gain.error for other, gain in gains.items()]
    return Change(gains[name].value - mean, math.hypot(*parts))


def _of_undrawn(own: _Seen) -> tuple[Word, str]:
    """The same of a source that was not drawn."""
    if own.is_lost:
        return "more", f"was not drawn, and its loss rose by more than a tenth: {_RETURNING:.0%} of the draws may keep it"
    if own.is_clear:
        return "none", "gets better without being drawn" if own.moved.value < 0 else "was not drawn; its loss rose, by less than the tenth that is let pass"
    return "none", "was not drawn; no clear change"


def _suggested(begins: Mapping[str, float], mixed: Mapping[str, _Seen], words: Mapping[str, Word]) -> dict[str, float]:
    """The shares, adding up to 1: inside the band, and a twentieth of the draws for each source that comes back."""
    returning = [name for name, word in words.items() if word == "more" and name not in mixed]
    kept = 1 - min(0.5, _RETURNING * len(returning))
    moving = [name for name in mixed if words[name] != "keep"]
    shares = dict(begins)
    if moving:
        largest = max(each.gain.value for each in mixed.values()) or 1.0
        wanted = {name: share * math.exp(_lean(name, begins, mixed, words[name], largest)) for name, share in begins.items()}
        limits = Rule(begins, band=BAND).limits()
        for name, share in begins.items():  # whoever should get more does not get less because others should get more still
            low, high = limits[name]
            limits[name] = (share if words[name] == "more" else low, share if words[name] == "less" else high)
        shares = projected(wanted, limits)
    return {**{name: share * kept for name, share in shares.items()}, **{name: (1 - kept) / len(returning) for name in returning}}


def _lean(name: str, shares: Mapping[str, float], mixed: Mapping[str, _Seen], word: Word, largest: float) -> float:
    """The logarithm of what a share is multiplied by, before all of them are made to add up to 1."""
    if word == "keep":
        return 0.0
    if mixed[name].is_lost:
        return 0.25 if word == "more" else -0.25
    return 0.5 * _apart(name, shares, mixed).value / largest


def _verdict(found: Sequence[Suggestion], first: Evaluation, mixed: int) -> str:
    moving = sum(each.word in ("more", "less") for each in found)
    early = "; it is counted from the stage's start, so the first fast fall is in it: `evaluate: {every: N}` would show what came later" if first.kind == "start" else ""
    if not moving:
        clear = sum(each.moved is not None and abs(each.moved.value) > _SURE * each.moved.error for each in found)
        said = "nothing is shared out, for one source was drawn" if mixed == 1 else "no loss moved clearly" if not clear else "no source gains clearly more or less per draw than the others"
        return f"The evidence does not suffice to move a share: {said}{early}. Keep them."
    others = len(found) - moving
    rest = f"; the other {others} stay in proportion" if others else ""
    return f"The evidence is clear, beyond three standard errors, for {moving} of {len(found)} sources{rest}{early}."


def _planned(record: Record, stage: StageRecord) -> str:
    """The stage after one, as the plan has it."""
    after = next((each for each in record.stages if each.index == stage.index + 1), None)
    if after is None:
        return ""
    mix = after.plan.get("mix", "natural")
    shares = numbers(mix)
    said = ", ".join(f"{name}: {share:.6g}" for name, share in shares.items())
    return f"'{after.name}', and asks for {{{said}}}" if shares else f"'{after.name}', and asks for {text(mix) or 'shares that change'}"
