"""Prior: images that the model makes itself before it is trained, kept by content, so that a plan can hold on to what the model could do."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO

import numpy as np
import torch
from rich.markup import escape
from torch import nn

from mixing.buckets import class_of
from mixing.images import from_tensor
from mixing.keys import key
from mixing.plain_file import read_plain
from mixing.rows import NoRows
from mixing.selected import Selection
from mixing.source import Source
from stages.engine import Engine
from stages.families.family import Family
from stages.families.open import fingerprint
from stages.plan import Plan, Prior, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.processes import Processes
from stages.resolved import main_resolution, num_held_out, quantised, still_mixes
from stages.sampler import Sampler, sample
from stages.shown import Shown
from stages.storage import Stored, load_stored

_AT_ONCE = 4
_DONE = "prior.json"
_LOOKS = 0.5  # seconds between two looks at whether another run has ended


def prompts_of(name: str, prior: Prior, root: Path) -> list[str]:
    """The prompts of a prior source: a list, or the lines of a file that are not empty. Raises PlanError."""
    if not isinstance(prior.prompts, str):
        return list(prior.prompts)
    try:
        lines = read_plain(root / prior.prompts).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError.at(f"sources.{name}.prior.prompts", f"'{prior.prompts}' cannot be read: {error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise PlanError.at(f"sources.{name}.prior.prompts", f"'{prior.prompts}' holds no prompt; write one on each line")
    return prompts


def side_of(plan: Plan, name: str) -> int:
    """The side of a prior source's images: what the plan says, or the resolution of the first stage that draws it."""
    prior = plan.sources[name].prior
    assert prior is not None
    return prior.resolution or main_resolution(_first_drawing(plan, name))


def _first_drawing(plan: Plan, name: str) -> Stage:
    """The first stage that draws a source."""
    return next((stage for stage in plan.stages if _draws(stage, name)), plan.stages[0])


def _draws(stage: Stage, name: str) -> bool:
    return any(not isinstance(mix, Mapping) or mix.get(name) for mix in still_mixes(stage))


def prior_folder(plan: Plan, name: str, model: str, root: Path, otherwise: Path) -> Path:
    """Where a prior source's images lie: in the cache, by all that they depend on; in `otherwise`, the run's folder, where the plan keeps no cache. model: its fingerprint."""
    prior = plan.sources[name].prior
    assert prior is not None
    blocks = quantised(_first_drawing(plan, name))
    said = json.dumps([1, model, prompts_of(name, prior, root), prior.count, prior.steps, prior.guidance, side_of(plan, name), plan.seed, name, *([blocks] if blocks else [])])
    place = otherwise if plan.cache == "none" else Path(plan.cache.folder)
    return place / "prior" / f"{name}-{sha256(said.encode()).hexdigest()[:16]}"


def is_made(folder: Path) -> bool:
    """Whether all images are there."""
    return (folder / _DONE).exists()


def priors_made(plan: Plan, root: Path) -> dict[str, Path]:
    """Where the images of those prior sources lie whose images are there, in a plan that keeps a cache."""
    names = [name for name, source in plan.sources.items() if source.prior is not None]
    if not names or plan.cache == "none":
        return {}
    model = fingerprint(plan.model)
    places = {name: prior_folder(plan, name, model, root, root) for name in names}
    return {name: place for name, place in places.items() if is_made(place)}


@contextmanager
def alone(folder: Path, processes: Processes, heed: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder of a prior source against other runs, which may make the same images; until one that makes them has ended it is waited for. Every process must take part.

    heed: raises Stopped, on all processes, if a signal has come. Raises OSError.
    """
    with ExitStack() as leaving:
        lock = leaving.enter_context(folder.with_name(f".{folder.name}.lock").open("w")) if processes.is_main else None
        is_said = False
        while not processes.gathered(lock is None or _is_taken(lock))[0]:
            if not is_said:
                is_said = True
                say(f"another run is making the images of {escape(str(folder))}; waiting for it")
            heed()
            time.sleep(_LOOKS)
        yield


def _is_taken(lock: IO[str]) -> bool:
    """Whether this process has the lock now, which goes with it, however it ends; on a disk that keeps none every process has."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def make_prior(
    plan: Plan, name: str, folder: Path, family: Family, processes: Processes, engine: Engine, inside: Callable[[nn.Module], AbstractContextManager[None]], root: Path, say: Callable[[str], None]
) -> None:
    """Make a prior source's images with the untrained model, shared out among the processes, each with its prompt in a .txt beside it.

    Image i has prompt i modulo their number, and noise keyed by (seed, source, i), so they do not depend on the processes. Those that a launch before this one has made stand.
    No other run may do so at the same time (`alone`). inside: in what processes sample with a model, as `stages.aside.aside`; raises Stopped if a signal comes.
    """
    prior = plan.sources[name].prior
    assert prior is not None
    prompts, side = prompts_of(name, prior, root), side_of(plan, name)
    if side % family.pixel_multiple:
        raise PlanError.at(f"sources.{name}.prior.resolution", f"{side} is not a multiple of {family.pixel_multiple}, as {family.pipeline_class} needs")
    say(f"source {name}: the model makes its {prior.count:,} images of {side} x {side} pixels first, into {escape(str(folder))}")
    partial = folder.with_name(f".{folder.name}.partial")
    if processes.is_main:
        partial.mkdir(parents=True, exist_ok=True)
    processes.wait()
    on_gpu = family.device.type == "cuda"
    # Quantised where the first stage that draws the source is, for where that fits the model fits.
    wanted = Stored(torch.bfloat16 if on_gpu else torch.float32, quantised(_first_drawing(plan, name)))
    transformer = engine.place(load_stored(family, wanted, None, device=engine.loads_on))
    sampler = Sampler(prior.steps, StagePrecision("bf16" if on_gpu else "fp32", family.device), prior.guidance)
    shape = family.encode_images(torch.zeros(1, 3, side, side)).shape[1:]
    portions = [range(first, min(first + _AT_ONCE, prior.count)) for first in range(0, prior.count, _AT_ONCE)]
    there = processes.gathered({image for images in portions for image in images if (partial / f"{image:06d}.png").exists()})[0]
    if there:
        say(f"  {len(there):,} of them are there already")
    with inside(transformer):
        for number, images in enumerate(portions):
            if number % processes.number != processes.rank or there.issuperset(images):
                continue
            asked = [prompts[image % len(prompts)] for image in images]
            shown = Shown(torch.empty(len(asked), *shape), family.encode_prompts(asked), (), None)
            made = family.decode_latents(sample(family, transformer, shape, [key(plan.seed, "prior", name, image) for image in images], shown, sampler))
            for image, prompt, pixels in zip(images, asked, made, strict=True):
                (partial / f"{image:06d}.txt").write_text(prompt, encoding="utf-8")
                half = partial / f".{image:06d}.png"
                from_tensor(pixels.cpu()).save(half)
                half.replace(partial / f"{image:06d}.png")
    engine.release(transformer)
    processes.wait()
    if processes.is_main:
        for half in partial.glob(".*.png"):  # of a launch that was killed
            half.unlink()
        (partial / _DONE).write_text(json.dumps({"images": prior.count, "prompts": len(prompts)}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    processes.wait()


def planned(plan: Plan, name: str) -> Selection:
    """A prior source whose images are not made yet, as far as --explain asks."""
    prior, side = plan.sources[name].prior, side_of(plan, name)
    assert prior is not None
    held_out = min(num_held_out(plan), prior.count // 10)
    none = np.empty(0, dtype=np.int32)
    source = Source(name, "text_to_image", none.astype(np.uint8), np.empty((0, 2), dtype=np.uint32), (), "", NoRows())
    return Selection(source, {class_of((side, side), []): range(prior.count - held_out)}, none, repeat=plan.sources[name].repeat)
