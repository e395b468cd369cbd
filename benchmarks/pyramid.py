"""The pyramid against the straight flow at equal tokens: the quickstart's small transformer learns digits from captions, by both.

    python plans/digits.py && python -m benchmarks.pyramid [--steps 900] [--seeds 3] [--sampling 20]

Both arms train every weight from the same untrained model on the same source, with as many tokens a step; the pyramid in two levels, 4 and 8 pixels. Samples are
made by each arm's own sampler at equal steps, and judged by the classifier of the quickstart. Prints a table for docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ruamel.yaml import YAML

import train
from stages.log_files import log_lines

TOKENS = 32 * (16 + 8)
"""Of a step: 32 images of 8 x 8 pixels at 16 tokens, and 8 for each prompt."""

ARMS: Mapping[str, dict[str, Any]] = {
    "straight": {},
    "pyramid 1:1": {"pyramid": {"levels": 2, "shares": [1, 1]}},
    "pyramid 1:2": {"pyramid": {"levels": 2, "shares": [1, 2]}},
    "pyramid 1:2, plain loss": {"pyramid": {"levels": 2, "shares": [1, 2], "loss": "plain"}},
}


def plan_of(arm: str, steps: int, seed: int, sampling: int) -> dict[str, Any]:
    """One arm's plan. sampling: steps of the samples."""
    stage = {
        "name": "learn", "train": "full", "steps": steps, "resolution": 8, "batch": {"tokens": TOKENS, "micro": 32}, "precision": "fp32",
        "lr": {"peak": 4e-3, "warmup": steps // 15, "schedule": "cosine"}, "optimizer": {"betas": [0.9, 0.99]}, "ema": 0.99,
    }  # fmt: skip
    return {
        "name": "arm", "seed": seed, "model": "data/digits/base", "sources": {"digits": {"path": "data/digits/text_to_image"}}, "stages": [{**stage, **ARMS[arm]}],
        "evaluate": {"rows": 64, "accuracy": {"source": "digits", "labelled": "data/digits/judge", "samples": 200}}, "previews": {"rows": 4, "steps": sampling},
        "cache": "none", "workers": 0, "track": "none", "log_every": steps, "save_every": steps,
    }  # fmt: skip


def measured(folder: Path, arm: str, steps: int, seed: int, sampling: int) -> dict[str, float]:
    """Accuracy of the samples, held-out loss before and after, tokens and images a step, seconds."""
    file, run = folder / "plan.yaml", folder / "run"
    with file.open("w") as out:
        YAML(typ="safe").dump(plan_of(arm, steps, seed, sampling), out)
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    train.run(file, out=run)
    lines = [json.loads(line) for line in log_lines(run, "metrics")]
    last = next(line for line in reversed(lines) if line["event"] == "eval" and line["kind"] == "end")["sources"]["digits"]
    step = next(line for line in reversed(lines) if line["event"] == "step")
    judged = next(line for line in lines if line["event"] == "accuracy")
    return {
        "accuracy": judged["accuracy"], "loss": last["loss"], "of base": last["loss"] / (last["loss"] - last["since_base"]), "tokens": step["tokens"], "images": step["images"],
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def main() -> None:
    """Run all arms in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sampling", type=int, default=20, help="steps of the samples that are judged")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in given.arms}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for arm in given.arms:
                found[arm].append(measured(Path(folder), arm, given.steps, seed, given.sampling))
    print(f"{'arm':26}{'accuracy, each seed':28}{'loss':>8}{'of base':>9}{'tokens':>9}{'images':>8}{'s':>6}")
    for arm, runs in found.items():
        middle = {name: median(run[name] for run in runs) for name in runs[0]}
        each = " ".join(f"{run['accuracy']:.1%}" for run in runs)
        print(f"{arm:26}{each:28}{middle['loss']:8.4f}{middle['of base']:9.3f}{middle['tokens']:9.0f}{middle['images']:8.1f}{middle['seconds']:6.0f}")


if __name__ == "__main__":
    main()
