"""Train one diffusion transformer through the stages of a plan, handing its checkpoint from stage to stage.

    accelerate launch --config_file accelerate_configs/cpu.yaml train.py plans/quickstart.yaml

Typed again, the same command goes on where it stopped: finished stages are skipped, a half-done one resumes bit for bit.

    python train.py PLAN --check        is the plan sound? under a second, without torch
    python train.py PLAN --explain      what will happen: steps, images, buckets, epochs, rates, memory
    python train.py PLAN --rehearse     the whole plan in miniature, killed and started again in the middle, in minutes on a CPU
    python train.py PLAN --advise       what the next stage could draw, by what the run has measured; changes nothing
    python train.py PLAN --verify-cache encode a hundredth of what the cache keeps anew, and compare
    options: --set PATH=VALUE (again and again)  --out FOLDER  --until STAGE  --trace

Exit code: 0 done, 1 failed, 2 the plan or the data is wrong, 130 or 143 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stages.check import check_plan, plan_notes
from stages.console import end_console
from stages.plan import Plan, Stage
from stages.printable import PrintableConsole, printable
from stages.problems import PlanError, RowsError, RunError
from stages.reader import ReadPlan, read_plan
from stages.resolved import resolved_plan, resolved_rate

FIRST_SPEAKS = 3.0  # seconds that the first process and the launcher have, before another one says what the first one may have found too

if TYPE_CHECKING:  # a plan is read and checked without torch; `run` imports what trains
    from stages.checkpoint import Checkpoint
    from stages.explain import Explanation
    from stages.outcome import Outcome
    from stages.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="train.py", description=(__doc__ or "").split("\n", 1)[0], epilog="docs/plan.md describes the plan.")
    parser.add_argument("plan", type=Path, metavar="PLAN", help="the plan, a YAML file")
    parser.add_argument("--check", action="store_true", help="say whether the plan is sound, and stop")
    parser.add_argument("--explain", action="store_true", help="say what will happen, and stop")
    parser.add_argument("--rehearse", action="store_true", help="carry out the whole plan in miniature, say what was proved, and stop")
    parser.add_argument("--advise", action="store_true", help="suggest the next stage's shares from what the run has measured, and stop")
    parser.add_argument("--verify-cache", action="store_true", help="encode a hundredth of what is kept anew, compare, and stop")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings", help="change a field of the plan, such as stages.refine.steps=50")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the run's folder (runs/NAME; of a rehearsal runs/NAME-rehearsal)")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--trace", action="store_true", help="write every row drawn to trace.jsonl")
    given = parser.parse_args(arguments)
    try:
        if given.rehearse:
            if given.until:
                raise PlanError.at("--until", "a rehearsal goes through all stages; leave it out")
            return rehearsed(given.plan, given.settings, given.out)
        read = checked(given.plan, given.settings)
        if given.until and given.until not in (names := [stage.name for stage in read.plan.stages]):
            raise PlanError.at("--until", f"no stage '{given.until}' (stages: {', '.join(names)})")
        if given.check:
            stages = ", ".join(f"{stage.name} ({stage.steps:,} steps)" for stage in read.plan.stages)
            for note in plan_notes(read, Path.cwd()):
                print(f"note: {printable(note)}")
            print(f"{printable(given.plan)}: sound; {len(read.plan.sources)} sources; stages: {stages}")
            return 0
        if given.explain:
            from stages.quiet import quiet_libraries

            quiet_libraries()
            from stages.explain import explain_run, show

            show(explain_run(read.plan), PrintableConsole())
            return 0
        if given.advise:
            from stages.advise import advise, show_advice

            show_advice(advise(given.out or Path("runs") / read.plan.name), PrintableConsole())
            return 0
        if given.verify_cache:
            from stages.quiet import quiet_libraries

            quiet_libraries()
            from stages.verify_cache import verify_cache

            return 0 if verify_cache(read.plan, PrintableConsole()) else 1
        return launch(read.plan, out=given.out, until=given.until, trace=given.trace)
    except (PlanError, RunError) as error:
        say_failure(error)
        return 2 if isinstance(error, PlanError) else 1
    finally:
        end_console()


def say_failure(error: PlanError | RunError) -> None:
    """Print why this process ends. What every process may have found is said by the first one; another has it said after a while, if its launcher has not ended it by then."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not isinstance(error, RowsError):
        time.sleep(FIRST_SPEAKS)
    who = " ".join(filter(None, ("" if rank == "0" else f"process {rank}", "failed" if isinstance(error, RunError) else "")))
    with suppress(OSError):  # which may lie on the very disk that is full
        print(printable(f"{who}: {error}" if who else error), file=sys.stderr, flush=True)


def checked(path: str | Path, settings: Sequence[str] = ()) -> ReadPlan:
    """Read a plan and check what it means. Raises PlanError with every problem found."""
    read = read_plan(Path(path), settings)
    if problems := check_plan(read, Path.cwd()):
        raise PlanError(problems)
    return read


def rehearsed(path: Path, settings: Sequence[str], out: Path | None) -> int:
    """Carry out a plan in miniature. Returns the exit code. Of several processes the first does it. Raises PlanError if the plan is wrong."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    from stages.quiet import quiet_libraries

    quiet_libraries()
    from stages.rehearse import checked_but_for_places, rehearse

    read = checked_but_for_places(path, settings)
    try:
        return 1 if rehearse(read, out or Path("runs") / f"{read.plan.name}-rehearsal", PrintableConsole()).failed else 0
    except KeyboardInterrupt:
        return 130


def explain(plan: str | Path, *, settings: Sequence[str] = ()) -> Explanation:
    """What a plan will do, as `--explain` says it; a notebook shows it as tables. Raises PlanError if the plan or the data is wrong."""
    from stages.quiet import quiet_libraries

    quiet_libraries()
    from stages.explain import Explanation, explain_run

    return Explanation(tuple(explain_run(checked(plan, settings).plan)))


def run(plan: str | Path, *, settings: Sequence[str] = (), out: Path | None = None, until: str | None = None, trace: bool = False) -> Outcome:
    """Carry out a plan from Python, as the command line does. What comes back says where, and a notebook shows it as the table of what got better.

    plan: the YAML file. settings: as `--set`. Interrupted, by Ctrl-C or the notebook's stop button, it saves after the step under way and comes back; called again, it goes on.
    Raises PlanError if the plan or the data is wrong.
    """
    read = checked(plan, settings)
    exit_code = launch(read.plan, out=out, until=until, trace=trace)
    from stages.outcome import Outcome

    return Outcome(out or Path("runs") / read.plan.name, exit_code)


def launch(plan: Plan, *, out: Path | None, until: str | None, trace: bool) -> int:
    """Go through the stages, skipping what is finished, and publish. Returns the exit code. Raises PlanError if the plan or the data is wrong."""
    from stages.quiet import listen_to_libraries

    heard = listen_to_libraries()
    from stages.aside import Stopped
    from stages.dry_step import dry_steps
    from stages.finish import finish, leave, publish_so_far
    from stages.memory import lasting
    from stages.open_files import allow_many
    from stages.open_run import open_run

    allow_many()
    try:
        with closing(heard), open_run(resolved_plan(plan), out or Path("runs") / plan.name, trace=trace, heard=heard) as run, lasting():
            dry_steps(run)
            for index, stage in enumerate(run.plan.stages):
                last = run.finished(index) or train_stage(run, index, stage)
                if last is None:
                    return leave(run)
                run.baton_from(last)
                publish_so_far(run, index)  # where the plan sends it to the Hub after each stage
                if run.stop.agreed(run.accelerator):
                    run.log.say(f"stopped by {run.stop.name} after stage '{stage.name}', saved; the same command goes on")
                    return leave(run)
                if stage.name == until and index + 1 < len(run.plan.stages):
                    break
            else:
                finish(run)
    except Stopped as stopped:  # while the run was opened
        print(f"stopped by {stopped.name} before a step was made; the same command goes on")
        return stopped.exit_code
    return 0


def train_stage(run: Run, index: int, stage: Stage) -> Checkpoint | None:
    """Train one stage, from its beginning or from its newest checkpoint. Returns its last checkpoint, or None if a signal stopped it."""
    from stages.aside import Stopped
    from stages.evaluate_leg import evaluate_if_due
    from stages.finish_leg import finish_leg
    from stages.log_leg import log_leg
    from stages.objectives.parts import errors_and_losses
    from stages.open_leg import open_leg
    from stages.precision import Multiplied
    from stages.save_leg import save_leg
    from stages.weigh_leg import weigh_leg

    rate = resolved_rate(stage)
    try:
        leg = open_leg(run, index, stage)
    except Stopped:
        run.log.say(f"stopped by {run.stop.name} before a step of '{stage.name}' was made; the same command goes on")
        return None
    family, training, processes = run.family, leg.training, run.accelerator.num_processes

    with closing(leg.lanes), closing(leg.stretches()) as stretches:
        # Mostly there is one stretch, the stage; where shares follow evaluations one ends at each of them, since no row is read before its share is known.
        for batches, until in stretches:
            while leg.step < until:
                learning_rate = leg.learning_rate(rate)
                for group in training.optimizer.param_groups:
                    group["lr"] = learning_rate

                is_last = False
                while not is_last:
                    batch, drawn = next(batches)
                    is_last = batch.is_last
                    # Images to latents, prompts to embeddings; noise, noise levels and dropout come from an image's place in the stage, so they outlive any restart.
                    # A part is what the transformer takes in one call: mostly the whole micro-batch, else one level of a pyramid, or those without references.
                    shown, parts = leg.parts(batch, drawn)
                    # Where a model is sharded every pass needs every process: one that has fewer parts repeats its last one, which then does not count.
                    for part, counts, is_last_part in training.paced(parts, is_last):
                        # Gradients are exchanged between processes with the last part only. The loss is a sum over images divided by the step's
                        # count over all processes, which the mean over processes, as engines take it, asks to be multiplied by their number.
                        watch = Multiplied() if leg.multiplied is None else nullcontext()
                        with leg.dropping(batch, part), nullcontext() if is_last_part else training.held_back():
                            with watch, leg.precision.autocast():
                                predicted = shown.predict_part(family, training.wrapped, part)
                            errors, losses = errors_and_losses(predicted, part)
                            with batches.meanwhile():  # the next micro-batch is read
                                training.backward(losses.sum() * (counts * processes / batch.step_images))
                        if isinstance(watch, Multiplied):
                            leg.check_multiplied(watch)
                        if counts:
                            leg.count_part(batch, part, errors, losses.detach())
                    leg.count(batch)

                leg.check_gradients()
                norm = training.clip(stage.clip)
                # Before a step is made all processes agree on whether every loss and the gradient are numbers; a signal is told of in the same exchange.
                is_sound = weigh_leg(leg, norm)
                made = training.step() if is_sound else training.skip()  # fp16 skips a step whose gradients left its range
                leg.stepped(made, is_sound=is_sound)

                # Every `log_every` steps: one line in metrics.jsonl and on the console, from all processes' counts.
                if leg.step % run.plan.log_every == 0 or leg.step == stage.steps or leg.step == 1:
                    log_leg(leg, learning_rate)
                leg.to_evaluate = bool(run.plan.evaluate.every) and leg.step % (run.plan.evaluate.every or 1) == 0 and leg.step < stage.steps
                with suppress(Stopped):  # a signal breaks it off; it is made when the run goes on
                    evaluate_if_due(leg)
                stopping = run.stop.told  # what all processes agree on; then the step just made is saved and they leave
                if leg.step < stage.steps and (stopping or leg.step % run.plan.save_every == 0):
                    save_leg(leg)
                if stopping and leg.step < stage.steps:
                    run.log.say(f"stopped by {run.stop.name} after step {leg.step} of '{stage.name}', saved; the same command goes on")
                    return None

    return finish_leg(leg)


if __name__ == "__main__":
    sys.exit(main())
