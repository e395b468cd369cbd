"""Nobody is let in: no pickle is read and no code of others executed, paths stay in their folders, secrets stay where they are, captions are text, and nothing is sent unasked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

import dependencies
from faults import security
from faults.hostile import liars, pickled
from runs import carry_out
from stages.checkpoint import newest_checkpoint
from stages.families.facts import UnsuitableModel, check_named, check_parts
from stages.hub.errors import words_of
from stages.plan import Plan
from stages.reader import PlanError, read_plan

ROOT = Path(__file__).resolve().parent.parent

OPENS: dict[str, str] = {
    r"\bpickle\b": "pickles execute what they hold",
    r"\bmarshal\b|\bshelve\b|\bdill\b|\bcloudpickle\b|\bjoblib\b": "as pickles",
    r"torch\.load\(|torch\.save\(|torch\.jit\.load": "pickles; safetensors are read and written",
    r"allow_pickle=True": "unpickles",
    r"(?<![\w.])eval\(|(?<![\w.])exec\(|(?<![\w.])compile\(": "executes text",
    r"yaml\.load\(|yaml\.unsafe_load|YAML\(typ=.unsafe": "may make objects of tags",
    r"trust_remote_code": "executes a model's own code",
    r"os\.system|os\.popen|shell=True": "gives text to a shell",
    r"extractall\(|\.extract\(": "writes where an archive says",
    r"tempfile\.mktemp\b": "a name that another may take first",
    r"verify=False": "believes any server",
    r"__import__\(|import_module\b": "executes a module whose name may come from anywhere",
    r"http://": "can be read on its way",
}
"""What lets others in, or may."""
ALLOWED: dict[tuple[str, str], str] = {
    ("stages/families/open.py", "import_module("): "a family's own file, by a name in a table of the code",
    ("stages/families/open.py", "from importlib import import_module"): "the same",
    ("stages/zero.py", 'import_module("deepspeed")'): "by a name that stands there",
    ("benchmarks/step_model.py", "import_module(f\"stages.families.tiny.{family}\")"): "a tiny model's own file, by a name that the code gives",
    ("benchmarks/step_model.py", "from importlib import import_module"): "the same",
}
"""Where they stand all the same, and why."""


def _sources() -> Iterator[Path]:
    yield ROOT / "train.py"
    for folder in ("mixing", "stages", "benchmarks", "plans"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_nothing_that_lets_others_in_stands_in_the_code() -> None:
    found = []
    for path in _sources():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("#", 1)[0]
            for pattern, why in OPENS.items():
                if re.search(pattern, code) and not any(name == file and what in code for file, what in ALLOWED):
                    found.append(f"{name}:{number}: {line.strip()} ({why})")
    assert found == []


def test_every_exception_is_still_needed() -> None:
    assert [place for place in ALLOWED if place[1] not in (ROOT / place[0]).read_text()] == []


def test_tests_unpickle_nothing_but_what_they_have_pickled_themselves() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"(?<!\")pickle\.loads?\(", line):
                assert "S301" in line or "dumps" in line or re.search(r"pickle\.loads\(content\)", line), f"{path.name}:{number}"


# --- hostile files ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> security.World:
    return security.World(tmp_path_factory.mktemp("security"))


def test_a_hostile_checkpoint_whose_manifest_fits_it_is_refused_and_nothing_of_it_executed(world: security.World) -> None:
    assert security.checkpoints(world, whole=False).lost == ()


def test_a_hostile_adapter_is_refused_in_words_and_nothing_beside_it_executed(world: security.World) -> None:
    assert security.starts(world).lost == ()


def test_a_manifest_names_nothing_outside_its_checkpoint(world: security.World) -> None:
    assert security.manifests(world).lost == ()


def test_safetensors_that_lie_about_themselves_are_refused_in_words(world: security.World) -> None:
    assert security.tensors(world).lost == ()


def test_code_and_pickles_in_a_models_folder_are_not_touched(world: security.World) -> None:
    assert security.models(world, whole=False).lost == ()


def test_pickles_and_code_in_tables_saved_datasets_and_a_data_index_are_not_executed(world: security.World) -> None:
    assert security.sources(world).lost == ()


def test_the_hostile_files_are_hostile(tmp_path: Path) -> None:
    """Read as they want to be read, the pickle acts and every liar is found out; else the tests above would prove nothing."""
    canary = tmp_path / "canary"
    file = tmp_path / "x.pkl"
    file.write_bytes(pickled(canary))
    subprocess.run([sys.executable, "-m", "pickle", file], check=True)
    assert canary.is_dir()
    for content in liars().values():
        file.write_bytes(content)
        with pytest.raises(SafetensorError):
            load_file(file)


def test_the_grounds_for_refusing_a_models_part_are_told() -> None:
    check_parts({"_class_name": "FluxPipeline", "vae": [None, None], "scheduler": ["diffusers", "X"], "tokenizer": ["transformers", "Y"]})
    with pytest.raises(UnsuitableModel, match=r"^has a text_encoder that is made by code of its own \('modeling_evil'\), and no code of a model is executed"):
        check_parts({"text_encoder": ["modeling_evil", "Evil"]})
    check_named({"_class_name": "FluxPipeline", "scheduler": ["diffusers", "X"]})
    for index, what in (({"scheduler": ["diffusers", "X"]}, "pipeline"), ({"_class_name": "FluxPipeline", "scheduler": "X"}, "scheduler"), ({"_class_name": "FluxPipeline"}, "scheduler")):
        with pytest.raises(UnsuitableModel, match=f"^has a model_index.json that names no {what}; download the model anew"):
            check_named(index)


@pytest.mark.parametrize("place", ["name", "stages[0].name", "sources.x"])
def test_names_that_become_parts_of_paths_lead_nowhere_else(world: security.World, tmp_path: Path, place: str) -> None:
    for name in ("../../x", "..", ".", "/x", "a/b", "~", "a\\b", "", "-x", "con\n"):
        plan = tmp_path / "plan.yaml"
        made = json.loads(json.dumps(world.plan))
        if place == "name":
            made["name"] = name
        elif place == "sources.x":
            made["sources"][name] = made["sources"]["photos"]
        else:
            made["stages"][0]["name"] = name
        plan.write_text(json.dumps(made))
        with pytest.raises(PlanError, match=r"is not a name: letters, digits"):
            read_plan(plan)


# --- secrets and connections ------------------------------------------------------------------------------------------------------------


def test_secrets_stay_in_the_environment_and_nothing_is_connected_to_unasked(world: security.World) -> None:
    assert security.secrets(world, whole=False).lost == ()


def test_an_error_of_the_network_is_told_without_passwords_and_tokens() -> None:
    said = words_of(OSError("cannot connect to http://someone:s3cret@proxy:3128/x?signature=abc with Bearer xyz and hf_abcdefghijklmnopqrst"))
    assert said == "OSError: cannot connect to http://proxy:3128/x with Bearer (token) and (token)"


# --- text of others ---------------------------------------------------------------------------------------------------------------------

EVIL = '</textarea><script>alert(1)</script><img src=x onerror=alert(2)>"\'` [x](javascript:alert(3)) ![y](http://evil/z.png)\n# heading\n````\n</details>'


def test_captions_with_code_in_them_are_text_in_the_report_and_in_the_card(world: security.World, tmp_path: Path) -> None:
    for file in (world.folder / "data" / "photos").glob("*.txt"):
        file.write_text(" ".join(EVIL.split("\n")))
    source = {**world.plan["sources"]["photos"], "captions": {"trigger": EVIL}, "prompt": EVIL}
    plan = world.made(sources={"photos": source}, stages=world.stages[:1], previews={"rows": 2, "steps": 1}, cache="none")
    run = tmp_path / "run"
    carry_out(run, plan)
    html = (run / "report.html").read_text()
    assert "alert(1)" in html
    for active in ("<script>alert", "<img src=x", 'href="javascript:'):
        assert active not in html
    card = (run / "adapter" / "README.md").read_text()
    body = card.split("\n---\n", 1)[1]
    fences = [line for line in body.splitlines() if re.match(r" {0,3}(`{3,}|~{3,})", line)]
    assert [fence.strip() for fence in fences] == ["```python", "```", "````yaml", "````", "```yaml", "```"]
    outside = re.sub(r"(`{3,})\w*\n.*?\n\1", "", body, flags=re.DOTALL)
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", outside)  # what stands between backticks is text
    for active in ("<script", "<img", "](javascript:", "](http://evil", "\n# heading"):
        assert active not in outside, outside


def test_a_plan_read_back_from_a_run_is_the_plan(world: security.World) -> None:
    assert newest_checkpoint(world.run / "stages" / "1-first", print) is not None
    assert isinstance(read_plan(world.run / "plan.yaml", written_out=True).plan, Plan)


# --- what it stands on ------------------------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_to_one_version() -> None:
    files = sorted(ROOT.glob("requirements*.txt"))
    assert len(files) >= 3
    for file in files:
        for line in file.read_text().splitlines():
            assert not line.strip() or line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?==[0-9][0-9A-Za-z.+]*( *;.*)?( +#.*)?", line), f"{file.name}: {line}"


def test_the_list_of_dependencies_is_fresh() -> None:
    assert (ROOT / "docs" / "dependencies.md").read_text() == dependencies.page(), "python tests/dependencies.py writes it anew"
