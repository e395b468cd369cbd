"""Verdicts: what is judged of a rehearsal, each from what its runs left behind. Pure functions over run folders."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.handoff import EXACT
from stages.layouts import ADAPTER_FILE, SECOND_FILE
from stages.log_files import log_files, log_lines
from stages.optim import rate_at
from stages.peft_layout import WEIGHTS_FILE
from stages.plan import MixAdaptive, Plan
from stages.rehearsal.launches import Killed, logged
from stages.rehearsal.trained import trained
from stages.rehearsal.verdict import Verdict, judged
from stages.resolved import resolved_rate

_OFF = 2  # images that a share may be off by, beside a micro-batch
_LOSSES = ("stage", "step", "loss", "lr", "grad_norm", "losses", "drawn", "loss_by_noise", "multiplied_in")


def every_verdict(plan: Plan, straight: Path, killed: Path, at: Killed | None, model: Path) -> list[Verdict]:
    """All verdicts. plan: the miniature, resolved. straight, killed: its two runs' folders. model: the folder of the model that they began with."""
    return [
        steps_made(plan, straight),
        shares(plan, straight),
        rates(plan, straight),
        losses(plan, straight),
        precision(plan, straight),
        trained(plan, straight, model),
        handoffs(plan, straight),
        resumed(plan, straight, killed, at),
        published(plan, straight),
    ]


def steps_made(plan: Plan, folder: Path) -> Verdict:
    """Whether every stage made its steps and ended."""
    lines = logged(folder)
    made = {stage.name: [_int(line["step"]) for line in lines if line["event"] == "step" and line["stage"] == stage.name] for stage in plan.stages}
    ended = {str(line["stage"]) for line in lines if line["event"] == "stage" and line.get("state") == "end"}
    wrong = [
        f"stage '{stage.name}' made {len(made[stage.name])} of {stage.steps} steps" + ("" if stage.name in ended else " and did not end")
        for stage in plan.stages
        if made[stage.name] != list(range(1, stage.steps + 1)) or stage.name not in ended
    ]
    return judged("every stage makes its steps", wrong, f"{sum(map(len, made.values()))} steps in {len(plan.stages)} stages", {"steps": {name: len(steps) for name, steps in made.items()}})


def shares(plan: Plan, folder: Path) -> Verdict:
    """Whether each source gave its share of each stage's images, to within two images and a micro-batch; twice that where shares were changed on the way."""
    pages = _json(folder / "ledger.json").get("stages", [])
    micros = Counter((line["stage"], line["step"], line["micro"]) for line in _trace(folder))
    wrong, numbers, worst = [], {}, 0.0
    for stage in plan.stages:
        page = next((page for page in pages if page["stage"] == stage.name), None)
        if page is None:
            wrong.append(f"the ledger has no page for stage '{stage.name}'")
            continue
        allowed = (2 if isinstance(stage.mix, MixAdaptive) else 1) * (_OFF + max((count for (name, _, _), count in micros.items() if name == stage.name), default=0))
        for name, entry in page["sources"].items():
            off = abs(entry["images"] - entry["asked"] * page["images"])
            worst = max(worst, off)
            numbers[f"{stage.name}/{name}"] = {"asked": entry["asked"], "drawn": entry["drawn"], "images": entry["images"], "off": off}
            if not off <= allowed:
                wrong.append(f"stage '{stage.name}': source '{name}' gave {entry['images']} of {page['images']} images, asked {entry['asked']:.1%}, off by {off:.1f} (at most {allowed})")
    drawn = sum(entry["images"] > 0 for entry in numbers.values())
    return judged("sources give their shares", wrong, f"{len(numbers)} shares, off by at most {worst:.1f} images; {drawn} of {len(numbers)} drawn from", numbers)


def rates(plan: Plan, folder: Path) -> Verdict:
    """Whether each step was made at the rate that the plan's curve has there."""
    wrong, numbers = [], {}
    for stage in plan.stages:
        rate, made = resolved_rate(stage), [line for line in logged(folder, "step") if line["stage"] == stage.name]
        skipped = dict(enumerate((int(_float(line.get("skipped", 0))) for line in made), start=1))  # before each step, by fp16; the curve waits
        asked = [rate_at(step - skipped.get(step, 0), stage.steps, rate) for step in range(stage.steps)]
        found = [_float(line["lr"]) for line in made]
        numbers[stage.name] = {"asked": asked, "made": found}
        differing = [number for number, (one, other) in enumerate(zip(asked, found, strict=False)) if one != other]
        if len(asked) != len(found):
            wrong.append(f"stage '{stage.name}': {len(found)} rates for {len(asked)} steps")
        elif differing:
            first = differing[0]
            wrong.append(f"stage '{stage.name}', step {first}: the rate was {found[first]:.6g}, asked {asked[first]:.6g}")
    return judged("learning rates follow the plan", wrong, f"{sum(stage.steps for stage in plan.stages)} steps, each equal to the curve", numbers)


def losses(plan: Plan, folder: Path) -> Verdict:
    """Whether every loss and gradient norm is a number. An overflow of fp16, which loss scaling skips, leaves a norm that is none."""
    scaled = {stage.name for stage in plan.stages if stage.precision == "fp16"}
    lines = logged(folder, "step")
    wrong = [f"stage '{line['stage']}', step {line['step']}: the loss is {line['loss']}" for line in lines if not math.isfinite(_float(line["loss"]))]
    wrong += [f"stage '{line['stage']}', step {line['step']}: the gradient's norm is {line['grad_norm']}" for line in lines if line["stage"] not in scaled and not math.isfinite(_float(line["grad_norm"]))]
    values = [_float(line["loss"]) for line in lines]
    if not values:
        wrong.append("no step was logged")
    found = f"{min(values):.3g} to {max(values):.3g}" if values and not wrong else ""
    return judged("losses are numbers", wrong, found, {"losses": {stage.name: [_float(line["loss"]) for line in lines if line["stage"] == stage.name] for stage in plan.stages}})


def precision(plan: Plan, folder: Path) -> Verdict:
    """Whether matrices were multiplied in what each stage asks for."""
    lines = logged(folder, "step")
    found = {stage.name: sorted({str(line.get("multiplied_in")) for line in lines if line["stage"] == stage.name}) for stage in plan.stages}
    wrong = [f"stage '{stage.name}' asks for {stage.precision}, and multiplied in {', '.join(found[stage.name]) or 'nothing'}" for stage in plan.stages if found[stage.name] != [stage.precision]]
    return judged("stages multiply in their precision", wrong, ", ".join(dict.fromkeys(stage.precision for stage in plan.stages)), found)


# --- handing on, resuming, publishing ---------------------------------------------------------------------------------------------------


def handoffs(plan: Plan, folder: Path) -> Verdict:
    """Whether each handoff was measured, and left the function as it was where nothing in the plan changes it."""
    lines = {str(line["to"]): line for line in logged(folder, "handoff")}
    wrong, numbers, said = [], {}, []
    unmeasured = 0
    for index, stage in enumerate(plan.stages[1:], 1):
        line = lines.get(stage.name)
        if all(stage.expert != earlier.expert for earlier in plan.stages[:index]):
            continue  # the first stage of a transformer takes nothing over
        if line is None:
            wrong.append(f"the handoff to stage '{stage.name}' was not measured")
            continue
        delta: Any = line.get("delta") or {}
        largest = max(delta.values(), default=None)
        numbers[stage.name] = {"way": stage.handoff.adapter, "delta": delta, "exact": line.get("exact"), "cause": line.get("cause")}
        if largest is None:
            unmeasured += 1
        elif not math.isfinite(largest):
            wrong.append(f"the handoff to stage '{stage.name}' changed the function by {largest}")
        elif line.get("exact") and stage.precision == "fp32" and not largest <= EXACT:
            wrong.append(f"the handoff to stage '{stage.name}' changed the function by {largest:.2e} of what was learnt, and nothing in the plan changes it (at most {EXACT:g})")
        else:
            said.append(f"{stage.name} {largest:.1e}" + (f" ({line['cause']})" if line.get("cause") else ""))
    if len(plan.stages) == 1:
        return Verdict("stages hand on what they learnt", "not proved", "there is one stage, and nothing to hand on")
    if unmeasured and not wrong:
        return Verdict("stages hand on what they learnt", "not proved", f"{unmeasured} of {len(plan.stages) - 1} handoffs had no rows to be measured on", numbers)
    return judged("stages hand on what they learnt", wrong, "changed by " + ", ".join(said) if said else "each transformer has one stage", numbers)


def resumed(plan: Plan, straight: Path, killed: Path, at: Killed | None) -> Verdict:
    """Whether the run that was killed and started again ended byte for byte as the other."""
    promise = "a killed run ends as if nothing had happened"
    if at is None:
        if all(stage.steps <= 2 for stage in plan.stages[len(plan.stages) // 2 :]):
            return Verdict(promise, "not proved", "the later stages have too few steps to be killed inside")
        return Verdict(promise, "failed", "the run could not be killed inside a stage")
    where = f"killed in '{at.stage}' after step {at.step}, going on from step {at.saved}"
    wrong = []
    if not any(line.get("resumed_from") == {"stage": at.stage, "step": at.saved} for line in logged(killed, "run")):
        wrong.append(f"it did not go on from step {at.saved} of stage '{at.stage}'")
    compared = 0
    for name, (one, other) in _of_both(straight, killed):
        compared += 1
        if one is None or other is None:
            wrong.append(f"{name} is missing in the run {'straight through' if one is None else 'that was killed'}")
        elif one != other:
            wrong.append(f"{name} differs")
    first, second = ([{word: line.get(word) for word in _LOSSES} for line in logged(folder, "step")] for folder in (straight, killed))
    if first != second:
        place = next((one for one, other in zip(first, second, strict=False) if one != other), None)
        wrong.append(f"the log differs in stage '{place['stage']}' at step {place['step']}" if place else f"the log has {len(second)} steps in the place of {len(first)}")
    numbers = {"stage": at.stage, "step": at.step, "saved": at.saved, "files": compared, "steps": len(first)}
    return judged(promise, [f"{where}: {each}" for each in wrong], f"{where}: {compared} files and {len(first)} steps are equal", numbers)


def _of_both(straight: Path, killed: Path) -> Iterator[tuple[str, tuple[bytes | str | None, bytes | str | None]]]:
    """What two runs left that must be equal: the trace, what was published, and the tensors of every stage's last checkpoint, by their hashes."""
    published = sorted({str(path.relative_to(run)) for run in (straight, killed) for folder in ("adapter", "model") for path in (run / folder).rglob("*.safetensors")})
    yield "trace.jsonl", (_read_trace(straight), _read_trace(killed))
    for name in published:
        yield name, (_read(straight / name), _read(killed / name))
    folders = sorted({str(path.parent.relative_to(run)) for run in (straight, killed) for path in run.glob("stages/*/step-*/manifest.json")})
    for name in folders:
        one, other = (_json(run / name / "manifest.json").get("files", {}) for run in (straight, killed))
        for file in sorted(one.keys() | other.keys()):
            if file.endswith(".safetensors"):
                first, second = (files[file]["sha256"] if file in files else None for files in (one, other))
                yield f"{name}/{file}", (first, second)


def published(plan: Plan, folder: Path) -> Verdict:
    """Whether what was trained was written out and loaded back."""
    promise = "what is published loads back"
    wrong, said = [], []
    numbers: dict[str, object] = {}
    if any(stage.train == "full" for stage in plan.stages):
        if (folder / "model" / "model_index.json").is_file():
            said.append("the model")
        else:
            wrong.append("a stage trains full weights, and no model was written")
    if any(stage.train != "full" for stage in plan.stages):
        lines = logged(folder, "publish")
        difference = _float(lines[-1]["max_difference"]) if lines else float("nan")
        numbers["max_difference"] = difference
        if not lines:
            wrong.append("no adapter was published")
        elif lines[-1]["max_difference"] is None:  # a stream of which no row is held out
            said.append("the adapter, loaded as a user loads it, has the layers that were trained; there was no row to compare outputs on")
        elif not math.isfinite(difference):
            wrong.append(f"the adapter that was loaded back gives outputs that differ by {difference}")
        else:
            said.append(f"the adapter, loaded as a user loads it, differs by at most {difference:.1g}")
        for file in sorted((folder / "adapter").glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    broken = [name for name in names if not bool(opened.get_tensor(name).isfinite().all())]
            except (SafetensorError, OSError) as error:
                wrong.append(f"adapter/{file.name} cannot be read: {error}")
                continue
            if not names or broken:
                wrong.append(f"adapter/{file.name} holds " + (f"{len(broken)} tensors that are no numbers, such as {broken[0]}" if broken else "nothing"))
            numbers[file.name] = len(names)
            if "comfyui" in file.name.lower():
                said.append(f"ComfyUI's file, {len(names)} keys")
        if not any((folder / "adapter" / name).is_file() for name in (ADAPTER_FILE, SECOND_FILE, WEIGHTS_FILE)):
            wrong.append(f"adapter/{ADAPTER_FILE} is missing")
    return judged(promise, wrong, "; ".join(said), numbers)


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_trace(folder: Path) -> bytes | None:
    return b"".join(log_lines(folder, "trace")) if log_files(folder, "trace") else None


def _trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_lines(folder, "trace")]


def _int(value: object) -> int:
    return value if isinstance(value, int) else -1


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
