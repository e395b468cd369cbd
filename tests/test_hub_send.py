"""Sending to the Hub, against one in memory: what is sent, what is tried again, what is refused, and what is never touched or said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session

from hub_server import TOKEN, HubServer, hub_server
from stages.checkpoint import write_checkpoint
from stages.hub import send as hub_send
from stages.hub.fetch import FetchError, fetch_run
from stages.hub.files import MARKER, is_resumable, resumable
from stages.hub.outbox import Job, Outbox, Parcel
from stages.hub.send import send_all
from stages.hub.words import is_repo, published
from stages.log_files import BEGINNING, saved_place

REPO = "user/adapter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process asks, with a token that it takes."""
    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))  # huggingface_hub's own waits
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        close_session()


class Sending:
    """An outbox, and what was said while it was sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outbox, self.said, self.passed_over = folder, Outbox(folder), list[tuple[str, str]](), set[str]()
        self.outbox.open()

    def put(self, kind: str = "trained", *, repo: str = REPO, branch: str = "main", mark: str = "a", private: bool = True, **files: str | bytes) -> None:
        """Put files into the outbox; two underscores in a name stand for a dot."""
        paths = {}
        for name, content in files.items():
            path = self.folder / "given" / name.replace("__", ".")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.unlink(missing_ok=True)  # weights are never written to in their place
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            paths[name.replace("__", ".")] = path
        parcel = Parcel("checkpoint" if kind == "checkpoint" else "trained", repo, private, branch, f"message {mark}", f"the {kind}", mark)
        self.outbox.put(parcel, paths)

    def checkpoint(self, step: int, **files: str | bytes) -> None:
        """Put a checkpoint into the outbox."""
        self.put("checkpoint", branch="checkpoints", mark=str(step), **files)

    def send(self) -> None:
        """Send all; what was refused before is tried again."""
        self.passed_over.clear()
        send_all(self.outbox, lambda kind, text: self.said.append((kind, text)), (0.0,), passed_over=self.passed_over)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.said]

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.said)


@pytest.fixture
def sending(tmp_path: Path) -> Sending:
    return Sending(tmp_path)


def on_hub(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    tree = hub.repos[REPO].tree(branch)
    assert tree is not None
    return {name: content for name, content in tree.items() if name != ".gitattributes"}


# --- what is sent ------------------------------------------------------------------------------------------------------------------------


def test_what_lies_in_the_outbox_is_on_the_hub_byte_for_byte_in_a_private_repository(hub: HubServer, sending: Sending) -> None:
    sending.put(a__safetensors=b"weights" * 1000, b__json="{}")
    sending.send()
    assert sending.kinds == ["say", "sent"], sending.text
    assert on_hub(hub) == {"a.safetensors": b"weights" * 1000, "b.json": b"{}"}
    assert hub.repos[REPO].private
    assert hub.repos[REPO].messages["main"][-1] == "message a"
    assert sending.outbox.jobs() == []
    assert hub.strange == []


def test_a_public_repository_is_made_only_where_it_is_asked_for(hub: HubServer, sending: Sending) -> None:
    sending.put(private=False, a__json="{}")
    sending.send()
    assert not hub.repos[REPO].private


def test_the_visibility_of_a_repository_that_is_there_is_said_and_never_changed(hub: HubServer) -> None:
    hub.made(REPO, private=False)
    assert "it is public, not private as asked, and stays so" in hub_send.make_contact(HfApi(), REPO, private=True)
    assert not hub.repos[REPO].private
    assert hub.called("settings|create") == []


def test_jobs_go_in_their_order_and_of_checkpoints_only_the_newest(hub: HubServer, sending: Sending) -> None:
    """Those that wait give way to a newer one at once, for they take room; that which is being sent does not."""
    sending.checkpoint(0, metrics__jsonl="0")
    sending.outbox.jobs()[0].take()
    for step in (1, 2, 3):
        sending.checkpoint(step, metrics__jsonl=str(step))
    assert [job.parcel.mark for job in sending.outbox.jobs()] == ["0", "3"]
    sending.put(mark="a", a__json="{}")
    sending.send()
    assert json.loads(on_hub(hub, "checkpoints")[MARKER])["run"] == sending.outbox.run
    assert on_hub(hub, "checkpoints")["metrics.jsonl"] == b"3"
    assert [entry["mark"] for entry in sending.outbox.sent()] == ["3", "a"]


def test_a_checkpoint_gives_way_only_once_the_newer_one_lies_there(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    sending.checkpoint(1, metrics__jsonl="1")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            sending.checkpoint(2, metrics__jsonl="2")
    assert [job.parcel.mark for job in sending.outbox.jobs()] == ["1"]
    sending.checkpoint(2, metrics__jsonl="2")
    assert [job.parcel.mark for job in sending.outbox.jobs()] == ["2"]


def test_what_was_sent_last_is_not_put_into_the_outbox_again(hub: HubServer, sending: Sending) -> None:
    sending.put(mark="a", a__json="{}")
    sending.put(mark="a", a__json="{}")
    assert len(sending.outbox.jobs()) == 1
    sending.send()
    sending.put(mark="a", a__json="{}")
    assert sending.outbox.jobs() == []
    sending.put(mark="b", a__json="{}")
    assert len(sending.outbox.jobs()) == 1


def test_a_step_that_is_saved_again_is_sent_again(hub: HubServer, sending: Sending) -> None:
    """Told to stop after its last step, a stage saves it before it is measured, and again once it is; another machine is to go on from the second."""

    def saved(*, finished: bool, **more: torch.Tensor) -> Job | None:
        places = {**saved_place("metrics", BEGINNING), **saved_place("trace", BEGINNING)}
        (sending.folder / "stages").mkdir(exist_ok=True)
        write_checkpoint(sending.folder / "stages" / "1-a", 4, {"adapter": {"a": torch.ones(2)}, **{name: {"p": value} for name, value in more.items()}}, {"stage": "a", "step": 4, "finished": finished, **places})
        found = resumable(sending.folder)
        assert found is not None
        return sending.outbox.put(found.parcel(REPO, private=True), found.files, first_bytes=found.first_bytes)

    assert saved(finished=False) is not None
    assert saved(finished=False) is None, "nothing of it is new"
    sending.send()
    assert saved(finished=False) is None
    assert saved(finished=True, probe=torch.zeros(3)) is not None
    sending.send()
    place = "stages/1-a/step-000004/"
    there = on_hub(hub, "checkpoints")
    assert json.loads(there[f"{place}state.json"])["finished"] is True
    assert f"{place}probe.safetensors" in there


@pytest.mark.parametrize("content", ["", "[]", "null", '{"kind": "trained"}', '{"kind": "a later version\'s", "repo": "user/adapter", "private": true, "branch": "main", "message": "", "words": "", "mark": "a"}', "[" * 100_000])
def test_what_cannot_be_read_in_the_outbox_is_taken_away_and_is_put_there_anew(sending: Sending, content: str) -> None:
    """By a later version of Medley, or damaged: neither a traceback nor something that is never sent."""
    sending.put(a__json="1")
    [job] = sending.outbox.jobs()
    (job.folder / "job.json").write_text(content)
    assert sending.outbox.jobs() == []
    (sending.outbox.folder / "sent.json").write_text(content)
    assert sending.outbox.sent() == []
    sending.outbox.open()
    assert not job.folder.exists()
    assert sending.outbox.run
    sending.put(a__json="1")
    assert [again.files.keys() for again in sending.outbox.jobs()] == [{"a.json"}]


def test_fields_that_a_later_version_adds_to_the_outbox_are_passed_over(hub: HubServer, sending: Sending) -> None:
    sending.put(a__json="1")
    [job] = sending.outbox.jobs()
    note, sent = job.folder / "job.json", sending.outbox.folder / "sent.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "new": 1}))
    sent.write_text(json.dumps({**json.loads(sent.read_text()), "new": 1}))
    run = sending.outbox.run
    sending.outbox.open()
    sending.send()
    assert sending.kinds == ["say", "sent"], sending.text
    assert sending.outbox.run == run


@pytest.mark.parametrize("marker", [b"", b"[]", b'{"run": "a"}', b'{"run": "a", "checkpoint": "c", "files": {"x": {}}}'])
def test_a_branch_whose_marker_cannot_be_read_is_left_alone(hub: HubServer, sending: Sending, tmp_path: Path, marker: bytes) -> None:
    repo = hub.made(REPO, private=True)
    repo.commit("checkpoints", {MARKER: marker, "one.json": b"1"}, "by a later version")
    sending.checkpoint(1, one__json="2")
    sending.send()
    assert sending.kinds[-1] == "refused"
    assert f"{MARKER} on the branch 'checkpoints' of {REPO} cannot be read; delete the branch, or update Medley" in sending.text
    assert on_hub(hub, "checkpoints")["one.json"] == b"1"
    with pytest.raises(FetchError, match="cannot be read"):
        fetch_run(REPO, tmp_path / "fetched")


def test_a_job_is_what_it_was_when_it_was_put_there(sending: Sending) -> None:
    """Weights are replaced by renaming, as checkpoints and adapters are; files that grow are cut."""
    sending.put(a__safetensors=b"old", grows__jsonl="one\n")
    for name in ("a.safetensors", "grows.jsonl"):
        (sending.folder / "given" / name).unlink()
    (job,) = sending.outbox.jobs()
    assert {name: path.read_bytes() for name, path in job.files.items()} == {"a.safetensors": b"old", "grows.jsonl": b"one\n"}
    grows = sending.folder / "metrics.jsonl"
    grows.write_text("one\ntwo\n")
    made = sending.outbox.put(Parcel("trained", REPO, True, "main", "m", "w", "z"), {"metrics.jsonl": grows}, first_bytes={"metrics.jsonl": 4})
    assert made is not None
    assert made.files["metrics.jsonl"].read_text() == "one\n"
    assert grows.read_text() == "one\ntwo\n"


def test_what_an_earlier_stage_sent_and_this_one_has_not_is_taken_away_and_nothing_else(hub: HubServer, sending: Sending) -> None:
    repo = hub.made(REPO, private=True)
    repo.commit("main", {**(repo.tree("main") or {}), "mine.txt": b"of the user"}, "mine")
    sending.put(mark="a", a__json="a", old__safetensors=b"old")
    sending.send()
    sending.put(mark="b", a__json="b")
    sending.send()
    assert on_hub(hub) == {"mine.txt": b"of the user", "a.json": b"b"}


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["GET /api/models", "POST /api/repos/create", "preupload", "objects/batch", "PUT /objects", "verify", "POST /api/models/user/adapter/commit"])
@pytest.mark.parametrize("status", [500, 0], ids=["500", "dropped"])
def test_what_fails_is_tried_again_until_it_is_there(hub: HubServer, sending: Sending, pattern: str, status: int) -> None:
    hub.fail(pattern, status, times=8)  # more often than huggingface_hub itself tries
    sending.put(a__safetensors=b"weights" * 100_000)
    sending.send()
    assert on_hub(hub) == {"a.safetensors": b"weights" * 100_000}
    assert sending.kinds[-1] == "sent"
    assert "late" in sending.kinds


def test_what_the_hub_has_already_is_not_sent_again(hub: HubServer, sending: Sending) -> None:
    """Cut off between two files, and again before the commit, as by a kill: another process goes on."""
    sending.put(a__safetensors=b"one" * 1000, b__safetensors=b"two" * 1000)
    hub.fail("PUT /objects", status=403, times=1)
    sending.send()
    assert sending.kinds == ["say", "refused"]
    assert len(hub.objects) == 1
    hub.fail("commit", status=403)
    Sending(sending.folder).send()
    assert len(hub.called("PUT /objects")) == 3
    Sending(sending.folder).send()
    assert len(hub.called("PUT /objects")) == 3
    assert on_hub(hub) == {"a.safetensors": b"one" * 1000, "b.safetensors": b"two" * 1000}


@pytest.mark.parametrize(("status", "cure"), [(401, "set HF_TOKEN, or type: hf auth login"), (403, "give it write access to the repository")])
def test_a_token_that_may_not_is_refused_with_the_cure_and_never_said(hub: HubServer, sending: Sending, status: int, cure: str) -> None:
    """The server says the token in its answer, as a careless proxy does."""
    hub.made(REPO, private=True)
    hub.fail("commit|create|auth-check", status=status, times=9)
    sending.put(a__safetensors=b"weights")
    sending.send()
    assert sending.kinds == ["refused"]
    assert cure in sending.text
    assert TOKEN not in sending.text
    assert [job.parcel.words for job in sending.outbox.jobs()] == ["the trained"]
    hub.faults.clear()
    sending.send()
    assert sending.kinds[-1] == "sent"


def test_errors_that_quote_the_server_leave_out_the_token_and_what_signs_an_address(hub: HubServer, sending: Sending) -> None:
    hub.fail("PUT /objects|preupload", status=400, times=2)
    sending.put(a__safetensors=b"weights")
    sending.send()
    sending.send()
    assert "400 on request, for Bearer (token)" in sending.text
    assert TOKEN not in sending.text
    assert "signature" not in sending.text


def test_without_a_token_nothing_is_asked_and_the_cure_is_said(hub: HubServer, sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_send, "get_token", lambda: None)
    sending.put(a__json="{}")
    sending.send()
    assert "there is no token; set HF_TOKEN" in sending.text
    assert hub.calls == []


def test_offline_nothing_is_asked(hub: HubServer, sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sending.put(a__json="{}")
    sending.send()
    assert "HF_HUB_OFFLINE is set" in sending.text
    assert hub.calls == []


def test_another_users_repository_is_refused_before_anything_is_sent(hub: HubServer, sending: Sending) -> None:
    hub.made("other/adapter", private=False)
    sending.put(repo="other/adapter", a__safetensors=b"weights")
    sending.put(repo="other/new", mark="b", a__safetensors=b"weights")
    sending.send()
    assert sending.kinds == ["refused", "refused"]
    assert hub.called("PUT|commit") == []


# --- checkpoints -------------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_takes_the_place_of_the_one_before_and_leaves_no_history(hub: HubServer, sending: Sending) -> None:
    sending.checkpoint(1, step__safetensors=b"one", metrics__jsonl="a")
    sending.send()
    sending.checkpoint(2, other__safetensors=b"two", metrics__jsonl="a")
    sending.send()
    assert set(on_hub(hub, "checkpoints")) == {"other.safetensors", "metrics.jsonl", MARKER}
    assert hub.repos[REPO].messages["checkpoints"] == ["message 2"]
    assert on_hub(hub) == {}


def test_files_of_a_checkpoint_that_the_user_put_on_the_branch_stay_there(hub: HubServer, sending: Sending) -> None:
    sending.checkpoint(1, one__json="1")
    sending.send()
    repo = hub.repos[REPO]
    tree = dict(repo.tree("checkpoints") or {})
    del tree["one.json"]  # and what was taken away by hand is not missed
    repo.commit("checkpoints", {**tree, "notes.txt": b"of the user"}, "mine")
    sending.checkpoint(2, two__json="2")
    sending.send()
    assert set(on_hub(hub, "checkpoints")) == {"two.json", "notes.txt", MARKER}


def test_a_branch_that_medley_did_not_make_is_left_alone(hub: HubServer, sending: Sending) -> None:
    repo = hub.made(REPO, private=True)
    repo.commit("checkpoints", {"mine.txt": b"of the user"}, "mine")
    sending.checkpoint(1, one__json="1")
    sending.send()
    assert "a branch 'checkpoints' that Medley did not make; delete it, or publish to another repository" in sending.text
    assert on_hub(hub, "checkpoints") == {"mine.txt": b"of the user"}


def test_a_branch_that_was_just_made_when_the_sender_was_killed_is_its_own(hub: HubServer, sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    sending.checkpoint(1, one__json="1")

    def killed(api: HfApi, *arguments: object, made: Any = HfApi.create_branch, **named: object) -> None:
        made(api, *arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_branch", killed)
        with pytest.raises(KeyboardInterrupt):
            sending.send()
    sending.send()
    assert sending.kinds[-1] == "note", sending.text
    assert on_hub(hub, "checkpoints")["one.json"] == b"1"


def test_the_checkpoints_of_another_run_are_left_alone(hub: HubServer, sending: Sending, tmp_path: Path) -> None:
    sending.checkpoint(1, one__json="1")
    sending.send()
    other = Sending(tmp_path / "other")
    other.checkpoint(7, seven__json="7")
    other.send()
    assert "holds the checkpoints of another run" in other.text
    assert "one.json" in on_hub(hub, "checkpoints")


def test_a_checkpoint_that_gives_way_while_it_is_taken_is_no_failure(hub: HubServer, sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    sending.checkpoint(1, one__json="1")
    take = Job.take

    def taken(job: Job) -> None:
        if job.parcel.mark == "1":
            sending.checkpoint(2, two__json="2")
        take(job)

    monkeypatch.setattr(Job, "take", taken)
    sending.send()
    assert sending.kinds == ["note", "note"]
    assert set(on_hub(hub, "checkpoints")) == {"two.json", MARKER}


def test_a_squash_that_failed_is_made_up_for(hub: HubServer, sending: Sending) -> None:
    hub.fail("super-squash", status=500)
    sending.checkpoint(1, one__json="1")
    sending.send()
    assert sending.kinds == ["note", "late", "note", "note"]
    assert hub.repos[REPO].messages["checkpoints"] == ["message 1"]


# --- names -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../plan.yaml", "/etc/plan.yaml", "stages/../../x.json", "stages/1-a/.hidden.json", "stages/1-a/code.py", "adapter/x.safetensors", "stages\\x.json", ".lock", "x.json"])
def test_only_a_runs_own_files_are_written_where_the_hub_names_them(name: str) -> None:
    assert not is_resumable(name)
    assert is_resumable("stages/1-a/step-000002/adapter.safetensors")


@pytest.mark.parametrize(("name", "is_one"), [("user/name", True), ("u/n.1-b_c", True), ("name", False), ("a/b/c", False), ("a/b--c", False), ("a/b.git", False), ("a/-b", False), ("a/" + "b" * 96, False)])
def test_names_of_the_hub(name: str, is_one: bool) -> None:
    assert is_repo(name) == is_one
    assert (published(f"hub:{name}") is not None) == is_one
    assert (published(f"hub:{name}@v1") is not None) == is_one
    assert published(f"hub:{name}@") is None
