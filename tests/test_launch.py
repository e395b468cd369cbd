"""The commands as a user types them: `accelerate launch` with the shipped configs, and what the command line answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs import make_world, plan_of, write_plan

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def shell(*command: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root, without any variable that a user would have to know of."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "OMP_", "PYTHONPATH", "WORLD_SIZE", "RANK"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def accelerate() -> str:
    return str(Path(sys.executable).parent / "accelerate")


@pytest.mark.launch
def test_one_and_two_processes_start_by_config_file_alone_and_end_alike(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world, workers=1)
    for stage in plan["stages"]:
        stage |= {"steps": 3, "optimizer": {"eps": 1e-2}, "precision": "fp32"}
    file = write_plan(tmp_path / "plan.yaml", plan)
    ends = []
    for config, processes in (("cpu", 1), ("cpu_2_processes", 2)):
        out = tmp_path / config
        done = shell(accelerate(), "launch", "--config_file", f"accelerate_configs/{config}.yaml", "train.py", str(file), "--out", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((out / "environment.json").read_text())["processes"] == processes
        assert "Traceback" not in done.stderr
        ends.append(load_file(out / "adapter" / "pytorch_lora_weights.safetensors"))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_by_accelerates_own_launcher(config: Path) -> None:
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parsed = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    checked, _, _ = _validate_launch_command(parsed)
    written = load_config_from_file(str(config))
    assert checked.num_processes == written.num_processes
    assert written.mixed_precision == "no", "precision is the plan's"


def test_rendezvous_must_be_typed_for_accelerate_does_not_read_it_from_a_file(tmp_path: Path) -> None:
    """Once it does (not in 1.15), the flags can leave accelerate_configs/multi_node_rendezvous.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = tmp_path / "c10d.yaml"
    file.write_text((ROOT / "accelerate_configs" / "multi_node_rendezvous.yaml").read_text() + "rdzv_backend: c10d\nsame_network: true\n")
    checked, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))
    assert (checked.rdzv_backend, checked.same_network) == ("static", False)


def test_wrong_plan_ends_with_exit_code_2_and_no_traceback(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)
    plan["stages"][1]["precision"] = "bf61"
    del plan["model"]
    file = write_plan(tmp_path / "plan.yaml", plan)
    done = shell(sys.executable, "train.py", str(file), "--check")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{file}:") for line in lines)
    assert "'bf61' is not one of fp32, bf16, fp16, fp8; did you mean 'bf16'?" in done.stderr


def test_sound_plan_is_checked_and_explained(world: Path, tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.yaml", plan_of(world))
    checked = shell(sys.executable, "train.py", str(file), "--check")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "sound" in checked.stdout
    explained = shell(sys.executable, "train.py", str(file), "--explain", "--set", "stages.refine.steps=50")
    assert explained.returncode == 0, explained.stderr
    assert "400 images" in explained.stdout
    assert not (ROOT / "runs" / "tiny").exists()


def test_unknown_stage_for_until_names_the_stages(world: Path, tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.yaml", plan_of(world))
    done = shell(sys.executable, "train.py", str(file), "--until", "refien")
    assert done.returncode == 2
    assert "no stage 'refien' (stages: found, expose, refine)" in done.stderr


def test_mixing_never_imports_stages() -> None:
    for path in (ROOT / "mixing").glob("*.py"):
        assert "stages" not in [line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))], path
