"""What the libraries beneath remark is shown once, in a line, and recorded; errors always, and nothing from other processes than the first."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runs import carry_out, events, make_world, plan_of
from stages.heard import Heard, Remark


@pytest.fixture
def remarks() -> list[Remark]:
    return []


@pytest.fixture
def heard(remarks: list[Remark]) -> Iterator[Heard]:
    with closing(Heard()) as heard, warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = heard._show  # which pytest had replaced again
        heard.tell(remarks.append)
        yield heard


def test_a_text_is_heard_once_whatever_its_numbers(heard: Heard, remarks: list[Remark]) -> None:
    for number in range(3):
        warnings.warn(f"row {number} is odd", UserWarning, stacklevel=1)
        logging.getLogger("datasets.load").warning("shard %d is slow", number)
    assert [remark.text for remark in remarks] == ["row 0 is odd", "shard 0 is slow"]
    assert remarks[1].library == "datasets"


def test_of_a_library_that_names_another_file_each_time_a_thousand_texts_are_heard_and_errors_still(heard: Heard, remarks: list[Remark]) -> None:
    logger = logging.getLogger("datasets")
    for number in range(1200):
        logger.warning("odd: %s", "".join(chr(97 + int(digit)) for digit in str(number)))
    logger.error("broken")
    assert [remark.text for remark in remarks[-2:]] == ["odd: jjj", "broken"]
    assert len(heard._seen) == 1000


def test_what_is_heard_before_anyone_is_told_waits() -> None:
    told: list[Remark] = []
    with closing(Heard()) as heard:
        logging.getLogger("peft.tuners").warning("early")
        heard.tell(told.append)
    assert told == [Remark("peft", "early")]


def test_a_librarys_own_handler_is_silent_while_somebody_listens_and_speaks_again_after(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("diffusers")
    own, propagates, level = logging.StreamHandler(sys.stderr), logger.propagate, logger.level
    logger.setLevel(logging.WARNING)  # another test may have asked it for errors alone
    logger.addHandler(own)
    logger.propagate = False
    try:
        told: list[Remark] = []
        with closing(Heard()) as heard:
            heard.tell(told.append)
            logger.warning("inside")
        logger.warning("after")
        assert logger.propagate is False
    finally:
        logger.removeHandler(own)
        logger.propagate = propagates
        logger.setLevel(level)
    assert [remark.text for remark in told] == ["inside"]
    assert capsys.readouterr().err == "after\n"


def test_who_asked_a_library_for_more_than_warnings_sees_it_as_it_comes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("accelerate")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    own = logging.StreamHandler(sys.stderr)
    logger.addHandler(own)
    try:
        with closing(Heard()):
            logger.debug("a detail")
    finally:
        logger.removeHandler(own)
    assert capsys.readouterr().err == "a detail\n"


def test_what_a_data_worker_hears_comes_to_the_process_that_listens(heard: Heard, remarks: list[Remark]) -> None:
    child = os.fork()
    if child == 0:
        for number in range(100):  # more than goes through the pipe is let go of, and nothing hangs
            logging.getLogger("datasets").warning("%s %s", "ab"[number % 2] * (number // 2 + 1), "y" * 3000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert remarks == []
    heard.drain()
    assert {remark.heard_by for remark in remarks} == {"a data worker"}
    assert len(remarks) > 10
    assert all(len(remark.text) <= 1000 for remark in remarks)


def test_of_other_processes_only_errors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Heard(rank=2)) as heard:
        logging.getLogger("torch").warning("a warning")
        logging.getLogger("torch").error("an error")
        assert heard.take() == [Remark("torch", "a warning", heard_by="process 2")]
    assert capsys.readouterr() == ("", "process 2: torch: an error\n")


def test_what_stands_behind_an_address_is_not_kept(heard: Heard, remarks: list[Remark]) -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # another test may have quieted it
    logging.getLogger("huggingface_hub").warning("retrying https://example.org/a/b?X-Signature=secret&x=1 in 1 s")
    assert [remark.text for remark in remarks] == ["retrying https://example.org/a/b in 1 s"]


def test_an_error_that_nobody_was_told_is_printed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Heard()):
        logging.getLogger("datasets").error("broken")
    assert capsys.readouterr().err == "datasets: broken\n"


@pytest.mark.launch
def test_remarks_of_a_run_of_two_processes_are_dim_lines_and_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process, and each data worker, has the same to say; it is printed once, and what only the second one says with its number."""
    import mixing.images

    world = make_world(tmp_path / "world")
    real = mixing.images.decode

    def decode(*arguments: object) -> object:
        logging.getLogger("peft").warning("[bold]odd pixels[/bold]")
        if os.environ.get("RANK") == "1":
            logging.getLogger("peft").warning("odd pixels on the second")
        return real(*arguments)  # type: ignore[arg-type]

    for module in [module for name, module in sys.modules.items() if name.startswith(("mixing", "stages")) and getattr(module, "decode", None) is real]:
        monkeypatch.setattr(module, "decode", decode)
    stage = {"name": "one", "steps": 3, "resolution": 8, "batch": {"images": 4, "micro": 2}, "lr": 0.01}
    said = carry_out(tmp_path / "run", plan_of(world, stages=[stage], workers=1, log_every=1, cache="none"), processes=2)
    assert said.count("[bold]odd pixels[/bold]") == 1
    assert said.count("odd pixels on the second") == 1
    assert "\x1b" not in said
    found = {(event["library"], event["message"]): event["heard_by"] for event in events(tmp_path / "run", "library_warning")}
    assert found["peft", "odd pixels on the second"].startswith("process 1")
    assert len(found) == len(events(tmp_path / "run", "library_warning"))
