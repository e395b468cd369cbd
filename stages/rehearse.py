"""Rehearse: the whole plan in miniature, killed and started again in the middle, before it costs a day of a GPU.

A tiny random model of the plan's pipeline class, a few rows of each source (its own where they can be read), a few steps of each stage, on the CPU, by
train.py itself. What is judged of it stands in stages.rehearsal.verdicts.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixing.buckets import Signature
from stages.check import check_plan
from stages.check_model import model_problems, read_folder
from stages.check_objectives import family_problems
from stages.check_sources import source_problems
from stages.explain import byte_words, rate_words, short, stage_bytes, work_words
from stages.families.facts import FAMILIES, UnsuitableModel, tasks_of
from stages.paths import place_of
from stages.plan import Change, Plan, Prior, Source, Take
from stages.problems import PlanError, Problem
from stages.reader import ReadPlan, read_plan, to_yaml
from stages.rehearsal.likeness import Likeness, build_likeness, likeness_of
from stages.rehearsal.miniature import SmallSource, Tiny, miniature, small_numbers, small_sides
from stages.resolved import main_resolution, resolution_words, resolved_batch, resolved_plan, resolved_rate, step_words

if TYPE_CHECKING:
    from stages.explain import ModelFacts
    from stages.rehearsal.launches import Launched
    from stages.rehearsal.verdict import Verdict

RECORD = "rehearsal.json"
_COPIED = 60  # rows of a large source


@dataclass(frozen=True)
class Rehearsal:
    """What came of it."""

    folder: Path
    plan: Plan
    """In miniature."""
    likeness: Likeness
    sources: Mapping[str, SmallSource]
    notes: tuple[str, ...]
    """What of the plan was left out or changed in kind."""
    launched: Launched
    verdicts: tuple[Verdict, ...]

    @property
    def failed(self) -> list[str]:
        """The promises that were broken; of runs that did not end, that."""
        return [verdict.promise for verdict in self.verdicts if verdict.outcome == "failed"] + (["both runs end"] if self.launched.failures else [])


def checked_but_for_places(path: Path, settings: Sequence[str]) -> ReadPlan:
    """Read a plan and check all that it means, but for data and models that are not here. Raises PlanError with every problem found."""
    read, root = read_plan(path, settings), Path.cwd()
    problems = set(check_plan(read, root))
    problems -= {problem for problem in source_problems(read, root) if not _names_what_is_there(problem, read, root)}
    repo = read.plan.model if isinstance(read.plan.model, str) else read.plan.model.repo
    if not os.path.isdir(place_of(root, repo)):
        problems -= set(model_problems(read, root))
    if problems:
        raise PlanError(problems)
    return read


def _names_what_is_there(problem: Problem, read: ReadPlan, root: Path) -> bool:
    """Whether a problem is one of a source whose data is here, or one of the source's fields, which no data cures."""
    from stages.rehearsal.own_rows import is_there

    name = next((name for name in sorted(read.plan.sources, key=len, reverse=True) if problem.where.startswith(f"sources.{name}")), None)
    if name is None:
        return read.plan.evaluate.accuracy is not None and os.path.isdir(place_of(root, read.plan.evaluate.accuracy.labelled))
    if read.plan.sources[name].prior is not None:
        return not problem.where.endswith(".prior.prompts")
    return is_there(read.plan.sources[name], root) or problem.where.endswith(".stream")


def rehearse(read: ReadPlan, folder: Path, console: Console) -> Rehearsal:
    """Carry out a plan in miniature, judge it, print what was found, and write it to rehearsal.json in the folder.

    Raises PlanError if the plan is wrong, its model is not known, or the folder holds something else.
    """
    from stages.rehearsal.launches import launch_both
    from stages.rehearsal.verdicts import every_verdict

    began, root, plan = time.monotonic(), Path.cwd(), read.plan
    try:
        likeness = likeness_of(plan.model, root)
    except PlanError as error:
        raise PlanError(Problem(read.place("model"), "model", problem.message) for problem in error.problems) from None
    _check_family(read, likeness, root)
    folder = folder.absolute()
    _clear(folder)
    with console.status("a tiny model and rows") as status:
        facts = _facts(plan, likeness)
        tiny = _tiny(likeness, plan, folder)
        sides = small_sides(plan, tiny.multiple, is_own=tiny.is_own)
        sources, notes = _small_sources(plan, likeness, folder, root, max(sides.values()))
        small, more = miniature(plan, tiny, sources, folder)
        file = folder / "plan.yaml"
        file.write_text(f"# {plan.name} in miniature, written by --rehearse\n{to_yaml(small)}", encoding="utf-8")
        again = read_plan(file, written_out=True)
        if problems := check_plan(again, root):
            raise PlanError(Problem(problem.place, problem.where, f"{problem.message} (in the plan's miniature)") for problem in problems)
        small = resolved_plan(again.plan)
        launched = launch_both(file, small, folder, status.update)
        status.update("what came of it")
        verdicts = every_verdict(small, launched.straight, launched.killed, launched.at, Path(place_of(root, likeness.repo)) if tiny.is_own else tiny.folder)
    if launched.failures:
        verdicts = [verdict for verdict in verdicts if verdict.promise.startswith("every stage")]
    rehearsal = Rehearsal(folder, small, likeness, sources, tuple([*notes, *more]), launched, tuple(verdicts))
    _record(rehearsal, plan, facts, time.monotonic() - began)
    show(rehearsal, plan, facts, console, time.monotonic() - began)
    return rehearsal


# --- making it --------------------------------------------------------------------------------------------------------------------------


def _check_family(read: ReadPlan, likeness: Likeness, root: Path) -> None:
    """Raise PlanError where the plan asks for what a model of this class cannot do. Of a folder this was checked before."""
    repo = read.plan.model if isinstance(read.plan.model, str) else read.plan.model.repo
    if os.path.isdir(place_of(root, repo)):
        return
    family, can = likeness.family, tasks_of(likeness.pipeline)
    second = likeness.index.get("transformer_2")
    experts = FAMILIES[family].experts if (isinstance(second, list) and second and second[0]) or any(stage.expert for stage in read.plan.stages) or "a14b" in repo.lower() else ()
    problems = list(family_problems(read, family, likeness.pipeline, experts, 1))
    for name, source in read.plan.sources.items():
        if source.task not in can:
            message = f"{family} cannot train task '{source.task}' (it can: {', '.join(can)}); remove source '{name}' or choose another model"
            problems.append(Problem(read.place("sources", name, "task"), f"sources.{name}.task", message))
    if problems:
        raise PlanError(problems)


def _clear(folder: Path) -> None:
    """Make the folder ready, emptied of an earlier rehearsal. Raises PlanError if it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise PlanError.at(str(folder), "is no folder; pass --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RECORD).is_file():
            raise PlanError.at(str(folder), "holds something that is no rehearsal; pass --out, or remove it")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps({"state": "under way"}), encoding="utf-8")
    except OSError as error:
        raise PlanError.at(str(folder), f"cannot be written: {(error.strerror or str(error)).lower()}; pass --out") from None


def _tiny(likeness: Likeness, plan: Plan, folder: Path) -> Tiny:
    """Build the tiny model, and look at what it asks for."""
    import torch
    from torch import nn

    from stages.families.open import ARCHITECTURES

    place = build_likeness(likeness, plan, folder / "model")
    try:
        model = read_folder(str(place))
    except UnsuitableModel as error:
        raise PlanError.at("model", f"'{likeness.repo}' {error}") from None
    transformer = ARCHITECTURES[likeness.family].transformer_class
    with torch.device("meta"):
        laid_out = transformer.from_config(transformer.load_config(place, subfolder="transformer"))
    layers = tuple(name for name, module in laid_out.named_modules() if isinstance(module, nn.Linear))
    sizes = model.sizes
    return Tiny(place, likeness.own is not None, sizes.pixel_multiple, sizes.text_tokens, sizes.takes_guidance, layers)


def _small_sources(plan: Plan, likeness: Likeness, folder: Path, root: Path, side: int) -> tuple[dict[str, SmallSource], list[str]]:
    """Every source with few rows: its own where they can be read in seconds, else made ones. Raises PlanError naming a source that is here and cannot be opened."""
    from mixing.columns import TASKS
    from stages.open_sources import open_selections
    from stages.rehearsal.own_rows import first_rows, is_small, is_there
    from stages.rehearsal.rows import make_rows

    notes: list[str] = []
    own = {name: source for name, source in plan.sources.items() if source.prior is None and is_there(source, root)}
    real = {name: source for name, source in own.items() if is_small(source, root)}
    for name, source in own.items():
        if name not in real and (copies := first_rows(source, folder / "data" / name, root, _COPIED)) is not None:
            take = None if source.take is None or source.take.count is not None else source.take
            real[name] = source.model_copy(update={"path": copies, "take": take})
            notes.append(f"source '{name}' is large; its first {_COPIED} rows were copied, and the others were not looked at")
        elif name not in real:
            notes.append(f"source '{name}' is large; rows were made in the place of its own, so that it need not be opened")
    update = {"sources": real, "cache": "none", "evaluate": plan.evaluate.model_copy(update={"rows": 0})}
    opened = open_selections(plan.model_copy(update=update), root, {}) if real else {}
    known: dict[str, int | None] = {}
    for name, source in plan.sources.items():
        if name in real and not source.stream:
            known[name] = opened[name].size
        else:
            known[name] = source.prior.count if source.prior is not None else source.rows or (source.take.count if source.take is not None else None)
    wanted = small_numbers(known)
    several = FAMILIES[likeness.family].names_images or any(len(stage.buckets.references or ()) > 1 for stage in plan.stages)
    sources: dict[str, SmallSource] = {}
    for name, source in plan.sources.items():
        if source.prior is not None:
            sources[name] = SmallSource(_prompts_there(source, source.prior, root), min(source.prior.count, 4), note="images that the tiny model makes")
        elif name in real:
            classes = list(opened[name].training)
            references, regions = (max(numbers, default=0) for numbers in ([len(each.references) for each in classes], [each.regions for each in classes]))
            note = "its own first rows" if source.stream or source.take is None else "its own rows"
            sources[name] = SmallSource(_capped(real[name], known[name], wanted[name]), wanted[name], references, regions, note=note)
        else:
            made = make_rows(name, source, folder / "data" / name, rows=wanted[name], side=side, several=several)
            notes += made.notes
            what = " and ".join([TASKS[source.task].references * "references", TASKS[source.task].regions * "regions"]).strip(" and")
            sources[name] = SmallSource(made.source, made.rows, made.references, made.regions, is_made=True, note="made rows" + (f" with {what}" if what else ""))
    return sources, notes


def _capped(source: Source, size: int | None, wanted: int) -> Source:
    """A source of which few rows are used."""
    if source.stream:
        return source.model_copy(update={"rows": wanted if source.rows is not None else None})
    if size is None or size <= wanted:
        return source
    if source.take is None:
        return source.model_copy(update={"take": Take(count=wanted, by="first")})
    return source.model_copy(update={"take": source.take.model_copy(update={"count": wanted, "fraction": None})})


def _prompts_there(source: Source, prior: Prior, root: Path) -> Source:
    """A prior whose prompts can be had: a file that is not here gives way to a list."""
    if isinstance(prior.prompts, str) and not os.path.isfile(place_of(root, prior.prompts)):
        return source.model_copy(update={"prior": prior.model_copy(update={"prompts": ["a red square", "a blue disc"]})})
    return source


# --- saying it --------------------------------------------------------------------------------------------------------------------------


def _facts(plan: Plan, likeness: Likeness) -> ModelFacts | None:
    """What the real model's configs say, where they can be had at once. Raises PlanError where the plan does not fit them."""
    if not likeness.index:
        return None
    from stages.model_facts import model_facts

    try:
        return model_facts(plan)
    except ValueError as error:  # a pattern that matches nothing; a part that the model lacks
        raise PlanError.at("", str(error)) from None


def not_proved(rehearsal: Rehearsal, plan: Plan) -> list[str]:
    """What a rehearsal does not show, in sentences."""
    likeness, sentences = rehearsal.likeness, []
    if likeness.own is None:
        sentences.append(f"the real weights of {likeness.repo}: a tiny random {likeness.pipeline} stood for them, known by {likeness.source}; memory and speed are theirs")
    if made := [name for name, small in rehearsal.sources.items() if small.is_made]:
        sentences.append(f"the real rows of {', '.join(made)}: rows were made of the right shape")
    if [stage.resolution for stage in plan.stages] != [stage.resolution for stage in rehearsal.plan.stages]:
        sentences.append("the real resolutions: " + ", ".join(f"{resolution_words(stage)} became {resolution_words(small)}" for stage, small in zip(plan.stages, rehearsal.plan.stages, strict=True)))
    if halves := sorted({stage.precision for stage in plan.stages} - {"fp32"}):
        sentences.append(f"{' and '.join(halves)} as a GPU computes it: a CPU rounds alike, and overflows elsewhere")
    sentences.append("several processes, and that anything is learnt: the steps are few and the model is random")
    return [*sentences, *rehearsal.notes, *(f"{verdict.promise}: {verdict.found}" for verdict in rehearsal.verdicts if verdict.outcome == "not proved")]


def full_run(plan: Plan, facts: ModelFacts | None) -> list[tuple[str, str]]:
    """What the whole plan will take, stage by stage: its name, and steps, images, rate and memory in words."""
    rows = []
    for index, stage in enumerate(plan.stages):
        batch = resolved_batch(stage)
        asked = batch.images if batch.images is not None else batch.tokens
        first, last = (asked.first, asked.last) if isinstance(asked, Change) else (asked or 0, asked or 0)
        total = stage.steps * (first + last) // 2
        words = [f"{stage.steps:,} steps of {step_words(stage)}, {short(total)} {'images' if batch.images is not None else 'tokens'} at {resolution_words(stage)} pixels"]
        words.append(f"rate {rate_words(resolved_rate(stage), stage.steps)}")
        if facts is None:
            words.append("memory is not known, for the model's configs could not be had")
        else:
            words.append(f"{byte_words(stage_bytes(index, stage, facts))} of weights, gradients and optimizer, and activations on top")
            side = main_resolution(stage)
            tokens = total * (1 if batch.images is None else facts.sizes.tokens(Signature((side, side), ())))
            words.append(work_words(stage, facts, tokens))
        rows.append((stage.name, "; ".join(words)))
    return rows


def show(rehearsal: Rehearsal, plan: Plan, facts: ModelFacts | None, console: Console, seconds: float) -> None:
    """Print the verdicts, what was not proved, and what the full run will take."""
    like = f"{rehearsal.likeness.repo} itself" if rehearsal.likeness.own else f"a tiny {rehearsal.likeness.pipeline} for {rehearsal.likeness.repo}"
    stages = len(rehearsal.plan.stages)
    console.print(Text.assemble((plan.name, "bold"), f", rehearsed with {like}, {stages} stage{'s' if stages > 1 else ''}, twice, in {seconds:.0f} s, in {rehearsal.folder}"), soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("promise")
    table.add_column("found", overflow="fold")
    marks = {"proved": Text("proved", "green"), "failed": Text("FAILED", "bold red"), "not proved": Text("not proved", "yellow")}
    for verdict in rehearsal.verdicts:
        table.add_row(marks[verdict.outcome], verdict.promise, Text(verdict.found))
    console.print(table)
    sources = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("source", "task", "rows", "stood for by"):
        sources.add_column(column, justify="right" if column == "rows" else "left")
    for name, small in rehearsal.sources.items():
        sources.add_row(Text(name), small.source.task, str(small.rows), Text(small.note))
    console.print(sources)
    for failure in rehearsal.launched.failures:
        console.print(Text(failure, "red"), soft_wrap=True)
    _list(console, "Not proved", not_proved(rehearsal, plan))
    _list(console, "The full run", [f"{name}: {words}" for name, words in full_run(plan, facts)])
    if rehearsal.failed:
        console.print(Text(f"rehearsal failed: {', '.join(rehearsal.failed)}", "bold red"), soft_wrap=True)
    else:
        console.print(Text("rehearsal passed", "bold green"))
    if (report := rehearsal.launched.straight / "report.html").exists():
        console.print(Text(f"the report of the miniature, as the run will write one: {report}"), soft_wrap=True)


def _list(console: Console, heading: str, lines: list[str]) -> None:
    console.print(Text(heading, "bold"))
    for line in lines:
        console.print(Text(f"- {line}"), soft_wrap=True)


def _record(rehearsal: Rehearsal, plan: Plan, facts: ModelFacts | None, seconds: float) -> None:
    """Write rehearsal.json."""
    launched = rehearsal.launched
    record = {
        "state": "failed" if rehearsal.failed else "passed",
        "failed": rehearsal.failed,
        "name": plan.name,
        "seconds": round(seconds, 1),
        "seconds_of_runs": round(launched.seconds, 1),
        "model": {"repo": rehearsal.likeness.repo, "pipeline": rehearsal.likeness.pipeline, "family": rehearsal.likeness.family, "known_by": rehearsal.likeness.source, "is_itself": rehearsal.likeness.own is not None},
        "sources": {name: {"rows": small.rows, "references": small.references, "regions": small.regions, "made": small.is_made, "note": small.note} for name, small in rehearsal.sources.items()},
        "killed": None if launched.at is None else asdict(launched.at),
        "failures": list(launched.failures),
        "verdicts": [asdict(verdict) for verdict in rehearsal.verdicts],
        "not_proved": not_proved(rehearsal, plan),
        "full_run": dict(full_run(plan, facts)),
    }
    (rehearsal.folder / RECORD).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
