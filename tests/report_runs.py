"""A run folder as a quickstart leaves it, made up, and its report read back."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image, ImageDraw

from stages.report import write_report
from stages.report.style import STYLE

CAPTION = '<script>alert("caption")</script> a handwritten seven & "more"'
SOURCES = {"text_to_image": 900, "subject": 300, "control": 250, "edit": 150, "other": 100}
BASE = {"text_to_image": 1.1203, "subject": 1.1188, "control": 1.1211, "edit": 1.2004, "other": 1.1190}
# Held-out loss of every source at the end of each stage, and the standard errors of its change since the base and since the stage's start.
ENDS = {
    "foundation": {"text_to_image": 0.1402, "subject": 0.2811, "control": 0.2794, "edit": 0.4217, "other": 0.2920},
    "expose": {"text_to_image": 0.1419, "subject": 0.1388, "control": 0.0792, "edit": 0.1623, "other": 0.0917},
    "refine": {"text_to_image": 0.1385, "subject": 0.1352, "control": 0.0741, "edit": 0.1490, "other": 0.0884},
}
STAGES = [
    {"stage": "foundation", "steps": 900, "images": 32, "precision": "fp32", "base": "fp32", "train": "full", "trainable": 467_104},
    {"stage": "expose", "steps": 600, "images": 32, "precision": "bf16", "base": "bf16", "train": "adapter", "trainable": 149_504},
    {"stage": "refine", "steps": 300, "images": 32, "precision": "fp32", "base": "fp32", "train": "adapter", "trainable": 149_504},
]
MIXES = [
    {"text_to_image": 1.0},
    {name: rows / 1700 for name, rows in SOURCES.items()},
    {"text_to_image": 0.5, "subject": 0.2, "control": 0.1, "edit": 0.1, "other": 0.1},
]
LEARNING_RATES: list[tuple[float, int, float | None]] = [(4e-3, 45, 4e-5), (2e-3, 30, 4e-6), (5e-4, 15, None)]
PLAN = f"""\
name: quickstart
seed: 42
model: {{repo: runs/digits/base}}
adapter: {{rank: 16, alpha: 16.0, targets: linear}}
sources:
  text_to_image: {{path: data/digits/text_to_image, task: text_to_image}}
  subject: {{path: data/digits/subject.jsonl, task: subject}}
  control: {{path: data/digits/control.jsonl, task: control}}
  edit: {{path: data/digits/edit.jsonl, task: edit, prompt: {json.dumps(CAPTION)}}}
  other: {{path: data/digits/other.jsonl, task: other}}
stages:
- {{name: foundation, steps: 900, lr: {{peak: 0.004, warmup: 45, warmup_from: 0.0, schedule: cosine, floor: 4.0e-5}}, batch: {{images: 32, micro: 16}},
   resolution: 8, mix: {{text_to_image: 1.0}}, precision: fp32, base: fp32, train: full}}
- {{name: expose, steps: 600, lr: {{peak: 0.002, warmup: 30, warmup_from: 0.0, schedule: cosine, floor: 4.0e-6}}, batch: {{images: 32, micro: 16}},
   resolution: 8, mix: natural, precision: bf16, base: bf16, train: adapter}}
- {{name: refine, steps: 300, lr: 0.0005, batch: {{images: 32, micro: 16}},
   resolution: 8, mix: {{text_to_image: 50, subject: 20, control: 10, edit: 10, other: 10}}, precision: fp32, base: fp32, train: adapter}}
# docs: https://example.org/plan
"""


def _sheet(seed: int) -> bytes:
    """A preview sheet of the size that a run makes: for each source four rows of reference, output and target, and a caption."""
    pixels = random.Random(seed)
    image = Image.new("RGB", (1464, 938), "#f6f6f4")
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(SOURCES):
        draw.text((8, row * 186 + 8), name, fill="#222222")
        for column in range(4):
            number = pixels.randrange(10)
            for place in range(2 if name == "text_to_image" else 3):
                digit = Image.new("L", (8, 8))
                ImageDraw.Draw(digit).text((1, -2), str(number), fill=200 + pixels.randrange(56))
                image.paste(digit.resize((112, 112), Image.Resampling.NEAREST), (8 + column * 364 + place * 116, row * 186 + 44))
            draw.text((8 + column * 364, row * 186 + 160), f"a handwritten {number}", fill="#444444")
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _evaluation(stage: str, step: int, kind: str, now: dict[str, float], start: dict[str, float] | None, base: dict[str, float] | None) -> dict[str, object]:
    levels = [2.6 - 0.28 * k for k in range(10)]
    sources: dict[str, dict[str, object]] = {}
    for name, loss in now.items():
        shape = [math.exp(level - 1.4) for level in levels] if loss < 1 else [1 + 0.04 * k for k in range(10)]
        by_timestep: list[float | None] = [loss * value * 10 / sum(shape) for value in shape]
        sources[name] = {"loss": loss, "rows": 64, "by_timestep": [None, *by_timestep[1:]], "by_timestep_rows": [0, 4, 6, 8, 9, 10, 10, 8, 6, 3]}
        for since, before in (("since_base", base), ("since_start", start)):
            if before is not None:
                change = loss - before[name]
                sources[name] |= {since: change, since + "_error": 0.0009 + 0.012 * abs(change), since + "_by_timestep_error": [None, *(0.01 * change for _ in range(9))]}
    return {"event": "eval", "stage": stage, "step": step, "kind": kind, "weights": "raw", "seconds": 0.62, "sources": sources}


def preview_rows(folder: str) -> list[dict[str, object]]:
    """What a preview event says of two rows of each source: text to image has no reference, edit has two."""
    rows: list[dict[str, object]] = []
    for name in SOURCES:
        for row in (1, 2):
            tiles = f"previews/{folder}/tiles/{name}-{row}"
            references = [f"{tiles}-reference-{k + 1}.png" for k in range({"text_to_image": 0, "edit": 2}.get(name, 1))]
            prompt = CAPTION if name == "edit" else f"a handwritten {row}"
            rows.append({"source": name, "row": row, "prompt": prompt, "references": references, "target": f"{tiles}-target.jpg", "output": f"{tiles}-output.jpg",
                         "base": f"previews/base-8/tiles/{name}-{row}-output.jpg"})
    return rows


def tile_files(rows: list[dict[str, object]]) -> Iterator[str]:
    """The files of all pictures of an event."""
    for row in rows:
        references = row["references"]
        assert isinstance(references, list)
        yield from (*references, str(row["target"]), str(row["output"]), str(row["base"]))


def quality_event(stage: str, step: int, index: int) -> dict[str, object]:
    """What samples score: better than the base each time, and in `refine` lower than in the stage before."""
    mean = (0.24, 0.29, 0.27)[index]
    clip = {"mean": mean, "error": 0.004, "rows": 16, "ceiling": 0.32, "floor": 0.2, "since_base": mean - 0.2, "since_base_error": 0.004}
    last = {} if index == 0 else {"since_last": (0.0, 0.05, -0.02)[index], "since_last_error": 0.003}
    return {"event": "quality", "stage": stage, "step": step, "sources": {"text_to_image": {"clip_score": clip | last}, "edit": {"dino_similarity": clip}}}


def quickstart_events() -> Iterator[dict[str, object]]:
    """What a run of the quickstart writes, with one interruption in the middle of `expose`."""
    noise = random.Random(0)
    run = {"event": "run", "name": "quickstart", "seed": 42, "model": "runs/digits/base", "family": "flux", "parameters": 467_104, "device": "cpu",
           "processes": 1, "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}, "resumed_from": None}
    yield run
    yield _evaluation("", 0, "base", BASE, None, None)
    before = BASE
    for index, (stage, mix, (peak, warmup, floor)) in enumerate(zip(STAGES, MIXES, LEARNING_RATES, strict=True)):
        name, steps = str(stage["stage"]), int(str(stage["steps"]))
        end = ENDS[name]
        shared = {"event": "stage", "index": index, **stage, "micro": 16, "resolution": 8, "mix": mix, "tokens_per_step": 32 * 16}
        yield {**shared, "state": "start"}
        if index:
            old = STAGES[index - 1]
            yield {
                "event": "handoff", "from": old["stage"], "to": name, "kept": ["weights"],
                "delta": {"0.1": 0.0021, "0.5": 0.0034, "0.9": 0.0048}, "exact": False,
                "cause": f"precision {old['precision']} -> {stage['precision']}, base stored in {old['base']} -> {stage['base']}",
                "changes": {
                    "precision": [old["precision"], stage["precision"]],
                    "lr": [{"peak": LEARNING_RATES[index - 1][0], "schedule": "cosine"}, {"peak": peak, "schedule": "cosine"}],
                },
            }
        yield _evaluation(name, 0, "start", before, None, BASE)
        gone = {source: noise.random() for source in mix}
        for step in range(10, steps + 1, 10):
            progress = step / steps
            if step < warmup:
                lr = peak * step / warmup
            else:
                lr = peak if floor is None else floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            losses = {source: (end[source] + (before[source] - end[source]) * math.exp(-6 * progress)) * noise.gauss(1, 0.12) for source in mix}
            drawn = {source: round(32 * step * share + gone[source] - 0.5) for source, share in mix.items()}
            drawn["text_to_image"] += 32 * step - sum(drawn.values())
            yield {"event": "step", "stage": name, "step": step, "loss": sum(losses[s] * share for s, share in mix.items()), "lr": lr,
                   "grad_norm": 0.4 + 2.2 * math.exp(-5 * progress) * abs(noise.gauss(1, 0.3)),
                   "images_per_second": noise.gauss((430, 255, 300)[index], 9), "data_wait": abs(noise.gauss(0.008, 0.004)),
                   "memory_bytes": 21e9 + 1e9 * progress, "multiplied_in": stage["precision"], "losses": losses, "drawn": drawn}
            if step % 100 == 0 and step < steps:
                now = {source: end[source] + (before[source] - end[source]) * math.exp(-5 * progress) for source in SOURCES}
                yield _evaluation(name, step, "during", now, before, BASE)
            if name == "expose" and step == 340:
                yield {**run, "resumed_from": {"stage": "expose", "step": 300}}
        yield _evaluation(name, steps, "end", end, before, BASE)
        yield {"event": "accuracy", "stage": name, "step": steps, "source": "text_to_image", "accuracy": (0.945, 0.93, 0.95)[index], "samples": 200,
               "judge_on_real": 0.988, "shuffled_captions": 0.105, "untrained": 0.1}
        yield {"event": "save", "stage": name, "step": steps, "folder": f"stages/{index + 1}-{name}/step-{steps:06}", "seconds": 0.05, "bytes": 1_900_000}
        yield {"event": "preview", "stage": name, "step": steps, "file": f"previews/{index + 1}-{name}.png", "rows": preview_rows(f"{index + 1}-{name}")}
        yield quality_event(name, steps, index)
        yield {"event": "memory", "stage": name, "step": steps, "kind": "peak", "peak_bytes": 24_000_000_000 + index * 10**9, "estimated_bytes": 25_000_000_000,
               "estimated_encoder_bytes": 9_000_000_000}
        yield {**shared, "state": "end", "seconds": (69.2, 78.4, 33.1)[index]}
        before = end
    yield {"event": "warning", "stage": "expose", "step": 120, "message": f"source 'edit': row 17 cannot be read: {CAPTION}"}
    yield {"event": "publish", "folder": "adapter", "max_difference": 1.2e-7}


def quickstart_ledger() -> dict[str, object]:
    """The ledger of that run."""
    stages = []
    for stage, mix in zip(STAGES, MIXES, strict=True):
        total = int(str(stage["steps"])) * 32
        images = {name: round(total * share) for name, share in mix.items()}
        stages.append({
            "stage": stage["stage"], "steps": stage["steps"], "images": total,
            "sources": {
                name: {"asked": mix[name], "drawn": drawn / total, "images": drawn, "tokens": drawn * (16 if name == "text_to_image" else 32),
                       "epochs": drawn / SOURCES[name], "unique_rows": min(drawn, SOURCES[name] - 64), "dropped": {"unreadable": 2} if name == "edit" else {}}
                for name, drawn in images.items()
            },
        })
    return {"stages": stages}


def write_quickstart_run(folder: Path, events: int | None = None) -> Path:
    """The run folder of a quickstart, or what it held after so many events."""
    (folder / "previews").mkdir(parents=True)
    clock = 1_785_000_000.0
    lines = []
    for event in list(quickstart_events())[:events]:
        clock += {"step": 1.0, "eval": 0.62, "run": 60.0}.get(str(event["event"]), 0.05)
        lines.append(json.dumps({**event, "time": clock}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "plan.yaml").write_text(PLAN, encoding="utf-8")
    if events is None:
        for index, stage in enumerate(STAGES):
            name = f"{index + 1}-{stage['stage']}"
            (folder / f"previews/{name}.png").write_bytes(_sheet(index))
            for number, file in enumerate(tile_files(preview_rows(name))):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shade = (37 * number % 256, 90 + 60 * index, 80)
                Image.new("RGB", (8, 8) if file.endswith(".png") else (256, 192), shade).save(folder / file)
        (folder / "ledger.json").write_text(json.dumps(quickstart_ledger()), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "torch": "2.13.0", "device": "cpu"}, indent=2), encoding="utf-8")
    return folder


def without_tiles(folder: Path) -> Path:
    """The same run as a former version wrote it: its previews are sheets alone."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["event"] == "preview":
            line.pop("rows", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


VOID = {"meta", "link", "img", "br"}


class Elements(HTMLParser):
    """Every element and its attributes; fails on markup that is not closed as it was opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report_of(folder: Path) -> tuple[str, str]:
    """The report of a run folder, checked for being well formed: its HTML and its text without the style sheet."""
    html = write_report(folder).read_text(encoding="utf-8")
    words = "".join(Elements(html).text).replace(STYLE, "")
    return html, words
