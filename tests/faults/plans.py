"""Faults in plans: ten thousand broken ones through `--check`, and each must be called sound or told what is wrong with it, quickly, in little memory.

    cd tests && ../.venv/bin/python -m faults.plans --whole

A case is lost if the exit code is another than 0 or 2, if a traceback is printed, if it takes more than 2 seconds or if it wants more than a gigabyte; or if the plan was
called sound, and then cannot be written out and read back equal, or be told in words and tables as `--explain` does before it looks at data.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from faults.plan_cases import Case, case, mended  # noqa: E402
from faults.table import Fault, main  # noqa: E402

if TYPE_CHECKING:
    from stages.problems import Problem

SECONDS = 2.0
"""Of the processor, that reading and checking a plan may take."""
BYTES = 2**30
"""Of memory, above what the interpreter and the checks' own modules take."""
SOUND = 1_000_000
"""Numbers from here on are of plans that are made to be sound."""
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HUNG = 30.0  # seconds of the clock, after which a case is given up


@dataclass(frozen=True)
class Checked:
    """What came of a case."""

    number: int
    exit_code: int
    seconds: float
    lost: str = ""
    """What was not as promised; empty if all was."""


def make_world(folder: Path) -> Path:
    """A folder in which plans can be sound: a model's configs, sources of some kinds, and what no reader should touch."""
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    files = {
        "model/model_index.json": json.dumps({"_class_name": "FluxPipeline", "vae": [None, None]}),
        "model/transformer/config.json": json.dumps({"guidance_embeds": False}),
        "model/tokenizer_2/tokenizer_config.json": json.dumps({"model_max_length": 512}),
        "data/edits.jsonl": "".join(json.dumps({"image": f"photos/{number}.png", "source": "photos/0.png", "instruction": "turn it"}) + "\n" for number in range(20)),
        "data/judge/metadata.jsonl": json.dumps({"file_name": "../photos/1.png", "label": "one"}) + "\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "data" / "photos").mkdir()
    for number in range(40):
        Image.new("RGB", (16, 16), (6 * number, 0, 0)).save(folder / f"data/photos/{number}.png")
        (folder / f"data/photos/{number}.txt").write_text("a red square")
    image = (folder / "data/photos/0.png").read_bytes()
    parquet.write_table(pa.table({"image": [image] * 20, "text": ["a"] * 20, "style": ["b"] * 20}), folder / "data" / "rows.parquet")
    (folder / "data" / "loop").symlink_to(folder / "data")
    os.mkfifo(folder / "data" / "pipe.jsonl")
    return folder


def check(given: Case, number: int, plan: Path, tries: int = 3) -> Checked:
    """Put a case through the command line's own function, in this process. plan: where its file is written. tries: how often, while it takes too long."""
    import train

    plan.write_bytes(given.content)
    said = io.StringIO()
    began, lost = time.process_time(), ""
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            exit_code = train.main([str(plan), "--check", *(f"--set={setting}" for setting in given.settings)])
    except BaseException:  # noqa: BLE001 - what no user may see, whatever it is
        exit_code, lost = 1, traceback.format_exc(limit=-4)
    seconds = time.process_time() - began
    if not lost and seconds > SECONDS and tries > 1:  # beside other work a core is slower: the least of some tries counts
        return min((Checked(number, exit_code, seconds, f"{given.name}: took {seconds:.1f} seconds"), check(given, number, plan, tries - 1)), key=lambda each: each.seconds)
    if not lost and exit_code not in (0, 2):
        lost = f"exit code {exit_code}: {said.getvalue()[-300:]}"
    elif not lost and "Traceback" in said.getvalue():
        lost = f"a traceback: {said.getvalue()[-300:]}"
    elif not lost and seconds > SECONDS:
        lost = f"took {seconds:.1f} seconds"
    elif not lost and (active := _ACTIVE.search(said.getvalue())):
        lost = f"printed {active[0]!r}, on which a terminal acts"
    elif not lost and exit_code == 2 and not said.getvalue().strip():
        lost = "refused without a word"
    elif not lost and exit_code == 0:
        lost = _unexplained(plan, given.settings)
    return Checked(number, exit_code, seconds, " ".join(f"{given.name}: {lost}".split()) if lost else "")


def _unexplained(plan: Path, settings: Sequence[str]) -> str:
    """What goes wrong when a sound plan is written out and put into words; empty if nothing does."""
    from rich.console import Console

    from stages.check import check_plan
    from stages.plan_tables import plan_tables
    from stages.reader import read_plan, to_yaml
    from stages.resolved import objective_words, resolution_words, resolved_plan, resolved_rate, step_words

    try:
        meant = read_plan(plan, settings).plan
        for each in (meant, resolved_plan(meant)):
            written = plan.with_suffix(".written.yaml")
            written.write_text(to_yaml(each), encoding="utf-8")
            again = read_plan(written)
            if again.plan != each:
                return "written out and read back it is another plan"
            if problems := check_plan(again, Path.cwd()):
                return f"written out it is refused: {problems[0]}"
        console = Console(file=io.StringIO(), width=200)
        for part in plan_tables(meant):
            console.print(part)
        for stage in resolved_plan(meant).stages:
            _ = objective_words(stage), step_words(stage), resolution_words(stage), resolved_rate(stage)
    except Exception:  # noqa: BLE001 - what no user may see, whatever it is
        return "sound, and then " + traceback.format_exc(limit=-4)
    return ""


def _problems(content: bytes, plan: Path) -> Sequence[Problem]:
    """What is wrong with a plan's text. plan: where its file is written."""
    from stages.check import check_plan
    from stages.problems import PlanError
    from stages.reader import read_plan

    plan.write_bytes(content)
    try:
        return check_plan(read_plan(plan), Path.cwd())
    except PlanError as error:
        return error.problems


def explained(numbers: Sequence[int], world: Path) -> list[Checked]:
    """Say in full what sound plans will do, in this process, which imports torch: what `--check` lets through, `--explain` can tell."""
    from rich.console import Console

    from stages.explain import explain
    from stages.open_sources import open_selections
    from stages.prior import planned, priors_made
    from stages.reader import read_plan

    found = []
    plan = world / "explained.yaml"
    with contextlib.chdir(world):
        for number in numbers:
            given = mended(number, lambda content: _problems(content, plan))
            if given is None or b"hub/" in given.content:  # a network is not asked
                continue
            began, lost = time.process_time(), ""
            try:
                meant = read_plan(plan).plan
                opened = open_selections(meant, world, priors_made(meant, world))
                console = Console(file=io.StringIO(), width=200)
                for part in explain(meant, {name: opened[name] if name in opened else planned(meant, name) for name in meant.sources}, None):
                    console.print(part)
            except ValueError as error:  # of which the command makes a PlanError
                lost = "" if any(said in str(error) for said in _OF_DATA) else str(error)
            except Exception:  # noqa: BLE001 - what no user may see, whatever it is
                lost = traceback.format_exc(limit=-4)
            found.append(Checked(number, 1 if lost else 0, time.process_time() - began, " ".join(f"{given.name}: {lost}".split()) if lost else ""))
    return found


_OF_DATA = ("no row of ", "tokens, and a micro-batch at most")
"""What only a look at the data can say."""


def serve(world: Path) -> None:
    """In a process of its own: check the cases whose numbers come in, a line each; a line of JSON goes out for each."""
    os.chdir(world)
    from pyarrow import parquet

    parquet.read_metadata("data/rows.parquet")  # what the checks import on their way, and arrow's own arena, count as theirs and not as a plan's
    out, sys.stdout = sys.stdout, io.StringIO()
    plan = world / f"plan-{os.getpid()}.yaml"
    check(case(0), 0, plan)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, held + BYTES))
    for line in sys.stdin:
        number = int(line)
        try:
            given = case(number) if number < SOUND else mended(number, lambda content: _problems(content, plan))
            found = check(given, number, plan) if given else Checked(number, 2, 0.0)
        except Exception:  # noqa: BLE001 - of making the case, or of checking it on the way to a sound one
            found = Checked(number, 1, 0.0, traceback.format_exc(limit=-4))
        print(json.dumps([found.number, found.exit_code, found.seconds, found.lost]), file=out, flush=True)


def check_all(numbers: Sequence[int], world: Path, processes: int = 2) -> list[Checked]:
    """Check cases in processes whose memory is limited; one that hangs or dies costs its case alone."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        waiting.put(number)
    found: list[Checked] = []
    threads = [threading.Thread(target=lambda: found.extend(_served(waiting, world))) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(numbers), f"{len(found)} of {len(numbers)} cases came back"
    return sorted(found, key=lambda each: each.number)


def _served(waiting: queue.SimpleQueue[int], world: Path) -> Iterator[Checked]:
    """Take numbers until none are left, through one process after another."""
    server: _Server | None = None
    while True:
        try:
            number = waiting.get_nowait()
        except queue.Empty:
            break
        server = server or _Server(world)
        answer = server.ask(number)
        yield answer or Checked(number, -1, _HUNG, server.end())
        if answer is None or answer.lost:  # what it has taken of its memory must not count against the next
            server.end()
            server = None
    if server is not None:
        server.end()


class _Server:
    """A process that checks cases."""

    def __init__(self, world: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "faults.plans", "--serve", str(world)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=TESTS
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.numbers: IO[str] = self.process.stdin
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.answers.put(line)
        self.answers.put("")

    def ask(self, number: int) -> Checked | None:
        """What came of a case; None if the process hangs or has ended."""
        print(number, file=self.numbers, flush=True)
        with contextlib.suppress(queue.Empty):
            if line := self.answers.get(timeout=_HUNG):
                return Checked(*json.loads(line))
        return None

    def end(self) -> str:
        """End the process, and say how it stood."""
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        return f"no answer within {_HUNG:g} seconds" if code is None else f"the process ended with {code}"


def as_fault(name: str, checked: Sequence[Checked]) -> Fault:
    """The table's line of some cases."""
    lost = tuple(f"case {each.number}: {each.lost}" for each in checked if each.lost)
    return Fault(name, len(checked), len(checked) - len(lost), lost)


def typed(number: int, world: Path) -> Checked:
    """A case through the command as it is typed."""
    given, plan = case(number), world / "typed.yaml"
    plan.write_bytes(given.content)
    settings = [f"--set={setting}" for setting in given.settings if len(setting) < 100_000 and "\0" not in setting]
    began = time.monotonic()
    ended = subprocess.run([sys.executable, TESTS.parent / "train.py", plan, "--check", *settings], cwd=world, capture_output=True, text=True, errors="replace", timeout=_HUNG, check=False)
    said = ended.stdout + ended.stderr
    lost = "" if ended.returncode in (0, 2) and "Traceback" not in said else f"{given.name}: exit code {ended.returncode}: {' '.join(said[-300:].split())}"
    return Checked(number, ended.returncode, time.monotonic() - began, lost)


def misplaced(world: Path, whole: bool) -> Fault:
    """What is no plan at all, under a name that is given for one: told in a line, and nothing waits."""
    places = world / "places"
    (places / "folder").mkdir(parents=True)
    os.mkfifo(places / "pipe")
    (places / "loop").symlink_to("loop")
    (places / "zero").symlink_to("/dev/zero")
    (places / "\x1b]0;x\x07[red].yaml").write_text("model: 1\n")
    for name in (b"\xff.yaml", "\u202e.yaml".encode()):
        (places / os.fsdecode(name)).write_text("model: 1\n")
    names = ["folder", "pipe", "zero", "\x1b]0;x\x07[red].yaml", "/proc/self/environ"]
    if whole:
        names += ["loop", "socket", "gone", "gone/plan.yaml", "pipe/plan.yaml", "x" * 300, "/dev/null", "/dev/tty", "/dev/stdin", "/proc/self/mem", "/proc/self/pagemap", "/proc/self/exe", "/proc/self/fd/0", os.fsdecode(b"\xff.yaml"), "\u202e.yaml"]
    lost = []
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(places):
        listening.bind("socket")
        for name in names:
            try:
                ended = subprocess.run([sys.executable, TESTS.parent / "train.py", name, "--check"], cwd=places, stdin=subprocess.DEVNULL, capture_output=True, timeout=_HUNG, check=False)
            except subprocess.TimeoutExpired:
                lost.append(f"{name!r}: it waits")
                continue
            said = (ended.stdout + ended.stderr).decode("utf-8", "surrogateescape")
            if ended.returncode != 2 or "Traceback" in said or _ACTIVE.search(said) or not said.strip() or len(said) > 2_000:
                lost.append(f"{name[:50]!r}: exit code {ended.returncode}: {said[-300:]!r}")
    return Fault("what is no plan, in the place of one", len(names), len(names) - len(lost), tuple(lost))


def carry_out(whole: bool) -> list[Fault]:
    """10,000 cases, or 500; of plans made to be sound a tenth as many."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        checked = check_all(range(10_000 if whole else 500), world)
        sound = check_all(range(SOUND, SOUND + (1_000 if whole else 50)), world)
        told = explained(range(SOUND, SOUND + (300 if whole else 20)), world)
        by_hand = [typed(number, world) for number in range(0, 3_000 if whole else 300, 10 if whole else 20)]
        elsewhere = misplaced(world, whole)
        executed = tuple(f"{path} was made" for path in (world / "canary", TESTS / "canary", Path("canary")) if path.exists())
    number, slowest = sum(each.exit_code == 0 for each in checked), max(checked, key=lambda each: each.seconds)
    return [
        as_fault(f"a plan made from the schema or broken ({number:,} called sound; the slowest took {slowest.seconds:.2f} s)", checked),
        as_fault("a sound plan with many fields, written out, read back and put into words", sound),
        as_fault("a sound plan explained over its data", told),
        as_fault("a broken plan, the command typed", by_hand),
        elsewhere,
        Fault("tags that execute, in any of them", 1, 0 if executed else 1, executed[:1]),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        sys.exit(main("plans", __doc__, carry_out))
