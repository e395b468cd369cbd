"""Arms of a comparison on the shapes world: plans that Medley itself carries out, measured alike on rows that no run has seen, and compared seed by seed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from ruamel.yaml import YAML

import train
from benchmarks import shapes, shapes_model
from benchmarks.exam import FIRST, examined
from benchmarks.handed import handed
from benchmarks.shapes import TASKS
from stages.feed import Changes
from stages.log_files import log_lines
from stages.quiet import quiet_libraries

PLAN: Mapping[str, int] = {"t2i": 50, "subject": 20, "control": 10, "edit": 10, "other": 10}
"""The shares that arms begin with or end with, and how much each task counts in what is weighed: OmniGen's."""


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    steps: int = 400
    """Of each arm."""
    images: int = 16
    """Of a step."""
    base_steps: int = 1500
    """Of the model that all arms begin with, on text to image alone."""
    base_images: int = 32
    """Of a step of it."""
    rows: int = 4096
    """Of each task to train on; of text to image twice as many."""
    held_out: int = 32
    """Of each task, measured on while a run goes on: what adaptive shares follow."""
    every: int = 25
    """Steps between those measurements."""
    tests: int = 128
    """Rows of each task that an arm is measured on in the end."""
    heads: int = 4
    blocks: int = 2
    """Of either kind."""


@dataclass(frozen=True)
class World:
    """Rows, the model that all arms begin with, and what was found of them, in one folder."""

    folder: Path
    scale: Scale

    @property
    def base(self) -> Path:
        """A diffusers folder."""
        return self.folder / "base" / "model"

    def sources(self) -> dict[str, dict[str, Any]]:
        """As a plan names them."""
        return {task: shapes.source_of(self.folder / "rows" / f"{task}.jsonl", task) for task in TASKS}


def plan_of(world: World, name: str, seed: int, stages: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A plan on the world, as YAML has it. stages: without what all of them share."""
    shared = {"batch": {"images": world.scale.images, "micro": min(16, world.scale.images)}, "precision": "fp32", "optimizer": {"betas": [0.9, 0.99]}}
    plan = {
        "name": name, "seed": seed, "model": str(world.base), "adapter": {"rank": 16, "targets": "linear"}, "sources": world.sources(),
        "stages": [{**shared, **stage} for stage in stages], "evaluate": {"rows": world.scale.held_out, "every": world.scale.every},
        "previews": {"rows": 0}, "cache": "none", "workers": 0, "track": "none", "log_every": 100, "save_every": 100_000,
    }  # fmt: skip
    return {**plan, **changes}


def make_world(folder: Path, scale: Scale) -> World:
    """Write the rows and train the base, where that is not done yet. Raises SystemExit if the folder holds a world of another size."""
    quiet_libraries()
    diffusers_logging.set_verbosity_error()  # they are imported by now, and have read what they go by
    world, listing = World(folder, scale), folder / "scale.json"
    sizes = {name: getattr(scale, name) for name in ("base_images", "base_steps", "rows", "tests", "heads", "blocks")}
    folder.mkdir(parents=True, exist_ok=True)
    if listing.exists() and (found := json.loads(listing.read_text())) != sizes:
        raise SystemExit(f"{folder} holds a world of another size ({found}); pass --world with another folder, or delete it")
    listing.write_text(json.dumps(sizes))
    shapes.write_rows(folder / "rows", 0, {task: range(scale.rows * (2 if task == "t2i" else 1)) for task in TASKS})
    shapes.write_rows(folder / "tests", 0, {task: range(FIRST, FIRST + scale.tests) for task in TASKS})
    untrained = shapes_model.build(folder / "untrained", shapes.words(), heads=scale.heads, blocks=scale.blocks)
    if not (folder / "base.json").exists():
        # All sizes that an arm may ask for, so that a stage of small pictures does not begin with a model that never saw one.
        sizes_seen = [{"pixels": 8, "share": 25}, {"pixels": 12, "share": 25}, {"pixels": 16, "share": 50}]
        rate = {"peak": 5e-3, "warmup": scale.base_steps // 25, "schedule": "cosine"}
        stage = {"name": "base", "train": "full", "mix": {"t2i": 1}, "steps": scale.base_steps, "resolution": sizes_seen, "lr": rate}
        stage["batch"] = {"images": scale.base_images, "micro": scale.base_images}
        plan = plan_of(world, "base", 0, [stage], model=str(untrained), sources={"t2i": world.sources()["t2i"]}, evaluate={"rows": 64})
        del plan["adapter"]
        carried_out(plan, folder / "base")
        models = {"untrained": examined(untrained, folder / "tests"), "base": examined(world.base, folder / "tests")}
        (folder / "base.json").write_text(json.dumps({name: asdict(found) for name, found in models.items()}))
    return world


def floors(world: World) -> list[list[str]]:
    """A table of which part is right, of each task: of real pictures, of those of other rows, of the untrained model, and of the one that all arms begin with."""
    models = json.loads((world.folder / "base.json").read_text(encoding="utf-8"))
    real = shapes.floors(0, 500)
    return [
        ["right, %", "real pictures", "other rows", "untrained model", "before the arms"],
        *([task, *(f"{100 * part:.1f}" for part in (real[task]["real"], real[task]["shuffled"], models["untrained"]["right"][task], models["base"]["right"][task]))] for task in TASKS),
    ]


# --- one arm -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A plan with a seed, by what it is called."""

    name: str
    seed: int
    plan: Mapping[str, Any]
    given: Changes | None = None
    """The shares that it is handed from which step on, in the place of those that its evaluations would lead to."""

    @property
    def key(self) -> str:
        """What tells it from all others on the same world: what its plan asks for and what it is given, not what it is called."""
        given = None if self.given is None else [[step, {name: str(share) for name, share in shares.items()}] for step, shares in self.given.items()]
        return hashlib.sha256(json.dumps([[self.plan[field] for field in ("seed", "adapter", "stages", "evaluate")], given], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What became of an arm."""

    key: str
    arm: str
    seed: int
    losses: dict[str, float]
    """Of each task, on the test rows."""
    right: dict[str, float]
    """Of each task, the part of the samples that is right."""
    parts: dict[str, dict[str, float]]
    """Of each task, by attribute."""
    held_out: dict[str, float]
    """Losses on the held-out rows, as the run itself measured them last."""
    images: dict[str, int]
    """Drawn of each task."""
    changes: list[tuple[int, dict[str, float]]]
    """From which step on which shares, where they changed."""
    seconds: float
    processor_seconds: float
    """Of the run; neither the samples nor the test rows are in it."""


class Outcomes:
    """Those found so far, a line of JSON each: an arm that is done is not carried out again, whichever comparison asks for it."""

    def __init__(self, world: World) -> None:
        """They lie in the world's folder."""
        self.world, self.file = world, world.folder / "outcomes.jsonl"

    def known(self) -> dict[str, Outcome]:
        """By the arm's key."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        found = [Outcome(**json.loads(line)) for line in lines]
        return {outcome.key: outcome for outcome in found}

    def of(self, arm: Arm) -> Outcome:
        """Carry an arm out and measure it, if it is not done."""
        if (known := self.known().get(arm.key)) is not None:
            return known
        folder = self.world.folder / "runs" / arm.key
        began, processor = time.monotonic(), time.process_time()
        carried_out(arm.plan, folder, arm.given)
        seconds, processor_seconds = time.monotonic() - began, time.process_time() - processor
        lines = [json.loads(line) for line in log_lines(folder, "metrics")]
        last = next(line for line in reversed(lines) if line["event"] == "eval" and line["kind"] == "end")["sources"]
        pages = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["stages"]
        images = {task: sum(page["sources"].get(task, {}).get("images", 0) for page in pages) for task in TASKS}
        found = examined(self.world.base, self.world.folder / "tests", folder)
        outcome = Outcome(
            arm.key, arm.name, arm.seed, found.losses, found.right, found.parts, {task: entry["loss"] for task, entry in last.items()}, images,
            [(line["step"], line["shares"]) for line in lines if line["event"] == "shares" and line["changed"]], round(seconds, 2), round(processor_seconds, 2),
        )  # fmt: skip
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(outcome)) + "\n")
        shutil.rmtree(folder)
        return outcome


def carried_out(plan: Mapping[str, Any], folder: Path, given: Changes | None = None) -> None:
    """Carry out a plan in a folder, from where it stands; what it says goes to said.txt in the folder. given: as in `Arm`. Raises SystemExit if a signal stopped it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "asked.yaml"
    with file.open("w") as out:
        YAML(typ="safe").dump(dict(plan), out)
    with (folder / "said.txt").open("a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), handed(given):
        exit_code = train.launch(train.checked(file).plan, out=folder, until=None, trace=False)
    if exit_code:
        raise SystemExit(exit_code)
