"""Log a leg: what the steps since the last line brought, from all processes' counts, into metrics.jsonl and onto the console."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import reduce

from stages.compiled import counted
from stages.leg import Leg
from stages.optim import found_step_size
from stages.sent import sent
from stages.time_left import Pace
from stages.window import Window


def log_leg(leg: Leg, learning_rate: float) -> None:
    """Write and show a line. Every process takes part. Images whose losses are no numbers are left out of its means; where all are, it says none."""
    run, stage, window, names = leg.run, leg.stage, leg.window, list(leg.mixture.sources)
    device = run.accelerator.device
    sums = window.sum_up(names, device)
    counts = torch.tensor([window.tokens, *(window.images.get(name, 0) for name in names), *(leg.images.get(name, 0) for name in names)], dtype=torch.float64)
    flat = torch.cat([sums, sent(counts, device)])
    flat = reduce(flat, reduction="sum") if run.accelerator.num_processes > 1 else flat
    errors, by_noise, (total,), left_out, (tokens,), in_window, in_all = _cut(flat.tolist(), len(names), 20, 1, len(names), 1, len(names), len(names))
    images, measured = sum(in_window), sum(in_window) - sum(left_out)
    of_sources = {name: (error, number - missing) for name, error, number, missing in zip(names, errors, in_window, left_out, strict=True)}
    seconds = time.monotonic() - window.began
    record: dict[str, Any] = {
        "event": "step",
        "stage": stage.name,
        "step": leg.step,
        "loss": total / measured if measured else None,
        "lr": learning_rate,
        "grad_norm": leg.norm if math.isfinite(leg.norm) else None,
        "images": images / window.steps,
        "tokens": tokens / window.steps,
        "images_per_second": images / seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait": window.waited / seconds,
        "memory_bytes": leg.memory_bytes(),
        "multiplied_in": leg.multiplied,
        "loss_by_noise": [error / count if count else None for error, count in zip(by_noise[:10], by_noise[10:], strict=True)],
        "losses": {name: error / number for name, (error, number) in of_sources.items() if number},
        "drawn": {name: int(number) for name, number in zip(names, in_all, strict=True)},
    }
    if stage.precision == "fp16":
        record["loss_scale"] = leg.precision.scaler.get_scale()
    if stage.precision == "fp16" or leg.skipped:
        record["skipped"] = leg.skipped
    if (step_size := found_step_size(leg.training.optimizer)) is not None:
        record["step_size"] = step_size
    run.log.write(record)
    run.log.line(record, Pace(leg.index, seconds / window.steps, leg.evaluation_seconds), leg.mixture.order)
    leg.warn_of_cache()
    if stage.compile and not leg.passed_limit and (found := counted()).passed_limit:
        leg.passed_limit = True
        run.log.warn(f"after {found.graphs} compiled graphs no more are made: shapes that none of them fits run uncompiled; ask for fewer resolutions or aspects, or leave `compile` out", stage.name, leg.step)
    for message in leg.lanes.take_waits():
        run.log.write({"event": "warning", "stage": stage.name, "step": leg.step, "message": message})
    leg.window = Window(time.monotonic())
    leg.check_rows()
    run.log.hear(run.processes)


def _cut(values: Sequence[float], *lengths: int) -> list[list[float]]:
    """Numbers in pieces of these lengths."""
    pieces, begin = [], 0
    for length in lengths:
        pieces.append(list(values[begin : begin + length]))
        begin += length
    return pieces
