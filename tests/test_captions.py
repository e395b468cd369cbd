"""Captions: every caption gets its turn, as many are left out as asked, tags are shuffled and never lost, and all of it can be derived again."""

from __future__ import annotations

import random
from math import factorial, sqrt

import pytest

from mixing.captions import CaptionRules, caption, plain


def test_without_rules_the_only_caption_stays_as_it_is() -> None:
    assert [caption(["a cat, sitting , here"], CaptionRules(), seed=1, source="s", row="r", epoch=epoch) for epoch in range(3)] == ["a cat, sitting , here"] * 3


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_every_caption_gets_its_turn_before_any_comes_again(number: int) -> None:
    prompts = [f"caption {each}" for each in range(number)]
    orders = set()
    moving = 0
    for row in range(200):
        seen = [caption(prompts, CaptionRules(), seed=0, source="s", row=str(row), epoch=epoch) for epoch in range(3 * number)]
        for first in range(0, 3 * number, number):
            assert sorted(seen[first : first + number]) == prompts
            orders.add(tuple(seen[first : first + number]))
        moving += seen[:number] != seen[number : 2 * number]
    assert len(orders) >= min(factorial(number), 100), "rows have orders of their own"
    assert moving > 60, "and so have the cycles of a row"


def test_captions_come_first_equally_often() -> None:
    prompts = ["a", "b", "c"]
    first = [caption(prompts, CaptionRules(), seed=0, source="s", row=str(row), epoch=0) for row in range(6000)]
    for prompt in prompts:
        assert abs(first.count(prompt) - 2000) < 4 * sqrt(6000 * 2 / 9)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_leaves_out_as_many_as_asked_within_4_sigma(dropout: float) -> None:
    rules = CaptionRules(dropout=dropout, trigger="sks")
    draws = [caption(["a cat"], rules, seed=3, source="s", row=str(row), epoch=epoch) for row in range(1000) for epoch in range(20)]
    assert set(draws) == {"", "sks, a cat"}
    assert abs(draws.count("") - 20_000 * dropout) < 4 * sqrt(20_000 * dropout * (1 - dropout))
    by_row = [draws[start : start + 20].count("") for start in range(0, 20_000, 20)]
    variance = sum((count - 20 * dropout) ** 2 for count in by_row) / 1000
    assert 0.8 < variance / (20 * dropout * (1 - dropout)) < 1.2, "a row's epochs are independent draws"


def test_dropout_does_not_shift_which_caption_has_its_turn() -> None:
    prompts, never = ["a", "b", "c"], CaptionRules()
    for row in map(str, range(50)):
        for epoch in range(12):
            dropped = caption(prompts, CaptionRules(dropout=0.5), seed=0, source="s", row=row, epoch=epoch)
            assert dropped in ("", caption(prompts, never, seed=0, source="s", row=row, epoch=epoch))


def test_captions_are_the_same_in_whatever_order_they_are_asked_for() -> None:
    rules = CaptionRules(trigger="sks dog", dropout=0.3, shuffle_tags=True, keep_tags=1)
    prompts = ["a, b, c, d", "e, f, g", "h"]
    places = [(source, row, epoch) for source in ("one", "two") for row in ("x", "y", "1", "11") for epoch in range(50)]

    def derived(seed: int) -> dict[tuple[str, str, int], str]:
        return {(source, row, epoch): caption(prompts, rules, seed=seed, source=source, row=row, epoch=epoch) for source, row, epoch in places}

    first = derived(5)
    random.Random(0).shuffle(places)
    assert derived(5) == first
    of_one = [first["one", "x", epoch] for epoch in range(50)]
    others = [[first["two", "x", epoch] for epoch in range(50)], [first["one", "y", epoch] for epoch in range(50)], [derived(6)["one", "x", epoch] for epoch in range(50)]]
    assert of_one not in others, "another source, row or seed has draws of its own"


@pytest.mark.parametrize("keep", [0, 1, 3, 6, 100])
def test_shuffled_tags_are_a_permutation_and_kept_ones_stay_in_front(keep: int) -> None:
    tags = ["1girl", "red hair", "sky", "smile", "tree", "solo"]
    rules = CaptionRules(shuffle_tags=True, keep_tags=keep)
    seen = [caption([" 1girl,red hair ,sky,, smile, tree, solo,"], rules, seed=0, source="s", row="r", epoch=epoch).split(", ") for epoch in range(300)]
    for shuffled in seen:
        assert sorted(shuffled) == sorted(tags)
        assert shuffled[:keep] == tags[:keep]
    for place in range(keep, 6):
        assert {shuffled[place] for shuffled in seen} == set(tags[keep:]), "every tag comes to every place"


def test_tags_of_every_source_row_and_epoch_are_shuffled_on_their_own() -> None:
    tags, rules = ", ".join("abcdefgh"), CaptionRules(shuffle_tags=True)
    places = [(source, row, epoch) for source in ("one", "two") for row in ("x", "y") for epoch in range(5)]
    assert len({caption([tags], rules, seed=0, source=source, row=row, epoch=epoch) for source, row, epoch in places}) == len(places)


def test_a_tag_that_stands_twice_stays_twice() -> None:
    assert sorted(caption(["a, b, a"], CaptionRules(shuffle_tags=True), seed=0, source="s", row="r", epoch=1).split(", ")) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("trigger", "prompt", "expected"),
    [
        ("sks dog", "in the park", "sks dog, in the park"),
        ("sks dog", " in the park ", "sks dog, in the park"),
        ("sks dog", "sks dog in the park", "sks dog in the park"),
        ("sks dog", "sks dog", "sks dog"),
        ("sks dog", "sks dog, running", "sks dog, running"),
        ("sks dog", "sks dogma", "sks dog, sks dogma"),
        ("sks dog", "sks dog_2", "sks dog, sks dog_2"),
        ("sks dog", "a sks dog", "sks dog, a sks dog"),
        ("sks dog", "", "sks dog"),
        ("sks dog, ", "running", "sks dog, running"),
        ("sks, dog", "running", "sks, dog, running"),
        ("[V]", "[V]cat", "[V]cat"),
        ("", "running", "running"),
        (None, "running", "running"),
    ],
)
def test_the_trigger_stands_in_front_once(trigger: str | None, prompt: str, expected: str) -> None:
    assert caption([prompt], CaptionRules(trigger=trigger), seed=0, source="s", row="r", epoch=0) == expected
    assert plain([prompt, "another"], CaptionRules(trigger=trigger)) == expected


@pytest.mark.parametrize(("prompt", "moved"), [("a, b, c, d", ["a", "b", "c", "d"]), ("b, sks, dog, c", ["b", "c", "dog", "sks"]), ("sks, dog, b, c, d", ["b", "c", "d"]), ("sks, dog", [])])
def test_the_trigger_stays_in_front_of_shuffled_tags_also_where_the_caption_has_it(prompt: str, moved: list[str]) -> None:
    rules = CaptionRules(trigger="sks, dog", shuffle_tags=True)
    seen = {caption([prompt], rules, seed=0, source="s", row="r", epoch=epoch) for epoch in range(200)}
    for shuffled in seen:
        assert shuffled.split(", ")[:2] == ["sks", "dog"]
        assert sorted(shuffled.split(", ")[2:]) == moved
    assert len(seen) == {4: 24, 3: 6, 0: 1}[len(moved)], "every order comes"


def test_a_trigger_among_the_tags_comes_to_the_front_and_stands_once() -> None:
    rules = CaptionRules(trigger="sks dog", shuffle_tags=True)
    seen = {caption(["park, sks dog, sks dog running"], rules, seed=0, source="s", row="r", epoch=epoch) for epoch in range(100)}
    assert seen == {"sks dog, park, sks dog running", "sks dog, sks dog running, park"}


def test_plain_is_the_first_caption_and_nothing_is_left_out_or_shuffled() -> None:
    rules = CaptionRules(trigger="sks", dropout=0.9, shuffle_tags=True)
    assert plain(["c, b, a", "other"], rules) == "sks, c, b, a"
    assert plain(["c, b, a", "other"], CaptionRules()) == "c, b, a"
