"""Hub files: which files of a run folder are sent, and under which names. Imports neither torch nor huggingface_hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from safetensors import safe_open

from stages.hub.outbox import Parcel
from stages.log_files import LogName, closed_files, file_of, is_log_file, place_of

CHECKPOINTS = "checkpoints"
"""The branch that checkpoints go to."""
MARKER = "medley.json"
"""The file on that branch that says which run they are of, and which files Medley has put there; no other file is ever deleted."""

_TOP = ("plan.yaml", "environment.json", "ledger.json", "start.json")
_LOGS: tuple[LogName, ...] = ("metrics", "trace")
_SUFFIXES = (".safetensors", ".json", ".jsonl", ".yaml", ".png", ".jpg")
_ADAPTERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors", "adapter_model.safetensors")
_MOST_SOURCES = 6


def trained_files(run_folder: Path) -> dict[str, Path]:
    """What a repository shows: the adapter's folder, and the files of the model where its weights were trained, side by side, so that both load by the repository's name."""
    found = {}
    for folder in (run_folder / "model", run_folder / "adapter"):  # the adapter's card, where there are two
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not name.startswith(".") and name != MARKER:
                found[name] = path
    return found


def trained_mark(run_folder: Path) -> str:
    """Tells what was published apart: of the checkpoints that adapter and model were made from, and of the card."""
    marks = []
    for name in _ADAPTERS:
        if (file := run_folder / "adapter" / name).is_file():
            with safe_open(file, framework="numpy") as header:
                marks.append(str((header.metadata() or {}).get("medley.checkpoint", "")))
    if (file := run_folder / "model" / MARKER).is_file():
        marks.append(str(json.loads(file.read_text(encoding="utf-8"))["checkpoint"]))
    marks += [file.read_text(encoding="utf-8") for folder in ("adapter", "model") if (file := run_folder / folder / "README.md").is_file()]
    return sha256("\n".join(marks).encode()).hexdigest()


def trained_words(run_folder: Path) -> str:
    """What is published, in words."""
    has_adapter, has_model = (run_folder / "adapter").is_dir(), (run_folder / "model").is_dir()
    return "the adapter and the model" if has_adapter and has_model else "the model" if has_model else "the adapter"


def losses_words(run_folder: Path, stage: str) -> str:
    """What a stage's last evaluation found, for the message of a commit: `refine: held-out loss photos 0.251, edits 0.355`."""
    from stages.report.record import read_record  # takes a second, and the process that sends has no need of it

    record = read_record(run_folder)
    latest = next((found.latest for found in record.begun if found.name == stage), None)
    if latest is None or not latest.sources:
        return stage
    losses = [f"{name} {measured.loss:.3f}" for name, measured in latest.sources.items()]
    return f"{stage}: held-out loss {', '.join(losses[:_MOST_SOURCES])}{', ...' if len(losses) > _MOST_SOURCES else ''}"


@dataclass(frozen=True)
class Resumable:
    """What a run can be gone on with from on another machine."""

    files: dict[str, Path]
    """By name, which is the place in the run folder."""
    first_bytes: dict[str, int]
    """Of files that grow, how much of them belongs to the checkpoint."""
    stage: str
    step: int
    mark: str
    """Tells the checkpoint apart: a step that was saved when a run was told to stop after it is saved again once it is measured."""

    def parcel(self, repo: str, *, private: bool) -> Parcel:
        """What sends it."""
        words = f"{self.stage}, step {self.step}"
        return Parcel("checkpoint", repo, private, CHECKPOINTS, words, f"the checkpoint of '{self.stage}', step {self.step}", self.mark)


def resumable(run_folder: Path) -> Resumable | None:
    """The newest checkpoint of every stage, and what stands beside them; None if there is none."""
    files, newest = {}, None
    for folder in sorted((run_folder / "stages").glob("[0-9]*-*"), key=lambda path: int(path.name.split("-")[0])):
        for steps in (folder, folder / "base"):  # the base that an adapter was folded into lies in the stage's folder
            found = [path for path in steps.glob("step-*") if path.name.removeprefix("step-").isdigit() and (path / "manifest.json").is_file()]
            if found:
                last = max(found, key=lambda path: int(path.name.removeprefix("step-")))
                files.update({path.relative_to(run_folder).as_posix(): path for path in sorted(last.iterdir())})
                newest = last if steps == folder else newest
    if newest is None:
        return None
    files.update({name: run_folder / name for name in _TOP if (run_folder / name).is_file()})
    for folder in (run_folder / "evaluations", run_folder / "previews"):
        files.update({name: path for path in sorted(folder.rglob("*")) if path.is_file() and is_resumable(name := path.relative_to(run_folder).as_posix())})
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    grow = {}
    for log in _LOGS:
        place = place_of(log, state)
        files.update({path.name: path for part, path in closed_files(run_folder, log).items() if part < place.part})
        if (last_part := file_of(run_folder, log, place.part)).is_file():
            files[last_part.name], grow[last_part.name] = last_part, place.bytes
    return Resumable(files, grow, str(state["stage"]), int(state["step"]), sha256((newest / "manifest.json").read_bytes()).hexdigest())


def is_resumable(name: str) -> bool:
    """Whether a name that the Hub gives may be written into a run folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or any(part.startswith(".") for part in path.parts) or path.suffix not in _SUFFIXES:
        return False
    return name in _TOP or is_log_file(name) or (len(path.parts) > 1 and path.parts[0] in ("stages", "evaluations", "previews"))


def known_hashes(files: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of files that a manifest beside them names; only those that a checkpoint wrote."""
    known = {}
    for name, path in files.items():
        if path.name == "manifest.json":
            entries = json.loads(path.read_text(encoding="utf-8"))["files"]
            known.update({f"{name.removesuffix('manifest.json')}{file}": str(entry["sha256"]) for file, entry in entries.items()})
    return {name: digest for name, digest in known.items() if name in files and re.fullmatch(r"[0-9a-f]{64}", digest)}


def bytes_said(number: int) -> str:
    """Bytes as people say them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"
