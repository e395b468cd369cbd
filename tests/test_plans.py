"""The plans that are shipped: each is sound for the family of its model, says where it is from, and asks for what its system is known for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.adapter import add_adapter
from stages.check import check_plan, plan_notes
from stages.families.base import targets_in
from stages.families.open import ARCHITECTURES
from stages.families.tiny import flux, omnigen, sana, sd3, wan
from stages.optim import rate_at
from stages.plan import Adapter, Batch, Model, Plan, Ramped, Stage
from stages.problems import Problem
from stages.reader import read_plan, resolved
from stages.resolved import level_shares, resolved_levels, resolved_rate, resolved_storage

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "plans"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SHIPPED = [name for name in NAMES if name != "quickstart"]
EVERYDAY = ("edit_and_t2i", "flux_low_to_high", "flux_style", "sana_style", "wan_experts")
SYSTEMS = [name for name in SHIPPED if name not in EVERYDAY]

# What stands in for a model of the Hub: the same pipeline class with tiny random weights. Side of the real model's patches in pixels.
_MODELS: Mapping[str, tuple[str, int, Callable[[Path], Path]]] = {
    "black-forest-labs/FLUX.1-dev": ("flux", 16, lambda folder: flux.build(folder, guidance=True)),
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux", 16, lambda folder: flux.build(folder, guidance=True, pipeline="FluxKontextPipeline")),
    "Shitao/OmniGen-v1-diffusers": ("omnigen", 16, omnigen.build),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 16, sd3.build),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": ("sana", 32, sana.build),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("wan", 16, lambda folder: wan.build(folder, experts=True)),
}


def plan_of(name: str, *settings: str) -> Plan:
    """A shipped plan."""
    return read_plan(FOLDER / f"{name}.yaml", settings).plan


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text()


def header_of(name: str) -> str:
    """The comment that a plan opens with, its marks taken away."""
    lines = []
    for line in text_of(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    return "\n".join(lines)


def offers(name: str) -> list[str]:
    """The settings that a plan's comments tell its reader to try."""
    return [quoted or bare for quoted, bare in re.findall(r"--set (?:'([^']+)'|(\S+=\S+))", text_of(name))]


def repo_of(plan: Plan) -> str:
    return plan.model.repo if isinstance(plan.model, Model) else plan.model


def rates(stage: Stage) -> list[float]:
    """The learning rate of every step of a stage."""
    return [rate_at(step, stage.steps, resolved_rate(stage)) for step in range(stage.steps)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny model for each that a shipped plan names."""
    folder = tmp_path_factory.mktemp("models")
    return {repo: build(folder / repo.replace("/", "-")) for repo, (_, _, build) in _MODELS.items()}


def but_for_data(problems: Sequence[Problem]) -> list[Problem]:
    """The problems that remain once the data lie where the plan says; here nothing does."""
    return [problem for problem in problems if not re.search(r"does not exist|holds no images", problem.message)]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_plan_is_sound_for_the_family_of_its_model(name: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    read = read_plan(FOLDER / f"{name}.yaml")
    assert but_for_data(check_plan(read, tmp_path)) == []
    assert [note.where for note in plan_notes(read, tmp_path)] in (["model"], ["model.repo"]), "no source is left undrawn"
    tiny = read_plan(FOLDER / f"{name}.yaml", [f"model.repo={models[repo_of(read.plan)]}"])
    assert but_for_data(check_plan(tiny, tmp_path)) == []


@pytest.mark.parametrize("name", [name for name in SHIPPED if offers(name)])
def test_the_settings_that_a_plan_offers_can_be_given(name: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    given = [setting for setting in offers(name) if not setting.startswith("start=")]
    for chosen in (given, *([each] for each in given if "prior" not in each)):
        read = read_plan(FOLDER / f"{name}.yaml", [*chosen, f"model.repo={models[repo_of(plan_of(name))]}"])
        assert but_for_data(check_plan(read, tmp_path)) == []
        assert read.plan != plan_of(name, f"model.repo={models[repo_of(plan_of(name))]}")


@pytest.mark.parametrize("name", SHIPPED)
def test_resolutions_are_multiples_that_the_real_model_takes(name: str) -> None:
    plan = plan_of(name)
    for stage in plan.stages:
        multiple = _MODELS[repo_of(plan)][1] * 2 ** (stage.pyramid.levels - 1 if stage.pyramid else 0)
        assert all(level.pixels % multiple == 0 for level in resolved_levels(stage))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_target_of_an_adapter_matches_layers_of_its_model(name: str, models: Mapping[str, Path]) -> None:
    plan = plan_of(name)
    adapters = dict(plan.adapters) or {"default": plan.adapter}
    taken = {each: layers_of(models, repo_of(plan), settings) for each, settings in adapters.items()}
    assert all(taken.values())
    if "high" not in adapters:  # the experts' adapters are of different transformers
        assert sum(map(len, taken.values())) == len(set().union(*taken.values())), "no layer is in two adapters"


def layers_of(models: Mapping[str, Path], repo: str, settings: Adapter) -> set[str]:
    """The layers of the tiny model that an adapter's targets name. Raises ValueError if one names none."""
    architecture = ARCHITECTURES[_MODELS[repo][0]]
    config: Any = architecture.transformer_class.load_config(models[repo], subfolder="transformer")
    with torch.device("meta"):
        model: nn.Module = architecture.transformer_class.from_config(config)
    targets = settings.targets if isinstance(settings.targets, str) else None
    words = targets_in(architecture, config)
    if targets is None:
        for pattern in settings.targets:
            add_adapter(architecture.transformer_class.from_config(config), Adapter(rank=2, targets=[pattern]), words, 0)
    return set(add_adapter(model, settings, words, 0))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_opens_with_the_command_that_runs_it(name: str) -> None:
    found = re.findall(r"^ +(accelerate launch --config_file (\S+) train\.py (\S+))$", header_of(name), re.MULTILINE)
    assert [plan for _, _, plan in found] == [f"plans/{name}.yaml"]
    assert plan_of(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_plan_says_how_true_it_is_and_what_is_left_out(name: str) -> None:
    header = " ".join(header_of(name).split())
    (said,) = re.findall(r"fidelity: (shipped|scaled|analogue|not a published system's)", header)
    assert (said == "not a published system's") == (name in EVERYDAY)
    assert "Not reproduced:" in header
    readme = re.search(rf"^\| \[{name}\.yaml\].*\| (.*?) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert readme is not None
    assert readme[1] == ("its own" if name in EVERYDAY else said)


def test_the_table_of_plans_lists_every_plan_once() -> None:
    listed = re.findall(r"^\| \[(\S+)\.yaml\]\((\S+)\.yaml\) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in listed) == NAMES
    assert all(name == link for name, link in listed)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_number_of_a_system_names_its_source(name: str) -> None:
    without = [line for line in numbered_lines(text_of(name)) if not re.search(r"#.*(source: |mine|recalled: |#\d+|\.py )", line)]
    assert without == []


def numbered_lines(text: str) -> list[str]:
    """The lines that give a number; names such as t2i and open-256 hold digits and are none."""
    given = re.compile(r"(?:[:\[,] |\[)-?\d[\d.e+-]*(?=[,}\]\s]|$)")
    return [line for line in text.splitlines() if given.search(line.split("#")[0])]


def test_lines_with_numbers_are_told_from_those_with_digits_in_names() -> None:
    text = "a: 1\nb: {c: 1e-4, d: 2}\ne: [3, 4]\n- name: open-256\nmix: {t2i: 50}\npath: data/1/x.json\ntargets: [\"to_out\\\\.0\"]\n# f: 1\ng: *t2i"
    assert numbered_lines(text) == ["a: 1", "b: {c: 1e-4, d: 2}", "e: [3, 4]", "mix: {t2i: 50}"]


@pytest.mark.parametrize("name", SHIPPED)
def test_data_of_a_plan_lie_in_a_folder_of_its_own(name: str) -> None:
    arms = {"monkey_uncapped": "monkey", "pyramid_flow_uniform": "pyramid_flow", "mini_omni_warmup": "mini_omni", "omnigen_adaptive": "omnigen"}
    assert all(source.path.split("/")[:2] == ["data", arms.get(name, name)] for source in plan_of(name).sources.values())


def differing(first: str, second: str) -> dict[str, tuple[object, object]]:
    """The fields in which two plans differ once every default is written out."""
    a, b = (dict(flat(resolved(plan_of(name)))) for name in (first, second))
    return {field: (a.get(field), b.get(field)) for field in sorted(a.keys() | b.keys()) if a.get(field) != b.get(field)}


def flat(value: object, name: str = "") -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [each for key, inner in value.items() for each in flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [each for index, inner in enumerate(value) for each in flat(inner, f"{name}[{index}]")]
    return [(name, value)]


def shares(mix: object) -> dict[str, Fraction]:
    """Shares of a mix by name, adding up to 1."""
    assert isinstance(mix, Mapping)
    whole = sum(Fraction(str(share)) for share in mix.values())
    return {name: Fraction(str(share)) / whole for name, share in mix.items()}


def test_omnigen_draws_every_kind_by_size_and_then_half_text_to_image() -> None:
    plan = plan_of("omnigen")
    *early, _, _ = plan.stages
    assert [resolved_levels(stage)[0].pixels for stage in plan.stages[:4]] == [256, 512, 1024, 2240]
    assert [level.pixels for level in resolved_levels(plan.stages[4])] == [256, 512, 1024, 2240]
    assert [stage.mix for stage in early] == ["natural"] * 3
    assert {name for name, source in plan.sources.items() if source.repeat == 0} == {"t2i_hq"}, "held back from a mix by size"
    for stage in plan.stages[3:]:
        late = shares(stage.mix)
        assert late == {"t2i_hq": Fraction(1, 2), "subject": Fraction(1, 5), **dict.fromkeys(("control", "edit", "other"), Fraction(1, 10))}


def test_omnigens_steps_batches_and_rates_are_in_the_papers_proportion() -> None:
    stages = plan_of("omnigen").stages
    assert [250 * stage.steps for stage in stages] == [500_000, 300_000, 100_000, 30_000, 80_000]
    images = [stage.batch.images if isinstance(stage.batch, Batch) else stage.batch for stage in stages]
    assert [26 * count for count in images if isinstance(count, int)] == [1040, 520, 208, 104, 104]
    assert [rates(stage)[0] / 3e-4 for stage in stages] == pytest.approx([1, 1, 0.4, 0.2, 0.2])
    assert all((stage.dropout.mode, stage.dropout.prompt, stage.timesteps.shift) == ("joint", 0.1, "none") for stage in stages)
    assert all(stage.loss.changed is not None and stage.loss.changed.limits == (5, 64) for stage in stages)


def test_omnigens_documented_command_is_what_its_lora_plan_says() -> None:
    plan, (stage,) = plan_of("omnigen_lora"), plan_of("omnigen_lora").stages
    assert (plan.adapter.rank, plan.adapter.targets, resolved_rate(stage).peak, stage.dropout.prompt) == (8, "attention", 3e-4, 0.01)
    assert set(rates(stage)) == {3e-4}


def test_omnigen2_adds_tasks_at_each_resolution_and_drops_references_only_with_the_prompt() -> None:
    stages = plan_of("omnigen2").stages
    assert [(stage.resolution, len(shares(stage.mix)), 100 * stage.steps) for stage in stages] == [
        (256, 1, 50_000),
        (256, 3, 50_000),
        (512, 1, 30_000),
        (512, 3, 30_000),
        (1024, 1, 50_000),
        (1024, 3, 50_000),
        (1024, 2, 100_000),
    ]
    assert {(stage.dropout.mode, stage.dropout.prompt, stage.dropout.references, stage.loss.per) for stage in stages} == {("nested", 1e-4, 0.5, "token")}
    assert set(shares(stages[1].mix).values()) == {Fraction(1, 3)}


def test_pyramid_flow_stresses_the_middle_level_and_its_other_arm_none() -> None:
    assert [level_shares(stage, 1)[0] for stage in plan_of("pyramid_flow").stages] == [(1, 2, 1)] * 2
    assert [level_shares(stage, 1)[0] for stage in plan_of("pyramid_flow_uniform").stages] == [(1, 1, 1)] * 2
    assert differing("pyramid_flow", "pyramid_flow_uniform").keys() == {"name", *(f"stages[{index}].{field}" for index in (0, 1) for field in ("pyramid.shares", "batch.micro"))}


def test_pyramid_flows_steps_hold_the_same_tokens_and_its_micro_batches_every_level() -> None:
    for name, period in (("pyramid_flow", 4), ("pyramid_flow_uniform", 3)):
        for stage in plan_of(name).stages:
            assert stage.batch == Batch(tokens=32768, micro=period)


def test_the_ramp_that_pyramid_flow_offers_leads_from_one_arm_to_the_other() -> None:
    ramp = next(setting for setting in offers("pyramid_flow") if "shares" in setting)
    pyramid = plan_of("pyramid_flow", ramp).stages[0].pyramid
    assert pyramid is not None
    assert pyramid.shares == Ramped.model_validate({"from": [1, 1, 1], "to": [1, 2, 1]})


def test_monkey_takes_213000_of_its_captions_and_one_pass_over_all_in_one_stage() -> None:
    plan, (stage,) = plan_of("monkey"), plan_of("monkey").stages
    counts = {name: source.take.count for name, source in plan.sources.items() if source.take is not None and source.take.count is not None}
    assert counts["detailed"] == 213_000
    assert counts.keys() == plan.sources.keys()
    assert stage.mix == "natural"
    assert stage.steps == sum(counts.values()) // 64


def test_monkeys_other_arm_differs_in_the_cap_and_in_the_length_of_a_pass() -> None:
    changed = differing("monkey", "monkey_uncapped")
    assert {field.split(".take")[0] for field in changed} == {"name", "sources.detailed", "stages[0].steps"}
    assert plan_of("monkey_uncapped").sources["detailed"].take is None
    assert changed["stages[0].steps"] == (8156, (427_000 + 82_000 + 109_000 + 118_000) // 64)


def test_mini_omnis_stages_are_the_middles_of_its_intervals_and_hold_one_adapter_still() -> None:
    stages = plan_of("mini_omni").stages
    assert [50 * stage.steps for stage in stages] == [15_000, 25_000, 55_000]
    assert [round(stage.steps / stages[0].steps, 2) for stage in stages] == [1, 1.67, 3.67]
    assert [stage.train for stage in stages] == [["cond"], ["core"], ["cond", "core"]]


def test_both_readings_of_mini_omnis_4e_6_are_what_their_plans_do() -> None:
    for name, ends in (("mini_omni", (0.0, 4e-6)), ("mini_omni_warmup", (4e-6, None))):
        stages = plan_of(name).stages
        for stage, peak in zip(stages, (1e-3, 4e-4, 4e-4), strict=True):
            curve = rates(stage)
            assert max(curve) == pytest.approx(peak)
            assert (curve[0], curve[-1]) == pytest.approx((ends[0], ends[1] or peak))
    assert {field.split(".")[1] for field in differing("mini_omni", "mini_omni_warmup") if field != "name"} == {"lr"}


def test_eligen_trains_as_its_published_script() -> None:
    plan, (stage,) = plan_of("eligen"), plan_of("eligen").stages
    assert (plan.adapter.rank, plan.sources["entities"].task, resolved_rate(stage).peak) == (32, "entity", 1e-4)
    assert (stage.timesteps.density, stage.timesteps.shift, stage.loss.weighting, stage.clip, stage.optimizer.weight_decay) == ("uniform", 3, "bell", None, 0.01)


def test_eligens_targets_are_those_that_diffsynth_names(models: Mapping[str, Path]) -> None:
    # a_to_qkv, b_to_qkv, a_to_out, b_to_out, ff_a, ff_b and the modulation of the double blocks; to_qkv_mlp, proj_out and norm of the single ones, in diffusers' names.
    double = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
    single = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    repo = repo_of(plan_of("eligen"))
    assert layers_of(models, repo, plan_of("eligen").adapter) == layers_of(models, repo, Adapter(targets=[double, single]))


def test_eligens_three_kinds_of_regularisation_take_effect() -> None:
    plan = plan_of("eligen", *(setting for setting in offers("eligen") if not setting.startswith("start=")))
    (stage,) = plan.stages
    assert (stage.optimizer.weight_decay, plan.adapter.dropout) == (0.01, 0.1)
    prior = plan.sources["prior"].prior
    assert prior is not None
    assert (prior.count, shares(stage.mix)["prior"], stage.loss.sources) == (200, Fraction(1, 5), {"prior": 0.5})


def test_the_first_plan_to_copy_has_twelve_lines() -> None:
    lines = [line for line in text_of("flux_style").splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 12


def test_resolutions_rise_and_rates_fall_from_low_to_high() -> None:
    stages = plan_of("flux_low_to_high").stages
    assert [stage.resolution for stage in stages] == [512, 768, 1024]
    peaks = [resolved_rate(stage).peak for stage in stages]
    assert peaks == sorted(peaks, reverse=True)
    assert len({str(stage.batch) for stage in stages}) == 1


def test_each_expert_of_wan_has_its_adapter_and_its_noise_levels() -> None:
    stages = plan_of("wan_experts").stages
    assert [(stage.expert, stage.train, stage.timesteps.range) for stage in stages] == [("high", ["high"], (0.875, 1)), ("low", ["low"], (0, 0.875))]


@pytest.mark.parametrize("name", SHIPPED)
def test_half_precision_is_bf16(name: str) -> None:
    assert {(stage.precision, resolved_storage(stage)) for stage in plan_of(name).stages} == {("bf16", "bf16")}
