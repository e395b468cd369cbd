"""The table of docs/reliability.md: what a script found takes the place of what it found before, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from faults import document
from faults.__main__ import SCRIPTS
from faults.table import Done, Fault

SAID = Done((Fault("kill -9 while one | two", 1200, 1199, ("the report differs",)), Fault("a signal", 3, 3)), True, "2026-11-30", 150.0)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the document, and an empty folder of results."""
    page = tmp_path / "reliability.md"
    page.write_text(document.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(document, "DOCUMENT", page)
    monkeypatch.setattr(document, "FOLDER", tmp_path)
    return page


def test_with_nothing_run_since_the_table_stays_but_for_its_machine(page: Path) -> None:
    before = page.read_text().splitlines()
    assert document.write(SCRIPTS) == 0
    assert [line for line in page.read_text().splitlines() if "faults --whole`, on" not in line] == [line for line in before if "faults --whole`, on" not in line]


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_what_a_script_found_takes_the_place_of_what_it_found_before(page: Path, name: str) -> None:
    before = document.sections(page.read_text())
    (page.parent / f"{name}.json").write_text(json.dumps(asdict(SAID)))
    assert document.write(SCRIPTS) == 0
    after = document.sections(page.read_text())
    assert list(after) == list(before) == list(SCRIPTS)
    assert after[name].rows == (f"| **{SCRIPTS[name]}** (`{name}`, 2026-11-30, 2 min) | | | |", "| kill -9 while one | two | 1,200 | 1,199 | 1 |", "| a signal | 3 | 3 | 0 |")
    assert after[name].lost == ("- kill -9 while one | two: the report differs",)
    assert {other: each for other, each in after.items() if other != name} == {other: each for other, each in before.items() if other != name}
    totals = [int(number.replace(",", "")) for each in after.values() for row in each.rows[1:] for number in row.strip(" |").split(" | ")[-3:]]
    assert f"| **all of them** | **{sum(totals[::3]):,}** | **{sum(totals[1::3]):,}** | **{sum(totals[2::3]):,}** |" in page.read_text()


def test_a_short_form_takes_the_place_of_no_whole_run(page: Path) -> None:
    before = document.sections(page.read_text())
    (page.parent / "soak.json").write_text(json.dumps({**asdict(SAID), "whole": False}))
    assert document.write(SCRIPTS) == 0
    assert document.sections(page.read_text()) == before
