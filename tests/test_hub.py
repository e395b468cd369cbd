"""Runs that publish to the Hub, against one in memory: never held up and never ended by it, gone on with from it, and begun from it."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session

import stages.hub.run
from hub_server import TOKEN, HubServer, Repo, hub_server
from runs import adapter_bytes, carry_out, copy_run, events, free_port, launch, make_world, plan_of, write_plan
from stages.hub import __main__ as hub
from stages.hub.files import MARKER
from stages.hub.start import fetched

pytestmark = pytest.mark.launch
REPO = "user/tiny"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_with(world: Path, **publish: Any) -> dict[str, Any]:
    """Two stages that train the adapter."""
    plan = plan_of(world, previews={"rows": 1, "steps": 1}, **({"publish": {"repo": REPO} | publish} if publish else {}))
    return {**plan, "stages": plan["stages"][1:]}


def short(world: Path, **publish: Any) -> dict[str, Any]:
    """One stage of one step."""
    plan = plan_with(world, **publish)
    return {**plan, "previews": {"rows": 0}, "stages": [{**plan["stages"][0], "steps": 1}]}


def told(url: str, home: Path) -> dict[str, str]:
    """What the environment says of the Hub."""
    return {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def ask(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Have this process, and those that are forked from it, ask this Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # as `quiet_libraries` sets it before huggingface_hub is imported
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    for name, value in told(url, home).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that is asked."""
    with hub_server() as made:
        ask(monkeypatch, made.url, tmp_path / "home")
        yield made
        close_session()


@pytest.fixture(scope="module")
def sent(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, HubServer, str]]:
    """A run that published after each stage, and its checkpoints; the Hub; and what was printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("sent")
    with hub_server() as made, pytest.MonkeyPatch.context() as patch:
        ask(patch, made.url, folder / "home")
        text = carry_out(folder / "run", plan_with(world, when="stage", checkpoints=True))
        yield folder / "run", made, text


def on_hub(server: HubServer, branch: str = "main") -> dict[str, bytes]:
    tree = server.repos[REPO].tree(branch)
    assert tree is not None
    return tree


# --- what a run sends --------------------------------------------------------------------------------------------------------------------


def test_what_is_on_the_hub_is_what_the_run_published_byte_for_byte(sent: tuple[Path, HubServer, str]) -> None:
    run, server, text = sent
    mine = {path.relative_to(run / "adapter").as_posix(): path.read_bytes() for path in (run / "adapter").rglob("*") if path.is_file() and path.name != ".medley.json"}  # the run's own note of hashes stays where it is
    assert {name: content for name, content in on_hub(server).items() if name != ".gitattributes"} == mine
    assert {"README.md", "pytorch_lora_weights.safetensors", "previews.png", "images/photos-1.png"} <= mine.keys()
    assert server.repos[REPO].private
    assert len(re.findall(r"the adapter of '\w+' is on the Hub, ", text)) == 2


def test_a_commit_for_each_stage_says_which_and_its_losses(sent: tuple[Path, HubServer, str]) -> None:
    run, server, _ = sent
    _, first, second = server.repos[REPO].messages["main"]
    ends = [line["sources"] for line in events(run, "eval") if line["kind"] == "end"]
    assert first == f"expose: held-out loss edits {ends[0]['edits']['loss']:.3f}, photos {ends[0]['photos']['loss']:.3f}"
    assert second.startswith("refine: held-out loss edits ")


def test_a_run_says_at_its_beginning_that_it_can_publish(sent: tuple[Path, HubServer, str]) -> None:
    _, server, text = sent
    assert text.index("the Hub: user/tiny, private, after each stage, checkpoints too") < text.index("stage 1/2")
    assert "user/tiny on the Hub was made, private" in text
    wanted = [call for call in server.calls if not call.startswith("HEAD")][0:3]
    assert "POST /api/repos/create" in wanted


def test_the_token_is_nowhere_in_the_run_or_in_what_it_printed(sent: tuple[Path, HubServer, str]) -> None:
    run, server, text = sent
    assert TOKEN not in text
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not [name for branch in server.repos[REPO].branches for name, content in on_hub(server, branch).items() if TOKEN.encode() in content]


def test_nothing_else_is_asked_of_the_hub_and_nothing_is_told_beside(sent: tuple[Path, HubServer, str]) -> None:
    _, server, _ = sent
    assert server.strange == []
    assert not [agent for agent in server.agents if "torch" in agent or "agent/" in agent]


def test_without_publish_the_hub_is_not_asked(world: Path, tmp_path: Path, server: HubServer) -> None:
    carry_out(tmp_path / "run", short(world))
    assert server.calls == []
    assert not (tmp_path / "run" / "hub").exists()


def test_the_card_is_one_that_the_hub_takes(sent: tuple[Path, HubServer, str]) -> None:
    """The server looks at the metadata as the Hub does; here huggingface_hub reads it."""
    run, server, _ = sent
    assert server.called("validate-yaml")
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert [entry["output"]["url"] for entry in card.data.get("widget")] == ["images/edits-1.png", "images/photos-1.png"]
    assert "start: hub:user/tiny" in card.text


def test_the_same_command_sends_nothing_again(sent: tuple[Path, HubServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, server, _ = sent
    ask(monkeypatch, server.url, tmp_path / "home")
    before = len(server.called("commit"))
    plan = run.with_suffix(".yaml")
    assert launch([str(plan), "--out", str(copy_run(run, tmp_path / "run"))], output=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    assert len(server.called("commit")) == before


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_well_while_the_hub_is_away_and_the_command_it_names_sends_the_rest(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.hub.run, "FAILING", 1.0)
    monkeypatch.setattr(stages.hub.run, "WAITS", (0.2,))
    ask(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path / "home")
    text = carry_out(tmp_path / "run", short(world, private=False))
    assert "nothing can be sent to user/tiny now: ConnectError" in text
    assert text.index("nothing can be sent") < text.index("published to")
    command = next(line for line in text.splitlines() if "python -m stages.hub push" in line)
    assert command.endswith(f"python -m stages.hub push {tmp_path / 'run'} user/tiny --public")
    assert any("not on the Hub" in line["message"] for line in events(tmp_path / "run", "warning"))
    close_session()
    with hub_server() as server:
        told_now = {**os.environ, **told(server.url, tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-m", "stages.hub", *command.split("stages.hub ")[1].split()], env=told_now, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert on_hub(server)["pytorch_lora_weights.safetensors"] == adapter_bytes(tmp_path / "run")
        assert not server.repos[REPO].private
        assert server.strange == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_said_early_ends_nothing_and_stands_nowhere(world: Path, tmp_path: Path, server: HubServer, status: int) -> None:
    server.fail("models|create", status=status, times=99)
    text = carry_out(tmp_path / "run", short(world, checkpoints=True))
    assert f"({status})" in text
    assert "python -m stages.hub push" in text
    assert TOKEN not in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_sender_that_crashes_ends_nothing(world: Path, tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.hub.run, "WAITS", ("not a number",))
    text = carry_out(tmp_path / "run", short(world, when="end"))
    assert "the process that sends to the Hub has ended with exit code 1: ValueError: could not convert string to float: 'not a number'" in text
    assert "python -m stages.hub push" in text


def test_a_disk_too_full_for_the_outbox_ends_nothing(world: Path, tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.hub.outbox._keep", full)
    text = carry_out(tmp_path / "run", short(world, checkpoints=True))
    for what in ("the checkpoint of 'expose', step 1", "the adapter of 'expose'"):
        assert f"{what} could not be put into {tmp_path / 'run' / 'hub'} to be sent: [Errno 28] No space left on device" in text
    assert list((tmp_path / "run" / "hub" / "outbox").iterdir()) == []


def test_a_run_that_is_told_to_stop_leaves_in_seconds_and_the_next_launch_sends_the_rest(world: Path, tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.hub.run, "LEAVE", 1.0)
    server.fail("PUT", status=-1, times=99, seconds=60.0)
    plan = write_plan(tmp_path / "tiny.yaml", short(world, checkpoints=True))
    child = os.fork()
    if child == 0:
        os._exit(launch([str(plan), "--out", str(tmp_path / "run")], output=tmp_path / "log")[0])
    until = time.monotonic() + 60
    while not (server.called("PUT") and (tmp_path / "log").exists() and "published to" in (tmp_path / "log").read_text()) and time.monotonic() < until:
        time.sleep(0.05)  # until the run has gone on to its end beside an upload that does not
    pids = [int(line) for line in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    assert began < until
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 143), (tmp_path / "log").read_text()
    assert time.monotonic() - began < 30
    assert list((tmp_path / "run" / "hub" / "outbox").iterdir())
    server.faults.clear()
    assert launch([str(plan), "--out", str(tmp_path / "run")], output=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    assert list((tmp_path / "run" / "hub" / "outbox").iterdir()) == []
    assert on_hub(server)["pytorch_lora_weights.safetensors"] == adapter_bytes(tmp_path / "run")


# --- models ------------------------------------------------------------------------------------------------------------------------------


def test_a_model_and_the_adapter_on_it_load_by_the_repositorys_name(world: Path, tmp_path: Path, server: HubServer) -> None:
    plan = plan_of(world, previews={"rows": 0}, publish={"repo": REPO})
    text = carry_out(tmp_path / "run", {**plan, "stages": [{**stage, "steps": 2} for stage in plan["stages"][:2]]})
    tree = on_hub(server)
    assert {"model_index.json", "transformer/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors", "README.md"} <= tree.keys()
    assert tree["transformer/diffusion_pytorch_model.safetensors"] == (tmp_path / "run" / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert b'FluxPipeline.from_pretrained("user/tiny", torch_dtype' in tree["README.md"]
    assert b'load_lora_weights("user/tiny"' in tree["README.md"]
    assert "the adapter and the model of 'expose' is on the Hub" in text


def test_a_model_alone_is_published_with_a_card(world: Path, tmp_path: Path, server: HubServer) -> None:
    plan = plan_of(world, previews={"rows": 0}, publish={"repo": REPO})
    del plan["adapter"]
    carry_out(tmp_path / "run", {**plan, "stages": [{**plan["stages"][0], "steps": 2}]})
    card = ModelCard(on_hub(server)["README.md"].decode())
    assert "lora" not in card.data.tags
    assert "every weight of its transformer" in card.text
    assert 'model: "user/tiny"' in card.text


# --- going on from the Hub ---------------------------------------------------------------------------------------------------------------


_put = stages.hub.run.Hub.put_checkpoint


def _put_and_die(self: stages.hub.run.Hub) -> None:
    """As a kill right after a checkpoint of the second stage was put into the outbox."""
    _put(self)
    if (self._folder / "stages" / "2-refine" / "step-000004").exists():
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def interrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """The repository of a run that was killed in its second stage, and whose folder is lost: what lay in its outbox was sent before."""
    folder = tmp_path_factory.mktemp("interrupted")
    with hub_server() as made, pytest.MonkeyPatch.context() as patch:
        ask(patch, made.url, folder / "home")
        patch.setattr(stages.hub.run.Hub, "put_checkpoint", _put_and_die)
        plan = write_plan(folder / "tiny.yaml", plan_with(world, when="stage", checkpoints=True))
        assert launch([str(plan), "--out", str(folder / "run")], output=folder / "log") == [-signal.SIGKILL], (folder / "log").read_text()
        assert hub.main(["push", str(folder / "run"), REPO]) == 0
        close_session()
        return made.repos[REPO]


@pytest.mark.parametrize("way", ["same command", "fetch"])
def test_a_killed_run_goes_on_from_the_hub_in_an_empty_folder_and_ends_bit_equal(
    world: Path, sent: tuple[Path, HubServer, str], interrupted: Repo, tmp_path: Path, server: HubServer, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.repos[REPO] = copy.deepcopy(interrupted)
    plan, run = write_plan(tmp_path / "tiny.yaml", plan_with(world, when="stage", checkpoints=True)), tmp_path / "run"
    found = "the checkpoint of 'refine', step 4 was fetched from user/tiny"
    if way == "fetch":
        assert hub.main(["fetch", REPO, "--out", str(run)]) == 0
        assert found in capsys.readouterr().out
    assert launch([str(plan), "--out", str(run)], output=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert (found in text) == (way == "same command")
    assert "going on with stage 'refine' after step 4" in text
    assert adapter_bytes(run) == adapter_bytes(sent[0]) == on_hub(server)["pytorch_lora_weights.safetensors"]
    losses = [[(line["stage"], line["step"], line["loss"]) for line in events(folder, "step")] for folder in (sent[0], run)]
    assert losses[0] == losses[1]
    assert json.loads(on_hub(server, "checkpoints")[MARKER])["checkpoint"] == "the checkpoint of 'refine', step 6"
    assert server.strange == []


def _die_before_the_last_is_put(self: stages.hub.run.Hub) -> None:
    if (self._folder / "stages" / "2-refine" / "step-000006").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    _put(self)


def test_a_checkpoint_that_a_killed_run_had_saved_and_not_yet_put_is_sent_by_the_next_launch(world: Path, tmp_path: Path, server: HubServer) -> None:
    plan, run = write_plan(tmp_path / "tiny.yaml", plan_with(world, checkpoints=True)), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.hub.run.Hub, "put_checkpoint", _die_before_the_last_is_put)
        assert launch([str(plan), "--out", str(run)], output=tmp_path / "log") == [-signal.SIGKILL], (tmp_path / "log").read_text()
    assert launch([str(plan), "--out", str(run)], output=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    assert json.loads(on_hub(server, "checkpoints")[MARKER])["checkpoint"] == "the checkpoint of 'refine', step 6"


def test_a_folder_with_checkpoints_of_its_own_is_not_fetched_into(sent: tuple[Path, HubServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.main(["fetch", REPO, "--out", str(sent[0])]) == 1
    assert "holds checkpoints of its own; give another folder by --out" in capsys.readouterr().err


def test_files_that_a_branch_names_outside_of_a_run_are_not_fetched(tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    repo = server.made(REPO, private=True)
    repo.commit("checkpoints", {MARKER: json.dumps({"run": "a", "checkpoint": "c", "files": {"../x.json": {"bytes": 2, "sha256": None}}}).encode(), "../x.json": b"{}"}, "evil")
    assert hub.main(["fetch", REPO, "--out", str(tmp_path / "run")]) == 1
    assert "is no file of a run; it is not fetched" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


# --- beginning from the Hub --------------------------------------------------------------------------------------------------------------


def test_a_run_begins_from_a_published_adapter_at_a_commit_that_is_written_down(world: Path, sent: tuple[Path, HubServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the folder that was published; offline too, once it was fetched; and from the same commit, though the branch has gone on."""
    run, server, _ = sent
    ask(monkeypatch, server.url, tmp_path / "home")
    plan = plan_with(world)
    plan["stages"] = [{**plan["stages"][1], "name": "more", "steps": 2}]
    before = len(server.calls)
    text = carry_out(tmp_path / "hub", {**plan, "start": f"hub:{REPO}"})
    carry_out(tmp_path / "folder", {**plan, "start": str(run / "adapter")})
    trained = [(folder / "stages" / "1-more" / "step-000002" / "adapter.safetensors").read_bytes() for folder in (tmp_path / "hub", tmp_path / "folder")]
    assert trained[0] == trained[1]
    commit = server.repos[REPO].branches["main"]
    assert json.loads((tmp_path / "hub" / "start.json").read_text()) == {"start": f"hub:{REPO}", "commit": commit}
    assert f"It began from `hub:{REPO}@{commit}`" in (tmp_path / "hub" / "adapter" / "README.md").read_text()
    assert {call.rpartition("/")[2] for call in server.calls[before:] if "resolve" in call} == {"pytorch_lora_weights.safetensors"}
    assert text
    server.repos[REPO].commit("main", {}, "gone on")
    assert fetched(f"hub:{REPO}", tmp_path / "hub", writes=False).name == commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(server.calls)
    assert fetched(f"hub:{REPO}", tmp_path / "another", writes=False).name == commit
    assert len(server.calls) == before


def test_of_two_processes_the_first_sends_and_both_begin_from_the_hub(world: Path, sent: tuple[Path, HubServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = sent[1]
    ask(monkeypatch, server.url, tmp_path / "home")
    server.made("user/from", private=True).commit("main", {name.name: name.read_bytes() for name in (sent[0] / "adapter").iterdir() if name.is_file()}, "here")
    text = carry_out(tmp_path / "run", {**short(world, repo="user/both", checkpoints=True), "start": "hub:user/from"}, processes=2)
    assert len(server.called("POST /api/models/user/both/commit/main")) == 1
    assert text.count("the adapter of 'expose' is on the Hub") == 1


def test_a_start_that_the_hub_does_not_have_is_a_sentence(world: Path, tmp_path: Path, server: HubServer) -> None:
    server.made("user/empty", private=False)
    cases = {
        "hub:user/nowhere": "it cannot be fetched: the Hub answers 404: Repository not found",
        "hub:user/empty@v9": "it cannot be fetched: ",
        "hub:user/empty": "holds no adapter (pytorch_lora_weights.safetensors, pytorch_lora_weights_2.safetensors, adapter_model.safetensors); a trained model is named by `model`",
    }
    for start, said in cases.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            fetched(start, tmp_path, writes=False)
    text = carry_out(tmp_path / "run", {**short(world), "start": "hub:user/empty"}, expect=2)
    assert "start: hub:user/empty holds no adapter" in text
    assert "Traceback" not in text


def test_names_that_the_hub_cannot_have_are_refused_with_their_place(world: Path, tmp_path: Path) -> None:
    text = carry_out(tmp_path / "run", {**short(world, repo="tiny"), "start": "hub:tiny@v1"}, "--check", expect=2)
    assert "publish.repo: 'tiny' is no name on the Hub; write user/name" in text
    assert "start: 'hub:tiny@v1': an adapter on the Hub is written hub:user/name or hub:user/name@revision" in text


def test_nothing_is_told_beside_since_the_library_is_imported_after_it_was_forbidden() -> None:
    code = "import train, sys; assert 'huggingface_hub' not in sys.modules; import stages.quiet as q; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
