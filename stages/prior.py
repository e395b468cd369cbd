"""Prior: images that the model makes itself before it is trained, kept by content, so that a plan can hold on to what the model could do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from mixing.buckets import class_of
from mixing.images import from_tensor
from mixing.keys import key
from mixing.rows import NoRows
from mixing.selected import Selection
from mixing.source import Source
from stages.engine import Engine
from stages.families.family import Family
from stages.families.open import fingerprint
from stages.plan import Plan, Prior, Stage
from stages.precision import StagePrecision
from stages.problems import PlanError
from stages.resolved import main_resolution, num_held_out, quantised, still_mixes
from stages.sampler import Sampler, sample
from stages.shown import Shown
from stages.storage import Stored, load_stored

_AT_ONCE = 4
_DONE = "prior.json"


def prompts_of(name: str, prior: Prior, root: Path) -> list[str]:
    """The prompts of a prior source: a list, or the lines of a file that are not empty. Raises PlanError."""
    if not isinstance(prior.prompts, str):
        return list(prior.prompts)
    try:
        lines = (root / prior.prompts).read_text(encoding="utf-8").splitlines()
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


def make_prior(plan: Plan, name: str, folder: Path, family: Family, accelerator: Accelerator, engine: Engine, root: Path, say: Callable[[str], None]) -> None:
    """Make a prior source's images with the untrained model, shared out among the processes, each with its prompt in a .txt beside it.

    Image i has prompt i modulo their number, and noise keyed by (seed, source, i), so they do not depend on the processes. What is half made is made anew.
    """
    prior = plan.sources[name].prior
    assert prior is not None
    prompts, side = prompts_of(name, prior, root), side_of(plan, name)
    if side % family.pixel_multiple:
        raise PlanError.at(f"sources.{name}.prior.resolution", f"{side} is not a multiple of {family.pixel_multiple}, as {family.pipeline_class} needs")
    say(f"source {name}: the model makes its {prior.count:,} images of {side} x {side} pixels first, into {folder}")
    partial = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    on_gpu = family.device.type == "cuda"
    # Quantised where the first stage that draws the source is, for where that fits the model fits.
    wanted = Stored(torch.bfloat16 if on_gpu else torch.float32, quantised(_first_drawing(plan, name)))
    transformer = engine.place(load_stored(family, wanted, None, device=engine.loads_on))
    sampler = Sampler(prior.steps, StagePrecision("bf16" if on_gpu else "fp32", family.device), prior.guidance)
    shape = family.encode_images(torch.zeros(1, 3, side, side)).shape[1:]
    with engine.shared_out(transformer):
        for number, first in enumerate(range(0, prior.count, _AT_ONCE)):
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            images = range(first, min(first + _AT_ONCE, prior.count))
            asked = [prompts[image % len(prompts)] for image in images]
            shown = Shown(torch.empty(len(asked), *shape), family.encode_prompts(asked), (), None)
            made = family.decode_latents(sample(family, transformer, shape, [key(plan.seed, "prior", name, image) for image in images], shown, sampler))
            for image, prompt, pixels in zip(images, asked, made, strict=True):
                from_tensor(pixels.cpu()).save(partial / f"{image:06d}.png")
                (partial / f"{image:06d}.txt").write_text(prompt, encoding="utf-8")
    engine.release(transformer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _DONE).write_text(json.dumps({"images": prior.count, "prompts": len(prompts)}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def planned(plan: Plan, name: str) -> Selection:
    """A prior source whose images are not made yet, as far as --explain asks."""
    prior, side = plan.sources[name].prior, side_of(plan, name)
    assert prior is not None
    held_out = min(num_held_out(plan), prior.count // 10)
    none = np.empty(0, dtype=np.int32)
    source = Source(name, "text_to_image", none.astype(np.uint8), np.empty((0, 2), dtype=np.uint32), (), "", NoRows())
    return Selection(source, {class_of((side, side), []): range(prior.count - held_out)}, none, repeat=plan.sources[name].repeat)
