"""Faults that somebody means: hostile checkpoints, adapters and models, paths that lead outside, secrets around, and captions with code in them.

    cd tests && ../.venv/bin/python -m faults.security --whole

A try is lost if anything hostile was executed, if torch.load was called at all, if a connection was tried that the plan does not ask for, if a secret stands in what a run
leaves behind or prints, or if a traceback was printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from faults.hostile import Touches, hostile_model, hostile_tables, liars, name_code, pickled, poison, torch_file  # noqa: E402
from faults.table import Fault, main  # noqa: E402
from mixing.bad_rows import SourceError  # noqa: E402
from mixing.index import read_entry, write_entry  # noqa: E402
from mixing.source import open_source  # noqa: E402
from models import tiny_flux  # noqa: E402
from runs import carry_out, copy_run, make_data, plan_of, write_plan  # noqa: E402
from stages.checkpoint import newest_checkpoint, read_checkpoint  # noqa: E402
from stages.plan import Plan  # noqa: E402
from stages.problems import RunError  # noqa: E402
from stages.start import read_start  # noqa: E402

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HTTPS_PROXY": "http://someone:pr0xys3cret@127.0.0.1:9",
    "HF_ENDPOINT": "http://someone:endp0ints3cret@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": "aws/s3cret/key",
}
_WORDS = ("hf_abcdefghijklmnopqrstuvwxyz0123456789", "0123456789abcdef0123456789abcdef01234567", "pr0xys3cret", "endp0ints3cret", "aws/s3cret/key")


def in_child(work: Callable[[], int], output: Path, told: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Do something in a forked process in which torch.load and connections are refused. Returns its exit code and which of them were tried. output: what it prints."""
    noted = output.with_suffix(".tried")
    noted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put its own in their place
            os.environ.update(told or {})
            _refuse(noted)
            code = work()
        except BaseException:  # noqa: BLE001 - a forked child of pytest must never go back into it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), noted.read_text().splitlines() if noted.exists() else []


def _refuse(noted: Path) -> None:
    """In this process: note and refuse torch.load, and connections that leave it."""

    def refusing(what: str, where: Callable[..., object] = lambda *arguments: "") -> Callable[..., NoReturn]:
        def refused(*arguments: Any, **named: Any) -> NoReturn:
            with noted.open("a") as file:
                print(what, where(*arguments), "from", " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(traceback.extract_stack()[-60:-13])), file=file)
            raise OSError(f"{what} is refused here")

        return refused

    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refusing("connect", lambda: address)()
        connect(self, address)

    torch.load = refusing("torch.load")
    torch.serialization.load = torch.load
    socket.socket.connect = local  # type: ignore[method-assign, assignment]
    socket.socket.connect_ex = local  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = refusing("getaddrinfo", lambda *arguments: arguments[:2])  # type: ignore[assignment]


class World:
    """What the tries stand on: data, tiny models, and a run of two stages that is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_data(folder / "data")
        tiny_flux(folder / "model", pixels=True)
        stage = {"steps": 2, "resolution": 8, "batch": {"images": 4, "micro": 4}, "lr": 0.01, "precision": "fp32"}
        self.stages = [{**stage, "name": "first"}, {**stage, "name": "second", "ema": 0.9}]
        self.plan = self.made()
        self.run = folder / "run"
        carry_out(self.run, self.plan)

    def made(self, **changes: Any) -> dict[str, Any]:
        """A plan of two short stages."""
        shorter: dict[str, Any] = {"stages": self.stages, "previews": {"rows": 0}, "evaluate": {"rows": 2}, "save_every": 500}
        return plan_of(self.folder, **{**shorter, **changes})


# --- hostile files ----------------------------------------------------------------------------------------------------------------------


def _told(canary: Path, code: int, tried: Sequence[str], said: str, codes: Sequence[int] = (1, 2)) -> str:
    """What was not as promised; empty if all was."""
    if canary.exists():
        return "code was executed"
    if tried:
        return f"was tried: {tried[0]}"
    if "Traceback" in said:
        return f"a traceback: {' '.join(said[-400:].split())}"
    return "" if code in codes else f"exit code {code}: {' '.join(said[-400:].split())}"


def checkpoints(world: World, whole: bool) -> Fault:
    """Pickles and lying safetensors in a checkpoint whose manifest fits them; then the same command."""
    canary = world.folder / "canary"
    contents = {"a pickle": pickled(canary), "a file of torch.save": torch_file(canary), **liars()}
    lost, tries = [], 0
    for what, content in contents.items() if whole else list(contents.items())[:3]:
        for name in ("adapter", "ema") if whole else ("adapter",):
            run = copy_run(world.run, world.folder / "hostile")
            done = sorted((run / "stages").glob("*/step-*"))[-1]
            state = json.loads((done / "state.json").read_text())
            poison(done, {f"{name}.safetensors": content, "state.json": json.dumps({**state, "finished": False}).encode(), "optimizer.bin": torch_file(canary), "random_states_0.pkl": pickled(canary)})
            file, output = write_plan(world.folder / "hostile.yaml", world.plan), world.folder / "hostile.log"
            code, tried = in_child(lambda file=file, run=run: train.main([str(file), "--out", str(run)]), output)  # type: ignore[misc]
            if said := _told(canary, code, tried, output.read_text(), (0, 1, 2)):
                lost.append(f"{what} as {name}.safetensors: {said}")
            tries += 1
            _clear(run, canary)
    return _fault("a hostile checkpoint with a manifest that fits it, and the same command", tries, lost)


def starts(world: World) -> Fault:
    """The same as what `start:` names, with a config beside that leads elsewhere."""
    canary, folder = world.folder / "canary", world.folder / "start"
    folder.mkdir()
    lost, tries = [], 0
    for what, content in {"a pickle": pickled(canary), "a file of torch.save": torch_file(canary), **liars()}.items():
        for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
            (folder / name).write_bytes(content)
            (folder / "adapter_model.bin").write_bytes(torch_file(canary))
            config = {"base_model_name_or_path": "../../elsewhere", "auto_mapping": {"base_model_class": "Evil", "parent_library": "modeling_evil"}, "peft_type": "EVIL"}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            (folder / "modeling_evil.py").write_text(f"import os; os.makedirs({str(canary)!r})")
            try:
                read_start(Plan.model_validate(world.made(start=str(folder))), "x")
                lost.append(f"{what} as {name}: taken for an adapter")
            except ValueError as error:
                if not str(error).startswith("start: "):
                    lost.append(f"{what} as {name}: {error}")
            except Exception:  # noqa: BLE001 - what no user may see, whatever it is
                lost.append(f"{what} as {name}: {' '.join(traceback.format_exc(limit=-2).split())}")
            if canary.exists():
                lost.append(f"{what} as {name}: code was executed")
            tries += 1
            (folder / name).unlink()
            _clear(canary)
    return _fault("a hostile file in the place of an adapter", tries, lost)


def manifests(world: World) -> Fault:
    """Manifests and states that name what lies elsewhere, or are no JSON that anybody would write."""
    stage = world.folder / "manifests" / "1-first"
    stage.mkdir(parents=True)
    source = sorted((world.run / "stages").glob("*/step-*"))[0]
    (world.folder / "manifests" / "outside.json").write_text("{}")
    outside = [str(world.folder / "model" / "model_index.json"), "../outside.json", "../../outside.json", "..", ".", "", "/etc/passwd", "a/../../outside.json", "\0", "x" * 5000, "manifest.json/..", "~/x"]
    deep = "[" * 200_000
    edits: dict[str, Callable[[dict[str, Any]], object]] = {f"a file called {name[:40]!r}": lambda manifest, name=name: {**manifest, "files": {**manifest["files"], name: {"sha256": "0" * 64, "bytes": 2}}} for name in outside}  # type: ignore[misc]
    edits |= {"a list": lambda manifest: [manifest], "no files": lambda manifest: {**manifest, "files": {}}, "files that are a word": lambda manifest: {**manifest, "files": "x"}}
    edits |= {f"step {step!r}": lambda manifest, step=step: {**manifest, "step": step} for step in (-1, 1e300, "2", None, [2], 10**400)}  # type: ignore[misc]
    lost = []
    for what, edit in {**edits, "nested deep": lambda manifest: deep}.items():
        folder = copy_run(source, stage / source.name)
        changed = edit(json.loads((folder / "manifest.json").read_text()))
        (folder / "manifest.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
        try:
            said: list[str] = []
            if newest_checkpoint(stage, said.append) is not None or len(said) != 1:
                lost.append(f"{what}: taken for whole")
        except Exception:  # noqa: BLE001 - what no user may see, whatever it is
            lost.append(f"{what}: {' '.join(traceback.format_exc(limit=-2).split())}")
        _clear(folder)
    return _fault("a manifest that leads outside, or is another thing than one", len(edits) + 1, lost)


def tensors(world: World) -> Fault:
    """Lying safetensors in a checkpoint whose manifest fits them."""
    stage = world.folder / "tensors" / "1-first"
    stage.mkdir(parents=True)
    source = sorted((world.run / "stages").glob("*/step-*"))[0]
    lost = []
    for what, content in liars().items():
        folder = copy_run(source, stage / source.name)
        poison(folder, {"adapter.safetensors": content})
        try:
            read_checkpoint(folder).tensors("adapter")
            lost.append(f"{what}: read")
        except RunError:
            pass
        except Exception:  # noqa: BLE001 - what no user may see, whatever it is
            lost.append(f"{what}: {' '.join(traceback.format_exc(limit=-2).split())}")
        _clear(folder)
    return _fault("safetensors in a checkpoint that lie about themselves", len(liars()), lost)


def models(world: World, whole: bool) -> Fault:
    """A model's folder with code and pickles in every corner: with its weights it is trained as if they were not there, without them it is refused."""
    canary = world.folder / "canary"
    plain = tiny_flux(world.folder / "with-vae", pixels=False)
    parts = ("text_encoder", "tokenizer", "scheduler", "transformer", "vae") if whole else ("text_encoder", "scheduler")
    tries: dict[str, tuple[Path, tuple[int, ...]]] = {
        "code and pickles beside the weights": (hostile_model(plain, world.folder / "beside", canary, weights=True), (0,)),
        "pickles in the place of the weights": (hostile_model(plain, world.folder / "instead", canary, weights=False), (1, 2)),
    }
    for part in parts:
        folder = hostile_model(plain, world.folder / f"named-{part}", canary, weights=True)
        name_code(folder, part)
        tries[f"an index that names code for its {part}"] = (folder, (0, 1, 2))
    lost = []
    for what, (folder, codes) in tries.items():
        run, output = world.folder / "hostile", world.folder / "hostile.log"
        plan = write_plan(world.folder / "hostile.yaml", world.made(model=str(folder), stages=world.stages[:1], cache="none", sources={"photos": world.plan["sources"]["photos"]}))
        code, tried = in_child(lambda plan=plan, run=run: train.main([str(plan), "--out", str(run)]), output)  # type: ignore[misc]
        if said := _told(canary, code, tried, output.read_text(), codes):
            lost.append(f"{what}: {said}")
        _clear(run, canary)
    return _fault("a model's folder full of code", len(tries), lost)


def sources(world: World) -> Fault:
    """Tables, saved datasets and remembered looks at data that hold pickles and code: read or refused, and nothing executed."""
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = world.folder / "datasets"
    canary, folder, index = world.folder / "canary", world.folder / "tables", world.folder / "index"
    tries = {what: lambda path=path: len(open_source("rows", path=path, root=folder, **_ASKED).keys(np.arange(3))) for what, path in hostile_tables(folder, canary).items()}  # type: ignore[misc]
    for number, name in enumerate(("num_references", "sizes", "contents")):
        place = index / str(number)
        tries[f"an array of pickles as {name} of the data index"] = lambda place=place, name=name: _remembered(place, name, canary)  # type: ignore[misc]
    lost = []
    with contextlib.chdir(folder):
        for what, carry_out_one in tries.items():
            try:
                carry_out_one()
            except SourceError:
                pass
            except Exception:  # noqa: BLE001 - what no user may see, whatever it is
                lost.append(f"{what}: {' '.join(traceback.format_exc(limit=-3).split())}")
            if canary.exists():
                lost.append(f"{what}: code was executed")
            _clear(canary)
    return _fault("tables, saved datasets and a data index with pickles and code in them", len(tries), lost)


_ASKED: dict[str, Any] = {"task": "text_to_image", "columns": {}, "prompt": None, "split": "train", "on_bad_row": "skip"}


def _remembered(place: Path, name: str, canary: Path) -> None:
    """Write an entry of the data index, put an array of pickles into it as who can write there can, and read it."""
    write_entry(place, {}, {name: np.zeros(3)})
    array = io.BytesIO()
    np.lib.format.write_array(array, np.array([Touches(canary)], dtype=object), allow_pickle=True)
    (place / f"{name}.npy").write_bytes(array.getvalue())
    written = json.loads((place / "facts.json").read_text())
    written["files"] = {f"{name}.npy": hashlib.blake2b(array.getvalue(), digest_size=16).hexdigest()}
    written["hash"] = hashlib.blake2b(json.dumps([written["facts"], written["files"]], sort_keys=True).encode(), digest_size=16).hexdigest()
    (place / "facts.json").write_text(json.dumps(written))
    assert read_entry(place) is None, "an array of pickles is taken for what was seen"


# --- secrets and connections ------------------------------------------------------------------------------------------------------------


def secrets(world: World, whole: bool) -> Fault:
    """Tokens and addresses with passwords in the environment: neither what a run leaves behind nor what it prints has them; and nothing is connected to."""
    tries = {
        "a run": ({"track": "trackio"}, (0,)),
        "a run that fails": ({"start": str(world.folder / "start" / "nothing"), "model": str(world.folder / "nothing")}, (2,)),
        "a run from the Hub that cannot be reached": ({"start": "hub:someone/adapter"}, (1, 2)),
    }
    if whole:  # these are tried again and again, with waits
        tries["a model of the Hub that cannot be reached"] = ({"model": "someone/model"}, (1, 2))
        tries["a source of the Hub that cannot be reached"] = ({"sources": {"photos": {"path": "hub/someone/rows"}}}, (1, 2))
        tries["a run with every tracker"] = ({"track": ["trackio", "tensorboard", "wandb"]}, (0,))
        tries["a run that is to be published"] = ({"publish": {"repo": "someone/adapter"}}, (0, 1))
    lost = []
    for number, (what, (changes, codes)) in enumerate(tries.items()):
        run, output = world.folder / f"secret-{number}", world.folder / f"secret-{number}.log"
        plan = write_plan(world.folder / f"secret-{number}.yaml", world.made(stages=world.stages[:1], **changes))
        told = {**SECRETS, "TRACKIO_DIR": str(world.folder / "trackio"), "HF_HUB_DISABLE_XET": "1"}
        code, tried = in_child(lambda plan=plan, run=run: train.main([str(plan), "--out", str(run)]), output, told)  # type: ignore[misc]
        asks = "Hub" in what or "published" in what
        if said := _told(world.folder / "canary", code, [] if asks else tried, output.read_text(), codes):
            lost.append(f"{what}: {said}")
        left = [path for place in (run, world.folder / "trackio", output) for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
        lost += [f"{what}: {word[:8]}... stands in {path.relative_to(world.folder)}" for path in left for word in _WORDS if word.encode() in path.read_bytes()]
    first = {line.partition(": ")[0]: line for line in reversed(lost)}
    return _fault("secrets in the environment of a run, and no connection that is not asked for", len(tries), list(first.values()))


def _clear(*places: Path) -> None:
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(place)


def _fault(name: str, tries: int, lost: Sequence[str]) -> Fault:
    return Fault(name, tries, tries - len(lost), tuple(lost))


def carry_out_all(whole: bool) -> list[Fault]:
    """Every kind, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        return [checkpoints(world, whole), starts(world), manifests(world), tensors(world), models(world, whole), sources(world), secrets(world, whole)]


if __name__ == "__main__":
    sys.exit(main("security", __doc__, carry_out_all))
