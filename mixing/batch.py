"""Batches: images of one forward and backward pass; and rows read plainly, to be measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mixing.bad_rows import BadRow, UnreadableRow
from mixing.buckets import Shapes, Signature
from mixing.captions import plain
from mixing.reading import Images, Latents, Mask, Regions, Seen, View, gathered, gathered_regions, read_masks, read_row
from mixing.selected import Selection


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward and backward pass, all of one signature. B: images."""

    step: int
    micro: int
    """Which micro-batch of its step, over all processes; one that two processes share has the same number on both."""
    positions: tuple[int, ...]
    """Number of each image in the stage: what its noise and timestep are derived from."""
    sources: tuple[str, ...]
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    targets: Images
    references: tuple[Images, ...]
    """The first is every image's first reference, and so on."""
    tokens: int = 1
    """Of each image: its target's, its references', its prompt's and its regions' prompts'."""
    level: int = 0
    """Which of the stage's resolutions."""
    step_images: int = 0
    """Images of the step over all processes."""
    is_last: bool = True
    """Whether it is this process's last one of its step."""
    bad: tuple[BadRow, ...] = ()
    """Rows that could not be decoded, and in whose place others stand."""
    regions: tuple[Regions, ...] = ()
    """The first is every image's first region, and so on; as many as the signature says."""

    def pin_memory(self) -> MicroBatch:
        """The same with its images in page-locked memory, from which a GPU copies beside its work."""
        references, regions = tuple(r.pin_memory() for r in self.references), tuple(r.pin_memory() for r in self.regions)
        return replace(self, targets=self.targets.pin_memory(), references=references, regions=regions)


def read_rows(selection: Selection, rows: Iterable[int], shapes: Shapes, latents: Latents | None = None) -> tuple[list[MicroBatch], list[BadRow]]:
    """Some rows of a source as micro-batches, one for each signature in the order of its first row, and those that could not be decoded.

    Rows are seen plainly: the centre, the first caption, regions with their prompts as they are.
    """
    source = selection.source
    groups: dict[Signature, list[tuple[str, str, list[Seen], tuple[str, ...], tuple[Mask, ...]]]] = {}
    bad: list[BadRow] = []
    for row in rows:
        row_class = selection.class_of(row)
        signature = shapes.signature(row_class)
        groups.setdefault(signature, [])
        try:
            held = selection.cells(row)
            seen = read_row(source.name, source.key(row), held, row_class, signature, View(), latents)
            masks = read_masks(source.name, source.key(row), held, signature, View())
            prompt = plain(held.prompts, selection.captions)
            groups[signature].append((source.key(row), prompt, seen, tuple(region.prompt for region in held.regions), masks))
        except UnreadableRow as error:
            bad.append(error.bad_row)
    batches = []
    for signature, group in groups.items():
        if group:
            keys, prompts, images, entity_prompts, entity_masks = zip(*group, strict=True)
            targets, *references = (gathered(size, role) for size, role in zip((signature.target, *signature.references), zip(*images, strict=True), strict=True))
            regions = gathered_regions(entity_prompts, entity_masks)
            batches.append(MicroBatch(0, 0, tuple(range(len(keys))), (source.name,) * len(keys), keys, prompts, targets, tuple(references), regions=regions))
    return batches, bad
