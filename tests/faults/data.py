"""Faults in data: every kind of the corpus is opened and read, and must be read right or refused by name, in little memory and time.

    cd tests && ../.venv/bin/python -m faults.data --whole
    cd tests && ../.venv/bin/python -m faults.data --only bomb       # each kind whose name holds a word, with its memory and time

Kinds are done in forked processes, with limits of memory and time. A kind is lost if something is read that is not what was written, if something is refused
in other words, at another place or not at all, if an error comes out that users are not meant to see, if it takes more than 300 MB or more than 5 seconds, or if
`--check` and opening do not agree. With --whole all kinds are done once more from a data index, as a second start does.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import datasets  # noqa: E402
import numpy as np  # noqa: E402

from faults.corpus import Case, cases, make  # noqa: E402
from faults.corpus_case import FILLERS, Row, fill  # noqa: E402
from faults.table import Fault, main  # noqa: E402
from mixing.bad_rows import SourceError, UnreadableRow  # noqa: E402
from mixing.images import fit  # noqa: E402
from mixing.source import Source, open_source  # noqa: E402
from mixing.stream import open_stream  # noqa: E402
from mixing.tasks import Example, to_example  # noqa: E402
from stages.check_sources import source_problems  # noqa: E402
from stages.problems import PlanError  # noqa: E402
from stages.reader import read_plan  # noqa: E402

MEGABYTES = 300
"""That a kind may take, above what the interpreter and the libraries take."""
SECONDS = 5.0
"""Of the processor, that a kind may take."""
_HUNG = 180.0  # seconds of the clock, after which a kind is given up: many, for other work may have the processors
_MOST = 4 * 2**30  # bytes of address space, a guard for the machine: what is judged is memory that is touched
_NOBODY = 65_534
_AT_ONCE = 24  # kinds that are done in the same process
_MOST_FILLERS = 3  # of the good rows beside the odd one that are decoded


@dataclass(frozen=True)
class Done:
    """What came of a kind."""

    name: str
    lost: tuple[str, ...]
    """What was not as promised; empty if all was."""
    megabytes: int
    seconds: float


def carry_out(whole: bool) -> list[Fault]:
    """All kinds, in lines of several that have much in common."""
    kinds = cases()
    done = [*carried_out(kinds), *(carried_out(kinds, with_index=True) if whole else ())]
    groups: dict[str, list[Done]] = {}
    for each in done:
        groups.setdefault(each.name.partition(": ")[0], []).append(each)
    faults = []
    for group, several in groups.items():
        lost = tuple(f"{each.name.partition(': ')[2]}: {'; '.join(dict.fromkeys(each.lost))}" for each in several if each.lost)
        faults.append(Fault(f"data: {group}", len(several), len(several) - len(lost), lost))
    return faults


def carried_out(kinds: Sequence[Case], with_index: bool = False) -> Iterator[Done]:
    """Do some kinds. Those that need root are left out for others."""
    datasets.disable_progress_bars()
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    folder.chmod(0o755)  # or no other user could be the one who may not read
    try:
        _warm_up(folder / "good")
        left = [case for case in kinds if not case.needs or os.geteuid() == 0]
        while left:
            several, left = left[:_AT_ONCE], left[_AT_ONCE:]
            for number, case in enumerate(several):
                make(case, folder / str(number))
            done = list(_forked(several, folder, with_index))
            yield from done
            left = several[len(done) :] + left  # of which none was done, for the one before ended the process
            for number in range(len(several)):
                shutil.rmtree(folder / str(number))
    finally:
        shutil.rmtree(folder)


def _warm_up(place: Path) -> None:
    """Do a good folder here, so that no fork has to load Pillow's formats and the language of plans for itself."""
    good = Case("good", lambda folder: fill(folder / "rows"), fillers=FILLERS, asked={"prompt": "x"})
    make(good, place)
    assert not _judged(good, place, None)


def _forked(several: Sequence[Case], folder: Path, with_index: bool) -> Iterator[Done]:
    """Do some kinds in a process of their own, up to the first that hangs or ends it."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                before = _memory("VmRSS")
                for number, case in enumerate(several):
                    print(json.dumps(asdict(_limited(case, folder / str(number), with_index, before))), file=pipe, flush=True)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        for case in several:
            if not select.select([pipe], [], [], _HUNG)[0]:
                os.kill(child, signal.SIGKILL)
                yield Done(case.name, (f"it hangs: nothing after {_HUNG:g} seconds",), 0, 0.0)
                break
            if not (line := pipe.readline()):
                yield Done(case.name, ("it ends the process",), 0, 0.0)
                break
            yield Done(**json.loads(line))
    os.waitpid(child, 0)


def _limited(case: Case, place: Path, with_index: bool, before: int) -> Done:
    """Do one kind. before: kilobytes of memory that the process took when it began."""
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (_MOST, _MOST))
    resource.setrlimit(resource.RLIMIT_CPU, (int(began + _HUNG), -1))
    datasets.config.HF_DATASETS_CACHE = place / "cache"
    datasets.config.HF_HUB_OFFLINE = True
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as stages/quiet.py has it
    (place / "index").mkdir()
    (place / "index").chmod(0o777)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    if case.needs == "nobody":
        os.seteuid(_NOBODY)
    try:
        lost = _judged(case, place, place / "index" if with_index else None)
    except BaseException:  # noqa: BLE001 - whatever comes out here is what a user would see
        lost = [traceback.format_exc(limit=-3)]
    if case.needs == "nobody":
        os.seteuid(0)
    megabytes, seconds = max(_memory("VmHWM") - before, 0) // 1024, round(time.process_time() - began, 2)
    if megabytes > MEGABYTES:
        lost.append(f"it took {megabytes} MB")
    if seconds > SECONDS:
        lost.append(f"it took {seconds} s")
    return Done(case.name, tuple(lost), megabytes, seconds)


def _memory(name: str) -> int:
    """Kilobytes, as Linux counts them."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _judged(case: Case, place: Path, index: Path | None) -> list[str]:
    lost = [*_checked(case, place)]
    for _ in range(1 if index is None else 2):
        lost += _read(case, place, index)
    if case.streams and index is None:
        lost += [f"as a stream: {each}" for each in _streamed(case, place)]
    return lost


def _checked(case: Case, place: Path) -> Iterator[str]:
    """What `--check` says, against what it should."""
    source = json.dumps({"path": case.path, **case.asked})
    plan = place / "plan.yaml"
    if case.needs == "nobody":
        return
    plan.write_text(f"model: x/y\nsources:\n  s: {source}\nstages:\n  - {{name: one, steps: 1, resolution: 16, batch: 1, lr: 1e-4}}\n")
    try:
        said = [str(problem.message) for problem in source_problems(read_plan(plan), place)]
    except PlanError as error:
        said = [str(error)]
    if not case.checked and said:
        yield f"--check refuses it: {said}"
    elif case.checked and not any(re.search(re.escape(case.checked), each) for each in said):
        yield f"--check should say {case.checked!r} and says {said or 'nothing'}"


def _read(case: Case, place: Path, index: Path | None) -> list[str]:
    """Open it as a source and read all rows."""
    asked = {"task": "text_to_image", "columns": {}, "prompt": None, "split": "train", "on_bad_row": "skip", **case.asked}
    try:
        source = open_source("rows", path=case.path, root=place, index=index, **asked)
    except SourceError as error:
        return [*_refused(case, str(error))]
    if case.refused:
        return [f"it should be refused with {case.refused!r} and is opened"]
    lost = [*_places(case, {row.key: row.reason for row in source.bad})]
    return lost + _rows(case, source)


def _refused(case: Case, said: str) -> Iterator[str]:
    if not case.refused:
        yield f"it is refused: {said[:300]}"
    elif case.refused not in said:
        yield f"it should be refused with {case.refused!r}, and that is {said[:300]!r}"
    if len(said) > 3_000:
        yield f"the message has {len(said)} characters"


def _places(case: Case, bad: dict[str, str]) -> Iterator[str]:
    """The bad rows, against those that there should be."""
    for key in case.bad.keys() | bad.keys():
        if key not in bad:
            yield f"{key[:60]!r} should be bad and is not"
        elif key not in case.bad:
            yield f"{key[:60]!r} is bad: {bad[key][:200]}"
        elif not re.search(case.bad[key] if "|" in case.bad[key] else re.escape(case.bad[key]), bad[key]):
            yield f"{key[:60]!r}: the reason should be {case.bad[key]!r} and is {bad[key][:200]!r}"
        elif len(bad[key]) > 1_000:
            yield f"{key[:60]!r}: the reason has {len(bad[key])} characters"


def _rows(case: Case, source: Source) -> list[str]:
    rows: dict[str, Example | str] = {}
    lost = []
    for number, key in enumerate(source.keys(np.arange(len(source)))):
        if key not in case.rows and key not in case.broken and number >= _MOST_FILLERS:
            rows[key] = ""
            continue
        try:
            example = rows[key] = source.example(number)
        except UnreadableRow as error:
            rows[key] = error.bad_row.reason
            continue
        if source.sizes[number].tolist() != [example.target.height, example.target.width] and "width and height" not in case.name:
            lost.append(f"{key[:60]!r}: its header says {source.sizes[number].tolist()}, and it is {example.target.size}")
    return [*lost, *_contents(case, rows)]


def _contents(case: Case, rows: dict[str, Example | str]) -> Iterator[str]:
    """What was read, against what was written. Of a row that was not decoded there is no text."""
    for key in (case.rows.keys() | case.broken.keys()) - rows.keys():
        yield f"there is no row {key[:60]!r}"
    others = rows.keys() - case.rows.keys() - case.broken.keys()
    if len(others) != case.fillers:
        yield f"{len(others)} other rows, and there should be {case.fillers}: {sorted(others)[:3]}"
    for key, row in rows.items():
        if row == "":
            continue
        if isinstance(row, str):
            if key not in case.broken:
                yield f"{key[:60]!r} cannot be read: {row[:200]}"
            elif case.broken[key] not in row:
                yield f"{key[:60]!r}: the reason should be {case.broken[key]!r} and is {row[:200]!r}"
        elif key in case.broken:
            yield f"{key[:60]!r} should be refused with {case.broken[key]!r} and is read"
        elif key in case.rows:
            yield from _compared(key, row, case.rows[key])


def _compared(key: str, found: Example, row: Row) -> Iterator[str]:
    if found.prompts != row.prompts:
        yield f"{key[:60]!r}: its prompts are {str(found.prompts)[:100]}"
    if isinstance(row.target, tuple):
        if (found.target.height, found.target.width) != row.target:
            yield f"{key[:60]!r}: it is {found.target.size}"
        return
    if len(found.references) != len(row.references):
        yield f"{key[:60]!r}: it has {len(found.references)} references"
    for image, expected in zip((found.target, *found.references), (row.target, *row.references), strict=False):
        pixels = np.asarray(image)
        if pixels.shape != expected.shape:
            yield f"{key[:60]!r}: it is {pixels.shape} and should be {expected.shape}"
        elif (off := int(np.abs(pixels.astype(np.int16) - expected).max())) > row.tolerance:
            yield f"{key[:60]!r}: pixels are off by up to {off}"
    if fit(found.target, 16, 16).size != (16, 16):
        yield f"{key[:60]!r}: it cannot be fitted"


def _streamed(case: Case, place: Path) -> list[str]:
    """Read one epoch of it as a stream of one lane, and compare with what a source gives."""
    asked = {"task": "text_to_image", "columns": {}, "prompt": None, "split": "train", "on_bad_row": "skip", "references": None, **case.asked}
    try:
        stream = open_stream("rows", path=case.path, root=place, seed=1, lanes=1, held_out=0, **asked)
        rows: dict[str, Example | str] = {}
        bad: dict[str, str] = {}
        for _, row, seen in stream._in_order():
            if isinstance(seen, str):
                bad[row.key] = seen
                continue
            if row.key not in case.rows and row.key not in case.broken and len(rows) >= _MOST_FILLERS:
                rows[row.key] = ""
                continue
            try:
                rows[row.key] = to_example(row.key, seen)
            except ValueError as error:
                rows[row.key] = str(error)
    except SourceError as error:
        return [*_refused(case, str(error))]
    return [*_places(case, bad), *_contents(case, rows)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        for each in carried_out([case for case in cases() if sys.argv[2] in case.name]):
            print(f"{'LOST' if each.lost else 'ok  '} {each.megabytes:4} MB {each.seconds:5.2f} s  {each.name}", *each.lost, sep="\n       ")
        sys.exit()
    sys.exit(main("data", __doc__, carry_out))
