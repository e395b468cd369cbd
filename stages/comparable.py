"""Comparable: which evaluations of two runs are held against each other, and whether they are paired. Imports no torch."""

from __future__ import annotations

from stages.evaluations import paired_rows
from stages.plan import Plan
from stages.problems import PlanError, listed, nearest
from stages.report.record import Evaluation
from stages.resolved import main_resolution
from stages.side import OpenedRun, Side, side_file


def chosen_evaluations(first: OpenedRun, second: OpenedRun, stage: str | None) -> tuple[Evaluation, Evaluation]:
    """The evaluations of two runs that are compared.

    Of two runs that are done, their ends; else the last of which both have the rows, of one stage, its end or the same step; else the last of each. stage: look at this one alone. Raises
    PlanError if a run has measured nothing in it.
    """
    runs = (first, second)
    found = [[evaluation for evaluation in run.evaluations if stage in (None, evaluation.stage)] for run in runs]
    for run, evaluations in zip(runs, found, strict=True):
        if not evaluations:
            names = list(dict.fromkeys(evaluation.stage for evaluation in run.evaluations))
            raise PlanError.at("--stage", f"{run.folder} has measured nothing in a stage '{stage}' (it has in: {listed(names)}){nearest(stage or '', names)}")
    if stage is not None or not all(run.record.done for run in runs):
        ours = {_point(evaluation): evaluation for evaluation in found[0]}
        common = [(ours[_point(theirs)], theirs) for theirs in reversed(found[1]) if _point(theirs) in ours]
        # Of a long stage the rows of some evaluations are gone; where those of all are, it is the last one that says so.
        kept = [pair for pair in common if all(side_file(run, each).is_file() for run, each in zip(runs, pair, strict=True))]
        if common:
            return (kept or common)[0]
    return found[0][-1], found[1][-1]


def _point(evaluation: Evaluation) -> tuple[str, int | str]:
    """What two runs have in common at an evaluation: its stage, and the stage's end, however many steps it has, or the step."""
    return evaluation.stage, "end" if evaluation.kind == "end" else evaluation.step


def refuse_unpaired(a: Side, b: Side) -> None:
    """Raise PlanError if two evaluations did not measure the same: another model, way or version."""
    place = str(b.run.folder)
    if a.run.fingerprint != b.run.fingerprint and not _same_repository(a.run.fingerprint, b.run.fingerprint):
        raise PlanError.at(place, f"its model is not that of {a.run.folder}, so their losses are not of the same task; compare runs that began with the same model")
    if a.rows.version != b.rows.version:
        raise PlanError.at(place, f"it was measured in another way than {a.run.folder}, by another version of Medley; carry one of them out again")
    seen = [_seen(side.run.plan, side.evaluation.stage) for side in (a, b)]
    for what in seen[0]:
        if seen[0][what] != seen[1][what]:
            raise PlanError.at(
                place,
                f"{what} {seen[1][what]} at {b.where}, and {seen[0][what]} at {a.where} of {a.run.folder}: these losses are not paired; {_cure(a, b)}",
            )


def _seen(plan: Plan, name: str) -> dict[str, str]:
    """What the losses of a stage's evaluations are of, in words."""
    stage = next(stage for stage in plan.stages if stage.name == name)
    return {
        "resolution": str(main_resolution(stage)),
        "buckets": stage.buckets.model_dump_json(exclude_defaults=True),
        "pyramid": "none" if stage.pyramid is None else f"{stage.pyramid.levels} levels, gamma {stage.pyramid.gamma:g}",
        "expert": stage.expert or "none",
    }


def _cure(a: Side, b: Side) -> str:
    """Which stages could be compared instead."""
    seen = [{evaluation.stage: _seen(side.run.plan, evaluation.stage) for evaluation in side.run.evaluations} for side in (a, b)]
    alike = [stage for stage, words in seen[0].items() if seen[1].get(stage) == words]
    return f"write --stage {alike[-1]}, where they are" if alike else "no stage of the same name was measured alike in both"


def _same_repository(first: str, second: str) -> bool:
    """Whether two fingerprints are those of one repository of the Hub, whatever its revision; folders have hashes for fingerprints."""
    return "@" in first and first.partition("@")[0] == second.partition("@")[0]


def notes_on_pair(a: Side, b: Side) -> list[str]:
    """What has to be known of a pair beside its numbers."""
    notes = []
    if a.evaluation.weights != b.evaluation.weights:
        words = {"ema": "the moving average", "raw": "the raw weights"}
        notes.append(f"measured were {words.get(a.evaluation.weights, a.evaluation.weights)} of A and {words.get(b.evaluation.weights, b.evaluation.weights)} of B")
    for name in dict.fromkeys([*a.rows.losses, *b.rows.losses]):
        ours, theirs = a.rows.losses.get(name), b.rows.losses.get(name)
        if ours is None or theirs is None:
            notes.append(f"source '{name}' was measured in {'B' if ours is None else 'A'} alone")
            continue
        both = len(paired_rows(a.rows, b.rows, name))
        if both < max(len(ours), len(theirs)):
            elsewhere = len(ours.keys() & theirs.keys()) - both
            left = f", and {elsewhere} at another noise level" if elsewhere else ""
            notes.append(f"source '{name}': {both} held-out rows are compared; of A's {len(ours)} and B's {len(theirs)} the others are in one run alone{left}")
        held = [side.run.rows_fingerprint(name) for side in (a, b)]
        if held[0] and held[1] and held[0] != held[1]:
            notes.append(f"source '{name}' does not hold the same rows in both runs; rows of one name are taken for the same")
    return notes
