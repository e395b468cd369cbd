"""Open a run: the sources and the run folder, what is done there already, and the lock that keeps a second launch out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

from mixing.bad_rows import SourceError
from mixing.mixture import TooManyBadRows
from mixing.selected import Selection
from mixing.share_out import TooFewImages
from stages.aside import aside, heed
from stages.attention import check_attention
from stages.checkpoint import Checkpoint, keep_newest, newest_checkpoint, restore_replaced, write_whole
from stages.console import EnduringConsole
from stages.engine import Engine, Whole
from stages.evaluation_size import Size
from stages.families.open import fingerprint, open_family
from stages.feed import budget_of
from stages.finish import is_published
from stages.formats import FormatError
from stages.going_on import check_finished, compare_names, compare_stage, recorded, stage_folder
from stages.heard import Heard
from stages.hub.run import Hub, fetch_if_new
from stages.hub.start import start_place
from stages.launched import Launched, launched
from stages.log_files import BEGINNING, place_after, place_of
from stages.open_engine import open_engine
from stages.open_sources import index_folder, open_selections
from stages.plan import Plan
from stages.precision import check_fp8, start_accelerator
from stages.prior import alone, is_made, make_prior, prior_folder
from stages.problems import PlanError, RowsError, RunError
from stages.processes import Processes
from stages.reader import to_yaml
from stages.room import Left, Room, not_writable, words_of
from stages.run import VERSIONS, Run
from stages.start import read_start
from stages.stop import Stop
from stages.track import Log, Trace


@contextmanager
def open_run(plan: Plan, folder: Path, *, trace: bool, heard: Heard | None = None) -> Iterator[Run]:
    """Open the sources and the run folder, find what is done, and hand out the run. heard: what the libraries beneath remark.

    Raises PlanError where plan, data and folder do not fit.
    """
    with launched(os.environ) as told:
        accelerator = start_accelerator()  # before signals are noted: one that waits for another to meet it has nothing to save, and is to end at once
        with closing(Stop()) as stop:
            processes = Processes(accelerator, stop)
            with processes.ending_together():
                yield from _open_run(plan, folder, told, accelerator, processes, stop, heard, trace=trace)


def _open_run(plan: Plan, folder: Path, told: Launched, accelerator: Accelerator, processes: Processes, stop: Stop, heard: Heard | None, *, trace: bool) -> Iterator[Run]:
    engine = open_engine(told, accelerator)
    processes.wait()  # whoever ends now, the others have met it
    engine.refuse(plan)
    if not isinstance(engine, Whole):
        for index, stage in enumerate(plan.stages):
            if stage.offload:
                raise PlanError.at(f"stages[{index}].offload", f"{engine.words} keeps the base's weights itself; remove it, or launch with accelerate_configs/ddp.yaml")
    check_fp8(plan, accelerator.device)
    check_attention(plan, accelerator.device)
    console = EnduringConsole()
    room = Room(folder, stop, partial(console.print, highlight=False, soft_wrap=True) if accelerator.is_main_process else lambda message: None)
    room.open()
    with room.ending_in_words(), _locked(room, accelerator.is_main_process, console.print):
        for index, stage in enumerate(plan.stages):
            budget = budget_of(stage)
            if budget.unit == "images" and min(budget.first, budget.last) < accelerator.num_processes:
                least = min(budget.first, budget.last)
                message = f"a step of {least} image{'s' if least > 1 else ''} cannot be shared by {accelerator.num_processes} processes; start fewer, or make batch larger"
                raise PlanError.at(f"stages[{index}].batch", message)
        if accelerator.is_main_process:
            for index, stage in enumerate(plan.stages):
                room.must("what a checkpoint was to replace", partial(restore_replaced, stage_folder(folder, index, stage.name)))
        processes.check_shared(folder, "the run's folder", "pass --out with a folder on a disk that all machines share")
        model = fingerprint(plan.model)
        priors = _priors(plan, model, folder, processes, engine, stop, accelerator, console)
        selections = _opened(plan, processes, priors)
        rows = {f"what source '{name}' holds": selection.source.fingerprint for name, selection in selections.items()}
        processes.check_alike({"the plan": sha256(to_yaml(plan).encode()).hexdigest(), "the model": model, **rows})
        for name, selection in selections.items():
            if selection.stream is not None and selection.stream.num_lanes < accelerator.num_processes:
                lanes = "1 lane" if selection.stream.num_lanes == 1 else f"{selection.stream.num_lanes} lanes"
                message = f"source '{name}' is read in {lanes}, fewer than the {accelerator.num_processes} processes; start fewer, or set sources.{name}.lanes: {accelerator.num_processes}"
                raise PlanError.at(f"sources.{name}", message)
        checkpoints: list[Checkpoint | None] = []
        said: dict[int, list[str]] = {}
        if plan.publish is not None and plan.publish.checkpoints:
            if accelerator.is_main_process:
                fetch_if_new(plan.publish.repo, folder, console.print)
            processes.wait()
        for index, stage in enumerate(plan.stages):
            try:
                checkpoints.append(found := newest_checkpoint(stage_folder(folder, index, stage.name), said.setdefault(index, []).append))
            except FormatError as error:
                raise PlanError.at("", f"{error}; {error.cure}, or pass --out") from None
            if found:
                compare_stage(folder, index, stage, found, recorded(plan, stage, model, selections))
        compare_names(plan, folder)
        check_finished(plan, folder, checkpoints, said)
        newest = next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint), None)
        # What a killed run wrote after its newest checkpoint is cut off, for it will be done again, but for what it says of a publication that stands; a run that was published is done.
        was_published = newest is not None and newest.state["finished"] and is_published(folder, newest)
        is_done = was_published and newest is checkpoints[-1]
        room.stands = f"'{newest.state['stage']}', step {newest.step}," if newest else ""
        saved = place_of("metrics", newest.state) if newest else BEGINNING
        of_lines = (lambda line: line.startswith(b'{"event": "publish"'), lambda line: line.startswith((b'{"event": "stage"', b'{"event": "step"')))  # the stage that was published; those after it
        published = place_after(folder, "metrics", saved, *of_lines) if was_published else None
        keep = None if is_done else published or saved
        log = Log(room, accelerator, console, keep, plan, heard)
        written = Trace(room, place_of("trace", newest.state) if newest else BEGINNING, log) if trace and accelerator.is_main_process else None
        run = Run(plan, folder, accelerator, processes, engine, selections, checkpoints, log, trace, written, stop, model, room)
        for message in (message for of_stage in said.values() for message in of_stage):
            run.log.warn(message, "", 0)
        run.size = None if run.measures_all else Size.load(folder, lambda message: run.log.warn(f"{message}; how many rows are measured is chosen anew", "", 0))
        try:
            run.baton = read_start(plan, model, start_place(plan.start, folder, processes)) if plan.start else run.baton
        except ValueError as error:
            raise PlanError.at("", str(error)) from None
        if run.baton.adapter is not None and plan.stages[0].train == "full":
            raise PlanError.at("stages[0].train", f"'full', and start: {plan.start} brings an adapter, which belongs to the weights it was trained on; begin with a stage that trains the adapter")
        if accelerator.is_main_process:
            room.must("plan.yaml", lambda: write_whole(folder / "plan.yaml", to_yaml(plan)))
            room.must("environment.json", lambda: write_whole(folder / "environment.json", json.dumps(environment(accelerator), indent=1)))
            if newest and not is_done:
                # What follows a checkpoint, where a launch was killed between the two. Of a stage that goes on the next checkpoint does it.
                for index, checkpoint in enumerate(checkpoints):
                    if checkpoint and checkpoint.state["finished"]:
                        room.must("what stands in the place of older checkpoints", partial(keep_newest, run.stage_folder(index), 1, checkpoint.step))
                page = newest.state["ledger"]
                room.must("ledger.json", lambda: write_whole(folder / "ledger.json", json.dumps(run.ledger(page), indent=1)))
        say_hello(run, newest)
        if not is_done:
            run.log.start_trackers()
        if plan.publish is not None and accelerator.is_main_process:
            run.hub = Hub(folder, plan.publish, run.log)
            if newest is not None:  # a former launch may have ended between saving it and having it sent
                run.hub.put_checkpoint()
        processes.wait()
        run.log.start_view()
        try:
            yield run
            if run.hub is not None:
                run.hub.drain(stop)
            if plan.publish is not None:
                processes.wait()
        except (TooManyBadRows, TooFewImages, SourceError) as error:
            raise RowsError.at("", str(error)) from None
        finally:
            if run.hub is not None:
                run.hub.close()
            if run.cache:
                run.cache.close()
            processes.close()
            run.log.close()
            if run.trace:
                run.trace.close()


def _priors(plan: Plan, model: str, folder: Path, processes: Processes, engine: Engine, stop: Stop, accelerator: Accelerator, console: Console) -> dict[str, Path]:
    """Where the images lie that the model makes itself; those that are not there are made. Raises Stopped if a signal comes meanwhile."""
    places = {name: prior_folder(plan, name, model, Path.cwd(), folder) for name, source in plan.sources.items() if source.prior is not None}
    made = processes.gathered({name: is_made(place) for name, place in places.items()})  # all have seen what is missing before any of it is made
    if missing := [name for name in places if not all(of_process[name] for of_process in made)]:
        places[missing[0]].parent.mkdir(parents=True, exist_ok=True)
        processes.check_shared(places[missing[0]].parent, "the cache's folder", "processes make a prior's images together: name a cache.folder on a disk that all machines share")
        family, say = open_family(plan.model, accelerator.device), console.print if processes.is_main else lambda message: None
        for name in missing:
            try:
                with alone(places[name], processes, partial(heed, stop, accelerator), say):
                    if not processes.gathered(is_made(places[name]))[0]:  # another run may have made them meanwhile
                        make_prior(plan, name, places[name], family, processes, engine, lambda model: aside(model, stop, accelerator, engine), Path.cwd(), say)
            except OSError as error:
                raise RunError(f"sources.{name}.prior: its images cannot be made in {places[name]}: {words_of(error)}; make room, or name another cache.folder, and the same command makes them anew") from error
    return places


def _opened(plan: Plan, processes: Processes, priors: Mapping[str, Path]) -> dict[str, Selection]:
    """The sources; the main process looks at them first, then the first of each machine, and the others read what it has noted."""
    if index_folder(plan) is None:
        return open_selections(plan, Path.cwd(), priors)
    selections: dict[str, Selection] = {}
    for is_mine in processes.turns():
        if is_mine:
            selections = open_selections(plan, Path.cwd(), priors)
    return selections


@contextmanager
def _locked(room: Room, main: bool, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the folder against a second launch. The lock is the process's own and goes with it, however it ends."""
    if not main:
        yield
        return
    try:
        file = room.must("the file .lock", lambda: (room.folder / ".lock").open("w"))
    except Left:
        raise
    except RunError as error:
        raise not_writable(room.folder, error.__cause__ or error) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, its lock is not inherited by data workers that outlive a kill
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise PlanError.at(str(room.folder), "another launch is training in this folder; wait for it, or pass --out") from None
            say(f"[yellow]warning:[/yellow] {escape(str(room.folder))}: its disk keeps no locks ({escape(words_of(error))}), so a second launch there would not be refused; start one at a time")
        yield


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the run was carried out with: no user name, no host name, no environment variable."""
    return {
        "versions": {name: version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device_name(accelerator),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _device_name(accelerator: Accelerator) -> str:
    return torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device.type


def say_hello(run: Run, newest: Checkpoint | None) -> None:
    """The first lines: what is trained, on what, and whether it is gone on with."""
    processes = run.accelerator.num_processes
    run.log.say(f"[bold]{run.plan.name}[/bold]: {len(run.plan.stages)} stages on {_device_name(run.accelerator)}, {processes} {'process' if processes == 1 else 'processes'}{f' by {run.engine.words}' if run.engine.words else ''}, into {escape(str(run.folder))}")
    for name, selection in run.selections.items():
        bad = f", {len(selection.source.bad)} bad rows left out" if selection.source.bad else ""
        rows = f"{selection.size:,} rows to train on" if selection.stream is None else f"a stream in {selection.stream.num_lanes} lanes"
        run.log.say(f"  source {name}: {rows}, {len(selection.held_out)} held out{bad}")
        for row in selection.source.bad[:5]:
            message = f"source '{name}': {row.key}: {row.reason}"
            if newest is None:
                run.log.warn(message, "", 0)
            else:  # recorded when the run began
                run.log.say(f"[yellow]warning:[/yellow] {escape(message)}")
    resumed = {"stage": newest.state["stage"], "step": newest.step} if newest else None
    if not all(checkpoint and checkpoint.state["finished"] for checkpoint in run.checkpoints):
        run.log.write(
            {
                "event": "run",
                "name": run.plan.name,
                "seed": run.plan.seed,
                "fingerprint": run.fingerprint,
                "rows": {name: selection.source.fingerprint for name, selection in run.selections.items()},
                "model": run.plan.model if isinstance(run.plan.model, str) else run.plan.model.repo,
                "device": _device_name(run.accelerator),
                "processes": processes,
                "engine": run.engine.words,
                "versions": {name: version(name) for name in VERSIONS},
                "resumed_from": resumed,
            }
        )
    if newest and not newest.state["finished"]:
        run.log.say(f"going on with stage '{newest.state['stage']}' after step {newest.step}")
