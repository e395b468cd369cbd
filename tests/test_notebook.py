"""The notebook runs from top to bottom, on a shortened plan."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


@pytest.mark.launch
def test_notebook_runs_and_shows_the_table_and_the_sheet(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if cell.cell_type == "code" and "SETTINGS: list[str] = []" in cell.source]
    parameters.source = parameters.source.replace("SETTINGS: list[str] = []", f"SETTINGS = {SHORT!r}").replace('Path("runs/notebook")', f"Path({str(tmp_path / 'run')!r})")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    tables = [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert any("text_to_image" in table and "refine" in table for table in tables)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
