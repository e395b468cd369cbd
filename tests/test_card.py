"""The card: what the Hub reads at its head, and code that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from ruamel.yaml import YAML

from models import tiny_flux
from stages.adapter import adapter_weights, add_adapter
from stages.card import Told, model_card
from stages.card_facts import Sample, licence_of, samples_of
from stages.families.family import Family
from stages.families.flux import Flux
from stages.families.open import open_family
from stages.families.tiny import omnigen, pixart, qwen_image, sana, wan
from stages.layouts import ADAPTER_FILE, write_adapter
from stages.plan import Adapter, Captions, Model, Plan, Publish, Source, Stage

CPU = torch.device("cpu")
STAGE = Stage(name="only", steps=1, lr=0.1, batch=1, resolution=16)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Flux on latents."""
    return Family(Flux(), str(tiny_flux(tmp_path_factory.mktemp("model"), pixels=False)), None, None, CPU)


def plan_for(model: str | Model, **changes: Any) -> Plan:
    return Plan(name="tiny", model=model, adapter=Adapter(rank=2), sources={"photos": Source(path="photos")}, stages=[STAGE]).model_copy(update=changes)


def told(**changes: Any) -> Told:
    return Told(**{"table": "| the table |\n", "ledger": {"stages": []}, "versions": {"torch": "2.13.0"}, **changes})


def head(card: str) -> Mapping[str, Any]:
    """The metadata, as the Hub reads it."""
    fields: Mapping[str, Any] = YAML(typ="safe").load(card.split("---\n")[1])
    assert ModelCard(card).data.to_dict() == fields
    return fields


def code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_the_card_says_what_the_adapter_saw_and_how_to_load_it(family: Family) -> None:
    entry = {"asked": 0.25, "drawn": 0.2504, "images": 12_345, "epochs": 1.5}
    ledger = {"stages": [{"stage": "only", "sources": {"photos": entry}}]}
    card = model_card(plan_for(family.repo, adapter=Adapter(rank=7)), family, told(ledger=ledger))
    assert "| only | photos | 25.0% | 25.0% | 12,345 | 1.50 |" in card
    assert "LoRA of rank 7" in card
    assert f'FluxPipeline.from_pretrained("{family.repo}", torch_dtype' in card
    assert f'pipe.load_lora_weights("path/to/this/folder", weight_name="{ADAPTER_FILE}")' in card
    assert "| the table |" in card
    assert "torch 2.13.0" in card
    assert "steps: 1" in card.split("````yaml\n")[1]


def test_a_published_card_names_its_repository_and_how_to_go_on_from_it(family: Family) -> None:
    card = model_card(plan_for(family.repo, adapter=Adapter(rank=2, alpha=4), publish=Publish(repo="user/tiny")), family, told())
    assert f'load_lora_weights("user/tiny", weight_name="{ADAPTER_FILE}")' in card
    going_on = YAML(typ="safe").load(card.split("## Go on from it\n\n```yaml\n")[1].split("```")[0])
    assert going_on == {"model": family.repo, "adapter": {"rank": 2, "alpha": 4.0}, "start": "hub:user/tiny"}


def test_a_base_on_the_hub_stands_at_the_head_with_its_commit_and_licence(family: Family) -> None:
    family = Family(Flux(), family.repo, None, None, CPU)
    family.revision = "0" * 40
    licence = {"license": "other", "license_name": "their-own", "license_link": "https://x.example/licence"}
    card = model_card(plan_for("someone/base"), family, told(licence=licence))
    fields = head(card)
    assert (fields["base_model"], fields["base_model_relation"], fields["base_model_revision"]) == ("someone/base", "adapter", "0" * 40)
    assert {name: fields[name] for name in licence} == licence
    assert "[their-own](https://x.example/licence)" in card
    assert f'from_pretrained("someone/base", revision="{"0" * 40}"' in card


@pytest.mark.parametrize("repo", ["models/mine: the second", "models/a #1", 'models/C:\\path "x"', "just-a-folder"])
def test_a_base_that_is_a_folder_is_not_told_to_the_hub_as_one_of_its_own(family: Family, repo: str) -> None:
    card = model_card(plan_for(repo), family, told())
    assert "base_model" not in head(card)
    assert (head(card)["license"], head(card)["license_name"]) == ("other", "as-the-base-model")
    compile(code(card), "card", "exec")


def test_samples_are_widgets_whatever_their_captions_are(family: Family, tmp_path: Path) -> None:
    prompts = ['a "red": square #1', "", "- ☂\nand a second line"]
    card = model_card(plan_for(family.repo), family, told(samples=[Sample(prompt, tmp_path / "x.png", f"images/{place}.png") for place, prompt in enumerate(prompts)]))
    assert head(card)["widget"] == [{"text": prompt or "-", "output": {"url": f"images/{place}.png"}} for place, prompt in enumerate(prompts)]
    assert "<Gallery />" in card
    compile(code(card), "card", "exec")


@pytest.mark.parametrize(("triggers", "prompt"), [(["sks dog"], "sks dog"), (["sks dog", "sks dog"], "sks dog"), (["a", "b"], None), ([], None)])
def test_one_trigger_is_the_instance_prompt(family: Family, triggers: list[str], prompt: str | None) -> None:
    sources = {f"s{place}": Source(path="photos", captions=Captions(trigger=trigger)) for place, trigger in enumerate(triggers)} or {"photos": Source(path="photos")}
    assert head(model_card(plan_for(family.repo, sources=sources), family, told())).get("instance_prompt") == prompt


@pytest.mark.parametrize(("tasks", "tags"), [(("text_to_image",), ["text-to-image"]), (("edit",), ["image-to-image"]), (("edit", "text_to_image"), ["text-to-image", "image-to-image"])])
def test_the_task_is_said_as_the_hub_calls_it(family: Family, tasks: tuple[str, ...], tags: list[str]) -> None:
    sources = {task: Source.model_validate({"path": "x", "task": task}) for task in tasks}
    fields = head(model_card(plan_for(family.repo, sources=sources), family, told()))
    assert fields["pipeline_tag"] == tags[0]
    assert fields["tags"] == ["lora", "diffusers", "medley", "template:sd-lora", *tags]


def test_the_cards_code_runs(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family.load_transformer(torch.float32, None)
    add_adapter(model, Adapter(rank=2), family.target_patterns, 0)
    write_adapter(tmp_path / ADAPTER_FILE, adapter_weights(model), Adapter(rank=2), {})
    plan = plan_for(family.repo)
    plan = plan.model_copy(update={"previews": plan.previews.model_copy(update={"steps": 1})})
    card = model_card(plan, family, told())
    monkeypatch.chdir(tmp_path)
    exec(compile(code(card).replace("path/to/this/folder", str(tmp_path)), "card", "exec"), {})
    assert Image.open("sample.png").size == (16, 16)


@pytest.mark.parametrize(
    ("build", "task", "said"),
    [
        (omnigen.build, "edit", 'pipe("<img><|image_1|></img> a photo", input_images=[load_image("reference.png")], '),
        (qwen_image.build, "text_to_image", "pipe("),
        (wan.build, "text_to_image", ".frames[0][0]"),
        (sana.build, "text_to_image", "height=16, width=16"),
        (pixart.build, "text_to_image", "PeftModel.from_pretrained(pipe.transformer"),
    ],
)
def test_every_kind_of_pipeline_is_called_as_it_takes_it(tmp_path: Path, build: Any, task: str, said: str) -> None:
    """Arguments that a pipeline does not know are found by its signature."""
    family = open_family(str(build(tmp_path / "m")), CPU)
    lines = code(model_card(plan_for(family.repo, sources={"s": Source.model_validate({"path": "x", "task": task})}), family, told()))
    assert said in lines
    compile(lines, "card", "exec")


def test_a_model_of_pixels_is_not_said_to_be_sampled_by_its_stock_pipeline(tmp_path: Path) -> None:
    family = Family(Flux(), str(tiny_flux(tmp_path / "m", pixels=True)), None, None, CPU)
    card = model_card(plan_for(family.repo), family, told())
    assert "sample.png" not in card
    assert "no stock pipeline samples" in card


# --- what it is made of ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: https://x.example\ntags: [a]\n---\n", {"license": "other", "license_name": "own", "license_link": "https://x.example"}),
        ("---\nlicense: other\nlicense_link: LICENSE.md\n---\n", {"license": "other"}),
        ("---\ntags: [a]\n---\n", None),
        ("---\n: [\n---\n", None),
        ("no head", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_bases_own_card(tmp_path: Path, text: str | None, licence: dict[str, str] | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path), None, may_ask=False) == licence


def test_a_link_to_a_licence_beside_a_card_of_the_hub_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.md\n---\n")
    monkeypatch.setattr("stages.card_facts.try_to_load_from_cache", lambda *arguments, **named: str(tmp_path / "README.md"))
    assert licence_of("someone/base", None, may_ask=False) == {"license": "other", "license_link": "https://huggingface.co/someone/base/blob/main/LICENSE.md"}


def test_samples_are_those_of_the_stage_a_few_of_each_source(tmp_path: Path) -> None:
    """Rows turn by turn, so that a source with many does not take all places."""
    rows = [{"source": source, "row": row, "prompt": f"{source} {row}"} for source in ("a", "b") for row in range(1, 9)]
    folder = tmp_path / "previews" / "2-second"
    os.makedirs(folder)
    for row in rows:
        Image.new("RGB", (2, 2)).save(folder / f"{row['source']}-{row['row']}.png")
    lines = [{"event": "preview", "stage": "first", "step": 1, "rows": rows[:1]}, {"event": "preview", "stage": "second", "step": 1, "rows": rows}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = samples_of(tmp_path, 1, "second")
    assert [sample.name for sample in found[:4]] == ["images/a-1.png", "images/b-1.png", "images/a-2.png", "images/b-2.png"]
    assert len(found) == 12
    assert samples_of(tmp_path, 0, "first") == []
