"""Every notebook runs from top to bottom, on shortened plans (`make rehearse`); and a run that a notebook interrupts is saved, and goes on to the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

import train
from runs import adapter_bytes, events, make_world, plan_of, write_plan

ROOT = Path(__file__).parent.parent
SHORT = [
    "stages.foundation.steps=6",
    "stages.foundation.lr.warmup=2",
    "stages.expose.lr.warmup=2",
    "stages.refine.lr.warmup=1",
    "stages.expose.steps=4",
    "stages.refine.steps=4",
    "evaluate.rows=8",
    "evaluate.accuracy.samples=8",
    "previews.rows=1",
    "previews.steps=4",
    "workers=0",
    "track=none",
]


def executed(name: str, changes: dict[str, str]) -> list[dict[str, Any]]:
    """Run a notebook with some of its text changed; what its cells showed, in order. changes: text, which must be there, to what stands in its place."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for before, after in changes.items():
        (cell,) = [cell for cell in code if before in cell.source]
        cell.source = cell.source.replace(before, after)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    return [output for cell in code for output in cell.outputs]


def shown(outputs: list[dict[str, Any]], kind: str) -> list[str]:
    """What cells gave back as a kind, such as text/html; what was printed on the way, which rich shows as HTML too, is left out."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {}) and not output["data"][kind].startswith("<pre")]


@pytest.mark.launch
@pytest.mark.slow
def test_quickstart_shows_the_plan_what_will_happen_the_table_and_the_sheet(tmp_path: Path) -> None:
    outputs = executed("quickstart.ipynb", {"SETTINGS: list[str] = []": f"SETTINGS = {SHORT!r}", 'Path("runs/notebook")': f"Path({str(tmp_path / 'run')!r})"})
    plan, explained, outcome = shown(outputs, "text/html")
    assert "data/digits/edit.jsonl" in plan
    assert "6, each of 32 images" in explained
    assert outcome.count("<tr>") == 1 + 3 * 5  # three stages, five sources
    assert "Done: " in outcome
    assert shown(outputs, "image/png")
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.launch
@pytest.mark.slow
def test_look_at_a_mix_draws_the_order_and_the_rows() -> None:
    outputs = executed("look_at_a_mix.ipynb", {})
    assert len(shown(outputs, "image/png")) == 3
    assert any("'prompt'" in text for text in shown(outputs, "text/plain"))


@pytest.mark.launch
@pytest.mark.slow
def test_your_images_checks_explains_and_rehearses_a_folder(tmp_path: Path) -> None:
    changes = {'Path("data/mine")': f"Path({str(tmp_path / 'mine')!r})", 'Path("runs/mine-rehearsal")': f"Path({str(tmp_path / 'rehearsal')!r})", 'Path("runs/mine.yaml")': f"Path({str(tmp_path / 'mine.yaml')!r})"}
    outputs = executed("your_images.ipynb", changes)
    plan, explained = shown(outputs, "text/html")
    assert "1,000" in plan
    assert "epochs" in explained
    assert len(list((tmp_path / "mine").glob("*.jpg"))) == 20
    assert list((tmp_path / "rehearsal").rglob("report.html"))


@pytest.mark.launch
@pytest.mark.slow
def test_compare_runs_says_the_difference_of_each_source(tmp_path: Path) -> None:
    short = [setting for setting in SHORT if "accuracy" not in setting]
    outputs = executed("compare_runs.ipynb", {'Path("runs/compared")': f"Path({str(tmp_path)!r})", '"stages.foundation.steps=200", "stages.expose.steps=40", "stages.refine.steps=60"': repr(short)[1:-1]})
    *_, compared = shown(outputs, "text/html")
    for source in ("text_to_image", "subject", "control", "edit", "other"):
        assert source in compared


@pytest.mark.launch
def test_run_interrupted_in_a_notebook_is_saved_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    make_world(tmp_path)
    stage = {"name": "only", "steps": 60, "resolution": 8, "batch": {"images": 4, "micro": 4}, "lr": 0.01, "precision": "fp32"}
    plan = write_plan(tmp_path / "plan.yaml", plan_of(tmp_path, stages=[stage], previews={"rows": 0}, save_every=1000, log_every=1))
    manager, client = start_new_kernel()
    try:
        begin = f"import os\nos.chdir({str(ROOT)!r})\nfrom pathlib import Path\nimport train\noutcome = train.run({str(plan)!r}, out=Path({str(tmp_path / 'run')!r}))\nprint(outcome.stopped, outcome.exit_code)\noutcome"
        client.execute(begin)
        _wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(events(tmp_path / "run", "step")) >= 3)
        manager.interrupt_kernel()
        said = _said(client)
        assert "True 130" in said
        assert "the same call goes on" in said
        assert 3 <= events(tmp_path / "run", "save")[-1]["step"] < 60
        assert (tmp_path / "run" / "report.html").exists()
        client.execute(begin)
        assert "False 0" in _said(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    train.run(plan, out=tmp_path / "straight")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "straight")


def _wait_for(condition: Any) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "nothing was trained in two minutes"
        time.sleep(0.05)


def _said(client: Any) -> str:
    """Everything that a cell prints and shows until it is done."""
    said = ""
    while True:
        try:
            message = client.get_iopub_msg(timeout=120)
        except Empty:
            raise AssertionError(f"the cell does not end; so far: {said}") from None
        content = message["content"]
        said += content.get("text", "") + str(content.get("data", "")) + "\n".join(content.get("traceback", ()))
        if message["msg_type"] == "status" and content["execution_state"] == "idle" and message["parent_header"].get("msg_type") == "execute_request":
            return said
