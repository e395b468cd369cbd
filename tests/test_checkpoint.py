"""Checkpoints: what is torn, edited or foreign is told from what is whole, and a save that fails leaves the last one in view."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import stages.checkpoint
from stages.checkpoint import Checkpoint, keep_newest, newest_checkpoint, read_checkpoint, restore_replaced, step_folder, write_checkpoint, write_whole
from stages.disk import sync

STATE = {"stage": "only", "finished": False}


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "adapter": {"a.lora_A.weight": torch.randn(2, 6, generator=generator), "a.lora_B.weight": torch.randn(4, 2, generator=generator).T},
        "optimizer": {"a.lora_A.weight::step": torch.tensor(float(step)), "a.lora_A.weight::exp_avg": torch.randn(2, 6, generator=generator)},
    }


def write(stage: Path, step: int) -> Path:
    write_checkpoint(stage, step, tensors(step), STATE)
    return step_folder(stage, step)


def found(stage: Path) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return newest_checkpoint(stage, said.append), said


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def put(name: str, value: object) -> Callable[[Any], Any]:
    return lambda manifest: {**manifest, name: value}


def add(file: str, entry: object) -> Callable[[Any], Any]:
    return lambda manifest: {**manifest, "files": {**manifest["files"], file: entry}}


ENTRY = {"sha256": "", "bytes": 1}


# --- writing and reading ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path / "1-only", 500, tensors(500), {**STATE, "ledger": {"images": 4}})
    checkpoint = read_checkpoint(tmp_path / "1-only" / "step-000500")
    assert checkpoint.step == 500
    assert checkpoint.state["ledger"] == {"images": 4}
    for name, values in tensors(500).items():
        assert checkpoint.has(name)
        assert checkpoint.file(name).is_file()
        read = checkpoint.tensors(name)
        assert read.keys() == values.keys()
        assert all(torch.equal(read[each], value) for each, value in values.items())
    assert not checkpoint.has("ema")
    assert checkpoint.hash_of("ema") is None
    assert checkpoint.hash_of("adapter") != checkpoint.hash_of("optimizer") != None  # noqa: E711
    on_disk = sum(path.stat().st_size for path in checkpoint.folder.iterdir())
    assert size == on_disk
    assert {path.name for path in checkpoint.folder.iterdir()} == {"adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_equal_tensors_give_equal_hashes(tmp_path: Path) -> None:
    one, other = (read_checkpoint(write(tmp_path / name, 3)) for name in ("one", "other"))
    assert one.hash_of("adapter") == other.hash_of("adapter")


def test_a_step_that_is_written_again_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    stage = tmp_path / "1-only"
    write(stage, 2)
    write_checkpoint(stage, 2, tensors(9), {**STATE, "finished": True})
    checkpoint, said = found(stage)
    assert checkpoint is not None
    assert checkpoint.state["finished"]
    assert torch.equal(checkpoint.tensors("adapter")["a.lora_A.weight"], tensors(9)["adapter"]["a.lora_A.weight"])
    assert [path.name for path in stage.iterdir()] == ["step-000002"]
    assert said == []


def test_a_damaged_step_is_replaced_when_it_is_written_again(tmp_path: Path) -> None:
    flip_one_bit(write(tmp_path, 2) / "adapter.safetensors")
    write(tmp_path, 2)
    checkpoint, said = found(tmp_path)
    assert checkpoint is not None
    assert said == []


# --- what is not whole ------------------------------------------------------------------------------------------------------------------

DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda folder: flip_one_bit(folder / "adapter.safetensors"), "adapter.safetensors is not what was written"),
    "flipped bit in the state": (lambda folder: flip_one_bit(folder / "state.json"), "state.json is not what was written"),
    "truncated": (lambda folder: shorten(folder / "optimizer.safetensors"), "optimizer.safetensors is not what was written"),
    "missing tensors": (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "missing state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing; it was not finished"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "cannot be read"),
    "manifest of bytes": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "manifest is a list": (lambda folder: edit(folder / "manifest.json", lambda manifest: [manifest]), "cannot be read"),
    "manifest is nothing": (lambda folder: edit(folder / "manifest.json", lambda manifest: None), "cannot be read"),
    "files are a list": (lambda folder: edit(folder / "manifest.json", put("files", ["state.json"])), "cannot be read"),
    "a file without a hash": (lambda folder: edit(folder / "manifest.json", add("state.json", "x")), "cannot be read"),
    "a format that is no number": (lambda folder: edit(folder / "manifest.json", put("format", "3")), "'3', which is no number"),
    "path to elsewhere": (lambda folder: edit(folder / "manifest.json", add("../secret", ENTRY)), "'../secret', which is no file of its own"),
    "absolute path": (lambda folder: edit(folder / "manifest.json", add("/etc/passwd", ENTRY)), "'/etc/passwd', which is no file of its own"),
    "parent": (lambda folder: edit(folder / "manifest.json", add("..", ENTRY)), r"\.\."),
    "state without a hash": (lambda folder: edit(folder / "manifest.json", put("files", {})), "state.json"),
    "manifest is a folder": (lambda folder: [(folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()], "manifest.json"),
    "of another step": (lambda folder: edit(folder / "manifest.json", put("step", 900)), "900"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_named_with_what_is_wrong(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path, 4)
    hurt, said = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(ValueError, match=said) as caught:
        read_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken_and_the_passed_over_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 2)
    DAMAGES[damage][0](write(tmp_path, 4))
    checkpoint, said = found(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(said) == 1
    assert "skipping a checkpoint" in said[0]
    assert "step-000004" in said[0]


def test_a_checkpoint_under_another_steps_name_is_not_taken(tmp_path: Path) -> None:
    """Copied or renamed by hand: its name would outrank newer ones."""
    write(tmp_path, 2)
    write(tmp_path, 4)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000009")
    checkpoint, said = found(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert len(said) == 1


def test_tensors_that_the_manifest_does_not_name_are_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    shutil.copy(folder / "adapter.safetensors", folder / "transformer.safetensors")
    checkpoint = read_checkpoint(folder)
    assert not checkpoint.has("transformer")


def test_no_checkpoint_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert found(tmp_path / "nothing") == (None, [])
    (tmp_path / "step-final").mkdir()
    (tmp_path / ".step-000004.partial").mkdir()
    assert found(tmp_path) == (None, [])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


# --- saves that fail --------------------------------------------------------------------------------------------------------------------

FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_raises_oserror_and_leaves_the_last_checkpoint_in_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """safetensors 0.8 raises its own error where the disk is full, which is no OSError."""
    write(tmp_path, 2)
    written = 0

    def save_file(values: Mapping[str, Tensor], path: Path) -> None:
        nonlocal written
        written += 1
        if written == 2:
            path.write_bytes(b"half of it")
            raise error

    monkeypatch.setattr(stages.checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 4, tensors(4), STATE)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["step-000002"]
    checkpoint, said = found(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, said) == (2, [])
    monkeypatch.undo()
    write(tmp_path, 4)
    checkpoint, said = found(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, said) == (4, [])


def test_a_full_disk_is_not_kept_full_by_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(values: Mapping[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise FULL[0]

    monkeypatch.setattr(stages.checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 4, tensors(4), STATE)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_written_leaves_the_last_checkpoint_in_view(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, 4, tensors(4), {**STATE, "what": object()})
    checkpoint, _ = found(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_everything_is_on_the_disk_before_it_comes_into_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(stages.checkpoint, "sync", lambda path: (events.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append(f"rename to {Path(target).name}"), rename(path, target))[1])
    stage = tmp_path / "1-only"
    write(stage, 2)
    assert events[-2:] == ["rename to step-000002", "sync 1-only"]
    assert set(events[:-2]) == {"sync adapter.safetensors", "sync optimizer.safetensors", "sync state.json", "sync manifest.json", "sync .step-000002.partial"}
    assert events[-4:-2] == ["sync manifest.json", "sync .step-000002.partial"]


def test_a_checkpoint_that_a_killed_process_was_replacing_is_brought_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved when it was told to stop after its last step, a stage saves that step again once it is measured; with `keep: 1` there is no other."""
    write(tmp_path, 4)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".step-000004.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 4, tensors(9), {**STATE, "finished": True})
    assert found(tmp_path) == (None, [])
    restore_replaced(tmp_path)
    checkpoint, said = found(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["finished"], said) == (4, False, [])
    write_checkpoint(tmp_path, 4, tensors(9), {**STATE, "finished": True})
    (tmp_path / ".step-000004.old").mkdir()
    restore_replaced(tmp_path)
    checkpoint, _ = found(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["finished"]


# --- what is kept -----------------------------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1_000_000):
        write(tmp_path, step)
    (tmp_path / ".step-000030.partial").mkdir()
    (tmp_path / ".step-000020.old").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    keep_newest(tmp_path, 2, 1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-000100", "step-1000000"]


def test_a_checkpoint_just_written_is_not_deleted_for_a_damaged_one_of_a_later_step(tmp_path: Path) -> None:
    """Step 4 was damaged, the run went on from step 2, and a signal stopped it at step 3: 3 is all there is."""
    write(tmp_path, 2)
    flip_one_bit(write(tmp_path, 4) / "adapter.safetensors")
    write(tmp_path, 3)
    keep_newest(tmp_path, 1, 3)
    checkpoint, _ = found(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 3


# --- text -------------------------------------------------------------------------------------------------------------------------------


def test_text_is_written_whole_or_stands_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.json"
    write_whole(path, "first ☂")
    write_whole(path, "second")
    assert path.read_text() == "second"

    def full(path: Path) -> None:
        raise FULL[0]

    monkeypatch.setattr(stages.checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "third")
    assert path.read_text() == "second"
