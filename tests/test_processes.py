"""Several processes, on one machine or on two: the same run as one process makes, and the end of all when one of them fails.

The slow ones start real launchers: `make processes`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from runs import carry_out, make_data, make_world, plan_of, traced, write_plan
from stages import processes as processes_module
from stages.problems import LaunchError, PlanError, RowsError, RunError
from stages.processes import Processes

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SOON = 60.0  # seconds in which a process that fails has brought down all


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def short_plan(world: Path, **changes: Any) -> dict[str, Any]:
    """Two short stages in float32, with micro-batches that four processes can share, and an epsilon that keeps rounding small."""
    plan = plan_of(world, **{"save_every": 1, "previews": {"rows": 0}, **changes})
    plan["stages"] = plan["stages"][1:]
    for stage in plan["stages"]:
        stage |= {"steps": 3, "mix": {"photos": 3, "edits": 1}, "precision": "fp32", "batch": {"images": 8, "micro": 2}, "optimizer": {"eps": 1e-2}}
    return plan


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def forked(number: int, work: Callable[[int], int], output: Path, machines: int = 1) -> tuple[list[int], float]:
    """Run `work(rank)` in so many processes that no launcher looks after, as on machines of their own; their exit codes, and the seconds until the last one ended."""
    port, children = free_port(), []
    on_each = number // machines
    for rank in range(number):
        if (child := os.fork()) == 0:
            code = 1
            try:
                signal.alarm(100)
                log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % on_each), WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(on_each), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                torch.set_num_threads(1)
                code = work(rank)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:  # noqa: BLE001  a forked child of pytest must never go back into it
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, time.monotonic() - began


def in_group(rank: int, number: int, stop: int | None = None) -> Processes:
    """The processes of a group that `forked` started."""
    dist.init_process_group("gloo", rank=rank, world_size=number, timeout=timedelta(seconds=30))
    accelerator: Any = SimpleNamespace(num_processes=number, process_index=rank, local_process_index=int(os.environ["LOCAL_RANK"]))
    noted: Any = SimpleNamespace(signal=stop)
    return Processes(accelerator, noted)


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run of one process, with the number of its events beside it; not to be written into."""
    carry_out(world / "whole", short_plan(world), "--trace", record=world / "count")
    return world / "whole"


def assert_alike(run: Path, whole: Path) -> None:
    """The same rows were drawn, and the adapters are equal but for rounding."""
    assert traced(run) == traced(whole)
    ends = [load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (run, whole)]
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[1]) <= 1e-5


def test_four_processes_draw_the_rows_of_one_and_end_in_its_adapter(world: Path, whole: Path, tmp_path: Path) -> None:
    """Two do so in test_launch.py."""
    carry_out(tmp_path / "run", short_plan(world), "--trace", processes=4)
    assert_alike(tmp_path / "run", whole)


def test_run_killed_and_gone_on_with_two_four_and_one_processes_ends_as_that_of_one(world: Path, whole: Path, tmp_path: Path) -> None:
    plan, count = short_plan(world), int((world / "count").read_text())
    seen = []
    for share, number in enumerate((1, 2, 4), 1):
        carry_out(tmp_path / "moved", plan, "--trace", processes=number, kill_at=count // 4 + share)
        seen.append(len(traced(tmp_path / "moved")))
    assert seen == sorted(set(seen)), "each of them came further"
    carry_out(tmp_path / "moved", plan, "--trace")
    assert_alike(tmp_path / "moved", whole)


@pytest.mark.parametrize(("place", "rank"), [("step", 1), ("killed", 1), ("saving", 0)])
def test_process_that_fails_where_no_launcher_sees_it_ends_the_other_and_speaks_first(world: Path, tmp_path: Path, place: str, rank: int) -> None:
    """As on two machines: the connection is all that tells."""
    file, output, note = write_plan(tmp_path / "plan.yaml", short_plan(world)), tmp_path / "log", tmp_path / "note"

    def work(own: int) -> int:
        processes_module._GRACE, train.FIRST_SPEAKS = 1.0, 0.2
        if own == rank:
            faulty.break_at(place, note)
        return train.main([str(file), "--out", str(tmp_path / "run")])

    codes, _ = forked(2, work, output)
    after, said = time.time() - float(note.read_text()), output.read_text()
    assert after < 15
    assert codes[1 - rank] == 1
    assert codes[rank] == (-signal.SIGKILL if place == "killed" else 1), said
    other = said.index("failed: another process has ended; what it says is the reason")
    if place != "killed":
        assert said.index(faulty.SAYS) < other, said
    if place == "step":  # what a disk does is put into words, and has no traceback
        assert f"This was process {rank}, of 0 to 1." in said


def test_process_that_ends_is_noticed_while_another_does_work_of_its_own(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        processes_module._GRACE = 0.5
        in_group(rank, 2)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return 0

    codes, seconds = forked(2, work, tmp_path / "log")
    assert codes == [1, -signal.SIGKILL]
    assert seconds < 20
    assert (tmp_path / "log").read_text() == "process 0 failed: another process has ended; what it says is the reason\n"


def test_end_of_one_of_three_is_handed_on_to_all(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        processes_module._GRACE = 0.5
        in_group(rank, 3)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return 0

    codes, seconds = forked(3, work, tmp_path / "log")
    assert codes == [1, 1, -signal.SIGKILL]
    assert seconds < 20


def test_process_that_the_launcher_ends_after_another_failed_says_nothing(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        processes = in_group(rank, 2, stop=int(signal.SIGTERM))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with processes.ending_together():
            processes.wait()
        return 0

    codes, _ = forked(2, work, tmp_path / "log")
    assert codes == [1, -signal.SIGKILL]
    assert (tmp_path / "log").read_text() == ""


def test_wait_outlasts_the_limit_of_a_collective_and_a_collective_that_is_late_is_put_into_words(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=0.5))
        accelerator: Any = SimpleNamespace(num_processes=2, process_index=rank, local_process_index=rank)
        noted: Any = SimpleNamespace(signal=None)
        processes = Processes(accelerator, noted)
        if rank == 1:
            time.sleep(1.2)
        processes.wait()
        print("waited", flush=True)
        if rank == 1:
            time.sleep(1.2)
            return 0
        try:
            with processes.ending_together():
                dist.barrier()
        except RunError as error:
            print(error, flush=True)
            return 0
        return 1

    codes, _ = forked(2, work, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert codes == [0, 0], said
    assert said.count("waited\n") == 2
    assert "another process has not come to an exchange in 30 minutes" in said


@pytest.mark.parametrize("differs", ["run", "photos"])
def test_run_on_machines_that_share_no_folder_or_hold_other_rows_is_refused_before_it_trains(world: Path, tmp_path: Path, differs: str) -> None:
    for rank, rows in ((0, 24), (1, 27)):
        make_data(tmp_path / str(rank), rows)
    plan = short_plan(world)
    if differs == "photos":
        plan["sources"]["photos"]["path"] = "photos"
    file = write_plan(tmp_path / "plan.yaml", plan)

    def work(rank: int) -> int:
        processes_module._VISIBLE, train.FIRST_SPEAKS = 0.5, 0.2
        os.chdir(tmp_path / str(rank))
        return train.main([str(file), "--out", "run" if differs == "run" else str(tmp_path / "run")])

    codes, _ = forked(2, work, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert codes == [1, 1], said
    expected = {"run": "failed: the run's folder run is another folder on process 1 than on process 0; pass --out", "photos": "failed: what source 'photos' holds is not the same on process 1"}
    assert expected[differs] in said
    assert "Traceback" not in said


def test_what_all_processes_may_find_is_said_first_by_the_first_and_rows_of_one_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    said = []
    for rank, error in (("0", PlanError.at("p", "x")), ("1", PlanError.at("p", "x")), ("1", RowsError.at("p", "x")), ("0", RunError("x")), ("1", RunError("x"))):
        monkeypatch.setenv("RANK", rank)
        train.say_failure(error)
        said.append((capsys.readouterr().err.strip(), len(waited)))
    assert said == [("p: x", 0), ("process 1: p: x", 1), ("process 1: p: x", 1), ("failed: x", 1), ("process 1 failed: x", 2)]


def test_turns_are_the_main_process_then_the_first_of_each_machine_then_the_rest(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        processes = in_group(rank, 4)
        for is_mine in processes.turns():
            if is_mine:
                time.sleep(0.1)
                print(rank, flush=True)
        processes.close()
        return 0

    codes, _ = forked(4, work, tmp_path / "log", machines=2)
    said = (tmp_path / "log").read_text().split()
    assert codes == [0] * 4
    assert said[:2] == ["0", "2"]
    assert sorted(said[2:]) == ["1", "3"]


def test_folder_that_machines_do_not_share_and_what_differs_between_them_are_refused_on_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    def work(rank: int) -> int:
        processes_module._VISIBLE = 0.5
        processes = in_group(rank, 3)
        processes.check_shared(tmp_path / "a", "the folder", "share it")
        processes.check_alike({"the plan": "one", "the model": "one"})
        said = []
        for check in (
            lambda: processes.check_shared(tmp_path / ("b" if rank == 2 else "a"), "the run's folder", "pass --out"),
            lambda: processes.check_alike({"the plan": "one", "what source 'photos' holds": "two" if rank == 1 else "one"}),
        ):
            try:
                check()
            except LaunchError as error:
                said.append(str(error))
        processes.close()
        expected = ["another folder on process 2 than on process 0; pass --out", "what source 'photos' holds is not the same on process 1 as on process 0; give every machine the same files"]
        return 0 if len(said) == 2 and all(text in found for text, found in zip(expected, said, strict=True)) else 3

    assert forked(3, work, tmp_path / "log")[0] == [0, 0, 0]
    assert list((tmp_path / "a").iterdir()) == []


# --- real launchers -----------------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """As a user's shell has it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "OMP_", "PYTHONPATH", "WORLD_SIZE", "RANK", "LOCAL_", "MASTER_"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


def launchers(number: int) -> dict[str, list[str]]:
    """Ways to start so many processes on one machine."""
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(number)]
    return {"accelerate": [str(BIN / "accelerate"), "launch", "--config_file", f"accelerate_configs/cpu_{number}_processes.yaml"], "torchrun": torchrun}


def started(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output.open("wb"), stderr=subprocess.STDOUT)


def left_of(folder: Path) -> list[str]:
    """Processes whose command names a folder."""
    return [" ".join(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(process.info["cmdline"] or ()) and process.pid != os.getpid()]


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
@pytest.mark.parametrize(("place", "rank"), [("opening", 1), ("encoding", 1), ("step", 1), ("step", 0), ("killed", 1), ("evaluation", 1), ("saving", 0), ("publishing", 0)])
def test_fault_on_one_process_ends_the_launch_within_a_minute_with_its_own_message_first(world: Path, tmp_path: Path, launcher: str, place: str, rank: int) -> None:
    file, output, note = write_plan(tmp_path / "plan.yaml", short_plan(world, workers=1)), tmp_path / "log", tmp_path / "note"
    process = started([*launchers(2)[launcher], "tests/faulty.py", place, str(rank), str(note), str(file), "--out", str(tmp_path / "run")], output)
    code = process.wait(150)
    while left := left_of(tmp_path):
        assert time.time() - float(note.read_text()) < SOON, left
        time.sleep(0.2)
    seconds, said = time.time() - float(note.read_text()), output.read_text()
    print(f"{launcher} {place} on process {rank}: {seconds:.1f} s")
    assert code != 0
    assert seconds < SOON
    if place != "killed":
        failures = [said.find(words) for words in ("another process has ended", "by peer", "ChildFailedError", "process 0 failed", "failed (exitcode")]
        assert 0 < said.index(faulty.SAYS) < min(place for place in failures if place >= 0), said
        assert f"This was process {rank}, of 0 to 1." in said
    assert said.count("Traceback") - said.count("ChildFailedError:") <= (place != "killed"), said


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("way", ["static", "c10d", "torchrun"])
def test_two_launchers_as_of_two_machines_end_in_the_adapter_of_one_process(world: Path, tmp_path: Path, whole: Path, way: str) -> None:
    file, port = write_plan(tmp_path / "plan.yaml", short_plan(world)), free_port()
    train_it = ["train.py", str(file), "--out", str(tmp_path / "two"), "--trace"]
    agents = []
    for machine in (0, 1):
        static = [str(BIN / "accelerate"), "launch", "--config_file", "accelerate_configs/multi_node_static.yaml", "--num_processes", "4"]
        command = {
            "static": [*static, "--machine_rank", str(machine), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)],
            "c10d": [
                *(str(BIN / "accelerate"), "launch", "--config_file", "accelerate_configs/multi_node_rendezvous.yaml", "--num_processes", "4", "--machine_rank", str(machine)),
                *("--rdzv_backend", "c10d", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--rdzv_conf", f"is_host={1 - machine}"),
            ],
            "torchrun": [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"],
        }[way]
        agents.append(started([*command, *train_it], tmp_path / f"{machine}.log"))
    said = [(tmp_path / f"{machine}.log") for machine in (0, 1)]
    assert [agent.wait(150) for agent in agents] == [0, 0], "\n".join(file.read_text() for file in said)
    assert_alike(tmp_path / "two", whole)
