"""docs/families.md: its table and its defaults are those of stages/families/facts.py, every column has tests behind it, and the generator writes what it reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from families_table import BEGIN, CLAIMS, DOCUMENT, END, Case, Claim, TableError, applies, day_of, is_of, main, objectives_of, put_into, read_cases, table

from stages.families.facts import FAMILIES, PIPELINES, tasks_of

TESTS = Path(__file__).parent
PAGE = DOCUMENT.read_text(encoding="utf-8")

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" tests="13" timestamp="2026-11-24T10:00:00.000000+00:00" hostname="x">
<testcase classname="tests.test_flux" name="test_one_step_equals_the_pipelines_own_step[True-16-16-1]" time="0.1" />
<testcase classname="tests.test_flux" name="test_one_step_with_a_reference_equals_the_kontext_pipelines_own_step[1]" time="0.1" />
<testcase classname="tests.test_family_flux2" name="test_one_step_equals_the_pipelines_own_step[flux2 klein-32-32-1-0]" time="0.1" />
<testcase classname="tests.test_family_flux2" name="test_one_step_equals_the_pipelines_own_step[flux2 klein-32-32-1-2]" time="0.1"><failure message="no">no</failure></testcase>
<testcase classname="tests.test_family_flux2" name="test_one_step_equals_the_pipelines_own_step[flux2 klein-16-64-1-2]" time="0.1" />
<testcase classname="tests.test_family_pixart" name="test_latents_are_the_pipelines_own[sigma]" time="0.1" />
<testcase classname="tests.test_family_sana" name="test_latents_are_the_pipelines_own[sana]" time="0.1"><skipped message="no" /></testcase>
<testcase classname="tests.test_family_qwen_image" name="test_every_input_changes_the_output" time="0.1" />
<testcase classname="tests.test_family_qwen_image" name="test_edit_plus_one_step_equals_the_pipelines_own_step[two references-3]" time="0.1" />
<testcase classname="tests.test_family_runs" name="test_a_whole_run_trains[wan-WanPipeline]" time="0.1"><error message="no">no</error></testcase>
<testcase classname="tests.test_family_runs" name="test_a_whole_run_trains[flux-FluxKontextPipeline]" time="0.1" />
<testcase classname="tests.test_comfyui" name="test_wan_is_written_in_comfyuis_own_names" time="0.1" />
<testcase classname="tests.test_comfyui" name="test_every_map_names_its_source[flux2]" time="0.1" />
</testsuite></testsuites>
"""


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first table of a text by pipeline, each with its cells by the column's name."""
    heads, *rows = [[each.strip() for each in line.strip("| \n").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[1].strip("`"): dict(zip(heads, row, strict=True)) for row in rows}


def the_table() -> str:
    return PAGE[PAGE.index(BEGIN) : PAGE.index(END)]


def test_the_table_lists_every_pipeline_with_its_tasks_and_objectives() -> None:
    rows = rows_of(the_table())
    assert list(rows) == list(PIPELINES)
    for pipeline, row in rows.items():
        assert row["family"] == f"[{PIPELINES[pipeline]}](#{PIPELINES[pipeline]})"
        assert row["tasks"] == ", ".join(tasks_of(pipeline))
        assert row["objectives"] == objectives_of(pipeline)


def test_nothing_in_the_table_failed_or_was_proved_by_no_test() -> None:
    for pipeline, row in rows_of(the_table()).items():
        for claim in CLAIMS:
            number = row[claim.column].rpartition(": ")[2]
            assert number == "-" if not applies(claim, pipeline) else int(number) > 0, f"{pipeline}: {claim.column}: {row[claim.column]}; run `make families`"


@pytest.fixture(scope="module")
def functions() -> list[Case]:
    """Every test function of the files that the table is made from, without parameters."""
    found = []
    for file in sorted(TESTS.glob("test_*.py")):
        if any(re.fullmatch(claim.modules, file.stem) for claim in CLAIMS):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [Case(file.stem, node.name, "passed") for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return found


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.column)
def test_every_column_has_a_test_of_every_family_that_it_applies_to(claim: Claim, functions: list[Case]) -> None:
    of_all = claim.modules in ("test_family_runs", "test_comfyui")  # their tests name the family by a parameter alone
    for family, facts in FAMILIES.items():
        pipelines = [pipeline for pipeline in facts.pipelines if applies(claim, pipeline)]
        backing = [case for case in functions if re.fullmatch(claim.modules, case.module) and re.search(claim.words, case.name)]
        if claim.column == "step, references" and family == "flux2":
            continue  # by the last parameter: 0, 1 or 2 references
        assert not pipelines or any(of_all or is_of(case, claim, pipeline) for case in backing for pipeline in facts.pipelines), f"{family}: {claim.column}"


def test_what_is_written_is_what_pytest_reported(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    cases = read_cases(tmp_path / "junit.xml")
    text = table(cases, day_of(tmp_path / "junit.xml"), {"torch": "2.13.0", "peft": "0.21.2"})
    found = {pipeline: [row[claim.column] for claim in CLAIMS] for pipeline, row in rows_of(text).items()}
    assert found == {
        "FluxPipeline": ["1", "-", "0", "0", "0", "0", "0", "0", "0", "as published: 0"],
        "FluxKontextPipeline": ["-", "1", "0", "0", "0", "0", "0", "1", "0", "as published: 0"],
        "OmniGenPipeline": ["0", "0", "0", "0", "0", "-", "-", "0", "0", "none: 0"],
        "PixArtAlphaPipeline": ["0", "-", "0", "0", "0", "-", "-", "0", "0", "as published: 0"],
        "PixArtSigmaPipeline": ["0", "-", "1", "0", "0", "-", "-", "0", "0", "as published: 0"],
        "StableDiffusion3Pipeline": ["0", "-", "0", "0", "0", "-", "-", "0", "0", "as published: 0"],
        "Flux2Pipeline": ["0", "0", "0", "0", "0", "-", "-", "0", "0", "as published, some layers converted: 1"],
        "Flux2KleinPipeline": ["1", "FAILED (1 of 2)", "0", "0", "0", "-", "-", "0", "0", "as published, some layers converted: 1"],
        "Lumina2Pipeline": ["0", "-", "0", "0", "0", "-", "-", "0", "0", "converted: 0"],
        "SanaPipeline": ["0", "-", "0", "0", "0", "-", "-", "0", "0", "none: 0"],
        "QwenImagePipeline": ["0", "-", "0", "1", "0", "-", "0", "0", "0", "as published: 0"],
        "QwenImageEditPipeline": ["-", "0", "0", "1", "0", "-", "0", "0", "0", "as published: 0"],
        "QwenImageEditPlusPipeline": ["-", "1", "0", "1", "0", "-", "0", "0", "0", "as published: 0"],
        "ZImagePipeline": ["0", "-", "0", "0", "0", "-", "-", "0", "0", "as published, some layers converted: 0"],
        "WanPipeline": ["0", "-", "0", "0", "0", "-", "-", "FAILED (1 of 1)", "0", "converted: 1"],
    }
    assert text.splitlines()[0] == "| family | pipeline | tasks | objectives | step | step, references | latents | every input | published adapter | pyramid | regions | whole run | every weight | ComfyUI |"
    assert text.splitlines()[-1] == "10 of 13 tests passed on 2026-11-24 (torch 2.13.0, peft 0.21.2)."
    assert "| [z_image](#z_image) | `ZImagePipeline` | text_to_image | flow | 0 | - | 0 | 0 | 0 | - | - | 0 | 0 | as published, some layers converted: 0 |" in text


def test_the_table_stands_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "families.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nbehind\n")
    put_into(page, "new")
    put_into(page, "newer")
    assert page.read_text() == f"before\n\n{BEGIN}\nnewer\n{END}\n\nbehind\n"
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(TableError, match="are not there once each and in order"):
        put_into(page, "new")


def test_a_file_without_tests_is_refused_and_the_page_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "junit.xml")]) == 2
    (tmp_path / "junit.xml").write_text('<testsuites><testsuite timestamp="2026-11-24" /></testsuites>')
    assert main([str(tmp_path / "junit.xml")]) == 2
    said = capsys.readouterr().err
    assert "there is no such file" in said
    assert "holds no test" in said
    assert DOCUMENT.read_text(encoding="utf-8") == PAGE


# --- the prose -------------------------------------------------------------------------------------------------------------------------


def section(family: str) -> str:
    return PAGE.split(f"\n## {family}\n")[1].split("\n## ")[0]


def test_every_family_has_a_section_that_says_the_same_things() -> None:
    parts = ("- *targets.*", "*Prompts.*", "*Precision.*", "*Traps.*", "*ComfyUI*", "*Not covered.*")
    for family, facts in FAMILIES.items():
        assert {part: part in section(family) for part in parts} == dict.fromkeys(parts, True), family
        for reason in (facts.fp16, facts.fp16_risk):
            assert reason in section(family), f"{family}: what --check says of fp16 does not stand in its section"


def test_the_defaults_are_those_of_the_facts() -> None:
    lines = PAGE.split("\n## In one table\n")[1].split("\n## ")[0].splitlines()
    heads, _, *rows = [[each.strip() for each in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    written = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert list(written) == list(FAMILIES)
    for family, facts in FAMILIES.items():
        row = written[family]
        assert float(row["sampled with"]) == facts.guidance
        assert row["fp16"] == ("refused" if facts.fp16 else "warned" if facts.fp16_risk else "allowed")
        assert (row["told in training"] != "nothing") == facts.guidance_is_told
        own = "none" if facts.objective == "epsilon" else "sampler's, with two experts at most 5" if facts.experts else "sampler's"
        assert row["shift"] == ("by tokens" if facts.training_shift == "by_tokens" else own if facts.training_shift is None else f"{facts.training_shift:g}")
