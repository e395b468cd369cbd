"""Open sources: those of a plan, with the rows that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mixing.bad_rows import SourceError
from mixing.captions import CaptionRules
from mixing.reading import Augmentation
from mixing.selected import Choice, Selection, select, select_stream
from mixing.source import open_source
from mixing.stream import open_stream
from mixing.where import BUILT_IN, WhereError, parse
from stages.plan import Plan, Source
from stages.problems import PlanError
from stages.resolved import num_held_out


def index_folder(plan: Plan) -> Path | None:
    """Where what was seen of files is remembered."""
    return None if plan.cache == "none" else Path(plan.cache.folder) / "index"


def open_selections(plan: Plan, root: Path, priors: Mapping[str, Path]) -> dict[str, Selection]:
    """Open every source and choose its rows. root: the folder that relative paths start from. priors: where the images of a source that the model makes
    itself lie; one that is not among them is left out. Raises PlanError naming the source."""
    selections = {}
    for name, source in plan.sources.items():
        if source.prior is not None and name not in priors:
            continue
        path = str(priors[name].absolute()) if name in priors else source.path
        try:
            selections[name] = _stream(name, source, plan, root) if source.stream else _selection(name, source, path, plan, root)
        except (SourceError, ValueError) as error:
            raise PlanError.at("", str(error)) from None
    return selections


def _selection(name: str, source: Source, path: str, plan: Plan, root: Path) -> Selection:
    index, take = index_folder(plan), source.take
    opened = open_source(
        name,
        path=path,
        task=source.task,
        columns=source.columns,
        prompt=source.prompt,
        split=source.split,
        on_bad_row=source.on_bad_row,
        root=root,
        extra=_extra(name, source),
        index=index,
    )
    choice = Choice(source.where, repeat=source.repeat)
    if take is not None:
        choice = Choice(source.where, take.count, take.fraction, take.by, take.column, take.seed, source.repeat)
    return select(opened, choice, num_held_out(plan), captions=_captions(source), augmentation=_augmentation(source), folder=None if index is None else index / "rows")


def _stream(name: str, source: Source, plan: Plan, root: Path) -> Selection:
    opened = open_stream(
        name,
        path=source.path,
        task=source.task,
        columns=source.columns,
        prompt=source.prompt,
        split=source.split,
        references=source.references,
        on_bad_row=source.on_bad_row,
        root=root,
        seed=plan.seed,
        lanes=source.lanes,
        held_out=num_held_out(plan),
    )
    return select_stream(opened, source.rows, repeat=source.repeat, captions=_captions(source), augmentation=_augmentation(source))


def _extra(name: str, source: Source) -> tuple[str, ...]:
    """The columns that the choice of rows asks for, beside those that every source has. Raises ValueError over a condition that cannot be read."""
    names: set[str] = set()
    if source.where is not None:
        try:
            names |= parse(source.where).names - set(BUILT_IN)
        except WhereError as error:
            raise ValueError(f"sources.{name}.where: {error}") from None
    if source.take is not None and source.take.column is not None:
        names.add(source.take.column)
    return tuple(sorted(names))


def _captions(source: Source) -> CaptionRules:
    rules = source.captions
    return CaptionRules(rules.trigger, rules.dropout, rules.shuffle_tags, rules.keep_tags)


def _augmentation(source: Source) -> Augmentation:
    augment = source.augment
    return Augmentation(augment.flip, augment.crop, augment.variants)
