"""TensorBoard: event files in the run folder, for `tensorboard --logdir`."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from stages.points import Point
from stages.trackers.curves import Opening, markdown

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
_MARK = "stage"
"""The tag of what is written last of each point; how many there are is how many points the files hold."""
_SECONDS = 5  # until what was added is in the file


class TensorBoardCurves:
    """The event files of a run, one of each launch. They are sequences of records, so what a killed run had written too much is cut off, as of metrics.jsonl."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._run_folder, self._plan_text = SummaryWriter, opening.folder, opening.plan_text
        self._folder = opening.folder / FOLDER
        self._writer: SummaryWriter | None = None
        self._name = ""
        self.notes: Mapping[str, str] = {}
        self.cut(self.held())  # of a point that a killed run was writing, what stands there already

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("events.out.tfevents.*"))

    def held(self) -> int:
        return sum(len(list(_ends(file.read_bytes()))) for file in self._files())

    def cut(self, number: int) -> None:
        for file in self._files():
            ends = list(_ends(file.read_bytes()))
            kept = min(number, len(ends))
            if kept:
                with file.open("r+b") as opened:
                    opened.truncate(ends[kept - 1])
            else:
                file.unlink()
            number -= kept

    def add(self, point: Point) -> None:
        writer = self._writer
        if writer is None:
            writer = self._writer = self._make(str(self._folder), flush_secs=_SECONDS)
            writer.add_text("plan", f"```yaml\n{self._plan_text}\n```", point.step)
        if point.name != self._name:
            self._name = point.name
            writer.add_text("stage_name", point.name, point.step)
        for name, value in point.numbers.items():
            writer.add_scalar(name, value, point.step)
        for name, table in point.tables.items():
            writer.add_text(name, markdown(table), point.step)
        for name, picture in point.pictures.items():
            if (file := self._run_folder / picture.file).exists():
                with Image.open(file) as opened:
                    writer.add_image(name, np.asarray(opened.convert("RGB")), point.step, dataformats="HWC")
                writer.add_text(f"{name}/caption", picture.caption, point.step)
        writer.add_scalar(_MARK, point.stage, point.step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _ends(content: bytes) -> Iterator[int]:
    """Where in an event file each point ends; a torn one does not.

    A record is its length (8 bytes), a checksum (4), what it holds, and a checksum (4).
    """
    from tensorboard.compat.proto.event_pb2 import Event

    mark = b"\x0a" + bytes([len(_MARK)]) + _MARK.encode()  # a tag as a record holds it; to take every record apart is slow
    place = 0
    while place + 12 <= len(content):
        end = place + 16 + struct.unpack_from("<Q", content, place)[0]
        if end > len(content):
            return
        if mark in (record := content[place + 12 : end - 4]) and Event.FromString(record).summary.value[0].tag == _MARK:
            yield end
        place = end
