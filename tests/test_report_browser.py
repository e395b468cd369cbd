"""The report in a real browser: it fits a wide screen, a phone and a sheet of paper, light and dark, and asks for nothing but itself."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from report_runs import quickstart_events, without_tiles, write_quickstart_run
from stages.report import write_report

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"),
]

# What does not fit: a page that scrolls sideways; text of charts that leaves its chart, the window, or lies over other text of the same chart (at most one pixel of
# either is rounding); what sticks out of the page without lying in something that scrolls by itself; a picture that is not there.
MISPLACED = """
const found = [];
const root = document.documentElement;
if (root.scrollWidth > root.clientWidth) found.push('the page scrolls sideways by ' + (root.scrollWidth - root.clientWidth));
for (const svg of document.querySelectorAll('.chart > svg')) {
  const chart = svg.parentElement.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width > 0);
  boxes.forEach(([text, box], k) => {
    if (box.left < chart.left - 1 || box.right > chart.right + 1 || box.top < chart.top - 1 || box.bottom > chart.bottom + 1) found.push(text + ' leaves its chart');
    for (const [other, near] of boxes.slice(k + 1)) {
      const across = Math.min(box.right, near.right) - Math.max(box.left, near.left);
      const down = Math.min(box.bottom, near.bottom) - Math.max(box.top, near.top);
      if (across > 1 && down > 4) found.push(text + ' lies over ' + other + ' in ' + svg.querySelector('title').textContent);
    }
  });
}
for (const part of document.querySelectorAll('.cell > *')) {
  if (part.scrollWidth > part.clientWidth + 1) found.push(part.textContent + ' is wider than its place in the first table');
}
for (const part of document.querySelectorAll('main *')) {
  if (part.closest('.hidden') || part.closest('svg') || part.parentElement.closest(SCROLLS)) continue;
  const box = part.getBoundingClientRect();
  if (box.width && (box.right > root.clientWidth + 1 || box.left < -1)) found.push(part.tagName + ' ' + part.className + ' sticks out: ' + part.textContent.slice(0, 60));
}
for (const image of document.images) if (!image.complete || !image.naturalWidth) found.push(image.alt + ' is not there');
return found;
"""
ON_SCREEN = MISPLACED.replace("SCROLLS", "'.wide, pre, .mix, .legend'")
ON_PAPER = MISPLACED.replace("SCROLLS", "'.mix, .legend'")  # nothing scrolls there
FOLDED_AWAY = "return [...document.querySelectorAll('details > :not(summary)')].filter(part => !part.checkVisibility({contentVisibilityAuto: true})).length"


class Browser:
    """A headless chromium, spoken to over the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": ARGUMENTS}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}}
        self.root = f"/session/{self.ask('POST', '/session', {'capabilities': wanted})['sessionId']}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def command(self, name: str, **parameters: object) -> Any:
        return self.ask("POST", f"{self.root}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str) -> Any:
        return self.ask("POST", f"{self.root}/execute/sync", {"script": script, "args": []})

    def open(self, page: Path, width: int, *, dark: bool = False, media: str = "") -> tuple[list[str], list[str]]:
        """Open a file, and return the address of every request that this made, and what the console said. media: `print`, or else a screen."""
        for kind in ("performance", "browser"):
            self.ask("POST", f"{self.root}/se/log", {"type": kind})
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.command("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("POST", f"{self.root}/url", {"url": page.as_uri()})
        messages = [json.loads(entry["message"])["message"] for entry in self.ask("POST", f"{self.root}/se/log", {"type": "performance"})]
        said = [entry["message"] for entry in self.ask("POST", f"{self.root}/se/log", {"type": "browser"})]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"], said


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        opened = Browser(port)
        yield opened
        opened.ask("DELETE", opened.root)
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def write_crowded_run(folder: Path) -> Path:
    """Twelve stages, one of them very short, twenty sources with the longest names, and losses over six orders of magnitude."""
    folder.mkdir()
    names = [f"a-source-with-a-name-of-the-greatest-length-that-a-plan-allows-{k:02}" for k in range(20)]
    lines: list[dict[str, object]] = [{"event": "run", "name": "x" * 64, "model": "an-organisation/" + "model-" * 20, "processes": 64, "device": "gpu"}]
    for stage in (f"{'stage' * 11}-{k:02}" for k in range(12)):
        steps = 2 if stage.endswith("05") else 123_456
        shares = {name: 1 / 20 for name in names}
        lines.append({"event": "stage", "state": "start", "stage": stage, "steps": steps, "images": 1024, "resolution": 2048, "mix": shares})
        for step in range(1, 21):
            losses = {name: 10.0 ** (k % 6 - 4) for k, name in enumerate(names)}
            drawn = dict.fromkeys(names, 6_320_947.0)
            line = {"event": "step", "stage": stage, "step": steps * step // 20, "loss": 123.456, "lr": 4e-6, "grad_norm": 12345.6, "images_per_second": 98765.4}
            lines.append({**line, "data_wait": 0.5, "memory_bytes": 1.5e11, "losses": losses, "drawn": drawn})
        change = {"since_base": -0.12345, "since_base_error": 0.00012, "since_start": 0.12345, "since_start_error": 0.00012}
        sources = {name: {"loss": 10.0 ** (k % 6 - 4), "rows": 256, "by_timestep": [1e-4, 1.0], **change} for k, name in enumerate(names)}
        lines.append({"event": "eval", "stage": stage, "step": steps, "kind": "end", "weights": "ema", "sources": sources})
        lines.append({"event": "eval", "stage": stage, "step": steps, "kind": "end", "weights": "raw", "sources": sources})
        lines.append({"event": "handoff", "from": stage, "to": stage + "x", "kept": names, "exact": False, "cause": "c" * 300, "changes": {"train": [names, None]}})
        lines.append({"event": "accuracy", "stage": stage, "source": names[0], "accuracy": 0.5, "samples": 100_000, "judge_on_real": 1.0})
        lines.append({"event": "warning", "stage": stage, "step": 7, "message": "w" * 500})
        rows = [{"source": name, "row": 1, "prompt": "c" * 400, "references": ["t.png"] * 3, "target": "t.png", "output": "t.png", "base": "t.png"} for name in names]
        lines.append({"event": "preview", "stage": stage, "step": 7, "file": "p" * 200, "rows": rows})
        score = {"mean": 0.123, "error": 0.001, "rows": 64, "ceiling": 0.3, "floor": 0.1, "since_base": 0.1, "since_base_error": 0.01, "since_last": -0.1, "since_last_error": 0.01}
        lines.append({"event": "quality", "stage": stage, "step": 7, "sources": {name: {"clip_score": score, "m" * 64: score} for name in names}})
        lines.append({"event": "memory", "stage": stage, "step": 7, "kind": "dry_step", "images": 64, "tokens": 123_456})
        lines.append({"event": "memory", "stage": stage, "step": 7, "kind": "peak", "peak_bytes": 1.5e11, "estimated_bytes": 1.4e11, "estimated_encoder_bytes": 2e10})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps({**line, "time": 1.785e9 + k}) for k, line in enumerate(lines)), encoding="utf-8")
    (folder / "plan.yaml").write_text("# " + "long " * 300, encoding="utf-8")
    Image.new("RGB", (224, 120), "teal").save(folder / "t.png")
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    half = len(list(quickstart_events())) // 2
    runs = {
        "finished": write_quickstart_run(folder / "finished"),
        "half": write_quickstart_run(folder / "half", half),
        "sheets": without_tiles(write_quickstart_run(folder / "sheets")),
        "crowded": write_crowded_run(folder / "crowded"),
    }
    (folder / "empty").mkdir()
    return {name: write_report(run) for name, run in (runs | {"empty": folder / "empty"}).items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 360])
@pytest.mark.parametrize("name", ["finished", "half", "sheets", "crowded", "empty"])
def test_report_fits_the_window_and_requests_nothing_but_itself(browser: Browser, reports: dict[str, Path], name: str, width: int, dark: bool) -> None:
    requests, said = browser.open(reports[name], width, dark=dark)
    assert reports[name].as_uri() in requests
    assert [url for url in requests if url != reports[name].as_uri() and not url.startswith("data:")] == []
    assert said == []
    assert browser.run("return window.innerWidth") == width
    assert browser.run(ON_SCREEN) == []
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run(ON_SCREEN) == []
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in ground.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert (light < 60) is dark


@pytest.mark.parametrize("name", ["finished", "half", "sheets", "crowded"])
def test_printed_report_opens_what_is_folded_cuts_nothing_off_and_is_light(browser: Browser, reports: dict[str, Path], name: str) -> None:
    browser.open(reports[name], 694, dark=True)
    assert browser.run(FOLDED_AWAY) > 0
    browser.open(reports[name], 694, dark=True, media="print")  # pixels across an A4 page between its margins, 184 mm at 96 to the inch
    assert browser.run(FOLDED_AWAY) == 0
    assert browser.run(ON_PAPER) == []
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    links = browser.run("return [...document.querySelectorAll('main a')].filter(a => a.checkVisibility()).map(a => [getComputedStyle(a).color, getComputedStyle(a.parentElement).color])")
    assert all(own == around for own, around in links)
    page = base64.b64decode(browser.command("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])
    assert page.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", page)) >= 3
    assert set(re.findall(rb"/MediaBox\s*\[([^\]]*)\]", page)) == {b"0 0 594.95996 841.91998"}  # A4 in points


def test_who_knows_nothing_sees_at_once_what_the_run_is_and_whether_it_got_better(browser: Browser, reports: dict[str, Path]) -> None:
    for width, height in ((1280, 720), (360, 740)):
        browser.open(reports["finished"], width)
        shown = "const box = document.querySelector('%s').getBoundingClientRect(); return [box.top, box.bottom]"
        for part in ("h1", ".what", ".verdict", ".score li:nth-child(4)"):
            top, bottom = browser.run(shown % part)
            assert 0 <= top < bottom <= height, (part, width, bottom)


def test_first_table_of_the_quickstart_is_in_sight_without_scrolling_sideways(browser: Browser, reports: dict[str, Path]) -> None:
    for width in (1280, 900, 360):
        browser.open(reports["finished"], width)
        assert browser.run("const w = document.querySelector('#loss .wide'); return w.scrollWidth - w.clientWidth") <= 0, width


def test_samples_are_as_wide_as_their_stages_need_and_stand_below_their_heads(browser: Browser, reports: dict[str, Path]) -> None:
    heads = "return [...document.querySelectorAll('.tiles')].map(t => [t.querySelectorAll('thead th'), t.querySelectorAll('tbody tr:first-child > *')].map(cells => [...cells].map(c => c.getBoundingClientRect().left)))"
    for width in (1280, 360):
        browser.open(reports["finished"], width)
        grids = browser.run(heads)
        assert len(grids) == 5
        for head, row in grids:
            assert len(head) == len(row) >= 6
            assert all(abs(a - b) <= 1 for a, b in zip(head[1:], row[1:], strict=True)), (width, head, row)
