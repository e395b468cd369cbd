"""Verify the cache: encode a hundredth of what a plan's rows would find in it anew, and compare; or only say how much of it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from mixing.bad_rows import UnreadableRow
from mixing.buckets import RowClass, Signature
from mixing.captions import plain
from mixing.content import text_key
from mixing.keys import key
from mixing.permutation import permute
from mixing.reading import Latents, Seen, View, read_row, to_float
from mixing.selected import Selection
from stages.cache import Verified, text_tensors, verify
from stages.digests import FileDigests
from stages.encode import KeptLatents
from stages.families.family import Family
from stages.families.open import open_family
from stages.feed import main_shapes, shapes_at
from stages.open_cache import open_cache
from stages.open_sources import open_selections
from stages.plan import Plan
from stages.precision import choose_device
from stages.prior import priors_made
from stages.problems import PlanError
from stages.resolved import resolved_levels

PART = 0.01
"""Which part of a source's rows is looked at."""
_LEAST = 8  # rows of each source

Entry = tuple[bytes, Callable[[], Mapping[str, Tensor]]]


@dataclass(frozen=True)
class _Everything:
    """A cache that pretends to hold everything, so that of rows only the keys of their latents are found out, and nothing is decoded."""

    kept: KeptLatents

    def key(self, content: bytes, transform: str) -> bytes:
        return self.kept.key(content, transform)

    @property
    def of_references(self) -> bool:
        return self.kept.of_references

    def get(self, key: bytes) -> NDArray[np.float32]:
        return np.empty(0, dtype=np.float32)

    def hash_of(self, path: Path) -> tuple[bytes, bytes | None]:
        return self.kept.hash_of(path)


def verify_cache(plan: Plan, console: Console) -> bool:
    """Look at some rows of every source, as every stage sees them; say what was found, and whether all of it is what the encoders make.

    Raises PlanError if the plan keeps nothing, or if a source cannot be opened.
    """
    if plan.cache == "none":
        raise PlanError.at("cache", "'none' keeps nothing that could be verified; leave it out to keep what is encoded")
    folder = Path(plan.cache.folder)
    device = choose_device()  # with as many threads as training: another number gives other bits
    family = open_family(plan.model, device, FileDigests(folder / "digests.json").digest)
    has_latents = plan.cache.latents and family.encodes_images
    if not (has_latents or plan.cache.text):
        raise PlanError.at("cache", "it keeps neither latents nor text, so there is nothing that could be verified")
    cache = open_cache(folder, family, plan.cache, "verify")
    selections = open_selections(plan, Path.cwd(), priors_made(plan, Path.cwd()))
    tolerance = 1e-5 if device.type == "cpu" else 2e-2
    sound = True
    found: dict[str, Verified] = {}
    if has_latents:
        found["latents"] = verify(cache.latents, _latents(plan, family, selections, _Everything(KeptLatents(cache, not family.prompts_see_references))), fraction=1.0, tolerance=tolerance)
    if plan.cache.text:
        found["text"] = verify(cache.texts, _texts(plan, family, selections), fraction=1.0, tolerance=tolerance)
    for kind, result in found.items():
        sound &= not result.different
        verdict = "all as they were kept" if not result.different else f"[red]{len(result.different)} differ[/red]: {escape(', '.join(result.different[:5]))}"
        console.print(f"{kind}: {result.checked:,} entries encoded anew, {verdict} (largest difference {result.largest:.1g} of an entry's largest value); {result.missing:,} not kept yet", highlight=False, soft_wrap=True)
    if not sound:
        console.print(f"delete {escape(str(folder))} to encode everything anew", highlight=False, soft_wrap=True)
    cache.close()
    return sound


def kept(plan: Plan, selections: Mapping[str, Selection]) -> Iterator[str]:
    """How much of what a plan's rows ask for is in the cache, judged by a hundredth of them; nothing where there is no cache yet, or the model is not at hand."""
    if plan.cache == "none" or not Path(plan.cache.folder, "text").is_dir():
        return
    folder = Path(plan.cache.folder)
    try:
        family = open_family(plan.model, choose_device(), FileDigests(folder / "digests.json").digest)
    except (OSError, ValueError):  # its configs are on the Hub, which cannot be reached
        return
    cache = open_cache(folder, family, plan.cache, "explain")
    asked = {"latents": (cache.latents, _latents(plan, family, selections, _Everything(KeptLatents(cache, not family.prompts_see_references)))), "embeddings of prompts": (cache.texts, _texts(plan, family, selections))}
    wanted = {"latents": plan.cache.latents and family.encodes_images, "embeddings of prompts": plan.cache.text}
    for what, (store, entries) in asked.items():
        if wanted[what]:
            looked_at = {key: key in store for key, _ in entries}
            yield f"{what}: {sum(looked_at.values()):,} of {len(looked_at):,} looked at are kept in {folder}"
    cache.close()


def _rows(plan: Plan, selection: Selection) -> list[int]:
    """Some of a source's rows, training and held out, chosen by key."""
    own = [np.asarray(rows) for rows in selection.training.values()] if selection.stream is None else []
    rows = np.concatenate([*own, selection.held_out]).astype(np.int64)
    number = min(len(rows), max(_LEAST, round(len(rows) * PART)))
    return [int(row) for row in rows[permute(np.arange(number), len(rows), key(plan.seed, "verify", selection.source.name))]] if number else []


def _latents(plan: Plan, family: Family, selections: Mapping[str, Selection], everything: _Everything) -> Iterator[Entry]:
    for name, selection in selections.items():
        for row in _rows(plan, selection):
            row_class, row_key = selection.class_of(row), selection.source.key(row)
            if row in selection.held_out:  # these are seen plainly, at each stage's largest resolution
                views = {View()}
                signatures = {main_shapes(stage, family.pixel_multiple).signature(row_class) for stage in plan.stages}
            else:
                views = {selection.augmentation.view(plan.seed, name, row_key, epoch) for epoch in range(selection.augmentation.variants)}
                signatures = {shapes_at(stage, level.pixels, family.pixel_multiple).signature(row_class) for stage in plan.stages for level in resolved_levels(stage)}
            for signature in sorted(signatures):
                for view in sorted(views, key=repr):
                    read = partial(_read, selection, row, row_key, row_class, signature, view)
                    try:
                        seen = read(everything)
                    except UnreadableRow:
                        continue  # the run names it
                    for place, each in enumerate(seen):
                        if each.key is not None:
                            yield each.key, partial(_encoded, family, read, place)


def _read(selection: Selection, row: int, row_key: str, row_class: RowClass, signature: Signature, view: View, latents: Latents | None) -> list[Seen]:
    return read_row(selection.source.name, row_key, selection.cells(row), row_class, signature, view, latents)


def _encoded(family: Family, read: Callable[[None], list[Seen]], place: int) -> dict[str, Tensor]:
    """The latents of a row's image by its place; decoded only now, for all that are looked at would not go into memory together."""
    pixels = read(None)[place].pixels
    assert pixels is not None
    return {"latents": family.encode_images(to_float(torch.from_numpy(np.array(pixels))[None]))[0]}


def _texts(plan: Plan, family: Family, selections: Mapping[str, Selection]) -> Iterator[Entry]:
    for selection in selections.values():
        for row in _rows(plan, selection):
            try:
                cells = selection.cells(row)
            except UnreadableRow:
                continue
            said = [plain([prompt], selection.captions) for prompt in cells.prompts]
            for prompt in [*said, *(region.prompt for region in cells.regions)]:
                text = family.said(prompt)
                yield text_key(text, family.text_identity), partial(_text, family, text)


def _text(family: Family, prompt: str) -> dict[str, Tensor]:
    text = family.encode_prompts([prompt])
    return {name: part[0] for name, part in text_tensors(text).items()}
