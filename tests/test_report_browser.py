"""The report in a real browser: it fits a wide screen and a phone, light and dark, and asks for nothing but itself."""

from __future__ import annotations

import json
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
from test_report import quickstart_events, write_quickstart_run

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

# Text of charts that leaves the window, or lies over other text of the same chart: at most one pixel of either is rounding.
MISPLACED = """
const found = [];
for (const svg of document.querySelectorAll('.chart > svg')) {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width > 0);
  boxes.forEach(([text, box], k) => {
    if (box.left < -1 || box.right > window.innerWidth + 1) found.push(text + ' leaves the window');
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
return found;
"""


class Browser:
    """A headless chromium, spoken to over the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": ARGUMENTS}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}}
        self.root = f"/session/{self.ask('POST', '/session', {'capabilities': wanted})['sessionId']}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def command(self, name: str, **parameters: object) -> None:
        self.ask("POST", f"{self.root}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str) -> Any:
        return self.ask("POST", f"{self.root}/execute/sync", {"script": script, "args": []})

    def open(self, page: Path, width: int, dark: bool) -> list[str]:
        """Open a file, and return the address of every request that this made."""
        self.ask("POST", f"{self.root}/se/log", {"type": "performance"})
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("POST", f"{self.root}/url", {"url": page.as_uri()})
        messages = [json.loads(entry["message"])["message"] for entry in self.ask("POST", f"{self.root}/se/log", {"type": "performance"})]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


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
            lines.append({**line, "data_wait": 0.5, "losses": losses, "drawn": drawn})
        change = {"since_base": -0.12345, "since_base_error": 0.00012, "since_start": 0.12345, "since_start_error": 0.00012}
        sources = {name: {"loss": 10.0 ** (k % 6 - 4), "rows": 256, "by_timestep": [1e-4, 1.0], **change} for k, name in enumerate(names)}
        lines.append({"event": "eval", "stage": stage, "step": steps, "kind": "end", "weights": "ema", "sources": sources})
        lines.append({"event": "eval", "stage": stage, "step": steps, "kind": "end", "weights": "raw", "sources": sources})
        lines.append({"event": "handoff", "from": stage, "to": stage + "x", "kept": names, "exact": False, "cause": "c" * 300, "changes": {"train": [names, None]}})
        lines.append({"event": "accuracy", "stage": stage, "source": names[0], "accuracy": 0.5, "samples": 100_000, "judge_on_real": 1.0})
        lines.append({"event": "warning", "stage": stage, "step": 7, "message": "w" * 500})
        lines.append({"event": "preview", "stage": stage, "step": 7, "file": "p" * 200})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps({**line, "time": 1.785e9 + k}) for k, line in enumerate(lines)), encoding="utf-8")
    (folder / "plan.yaml").write_text("# " + "long " * 300, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    half = len(list(quickstart_events())) // 2
    runs = {
        "finished": write_quickstart_run(folder / "finished"),
        "half": write_quickstart_run(folder / "half", half),
        "crowded": write_crowded_run(folder / "crowded"),
    }
    (folder / "empty").mkdir()
    return {name: write_report(run) for name, run in (runs | {"empty": folder / "empty"}).items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 400, 340])
@pytest.mark.parametrize("name", ["finished", "half", "crowded", "empty"])
def test_report_fits_the_window_and_requests_nothing_but_itself(browser: Browser, reports: dict[str, Path], name: str, width: int, dark: bool) -> None:
    requests = browser.open(reports[name], width, dark)
    assert reports[name].as_uri() in requests
    assert [url for url in requests if url != reports[name].as_uri() and not url.startswith("data:")] == []
    assert browser.run("return window.innerWidth") == width
    assert browser.run("document.querySelectorAll('details').forEach(d => d.open = true); return document.documentElement.scrollWidth") <= width
    assert browser.run(MISPLACED) == []
    light, ground = 0.0, browser.run("return getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in ground.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert (light < 60) is dark


def test_first_table_of_the_quickstart_is_in_sight_without_scrolling_sideways(browser: Browser, reports: dict[str, Path]) -> None:
    for width in (1280, 900, 400):
        browser.open(reports["finished"], width, dark=False)
        assert browser.run("const w = document.querySelector('#loss .wide'); return w.scrollWidth - w.clientWidth") <= 0, width
