"""Card: the README.md of what is published, which the Hub shows: what it is, how it is used, what it saw, how well it does, and how to go on from it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData

from mixing.columns import TASKS
from stages.card_facts import Sample
from stages.families.family import Family
from stages.hub.words import HERE, PREFIX, is_repo
from stages.layouts import loading_lines
from stages.placed import newest, placed_adapters, total_rank
from stages.plan import Model, Plan
from stages.reader import to_yaml
from stages.resolved import main_resolution, quantised, resolved_storage, windows_of


@dataclass(frozen=True)
class Told:
    """What a card tells that the plan does not say."""

    table: str
    """The held-out losses, as Markdown."""
    ledger: Mapping[str, Any]
    versions: Mapping[str, str]
    """Of the libraries beneath."""
    samples: Sequence[Sample] = ()
    licence: Mapping[str, str] | None = None
    """The base's, as the Hub's metadata has it; None if it is not known."""
    base: str | None = None
    """Where the base lies that was trained here: a repository or a folder; None if the base was not trained."""
    has_adapter: bool = True
    experts: tuple[str | None, ...] = (None,)
    """The transformers that learnt adapters."""
    start: str | None = None
    """What the run began from, with the commit where that is on the Hub."""


def model_card(plan: Plan, family: Family, told: Told) -> str:
    """The whole card. plan: up to the last stage that what is published has gone through."""
    repo = _base_repo(plan)
    place = plan.publish.repo if plan.publish else HERE
    return "\n".join(
        [
            "---",
            _metadata(plan, family, told).to_yaml().rstrip(),
            "---",
            f"# {plan.name}",
            "",
            *(("<Gallery />", "", "![Held-out rows: reference, output, target](previews.png)", "") if told.samples else ()),
            _introduction(plan, family, told, repo),
            "",
            "## How to use",
            "",
            "```python",
            *_code(plan, family, told, place),
            "```",
            "",
            *_notes_on_use(plan, family),
            "## What it saw",
            "",
            *_ledger(told.ledger),
            "",
            "## Held-out loss",
            "",
            told.table,
            "## The plan",
            "",
            "<details><summary>Every stage, source and number</summary>",
            "",
            "````yaml",
            to_yaml(plan).rstrip(),
            "````",
            "",
            "</details>",
            "",
            *_going_on(plan, told, place),
            "## Licence",
            "",
            _licence(told.licence, repo),
            "",
            "## Made with",
            "",
            ", ".join(f"{name} {version}" for name, version in told.versions.items()),
            "",
        ]
    )


def _base_repo(plan: Plan) -> str:
    return plan.model.repo if isinstance(plan.model, Model) else plan.model


def _is_on_the_hub(repo: str) -> bool:
    return is_repo(repo) and not Path(repo).is_dir()


def _metadata(plan: Plan, family: Family, told: Told) -> ModelCardData:
    """What stands at the card's head for the Hub to read. A base that is a folder is not named there: the Hub takes nothing but its own names."""
    repo, settings = _base_repo(plan), newest(placed_adapters(plan, len(plan.stages) - 1)).settings
    tasks = _pipeline_tags(plan, family)
    triggers = {words for source in plan.sources.values() for words in (source.captions.trigger, source.prompt) if words}
    on_hub = _is_on_the_hub(repo)
    kind = ("dora" if settings.variant == "dora" else "lora",) if told.has_adapter else ()
    return ModelCardData(
        base_model=repo if on_hub else None,
        license=(told.licence or {}).get("license", "other"),
        license_name=(told.licence or {}).get("license_name") or (None if told.licence else "as-the-base-model"),
        license_link=(told.licence or {}).get("license_link"),
        library_name="diffusers",
        pipeline_tag=tasks[0],
        tags=list(dict.fromkeys([*kind, "diffusers", "medley", *(("template:sd-lora",) if told.has_adapter else ()), *tasks])),
        base_model_relation=("adapter" if told.base is None else "finetune") if on_hub else None,
        base_model_revision=family.revision if on_hub else None,
        instance_prompt=triggers.pop() if len(triggers) == 1 else None,
        widget=[{"text": sample.prompt or "-", "output": {"url": sample.name}} for sample in told.samples] or None,
    )


def _pipeline_tags(plan: Plan, family: Family) -> list[str]:
    """What the Hub calls the tasks, the main one first."""
    text_alone = [not TASKS[source.task].references for source in plan.sources.values()]
    to_what = "video" if family.name == "wan" else "image"
    return [*([f"text-to-{to_what}"] if any(text_alone) else []), *([f"image-to-{to_what}"] if not all(text_alone) else [])]


def _introduction(plan: Plan, family: Family, told: Told, repo: str) -> str:
    shown = f"[{repo}](https://huggingface.co/{repo})" if _is_on_the_hub(repo) else _as_written(repo)
    at = f" at revision {_as_written(family.revision)}" if _is_on_the_hub(repo) and family.revision else ""
    placed = placed_adapters(plan, len(plan.stages) - 1)
    stages = f"{len(plan.stages)} stages" if len(plan.stages) > 1 else "1 stage"
    through = f"trained by Medley in {stages}: {', '.join(stage.name for stage in plan.stages)}."
    began = f" It began from {_as_written(told.start)}." if told.start else ""
    if not told.has_adapter:
        return f"{shown}{at}, every weight of its transformer {through}{began}"
    kind = "DoRA" if newest(placed).settings.variant == "dora" else "LoRA"
    base = f"{shown}{at}" if told.base is None else f"a base that was trained too, made of {shown}{at}"
    trained = [stage for stage in plan.stages if stage.train != "full"]
    stored = ", then ".join(dict.fromkeys(resolved_storage(stage) for stage in trained))
    over = f" While it was trained the base was stored in {stored}; over another its outputs are a little other than those that training saw." if any(map(quantised, trained)) else ""
    return f"A {kind} of rank {total_rank(placed)} for {base}, {through}{began}{over}"


def _code(plan: Plan, family: Family, told: Told, place: str) -> Iterator[str]:
    """Python that loads what is published and samples from it."""
    repo = told.base or _base_repo(plan)
    revision = f", revision={json.dumps(family.revision)}" if told.base is None and _is_on_the_hub(repo) and family.revision else ""
    parameters = inspect.signature(getattr(diffusers, family.pipeline_class).__call__).parameters
    takes_image = next((name for name in ("image", "input_images") if name in parameters), None)
    sees_references = takes_image is not None and any(TASKS[source.task].references for source in plan.sources.values())
    yield "import torch"
    yield f"from diffusers import {family.pipeline_class}"
    if sees_references:
        yield "from diffusers.utils import load_image"
    yield ""
    yield 'device = "cuda" if torch.cuda.is_available() else "cpu"'
    yield f"pipe = {family.pipeline_class}.from_pretrained({json.dumps(repo)}{revision}, torch_dtype=torch.bfloat16).to(device)"
    if told.has_adapter:
        yield from loading_lines(family, told.experts, place)
    if not family.encodes_images:  # no stock pipeline samples pixels
        return
    stage = plan.stages[-1]
    prompt = next((sample.prompt for sample in told.samples if sample.prompt), "a photo")
    if sees_references and takes_image == "input_images" and "<|image_1|>" not in prompt:
        prompt = f"<img><|image_1|></img> {prompt}"  # OmniGen looks at no image that its prompt does not name
    side = main_resolution(stage)
    given = [json.dumps(prompt, ensure_ascii=False) if next(iter(list(parameters)[1:]), "") == "prompt" else f"prompt={json.dumps(prompt, ensure_ascii=False)}"]
    if sees_references:
        reference = 'load_image("reference.png")'
        given.append(f"{takes_image}={reference}" if takes_image == "image" else f"{takes_image}=[{reference}]")
    if {"height", "width"} <= parameters.keys():
        given.append(f"height={side}, width={side}")
    if "num_frames" in parameters:
        given.append('num_frames=1, output_type="pil"')
    given.append(f"num_inference_steps={plan.previews.steps}, generator=torch.Generator().manual_seed(0)")
    yield f"image = pipe({', '.join(given)}).{'frames[0][0]' if 'num_frames' in parameters else 'images[0]'}"
    yield 'image.save("sample.png")'


def _notes_on_use(plan: Plan, family: Family) -> Iterator[str]:
    """What a reader must know who samples otherwise than by these lines."""
    triggers = list(dict.fromkeys(source.captions.trigger for source in plan.sources.values() if source.captions.trigger))
    if triggers:
        yield f"Prompts of training began with {' or '.join(map(_as_written, triggers))}."
        yield ""
    if not family.encodes_images:
        yield "This model works on pixels, which no stock pipeline samples; Medley's own sampler does (`stages/sampler.py`)."
        yield ""
    if windows_of(plan.stages[-1]) is not None:
        yield "It was trained in resolution levels; Medley's `stages/pyramid_pipeline.py` samples so."
        yield ""
    if any(source.task == "entity" for source in plan.sources.values()):
        yield "It was trained on parts of images with prompts of their own; Medley's `stages/region_pipeline.py` samples so."
        yield ""


def _ledger(ledger: Mapping[str, Any]) -> Iterator[str]:
    yield "| stage | source | asked | drawn | images | epochs |"
    yield "|---|---|---:|---:|---:|---:|"
    for stage in ledger["stages"]:
        for name, entry in stage["sources"].items():
            epochs = f"{entry['epochs']:.2f}" if "epochs" in entry else "a stream"
            yield f"| {stage['stage']} | {name} | {entry['asked']:.1%} | {entry['drawn']:.1%} | {entry['images']:,} | {epochs} |"


def _going_on(plan: Plan, told: Told, place: str) -> Iterator[str]:
    """The lines of a plan that begins from what is published."""
    yield "## Go on from it"
    yield ""
    yield "```yaml"
    if told.base is not None:
        yield f"model: {json.dumps(told.base)}"
    else:
        yield f"model: {json.dumps(_base_repo(plan))}" if isinstance(plan.model, str) or plan.model.revision is None else f"model: {{repo: {json.dumps(plan.model.repo)}, revision: {json.dumps(plan.model.revision)}}}"
    if told.has_adapter:
        placed = placed_adapters(plan, len(plan.stages) - 1)
        settings = newest(placed).settings.model_dump(mode="json", exclude_defaults=True) | {"rank": total_rank(placed)}
        yield f"adapter: {{{', '.join(f'{name}: {json.dumps(value)}' for name, value in settings.items() if value is not None)}}}"
        yield f"start: {PREFIX + place if plan.publish else place}"
    yield "```"
    yield ""


def _licence(licence: Mapping[str, str] | None, repo: str) -> str:
    if licence is None:
        return f"That of the base model, {_as_written(repo)}, whose card names none that could be read here: look at it before you pass this on."
    name, link = licence.get("license_name") or licence["license"], licence.get("license_link", "")
    said = name if re.fullmatch(r"[A-Za-z0-9 .+_-]+", name) else _as_written(name)
    if re.fullmatch(r"https://[A-Za-z0-9/._~%?=&#+-]+", link):
        said = f"[{said}]({link})"
    return f"That of the base model, {_as_written(repo)}: {said}."


def _as_written(text: str) -> str:
    """A text of somebody else's between backticks, on one line, so that nothing in it is Markdown or HTML."""
    line = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"
