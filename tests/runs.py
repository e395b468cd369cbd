"""Whole runs on tiny models and tiny images, in forked processes that share one import of torch, and can be killed at any point."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from ruamel.yaml import YAML

import mixing
import stages
import train
from models import tiny_flux
from stages.log_files import log_lines

# All of it once, here: a forked process would import each of them again, in every run of every test, a quarter of what a short run takes.
for package in (mixing, stages):
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)
import_module("pandas")  # which pyarrow imports when it is first asked for something

NOTHING: Mapping[str, str] = MappingProxyType({})
FSDP2 = MappingProxyType({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"})
"""What `accelerate launch` with accelerate_configs/fsdp2.yaml tells the processes."""

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220)}


def make_data(folder: Path, rows: int = 24) -> Path:
    """Two sources of one image size: `photos` with captions, `edits` with a reference."""
    draw = np.random.default_rng(0)
    photos, edits = folder / "photos", folder / "edits"
    photos.mkdir(parents=True)
    edits.mkdir()
    lines = []
    for number in range(rows):
        name, colour = list(COLOURS.items())[number % 3]
        pixels = np.full((12, 12, 3), colour, dtype=np.uint8)
        pixels[3:9, 3:9] = draw.integers(0, 255, (6, 6, 3))
        Image.fromarray(pixels).save(photos / f"{number:03d}.png")
        (photos / f"{number:03d}.txt").write_text(f"a {name} square")
        Image.fromarray(pixels).save(edits / f"{number:03d}-from.png")
        Image.fromarray(255 - pixels).save(edits / f"{number:03d}-to.png")
        lines.append(json.dumps({"instruction": f"make it {name}", "reference": f"{number:03d}-from.png", "target": f"{number:03d}-to.png"}))
    (edits / "rows.jsonl").write_text("\n".join(lines))
    return folder


def make_world(folder: Path) -> Path:
    """Data and a tiny pixel-space model."""
    make_data(folder / "data")
    tiny_flux(folder / "model", pixels=True)
    return folder


def square(number: int) -> bytes:
    """A PNG of 8 x 8 pixels, of an own colour for each number."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 255 - number % 256, number // 256)).save(content, "PNG")
    return content.getvalue()


def words(number: int) -> str:
    """The prompt of a square."""
    return f"a {list(COLOURS)[number % 3]} square"


def write_tars(folder: Path, sizes: Sequence[int], reference: bool = False) -> str:
    """Shards of so many squares each; gives their pattern. reference: whether each row has one, the square 1,000 numbers on."""
    folder.mkdir(parents=True)
    first = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"s-{shard:03d}.tar", "w") as tar:
            for number in range(first, first + size):
                members = {"png": square(number), "txt": words(number).encode()} | ({"from.png": square(1000 + number)} if reference else {})
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{number:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        first += size
    return str(folder / "*.tar")


def break_pixels(shard: Path, names: Sequence[str]) -> None:
    """Overwrite what stands behind the headers of some PNGs of a tar."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        for name in names:
            member = tar.getmember(name)
            content[member.offset_data + 41 : member.offset_data + member.size] = bytes(member.size - 41)
    shard.write_bytes(content)


def write_tables(folder: Path, sizes: Sequence[int], group: int = 8) -> str:
    """Parquet files of so many squares each, in row groups of `group`; gives their pattern."""
    folder.mkdir(parents=True)
    first = 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        table = pa.table({"image": [{"bytes": square(number), "path": None} for number in numbers], "text": [words(number) for number in numbers]})
        parquet.write_table(table, folder / f"train-{shard:03d}.parquet", row_group_size=group)
        first += size
    return str(folder / "*.parquet")


def plan_of(world: Path, **changes: Any) -> dict[str, Any]:
    """Three stages: full float32, adapter bf16, adapter float32 with a moving average."""
    stage = {"steps": 6, "resolution": 8, "batch": {"images": 8, "micro": 4}, "lr": 0.01}
    plan = {
        "name": "tiny",
        "seed": 3,
        "model": str(world / "model"),
        "adapter": {"rank": 2, "alpha": 4},
        "sources": {"photos": {"path": str(world / "data" / "photos")}, "edits": {"path": str(world / "data" / "edits" / "rows.jsonl"), "task": "edit"}},
        "stages": [
            {**stage, "name": "found", "train": "full", "precision": "fp32", "mix": {"photos": 1}},
            {**stage, "name": "expose", "precision": "bf16"},
            {**stage, "name": "refine", "precision": "fp32", "mix": {"photos": 3, "edits": 1}, "ema": 0.9, "lr": {"peak": 0.01, "schedule": "cosine"}},
        ],
        "evaluate": {"rows": 2},
        "previews": {"rows": 1, "steps": 2},
        "save_every": 2,
        "log_every": 2,
        "workers": 0,
        "track": "none",
        "cache": {"folder": str(world / "cache")},
    }
    return {**plan, **changes}


def write_plan(path: Path, plan: Mapping[str, Any]) -> Path:
    """Write a plan as YAML."""
    with path.open("w") as file:
        YAML(typ="safe").dump(dict(plan), file)
    return path


def _count_events(limit: int | None, record: Path | None) -> None:
    """In a forked process: count optimizer steps, syncs and renames; die by kill -9 at number `limit`, or write the count to `record` at each."""
    count = 0

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if limit is not None and count >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
            if record:
                record.write_text(str(count))
            return original(*arguments, **named)

        setattr(owner, name, counted)

    wrap(torch.optim.AdamW, "step")
    wrap(os, "fsync")
    wrap(os, "rename")
    wrap(os, "replace")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(arguments: Sequence[str], *, processes: int = 1, output: Path | None = None, timeout: int = 120, told: Mapping[str, str] = NOTHING, before: Callable[[int], None] | None = None) -> list[int]:
    """Start train.py in forked processes; gives their numbers, by rank. before: called in each of them, with its rank, before train.py begins.

    told: variables that a launcher sets beside, for the engine.
    """
    port = free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(timeout)
                log = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put its own in their place
                os.environ.update(told)
                if processes > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                    torch.set_num_threads(1)  # as a launcher sets it; two threads each on two cores take twice as long
                if before:
                    before(rank)
                train.FIRST_SPEAKS = 0.0  # the others are waited for here, for their exit codes
                code = train.main(arguments)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:  # noqa: BLE001  a forked child of pytest must never go back into it
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def launch(arguments: Sequence[str], *, processes: int = 1, kill_at: int | None = None, record: Path | None = None, output: Path | None = None, timeout: int = 120, told: Mapping[str, str] = NOTHING) -> list[int]:
    """Run train.py in forked processes; return their exit codes, -9 for one that was killed. kill_at: after so many events of the main one, all die. told: as in `started`."""

    def counting(rank: int) -> None:
        if rank == 0 and (kill_at is not None or record):
            _count_events(kill_at, record)

    children = started(arguments, processes=processes, output=output, timeout=timeout, told=told, before=counting)
    codes = []
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status))
        if rank == 0 and codes[0] != 0:
            # A launcher ends the others; what they had to say for themselves they have said by then.
            until = time.monotonic() + (0.0 if codes[0] < 0 else 10.0)
            while time.monotonic() < until and not all(_has_ended(other) for other in children[1:]):
                time.sleep(0.05)
            for other in children[1:]:
                os.kill(other, signal.SIGKILL)
    return codes


def _has_ended(child: int) -> bool:
    """Whether a process has ended; its exit code stays to be asked for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def carry_out(folder: Path, plan: Mapping[str, Any], *options: str, processes: int = 1, kill_at: int | None = None, record: Path | None = None, expect: int = 0, told: Mapping[str, str] = NOTHING) -> str:
    """Carry out a plan in forked processes; returns what they printed. expect: their exit code; of one that is killed only the main one's is looked at."""
    file = write_plan(folder.with_suffix(".yaml"), plan)
    output = folder.with_suffix(".log")
    output.unlink(missing_ok=True)
    codes = launch([str(file), "--out", str(folder), *options], processes=processes, kill_at=kill_at, record=record, output=output, told=told)
    assert codes == [expect] * processes if kill_at is None else codes[0] == -signal.SIGKILL, output.read_text()
    return output.read_text()


def traced(folder: Path) -> list[dict[str, Any]]:
    """The lines of trace.jsonl."""
    return [json.loads(line) for line in log_lines(folder, "trace")]


def adapter_bytes(folder: Path) -> bytes:
    """The published adapter."""
    return (folder / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in log_lines(folder, "metrics")]
    return [line for line in lines if line["event"] == kind]


def copy_run(source: Path, place: Path) -> Path:
    """A copy of a run folder."""
    shutil.copytree(source, place)
    return place
