"""The guard: steps whose numbers cannot be right are agreed on, skipped, named and limited; what is saved are numbers."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from faults.number_faults import INF_LOSS, WRONG, NumberFault
from faults.numbers import SOON, carried_out, make_world, once, plan
from mixing.buckets import Signature
from mixing.images import UnreadableImage, decode
from runs import events
from stages.cache import Cache
from stages.dry_step import NoNumbers, dry_step
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.going_on import recorded
from stages.guard import FEWEST, LASTING, REMEMBERED, Course, Guard
from stages.largest import Largest
from stages.leg import TrainingError
from stages.plan import Guard as Asked
from stages.plan import Plan
from stages.precision import StagePrecision
from stages.ruin import refuse_ruin, ruined
from stages.stop import Stop
from stages.weigh_leg import weigh_leg
from stages.weighed import Weighed

SIGMAS = 6.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def judged(asked: Asked, losses: list[float], norms: list[float] | None = None, *, scales: bool = False) -> tuple[Guard, list[Any]]:
    """A guard that has judged these steps, and what it said."""
    guard = Guard(asked, scales=scales)
    return guard, [guard.judge(step, loss, norm) for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), 1)]


# --- what is a spike ---------------------------------------------------------------------------------------------------------------------


def told(draw: Callable[[np.random.Generator], Any], steps: int = 4000) -> float:
    """In which part of the steps of a healthy course a spike is seen."""
    course, values = Course(), draw(np.random.default_rng(5))[:steps]
    return sum(course.takes(float(value), SIGMAS) for value in values) / len(values)


HEALTHY: dict[str, Callable[[np.random.Generator], Any]] = {
    "steps of one image, whose losses differ by the noise level": lambda draw: np.exp(draw.normal(0, 0.9, 4000)),
    "steps of many images": lambda draw: np.exp(draw.normal(0, 0.03, 4000)),
    "a heavy tail": lambda draw: np.exp(draw.standard_t(6, 4000) * 0.3),
    "two sources, one of them rare and ten times as hard": lambda draw: np.where(draw.random(4000) < 0.05, 10.0, 1.0) * np.exp(draw.normal(0, 0.1, 4000)),
    "a gradient that grows while an adapter leaves its beginning": lambda draw: 50 * (1 - np.exp(-np.arange(4000) / 300) + 0.01) * np.exp(draw.normal(0, 0.2, 4000)),
    "always the same": lambda draw: np.full(4000, 0.25),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_course_has_no_spikes(kind: str) -> None:
    assert told(HEALTHY[kind]) <= 1 / 2000


@pytest.mark.parametrize(("spread", "factor"), [(0.03, 2.0), (0.3, 20.0), (0.9, 2000.0)])
def test_a_spike_is_seen_and_not_remembered(spread: float, factor: float) -> None:
    draw, course = np.random.default_rng(3), Course()
    for value in np.exp(draw.normal(0, spread, 300)):
        course.takes(float(value), SIGMAS)
    before = course.state()["logarithms"]
    assert course.takes(factor, SIGMAS)
    assert course.state()["logarithms"] == before
    assert not course.takes(1.0, SIGMAS)
    assert len(course.state()["logarithms"]) == REMEMBERED


def test_nothing_is_a_spike_before_there_is_enough_to_judge_by_and_what_lasts_is_a_new_level() -> None:
    course = Course()
    assert not any(course.takes(value, SIGMAS) for value in [*[1.0] * (FEWEST - 2), 1e6])
    assert not course.takes(1.0, SIGMAS)
    assert not course.takes(1e6, SIGMAS), "one such is remembered"
    assert [course.takes(1e20, SIGMAS) for _ in range(LASTING)] == [True] * LASTING
    assert course.usual is None
    assert not any(course.takes(1e20, SIGMAS) for _ in range(FEWEST))
    assert course.usual == pytest.approx(1e20)
    assert not course.takes(0.0, SIGMAS), "pairs without a difference have no loss"


def test_a_guard_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    draw = np.random.default_rng(1)
    losses = [float(value) for value in np.exp(draw.normal(0, 0.1, 400))]
    for step in (90, 200, 350):
        losses[step] = 1e5
    losses[210] = math.nan
    asked = Asked(on_spike="skip", skips=100)
    whole, said = judged(asked, losses)
    assert [step for step, verdict in enumerate(said) if not verdict.is_made] == [90, 200, 210, 350]
    first, begun = judged(asked, losses[:205])
    second = Guard(asked, scales=False)
    second.load(first.state())
    assert [*begun, *(second.judge(step, losses[step - 1], 1.0) for step in range(206, 401))] == said
    assert second.state() == whole.state()
    assert second.num_skipped == 1
    second.load(None)
    assert second.num_skipped == 1, "a checkpoint of a version without a guard says nothing"


# --- what is skipped, and how often ------------------------------------------------------------------------------------------------------


def test_a_step_with_what_is_no_number_is_not_made_and_too_many_in_a_hundred_are_too_many() -> None:
    bad = [math.nan, math.inf, -math.inf]
    guard, said = judged(Asked(skips=3), [1.0, *bad, 1.0])
    assert [verdict.is_made for verdict in said] == [True, False, False, False, True]
    assert not guard.is_over_limit
    assert guard.judge(101, math.nan, 1.0).not_finite == ("loss",)
    assert guard.is_over_limit, "steps 2, 3, 4 and 101"
    guard, _ = judged(Asked(skips=3), [1.0, *bad, *[1.0] * 98, math.nan])
    assert not guard.is_over_limit, "step 2 is no longer among the last hundred"
    assert judged(Asked(skips=0), [math.nan])[0].is_over_limit


def test_a_gradient_beyond_fp16_is_the_loss_scales_affair_and_a_loss_is_not() -> None:
    guard, said = judged(Asked(), [1.0, math.nan, math.nan], [math.inf, 1.0, math.inf], scales=True)
    assert [verdict.not_finite for verdict in said] == [(), ("loss",), ("loss",)]
    assert guard.num_skipped == 2
    assert judged(Asked(), [1.0], [math.nan])[1][0].not_finite == ("gradient",)


def test_what_the_guard_skips_leaves_the_loss_scale_as_it_is() -> None:
    precision, weight = StagePrecision("fp16", torch.device("cpu")), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(2):
        precision.scaler.scale((weight * math.nan).sum()).backward()
        precision.scaler.unscale_(optimizer)
        optimizer.zero_grad(set_to_none=True)
        precision.leave_scale()
        assert precision.scaler.get_scale() == 65536.0
    precision.scaler.scale(weight.sum()).backward()
    precision.scaler.unscale_(optimizer)
    precision.scaler.step(optimizer)
    assert precision.update_scale()


# --- runs ------------------------------------------------------------------------------------------------------------------------------


def test_one_process_of_two_has_an_infinite_loss_and_both_skip_the_step_name_the_row_and_resume_to_the_bit(world: Path, tmp_path: Path) -> None:
    once(world, tmp_path, INF_LOSS, 2)


def test_a_spike_is_said_with_its_row_and_the_report_tells_it(world: Path, tmp_path: Path) -> None:
    fault = NumberFault(WRONG, 0, SOON + 4)
    assert carried_out(tmp_path / "one", plan(world, steps=SOON + 6), fault, 1) == [0]
    (event,) = events(tmp_path / "one" / "run", "guard")
    assert (event["step"], event["skipped"], event["spikes"][0]) == (SOON + 4, False, "loss")
    assert event["rows"][0]["loss"] > 1e3 * event["usual"]["loss"]
    row = event["rows"][0]
    section = (tmp_path / "one" / "run" / "report.html").read_text().split('id="guard"')[1].split("</section>")[0]
    assert f"{row['source']}: {row['key']}" in section


# --- before anything trains, and between processes ---------------------------------------------------------------------------------------

STAGE = {"name": "learn", "steps": 10, "resolution": 16, "batch": 2, "lr": 0.1}
LARGEST = Largest("a", Signature((16, 16), ()), 2, 99, 0)


@pytest.mark.parametrize(("precision", "cure"), [("fp16", "They leave the range of fp16, which ends at 65,504: set stages[0].precision: bf16"), ("fp32", "look at the model's weights")])
def test_a_dry_step_finds_predictions_that_are_no_numbers_and_says_what_has_a_wider_range(world: Path, monkeypatch: pytest.MonkeyPatch, precision: str, cure: str) -> None:
    family = open_family(str(world / "latent"), torch.device("cpu"))
    predict = Family.predict
    monkeypatch.setattr(Family, "predict", lambda *arguments, **named: predict(*arguments, **named) * 1e38 * 1e38)
    asked = Plan.model_validate({"model": "m", "adapter": {"rank": 2}, "sources": {"a": {"path": "a"}}, "stages": [{**STAGE, "precision": precision, "base": "fp32"}]})
    with pytest.raises(NoNumbers, match=re.escape("stage 'learn' computes what is no number: the predictions of a micro-batch of 2 images of source 'a'")) as found:
        dry_step(family, asked, 0, LARGEST, processes=1)
    assert cure in str(found.value)


def test_a_signal_that_comes_while_processes_ask_one_another_counts_at_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one process would leave, and the others would wait for it."""
    both, stop = SimpleNamespace(num_processes=2, device=torch.device("cpu")), Stop()

    def reduced(values: Tensor, group: object) -> None:
        values *= 2
        stop.signal = signal.SIGTERM

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    try:
        assert stop.exchanged(both, [1.5, math.inf]) == [3.0, math.inf]  # type: ignore[arg-type]
        assert not stop.told
        assert stop.agreed(both)  # type: ignore[arg-type]
        assert stop.told
    finally:
        stop.close()


def test_a_wider_limit_goes_on_with_a_run_and_what_decides_about_steps_does_not() -> None:
    def recorded_with(asked: dict[str, Any]) -> dict[str, Any]:
        plan = Plan.model_validate({"model": "m", "sources": {"a": {"path": "a"}}, "stages": [{**STAGE, "mix": {"a": 1}, "guard": asked}]})
        rows: Any = {"a": SimpleNamespace(source=SimpleNamespace(fingerprint="f"))}
        return recorded(plan, plan.stages[0], "x", rows)

    usual = recorded_with({})
    assert recorded_with({"skips": 50, "sigmas": 9}) == recorded_with({"on_spike": "ignore"}) == usual
    skips = recorded_with({"on_spike": "skip"})
    assert recorded_with({"on_spike": "skip", "skips": 1}) == skips != usual
    assert recorded_with({"on_spike": "skip", "sigmas": 9}) != skips


# --- what is kept are numbers ----------------------------------------------------------------------------------------------------------


def test_latents_and_prompts_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, latents_identity="a", text_identity="b", limit_bytes=None, writer="one")
    image, key = torch.zeros(3, 4, 4), cache.latents_key(b"0" * 16, "x")
    found = [cache.encode_image(key, image, lambda _, value=value: torch.full((1, 2, 2, 2), value)) for value in (math.nan, 1.0, 2.0)]
    assert found[0].isnan().all()
    assert [bool(each.isfinite().all()) for each in found] == [False, True, True]
    assert cache.misses["latents"] == 2, "the first is made anew, and only that"
    cache.keep_text("red", Text(torch.full((2, 3), math.inf), None, None))
    assert cache.text("red") is None
    other = cache.latents_key(b"1" * 16, "x")
    cache.latents.put(other, {"latents": torch.full((2, 2, 2), math.nan)})  # as a former version did
    assert cache.kept_latents(other) is None
    cache.close()


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_an_image_with_a_pixel_that_is_no_number_is_refused(tmp_path: Path, value: float, word: str) -> None:
    pixels = np.full((9, 7), 0.5, dtype=np.float32)
    pixels[4, 4] = value
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match=f"float pixels .*{word}"):
        decode(tmp_path / "x.tif")


def test_what_is_ruined_is_told_by_name() -> None:
    sound, counter = torch.ones(5), torch.tensor(3.0)
    held = {"weights": [sound, torch.tensor([1.0, math.nan])], "moments": [sound, counter, torch.zeros(4, dtype=torch.uint8)], "moving average": [torch.tensor([[math.inf, 0.0]]), torch.empty(0)]}
    assert ruined(held) == ["weights", "moving average"]
    assert ruined({"weights": [sound], "moments": [counter]}) == []


def test_what_is_ruined_on_one_process_is_refused_on_all() -> None:
    """A step of a finite gradient can overflow all the same."""
    sound: Any = SimpleNamespace(held=lambda: {"weights": [torch.ones(2)], "moments": []})
    room = SimpleNamespace(standing=lambda: "the checkpoint of 'learn', step 4, stands")
    for names in ([], ["weights"]):
        gathered = SimpleNamespace(gathered=lambda own, names=names: [own, names])
        leg: Any = SimpleNamespace(training=sound, average=None, run=SimpleNamespace(processes=gathered, room=room, stage_folder=lambda index: Path("1-learn")), stage=SimpleNamespace(name="learn"), index=0, step=6)
        if names:
            with pytest.raises(TrainingError, match="after step 6 the weights are not all numbers, so nothing of it is saved; the checkpoint of 'learn', step 4, stands"):
                refuse_ruin(leg)
        else:
            refuse_ruin(leg)


# --- one wait ----------------------------------------------------------------------------------------------------------------------------


def test_a_step_is_weighed_with_one_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's meta device, where there are no values: all that is asked of it is one tensor of two numbers."""
    meta = torch.device("meta")
    weighed, asked = Weighed(), []
    batch: Any = SimpleNamespace(positions=(0, 1), sources=("a", "b"), keys=("1", "2"))
    weighed.see(batch, SimpleNamespace(x=torch.empty(2, 3, 4, 4, device=meta), references=(torch.empty(2, 3, 4, 4, device=meta),)))  # type: ignore[arg-type]
    weighed.count(batch, [0, 1], torch.empty(2, device=meta))

    def total(own: Weighed, norm: Tensor) -> Tensor:
        asked.append(found(own, norm))
        return torch.tensor([0.5, 3.0], dtype=torch.float64)

    found = Weighed.total
    monkeypatch.setattr(Weighed, "total", total)
    alone: Any = SimpleNamespace(num_processes=1, device=meta)
    stop = Stop()
    leg: Any = SimpleNamespace(run=SimpleNamespace(stop=stop, accelerator=alone), step=0, weighed=weighed, step_images=2, guard=Guard(Asked(), scales=False))
    try:
        assert weigh_leg(leg, torch.empty((), device=meta))
    finally:
        stop.close()
    assert [(tuple(each.shape), each.device) for each in asked] == [((2,), meta)]
    assert leg.norm == 0.5
