"""The ledger: what each source was asked to give to each stage, and what it gave, counted from the batches that were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixing.mixture import StageMixture
from mixing.source import BadRow
from stages.problems import RunError


def ledger_entry(mixture: StageMixture, stage: str, steps: int, images: Mapping[str, int], tokens: Mapping[str, int], levels: Sequence[int], dropped: Mapping[str, int]) -> dict[str, Any]:
    """One stage's page of the ledger.

    steps: made so far. images, tokens: counted of each source, over all processes; prompts' tokens are left out. levels: images counted at each
    resolution. dropped: unreadable rows of each source.
    Raises RunError if what was counted is not what the order says, beyond its guarantee: then the mixture is not the one that was asked for.
    """
    total = sum(images.values())
    order, asked, after = mixture.order, mixture.order.asked(steps), mixture.order.drawn_after(steps)
    sources: dict[str, Any] = {}
    for name, share in asked.items():
        selection = mixture.selections[name]
        drawn_after = {group: count for (source, group), count in after.items() if source == name}
        off = abs(images.get(name, 0) - share * total)
        if off > order.off[name] + 1e-9 * total:
            raise RunError(f"stage '{stage}': source '{name}' was asked for {share:.4%} of {total:,} images and gave {images.get(name, 0):,}, off by more than {order.off[name]:.3g}")
        sources[name] = {
            "asked": share,
            "drawn": images.get(name, 0) / total if total else 0.0,
            "images": images.get(name, 0),
            "tokens": tokens.get(name, 0),
            "dropped": {"unreadable": dropped[name]} if dropped.get(name) else {},
        }
        if selection.stream is not None:
            sources[name] |= {"stream": {"lanes": selection.stream.num_lanes, "drawn": sum(drawn_after.values())}, "note": _STREAM}
            continue
        rows = {row_class.name: len(own) for row_class, own in selection.training.items()}
        sources[name] |= {
            "rows": selection.size,
            "epochs": sum(drawn_after.values()) / selection.size,
            "unique_rows": sum(min(rows[group], count) for group, count in drawn_after.items()),
        }
        if selection.record:
            sources[name]["selection"] = dict(selection.record)
    page: dict[str, Any] = {"stage": stage, "steps": steps, "images": total, "sources": sources}
    if len(levels) > 1:
        whole = sum(level.share for level in mixture.levels)
        page["levels"] = [
            {"pixels": level.shapes.pixels, "asked": level.share / whole, "drawn": count / total if total else 0.0, "images": count}
            for level, count in zip(mixture.levels, levels, strict=True)
        ]
    return page


_STREAM = "rows come once in each epoch of their lane; lanes of different lengths begin their next epochs at different times"


def dropped_rows(bad: Sequence[BadRow]) -> dict[str, str]:
    """Rows left out, and why: key to reason, the first 1,000."""
    return {row.key: row.reason for row in bad[:1000]}
