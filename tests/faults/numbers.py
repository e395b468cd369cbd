"""Numbers that are none, on one process of two and on one alone: a step is skipped on all of them, the rows are named, and a run that has too many ends at its last checkpoint.

    cd tests && ../.venv/bin/python -m faults.numbers --whole

Once: a try is lost unless the run goes on to its end with weights that are numbers and the same on every process, the faulty step moved none of them, the event names the very row, and
a run that is killed after it and goes on ends byte for byte as one that was not. Always: unless the run ends with exit code 1, without a traceback, names its last checkpoint, and the same
command goes through once the fault is gone. The short form does two of each; the whole one takes some minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import os  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from faults.number_faults import INF_LOSS, NAN_GRADIENT, NAN_LATENTS, NAN_LOSS, OVERFLOW, WRONG, NumberFault  # noqa: E402
from faults.table import Fault, main  # noqa: E402
from models import tiny_flux  # noqa: E402
from runs import FSDP2, NOTHING, events, make_data, plan_of, started, write_plan  # noqa: E402
from stages import guard  # noqa: E402

STEPS, AT, SKIPS = 12, 5, 3
SOON = 8  # steps of a stage before a spike can be told, in the place of the usual number
KINDS = (INF_LOSS, NAN_GRADIENT, NAN_LOSS, NAN_LATENTS, OVERFLOW)


class Lost(Exception):
    """What was promised and not kept."""


def make_world(folder: Path) -> Path:
    """Data, and a model with a VAE."""
    make_data(folder / "data")
    tiny_flux(folder / "latent", pixels=False)
    return folder


def plan(world: Path, **stage: Any) -> dict[str, Any]:
    """One stage with references and a moving average. Nothing is kept in a cache, so that latents are made anew at each step."""
    found = plan_of(world, model=str(world / "latent"), cache="none", log_every=1, previews={"rows": 0})
    asked = {"steps": STEPS, "resolution": 16, "batch": {"images": 8, "micro": 2}, "lr": 0.01, "precision": "fp32", "ema": 0.9, "guard": {"skips": SKIPS}}
    found["stages"] = [{"name": "learn", **asked, **stage}]
    if stage.get("train") == "full":
        del found["adapter"]
    return found


def carried_out(folder: Path, asked: Mapping[str, Any], fault: NumberFault | None, processes: int, told: Mapping[str, str] = NOTHING) -> list[int]:
    """Carry out a plan in forked processes, with a fault; their exit codes. told: as of `runs.started`."""
    folder.mkdir(exist_ok=True)

    def before(rank: int) -> None:
        guard.FEWEST = SOON
        if fault is not None:
            fault.put_in(rank, folder / "note")

    file = write_plan(folder / "plan.yaml", asked)
    children = started([str(file), "--out", str(folder / "run")], processes=processes, output=folder / "log", timeout=300, told=told, before=before)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said(folder: Path) -> str:
    """All that the processes printed."""
    return (folder / "log").read_text(errors="replace")


def _must(holds: object, what: str, folder: Path) -> None:
    if not holds:
        raise Lost(f"{what}: {' / '.join(said(folder).splitlines()[-4:])} ({folder})")


def _tensor_files(folder: Path) -> list[Path]:
    """Weights, moments and averages: those of the last checkpoint of the stage."""
    newest = max((folder / "run" / "stages" / "1-learn").glob("step-*"))
    return sorted(newest.glob("*.safetensors"))


def _is_sound(folder: Path) -> bool:
    """Whether it holds numbers alone."""
    return all(bool(value.isfinite().all()) for file in _tensor_files(folder) for value in load_file(file).values() if value.is_floating_point())


def _weights(folder: Path, step: int) -> set[str]:
    """Hashes of the weights of all processes after a step."""
    return {file.read_text() for file in (folder / "note").glob(f"weights-learn-{step}-*")}


def _hit(folder: Path, step: int) -> tuple[str, str]:
    source, key = json.loads((folder / "note" / f"hit-{step}.json").read_text())
    return source, key


def once(world: Path, folder: Path, kind: str, processes: int, told: Mapping[str, str] = NOTHING, **stage: Any) -> None:
    """At one step of the last process. Raises Lost."""
    asked = plan(world, **stage, **({"precision": "fp16"} if kind == OVERFLOW else {}))
    whole, killed = folder / "whole", folder / "killed"
    rank = processes - 1
    codes = carried_out(whole, asked, NumberFault(kind, rank, AT), processes, told)
    _must(codes == [0] * processes, f"ended in {codes}", whole)
    _must(_is_sound(whole), "the last checkpoint holds what is no number", whole)
    _must(all(len(_weights(whole, step)) == 1 for step in range(1, STEPS + 1)), "processes hold other weights", whole)
    found = events(whole / "run", "guard")
    if kind == OVERFLOW:
        _must(not found and events(whole / "run", "step")[-1]["skipped"] > 0, "fp16 skipped nothing, or the guard did", whole)
    else:
        _must(_weights(whole, AT) == _weights(whole, AT - 1) != _weights(whole, AT + 1), "the step was not skipped, or one that was sound was", whole)
        _must([(event["step"], event["skipped"]) for event in found] == [(AT, True)], f"events: {found}", whole)
        rows = [(row["source"], row["key"]) for row in found[0]["rows"]]
        _must(_hit(whole, AT) in rows if kind == NAN_GRADIENT else rows == [_hit(whole, AT)], f"named {rows} in the place of {_hit(whole, AT)}", whole)
        _must(kind != NAN_LATENTS or found[0]["rows"][0]["not_finite"] == "latents", "did not say that it was the latents", whole)
        _must([line["skipped"] for line in events(whole / "run", "step") if "skipped" in line] == [1] * (STEPS - AT + 1), "lines of the log do not say what was skipped", whole)
    _must(all(line["loss"] is not None and np.isfinite(line["loss"]) for line in events(whole / "run", "step")), "a line of the log has no loss", whole)
    carried_out(killed, asked, NumberFault(kind, rank, AT, kill_after=AT + 2), processes, told)
    codes = carried_out(killed, asked, NumberFault(kind, rank, AT, kill_after=AT + 2), processes, told)
    _must(codes == [0] * processes, f"went on and ended in {codes}", killed)
    ends = [{file.name: file.read_bytes() for file in (*_tensor_files(each), *(each / "run").glob("adapter/*.safetensors"))} for each in (killed, whole)]
    _must(ends[0] == ends[1], "killed and gone on with, it ends in other bytes", killed)


def sharded(world: Path, folder: Path, kind: str, train: str) -> None:
    """`once` under FSDP2, where each of two processes has a part of the model. Raises Lost."""
    once(world, folder, kind, 2, FSDP2, train=train)


def always(world: Path, folder: Path, kind: str, processes: int) -> None:
    """At every step from one on, of the last process. Raises Lost."""
    overflows = kind == OVERFLOW
    asked = plan(world, **({"precision": "fp16", "steps": 60} if overflows else {}))
    folder.mkdir()
    codes = carried_out(folder, asked, NumberFault(kind, processes - 1, AT, always=True), processes)
    printed = said(folder)
    _must(codes == [1] * processes, f"ended in {codes}", folder)
    _must("Traceback" not in printed, "a traceback", folder)
    _must(("50 steps in a row were skipped" if overflows else f"{SKIPS + 1} of the last {AT + SKIPS} steps were skipped, and guard.skips lets {SKIPS} pass; the checkpoint of 'learn', step 6, stands") in printed, "said something else", folder)
    if kind == NAN_GRADIENT:  # which row it came from nobody can tell, so the event lists all of the step, of which a line shows some
        last = events(folder / "run", "guard")[-1]
        _must(_hit(folder, AT + SKIPS) in [(row["source"], row["key"]) for row in last["rows"]], "did not list the row", folder)
    else:
        _must(overflows or ": ".join(_hit(folder, AT + SKIPS)) in printed, "did not name the row", folder)
    _must(_is_sound(folder), "the last checkpoint holds what is no number", folder)
    codes = carried_out(folder, asked if not overflows else {**asked, "stages": [{**asked["stages"][0], "precision": "fp32"}]}, None, processes)
    if overflows:  # another precision is another stage, and a checkpoint of the first is refused by name
        _must(codes == [2] * processes and "precision was fp16, is fp32" in said(folder), f"ended in {codes}", folder)
    else:
        _must(codes == [0] * processes and _is_sound(folder), f"went on and ended in {codes}", folder)


def spike(world: Path, folder: Path, on_spike: str, processes: int) -> None:
    """A row whose loss is ten thousand times what it was. Raises Lost."""
    steps, step = SOON + 8, SOON + 4
    asked = plan(world, steps=steps, guard={"on_spike": on_spike})
    other = plan(world, steps=steps, guard={"on_spike": "ignore"})
    fault = NumberFault(WRONG, processes - 1, step)
    codes = carried_out(folder / "one", asked, fault, processes)
    _must(codes == [0] * processes, f"ended in {codes}", folder / "one")
    found = events(folder / "one" / "run", "guard")
    _must([(event["step"], event["skipped"]) for event in found] == [(step, on_spike == "skip")], f"events: {found}", folder / "one")
    first = found[0]["rows"][0]
    _must((first["source"], first["key"]) == _hit(folder / "one", step), f"named {first}", folder / "one")
    if on_spike == "skip":
        _must(_weights(folder / "one", step) == _weights(folder / "one", step - 1), "the step was not skipped", folder / "one")
    else:
        carried_out(folder / "other", other, fault, processes)
        one, two = (load_file(folder / name / "run" / "adapter" / "pytorch_lora_weights.safetensors") for name in ("one", "other"))  # beside them the files hold the plans, which differ
        _must(one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), "to say it changed what was trained", folder / "one")


def image(world: Path, folder: Path, value: float, processes: int) -> None:
    """A file of float pixels, one of which is no number. Raises Lost."""
    folder.mkdir()
    make_data(folder / "data", rows=150)
    pixels = np.full((12, 12), 0.5, dtype=np.float32)
    pixels[5, 5] = value
    Image.fromarray(pixels).save(folder / "data" / "photos" / "wrong.tif")
    (folder / "data" / "photos" / "wrong.txt").write_text("a grey square")
    asked = plan(world, steps=40, mix={"photos": 1}, batch={"images": 8, "micro": 4})
    asked["sources"] = {"photos": {"path": str(folder / "data" / "photos")}}
    codes = carried_out(folder, asked, None, processes)
    _must(codes == [0] * processes, f"ended in {codes}", folder)
    _must("wrong.tif" in said(folder) and "it is left out" in said(folder), "did not name the image", folder)
    _must(not events(folder / "run", "guard"), "the guard had something to do", folder)
    _must(_is_sound(folder), "the last checkpoint holds what is no number", folder)


@contextmanager
def _noted(lost: list[str]) -> Iterator[None]:
    try:
        yield
    except Lost as error:
        lost.append(str(error))


def carry_out(whole: bool) -> list[Fault]:
    """Every kind of fault, once and always, by one process and by one of two."""
    world = make_world(Path(tempfile.mkdtemp(prefix="numbers-")))
    tried: list[Fault] = []

    def row(name: str, tries: list[tuple[Any, ...]]) -> None:
        lost: list[str] = []
        for number, (carry, what, how) in enumerate(tries):
            folder = world / f"{len(tried)}-{number}"
            if carry is not always and carry is not image:
                folder.mkdir()
            with _noted(lost):
                carry(world, folder, what, how)
        tried.append(Fault(name, len(tries), len(tries) - len(lost), tuple(lost)))

    both = (1, 2)
    if not whole:
        row(f"{INF_LOSS}, once, on one process of two", [(once, INF_LOSS, 2)])
        row(f"{NAN_LATENTS}, always", [(always, NAN_LATENTS, 1)])
        return tried
    for kind in KINDS:
        row(f"{kind}, once", [(once, kind, processes) for processes in both])
        row(f"{kind}, always", [(always, kind, processes) for processes in both])
    for train in ("adapter", "full"):
        row(f"under FSDP2, train: {train}, once", [(sharded, kind, train) for kind in (INF_LOSS, NAN_GRADIENT, NAN_LOSS, NAN_LATENTS)])
    for on_spike in ("say", "skip"):
        row(f"{WRONG}, on_spike: {on_spike}", [(spike, on_spike, processes) for processes in both])
    row("an image with pixels that are no numbers", [(image, value, processes) for value in (float("nan"), float("inf")) for processes in both])
    return tried


if __name__ == "__main__":
    sys.exit(main("numbers", __doc__, carry_out))
