"""Kinds of broken and odd data are read right or refused by name, in little memory and time, each fifth of them here and all in `make faults`; and what is not so is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults import data
from faults.corpus_case import FILLERS, GOOD, Case, Row, colours, fill, put

# A process of its own: what forks here holds no threads of other tests.
_ALL = """
import json
from dataclasses import asdict
from faults.corpus import cases
from faults.data import carried_out
for done in carried_out(list(cases())[::5]):
    print(json.dumps(asdict(done)))
"""


@pytest.fixture(scope="module")
def done() -> dict[str, dict[str, Any]]:
    """What came of each kind, by its name."""
    said = subprocess.run([sys.executable, "-c", _ALL], cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False)
    assert said.returncode == 0, said.stderr
    kinds = [json.loads(line) for line in said.stdout.splitlines()]
    assert len({kind["name"] for kind in kinds}) == len(kinds)
    return {kind["name"]: kind for kind in kinds}


def test_each_fifth_kind_of_broken_or_odd_data_is_read_right_or_refused_by_name(done: dict[str, dict[str, Any]]) -> None:
    assert len(done) >= 60
    assert {name: kind["lost"] for name, kind in done.items() if kind["lost"]} == {}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("read as something else", fill, path=".", rows={"filler000.png": Row(("x",), colours(seed=5))}, fillers=FILLERS - 1, asked={"prompt": "x"}), "pixels are off by up to"),
        (Case("another caption", fill, path=".", rows={"filler000.png": Row(("y",), colours())}, fillers=FILLERS - 1, asked={"prompt": "x"}), "its prompts are ('x',)"),
        (Case("a row too many", fill, path=".", fillers=FILLERS - 1, asked={"prompt": "x"}), "100 other rows, and there should be 99"),
        (Case("not refused", fill, path=".", bad={"filler000.png": "empty"}, fillers=FILLERS - 1, asked={"prompt": "x"}), "'filler000.png' should be bad and is not"),
        (Case("not refused as a whole", fill, path=".", refused="empty", asked={"prompt": "x"}), "it should be refused with 'empty' and is opened"),
        (Case("refused", lambda folder: put(folder / "x.png", b""), path=".", asked={"prompt": "x"}), "it is refused: source 'rows' (.): 1 of 1 rows are bad"),
        (Case("not told by --check", lambda folder: put(folder / "x.png", GOOD), path=".", fillers=1, checked="no", asked={"prompt": "x"}), "--check should say 'no'"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_kind_that_is_not_as_promised_is_lost(case: Case, words: str) -> None:
    (found,) = data.carried_out([case])
    assert words in " ".join(found.lost)


def test_kind_that_ends_its_process_or_takes_too_much_is_lost_and_the_next_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    read = data._read

    def breaks(case: Case, place: Path, index: Path | None) -> list[str]:
        if case.name == "ends":
            os._exit(3)
        if case.name == "takes":
            assert np.ones(120 * 2**20, dtype=np.uint8).all()
        if case.name == "raises":
            raise ZeroDivisionError
        return read(case, place, index)

    monkeypatch.setattr(data, "_read", breaks)
    monkeypatch.setattr(data, "MEGABYTES", 100)
    kinds = [Case(name, fill, path=".", fillers=FILLERS, asked={"prompt": "x"}) for name in ("ends", "good", "takes", "raises", "also good")]
    found = list(data.carried_out(kinds))
    assert [kind.name for kind in found] == [kind.name for kind in kinds]
    lost = {kind.name: " ".join(kind.lost) for kind in found}
    assert lost["ends"] == "it ends the process"
    assert lost["takes"].startswith("it took 1") or "MemoryError" in lost["takes"]  # it is measured, or the limit on the process's addresses has come first
    assert "ZeroDivisionError" in lost["raises"]
    assert lost["good"] == lost["also good"] == ""


def test_kind_that_hangs_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(case: Case, place: Path, index: Path | None) -> list[str]:
        time.sleep(600)
        return []

    monkeypatch.setattr(data, "_read", hangs)
    monkeypatch.setattr(data, "_HUNG", 1.0)
    monkeypatch.setattr(data, "_warm_up", lambda place: None)
    (found,) = data.carried_out([Case("hangs", fill, path=".", asked={"prompt": "x"})])
    assert found.lost == ("it hangs: nothing after 1 seconds",)
