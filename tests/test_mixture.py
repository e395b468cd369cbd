"""The mixture: from any step, on any number of processes and workers the same rows; held-out rows never; broken rows replaced and named."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixing.batch import MicroBatch, read_rows
from mixing.buckets import Shapes, Signature
from mixing.cells import Level, Micro
from mixing.images import fit, to_tensor
from mixing.mixture import StageMixture, TooManyBadRows
from mixing.order import Budget
from mixing.selected import Choice, Selection, select
from mixing.share_out import TooFewImages
from mixing.shares import shares, weights
from mixing.source import Source
from mixing.tasks import Cells
from runs import launch, make_world, plan_of, write_plan

SIDE = 4
SHAPES = Shapes(SIDE, 1)


@dataclass(frozen=True)
class InMemory:
    """Rows whose images are encoded when asked for: the colour says which row it is."""

    names: tuple[str, ...]
    num_references: tuple[int, ...]
    broken: frozenset[str]

    def key(self, index: int) -> str:
        return self.names[index]

    def keys(self, indices: np.ndarray) -> list[str]:
        return [self.names[index] for index in indices.tolist()]

    def cells(self, index: int) -> Cells:
        content = png(index)
        target = content[:45] if self.names[index] in self.broken else content
        return Cells((f"row {self.names[index]}",), target, tuple(png(index + place + 1) for place in range(self.num_references[index])))


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def source_of(name: str, keys: Sequence[str], references: Sequence[int] = (), broken: Sequence[str] = ()) -> Source:
    number = tuple(references) or (0,) * len(keys)
    sizes, others = np.full((len(keys), 2), SIDE, dtype=np.uint32), np.full((sum(number), 2), SIDE, dtype=np.uint32)
    return Source(name, "edit", np.array(number, dtype=np.uint8), sizes, (), "", InMemory(tuple(keys), number, frozenset(broken)), others)


def group(references: int) -> str:
    """The class of rows of SIDE x SIDE images."""
    return " ".join(["1:1 8", *["+as"] * references])


def rows_of(name: str, number: int) -> list[str]:
    return [f"{name}{row:04d}" for row in range(number)]


def selection_of(name: str, number: int, *, references: Sequence[int] = (), broken: Sequence[str] = (), held_out: int = 0) -> Selection:
    return select(source_of(name, rows_of(name, number), references, broken), Choice(), held_out)


def three_sources() -> dict[str, Selection]:
    """Plain, with one reference, and mixed: half without, half with two."""
    return {
        "a": selection_of("a", 50),
        "b": selection_of("b", 20, references=[1] * 20),
        "c": selection_of("c", 30, references=[0, 2] * 15),
    }


def mixture_of(
    selections: Mapping[str, Selection],
    *,
    mix: Mapping[str, float] | None = None,
    images: int = 16,
    micro: int = 2,
    seed: int = 1,
    drawn_before: Mapping[tuple[str, str], int] | None = None,
    stage: str = "only",
) -> StageMixture:
    return StageMixture(
        selections,
        mix=mix or "natural",
        seed=seed,
        stage=stage,
        levels=[Level(SHAPES)],
        budget=Budget("images", images, images, 1000),
        micro=Micro(images=micro),
        tokens_of=tokens_of,
        drawn_before=drawn_before or {},
    )


def tokens_of(signature: Signature) -> int:
    return sum(height * width for height, width in (signature.target, *signature.references))


def batches(mixture: StageMixture, first: int, last: int, *, rank: int = 0, processes: int = 1, workers: int = 0) -> list[MicroBatch]:
    with closing(mixture.batches(first, last, rank=rank, processes=processes, workers=workers, pin_memory=False)) as reading:
        return list(reading)


def same(one: MicroBatch, other: MicroBatch) -> bool:
    plain = all(getattr(one, name) == getattr(other, name) for name in ("step", "micro", "positions", "sources", "keys", "prompts", "bad"))
    references = len(one.references) == len(other.references) and all(torch.equal(a.pixels, b.pixels) for a, b in zip(one.references, other.references, strict=True))
    return plain and references and torch.equal(one.targets.pixels, other.targets.pixels)


def all_same(one: Sequence[MicroBatch], other: Sequence[MicroBatch]) -> bool:
    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def drawn(found: Sequence[MicroBatch]) -> Iterator[tuple[str, str]]:
    for batch in found:
        yield from zip(batch.sources, batch.keys, strict=True)


# --- the same from any step, on any processes and workers -------------------------------------------------------------------------------


def test_batches_from_a_step_are_those_from_the_beginning_without_the_first() -> None:
    whole = batches(mixture_of(three_sources()), 0, 70)
    for first in (1, 33, 63, 64, 69):
        assert all_same(batches(mixture_of(three_sources()), first, 70), whole[8 * first :])
    assert batches(mixture_of(three_sources()), 70, 70) == []


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_workers_change_nothing(rank: int, processes: int) -> None:
    mixture = mixture_of({**three_sources(), "d": selection_of("d", 40, broken=["d0003", "d0005"])})
    none, two = (batches(mixture, 3, 15, rank=rank, processes=processes, workers=workers) for workers in (0, 2))
    assert all_same(none, two)
    assert any(batch.bad for batch in two)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_out_the_very_batches_that_one_would_get_where_images_are_of_one_size(processes: int) -> None:
    mixture = mixture_of({name: selection_of(name, 20 + 10 * number) for number, name in enumerate("abc")})
    alone = batches(mixture, 5, 12)
    shared = [batches(mixture, 5, 12, rank=rank, processes=processes) for rank in range(processes)]
    assert {len(part) for part in shared} == {len(alone) // processes}
    for part in shared:
        for step in range(5, 12):
            assert [batch.is_last for batch in part if batch.step == step] == [False] * (8 // processes - 1) + [True]
    together = sorted((batch for part in shared for batch in part), key=lambda batch: (batch.step, batch.micro))
    assert all_same(together, alone)


@pytest.mark.parametrize("processes", [3, 5, 7, 16])
def test_any_number_of_processes_shares_out_the_images_of_a_step_and_divides_few_micro_batches(processes: int) -> None:
    mixture = mixture_of(three_sources())
    alone = batches(mixture, 5, 12)
    shared = [batches(mixture, 5, 12, rank=rank, processes=processes) for rank in range(processes)]
    numbered = {position: key for batch in alone for position, key in zip(batch.positions, batch.keys, strict=True)}
    assert sorted(position for part in shared for batch in part for position in batch.positions) == sorted(numbered)
    assert all(numbered[position] == key for part in shared for batch in part for position, key in zip(batch.positions, batch.keys, strict=True))
    assert all(batch.step_images == 16 for part in shared for batch in part)
    for step in range(5, 12):
        pieces = [batch for part in shared for batch in part if batch.step == step]
        assert len(pieces) <= 8 + processes - 1
        assert all(sum(batch.step == step and batch.is_last for batch in part) == 1 for part in shared)


def test_more_processes_than_a_step_has_images_are_refused() -> None:
    with pytest.raises(TooFewImages, match="a step has 16 images, fewer than the 17 processes; start fewer, or make batch larger"):
        batches(mixture_of(three_sources()), 0, 1, processes=17)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_torchs_own_generator_alone(workers: int) -> None:
    before = torch.get_rng_state()
    batches(mixture_of(three_sources()), 0, 2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_can_be_left_half_way() -> None:
    mixture = mixture_of(three_sources())
    with closing(mixture.batches(0, 1000, rank=0, processes=1, workers=2, pin_memory=False)) as reading:
        first = next(reading)
    assert same(first, batches(mixture, 0, 1)[0])


# --- what a batch holds -----------------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_rows_pixels_and_prompts() -> None:
    selections = three_sources()
    for batch in batches(mixture_of(selections), 0, 6):
        assert batch.targets.tensor().shape == (2, 3, SIDE, SIDE)
        assert batch.targets.tensor().dtype == torch.float32
        for place, (name, key) in enumerate(zip(batch.sources, batch.keys, strict=True)):
            source = selections[name].source
            row = rows_of(name, len(source)).index(key)
            example = source.example(row)
            assert batch.prompts[place] == example.prompt == f"row {key}"
            assert torch.equal(batch.targets.tensor()[place], to_tensor(fit(example.target, SIDE, SIDE)))
            assert len(batch.references) == source.num_references[row]
            for reference, image in zip(batch.references, example.references, strict=True):
                assert torch.equal(reference.tensor()[place], to_tensor(fit(image, SIDE, SIDE)))


def test_images_are_numbered_through_the_stage_without_a_gap() -> None:
    found = batches(mixture_of(three_sources()), 4, 9)
    assert [position for batch in found for position in batch.positions] == list(range(4 * 16, 9 * 16))
    assert [(batch.step, batch.micro) for batch in found] == [(step, micro) for step in range(4, 9) for micro in range(8)]


def test_a_source_with_mixed_numbers_of_references_gives_each_row_its_turn_and_no_micro_batch_mixes_them() -> None:
    selections = {"c": selection_of("c", 60, references=[0, 1, 1, 3] * 15)}
    mixture = mixture_of(selections, images=8, micro=2)
    assert {len(row_class.references): len(rows) for row_class, rows in selections["c"].training.items()} == {0: 15, 1: 30, 3: 15}
    found = batches(mixture, 0, 60)
    numbers = Counter(len(batch.references) for batch in found for _ in batch.keys)
    assert numbers == {0: 120, 1: 240, 3: 120}
    assert set(Counter(drawn(found)).values()) == {8}, "eight epochs: each row eight times"
    with_references = {key: int(count) for key, count in zip(rows_of("c", 60), selections["c"].source.num_references, strict=True)}
    assert all(len({with_references[key] for key in batch.keys}) == 1 for batch in found)


def test_counts_of_the_formula_are_those_of_the_batches() -> None:
    mixture = mixture_of(three_sources(), mix={"a": 50, "b": 20, "c": 30})
    for steps in (0, 1, 7, 30):
        counted: Counter[tuple[str, str]] = Counter()
        for batch in batches(mixture, 0, steps):
            counted.update((name, group(len(batch.references))) for name in batch.sources)
        assert mixture.order.drawn_after(steps) == {cell: counted[cell] for cell in mixture.order.drawn_after(steps)}
        assert counted.total() == 16 * steps


def test_a_later_stage_goes_on_in_the_epoch_of_the_one_before() -> None:
    selections = {"a": selection_of("a", 48), "b": selection_of("b", 48, references=[1] * 48)}
    first = mixture_of(selections, images=8, stage="first")
    second = mixture_of(selections, images=16, stage="second", drawn_before=first.order.drawn_after(6))
    seen = Counter(drawn([*batches(first, 0, 6), *batches(second, 0, 3)]))
    assert len(seen) == 96
    assert set(seen.values()) == {1}
    assert second.order.drawn_after(3) == {("a", group(0)): 48, ("b", group(1)): 48}


def test_a_source_that_the_mix_leaves_out_is_not_drawn() -> None:
    assert {name for name, _ in drawn(batches(mixture_of(three_sources(), mix={"a": 1, "b": 0, "c": 2}), 0, 20))} == {"a", "c"}


# --- broken rows ------------------------------------------------------------------------------------------------------------------------


def test_a_broken_row_is_replaced_by_another_of_its_cell_and_named() -> None:
    broken = ["c0002", "c0003", "c0017"]
    whole = {"c": selection_of("c", 30, references=[0, 2] * 15)}
    hurt = {"c": selection_of("c", 30, references=[0, 2] * 15, broken=broken)}
    instead, plain = batches(mixture_of(hurt), 0, 12), batches(mixture_of(whole), 0, 12)
    named: set[str] = set()
    for batch, other in zip(instead, plain, strict=True):
        assert len(batch.references) == len(other.references), "of its cell: with as many references"
        for key, wanted in zip(batch.keys, other.keys, strict=True):
            assert key not in broken
            assert key == wanted or wanted in broken
        assert {row.key for row in batch.bad} >= {key for key in other.keys if key in broken}
        named |= {row.key for row in batch.bad}
        assert all(row.source == "c" and "broken PNG file" in row.reason for row in batch.bad)
    assert named == set(broken)
    assert all_same(instead, batches(mixture_of(hurt), 0, 12))
    assert all_same(instead[40:], batches(mixture_of(hurt), 5, 12)), "resumed, the same rows stand in"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_which_no_row_can_be_read_is_named_with_its_last_row(workers: int) -> None:
    broken = {"a": selection_of("a", 5, broken=rows_of("a", 5))}
    with pytest.raises(TooManyBadRows, match=r"source 'a': 100 rows tried .*: a000\d: .*broken PNG file"):
        batches(mixture_of(broken), 0, 1, workers=workers)


@pytest.mark.launch
def test_a_run_on_rows_of_which_none_can_be_decoded_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    """Their headers are whole, so opening the source finds nothing wrong."""
    world = make_world(tmp_path / "world")
    for file in (world / "data" / "photos").glob("*.png"):
        file.write_bytes(file.read_bytes()[:-100])
    plan = plan_of(world, sources={"photos": {"path": str(world / "data" / "photos")}})
    plan["stages"] = plan["stages"][1:2]
    codes = launch([str(write_plan(tmp_path / "tiny.yaml", plan)), "--out", str(tmp_path / "run")], output=tmp_path / "log")
    printed = (tmp_path / "log").read_text()
    assert codes == [2], printed
    assert "source 'photos'" in printed
    assert "Traceback" not in printed


def test_held_out_rows_are_read_by_signature_and_broken_ones_left_out_and_named() -> None:
    source = source_of("c", rows_of("c", 6), [0, 1, 0, 1, 2, 0], broken=["c0002", "c0004"])
    found, bad = read_rows(select(source, Choice(), 0), [5, 4, 3, 2, 1, 0], SHAPES)
    assert [(batch.keys, len(batch.references)) for batch in found] == [(("c0005", "c0000"), 0), (("c0003", "c0001"), 1)]
    assert {row.key for row in bad} == {"c0002", "c0004"}
    assert read_rows(select(source, Choice(), 0), [], SHAPES) == ([], [])


def test_every_held_out_row_that_cannot_be_read_is_named() -> None:
    """Also where it is the only one with its number of references."""
    source = source_of("c", rows_of("c", 3), [0, 0, 1], broken=["c0001", "c0002"])
    assert {row.key for row in read_rows(select(source, Choice(), 0), [0, 1, 2], SHAPES)[1]} == {"c0001", "c0002"}


# --- which rows: take and held out ------------------------------------------------------------------------------------------------------


def training_keys(selection: Selection) -> list[str]:
    return [selection.source.key(int(row)) for rows in selection.training.values() for row in rows]


def held_out_keys(selection: Selection) -> list[str]:
    return [selection.source.key(int(row)) for row in selection.held_out]


def test_take_first_takes_the_first_and_take_random_others_that_depend_on_its_seed_alone() -> None:
    source = source_of("a", rows_of("a", 100))
    first = select(source, Choice(count=30, by="first"), 0)
    assert training_keys(first) == rows_of("a", 100)[:30]
    chosen = {seed: set(training_keys(select(source, Choice(count=30, seed=seed), 0))) for seed in range(20)}
    assert all(len(keys) == 30 for keys in chosen.values())
    assert chosen[3] == set(training_keys(select(source, Choice(count=30, seed=3), 0)))
    counts = Counter(key for keys in chosen.values() for key in keys)
    assert len(counts) == 100, "every row is taken under some seed"
    assert len({frozenset(keys) for keys in chosen.values()}) == 20


def test_only_taken_rows_are_drawn_in_every_epoch() -> None:
    selection = select(source_of("a", rows_of("a", 100)), Choice(count=30, seed=3), 3)
    seen = Counter(drawn(batches(mixture_of({"a": selection}, images=9, micro=3), 0, 15)))
    assert {key for _, key in seen} == set(training_keys(selection))
    assert set(seen.values()) == {5}
    assert selection.size == 27
    assert set(training_keys(selection)) | set(held_out_keys(selection)) == set(training_keys(select(selection.source, Choice(count=30, seed=3), 0)))


def test_taking_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sources\.a\.take: 101 rows asked, the source has 100"):
        select(source_of("a", rows_of("a", 100)), Choice(count=101), 0)
    assert select(source_of("a", rows_of("a", 100)), Choice(count=100), 0).size == 100


def test_held_out_rows_are_never_drawn_in_training_however_long_it_lasts() -> None:
    selections = {name: selection_of(name, 40, references=[place % 2 for place in range(40)], held_out=8) for name in ("a", "b")}
    held_out = {(name, key) for name, selection in selections.items() for key in held_out_keys(selection)}
    assert len(held_out) == 8, "at most a tenth"
    seen = Counter(drawn(batches(mixture_of(selections, images=36), 0, 20)))
    assert not held_out & seen.keys()
    assert len(seen) + len(held_out) == 80
    assert set(seen.values()) == {10}


def test_held_out_rows_stay_held_out_when_rows_are_added_anywhere() -> None:
    """A new row pushes an old one out only by being held out itself."""
    old = rows_of("a", 200)
    before = set(held_out_keys(select(source_of("a", old), Choice(), 16)))
    for added in ([f"{key}-b" for key in old[::7]], ["0first", "zlast"], [f"new{row}" for row in range(200)]):
        after = set(held_out_keys(select(source_of("a", sorted([*old, *added])), Choice(), 16)))
        assert len(after) == len(before) == 16
        assert len(before - after) == len(after & set(added))
    backwards = set(held_out_keys(select(source_of("a", old[::-1]), Choice(), 16)))
    assert backwards == before
    assert set(held_out_keys(select(source_of("b", old), Choice(), 16))) != before


def test_few_rows_are_all_trained_on() -> None:
    assert len(selection_of("a", 9, held_out=64).held_out) == 0
    assert len(selection_of("a", 10, held_out=64).held_out) == 1
    assert selection_of("a", 9, held_out=64).size == 9


# --- shares -----------------------------------------------------------------------------------------------------------------------------


def test_natural_shares_are_by_rows_that_are_trained_on_after_take() -> None:
    selections = {"a": select(source_of("a", rows_of("a", 100)), Choice(count=50, by="first"), 5), "b": selection_of("b", 55)}
    mixture = mixture_of(selections, images=20)
    assert mixture.asked() == {"a": 0.45, "b": 0.55}
    assert mixture.order.drawn_after(5) == {("a", group(0)): 45, ("b", group(0)): 55}


def test_a_sources_share_is_divided_among_its_signatures_by_their_rows() -> None:
    selections = {"a": selection_of("a", 10), "c": selection_of("c", 40, references=[0, 1, 1, 1] * 10)}
    found = {(cell.source, cell.group): float(cell.weight) for cell in mixture_of(selections, mix={"a": 1.0, "c": 2.0}).order.cells}
    assert found == pytest.approx({("a", group(0)): 1 / 3, ("c", group(0)): 0.5 / 3, ("c", group(1)): 1.5 / 3})


def test_power_goes_from_equal_shares_to_natural_ones() -> None:
    sizes = {"a": 900, "b": 90, "c": 10}
    for power in (0.0, 0.3, 0.5, 1.0):
        wanted = np.array([size**power for size in sizes.values()])
        assert list(shares(Power(power), sizes).values()) == pytest.approx(list(wanted / wanted.sum()), rel=1e-12)
    assert weights(Power(1.0), sizes) == weights("natural", sizes)


@dataclass(frozen=True)
class Power:
    power: float


# --- as a dataset -----------------------------------------------------------------------------------------------------------------------


def test_as_dataset_is_the_same_order_and_maps() -> None:
    mixture = mixture_of(three_sources())
    rows = list(mixture.as_dataset(5))
    found = batches(mixture, 0, 5)
    assert [(row["step"], row["micro"], row["source"], row["key"]) for row in rows] == [
        (batch.step, batch.micro, name, key) for batch in found for name, key in zip(batch.sources, batch.keys, strict=True)
    ]
    mapped = mixture.as_dataset(5).map(lambda row: {"both": f"{row['source']}/{row['key']}"})
    assert [row["both"] for row in mapped] == [f"{row['source']}/{row['key']}" for row in rows]
    assert [row["key"] for row in mixture.as_dataset(5).take(7)] == [row["key"] for row in rows[:7]]


def test_as_dataset_has_the_columns_that_it_promises() -> None:
    mixture = mixture_of(three_sources())
    row = next(iter(mixture.as_dataset(1)))
    promised = ["step", "micro", "source", "key", "prompt", "target", "references", "entity_prompts", "entity_masks"]
    assert all(name in (mixture.as_dataset.__doc__ or "") for name in promised)
    assert sorted(row) == sorted(promised)


def test_as_dataset_has_the_pixels_and_prompts_that_training_sees() -> None:
    mixture = mixture_of(three_sources())
    found = [(batch, place) for batch in batches(mixture, 0, 3) for place in range(len(batch.keys))]
    for row, (batch, place) in zip(mixture.as_dataset(3), found, strict=True):
        assert row["prompt"] == batch.prompts[place]
        seen = [batch.targets.tensor()[place], *(reference.tensor()[place] for reference in batch.references)]
        shown = [row["target"], *row["references"]]
        assert len(shown) == len(seen)
        for pixels, tensor in zip(shown, seen, strict=True):
            assert torch.equal(to_tensor(Image.fromarray(np.asarray(pixels, dtype=np.uint8))), tensor)


def test_a_source_with_repeat_0_is_no_part_of_a_mix_by_size_and_is_drawn_by_name() -> None:
    sizes, counted = {"a": 30, "b": 10, "c": 60}, {"a": 30, "b": 10, "c": 0}
    assert weights("natural", sizes, counted) == {"a": 30, "b": 10}
    assert weights({"c": 1, "a": 1}, sizes, counted) == {"a": 1, "c": 1}
