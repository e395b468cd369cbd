"""What pip-audit says is judged by what it was told: a hole fails, silence is not taken for safety."""

from __future__ import annotations

import json

import pytest
from audit import judged

SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
HOLE = {"name": "pillow", "version": "9.0.0", "vulns": [{"id": "CVE-2022-22817", "fix_versions": ["9.0.1"], "aliases": [], "description": "x"}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


def said(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_known_hole_fails_even_where_of_others_nothing_is_known() -> None:
    assert judged(said(SOUND, UNKNOWN, HOLE)) == (1, ["pillow 9.0.0: CVE-2022-22817, mended in 9.0.1"])


def test_packages_that_nothing_is_known_of_are_named_and_not_called_sound() -> None:
    code, (line,) = judged(said(SOUND, UNKNOWN))
    assert code == 0
    assert line.startswith("of 1 of 2 packages nothing is known")
    assert line.endswith(": torch")
    assert judged(said(SOUND)) == (0, ["1 packages, no hole is known"])


@pytest.mark.parametrize("text", ["", "[]", '{"dependencies": [1]}', "No known vulnerabilities found"])
def test_what_is_no_answer_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"not what pip-audit writes|Expecting value"):
        judged(text)
