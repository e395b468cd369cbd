"""What single sections of the report say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from report_runs import report_of, write_quickstart_run
from stages.report import first_table
from stages.report.mix import asked, drawn_lately
from stages.report.record import Change, read_record
from stages.report.score import MOST_SOURCES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quickstart_run(tmp_path_factory.mktemp("runs") / "quickstart")


def test_changes_beyond_three_standard_errors_are_marked_by_sign_and_word(run: Path) -> None:
    assert [Change(v, 0.1).verdict for v in (-0.31, -0.29, 0.29, 0.31, math.nan)] == ["better", "", "", "worse", ""]
    assert [Change(v, 0.0).verdict for v in (-1e-9, 0.0, 1e-9)] == ["better", "", "worse"]
    html, _ = report_of(run)
    # text_to_image moved by +0.0017 in `expose`, with a standard error of 0.0009: no clear change.
    assert re.search(r'title="no clear change"[^>]*>·</span><span class="">\+0\.0017</span><span class="error"> ± 0\.0009</span>', html)
    assert re.search(r'title="better"[^>]*>▼</span><span class="better">−0\.1423</span><span class="error"> ± 0\.0026</span>', html)


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


def test_shares_drawn_lately_are_those_since_some_lines_before(tmp_path: Path) -> None:
    """Ten images a step, of which the first twenty steps draw only `a`, and the others half and half."""
    lines: list[dict[str, object]] = [{"event": "stage", "state": "start", "stage": "s", "steps": 60, "mix": {"a": 2, "b": 1}}]
    for step in range(1, 61):
        of_b = max(0, step - 20) * 5
        lines.append({"event": "step", "stage": "s", "step": step, "loss": 1.0, "drawn": {"a": step * 10 - of_b, "b": of_b}})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    record = read_record(tmp_path)
    lately = dict(drawn_lately(record.stages[0]))
    assert lately[20] == {"a": 1.0, "b": 0.0}
    assert lately[30] == {"a": 0.75, "b": 0.25}  # twenty lines hold 200 images
    assert lately[40] == lately[60] == {"a": 0.5, "b": 0.5}
    assert asked(record.stages[0], [], "b") == [(0, 1 / 3), (60, 1 / 3)]
    html, _ = report_of(tmp_path)
    assert "The shares of a, b in what was drawn lately, and dashed what was asked." in html


def test_share_asked_moves_where_it_follows_and_is_not_drawn_where_it_moves_in_a_straight_line(tmp_path: Path) -> None:
    moved = [{"event": "shares", "stage": "s", "step": 10 * k, "changed": k != 2, "before": {"a": 0.5}, "shares": {"a": 0.5 + 0.1 * k}} for k in (1, 2, 3)]
    lines = [{"event": "stage", "state": "end", "stage": name, "steps": 40, "mix": {"a": 1, "b": 3}} for name in ("s", "ramp", "none")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, *moved])), encoding="utf-8")
    (tmp_path / "plan.yaml").write_text("stages: [{name: s}, {name: ramp, mix: {from: natural, to: {a: 1}}}, {name: none}]", encoding="utf-8")
    record = read_record(tmp_path)
    changed = [event for event in record.events["shares"] if event["changed"]]
    assert [asked(stage, changed if stage.name == "s" else [], "a") for stage in record.stages] == [[(0, 0.5), (10, 0.5), (10, 0.6), (30, 0.6), (30, 0.8), (40, 0.8)], [], [(0, 0.25), (40, 0.25)]]
    assert asked(record.stages[2], [], "c") == []


def test_precision_that_was_not_multiplied_in_is_said(tmp_path: Path) -> None:
    folder = write_quickstart_run(tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").replace('"multiplied_in": "bf16"', '"multiplied_in": "fp32"')
    (folder / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    assert "bf16 asked, fp32 measured" in report_of(folder)[1]


def test_score_says_of_each_source_how_far_its_loss_fell_and_what_is_unclear_or_worse(tmp_path: Path) -> None:
    changes = {"fell": (-0.6, 0.01), "rose": (0.2, 0.01), "stayed": (-0.02, 0.01), "slightly": (-0.05, 0.001)}
    sources = {name: {"loss": 1 + change, "since_base": change, "since_base_error": error} for name, (change, error) in changes.items()}
    line = {"event": "eval", "stage": "a", "step": 5, "kind": "end", "sources": sources | {"unmeasured": {"loss": 0.5}}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line), encoding="utf-8")
    html, words = report_of(tmp_path)
    score = html[html.index('<section class="score">') : html.index("</ul>")]
    assert re.findall(r'<span class="was">(.*?)</span><b class="(\w+)">(.*?)</b>', score) == [
        ("1.000 → 0.400", "better", "▼ 60 % lower"), ("1.000 → 1.200", "worse", "▲ 20 % higher"),
        ("1.000 → 0.980", "soft", "· no clear change"), ("1.000 → 0.950", "better", "▼ 5.0 % lower"),
    ]  # fmt: skip
    assert "before any training" in words


def test_score_of_many_sources_shows_those_that_gained_least(tmp_path: Path) -> None:
    sources = {f"source{k:02}": {"loss": 1 - k / 100, "since_start": -k / 100, "since_start_error": 0.001} for k in range(40)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "eval", "stage": "a", "step": 5, "kind": "end", "sources": sources}), encoding="utf-8")
    html, words = report_of(tmp_path)
    score = html[html.index('<section class="score">') : html.index("</ul>")]
    assert re.findall(r"source\d\d(?=</b>)", score) == [f"source{k:02}" for k in range(MOST_SOURCES)]
    assert "The 12 of 40 sources that gained least." in words
    assert "at the start of the stage" in words


def test_samples_scores_stand_beside_real_and_shuffled_images_and_rise_is_better(run: Path) -> None:
    html, words = report_of(run)
    section = html[html.index('<section id="quality">') :]
    assert "CLIP score" in words
    assert "DINO similarity" in words
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", section[: section.index("</table>")])
    refine = re.sub(r"<svg.*?</svg>", "", rows[3])
    assert '<span class="mark worse" aria-hidden="true">▼</span><span class="worse">−0.020</span><span class="error"> ± 0.003</span>' in refine
    assert '<span class="mark better" aria-hidden="true">▲</span><span class="better">+0.070</span>' in refine
    assert re.findall(r'<td class="n">([^<]*)</td>', refine) == ["0.320", "0.200", "58 %", "16"]


def test_memory_stands_beside_its_estimate_and_over_the_steps(run: Path, tmp_path: Path) -> None:
    html, words = report_of(run)
    section = html[html.index('<section id="memory">') : html.index('<section id="handoffs">')]
    assert "<title>refine: peak 26 GB, estimated 25 GB</title>" in section
    assert "9 GB" in words
    assert "<title>Memory</title>" in section
    folder = write_quickstart_run(tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").replace('"memory_bytes"', '"other"').replace('"estimated', '"other')
    (folder / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    html, words = report_of(folder)
    assert "<title>refine: peak 26 GB</title>" in html
    assert "Estimated" not in words
    assert "<title>Memory</title>" not in html


def test_plan_shows_defaults_in_grey(tmp_path: Path) -> None:
    plan = "name: x\nseed: 0\nmodel: m\nsources:\n  photos:\n    path: p\n    repeat: 1\n    augment: {flip: 0.0}\n  seed:\n    path: p\n    repeat: 2\nstages:\n"
    plan += "  - name: a\n    steps: 5\n    clip: 1.0\n    lr: 0.1\n  - name: b\n    clip: 2.0\n    compile: false\nlog_every: 10\nkeep: 2\n"
    (tmp_path / "plan.yaml").write_text(plan, encoding="utf-8")
    html, words = report_of(tmp_path)
    assert plan in words
    grey = "\n".join(re.findall(r'<span class="soft">([^<]*)</span>', html[html.index("<pre>") :])).split("\n")
    assert grey == ["seed: 0", "    repeat: 1", "    augment: {flip: 0.0}", "    clip: 1.0", "    compile: false", "log_every: 10"]
