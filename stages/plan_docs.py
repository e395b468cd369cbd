"""Write docs/plan.md and docs/plan.schema.json from the plan language itself.

    python -m stages.plan_docs            # write both
    python -m stages.plan_docs --check    # exit 1 if one is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.plan import Plan
from stages.shape import Rules, Schema

DOCS = Path(__file__).resolve().parent.parent / "docs"

SHORTEST = """\
model: black-forest-labs/FLUX.1-dev
sources:
  photos: {path: data/photos}              # a folder of images, each with its .txt caption
stages:
  - {name: learn, steps: 1000, resolution: 512, batch: 4, lr: 1e-4}
"""

LONGER = """\
name: two-phase
seed: 42
model: {repo: black-forest-labs/FLUX.1-dev, revision: 3de623fc}   # a Hub id or a folder
adapter: {rank: 16, alpha: 16, targets: attention}
sources:
  t2i:     {path: data/t2i}                                       # images with .txt captions
  subject: {path: hub/user/subjects, task: subject, columns: {target: image, reference: ref, prompt: text}}
  edit:    {path: data/edits.jsonl, task: edit, where: width >= 512 and aspect < 2}
  other:   {path: "data/other-{000..063}.parquet", task: other, take: {count: 213000, by: random, seed: 3}}
stages:
  - name: expose                     # every kind is seen, in proportion to its size
    steps: 2000
    mix: natural
    resolution: 256
    batch: {images: 64, micro: 8}    # 64 images a step over all processes, 8 at a time
    precision: bf16
    lr: {peak: 1e-3, warmup: 200, warmup_from: 4e-6, schedule: cosine, floor: 4e-6}
  - name: refine
    steps: 1000
    mix: {t2i: 50, subject: 20, edit: 10, other: 10}
    resolution: [{pixels: 384, share: 25}, {pixels: 512, share: 50}, {pixels: 768, share: 25}]     # mixed, each in its exact share
    batch: {tokens: 65536}           # the same work each step, whatever the images' sizes
    lr: 1e-4
    ema: 0.999                       # this average is evaluated and published
    handoff: {optimizer: keep_v}
  - name: polish
    steps: 200
    mix: {t2i: 1}
    resolution: 1024
    batch: 16
    precision: fp32
    train: ["transformer_blocks\\\\.\\\\d+\\\\.attn\\\\..*"]          # only these pairs of the adapter
    lr: 2e-5
"""

_OPENING = """\
<!-- Written by `python -m stages.plan_docs` from the docstrings of stages/plan.py; change those, and run it again. -->

# The plan

A plan is a YAML file that says which model is trained, on which sources, through which stages. The shortest one that trains:

```yaml
{shortest}```

It is carried out, checked and explained by

```
accelerate launch --config_file accelerate_configs/cpu.yaml train.py plans/x.yaml    # train, or go on where it stopped
python train.py plans/x.yaml --check        # is it sound? every problem with file, line and column, in under a second
python train.py plans/x.yaml --explain      # what will happen: steps, images, epochs of each source, rates, memory
```

A longer one, whose stages differ in mix, resolution, precision, learning rate and in what trains:

```yaml
{longer}```

## How it is read

- Unknown fields, double keys and anything that would have no effect are errors; a typing error never trains with a default.
- The YAML is version 1.2: `no` is a word, `1e-4` and `1_000` are numbers. Anchors, aliases and `<<` work, so stages can share fields:
  `- &first {{name: a, ...}}`, then `- {{<<: *first, name: b}}`.
- Paths start where the command is typed.
- `--set stages.refine.steps=50` changes one field for one launch, and can be given again and again. Stages go by name or by number from 0,
  sources by name; the value is YAML; mappings on the way are made, and `--set stages.refine.lr.schedule=cosine` turns `lr: 1e-4` into
  `lr: {{peak: 1e-4, schedule: cosine}}`.
- `null` is the same as leaving an optional field out; where it is something else, it is named below.
- Editors complete and check a plan that begins with the line `# yaml-language-server: $schema=../docs/plan.schema.json`.

## What a step holds

Images go into buckets: a row's class follows from the sizes of its images alone, a stage's resolution turns classes into shapes. A micro-batch holds rows of one shape; the
images of a stage stand in one long line of micro-batches, and a step is a piece of that line, so many images or tokens long. Where a step ends inside a micro-batch the rest of it
opens the next step: nothing is dropped, and nothing is waited for. Tokens are those that the transformer computes on, of target, references and prompt. At the end of
every step each source's images differ from its share by less than 2 where all rows have one shape, and by about one micro-batch where they have not; `--explain` shows
the buckets of every source. Processes share a step's images out so that each has as many tokens, whatever their number.

## Conditions

`where` is a condition on a row: `512 <= width < 2048 and style in ["photo", "film"] and not prompt contains "blurry"`.

- Names are the table's columns (those that are no words between backticks: `` `aesthetic score` > 5 ``), and `width`, `height`, `pixels`, `aspect` (width / height), `references`, `prompt`.
- `<`, `<=`, `>`, `>=`, `==`, `!=`, also in chains; `+ - * /` on numbers; `in [...]`, `not in [...]`; `contains "words"` and `not contains`, whole words in any case;
  `is none`, `is not none`; `and`, `or`, `not`, parentheses; a column of true and false stands for itself.
- A missing value makes a comparison false. A number compared with a text is an error, and so is an unknown name. Nothing is evaluated as Python.
"""

_WHERE = {
    "Plan": "At the top",
    "Model": "model",
    "Adapter": "adapter",
    "Source": "sources: NAME",
    "Prior": "sources: NAME: prior",
    "Take": "sources: NAME: take",
    "Captions": "sources: NAME: captions",
    "Augment": "sources: NAME: augment",
    "Stage": "stages",
    "LearningRate": "stages: lr",
    "Level": "stages: resolution",
    "Buckets": "stages: buckets",
    "Batch": "stages: batch",
    "Change": "stages: batch: images, tokens",
    "MicroTokens": "stages: batch: micro",
    "MixRamp": "stages: mix",
    "MixAdaptive": "stages: mix: adaptive",
    "Power": "stages: mix: power",
    "Every": "stages: checkpointing",
    "Optimizer": "stages: optimizer",
    "Guard": "stages: guard",
    "Timesteps": "stages: timesteps",
    "Pyramid": "stages: pyramid",
    "Ramped": "stages: pyramid: shares",
    "Loss": "stages: loss",
    "Changed": "stages: loss: changed",
    "Dropout": "stages: dropout",
    "Handoff": "stages: handoff",
    "Cache": "cache",
    "Evaluate": "evaluate",
    "Accuracy": "evaluate: accuracy",
    "MetricModel": "evaluate: metrics",
    "Previews": "previews",
    "Tracker": "track",
    "Publish": "publish",
}
"""Types in the order of their sections to the sections' headings."""


def schema() -> dict[str, Any]:
    """The plan language as a JSON schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()}


def markdown() -> str:
    """The plan language as a page to read."""
    rules = Rules(Plan.model_json_schema())
    definitions = {"Plan": rules.schema, **rules.schema["$defs"]}
    if missing := definitions.keys() ^ _WHERE.keys():
        raise ValueError(f"types of the plan without a heading, or headings without a type: {', '.join(sorted(missing))}")
    sections = [_OPENING.format(shortest=SHORTEST, longer=LONGER)]
    for name, where in _WHERE.items():
        lines = [f"## {_heading(where)}", "", _flowing(definitions[name]["description"]), ""]
        lines += _fields(definitions[name], rules)
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _fields(definition: Schema, rules: Rules) -> Iterator[str]:
    required = definition.get("required", [])
    for name, field in definition["properties"].items():
        standing = "required" if name in required else _default(field)
        yield f"- **`{name}`** ({standing}). {_flowing(field.get('description', ''))}  \n  *Written as* {_allowed(field, rules)}."


def _default(field: Schema) -> str:
    """What is taken where the field is left out."""
    default = field.get("default")
    if default is None or isinstance(default, dict):
        return "optional"
    return f"default `{json.dumps(default).strip(chr(34))}`"


def _allowed(field: Schema, rules: Rules) -> str:
    """The ways of writing a value, in words; null only where leaving the field out means something else."""
    ways = [way for way in rules.ways(field) if way.get("type") != "null" or field.get("default") is not None]
    return ", or ".join(_way(way, rules) for way in ways)


def _way(way: Schema, rules: Rules) -> str:
    """One way of writing a value, in words, with a link to a mapping's own section."""
    if "const" in way or "enum" in way:
        words = [f"`{word}`" for word in way.get("enum", [way.get("const")])]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    match way.get("type"):
        case "null":
            return "`null`"
        case "object" if "properties" in way:
            return f"[a mapping](#{_anchor(_heading(_WHERE[way['title']]))})"
        case "object":
            inner = way.get("additionalProperties") or next(iter(way["patternProperties"].values()))
            keys = ", ".join(f"`{name}`" for name in way.get("propertyNames", {}).get("enum", ())) or "names"
            return f"a mapping of {keys} to {_allowed(inner, rules)}"
        case "array" if "prefixItems" in way:
            return f"a list of {way['minItems']}, each {_allowed(way['prefixItems'][0], rules)}"
        case "array":
            inner = _allowed(way["items"], rules)
            return f"a list, each item {inner}" if inner.startswith("[") else f"a list of {inner}"
    # Bounds that only keep nonsense out are named in errors and left out here.
    bounds = {name: bound for name, bound in way.items() if not (name.endswith("aximum") and bound >= 1e6)}
    return rules.allowed(bounds)


def _heading(where: str) -> str:
    return where if where == "At the top" else f"`{where}`"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _flowing(text: str) -> str:
    return " ".join(text.split())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/plan.md and docs/plan.schema.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one of them is stale")
    given = parser.parse_args(arguments)
    pages = {DOCS / "plan.md": markdown(), DOCS / "plan.schema.json": json.dumps(schema(), indent=2) + "\n"}
    for path, text in pages.items():
        if given.check and not (path.is_file() and path.read_text(encoding="utf-8") == text):
            print(f"{path} is stale; run: python -m stages.plan_docs", file=sys.stderr)
            return 1
        if not given.check:
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
