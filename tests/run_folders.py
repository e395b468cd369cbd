"""Run folders written by hand: what a run leaves of its evaluations, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import write_plan
from stages.evaluations import rows_file

Losses = Mapping[str, Mapping[str, float]]


@dataclass
class Told:
    """One stage as it went."""

    name: str
    evaluations: Mapping[int | None, Losses]
    """Losses of held-out rows by the step that they were measured after; None for the stage's start."""
    steps: int = 100
    mix: Mapping[str, float] = field(default_factory=dict)
    """Shares that add up to 1. Each step draws 10 images."""
    ended: bool = True
    asks: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the stage in the plan."""
    epochs: Mapping[str, float] = field(default_factory=dict)


def run_folder(folder: Path, stages: Sequence[Told], *, seed: int = 0, fingerprint: str = "m", version: str = "2", t: Losses | None = None, **plan: Any) -> Path:
    """Write one. t: of rows; left out, each row's own, by its name. plan: more fields of the plan."""
    (folder / "evaluations").mkdir(parents=True)
    asked = [{"name": told.name, "steps": told.steps, "resolution": 64, "batch": 10, "lr": {"peak": 1e-3, "warmup": 5}, "mix": dict(told.mix) or "natural", **told.asks} for told in stages]
    sources = {name: {"path": f"data/{name}"} for told in stages for losses in told.evaluations.values() for name in losses}
    write_plan(folder / "plan.yaml", {"name": "told", "seed": seed, "model": "model", "sources": sources, "stages": asked, **plan})
    lines: list[dict[str, Any]] = [{"event": "run", "name": "told", "seed": seed, "fingerprint": fingerprint, "rows": dict.fromkeys(sources, "same"), "time": 0.0}]
    for index, told in enumerate(stages):
        event = {"event": "stage", "stage": told.name, "index": index, "steps": told.steps, "mix": dict(told.mix)}
        lines.append({**event, "state": "start"})
        for step, losses in told.evaluations.items():
            if step:
                lines.append({"event": "step", "stage": told.name, "step": step, "loss": 1.0, "images_per_second": 20.0, "drawn": {name: 10 * step * share for name, share in told.mix.items()}})
            kind = "start" if step is None else "end" if step == told.steps else "during"
            summary = {name: {"loss": math.fsum(rows.values()) / len(rows), "rows": len(rows)} for name, rows in losses.items()}
            lines.append({"event": "eval", "stage": told.name, "step": step or 0, "kind": kind, "weights": "raw", "sources": summary})
            noise = t or {name: {row: 0.5 + 0.001 * int(row) for row in rows} for name, rows in losses.items()}
            rows_file(folder, index, told.name, step).write_text(json.dumps({"version": version, "losses": losses, "t": noise}))
        if told.ended:
            lines += [{"event": "memory", "stage": told.name, "kind": "peak", "peak_bytes": 10_000_000 * (index + 1)}, {**event, "state": "end", "seconds": 30.0}]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (folder / "ledger.json").write_text(json.dumps({"stages": [{"stage": told.name, "sources": {name: {"epochs": count} for name, count in told.epochs.items()}} for told in stages]}))
    return folder


def losses(level: float, *, rows: int = 40, noise: float = 0.01, first: int = 0, salt: int = 0) -> dict[str, float]:
    """Losses of rows around a level, each with a part of its own that stays from one evaluation to the next, and one of this evaluation's."""
    own = [math.sin(7.3 * row) * 0.2 for row in range(first, first + rows)]
    return {str(row): level + its + noise * math.sin(3.1 * row + 11.7 * salt) for row, its in zip(range(first, first + rows), own, strict=True)}
