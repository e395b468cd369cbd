"""The plan language: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from ruamel.yaml import YAML

from mixing import folder as mixing_folder
from mixing import images as mixing_images
from mixing import tasks as mixing_tasks
from mixing.bad_rows import SourceError
from stages import check_sources, columns, plan_docs
from stages import plan as plan_types
from stages.check import check_plan, plan_notes
from stages.document import resolve
from stages.families.facts import PIPELINES
from stages.plan import LearningRate, Plan, Power, Stage
from stages.problems import Problem, quoted
from stages.reader import PlanError, read_plan, resolved, to_yaml
from stages.resolved import resolved_batch, resolved_plan, resolved_rate, resolved_storage
from stages.shape import NAME_PATTERN

ROOT = Path(__file__).resolve().parent.parent
PLAN = Path("plans/x.yaml")

GOOD = """\
model: models/tiny
sources:
  t2i: {path: data/photos}
  edit: {path: data/edits.jsonl, task: edit}
stages:
  - name: expose
    steps: 100
    mix: {t2i: 1, edit: 1}
    resolution: 512
    batch: 4
    lr: 1e-4
  - name: refine
    steps: 50
    mix: natural
    resolution: 512
    batch: {images: 8, micro: 2}
    precision: bf16
    lr: {peak: 1e-4, schedule: cosine}
"""

NAME = "a name: letters, digits, '_', '.' and '-', at most 64, the first a letter or a digit"
COUNT = "a whole number from 1 to 1,000,000,000"
STAGE_FIELDS = ", ".join(Stage.model_fields)
PLAN_FIELDS = ", ".join(Plan.model_fields)
INDENTATION = "the indentation fits nothing above; fields, and items, that belong together begin in one column"


@pytest.fixture(autouse=True)
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model, sources of every kind, and a place for the plan."""
    monkeypatch.chdir(tmp_path)
    files = {
        "models/tiny/model_index.json": json.dumps({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}),
        "models/tiny/transformer/config.json": json.dumps({"guidance_embeds": False}),
        "models/tiny/vae/config.json": json.dumps({"block_out_channels": [8, 8, 8, 8]}),
        "models/tiny/tokenizer_2/tokenizer_config.json": json.dumps({"model_max_length": 512}),
        "models/pixels/tokenizer_2/tokenizer_config.json": json.dumps({"model_max_length": 512}),
        "models/pixels/model_index.json": json.dumps({"_class_name": "FluxKontextPipeline", "vae": [None, None]}),
        "models/pixels/transformer/config.json": json.dumps({"guidance_embeds": True}),
        "models/kolors/model_index.json": json.dumps({"_class_name": "KolorsPipeline"}),
        "models/torn/model_index.json": "{",
        "data/photos/1.png": "",
        "data/photos/1.txt": "a red square",
        "data/photos/deeper/2.png": "",
        "data/bare/1.png": "",
        "data/empty/notes.md": "",
        "data/tables/rows.parquet": "this is no parquet",
        "data/edits.jsonl": json.dumps({"image": "1.png", "source": "2.png", "instruction": "turn it"}) + "\n",
        "data/meta/metadata.jsonl": json.dumps({"file_name": "1.png", "text": "a"}) + "\n" + json.dumps({"file_name": "2.png", "text": "b"}),
        "data/broken.jsonl": "{'image': 1}\n",
        "data/judge/metadata.jsonl": json.dumps({"file_name": "1.png", "label": "one"}) + "\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    parquet.write_table(pa.table({"image": [b""], "img": [b""], "text": ["a"]}), tmp_path / "data/rows-00.parquet")
    PLAN.parent.mkdir()


def problems_of(text: str | bytes, *flags: str) -> list[str]:
    """Every line that reading and checking a plan says."""
    PLAN.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        found = check_plan(read_plan(PLAN, flags), Path.cwd())
    except PlanError as error:
        return str(error).splitlines()
    return [str(problem) for problem in found]


def test_a_mix_by_size_of_sources_that_are_never_repeated_is_told() -> None:
    text = GOOD.replace("{path: data/photos}", "{path: data/photos, repeat: 0}").replace("task: edit}", "task: edit, repeat: 0}")
    assert problems_of(text) == ["plans/x.yaml:14:10: stages[1].mix: every source has repeat: 0, so nothing would be drawn"]


def test_good_plan_has_no_problem() -> None:
    assert problems_of(GOOD) == []


# Each case changes one thing in GOOD, and names every line that must be said.
BROKEN: dict[str, tuple[str, str, list[str]]] = {
    # Text
    "tab": ("    steps: 100", "\tsteps: 100", ["7:1: a tab; YAML indents with spaces"]),
    "double key": ("    steps: 100", "    steps: 100\n    steps: 200", ["8:5: 'steps' is given twice; the first is at plans/x.yaml:7:5"]),
    "two colons": ("name: expose", "name: a: b", ["6:12: a second ':' in this line, or an indentation that fits nothing above; quote text with ': '"]),
    "unclosed brace": ("{images: 8, micro: 2}", "{images: 8, micro: 2", ["17:14: not YAML: expected ',' or '}', but got ':'; is the bracket at plans/x.yaml:16:12 closed?"]),
    "unclosed list at the end": ("schedule: cosine}", "schedule: cosine", ["18:9: this { is never closed"]),
    "unclosed quote": ("name: expose", "name: 'expose", ["6:11: this ' is never closed"]),
    "wrong indentation": ("    steps: 50", "   steps: 50", [f"13:4: {INDENTATION}"]),
    "one brace too many": ("{path: data/photos}", "{path: data/photos}}", ["3:27: a '}' with no '{' before it"]),
    "reserved character": ("name: expose", "name: @expose", ["6:11: a value cannot begin with '@'; put it in quotes"]),
    "unknown alias": ("{path: data/photos}", "*photos", ["3:8: no anchor '&photos' stands above this '*photos'"]),
    "tag": ("steps: 100", "steps: !!int 100", ["7:12: the tag 'tag:yaml.org,2002:int' means nothing in a plan; remove it"]),
    "second document": ("stages:\n", "---\nstages:\n", [
        "1:1: field 'stages' is missing; it is a list",
        "5:1: a second document begins here; a plan is one document",
    ]),
    "control character": ("name: expose", "name: exp\x01ose", ["6:14: the character U+0001 cannot stand in YAML; remove it"]),
    "zero character": ("name: expose", 'name: "exp\\0ose"', ["6:11: a zero character cannot stand in a plan"]),
    # Shape
    "misspelt field": ("    resolution: 512\n    batch: 4", "    resolutoin: 512\n    batch: 4", [
        "6:5: stages[0]: field 'resolution' is missing; it is a whole number from 1 to 16,384, or a list",
        f"9:5: stages[0]: no field 'resolutoin' (fields: {STAGE_FIELDS}); did you mean 'resolution'?",
    ]),
    "misspelt field at the top": ("model: models/tiny", "model: models/tiny\nsed: 3", [f"2:1: no field 'sed' (fields: {PLAN_FIELDS}); did you mean 'seed'?"]),
    "misspelt word": ("precision: bf16", "precision: bf61", ["17:16: stages[1].precision: 'bf61' is not one of fp32, bf16, fp16, fp8; did you mean 'bf16'?"]),
    "negative steps": ("steps: 50", "steps: -5", [f"13:12: stages[1].steps: -5 is not {COUNT}"]),
    "fraction of a step": ("steps: 50", "steps: 5.5", [f"13:12: stages[1].steps: 5.5 is not {COUNT}"]),
    "whole number as a float": ("steps: 50", "steps: 1e3", [f"13:12: stages[1].steps: 1e3 is not {COUNT}; write 1000"]),
    "number in quotes": ("steps: 50", "steps: '50'", [f"13:12: stages[1].steps: '50' is not {COUNT}; remove the quotes"]),
    "nothing given": ("steps: 50", "steps:", [f"13:5: stages[1].steps: nothing is given; it must be {COUNT}"]),
    "word for a number": ("lr: 1e-4", "lr: fast", ["11:9: stages[0].lr: 'fast' is not a number from 0 to 1,000, nor a mapping (peak, warmup, warmup_from, schedule, floor)"]),
    "true for a number": ("batch: 4", "batch: true", [f"10:12: stages[0].batch: true is not {COUNT}, nor a mapping (images, tokens, micro)"]),
    "not a number": ("lr: 1e-4", "lr: .nan", ["11:9: stages[0].lr: .nan is not a number from 0 to 1,000"]),
    "list for a mapping": ("{images: 8, micro: 2}", "[8, 2]", [f"16:12: stages[1].batch: a list is not {COUNT}, nor a mapping (images, tokens, micro)"]),
    "unknown field of a field with two forms": ("{peak: 1e-4, schedule", "{peek: 1e-4, schedule", [
        "18:5: stages[1].lr: field 'peak' is missing; it is a number from 0 to 1,000",
        "18:10: stages[1].lr: no field 'peek' (fields: peak, warmup, warmup_from, schedule, floor); did you mean 'peak'?",
    ]),
    "unknown mix": ("mix: natural", "mix: natual", ["14:10: stages[1].mix: 'natual' is not 'natural', nor a mapping (power), nor a mapping of names to values, nor a mapping (from, to), nor a mapping (adaptive, follows, band, floor, ceiling, change, lookback, tolerance, epochs, targets); did you mean 'natural'?"]),
    "power out of range": ("mix: natural", "mix: {power: 2}", ["14:18: stages[1].mix.power: 2 is not a number from 0 to 1"]),
    "negative share": ("{t2i: 1, edit: 1}", "{t2i: 1, edit: -1}", ["8:25: stages[0].mix.edit: -1 is not a number of at least 0"]),
    "no space after the colon": ("{t2i: 1, edit: 1}", "{t2i:1, edit: 1}", ["8:11: stages[0].mix: 't2i:1' has no value; write a space after the ':'"]),
    "unknown tracker": (
        "model: models/tiny",
        "track: wandbb\nmodel: models/tiny",
        ["1:8: track: 'wandbb' is not 'none', nor one of trackio, tensorboard, wandb, nor a mapping (name, project, online), nor a list; did you mean 'wandb'?"],
    ),
    "no tracker in a list": ("model: models/tiny", "track: [none]\nmodel: models/tiny", ["1:9: track[0]: 'none' is not one of trackio, tensorboard, wandb, nor a mapping (name, project, online)"]),
    "a tracker twice": ("model: models/tiny", "track: [trackio, {name: trackio}]\nmodel: models/tiny", ["1:8: track: 'trackio' is named 2 times; name it once"]),
    "a tracker that sends nothing": (
        "model: models/tiny",
        "track: [{name: trackio, online: true}, {name: tensorboard, project: x}]\nmodel: models/tiny",
        [
            "1:25: track[0].online: trackio keeps everything on this machine (`trackio sync` sends a project to a Space); remove it",
            "1:60: track[1].project: tensorboard knows no projects; give `tensorboard --logdir` the folder of the runs that are to stand together",
        ],
    ),
    "number for text": ("{path: data/photos}", "{path: 5}", ['3:15: sources.t2i.path: 5 is not text; put it in quotes: "5"']),
    "unknown task": ("task: edit", "task: edt", ["4:40: sources.edit.task: 'edt' is not one of text_to_image, subject, control, edit, other, entity; did you mean 'edit'?"]),
    "unknown role": ("task: edit", "task: edit, columns: {taget: image}", ["4:56: sources.edit.columns: 'taget' is not one of target, reference, prompt, entity_prompts, entity_masks; did you mean 'target'?"]),
    "bad name": ("name: expose", "name: my stage", [f"6:11: stages[0].name: 'my stage' is not {NAME}"]),
    "bad source name": ("  t2i: {", "  t 2 i: {", [f"3:3: sources: 't 2 i' is not {NAME}"]),
    "too few betas": ("batch: 4", "batch: 4\n    optimizer: {betas: [0.9]}", ["11:24: stages[0].optimizer.betas: 1 value is given; 2 are needed"]),
    "number for a pattern": ("batch: 4", "batch: 4\n    train: [4]", ['11:13: stages[0].train[0]: 4 is not text; put it in quotes: "4"']),
    # Meaning
    "unknown source": ("{t2i: 1, edit: 1}", "{t2i: 1, edti: 1}", ["8:19: stages[0].mix: no source 'edti' (sources: t2i, edit); did you mean 'edit'?"]),
    "empty mix": ("{t2i: 1, edit: 1}", "{}", ["8:10: stages[0].mix: names no source (sources: t2i, edit)"]),
    "shares of zero": ("{t2i: 1, edit: 1}", "{t2i: 0, edit: 0.0}", ["8:10: stages[0].mix: every share is 0, so nothing would be drawn"]),
    "source called power": ("  t2i: {path: data/photos}", "  t2i: {path: data/photos}\n  power: {path: data/photos}", ["4:3: sources.power: 'power' is a word of `mix`; give the source another name"]),
    "two stages of one name": ("name: refine", "name: expose", ["12:11: stages[1].name: a stage is called 'expose' already, at plans/x.yaml:6:11"]),
    "micro does not divide": ("micro: 2", "micro: 3", ["16:31: stages[1].batch.micro: 3 does not divide images: 8; try 1 or 2"]),
    "warm-up longer than the stage": ("{peak: 1e-4, ", "{peak: 1e-4, warmup: 51, ", ["18:30: stages[1].lr.warmup: 51 steps of warm-up, and the stage has 50"]),
    "warm-up leaves nothing": ("{peak: 1e-4, ", "{peak: 1e-4, warmup: 49, ", ["18:30: stages[1].lr.warmup: 49 steps of warm-up leave none of the stage's 50 for schedule: cosine"]),
    "floor of a constant": ("schedule: cosine", "floor: 1e-5", ["18:22: stages[1].lr.floor: schedule: constant ends at its peak; remove it, or choose linear or cosine"]),
    "floor above the peak": ("schedule: cosine", "schedule: cosine, floor: 1", ["18:47: stages[1].lr.floor: 1 is above the peak, 0.0001"]),
    "warm-up from above": ("schedule: cosine", "warmup_from: 0.1", ["18:35: stages[1].lr.warmup_from: 0.1 is above the peak, 0.0001; a warm-up rises"]),
    "start of no warm-up": ("schedule: cosine", "warmup: 0, warmup_from: 0", ["18:33: stages[1].lr.warmup_from: with warmup: 0 there is no warm-up to begin from; remove it"]),
    "mean of uniform": ("batch: 4", "batch: 4\n    timesteps: {density: uniform, mean: 0, std: 1}", [
        "11:35: stages[0].timesteps.mean: density: uniform has no mean; remove it",
        "11:44: stages[0].timesteps.std: density: uniform has no std; remove it",
    ]),
    "handoff to the first stage": ("batch: 4", "batch: 4\n    handoff: {optimizer: keep}", ["11:5: stages[0].handoff: nothing comes before the first stage; remove it, or begin from another run with `start`"]),
    "average handed to a stage without one": ("precision: bf16", "handoff: {ema: keep}", ["17:15: stages[1].handoff.ema: this stage keeps no average; give it `ema` (0.999, say), or remove this"]),
    "average from a stage without one": ("precision: bf16", "ema: 0.9\n    handoff: {ema: keep}", ["18:20: stages[1].handoff.ema: 'keep', but stage 'expose' has no `ema`; give it one, or choose reset"]),
    "full after the adapter": ("precision: bf16", "train: full", [
        "17:12: stages[1].train: 'full' after stage 'expose', which trains the adapter: the adapter belongs to the weights that it was "
        "trained on; put this stage before it, or begin another run with `start`",
    ]),
    "full in bf16": ("batch: 4", "batch: 4\n    train: full\n    base: bf16", ["12:11: stages[0].base: bf16 would round most of what train: full learns away; choose fp32, or leave it out"]),
    "full in nf4": ("batch: 4", "batch: 4\n    train: full\n    base: nf4", ["12:11: stages[0].base: nf4 holds weights that stay as they are, and train: full changes them; choose fp32, or leave it out"]),
    "merge into nf4": ("precision: bf16", "precision: bf16\n    base: nf4\n    handoff: {adapter: merge, lossy: true}", [
        "19:24: stages[1].handoff.adapter: 'merge' into a base stored in nf4 rounds away most of what was learnt; choose stack or continue, or give the stage base: fp32, or bf16 with lossy: true",
    ]),
    "no regular expression": ("batch: 4", "batch: 4\n    train: ['(']", ["11:13: stages[0].train[0]: '(' is not a regular expression: missing ), unterminated subpattern at position 0"]),
    "no pattern": ("model: models/tiny", "model: models/tiny\nadapter: {targets: []}", ["2:20: adapter.targets: no pattern is given"]),
    "evaluation of nothing": ("model: models/tiny", "model: models/tiny\nevaluate: {rows: 0, every: 5}", ["2:21: evaluate.every: with evaluate.rows: 0 nothing is held out to measure; remove it, or hold rows out"]),
    "accuracy of an unknown source": ("model: models/tiny", "model: models/tiny\nevaluate: {accuracy: {source: t2, labelled: data/judge}}", ["2:31: evaluate.accuracy.source: no source 't2' (sources: t2i, edit); did you mean 't2i'?"]),
    "accuracy of edits": ("model: models/tiny", "model: models/tiny\nevaluate: {accuracy: {source: edit, labelled: data/judge}}", ["2:31: evaluate.accuracy.source: source 'edit' has task edit; samples are made from captions alone"]),
    "missing judge": ("model: models/tiny", "model: models/tiny\nevaluate: {accuracy: {source: t2i, labelled: data/juge}}", ["2:46: evaluate.accuracy.labelled: 'data/juge' does not exist; did you mean 'judge'?"]),
    "judge without labels": ("model: models/tiny", "model: models/tiny\nevaluate: {accuracy: {source: t2i, labelled: data/meta}}", ["2:46: evaluate.accuracy.labelled: 'data/meta': metadata.jsonl:1: a line needs file_name and label"]),
    # Sources
    "missing folder": ("path: data/photos", "path: data/photo", ["3:15: sources.t2i.path: 'data/photo' does not exist; did you mean 'photos'?"]),
    "missing folder above": ("path: data/photos", "path: date/photos", ["3:15: sources.t2i.path: 'date/photos' does not exist: no 'date' there; did you mean 'data'?"]),
    "pattern that matches nothing": ("path: data/photos", "path: 'data/x-*.parquet'", ["3:15: sources.t2i.path: 'data/x-*.parquet' matches no file"]),
    "range with a gap": ("path: data/photos", "path: 'data/rows-{00..01}.parquet'", ["3:15: sources.t2i.path: no file 'data/rows-01.parquet', which 'data/rows-{00..01}.parquet' names"]),
    "folder without images": ("path: data/photos", "path: data/empty", ["3:15: sources.t2i.path: 'data/empty' holds no images (1 file of another kind)"]),
    "folder of tables": ("path: data/photos", "path: data/tables", ["3:15: sources.t2i.path: 'data/tables' holds no images (1 file of another kind); it holds 'rows.parquet': name the file in `path`"]),
    "images without captions": ("path: data/photos", "path: data/bare", ["3:15: sources.t2i.path: 'data/bare' holds 1 image and no caption; write a .txt of the same name beside each, or give `prompt`"]),
    "captioned images with references": ("path: data/edits.jsonl", "path: data/photos", ["4:35: sources.edit.task: edit needs references, and a folder of captioned images has none; write a metadata.jsonl into 'data/photos'"]),
    "columns of captioned images": ("{path: data/photos}", "{path: data/photos, columns: {prompt: text}}", ["3:37: sources.t2i.columns: 'data/photos' is a folder of captioned images, which has no columns; remove it"]),
    "no reference column": ("path: data/edits.jsonl", "path: data/meta", ["4:16: sources.edit.path: task edit needs a reference, and no column is called reference or references or input_images or source (columns: file_name, text); say which it is, columns: {reference: NAME}"]),
    "unknown column": ("task: edit", "task: edit, columns: {prompt: instructoin}", ["4:64: sources.edit.columns.prompt: no column 'instructoin' (columns: image, source, instruction); did you mean 'instruction'?"]),
    "reference of a caption": ("{path: data/photos}", "{path: data/meta, columns: {reference: text}}", ["3:36: sources.t2i.columns.reference: task text_to_image uses no references; remove it, or name another task"]),
    "broken lines": ("path: data/edits.jsonl", "path: data/broken.jsonl", ["4:16: sources.edit.path: 'data/broken.jsonl' holds no rows; broken.jsonl:1: the line is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"]),
    "no parquet": ("path: data/photos", "path: data/tables/rows.parquet", ["3:15: sources.t2i.path: 'data/tables/rows.parquet' is not readable parquet: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."]),
    "parquet without references": ("path: data/edits.jsonl", "path: data/rows-00.parquet", ["4:16: sources.edit.path: task edit needs a reference, and no column is called reference or references or input_images or source (columns: image, img, text); say which it is, columns: {reference: NAME}"]),
    "takes more images than there are": ("{path: data/photos}", "{path: data/photos, take: {count: 3}}", ["3:42: sources.t2i.take.count: 3 rows are asked for, and there are 2"]),
    "takes more lines than there are": ("{path: data/photos}", "{path: data/meta, take: {count: 3}}", ["3:40: sources.t2i.take.count: 3 rows are asked for, and there are 2"]),
    "seed of the first rows": ("{path: data/photos}", "{path: data/photos, take: {count: 1, by: first, seed: 0}}", ["3:56: sources.t2i.take.seed: by: first takes rows in file order, without a seed; remove it"]),
    "split of a folder": ("{path: data/photos}", "{path: data/photos, split: train}", ["3:28: sources.t2i.split: only a Hub dataset, or a folder that save_to_disk wrote, has splits, and train is the usual one; remove it"]),
    "half a Hub name": ("path: data/photos", "path: hub/photos", ["3:15: sources.t2i.path: 'hub/photos': a dataset of the Hub is written hub/USER/DATASET"]),
    # Model
    "missing model": ("model: models/tiny", "model: models/tin", ["1:8: model: 'models/tin' does not exist; did you mean 'tiny'?"]),
    "no model": ("model: models/tiny", "model: ./data", ["1:8: model: './data' has no model_index.json, so it is no folder in the diffusers layout"]),
    "unknown family": ("model: models/tiny", "model: models/kolors", [f"1:8: model: 'models/kolors' is a KolorsPipeline; what can be trained is {', '.join(sorted(PIPELINES))}"]),
    "torn model": ("model: models/tiny", "model: models/torn", ["1:8: model: 'models/torn' has a model_index.json that is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"]),
    "resolution that does not fit": ("resolution: 512\n    batch: 4", "resolution: 520\n    batch: 4", ["9:17: stages[0].resolution: 520 is not a multiple of 16, as FluxPipeline needs; try 512 or 528"]),
    "guidance for a model without": ("model: models/tiny", "model: {repo: models/tiny, guidance: 1}", ["1:28: model.guidance: this model's transformer takes no guidance (guidance_embeds is false); remove it"]),
    "revision of a folder": ("model: models/tiny", "model: {repo: models/tiny, revision: main}", ["1:28: model.revision: 'models/tiny' is a folder, and only the Hub has revisions; remove it"]),
    "missing start": ("model: models/tiny", "model: models/tiny\nstart: run/x", ["2:8: start: 'run/x' does not exist: no 'run' there"]),
    # Batches, resolutions, buckets, ramps, selections, streams, caches
    "neither images nor tokens": ("batch: 4", "batch: {micro: 2}", ["10:12: stages[0].batch: images or tokens says what a step holds, and neither is given"]),
    "images and tokens": ("batch: 4", "batch: {images: 4, tokens: 4096}", ["10:12: stages[0].batch: images or tokens says what a step holds, and both are given"]),
    "micro of more tokens than a step": ("batch: 4", "batch: {tokens: 4096, micro: {tokens: 8192}}", ["10:43: stages[0].batch.micro.tokens: 8,192 tokens are more than a step has, 4,096"]),
    "batch that changes too much": ("steps: 100\n    mix: {t2i: 1, edit: 1}\n    resolution: 512\n    batch: 4", "steps: 1000000000\n    mix: {t2i: 1, edit: 1}\n    resolution: 512\n    batch: {images: {from: 4, to: 1000}}", [
        "10:21: stages[0].batch.images: a change by 996 over 1,000,000,000 steps is more than can be counted; change it in several stages",
    ]),
    "batch that does not change": ("batch: 4", "batch: {images: {from: 4, to: 4}}", ["10:21: stages[0].batch.images: from 4 to 4, and it stays the same; write one number"]),
    "half a change": ("batch: 4", "batch: {images: {from: 4}}", ["10:13: stages[0].batch.images: field 'to' is missing; it is a whole number from 1 to 1,000,000,000"]),
    "level without a share": ("resolution: 512\n    batch: 4", "resolution: [{pixels: 256}]\n    batch: 4", ["9:18: stages[0].resolution[0]: field 'share' is missing; it is a number above 0, at most 1,000,000"]),
    "no level": ("resolution: 512\n    batch: 4", "resolution: []\n    batch: 4", ["9:17: stages[0].resolution: is empty; at least 1 is needed"]),
    "level that does not fit": ("resolution: 512\n    batch: 4", "resolution: [{pixels: 250, share: 1}, {pixels: 512, share: 2}]\n    batch: 4", ["9:27: stages[0].resolution[0].pixels: 250 is not a multiple of 16, as FluxPipeline needs; try 240 or 256"]),
    "aspect below one": ("batch: 4", "batch: 4\n    buckets: {max_aspect: 0.5}", ["11:27: stages[0].buckets.max_aspect: 0.5 is not a number from 1 to 4"]),
    "ramp to an unknown source": ("mix: natural", "mix: {from: natural, to: {edti: 1}}", ["14:31: stages[1].mix.to: no source 'edti' (sources: t2i, edit); did you mean 'edit'?"]),
    "ramp between equal mixes": ("mix: natural", "mix: {from: {edit: 1}, to: {edit: 1}}", ["14:10: stages[1].mix: from and to are the same mix; write it once"]),
    "half a ramp": ("mix: natural", "mix: {from: natural}", ["14:5: stages[1].mix: field 'to' is missing; it is 'natural', or a mapping (power), or a mapping of names to values"]),
    "source called as a word of mix": ("  edit:", "  from: {path: data/photos}\n  edit:", ["4:3: sources.from: 'from' is a word of `mix`; give the source another name"]),
    "take without a number": ("{path: data/photos}", "{path: data/photos, take: {by: first}}", ["3:34: sources.t2i.take: count or fraction says how much is taken, and neither is given"]),
    "take with two numbers": ("{path: data/photos}", "{path: data/photos, take: {count: 1, fraction: 0.5}}", ["3:34: sources.t2i.take: count or fraction says how much is taken, and both are given"]),
    "stratified by nothing": ("{path: data/photos}", "{path: data/photos, take: {fraction: 0.5, by: stratified}}", ["3:54: sources.t2i.take.by: 'stratified' by which column? give take.column"]),
    "column of a random choice": ("{path: data/photos}", "{path: data/photos, take: {count: 1, column: style}}", [
        "3:45: sources.t2i.take.column: only by: stratified looks at a column; remove it, or choose stratified",
        "3:53: sources.t2i.take.column: no column 'style' (columns: none)",
    ]),
    "fraction of nothing": ("{path: data/photos}", "{path: data/photos, take: {fraction: 0}}", ["3:45: sources.t2i.take.fraction: 0 is not a number above 0, at most 1"]),
    "where that is not closed": ("{path: data/photos}", "{path: data/photos, where: 'width >= (512'}", ["3:35: sources.t2i.where: character 14: found the end; expected the ')' of the '(' at character 10"]),
    "where of an unknown column": ("task: edit", "task: edit, where: 'hieght > 3'", ["4:53: sources.edit.where: no column 'hieght' (columns: image, source, instruction); did you mean 'height'?"]),
    "stream of a folder": ("{path: data/photos}", "{path: data/photos, stream: true}", [
        "3:36: sources.t2i.stream: only .tar shards, .parquet files and Hub datasets are streamed; remove it",
        "14:10: stages[1].mix: a mix by size needs to know how many rows the stream 't2i' has; give sources.t2i.rows, or shares by name",
    ]),
    "lanes of no stream": ("{path: data/photos}", "{path: data/photos, lanes: 4}", ["3:28: sources.t2i.lanes: only a stream is told this; remove it, or say stream: true"]),
    "kept tags that are not shuffled": ("{path: data/photos}", "{path: data/photos, captions: {keep_tags: 1}}", ["3:39: sources.t2i.captions.keep_tags: tags are not shuffled; remove it, or say shuffle_tags: true"]),
    "variants of one view": ("{path: data/photos}", "{path: data/photos, augment: {variants: 2}}", ["3:38: sources.t2i.augment.variants: without flip or crop: random there is one variant; remove it"]),
    "limit without a unit": ("model: models/tiny", "model: models/tiny\ncache: {limit: 200}", ["2:16: cache.limit: 200 is not a size such as 200GB (MB, GB, TB, MiB, GiB, TiB); put it in quotes: \"200\""]),
    "limit in no unit": ("model: models/tiny", "model: models/tiny\ncache: {limit: 200 GO}", ["2:16: cache.limit: '200 GO' is not a size such as 200GB (MB, GB, TB, MiB, GiB, TiB)"]),
    "cache misspelt": ("model: models/tiny", "model: models/tiny\ncache: nono", ["2:8: cache: 'nono' is not a mapping (folder, limit, latents, text), nor 'none'; did you mean 'none'?"]),
    "entity without entities": ("task: edit", "task: entity", [
        "4:16: sources.edit.path: task entity needs a list of entity prompts, and no column is called eligen_entity_prompts (columns: image, source, instruction); say which it is, columns: {entity_prompts: NAME}",
    ]),
}


ADAPTERS = "model: models/tiny\nadapters: {cond: {rank: 4}, core: {}}"

# Each case is what stands in the place of the model's line, the handoff and further fields of the second stage, and every line that must be said.
BROKEN_ADAPTERS: dict[str, tuple[str, str, list[str]]] = {
    "adapter and adapters": (f"{ADAPTERS}\nadapter: {{rank: 2}}", "", ["3:1: adapter: the plan gives `adapters` by name, and one adapter is given here; remove one of the two"]),
    "no adapters": ("model: models/tiny\nadapters: {}", "", ["2:1: adapters: no adapter is named; remove it, or name one"]),
    "adapter called as a word": ("model: models/tiny\nadapters: {full: {}, core: {}}", "", ["2:12: adapters.full: 'full' is a word of Medley's own; give the adapter another name"]),
    "adapter with a dot": ("model: models/tiny\nadapters: {v1.0: {}, core: {}}", "", ["2:12: adapters.v1.0: a name that weights are told apart by has no '.' and no 'lora_' in it; write v10"]),
    "DoRA beside another": ("model: models/tiny\nadapters: {cond: {variant: dora}, core: {}}", "", [
        "2:28: adapters.cond.variant: several adapters are published as one, and DoRA cannot be joined with others; choose lora or rslora, or give the plan one adapter",
    ]),
    "unknown variant": ("model: models/tiny\nadapter: {variant: dorra}", "", ["2:20: adapter.variant: 'dorra' is not one of lora, dora, rslora; did you mean 'dora'?"]),
    "dropout of everything": ("model: models/tiny\nadapter: {dropout: 1}", "", ["2:20: adapter.dropout: 1 is not a number of at least 0, and below 1"]),
    "target that is no expression": ("model: models/tiny\nadapters: {cond: {targets: ['(']}}", "", ["2:29: adapters.cond.targets[0]: '(' is not a regular expression: missing ), unterminated subpattern at position 0"]),
    "pattern of an unknown adapter": (ADAPTERS, "train: ['cnod:.*']", ["19:13: stages[1].train[0]: no adapter 'cnod' stands before the colon (adapters: cond, core); did you mean 'cond'?"]),
    "unknown adapter": (ADAPTERS, "train: [cond, coer]", ["19:19: stages[1].train[1]: no adapter 'coer' (adapters: cond, core); did you mean 'core'?"]),
    "pattern of a nameless adapter": ("model: models/tiny", "train: ['cond:.*']", ["18:13: stages[1].train[0]: no adapter 'cond' stands before the colon (the plan has one, which has no name)"]),
    "adapter without its pattern": (ADAPTERS, "train: ['core:']", ["19:13: stages[1].train[0]: no pattern stands behind the colon; write core for the whole adapter"]),
    "no expression behind an adapter": (ADAPTERS, "train: ['core:(']", ["19:13: stages[1].train[0]: '(' is not a regular expression: missing ), unterminated subpattern at position 0"]),
    "unknown way": ("model: models/tiny", "handoff: {adapter: grwo}", ["18:24: stages[1].handoff.adapter: 'grwo' is not one of continue, grow, shrink, stack, merge; did you mean 'grow'?"]),
    "rank of a continued adapter": ("model: models/tiny", "handoff: {rank: 8}", ["18:15: stages[1].handoff.rank: adapter: continue leaves the rank as it is; remove it, or choose grow, shrink, stack or merge"]),
    "alpha of a continued adapter": ("model: models/tiny", "handoff: {alpha: 8}", ["18:15: stages[1].handoff.alpha: adapter: continue leaves the alpha as it is; remove it, or choose grow, shrink, stack or merge"]),
    "grow to a smaller rank": ("model: models/tiny", "handoff: {adapter: grow, rank: 8}", ["18:36: stages[1].handoff.rank: 'grow' to rank 8, and the adapter has rank 16; give a larger rank, or choose shrink"]),
    "grow to the same rank": ("model: models/tiny", "handoff: {adapter: grow, rank: 16}", ["18:36: stages[1].handoff.rank: 'grow' to rank 16, and the adapter has rank 16; give a larger rank"]),
    "shrink to a larger rank": ("model: models/tiny", "handoff: {adapter: shrink, rank: 32}", ["18:38: stages[1].handoff.rank: 'shrink' to rank 32, and the adapter has rank 16; give a smaller rank, or choose grow"]),
    "shrink to the same rank": ("model: models/tiny", "handoff: {adapter: shrink, rank: 16}", ["18:38: stages[1].handoff.rank: 'shrink' to rank 16, and the adapter has rank 16; give a smaller rank"]),
    "DoRA over int8": ("model: models/tiny\nadapter: {variant: dora}", "base: int8", [
        "19:11: stages[1].base: the adapter is a DoRA, which needs the lengths of the base's rows, and int8 has no rows to read; choose bf16 or fp32, or variant lora or rslora",
    ]),
    "shrink of a DoRA": ("model: models/tiny\nadapter: {variant: dora}", "handoff: {adapter: shrink}", ["19:24: stages[1].handoff.adapter: 'shrink' of a DoRA: the lengths of its rows are no product; choose continue, grow or merge"]),
    "stack on a DoRA": ("model: models/tiny\nadapter: {variant: dora}", "handoff: {adapter: stack}", [
        "19:24: stages[1].handoff.adapter: 'stack' of a DoRA: DoRA cannot be joined with others, and they are published as one; choose continue, grow or merge",
    ]),
    "merge into bf16": ("model: models/tiny", "handoff: {adapter: merge}", [
        "18:24: stages[1].handoff.adapter: 'merge' into a base stored in bf16 rounds away a quarter to two thirds of what was learnt; give the stage base: fp32, choose stack, or say lossy: true",
    ]),
    "lossy without a merge": ("model: models/tiny", "handoff: {adapter: stack, lossy: true}", ["18:31: stages[1].handoff.lossy: only adapter: merge can lose what was learnt to the base's rounding; remove it"]),
    "lossy merge without loss": ("model: models/tiny", "base: fp32\n    handoff: {adapter: merge, lossy: true}", ["19:31: stages[1].handoff.lossy: over a base in fp32 a merge loses nothing; remove it"]),
    "optimizer kept over new pairs": ("model: models/tiny", "handoff: {adapter: stack, optimizer: keep}", [
        "18:42: stages[1].handoff.optimizer: 'keep', and with adapter: stack every pair is another than before, so nothing could be kept; choose reset",
    ]),
    "average kept over new pairs": ("model: models/tiny", "base: fp32\n    ema: 0.9\n    handoff: {adapter: merge, ema: keep}", [
        "20:36: stages[1].handoff.ema: 'keep', and with adapter: merge every pair is another than before, so nothing could be kept; choose reset",
        "20:36: stages[1].handoff.ema: 'keep', but stage 'expose' has no `ema`; give it one, or choose reset",
    ]),
    "shrink of several": (ADAPTERS, "handoff: {adapter: shrink}", ["19:24: stages[1].handoff.adapter: 'shrink' is for a plan with one `adapter`, and this one names its `adapters`; give the plan one `adapter`"]),
    "stack on several": (ADAPTERS, "handoff: {adapter: stack}", [
        "19:24: stages[1].handoff.adapter: 'stack' is for a plan with one `adapter`, and this one names its `adapters`; those stand beside each other already: say in `train` which of them train here",
    ]),
    "growth beyond all ranks": ("model: models/tiny\nadapter: {rank: 4096}", "handoff: {adapter: grow}", ["19:24: stages[1].handoff.adapter: 'grow' to rank 8,192, twice what there was, is above 4,096; give a rank"]),
    "rank of several": (ADAPTERS, "base: fp32\n    handoff: {adapter: merge, rank: 3}", ["20:31: stages[1].handoff.rank: each of `adapters` has its own rank; remove it"]),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_broken_adapters_are_told_place_and_cure(name: str) -> None:
    model, fields, said = BROKEN_ADAPTERS[name]
    text = GOOD.replace("model: models/tiny", model, 1).replace("precision: bf16", f"precision: bf16\n    {fields}")
    assert problems_of(text) == [f"plans/x.yaml:{line}" for line in said]


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("model: models/tiny", "handoff: {adapter: grow}"),
        ("model: models/tiny", "handoff: {adapter: shrink, rank: 15}"),
        ("model: models/tiny", "handoff: {adapter: stack, alpha: 3}"),
        ("model: models/tiny", "handoff: {adapter: merge, lossy: true}"),
        ("model: models/tiny", "base: fp32\n    handoff: {adapter: merge, rank: 4}"),
        ("model: models/tiny\nadapter: {variant: dora, dropout: 0.1}", "handoff: {adapter: grow, optimizer: keep}"),
        (ADAPTERS, "train: [cond, 'core:transformer_blocks.*', '(?:single_)?transformer_blocks.*']"),
        (ADAPTERS, "base: fp32\n    handoff: {adapter: merge}"),
    ],
)
def test_plans_with_adapters_of_every_kind_are_sound_and_written_out_mean_the_same(model: str, fields: str) -> None:
    text = GOOD.replace("model: models/tiny", model, 1).replace("precision: bf16", f"precision: bf16\n    {fields}")
    assert problems_of(text) == []
    plan = resolved_plan(read_plan(PLAN).plan)
    assert problems_of(to_yaml(plan)) == []
    assert read_plan(PLAN).plan == plan


@pytest.mark.parametrize(
    ("model", "first", "second", "said"),
    [
        ("model: models/tiny", "adapter", "adapter", "18:12: stages[1].train: expert low is a transformer of its own, and stages before train the plan's one adapter on high; name an adapter for each in `adapters`, and write train: [NAME]"),
        (ADAPTERS, "[cond]", "adapter", "19:12: stages[1].train: the model's experts have adapters of their own; name those that expert low has, train: [NAME] (adapters: cond, core)"),
        (ADAPTERS, "[cond]", "['.*']", "19:12: stages[1].train: the model's experts have adapters of their own; name those that expert low has, train: [NAME] (adapters: cond, core)"),
        (ADAPTERS, "[cond]", "['cond:.*']", "19:12: stages[1].train: adapter 'cond' is trained on expert high in stage 'expose', and expert low is another transformer; give it an adapter of its own"),
        (ADAPTERS, "[cond]", "[core]", ""),
    ],
)
def test_each_adapter_belongs_to_one_of_a_models_experts(model: str, first: str, second: str, said: str) -> None:
    text = GOOD.replace("model: models/tiny", model, 1).replace("batch: 4", f"batch: 4\n    train: {first}").replace("precision: bf16", f"train: {second}")
    for name, expert in (("expose", "high"), ("refine", "low")):
        text = text.replace(f"name: {name}", f"name: {name}\n    expert: {expert}")
    places = [f"plans/x.yaml:{int(said.split(':')[0]) + 2}:{said.partition(':')[2]}"] if said else []
    assert [line for line in problems_of(text) if "one transformer for all" not in line] == places


def test_of_a_start_nothing_but_the_adapter_is_handed_on() -> None:
    text = GOOD.replace("model: models/tiny", "model: models/tiny\nstart: data").replace("batch: 4", "batch: 4\n    handoff: {adapter: grow, rank: 32, optimizer: keep}")
    assert problems_of(text) == ["plans/x.yaml:12:40: stages[0].handoff.optimizer: `start` brings weights and nothing else; remove it"]
    assert problems_of(text.replace(", optimizer: keep", "")) == []


def test_an_adapter_is_not_handed_on_in_another_form_after_full_weights_nor_after_a_shrink_beyond_a_stack() -> None:
    text = GOOD.replace("batch: 4", "batch: 4\n    train: full").replace("precision: bf16", "handoff: {adapter: stack}")
    assert problems_of(text) == ["plans/x.yaml:18:24: stages[1].handoff.adapter: 'stack', and no stage before this one trains an adapter; remove it"]
    third = "  - {name: third, steps: 1, resolution: 512, batch: 4, lr: 1e-4, handoff: {adapter: shrink, rank: RANK}}\n"
    text = GOOD.replace("precision: bf16", "handoff: {adapter: stack}") + third
    assert problems_of(text.replace("RANK", "32")) == []
    said = "'shrink' to rank 33, and the adapters have rank 32 together; give a smaller rank"
    assert problems_of(text.replace("RANK", "33")) == [f"plans/x.yaml:19:99: stages[2].handoff.rank: {said}"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plan_is_told_place_and_cure(name: str) -> None:
    before, after, said = BROKEN[name]
    assert GOOD.count(before) >= 1
    assert problems_of(GOOD.replace(before, after, 1)) == [f"plans/x.yaml:{line}" for line in said]


def test_optimizer_is_not_kept_between_full_weights_and_adapter() -> None:
    text = GOOD.replace("batch: 4", "batch: 4\n    train: full").replace("precision: bf16", "handoff: {optimizer: keep_v}")
    said = "'keep_v', but stage 'expose' trains full weights and this one the adapter; choose reset"
    assert problems_of(text) == [f"plans/x.yaml:18:26: stages[1].handoff.optimizer: {said}"]


@pytest.mark.parametrize("field", ["adapter: {rank: 16}", "adapters: {cond: {rank: 16}}"])
def test_adapter_that_no_stage_trains_is_refused(field: str) -> None:
    text = f"{field}\n" + GOOD.replace("    lr:", "    train: full\n    lr:")
    said = "every stage has train: full, so there is no adapter; remove it, or train it in a stage"
    assert problems_of(text) == [f"plans/x.yaml:1:1: {field.partition(':')[0]}: {said}"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "plans/x.yaml:1:1: the plan is empty; the shortest one stands at the top of docs/plan.md"),
        (b"# only a comment\n", "plans/x.yaml:1:1: the plan is empty; the shortest one stands at the top of docs/plan.md"),
        (b"---\n", "plans/x.yaml:1:1: the plan is empty; the shortest one stands at the top of docs/plan.md"),
        (b"- a\n", f"plans/x.yaml:1:1: a plan is a mapping ({PLAN_FIELDS}); this is a list"),
        (b"name: x\nmodel: caf\xe9\n", "plans/x.yaml:2:11: byte 0xe9 is not UTF-8; save the file as UTF-8 text"),
        (b"a" * (2**17 + 1), "plans/x.yaml: the file is larger than 128 KiB; a plan is YAML text, written by hand"),
        (b"a: " + b"[" * 100_000, "plans/x.yaml:1:53: nested more than 50 deep"),
        (b"a: &a [*a]", "plans/x.yaml:1:8: '*a' stands inside '&a' itself"),
        (b'a: "\\U99999999"', 'plans/x.yaml:1:1: an escape such as "\\U00110000" names no character'),
    ],
)
def test_file_that_is_no_plan_is_one_problem(content: bytes, said: str) -> None:
    assert problems_of(content) == [said]


def test_missing_file_and_folder_are_problems() -> None:
    for path, said in ((Path("plans/y.yaml"), "no such file or directory"), (Path("plans"), "is a directory")):
        with pytest.raises(PlanError) as caught:
            read_plan(path)
        assert str(caught.value) == f"{path}: cannot be read: {said}"


def test_aliases_that_multiply_are_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    said = problems_of("\n".join(lines))
    assert said == ["plans/x.yaml:5:5: with its aliases the plan holds more than 20,000 values"]


def test_all_problems_are_told_at_once_sorted_by_place() -> None:
    text = GOOD.replace("steps: 100", "steps: -1").replace("bf16", "bf61").replace("task: edit", "tsk: edit")
    text = text.replace("name: refine", "name: refine\n    name: again")
    said = problems_of(text, "seed=x", "stages.expose.steps=0.5")
    assert [line.partition(": ")[0] for line in said] == [
        "plans/x.yaml:4:34", "plans/x.yaml:13:5", "plans/x.yaml:18:16", "--set seed=x", "--set stages.expose.steps=0.5",
    ]  # fmt: skip
    said = problems_of(GOOD.replace("data/photos", "data/phot").replace("micro: 2", "micro: 3").replace("t2i: 1", "ti: 1"))
    assert [line.split(": ")[1] for line in said] == ["sources.t2i.path", "stages[0].mix", "stages[1].batch.micro"]


def test_many_problems_are_cut_to_fifty_lines() -> None:
    said = problems_of(GOOD + "".join(f"x{n}: 1\n" for n in range(70)))
    assert len(said) == 51
    assert said[-1] == "and 20 more"


def test_yaml_is_read_as_version_1_2() -> None:
    text = GOOD.replace("t2i", "no").replace("steps: 100", "steps: 1_000").replace("lr: 1e-4", "lr: 1E-4")
    assert problems_of(text) == []
    plan = read_plan(PLAN).plan
    assert list(plan.sources) == ["no", "edit"]
    assert plan.stages[0].steps == 1000
    assert plan.stages[0].lr == 1e-4
    for written, meant in {"0x10": 16, "0o17": 15, "017": 17, "+5": 5}.items():
        assert read_plan(PLAN, [f"seed={written}"]).plan.seed == meant
    for word in ("yes", "2024-01-01", "1_", "off", "'1'"):
        assert read_plan(PLAN, [f"name={word}"]).plan.name == word.strip("'")


def test_stages_share_fields_through_anchors() -> None:
    text = GOOD[: GOOD.index("  - name: refine")].replace("- name: expose", "- &first\n    name: expose")
    assert problems_of(text + "  - {<<: *first, name: again, steps: 7}\n") == []
    again = read_plan(PLAN).plan.stages[1]
    assert (again.name, again.steps, again.batch, again.mix) == ("again", 7, 4, {"t2i": 1, "edit": 1})
    assert read_plan(PLAN).place("stages", 1, "mix", "edit") == "plans/x.yaml:9:25"


def test_every_value_and_name_knows_its_place() -> None:
    problems_of(GOOD)
    read = read_plan(PLAN, ["stages.refine.steps=60", "stages.refine.lr.floor=1e-6"])
    assert read.places["stages", 1, "batch", "micro"] == "plans/x.yaml:16:31"
    assert read.names["stages", 1, "batch", "micro"] == "plans/x.yaml:16:24"
    assert read.places["stages", 1, "steps"] == "--set stages.refine.steps=60"
    assert read.place("stages", 1, "lr", "floor") == "--set stages.refine.lr.floor=1e-6"
    assert read.name_place("stages", 1, "lr", "peak") == "plans/x.yaml:18:10"
    assert read.place("stages", 0, "handoff", "ema") == "plans/x.yaml:6:5"  # not given: the stage


def test_every_place_is_where_the_value_is_written() -> None:
    for text in (GOOD, RICH):
        problems_of(text)
        read, lines = read_plan(PLAN), text.splitlines()
        for location, place in read.places.items():
            _, line, column = place.split(":")
            rest = lines[int(line) - 1][int(column) - 1 :]
            value: object = read.plan.model_dump(mode="json")
            for step in location:
                value = value[step]  # type: ignore[index]
            if isinstance(value, str):
                assert rest.lstrip("'\"").startswith(value.replace("\\", "\\\\") if rest[0] == '"' else value)
            elif not isinstance(value, dict | list):
                assert resolve(re.match(r"[^,}\]\s]*", rest)[0]) == value  # type: ignore[index]
        for location, place in read.names.items():
            _, line, column = place.split(":")
            assert lines[int(line) - 1][int(column) - 1 :].startswith(f"{location[-1]}:")


def test_mix_by_power_is_not_taken_for_shares() -> None:
    plan = set_in_good("stages.refine.mix={power: 0.5}")
    assert plan.stages[1].mix == Power(power=0.5)


def test_plan_without_a_name_has_the_files() -> None:
    assert problems_of(GOOD) == []
    assert read_plan(PLAN).plan.name == "x"
    for file, name in {"my plan (2).yaml": "my-plan-2-", "_.yaml": "plan", "é.yaml": "plan", "a" * 100 + ".yaml": "a" * 64}.items():
        Path(file).write_text(GOOD)
        assert read_plan(Path(file)).plan.name == name
    assert read_plan(PLAN, ["name=other"]).plan.name == "other"


# --- settings ---


def set_in_good(*flags: str) -> Plan:
    assert problems_of(GOOD, *flags) == []
    return read_plan(PLAN, flags).plan


def test_set_finds_stages_by_name_and_number() -> None:
    for path in ("stages.refine.steps", "stages.1.steps", "stages[1].steps"):
        assert set_in_good(f"{path}=7").stages[1].steps == 7
    assert set_in_good("stages.refine.name=a.b", "stages.a.b.steps=9").stages[1].steps == 9


def test_set_makes_what_is_not_there() -> None:
    plan = set_in_good("evaluate.rows=3", "sources.more.path=data/meta", "stages.expose.mix={more: 1}", "adapter.alpha=8")
    assert (plan.evaluate.rows, plan.sources["more"].path, plan.stages[0].mix, plan.adapter.alpha) == (3, "data/meta", {"more": 1}, 8)


def test_set_into_a_bare_value_turns_it_into_its_mapping() -> None:
    plan = set_in_good("stages.expose.lr.schedule=cosine", "stages.expose.batch.micro=1", "model.repo=models/pixels", "model.guidance=2")
    assert plan.stages[0].lr == LearningRate(peak=1e-4, schedule="cosine")
    assert resolved_batch(plan.stages[0]).micro == 1
    assert set_in_good("stages.expose.lr.peak=1e-3").stages[0].lr == LearningRate(peak=1e-3)


def test_later_set_wins() -> None:
    assert set_in_good("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("seed", "a setting is written PATH=VALUE, such as stages.refine.steps=50"),
        ("=3", "a setting is written PATH=VALUE, such as stages.refine.steps=50"),
        ("stages..steps=3", "a setting is written PATH=VALUE, such as stages.refine.steps=50"),
        ("seed=[1", "this [ is never closed"),
        ("seed=", "seed: nothing is given; it must be a whole number from 0 to 9,223,372,036,854,775,807"),
        ("stages.refin.steps=3", "stages: no 'refin' (expose, refine; or a number from 0 to 1); did you mean 'refine'?"),
        ("stages.2.steps=3", "stages: no '2' (expose, refine; or a number from 0 to 1)"),
        ("stages.refine.stpes=3", f"stages[1]: no field 'stpes' (fields: {STAGE_FIELDS}); did you mean 'steps'?"),
        ("stages.refine.lr.peek=3", "stages[1].lr: no field 'peek' (fields: peak, warmup, warmup_from, schedule, floor); did you mean 'peak'?"),
        ("stages.refine.precision.x=3", "stages[1].precision: 'bf16' has no fields; give stages[1].precision as a whole, not 'stages.refine.precision.x'"),
        ("stages.refine.mix.t2=3", "stages[1].mix: 'natural' has no fields; give stages[1].mix as a whole, not 'stages.refine.mix.t2'"),
        ("stages.refine.mix={t2: 1}", "stages[1].mix: no source 't2' (sources: t2i, edit); did you mean 't2i'?"),
        ("sources.edit.path=data/edit.jsonl", "sources.edit.path: 'data/edit.jsonl' does not exist; did you mean 'edits.jsonl'?"),
    ],
)
def test_broken_set_is_told_with_the_flag_as_its_place(flag: str, said: str) -> None:
    assert problems_of(GOOD, flag) == [f"--set {flag}: {said}"]


# --- notes, defaults, writing out ---


def test_notes_name_what_stops_nothing() -> None:
    text = GOOD.replace("mix: natural", "mix: {t2i: 1}").replace("edit: 1}", "edit: 0}").replace("data/photos", "hub/user/photos")
    assert problems_of(text, "model=someone/model") == []
    assert [str(note) for note in plan_notes(read_plan(PLAN, ["model=someone/model"]), Path.cwd())] == [
        "plans/x.yaml:3:15: sources.t2i.path: 'hub/user/photos' lies on the Hub, which was not asked",
        "plans/x.yaml:4:3: sources.edit: no stage draws from this source",
        "--set model=someone/model: model: no folder 'someone/model' here, so it is taken for a Hub id; the Hub was not asked",
    ]


def stage_of(**fields: object) -> Stage:
    return Stage.model_validate({"name": "a", "steps": 100, "resolution": 16, "batch": 4, "lr": 1e-4, **fields})


def test_computed_defaults_are_those_of_the_plan_language() -> None:
    for images, micro in {1: 1, 2: 2, 3: 3, 4: 4, 5: 1, 6: 3, 7: 1, 8: 4, 64: 4}.items():
        assert resolved_batch(stage_of(batch=images)).micro == micro
    assert resolved_batch(stage_of(batch={"images": 8, "micro": 8})).micro == 8
    for steps, warmup in {1: 0, 19: 0, 20: 1, 39: 1, 1000: 50, 2000: 100, 10**6: 100}.items():
        assert resolved_rate(stage_of(steps=steps)).warmup == warmup
    assert resolved_rate(stage_of(lr={"peak": 1e-4, "warmup": 0})).warmup == 0
    assert resolved_rate(stage_of()).floor is None
    assert resolved_rate(stage_of(lr={"peak": 1e-4, "schedule": "linear"})).floor == 0
    storages = {("fp32", "adapter"): "fp32", ("bf16", "adapter"): "bf16", ("fp16", "adapter"): "fp32", ("bf16", "full"): "fp32"}
    for (precision, train), storage in storages.items():
        assert resolved_storage(stage_of(precision=precision, train=train)) == storage
    assert resolved_storage(stage_of(precision="fp32", base="bf16")) == "bf16"


RICH = """\
name: rich
seed: 9223372036854775807
model: {repo: models/pixels, guidance: 3.5}
adapter: {rank: 4, alpha: 2, targets: ["a\\\\.b", 'c[0-9]+']}
sources:
  no: {path: hub/user/photos, split: test, take: {count: 5, by: first}}
  edit: {path: data/edits.jsonl, task: edit, columns: {reference: [source], prompt: instruction}, prompt: "1e-4", on_bad_row: stop}
stages:
  - {name: one, steps: 1, mix: {power: 0.5}, resolution: 2, batch: 1, lr: 0, train: full, timesteps: {density: uniform, shift: 3}}
  - {name: two, steps: 9, mix: {no: 0.1, edit: 0}, resolution: 2, batch: {images: 6}, lr: {peak: 3e-5, warmup: 0}, clip: null, ema: 0.5}
  - {name: "3", steps: 9, resolution: 2, batch: 6, lr: {peak: 1, schedule: linear, floor: 1e-300}, ema: 0.9, handoff: {ema: keep, optimizer: keep_v}}
evaluate: {rows: 0}
track: [trackio, {name: wandb, project: x, online: true}]
"""


@pytest.mark.parametrize("text", [GOOD, RICH])
@pytest.mark.parametrize("fill", [lambda plan: plan, resolved_plan], ids=["as given", "computed defaults filled in"])
def test_plan_written_out_is_read_back_equal_and_sound(text: str, fill: Callable[[Plan], Plan]) -> None:
    assert problems_of(text) == []
    plan = fill(read_plan(PLAN).plan)
    written = to_yaml(plan)
    assert problems_of(written) == []
    again = read_plan(PLAN).plan
    assert again == plan
    assert to_yaml(again) == written
    assert Plan.model_validate(resolved(plan)) == plan
    assert YAML(typ="safe", pure=True).load(written) == resolved(plan)  # other readers agree


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30))
def test_any_text_is_written_out_and_read_back_the_same(text: str) -> None:
    problems_of(GOOD)
    plan = read_plan(PLAN).plan
    sources = {**plan.sources, "t2i": plan.sources["t2i"].model_copy(update={"prompt": text})}
    PLAN.write_text(to_yaml(plan.model_copy(update={"sources": sources})), encoding="utf-8", newline="")
    assert read_plan(PLAN).plan.sources["t2i"].prompt == text


def test_a_tracker_that_is_not_installed_is_told_with_place_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.check_tracking.find_spec", lambda name: None)
    text = "track: [tensorboard]\n" + GOOD
    assert problems_of(text) == ["plans/x.yaml:1:9: track[0]: 'tensorboard' is not installed; type `pip install tensorboard`, or write track: trackio, or none"]


# --- robustness ---

WORDS = st.sampled_from([
    "", " ", "\n", "\t", ":", ": ", "- ", "{", "}", "[", "]", ",", "'", '"', "&a ", "*a", "<<: ", "!x ", "? ", "|", ">", "#", "%", "@", "---\n",
    "null", "true", "1e400", "-1", "0", "1e-4", ".inf", "9" * 5000, "9" * 90, "0x", "é", "\0", "\x01", "\u2028", "\ud800", "\ufeff", "\\", "~", "..",
    "path", "hub/", "*.parquet", "{0..9}.parquet", "power", "mix", "a" * 300, "~nobody/x", "/", "natural", "(", "name",
])  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """GOOD or RICH, changed in one to four places."""
    text = draw(st.sampled_from([GOOD, RICH]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 8])))
        text = text[:start] + draw(WORDS | st.text(max_size=3)) + text[end:]
    return text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated())
def test_no_text_makes_reading_or_checking_raise_anything_but_a_plan_error(text: str) -> None:
    said = problems_of(text)
    assert all(line.startswith(("plans/x.yaml", "and ")) for line in said)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(min_value=10**30), st.floats(), st.text(max_size=5), st.sampled_from(["natural", "full", "a/b", "~"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["peak", "power", "images", "t2i", "x y"]), inner, max_size=3), max_leaves=5)
PATHS = st.sampled_from([
    "name", "seed", "model", "adapter", "adapter.targets", "sources", "sources.t2i", "sources.t2i.path", "sources.edit.columns", "stages",
    "stages.0", "stages.0.mix", "stages.0.lr", "stages.1.lr", "stages.1.batch", "stages.1.timesteps.shift", "stages.1.optimizer.betas",
    "stages.1.handoff", "stages.0.train", "stages.0.name", "start", "evaluate", "evaluate.accuracy", "previews", "track", "stages.0.train.0",
])  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PATHS, VALUES), min_size=1, max_size=3))
def test_no_value_makes_reading_or_checking_raise_anything_but_a_plan_error(changes: list[tuple[str, object]]) -> None:
    flags = [f"{path}={json.dumps(value)}" for path, value in changes]
    assert all(line.startswith(("plans/x.yaml", "--set ", "and ")) for line in problems_of(GOOD, *flags) if "\n" not in "".join(flags))


def test_reading_and_checking_take_under_a_second_and_no_torch() -> None:
    problems_of(GOOD)
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from stages.check import check_plan, plan_notes\n"
        "from stages.reader import read_plan\n"
        "read = read_plan(Path('plans/x.yaml'))\n"
        "assert not check_plan(read, Path.cwd())\n"
        "plan_notes(read, Path.cwd())\n"
        "assert not {'torch', 'datasets', 'diffusers', 'pyarrow', 'numpy', 'PIL', 'rich'} & sys.modules.keys(), 'imported too much'\n"
        "print(time.process_time())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = [
        float(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 1, "beside other work a core is slower"


# --- what is said twice agrees ---


def test_check_knows_the_same_names_as_the_readers_of_sources() -> None:
    assert check_sources.IMAGE_SUFFIXES == mixing_images.SUFFIXES
    assert check_sources.METADATA == mixing_folder.METADATA
    assert tuple(mixing_tasks.TASKS) == get_args(plan_types.Task)
    assert get_args(mixing_tasks.Role) == get_args(plan_types.Role)
    schema = Plan.model_json_schema()
    assert schema["properties"]["name"]["pattern"] == NAME_PATTERN


COLUMNS = st.sampled_from([
    "image", "target", "file_name", "reference", "reference_file_name", "source", "text", "prompt", "caption", "x", "x_file_names",
    "eligen_entity_prompts", "eligen_entity_masks", "eligen_entity_masks_file_names",
])  # fmt: skip
ASKED = st.dictionaries(st.sampled_from(get_args(mixing_tasks.Role)), COLUMNS | st.lists(COLUMNS, min_size=1, max_size=2))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["text_to_image", "edit", "entity"]), st.lists(COLUMNS, max_size=5, unique=True), ASKED, st.booleans())
def test_check_of_columns_gives_the_readers_verdict(task: str, found: list[str], asked: dict[Any, Any], has_prompt: bool) -> None:
    roles = mixing_tasks.TASKS[task]
    for role, has in {"reference": roles.references, "entity_prompts": roles.regions, "entity_masks": roles.regions}.items():
        if not has:
            asked.pop(role, None)  # refused before any column is looked at
    try:
        mixing_tasks.choose_columns(task, found, asked, "a" if has_prompt else None)
        refused = False
    except SourceError:
        refused = True
    assert (columns.column_problem(task, found, asked, has_prompt) is not None) == refused


def test_docs_are_fresh() -> None:
    assert plan_docs.main(["--check"]) == 0, "run: python -m stages.plan_docs"


@pytest.mark.parametrize("text", [plan_docs.SHORTEST, plan_docs.LONGER])
def test_plans_in_the_docs_are_well_formed(text: str) -> None:
    said = problems_of(text)
    assert all("does not exist" in line or "matches no file" in line or "no file" in line for line in said), said


def test_every_link_in_the_docs_leads_to_a_heading() -> None:
    page = plan_docs.markdown()
    headings = {plan_docs._anchor(line.removeprefix("## ")) for line in page.splitlines() if line.startswith("## ")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links <= headings


def test_quoted_words_are_short_and_printable() -> None:
    assert quoted("a") == "'a'"
    assert quoted("\x1b[2J") == "'\\x1b[2J'"
    assert len(quoted("a" * 1000)) < 90
    assert str(Problem("x:1:2", "", "y")) == "x:1:2: y"
