"""How fast a training step is: a bare torch loop, Medley's own with the same maths, and Medley with its defaults, in turns on the same images.

    OMP_NUM_THREADS=1 python -m benchmarks.step                                                            # tiny Flux, a minute on one core
    python -m benchmarks.step --size full --pixels 1024 --precision bf16 --batch 1 --images 16 --rows same  # Flux with random weights, on a GPU
    python -m benchmarks.step --script diffusers/examples/dreambooth/train_dreambooth_lora_flux.py         # beside the diffusers script
    options: --family --folder --size --pixels --batch --rank --targets --precision  --rounds --block --images --rows  --text-tokens --heavy-text --python --launches  --target --json

Start-up, encoding and evaluation are left out: a round times a few whole steps of each loop, one loop after the other. The bare loop is handed latents,
noise, noise levels and encoded prompts, and does nothing but the maths: it is the floor. Losses stand beside the speed; where they differ, nothing was
compared, and the exit code is 1. The share of the device's rate is that of matrix products, measured in the same process and precision.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

import train
from benchmarks.bare import FAMILIES, Bare, Inputs, Recorded
from benchmarks.step_model import FLUX, Size, build_flux, build_tiny, make_images
from benchmarks.timed import Timed, read_timed
from benchmarks.turns import in_turns
from stages.adapter import adapter_weights, lora_layers
from stages.log_files import log_lines
from stages.objectives import flow
from stages.open_leg import open_leg
from stages.open_run import open_run
from stages.plan import Plan
from stages.precision import DTYPES, choose_device
from stages.quiet import quiet_libraries
from stages.resolved import resolved_plan, resolved_storage

BARE, OURS, DEFAULTS = "bare torch loop", "Medley, the same maths", "Medley, its defaults"
SCRIPT, LAUNCHED = "the diffusers script", "Medley, launched alike"
_WARM = 3  # steps of each loop before the first round: the allocator's blocks, the first log, and on a GPU the choice of kernels
_LOGGED = 10  # Medley's own default: a line each so many steps
_WITHIN = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative; the loops add up in the same order, and bf16 differs by where it rounds
_WITHIN_DEFAULTS = 0.1  # of the mean over the run: another precision and a warm-up
_LINE = re.compile(r"(\d+)/\d+ \[[^\]]*loss=([0-9.e+-]+|nan|inf)")  # of the script's progress bar


class LossesDiffer(Exception):
    """Loops that should compute the same do not, so their speeds say nothing of each other."""


@dataclass(frozen=True)
class Asked:
    """What is measured."""

    size: str
    pixels: int
    batch: int
    rank: int
    precision: str
    rounds: int
    block: int
    """Steps of each loop in a round."""
    images: int
    rows: tuple[str, ...]
    script: Path | None = None
    python: str = sys.executable
    """The interpreter that runs the script."""
    launches: int = 3
    targets: str = "blocks"
    heavy_text: bool = False
    """Whether the text encoder is as large as the transformer."""
    text_tokens: int | None = None
    """Of a prompt; None for those of the size."""
    family: str = "flux"
    folder: int = 0
    """Images of a folder that is gone through once, launched; 0 for none."""

    @property
    def flux(self) -> Size:
        """The model."""
        size = FLUX[self.size]
        return size if self.text_tokens is None else replace(size, text_tokens=self.text_tokens)

    @property
    def model_words(self) -> str:
        """What it is called in a table."""
        return f"Flux of {self.flux.text_tokens} text tokens" if self.family == "flux" else self.family

    @property
    def steps(self) -> int:
        """Of each loop, all told."""
        return _WARM + self.rounds * self.block

    @property
    def dropped(self) -> int:
        """Steps of a launched script that are not counted: Medley encodes in its first epoch what the script encodes before its first step."""
        return max(10, -(-self.images // self.batch) + 1)


@dataclass(frozen=True)
class Row:
    """How fast a loop made its steps."""

    name: str
    milliseconds: float
    """Of a step, the median over the rounds."""
    lowest: float
    highest: float
    processor_milliseconds: float
    """The same of this process's time on a processor: on a machine that others use too, the steadier figure."""
    of_bare: float
    """Speed against the bare loop's, the median of the rounds' ratios."""
    processor_of_bare: float
    images_per_second: float
    tokens_per_second: float
    of_rate: float
    """Multiplications and additions of the bare loop's step, per second, against those of plain matrix products."""
    loss: float
    """The mean over all steps."""


@dataclass(frozen=True)
class Launched:
    """How fast a script trained that was launched as a process of its own."""

    name: str
    milliseconds: float
    """Of a step, the median over the steps of all launches."""
    processor_milliseconds: float
    images_per_second: float
    first_step: float
    """Seconds from the launch until the first step was made, the median."""
    peak: int
    """Bytes of memory at the most, until the last step."""
    loss: float
    """The mean over all steps."""
    error: float
    """Its standard error: the two draw other noise, so their means agree only as far as that."""


@dataclass(frozen=True)
class OnceThrough:
    """How long a script that was launched took to go once through a folder; medians over the launches."""

    name: str
    images: int
    first: float
    """Seconds from the launch until the first step was made."""
    between: float
    """Seconds from the first step to the last."""


def plan_of(folder: Path, asked: Asked, *, defaults: bool, steps: int, cache: Path, seed: int = 1, images: str = "images") -> dict[str, Any]:
    """The plan of Medley's loop. defaults: with everything left out that the benchmark does not need.

    The noise levels are those that the diffusers script draws, without a shift.
    """
    same = {} if defaults else {"precision": asked.precision, "batch": {"images": asked.batch, "micro": asked.batch}, "checkpointing": "none"}
    same |= {"timesteps": {"shift": "none"}}
    rate: Any = 1e-4 if defaults else {"peak": 1e-4, "warmup": 0}
    stage = {"name": "measured", "steps": steps, "resolution": asked.pixels, "batch": asked.batch, "lr": rate, "buckets": {"max_aspect": 1.0}, **same}
    return {
        "name": "measured", "seed": seed, "model": str(folder / "model"), "adapter": {"rank": asked.rank, "targets": asked.targets},
        "sources": {"images": {"path": str(folder / images)}}, "stages": [stage], "evaluate": {"rows": 0}, "previews": {"rows": 0},
        "cache": {"folder": str(cache)}, "save_every": 1_000_000, "log_every": _LOGGED, "track": "none", **({} if defaults else {"workers": 0}),
    }  # fmt: skip


def checked_plan(folder: Path, asked: Asked, *, defaults: bool) -> Plan:
    """The same, read and resolved as train.py does."""
    file = folder / f"{'defaults' if defaults else 'same'}.yaml"
    with file.open("w") as out:
        YAML(typ="safe").dump(plan_of(folder, asked, defaults=defaults, steps=asked.steps, cache=folder / "cache"), out)
    return resolved_plan(train.checked(file).plan)


def record(plan: Plan, folder: Path) -> Recorded:
    """What a run of this plan trains on, by Medley's own way to it; on the way the cache is filled."""
    stage = plan.stages[0]
    with open_run(plan, folder, trace=False) as run:
        leg, inputs = open_leg(run, 0, stage), []
        with contextlib.closing(leg.mixture.batches(0, stage.steps, rank=0, processes=1, workers=0, pin_memory=False, lanes=leg.lanes.readers)) as batches:
            for batch in batches:
                assert batch.is_last  # one micro-batch a step
                shown, (part,) = leg.parts(*leg.draw(batch))
                e = flow.noise(shown.x.shape[1:], leg.objective.noise_keys(batch)).to(shown.x.device)
                inputs.append(Inputs(shown.x, e, part.t, shown.text.embeds, shown.text.pooled, shown.text.mask))
        tokens = run.family.tokens(stage.resolution, stage.resolution) + run.family.text_tokens if isinstance(stage.resolution, int) else 0
        layers, weights, guidance = tuple(lora_layers(leg.model)), adapter_weights(leg.model), run.family.model.guidance
        return Recorded(run.family.name, tuple(inputs), weights, layers, tokens, guidance, DTYPES[resolved_storage(stage)])


def matmul_rate(precision: str, device: torch.device) -> float:
    """Multiplications and additions per second of square matrix products in this precision; the best of several, for that is what the device can do."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    rates = []
    for _ in range(10):
        began = _now(device)
        for _ in range(4):
            a @ b
        rates.append(4 * 2 * side**3 / (_now(device) - began))
    return max(rates)


def let_go(device: torch.device) -> None:
    """Hand memory that nothing refers to any more back to the GPU: a model of 24 GB that was, and the processes that are launched need theirs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- in one process ---------------------------------------------------------------------------------------------------------------------


def logged_losses(run: Path) -> dict[int, float]:
    """What a run logged: to the number of a step, the mean loss of all steps since the line before."""
    lines = [json.loads(line) for line in log_lines(run, "metrics")]
    return {int(line["step"]): float(line["loss"]) for line in lines if line["event"] == "step"}


def over_windows(losses: Sequence[float], ends: Sequence[int]) -> dict[int, float]:
    """Means of steps' losses over the same windows. ends: the number of the last step of each."""
    return {end: fmean(losses[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)}


def mean_loss(windows: Mapping[int, float]) -> float:
    """The mean over all steps."""
    return sum(loss * (end - begin) for (end, loss), begin in zip(windows.items(), [0, *windows], strict=False)) / max(windows)


def compare_losses(name: str, found: Mapping[int, float], bare: Mapping[int, float], within: float) -> None:
    """Hold a loop's losses to the bare loop's. within: relative. Raises LossesDiffer, naming the first window that is off."""
    for end, loss in found.items():
        if not abs(loss - bare[end]) <= within * abs(bare[end]):
            raise LossesDiffer(
                f"'{name}': up to step {end} the loss is {loss:.6f}, and {bare[end]:.6f} of the bare loop, which is {abs(loss / bare[end] - 1):.1e} off (at most {within:g}); they do not compute the same, so their speeds are not compared"
            )


def measure(asked: Asked, folder: Path, device: torch.device) -> tuple[list[Row], float]:
    """All loops in turns, in one process, and the device's rate. Raises LossesDiffer."""
    same = checked_plan(folder, asked, defaults=False)
    recorded = record(same, folder / "recorded")
    let_go(device)
    bare = Bare(folder / "model", recorded, asked.rank, asked.precision, device)
    operations, rate = bare.operations(), matmul_rate(asked.precision, device)
    plans = {name: same if name == OURS else checked_plan(folder, asked, defaults=True) for name in asked.rows if name != BARE}
    runs = {name: folder / f"run-{number}" for number, name in enumerate(plans)}
    with ExitStack() as opened:
        bodies: dict[str, Callable[[], object]] = {BARE: bare}
        for name, plan in plans.items():
            run = opened.enter_context(open_run(plan, runs[name], trace=False))
            bodies[name] = partial(train.train_stage, run, 0, plan.stages[0])
        loops = opened.enter_context(in_turns(bodies))
        for loop in loops.values():
            for _ in range(_WARM):
                loop.step()
        wall: dict[str, list[float]] = {name: [] for name in loops}
        processor: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(asked.rounds):
            for name in list(loops)[:: 1 if turn % 2 else -1]:
                began, used = _now(device), time.process_time()
                for _ in range(asked.block):
                    loops[name].step()
                wall[name].append((_now(device) - began) / asked.block)
                processor[name].append((time.process_time() - used) / asked.block)
        for loop in loops.values():
            loop.finish()
    each = [float(loss) for loss in bare.losses]
    losses = {name: logged_losses(run) for name, run in runs.items()}
    windows = over_windows(each, list(next(iter(losses.values()), {asked.steps: 0.0})))
    if OURS in losses:
        compare_losses(OURS, losses[OURS], windows, _WITHIN[asked.precision])
    if DEFAULTS in losses:
        compare_losses(DEFAULTS, {asked.steps: mean_loss(losses[DEFAULTS])}, {asked.steps: mean_loss(windows)}, _WITHIN_DEFAULTS)
    rows = []
    for name in loops:
        seconds = median(wall[name])
        ratios, processor_ratios = ([one / other for one, other in zip(figures[BARE], figures[name], strict=True)] for figures in (wall, processor))
        row = Row(
            name, seconds * 1e3, min(wall[name]) * 1e3, max(wall[name]) * 1e3, median(processor[name]) * 1e3, median(ratios), median(processor_ratios),
            asked.batch / seconds, asked.batch * recorded.tokens / seconds, operations / seconds / rate, mean_loss(losses.get(name, windows)),
        )  # fmt: skip
        rows.append(row)
    return rows, rate


# --- processes of their own -------------------------------------------------------------------------------------------------------------


def script_arguments(asked: Asked, folder: Path, out: Path, steps: int, layers: Sequence[str], seed: int, images: str = "images") -> list[str]:
    """The diffusers Flux LoRA script's own arguments for the same maths: the same layers, rank, batch, rate, clipping and noise levels."""
    words = {
        "pretrained_model_name_or_path": folder / "model", "dataset_name": folder / images, "image_column": "image", "caption_column": "text", "instance_prompt": "a square",
        "resolution": asked.pixels, "train_batch_size": asked.batch, "max_train_steps": steps, "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "rank": asked.rank, "lora_alpha": asked.rank, "lora_layers": ",".join(layers), "adam_weight_decay": 0, "max_grad_norm": 1.0, "weighting_scheme": "logit_normal",
        "guidance_scale": 1.0, "max_sequence_length": asked.flux.text_tokens, "mixed_precision": "no" if asked.precision == "fp32" else asked.precision,
        "seed": seed, "output_dir": out, "logging_dir": out / "logs", "checkpointing_steps": 1_000_000,
    }  # fmt: skip
    return [word for name, value in words.items() for word in (f"--{name}", str(value))] + ["--cache_latents", "--center_crop"]


def launches(asked: Asked, folder: Path, layers: Sequence[str]) -> list[Launched]:
    """The script and Medley, each as a process of its own, in turns, with another seed each time. Raises RuntimeError with the end of what it said if one fails, and LossesDiffer."""
    assert asked.script is not None
    steps = -(-(asked.dropped + asked.rounds * asked.block) // _LOGGED) * _LOGGED
    wall: dict[str, list[float]] = {SCRIPT: [], LAUNCHED: []}
    processor: dict[str, list[float]] = {SCRIPT: [], LAUNCHED: []}
    first: dict[str, list[float]] = {SCRIPT: [], LAUNCHED: []}
    losses: dict[str, list[float]] = {SCRIPT: [], LAUNCHED: []}
    peak = {SCRIPT: 0, LAUNCHED: 0}
    for number in range(asked.launches):
        for name in (SCRIPT, LAUNCHED):
            place = folder / f"launch-{number}-{len(name)}"
            timed, began, said = launch(name, asked, folder, place, steps, layers, number)
            wall[name] += timed.seconds(asked.dropped)
            processor[name] += timed.processor_seconds(asked.dropped)
            first[name].append(timed.wall[0] - began)
            peak[name] = max(peak[name], timed.peak)
            losses[name] += shown_losses(said, steps) if name == SCRIPT else [loss for end, loss in logged_losses(place).items() if end % _LOGGED == 0]
    found = []
    for name in (SCRIPT, LAUNCHED):
        seconds, error = median(wall[name]), stdev(losses[name]) / len(losses[name]) ** 0.5
        found.append(Launched(name, seconds * 1e3, median(processor[name]) * 1e3, asked.batch / seconds, median(first[name]), peak[name], fmean(losses[name]), error))
    compare_means(*found)
    return found


def launch(name: str, asked: Asked, folder: Path, place: Path, steps: int, layers: Sequence[str], seed: int, images: str = "images") -> tuple[Timed, float, str]:
    """The script, or Medley, as a process of its own: when it made its steps, when it was launched, and what it said. images: the folder of images.

    Raises RuntimeError with the end of what it said if it did not make all steps.
    """
    file, plan, here = folder / "timed.json", folder / "launched.yaml", Path(__file__).parent.parent
    with plan.open("w") as out:
        YAML(typ="safe").dump(plan_of(folder, asked, defaults=False, steps=steps, cache=place / "cache", seed=seed, images=images), out)
    what = [str(asked.script), *script_arguments(asked, folder, place, steps, layers, seed, images)] if name == SCRIPT else [str(here / "train.py"), str(plan), "--out", str(place)]
    began = time.monotonic()
    # From the repository, for `benchmarks`; by its whole path, since the script's interpreter may be another. Threads as in this process: without it the
    # script takes all cores, and is slower for it.
    done = subprocess.run(
        [asked.python if name == SCRIPT else sys.executable, "-m", "benchmarks.timed", str(file), *what],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    timed = read_timed(file) if file.exists() else None
    # What the script does after training, such as loading its own result, may fail for want of something; the steps were made.
    if timed is None or len(timed.wall) < steps:
        raise RuntimeError(f"{name} made {0 if timed is None else len(timed.wall)} of {steps} steps and ended with {done.returncode}:\n{done.stdout[-3000:]}")
    file.unlink()
    return timed, began, done.stdout


def once_through(asked: Asked, folder: Path, layers: Sequence[str]) -> list[OnceThrough]:
    """The script and Medley, each launched on a folder of images that it sees once, in turns. Medley encodes on the way what the script encodes before its first step."""
    make_images(folder / "many", asked.folder, asked.pixels)
    steps = -(-asked.folder // asked.batch)
    first: dict[str, list[float]] = {SCRIPT: [], LAUNCHED: []}
    between: dict[str, list[float]] = {SCRIPT: [], LAUNCHED: []}
    for number in range(asked.launches):
        for name in (SCRIPT, LAUNCHED):
            timed, began, _ = launch(name, asked, folder, folder / f"many-{number}-{len(name)}", steps, layers, number, "many")
            first[name].append(timed.wall[0] - began)
            between[name].append(timed.wall[-1] - timed.wall[0])
    return [OnceThrough(name, asked.folder, median(first[name]), median(between[name])) for name in (SCRIPT, LAUNCHED)]


def shown_losses(said: str, steps: int) -> list[float]:
    """What the script's progress bar showed, as means of windows like those that Medley logs. Raises RuntimeError if a step's loss is not there."""
    shown = {int(step): float(loss) for step, loss in _LINE.findall(said)}
    if missing := [step for step in range(1, steps + 1) if step not in shown]:
        raise RuntimeError(f"the script showed the losses of {len(shown)} of {steps} steps, and not of step {missing[0]}; its progress bar is read as 'N/STEPS [..., loss=L, ...]'")
    return [fmean(shown[step] for step in range(end - _LOGGED + 1, end + 1)) for end in range(_LOGGED, steps + 1, _LOGGED)]


def compare_means(script: Launched, ours: Launched) -> None:
    """Hold the mean losses of two that draw other noise to each other. Raises LossesDiffer if they are further apart than chance and 2 % allow."""
    apart, allowed = abs(ours.loss - script.loss), 4 * (ours.error**2 + script.error**2) ** 0.5 + 0.02 * script.loss
    if not apart <= allowed:
        raise LossesDiffer(
            f"'{ours.name}': the mean loss is {ours.loss:.4f}, and {script.loss:.4f} of '{script.name}', {apart:.4f} apart (at most {allowed:.4f}); they do not compute the same, so their speeds are not compared"
        )


# --- all of it --------------------------------------------------------------------------------------------------------------------------


def run(asked: Asked, device: torch.device, console: Console) -> dict[str, Any]:
    """Measure everything, print the tables, and return it all as JSON values. Raises LossesDiffer."""
    quiet_libraries()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "said.txt").open("w") as said, contextlib.redirect_stdout(said):
            if asked.family == "flux":
                build_flux(folder / "model", asked.flux, device, heavy_text=asked.heavy_text)
            else:
                build_tiny(folder / "model", asked.family)
            let_go(device)
            make_images(folder / "images", asked.images, asked.pixels)
            rows, rate = measure(asked, folder, device)
            let_go(device)
            layers = _shortened(folder, asked) if asked.script else []
            let_go(device)
            found = launches(asked, folder, layers) if asked.script else []
            once = once_through(asked, folder, layers) if asked.folder else []
    about = machine(device)
    console.print(" ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    console.print(step_table(asked, rows, rate))
    if found:
        console.print(launch_table(found))
    if once:
        console.print(once_table(once))
    return {
        "machine": about, "asked": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(asked).items()}, "matmul_per_second": rate,
        "rows": [asdict(row) for row in rows], "launched": [asdict(each) for each in found], "once_through": [asdict(each) for each in once],
    }  # fmt: skip


def _shortened(folder: Path, asked: Asked) -> list[str]:
    """The names of the layers that carry a pair, as the script takes them: it matches the ends of names, so whole names match themselves alone."""
    plan = checked_plan(folder, asked, defaults=False)
    with open_run(plan, folder / "named", trace=False) as run:
        return list(lora_layers(open_leg(run, 0, plan.stages[0]).model))


def machine(device: torch.device) -> dict[str, Any]:
    """What it is measured on."""
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {library: version(library) for library in ("torch", "diffusers", "peft", "accelerate")}
    return {"python": platform.python_version(), **versions, "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load}


def step_table(asked: Asked, rows: Sequence[Row], rate: float) -> Table:
    """The loops in one process."""
    table = Table(
        title=f"A training step: {asked.size} {asked.model_words}, {asked.pixels} pixels, batch {asked.batch}, rank {asked.rank}, {asked.precision}; matrix products at {rate / 1e12:.3g} TFLOP/s",
        title_justify="left",
    )
    for column in ("loop", "ms a step", "lowest to highest", "of bare", "processor ms", "of bare", "images/s", "tokens/s", "of the rate", "mean loss"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.milliseconds:.2f}", f"{row.lowest:.2f} to {row.highest:.2f}", f"{row.of_bare:.3f}", f"{row.processor_milliseconds:.2f}", f"{row.processor_of_bare:.3f}",
            f"{row.images_per_second:,.1f}", f"{row.tokens_per_second:,.0f}", f"{row.of_rate:.1%}", f"{row.loss:.5f}",
        )  # fmt: skip
    return table


def launch_table(found: Sequence[Launched]) -> Table:
    """The processes."""
    table = Table(title="Launched as processes of their own, in turns", title_justify="left")
    for column in ("", "ms a step", "images/s", "times the script's", "processor ms", "times the script's", "first step after", "peak memory", "mean loss"):
        table.add_column(column, justify="left" if column == "" else "right")
    script = found[0]
    for each in found:
        table.add_row(
            each.name, f"{each.milliseconds:.2f}", f"{each.images_per_second:,.1f}", f"{script.milliseconds / each.milliseconds:.2f}",
            f"{each.processor_milliseconds:.2f}", f"{script.processor_milliseconds / each.processor_milliseconds:.2f}",
            f"{each.first_step:.1f} s", f"{each.peak / 1e6:,.0f} MB", f"{each.loss:.4f} ± {each.error:.4f}",
        )  # fmt: skip
    return table


def once_table(found: Sequence[OnceThrough]) -> Table:
    """The processes on a folder that they see once."""
    table = Table(title=f"A folder of {found[0].images:,} images, once, launched in turns", title_justify="left")
    for column in ("", "first row after", "from the first to the last row", "to the last row"):
        table.add_column(column, justify="left" if column == "" else "right")
    for each in found:
        table.add_row(each.name, f"{each.first:.1f} s", f"{each.between:.1f} s", f"{each.first + each.between:.1f} s")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for. Returns the exit code: 1 if losses differ, or a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--family", choices=FAMILIES, default="flux", help="other than flux: the test suite's tiny model")
    parser.add_argument("--size", choices=list(FLUX), default="tiny", help="of the Flux with random weights")
    parser.add_argument("--pixels", type=int, default=32, help="side of the images")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--targets", choices=["attention", "blocks", "linear"], default="blocks", help="layers with a pair")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of all loops but that with the defaults")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=_LOGGED, help="steps of each loop in a round; a multiple of 10 has its part of the log lines")
    parser.add_argument("--images", type=int, default=64, help="in the folder")
    parser.add_argument(
        "--rows", choices=["same", "defaults"], nargs="*", default=["same", "defaults"], help="which of Medley's loops stand beside the bare one; each holds a model of its own"
    )
    parser.add_argument("--script", type=Path, metavar="FILE", help="the diffusers Flux LoRA script, from its sources")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="the interpreter that runs it, if not this one")
    parser.add_argument("--heavy-text", action="store_true", help="with a T5 encoder as large as the transformer, as the real one nearly is")
    parser.add_argument("--text-tokens", type=int, help="of a prompt, if not those of the size")
    parser.add_argument("--folder", type=int, default=0, metavar="IMAGES", help="with --script: go once through a folder of so many images, launched, and time it from the first to the last row")
    parser.add_argument("--launches", type=int, default=3, help="of the script and of Medley")
    parser.add_argument("--target", type=float, metavar="RATIO", help="exit with 1 if Medley with the same maths is slower than so many times the bare loop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    given = parser.parse_args(arguments)
    if given.family != "flux" and (given.size != "tiny" or given.script or given.heavy_text or given.text_tokens or given.folder):
        parser.error(f"--family {given.family} is the test suite's tiny model; --size, --script, --folder, --heavy-text and --text-tokens are for flux alone")
    if given.folder and not given.script:
        parser.error("--folder is gone through by the script and by Medley; add --script FILE")
    words = {"same": OURS, "defaults": DEFAULTS}
    asked = Asked(
        given.size, given.pixels, given.batch, given.rank, given.precision, given.rounds, given.block, given.images, tuple(words[word] for word in given.rows),
        given.script and given.script.resolve(), given.python, given.launches, given.targets, given.heavy_text, given.text_tokens,
        given.family, given.folder,
    )  # fmt: skip
    try:
        report = run(asked, choose_device(), Console(width=None if os.isatty(1) else 190))
    except LossesDiffer as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    if given.json:
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    missed = [row for row in report["rows"] if given.target and row["name"] == OURS and row["of_bare"] < given.target]
    for row in missed:
        print(f"failed: '{OURS}' reached {row['of_bare']:.3f} of the bare loop; at least {given.target:g} was asked for", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
