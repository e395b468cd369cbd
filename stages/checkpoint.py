"""Checkpoints: folders that appear whole or not at all, are recognised by their hashes, and hold only safetensors and JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixing.plain_file import read_plain
from stages.digests import file_digest
from stages.disk import sync
from stages.formats import FORMAT, FormatError, check_format, upgraded
from stages.problems import RunError

_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found as they were written."""

    folder: Path
    step: int
    state: Mapping[str, Any]
    """As today's format has it, whichever the checkpoint was written in."""

    files: Mapping[str, str]
    """The SHA-256 of each of its files, by name."""

    def has(self, name: str) -> bool:
        """Whether it holds tensors of this name."""
        return f"{name}.safetensors" in self.files

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under a name (`adapter`, `transformer`, `optimizer`, `ema`, `probe`), on the CPU. Raises RunError if the file holds none, as one that another put there."""
        file = self.file(name)
        try:
            tensors: dict[str, Tensor] = load_file(file)
        except SafetensorError as error:
            raise RunError(f"{file} is no safetensors file ({error}), though its manifest names it; remove {self.folder}, and the same command goes on from the checkpoint before") from None
        return tensors

    def hash_of(self, name: str) -> str | None:
        """The SHA-256 of the file of the tensors of this name, or None if there are none."""
        return self.files.get(f"{name}.safetensors")

    def file(self, name: str) -> Path:
        """The file of the tensors of this name."""
        return self.folder / f"{name}.safetensors"


def step_folder(stage_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return stage_folder / f"step-{step:06d}"


def write_checkpoint(stage_folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> int:
    """Write a checkpoint beside its place, sync it, and rename it into view; return the bytes of what it holds.

    A checkpoint that already stands there is replaced. Raises OSError, leaving nothing, where the disk is full.
    """
    place = step_folder(stage_folder, step)
    partial = stage_folder / f".{place.name}.partial"
    delete(partial)
    stage_folder.mkdir(exist_ok=True)  # and not what is above it: a run folder that was taken away meanwhile would come back with this alone
    partial.mkdir()
    try:
        _fill(partial, step, tensors, state)
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{place}: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if os.path.lexists(place):
        old = stage_folder / f".{place.name}.old"
        delete(old)
        place.rename(old)
        partial.rename(place)
        delete(old)
    else:
        partial.rename(place)
    sync(stage_folder)
    return sum(path.stat().st_size for path in place.iterdir())


def restore_replaced(stage_folder: Path) -> None:
    """Bring back a checkpoint that was to be replaced, where a process was killed before the new one came into its place. Raises OSError."""
    for old in stage_folder.glob(".step-*.old"):
        place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not os.path.lexists(place):
            old.rename(place)


def _fill(partial: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for name, values in tensors.items():
        save_file({key: value.contiguous() for key, value in values.items()}, partial / f"{name}.safetensors")
    (partial / _STATE).write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1), encoding="utf-8")
    files = {path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size} for path in sorted(partial.iterdir())}
    for name in files:
        sync(partial / name)
    (partial / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
    sync(partial / _MANIFEST)
    sync(partial)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, checked against its manifest. Raises ValueError, saying what is wrong, if it is torn, edited or foreign, and FormatError if this version does not read its format."""
    try:
        manifest = json.loads(read_plain(folder / _MANIFEST))
        found = check_format(folder, manifest["format"])  # before all else, which another format may keep elsewhere
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise ValueError(f"{folder}: its manifest names '{name}', which is no file of its own")
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{folder}: {name} is missing")
            if path.stat().st_size != entry["bytes"] or file_digest(path) != entry["sha256"]:
                raise ValueError(f"{folder}: {name} is not what was written (its hash differs)")
        if _STATE not in manifest["files"]:
            raise ValueError(f"{folder}: its manifest does not name {_STATE}")
        state = json.loads(read_plain(folder / _STATE))
        for step in (manifest["step"], state["step"]):
            if step_folder(folder.parent, step).name != folder.name:
                raise ValueError(f"{folder}: it is the checkpoint of step {step}")
        if state["format"] != found:
            raise ValueError(f"{folder}: its manifest is of format {found}, its state of {state['format']}")
        return Checkpoint(folder, int(state["step"]), upgraded(state), {name: str(entry["sha256"]) for name, entry in manifest["files"].items()})
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {Path(error.filename).name} is missing; it was not finished") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ValueError(f"{folder}: its {_MANIFEST} or {_STATE} cannot be read ({error})") from None


def newest_checkpoint(stage_folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of the highest step that is whole, or None; each one that is passed over is named through `say`.

    Raises FormatError if one of them may be whole, and this version cannot tell: passed over, it would be deleted when the next one is written.
    """
    for folder in sorted(_steps(stage_folder), key=lambda path: int(path.name[5:]), reverse=True):
        try:
            return read_checkpoint(folder)
        except FormatError:
            raise
        except ValueError as error:
            say(f"skipping a checkpoint: {error}")
    return None


def keep_newest(stage_folder: Path, number: int, written: int) -> None:
    """Delete all but the newest checkpoints of a stage up to the step just written, and what a killed process left half-written.

    Later steps than that can only be damaged ones, from before the run went on from an earlier checkpoint: they go too.
    """
    steps = {int(folder.name.removeprefix("step-")): folder for folder in _steps(stage_folder)}
    kept = sorted(step for step in steps if step <= written)[-number:]
    for step in steps.keys() - set(kept):
        delete(steps[step])
    for leftover in stage_folder.glob(".step-*"):
        delete(leftover)


def delete(path: Path) -> None:
    """Delete a folder with what is in it, or whatever else another has put in its place, if it is there; of a link the link. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or as it was before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _steps(stage_folder: Path) -> list[Path]:
    return [path for path in stage_folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()] if stage_folder.is_dir() else []
