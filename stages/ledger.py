"""The ledger: what each source was asked to give to each stage, and what it gave, counted from the batches that were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixing.mixture import StageMixture
from mixing.source import BadRow
from stages.problems import RunError


def ledger_entry(mixture: StageMixture, stage: str, steps: int, images: Mapping[str, int], tokens_per_image: int, dropped: Mapping[str, int]) -> dict[str, Any]:
    """One stage's page of the ledger.

    steps: made so far. images: counted of each source, over all processes. tokens_per_image: of a target. dropped: unreadable rows of each source.
    Raises RunError if what was counted is not what the order says, beyond its guarantee: then the mixture is not the one that was asked for.
    """
    total = sum(images.values())
    order = mixture.order
    sources: dict[str, Any] = {}
    for name, share in mixture.asked.items():
        cells = [cell for cell in order.cells if cell.source == name]
        rows = sum(cell.rows for cell in cells)
        drawn_before = sum(cell.drawn_before for cell in cells)
        after = mixture.drawn_after(steps)
        off = abs(images.get(name, 0) - share * total)
        allowed = 2 + (order.micro_batches_off * order.micro if len(order.signatures) > 1 else 0)
        if off > allowed + 1e-9 * total:
            raise RunError(f"stage '{stage}': source '{name}' was asked for {share:.4%} of {total:,} images and gave {images.get(name, 0):,}, off by more than {allowed:g}")
        sources[name] = {
            "asked": share,
            "drawn": images.get(name, 0) / total if total else 0.0,
            "images": images.get(name, 0),
            "tokens": images.get(name, 0) * tokens_per_image,
            "rows": rows,
            "epochs": (drawn_before + images.get(name, 0)) / rows,
            "unique_rows": sum(min(cell.rows, after[cell.source, cell.signature]) for cell in cells),
            "dropped": {"unreadable": dropped[name]} if dropped.get(name) else {},
        }
    return {"stage": stage, "steps": steps, "images": total, "sources": sources}


def dropped_rows(bad: Sequence[BadRow]) -> dict[str, str]:
    """Rows left out, and why: key to reason, the first 1,000."""
    return {row.key: row.reason for row in bad[:1000]}
