"""The report of a run: what it says, what it leaves out, and that it stays one quick, safe file."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from stages.report import first_table, write_report
from stages.report.charts import MOST_POINTS, Course, Line, downsample, line_chart, scale, spread
from stages.report.curves import running_mean
from stages.report.page import STYLE, duration, exact, fixed, shortest, signed, size
from stages.report.record import Change, read_record
from stages.report.sheets import LARGE_SHEET

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
    levels = [2.6 - 0.35 * k for k in range(8)]
    sources: dict[str, dict[str, object]] = {}
    for name, loss in now.items():
        shape = [math.exp(level - 1.4) for level in levels] if loss < 1 else [1 + 0.04 * k for k in range(8)]
        sources[name] = {"loss": loss, "rows": 64, "by_timestep": [loss * value * 8 / sum(shape) for value in shape]}
        for since, before in (("since_base", base), ("since_start", start)):
            if before is not None:
                change = loss - before[name]
                sources[name] |= {since: change, since + "_error": 0.0009 + 0.012 * abs(change)}
    return {"event": "eval", "stage": stage, "step": step, "kind": kind, "weights": "raw", "seconds": 0.62, "sources": sources}


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
                   "multiplied_in": stage["precision"], "losses": losses, "drawn": drawn}
            if step % 100 == 0 and step < steps:
                now = {source: end[source] + (before[source] - end[source]) * math.exp(-5 * progress) for source in SOURCES}
                yield _evaluation(name, step, "during", now, before, BASE)
            if name == "expose" and step == 340:
                yield {**run, "resumed_from": {"stage": "expose", "step": 300}}
        yield _evaluation(name, steps, "end", end, before, BASE)
        yield {"event": "accuracy", "stage": name, "step": steps, "source": "text_to_image", "accuracy": (0.945, 0.93, 0.95)[index], "samples": 200,
               "judge_on_real": 0.988, "shuffled_captions": 0.105, "untrained": 0.1}
        yield {"event": "save", "stage": name, "step": steps, "folder": f"stages/{index + 1}-{name}/step-{steps:06}", "seconds": 0.05, "bytes": 1_900_000}
        yield {"event": "preview", "stage": name, "step": steps, "file": f"previews/{index + 1}-{name}.png"}
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
            (folder / f"previews/{index + 1}-{stage['stage']}.png").write_bytes(_sheet(index))
        (folder / "ledger.json").write_text(json.dumps(quickstart_ledger()), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "torch": "2.13.0", "device": "cpu"}, indent=2), encoding="utf-8")
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quickstart_run(tmp_path_factory.mktemp("runs") / "quickstart")


def test_report_holds_what_was_measured(run: Path) -> None:
    html, words = report_of(run)
    for losses in ENDS.values():
        for loss in losses.values():
            assert f"<b>{loss:.4f}</b>" in html
    for said in (
        "All 3 stages are done.", "Since the base, 5 of 5 sources got better", "1,800", "57,600", "467,104 parameters", "2 launches", "seed 42",
        "94.5 %", "98.8 %", "10.5 %", "900 steps of 32 images", "lr 0.004, cosine to 4e-5", "bf16, as measured", "expose, step 300",
        "off by at most 0.5 of 19,200 images", "10,165", "2 unreadable", "precision fp32 → bf16, base stored in fp32 → bf16", "0.0021 at 0.1",
        "lr.peak", "its output differs by at most 1.2e-7", "stages/3-refine/step-000300", "not in this report",
    ):  # fmt: skip
        assert (said in words) is (said != "not in this report"), said


def test_changes_beyond_three_standard_errors_are_marked_by_sign_and_word(run: Path) -> None:
    assert [Change(v, 0.1).verdict for v in (-0.31, -0.29, 0.29, 0.31, math.nan)] == ["better", "", "", "worse", ""]
    assert [Change(v, 0.0).verdict for v in (-1e-9, 0.0, 1e-9)] == ["better", "", "worse"]
    html, _ = report_of(run)
    # text_to_image moved by +0.0017 in `expose`, with a standard error of 0.0009: no clear change.
    assert re.search(r'title="no clear change"[^>]*>·</span><span class="">\+0\.0017</span><span class="error"> ± 0\.0009</span>', html)
    assert re.search(r'title="better"[^>]*>▼</span><span class="better">−0\.1423</span><span class="error"> ± 0\.0026</span>', html)


def test_first_table_is_aligned_markdown_with_every_source_and_stage(run: Path) -> None:
    lines = first_table(run).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(SOURCES) * len(STAGES)
    assert len({len(row) for row in rows}) == 1
    assert {row.count("|") for row in rows} == {6}
    assert "| subject       | expose     |        0.1388 | ▼ −0.9800 ± 0.0127 | ▼ −0.1423 ± 0.0026 |" in rows
    assert "| text_to_image | expose     |        0.1419 | ▼ −0.9784 ± 0.0126 | · +0.0017 ± 0.0009 |" in rows
    assert lines[-1] == (
        "After refine, 95.0 % of 200 samples of text_to_image are judged right "
        "(real images 98.8 %, shuffled captions 10.5 %, untrained model 10.0 %)."
    )


def test_first_table_of_an_empty_folder_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert first_table(tmp_path) == "No held-out loss has been measured yet.\n"


def test_what_users_wrote_is_text_and_never_markup(run: Path) -> None:
    html, words = report_of(run)
    assert "script" not in {tag for tag, _ in Elements(html).found}
    assert CAPTION in words  # in the warning, as it was written
    assert escape(CAPTION, quote=False) in html or escape(CAPTION) in html


def test_report_asks_for_nothing_outside_itself(run: Path) -> None:
    html, words = report_of(run)
    for tag, attributes in Elements(html).found:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"):
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, name, value)
            assert "//" not in (value or "") or (value or "").startswith("data:"), (tag, name, value)
    assert "https://example.org/plan" in words  # a link in the plan stays text
    assert not re.search(r"url\(|@import|expression\(", STYLE)
    assert "default-src 'none'" in html


def test_links_lead_to_sections_that_are_there(run: Path) -> None:
    found = Elements(report_of(run)[0]).found
    anchors = [str(attributes["href"]) for tag, attributes in found if tag == "a"]
    assert len(anchors) >= 14
    assert {anchor.removeprefix("#") for anchor in anchors} <= {str(a["id"]) for _, a in found if "id" in a}


def test_report_can_be_written_after_every_event_and_with_a_torn_line(tmp_path: Path) -> None:
    total = len(list(quickstart_events()))
    for events in [*range(0, 16), *range(16, total, 13)]:
        folder = write_quickstart_run(tmp_path / str(events), events)
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b'{"event": "step", "stage": "expose", "st\xff')
        _, words = report_of(folder)
        assert "Not in this report, because the run has not written it" in words


def test_half_finished_run_says_how_far_it_is(tmp_path: Path) -> None:
    events = list(quickstart_events())
    reached = next(k for k, event in enumerate(events) if event.get("stage") == "expose" and event.get("step") == 340 and event["event"] == "step")
    _, words = report_of(write_quickstart_run(tmp_path / "run", reached + 1))
    assert "1 of 3 stages are done; expose has come to step 340 of 600." in words
    assert "expose, step 300" in words  # the column of the last evaluation in the first table
    assert "to come" in words


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.yaml", "ledger.json", "environment.json", "previews/3-refine.png"])
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff[{", b"[1, 2]", b'{"stages": 3, "sources": [], "name": {}}'])
def test_missing_or_broken_file_never_stops_the_report(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    report_of(folder)
    first_table(folder)


def test_values_of_any_kind_never_stop_the_report(tmp_path: Path) -> None:
    draw = random.Random(1)
    junk = [None, True, "x", "", -1, 0, 10**400, 1e308, -1e-300, math.nan, math.inf, [], [1], {}, {"a": None}, "\ud800", "<b>", [[{}]]]

    def spoil(value: object) -> object:
        if draw.random() < 0.04:
            return draw.choice(junk)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    events = list(quickstart_events())
    folder = write_quickstart_run(tmp_path / "run")
    for _ in range(40):
        chosen = sorted(draw.sample(range(len(events)), 60))
        lines = [json.dumps(spoil({**events[k], "time": 1.785e9 + k})) for k in chosen]
        (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / "ledger.json").write_text(json.dumps(spoil(quickstart_ledger())), encoding="utf-8")
        report_of(folder)
        first_table(folder)


def test_loss_that_is_not_finite_breaks_the_curve_and_is_counted(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    spoilt = [line.replace('"loss": ', '"loss": NaN, "was": ', 1) if '"step": 200, "loss"' in line else line for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(spoilt), encoding="utf-8")
    html, words = report_of(folder)
    assert "3 logged steps had a loss that was not finite." in words
    paths = [str(attributes["d"]) for tag, attributes in Elements(html).found if tag == "path"]
    assert paths
    assert not any("nan" in path for path in paths)


def test_long_run_is_reported_quickly_and_in_little_space(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    loss = {name: 0.123456789 for name in SOURCES}
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(10, 2_000_000, 10):
            peak = 9.25 if step == 777_770 else 0.0
            line = {"event": "step", "stage": "long", "step": step, "loss": 0.1 + peak, "lr": 1e-4, "grad_norm": 0.5, "losses": loss, "drawn": loss}
            file.write(json.dumps(line) + "\n")
    began = time.process_time()
    write_report(folder)
    assert time.process_time() - began < 3  # about one second on the machine it was written on
    html, words = report_of(folder)
    assert len(html) < 300_000
    assert "1,999,990" in words  # the last line is read, however few are
    assert "One logged step in" in words


def test_thousand_stages_and_fifty_sources_stay_bounded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    sources = {f"source_with_a_long_name_{k:02}": {"loss": 0.1 + k, "by_timestep": [0.1] * 8, "since_base": -0.1, "since_base_error": 0.01} for k in range(50)}
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for k in range(1000):
            for event in (
                {"event": "stage", "state": "start", "stage": f"stage{k}", "steps": 10, "images": 4, "mix": dict.fromkeys(sources, 0.02)},
                {"event": "step", "stage": f"stage{k}", "step": 10, "loss": 0.1, "lr": 1e-4},
                {"event": "eval", "stage": f"stage{k}", "step": 10, "kind": "end", "weights": "raw", "sources": sources if k % 20 == 0 else {}},
                {"event": "handoff", "from": f"stage{k - 1}", "to": f"stage{k}", "exact": True},
                {"event": "warning", "stage": f"stage{k}", "step": 1, "message": f"warning {k}"},
                {"event": "stage", "state": "end", "stage": f"stage{k}", "steps": 10, "seconds": 1.0},
            ):
                file.write(json.dumps(event) + "\n")
    html, _ = report_of(folder)
    assert len(html) < 3_000_000


def test_report_is_written_in_well_under_two_seconds(run: Path) -> None:
    began = time.process_time()
    write_report(run)
    assert time.process_time() - began < 1.0
    assert not list(run.glob("*.part"))


def test_moving_average_stands_in_the_table_with_the_raw_weights_beside_it(tmp_path: Path) -> None:
    def line(weights: str, loss: float) -> str:
        source = {"loss": loss, "rows": 64, "since_base": -0.1, "since_base_error": 0.01}
        return json.dumps({"event": "eval", "stage": "a", "step": 5, "kind": "end", "weights": weights, "sources": {"photos": source}})

    (tmp_path / "metrics.jsonl").write_text(line("ema", 0.2222) + "\n" + line("raw", 0.3333) + "\n", encoding="utf-8")
    html, words = report_of(tmp_path)
    assert "<b>0.222</b>" in html
    assert "raw weights 0.333" in words
    assert "Of the moving average in every stage." in words
    assert "| photos | a     |         0.222 |" in first_table(tmp_path)


def test_each_stage_is_compared_with_the_base_at_its_own_resolution(tmp_path: Path) -> None:
    def line(stage: str, kind: str, loss: float, since: float | None) -> str:
        source = {"loss": loss, "by_timestep": [loss] * 8} | ({} if since is None else {"since_base": since, "since_base_error": 0.001})
        return json.dumps({"event": "eval", "stage": stage, "step": 0 if kind == "base" else 9, "kind": kind, "weights": "raw", "sources": {"photos": source}})

    lines = [line("", "base", 0.9, None), line("small", "end", 0.5, -0.4), line("", "base", 0.7, None), line("large", "end", 0.4, -0.3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    record = read_record(tmp_path)
    bases = [record.base_of(stage.evaluations[-1]) for stage in record.stages]
    assert [base.sources["photos"].loss for base in bases if base] == [0.9, 0.7]


def test_mix_is_taken_from_the_last_step_while_there_is_no_ledger(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    (folder / "ledger.json").unlink()
    _, words = report_of(folder)
    assert "50.00 / 50.00 %" in words
    assert "off by at most" in words


def test_precision_that_was_not_multiplied_in_is_said(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").replace('"multiplied_in": "bf16"', '"multiplied_in": "fp32"')
    (folder / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    assert "bf16 asked, fp32 measured" in report_of(folder)[1]


def test_previews_are_inside_the_page_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    large = Image.effect_noise((1800, 1500), 60).convert("RGB")
    large.save(folder / "previews/3-refine.png")
    assert (folder / "previews/3-refine.png").stat().st_size > LARGE_SHEET
    tiny = Image.effect_noise((24, 8), 60).convert("RGB")
    tiny.save(folder / "previews/2-expose.png")
    images = [attributes for tag, attributes in Elements(report_of(folder)[0]).found if tag == "img"]
    assert len(images) == 3
    assert str(images[0]["src"]).startswith("data:image/jpeg;base64,")
    assert images[0]["width"] == "1400"
    assert len(str(images[0]["src"])) < 1_500_000
    assert (images[1]["class"], images[1]["width"], images[1]["height"]) == ("tiny", "480", "160")
    assert all(attributes["alt"] for attributes in images)


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hostname", "previews/none.png", "", "plan.yaml", "previews", "a\x00b"])
def test_preview_that_is_no_picture_of_the_run_is_named_and_left_out(tmp_path: Path, file: str) -> None:
    folder = write_quickstart_run(tmp_path / "run", 5)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"event": "preview", "stage": "expose", "step": 1, "file": file}) + "\n")
    html, words = report_of(folder)
    assert "<img" not in html
    assert "After expose, step 1" in words


def test_torn_large_preview_is_named_and_left_out(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    path = folder / "previews/3-refine.png"
    Image.effect_noise((1800, 1500), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: LARGE_SHEET + 1000])
    assert "previews/3-refine.png cannot be read." in report_of(folder)[1]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=3000), st.integers(10, MOST_POINTS))
def test_downsampled_curve_keeps_its_ends_its_extremes_and_its_order(values: list[float], most: int) -> None:
    points = [(float(k), value) for k, value in enumerate(values)]
    kept = downsample(points, most)
    assert len(kept) <= max(most, 0)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    finite = [value for value in values if math.isfinite(value)]
    if points:
        assert (kept[0][0], kept[-1][0]) == (points[0][0], points[-1][0])
    if finite:
        held = [value for _, value in kept if math.isfinite(value)]
        assert (min(held), max(held)) == (min(finite), max(finite))


@given(st.lists(st.floats(-1e30, 1e30).map(lambda v: v if abs(v) > 1e-30 else 0.0) | st.floats(1e-30, 1e12), max_size=50), st.booleans())
def test_axis_holds_its_values_and_few_round_ticks(values: list[float], from_zero: bool) -> None:
    axis = scale(values, 150, from_zero=from_zero)
    assert all(-1e-6 <= axis.place(value) <= 150 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(axis.low - 1e-6 * abs(axis.high) <= tick <= axis.high + 1e-6 * abs(axis.high) for tick in ticks)


@given(st.lists(st.floats(0, 150), max_size=10))
def test_labels_at_line_ends_stand_apart_in_the_order_of_their_lines(places: list[float]) -> None:
    moved = spread(places, 13, 2, 150)
    in_order = [moved[k] for k in sorted(range(len(places)), key=lambda k: places[k])]
    assert all(later - earlier >= 13 - 1e-6 for earlier, later in itertools.pairwise(in_order))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_stages_lie_end_to_end_and_short_ones_can_be_seen(lengths: list[float]) -> None:
    course = Course(tuple(f"s{k}" for k in range(len(lengths))), tuple(lengths))
    edges = course.edges
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(100)
    assert list(edges) == sorted(edges)
    if len(lengths) <= 8:
        assert all(right - left >= 7.99 for left, right in itertools.pairwise(edges))
    assert all(0 <= tick.at <= 100.01 for tick in course.ticks())


@given(st.lists(st.floats(-100, 100) | st.just(math.nan), min_size=1, max_size=60), st.integers(0, 9))
def test_running_mean_is_the_mean_of_the_neighbours(values: list[float], reach: int) -> None:
    for k, (_, mean) in enumerate(running_mean([(float(i), value) for i, value in enumerate(values)], reach)):
        near = [value for value in values[max(0, k - reach) : k + reach + 1] if math.isfinite(value)]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-9) if near else math.isnan(mean)


def test_chart_has_a_name_for_who_cannot_see_it_and_says_its_labels_escaped() -> None:
    chart = line_chart("Loss of <a>", "Ends at 1 & 2", [Line([(0, 1.0), (50, math.nan), (100, 2.0)], "--c0", "<b>")])
    Elements(chart)
    assert "<title>Loss of &lt;a&gt;</title><desc>Ends at 1 &amp; 2</desc>" in chart
    assert "&lt;b&gt;</text>" in chart
    assert chart.count("M0.0 ") + chart.count("M1000.0 ") == 2  # broken where it is not finite


def test_every_colour_can_be_read_on_its_background() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for name in ("ink", "soft", "good", "bad", *(f"c{k}" for k in range(8))):
            for ground in ("paper", "card"):
                one, other = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (other + 0.05) / (one + 0.05) >= 4.5, (name, ground)


def test_numbers_are_written_as_a_person_would() -> None:
    assert [duration(s) for s in (0.62, 59, 221, 7500, 200_000)] == ["0.6 s", "59 s", "3 min 41 s", "2 h 5 min", "2 d 7 h"]
    assert [shortest(v) for v in (0.001, 4e-6, 5e-4, 467_104, 1)] == ["0.001", "4e-6", "0.0005", "467,104", "1"]
    assert [signed(v, 3) for v in (-0.0214, 0.0004, 0.02)] == ["−0.021", "0.000", "+0.020"]
    assert [fixed(v) for v in (0.14, -0.5, 1e-7, math.nan)] == ["0.1400", "−0.5000", "1.0e-7", "not finite"]
    assert [exact(v) for v in (0.004, 0.00383, 1.2e-7)] == ["0.0040", "0.0038", "1.2e-7"]
    assert [size(v) for v in (12, 1_900_000, 23_802_816_000)] == ["12 bytes", "1.9 MB", "23.8 GB"]
