"""The live view: it fits into any terminal, leaves it as it was, and is plain lines where there is none."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

import train
from runs import carry_out, events, make_world, plan_of, write_plan
from stages.live import View, plain_line
from stages.plan import Plan
from stages.time_left import Pace, duration, rounded, run_seconds, stage_seconds

LONG = "a_rather_long_name_of_a_source_that_somebody_gave"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_with(sources: int = 2, **evaluate: int) -> Plan:
    stage = {"resolution": 256, "batch": 64, "lr": 1e-3}
    stages = [{**stage, "name": "expose", "steps": 2000}, {**stage, "name": "refine-" + "x" * 50, "steps": 1000}, {**stage, "name": "polish", "steps": 200, "resolution": 512, "batch": 32}]
    return Plan.model_validate({"name": "p", "model": "m", "sources": {f"{LONG}{number}": {"path": "x"} for number in range(sources)}, "stages": stages, "evaluate": evaluate})


def line_of(plan: Plan, step: int, **changes: Any) -> dict[str, Any]:
    record = {"step": step, "loss": 12345.678, "lr": 1.25e-4, "images_per_second": 1234.5, "data_wait": 1.0, "memory_bytes": 140 * 2**30, "skipped": 12345, "step_size": 1.5e-3}
    return {**record, "drawn": dict.fromkeys(plan.sources, 10**9), "losses": dict.fromkeys(plan.sources, 12345.678), **changes}


def drawn(plan: Plan, width: int, height: int, *, encoding: str = "utf-8", words: str = "") -> list[str]:
    """The lines of a view, as a terminal of this size shows them."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, height=height, file=out, force_terminal=True)
    view = View(console, plan)
    view.begin(1, 0, 16)
    view.measured({name: {"loss": 123.456, "since_base": -1.0, "since_base_error": 0.1} for name in plan.sources})
    for step in range(1, 413):
        view.stepped()
        view.line(line_of(plan, step), Pace(1, 1000.0, 31.0), dict.fromkeys(plan.sources, 1.0))
    if words:
        view.now(words)
    view.close()
    shown = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    lines = ["".join(segment.text for segment in line) for line in shown.render_lines(view, pad=False)] if encoding == "utf-8" else []
    if encoding != "utf-8":
        out.flush()
        out.buffer.seek(0)
        lines = out.buffer.read().decode("ascii").splitlines()
    return lines


@pytest.mark.parametrize("width", [40, 80, 96, 140, 200])
@pytest.mark.parametrize("sources", [1, 5, 20, 64])
@pytest.mark.parametrize("height", [16, 24, 50])
def test_the_view_fits_into_the_terminal(width: int, sources: int, height: int) -> None:
    lines = drawn(plan_with(sources), width, height)
    assert len(lines) <= max(height - 3, 12)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "412/1,000" in text
    named = len(re.findall("a_rather_long_name", text))
    left_out = re.search(r"and (\d+) more", text)
    assert named + (int(left_out[1]) if left_out else 0) == sources


def test_the_view_says_what_goes_on() -> None:
    text = "\n".join(drawn(plan_with(2), 100, 30))
    for words in ("stage 2/3", "in this stage, about", "loss   12345.6780", "learning rate 1.25e-04", "1,234 images/s", "data wait 100.0%", "memory 140 GiB", "▼ 123.4560", "100.0%   50.0%"):
        assert words in text
    assert "left  " in text
    busy = "\n".join(drawn(plan_with(2), 100, 30, words="measuring held-out rows"))
    assert "now    measuring held-out rows …" in busy
    assert "left  " not in busy


def test_a_terminal_without_unicode_is_written_plain_characters() -> None:
    assert any("-----" in line for line in drawn(plan_with(2), 80, 24, encoding="ascii"))


@pytest.mark.parametrize("changes", [{}, {"loss": 0.1234, "images_per_second": 1.234, "skipped": 0}])
def test_the_line_has_at_most_120_characters(changes: dict[str, Any]) -> None:
    plan = plan_with()
    line = Text.from_markup(plain_line(plan, line_of(plan, 1000, **changes), Pace(1, 86400.0, 500.0), 16)).plain
    assert len(line) <= 120, line


def test_time_left_counts_pixels_and_evaluations() -> None:
    plan = plan_with(every=100)
    pace = Pace(1, 2.0, 10.0)
    # 750 steps; evaluations after 300, ..., 900 inside the stage, and one at its end.
    assert stage_seconds(plan, pace, 250) == 750 * 2.0 + 8 * 10.0
    # Steps of half the images with four times the pixels take twice as long; four times as long an evaluation: at the start, after 100 steps, at the end.
    assert run_seconds(plan, pace, 250, 16) == pytest.approx(750 * 2.0 + 8 * 10.0 + 200 * 4.0 + 3 * 40.0)
    given = plan.model_dump(mode="json")
    given["stages"][2]["batch"] = {"tokens": 64 * 256}
    tokens = Plan.model_validate(given)
    assert run_seconds(tokens, Pace(1, 2.0, None), 1000, 16) == pytest.approx(200 * 2.0)  # as many tokens as 64 images of 256 pixels have


@pytest.mark.parametrize(("seconds", "exact", "about"), [(0.4, "0 s", "a minute"), (192, "3 min 12 s", "3 min"), (1622, "27 min", "27 min"), (7500, "2 h 05", "2.1 h"), (270_000, "3 d 3 h", "3.1 days")])
def test_time_in_words(seconds: float, exact: str, about: str) -> None:
    assert (duration(seconds), rounded(seconds)) == (exact, about)


def in_terminal(arguments: list[str], *, columns: int, interrupt_after: bytes | None = None) -> tuple[int, bytes]:
    """Exit code and output of a run in a terminal of its own. interrupt_after: what it has written when Ctrl-C is typed."""
    child, terminal = pty.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put its own in their place
            os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), LINES="24")
            code = train.main(arguments)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:  # noqa: BLE001  a forked child of pytest must never go back into it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    written, typed = b"", False
    while True:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                written += os.read(terminal, 65536)
            except OSError:  # the terminal's other end is closed
                break
        if interrupt_after and not typed and interrupt_after in written:
            os.write(terminal, b"\x03")
            typed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written


@pytest.mark.launch
def test_ctrl_c_saves_and_leaves_the_terminal_as_it_was(world: Path, tmp_path: Path) -> None:
    stage = {"name": "long", "steps": 100_000, "resolution": 8, "batch": 4, "lr": 0.001}
    file = write_plan(tmp_path / "plan.yaml", plan_of(world, stages=[stage], workers=1, log_every=1, save_every=100_000))
    code, written = in_terminal([str(file), "--out", str(tmp_path / "run")], columns=80, interrupt_after=b"images/s")
    assert code == 130, written.decode()
    text = written.decode()
    assert "source" in text
    assert "stage 1/1 long" in text
    assert "stopped by SIGINT" in text
    assert text[text.rindex("images/s") :].count("\x1b[2K") >= 8  # every line of the view is erased
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is visible
    assert text.count("\x1b[?25l") == 1
    assert text.find("\x1b[?25h") < text.find("images/s")  # and was all the time, so that it is after a kill -9 too
    assert events(tmp_path / "run", "save")


@pytest.mark.launch
def test_a_file_has_plain_lines(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some build servers set it
    stage = {"name": "one", "steps": 3, "resolution": 8, "batch": 4, "lr": 0.001}
    said = carry_out(tmp_path / "run", plan_of(world, stages=[stage], log_every=1))
    assert "\r" not in said
    assert not re.search(r"\x1b\[[0-9;?]*[A-HJKSTfhlsu]", said)  # no cursor is moved, no line erased
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in said.splitlines() if "images/s" in line]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]


def test_drawing_takes_little(world: Path) -> None:
    """At most a hundredth of the loop's time: two and a half drawings a second, of 4 ms each."""
    plan = plan_with(20)
    console = Console(width=140, height=40, file=io.StringIO(), force_terminal=True)
    view = View(console, plan)
    view.begin(1, 0, 16)
    view.line(line_of(plan, 1), Pace(1, 2.0, 10.0), dict.fromkeys(plan.sources, 0.05))
    times = []
    for _ in range(20):
        began = time.thread_time()
        view.draw()
        times.append(time.thread_time() - began)
    view.close()
    assert min(times) < 0.004, min(times)
