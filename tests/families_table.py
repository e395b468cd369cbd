"""The table of docs/families.md: family, pipeline, tasks, objectives, and how many tests proved what of each, out of what pytest wrote.

    python -m pytest FILES --junitxml=runs/families.xml; python tests/families_table.py runs/families.xml

Ends with 1 if a test of the table failed, which then stands there, and with 2 if there is nothing to read or to write to.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)  # for a script the path begins with its own folder

from stages.families.facts import FAMILIES, PIPELINES, tasks_of  # noqa: E402

DOCUMENT = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table: written by `make families` -->", "<!-- end of the table -->"
LIBRARIES = ("torch", "diffusers", "peft", "transformers", "accelerate")


@dataclass(frozen=True)
class Case:
    """One test as pytest reports it."""

    module: str
    """File without folder and ending."""
    name: str
    """With its parameters: `test_x[a-b]`."""
    outcome: str
    """passed, failed or skipped."""


@dataclass(frozen=True)
class Claim:
    """A column of the table: what tests with certain names prove."""

    column: str
    modules: str
    """Pattern that the test's module matches whole."""
    words: str
    """Pattern that is found in the test's name."""
    of_first: bool = False
    """Whether a test that names no pipeline is of the family's first alone. Else it is of all of them, for they share the family's file."""


_FAMILY_FILES = r"test_(flux|family_(?!runs)\w+)"
_STEP = r"one_step(_with_a_reference)?_equals_the_(kontext_)?pipelines_own_step"
# Tests that give references: by name, all of Qwen-Image-Edit's, and those of flux2 by their last parameter, the number of references.
_REFERENCES = r"with_a_reference|with_references|names_no_references|test_edit_(plus_)?one_step|\[flux2 \w+-\d+-\d+-\d+-[1-9]\]"
CLAIMS = (
    Claim("step", _FAMILY_FILES, rf"^(?!.*({_REFERENCES})).*{_STEP}", of_first=True),
    Claim("step, references", _FAMILY_FILES, rf"^(?=.*({_REFERENCES})).*{_STEP}", of_first=True),
    Claim("latents", _FAMILY_FILES, r"latents_are_the_pipelines_own"),
    Claim("every input", _FAMILY_FILES, r"every_input_changes_the_output"),
    Claim("published adapter", _FAMILY_FILES + "|test_peft_layout", r"published_adapter_loads_in_the_stock_pipeline|peft_loads_the_folder"),
    Claim("pyramid", r"test_pyramid", r""),
    Claim("regions", _FAMILY_FILES + "|test_regions|test_region_pipeline", r"region|mask|entit"),
    Claim("whole run", r"test_family_runs", r"a_whole_run"),
    Claim("every weight", r"test_family_runs", r"every_weight_that_is_read_has_a_gradient"),
    Claim("ComfyUI", r"test_comfyui", r""),
)
"""In the order of the columns."""

NOT_APPLICABLE: Mapping[str, Sequence[str]] = {
    # These two take no references; what Medley shows them with references is compared with the steps of Kontext and of Edit, whose transformers are the same.
    "FluxPipeline": ("step, references",),
    "QwenImagePipeline": ("step, references",),
    # These are not run without.
    "FluxKontextPipeline": ("step",),
    "QwenImageEditPipeline": ("step",),
    "QwenImageEditPlusPipeline": ("step",),
}
"""Columns that a pipeline has no place in, besides those that follow from its facts."""

_NAMED: Mapping[str, str] = {
    "FluxKontextPipeline": r"kontext_pipeline",
    "Flux2Pipeline": r"flux2 dev",
    "Flux2KleinPipeline": r"flux2 klein",
    "PixArtAlphaPipeline": r"\[alpha[-\]]",
    "PixArtSigmaPipeline": r"\[sigma[-\]]",
    "QwenImageEditPipeline": r"test_edit_one_step",
    "QwenImageEditPlusPipeline": r"test_edit_plus_one_step",
}
"""How tests name a pipeline otherwise than by its class."""


class TableError(ValueError):
    """There is no table to be made, or no place for it."""


def read_cases(junit: Path) -> list[Case]:
    """The tests of a junit file of pytest's. Raises TableError if it holds none."""
    if not junit.is_file():
        raise TableError(f"{junit}: there is no such file; `make families` runs the tests that write it")
    cases = []
    for element in ElementTree.parse(junit).iter("testcase"):
        bad = element.find("failure") is not None or element.find("error") is not None
        outcome = "failed" if bad else "skipped" if element.find("skipped") is not None else "passed"
        cases.append(Case(element.attrib["classname"].rpartition(".")[2], element.attrib["name"], outcome))
    if not cases:
        raise TableError(f"{junit}: holds no test; run pytest with --junitxml={junit}")
    return cases


def day_of(junit: Path) -> str:
    """The day on which the tests ran, such as 2026-11-24. Raises TableError if the file does not say."""
    suite = ElementTree.parse(junit).find(".//testsuite")
    if suite is None or "timestamp" not in suite.attrib:
        raise TableError(f"{junit}: its testsuite has no timestamp; run pytest with --junitxml={junit}")
    return suite.attrib["timestamp"][:10]


def applies(claim: Claim, pipeline: str) -> bool:
    """Whether a column says anything of a pipeline."""
    facts = FAMILIES[PIPELINES[pipeline]]
    if claim.column in NOT_APPLICABLE.get(pipeline, ()):
        return False
    match claim.column:
        case "step, references":
            return "edit" in tasks_of(pipeline)
        case "pyramid":
            return facts.takes_scaled_positions
        case "regions":
            return "entity" in tasks_of(pipeline)
        case _:
            return True


def is_of(case: Case, claim: Claim, pipeline: str) -> bool:
    """Whether a test proves a claim of a pipeline."""
    if not re.fullmatch(claim.modules, case.module) or not re.search(claim.words, case.name):
        return False
    family = PIPELINES[pipeline]
    if family not in families_of(case):
        return False
    siblings = list(FAMILIES[family].pipelines)
    named = [other for other in siblings if re.search(rf"\b{other}\b" + (f"|{_NAMED[other]}" if other in _NAMED else ""), case.name)]
    return pipeline in (named or (siblings[:1] if claim.of_first else siblings))


def families_of(case: Case) -> list[str]:
    """The families that a test is about: by its file, or by its name where its file is about several."""
    by_file = {"test_flux": ["flux"], "test_peft_layout": ["pixart"], "test_pyramid": [name for name, facts in FAMILIES.items() if facts.takes_scaled_positions]}
    if case.module in by_file:
        return by_file[case.module]
    if (family := case.module.removeprefix("test_family_")) in FAMILIES:
        return [family]
    test, _, parameters = case.name.rstrip("]").partition("[")
    named = [name for name in FAMILIES if name in parameters.split("-") or f"_{name}_" in f"{test}_"]
    if case.module in ("test_regions", "test_region_pipeline") and not named:
        return [name for name, facts in FAMILIES.items() if any("entity" in tasks for tasks in facts.pipelines.values())]
    return named


def objectives_of(pipeline: str) -> str:
    """What a pipeline can be trained on: flow or epsilon, pyramid, regions."""
    facts = FAMILIES[PIPELINES[pipeline]]
    return ", ".join([facts.objective, *["pyramid"] * facts.takes_scaled_positions, *["regions"] * ("entity" in tasks_of(pipeline))])


def comfyui_of(family: str) -> str:
    """How ComfyUI reads the family's adapters, by its stored key map."""
    stored = json.loads((ROOT / "stages" / "comfyui_keys" / f"{family}.json").read_text(encoding="utf-8"))
    if stored["model"] is None:
        return "none"
    if not stored["by_module"]:
        return "converted"
    return "as published, some layers converted" if stored["by_weight"] else "as published"


def cell(cases: Sequence[Case], claim: Claim, pipeline: str) -> str:
    """How many tests proved a claim of a pipeline: a number, - where it does not apply, FAILED where one failed."""
    if not applies(claim, pipeline):
        return "-"
    counted = [case.outcome for case in cases if is_of(case, claim, pipeline) and case.outcome != "skipped"]
    failed = counted.count("failed")
    number = f"FAILED ({failed} of {len(counted)})" if failed else str(len(counted))
    return f"{comfyui_of(PIPELINES[pipeline])}: {number}" if claim.column == "ComfyUI" else number


def table(cases: Sequence[Case], day: str, versions: Mapping[str, str]) -> str:
    """The whole table in Markdown, with what it was made from beneath."""
    heads = ["family", "pipeline", "tasks", "objectives", *(claim.column for claim in CLAIMS)]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(['---'] * 4 + ['---:'] * (len(CLAIMS) - 1) + ['---'])}|"]
    for pipeline, family in PIPELINES.items():
        row = [f"[{family}](#{family})", f"`{pipeline}`", ", ".join(tasks_of(pipeline)), objectives_of(pipeline), *(cell(cases, claim, pipeline) for claim in CLAIMS)]
        lines.append(f"| {' | '.join(row)} |")
    passed = sum(case.outcome == "passed" for case in cases)
    made = ", ".join(f"{name} {number}" for name, number in versions.items())
    return "\n".join([*lines, "", f"{passed} of {len(cases)} tests passed on {day} ({made})."])


def put_into(document: Path, text: str) -> None:
    """Put the table between its marks. Raises TableError if they are not there."""
    whole = document.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise TableError(f"{document}: the marks of the table are not there once each and in order; write the lines '{BEGIN}' and '{END}' where it is to stand")
    document.write_text(f"{whole[: whole.index(BEGIN)]}{BEGIN}\n{text}\n{whole[whole.index(END) :]}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """arguments: the junit file. Returns the exit code."""
    if len(arguments) != 1:
        print("usage: python tests/families_table.py JUNIT_FILE", file=sys.stderr)
        return 2
    try:
        cases = read_cases(Path(arguments[0]))
        text = table(cases, day_of(Path(arguments[0])), {name: version(name).partition("+")[0] for name in LIBRARIES})
        put_into(DOCUMENT, text)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{DOCUMENT}: written from {len(cases)} tests")
    return 1 if "FAILED" in text else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
