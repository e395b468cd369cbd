"""Weights & Biases: a folder in the run's, for `wandb sync`; or its server, where the plan says `online`."""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.points import Point
from stages.trackers.curves import Opening

_FLUSHED_EVERY = 2.0  # seconds; 15 by default, which a killed run loses
_PATIENCE = 30.0  # seconds for its server at the start
_BLOCK, _HEADER = 32768, 7


class WandbCurves:
    """A run of Weights & Biases. It takes no point back, so those that it has already and that are made again are left out.

    Its own count of steps is that of the points; the curves are drawn over `step`. What it has is read from the logs in the run folder, which it writes online too.
    """

    def __init__(self, opening: Opening) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if opening.online and not wandb.login(prompt=False):
            raise ValueError("nobody is logged in there; type `wandb login`, or leave `online` out of the plan")
        self._wandb, self._folder = wandb, opening.folder
        self._held = _last_step(opening.folder / "wandb", opening.known["id"]) if "id" in opening.known else 0
        self._number = self._held
        name = opening.known.get("id") or secrets.token_hex(4)
        self._run = wandb.init(
            project=opening.project,
            id=name,
            name=opening.folder.resolve().name,
            resume="allow",
            mode="online" if opening.online else "offline",
            dir=opening.folder,
            config=dict(opening.settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=_PATIENCE,
                x_disable_stats=True,
                x_disable_meta=True,
                x_transaction_log_flush_interval=_FLUSHED_EVERY,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.notes: Mapping[str, str] = {"id": name}

    def held(self) -> int:
        return self._held

    def cut(self, number: int) -> None:
        self._number = number

    def add(self, point: Point) -> None:
        self._number += 1
        if self._number <= self._held:
            return
        values: dict[str, Any] = {**point.numbers, "step": point.step, "stage": point.stage, "stage_name": point.name}
        values |= {name: self._wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows]) for name, table in point.tables.items()}
        values |= {name: self._wandb.Image(str(file), caption=picture.caption) for name, picture in point.pictures.items() if (file := self._folder / picture.file).exists()}
        self._run.log(values, step=self._number, commit=True)

    def close(self) -> None:
        self._run.finish()


def _last_step(folder: Path, name: str) -> int:
    """The last step that the logs of a run hold; 0 if there is none. Each launch has a log of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    last = 0
    for file in folder.glob(f"*run-*-{name}/run-{name}.wandb"):
        for content in _records(file.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                last = max([last, *(json.loads(item.value_json) for item in record.history.item if "_step" in (item.key, *item.nested_key))])
    return last


def _records(content: bytes) -> Iterator[bytes]:
    """What a log of Weights & Biases holds (0.31): after a header of 7 bytes blocks as LevelDB writes them, of fragments with checksum, length and kind. A torn end is left out."""
    place, parts = _HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        end = place + _HEADER + length
        if end > len(content):
            return
        parts += content[place + _HEADER : end]
        if kind in (1, 4):  # whole, or the last fragment
            yield parts
            parts = b""
        place = end
