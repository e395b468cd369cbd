"""The report of a run: what it says, what it leaves out, and that it stays one quick, safe file."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from html import escape
from pathlib import Path

import pytest

from report_runs import CAPTION, ENDS, SOURCES, STAGES, Elements, quickstart_events, quickstart_ledger, report_of, write_quickstart_run
from stages.report import first_table, write_report
from stages.report.__main__ import main as report_main
from stages.report.style import STYLE


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


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.yaml", "ledger.json", "environment.json", "previews/3-refine.png", "previews/3-refine/tiles/edit-1-output.jpg"])
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


def test_report_is_written_anew_by_a_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    report_main()
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        report_main()
    assert f"{tmp_path}: no metrics.jsonl is there" in capsys.readouterr().err


def test_page_can_be_read_aloud(run: Path) -> None:
    """Headings go down by one level at most, header cells say of what, what scrolls can be reached and has a name, and every picture and chart says what it is."""
    html, _ = report_of(run)
    found = Elements(html).found
    levels = [int(tag[1]) for tag, _ in found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in found if tag == "th")
    scrolled = [attributes for _, attributes in found if "wide" in str(attributes.get("class")).split() and attributes.get("role")]
    assert len(scrolled) >= 10
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in scrolled)
    assert all(attributes["alt"] for tag, attributes in found if tag == "img")
    assert len(re.findall(r'<svg role="img"', html)) == len(re.findall(r'<svg role="img"[^>]*><title>[^<]', html))
    assert len(re.findall(r'<div class="chart"', html)) == len(re.findall(r'<div class="chart"[^>]*><svg role="img"[^>]*><title>[^<]+</title><desc>[^<]+</desc>', html))
    assert all("aria-label" in attributes for tag, attributes in found if tag == "nav")
