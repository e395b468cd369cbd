"""The cache: what changed is encoded anew and nothing else; no key stands for two things; what is kept is what the encoder makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stages.digests
from mixing.content import content_hash, latents_key, text_key
from stages.cache import Cache, Verified, verify
from stages.digests import FileDigests, file_digest, folders_digest
from stages.families.base import Text, TextCache
from stages.tensor_store import TensorStore

ROOT = Path(__file__).parent.parent
LONG_AGO = 1_000_000_000

# --- keys -------------------------------------------------------------------------------------------------------------------------------

WORDS = st.one_of(st.text(max_size=12), st.text(alphabet="ab \0:/|", max_size=6), st.text(alphabet="\ud800é\u0301", max_size=3))
CONTENTS = st.binary(min_size=16, max_size=16)


@settings(max_examples=300, deadline=None)
@given(one=st.tuples(CONTENTS, WORDS, WORDS), other=st.tuples(CONTENTS, WORDS, WORDS))
def test_two_things_have_one_key_only_if_they_are_equal(one: tuple[bytes, str, str], other: tuple[bytes, str, str]) -> None:
    assert (latents_key(*one) == latents_key(*other)) == (one == other)
    for changed in ((other[0], *one[1:]), (one[0], other[1], one[2]), (*one[:2], other[2])):
        assert (latents_key(*one) == latents_key(*changed)) == (one == changed)
    assert (text_key(*one[1:]) == text_key(*other[1:])) == (one[1:] == other[1:])
    assert latents_key(*one) != text_key(*one[1:])


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=20), data=st.data())
def test_a_boundary_between_two_parts_that_moves_changes_the_key(text: str, data: st.DataObject) -> None:
    cuts = st.integers(0, len(text))
    first, second = data.draw(cuts), data.draw(cuts)
    content = bytes(16)
    assert (text_key(text[:first], text[first:]) == text_key(text[:second], text[second:])) == (first == second)
    assert (latents_key(content, text[:first], text[first:]) == latents_key(content, text[:second], text[second:])) == (first == second)


def test_keys_are_those_of_caches_that_exist() -> None:
    assert content_hash(b"image").hex() == "bd8df2a8a9f082951387300becc9be66"
    assert latents_key(content_hash(b"image"), "512x512 crop 0.5 0.5 v1", "vae").hex() == "51aa58daf57981955efc156cfd29ba0f"
    assert text_key("a red disc", "t5").hex() == "30e8da88e8abb73b41b0f7e909090394"


def test_a_file_and_its_bytes_have_one_hash(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000  # more than two blocks
    (tmp_path / "image.png").write_bytes(data)
    assert content_hash(tmp_path / "image.png") == content_hash(data)
    assert content_hash(data[:-1]) != content_hash(data)


def test_a_name_in_the_place_of_a_content_hash_is_refused() -> None:
    with pytest.raises(ValueError, match="9 bytes found, a content hash has 16"):
        latents_key(b"photo.png", "512x512", "vae")


def test_keys_are_made_without_torch() -> None:
    program = "import sys, mixing.content; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# --- reading through ----------------------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes images and prompts, and counts."""

    def __init__(self) -> None:
        self.images, self.prompts = 0, list[str]()

    def image(self, images: Tensor) -> Tensor:
        assert images.shape[0] == 1
        self.images += 1
        return images.mean(dim=(2, 3), keepdim=True) * 3

    def text(self, prompts: object) -> Text:
        assert isinstance(prompts, list)
        self.prompts += prompts
        return Text(torch.tensor([[[float(len(prompt)), 1.0]] for prompt in prompts]), torch.tensor([[float(ord(prompt[0]))] for prompt in prompts]))


def open_cache(folder: Path, latents: str = "vae", text: str = "t5", limit: int | None = None) -> Cache:
    return Cache(folder, latents_identity=latents, text_identity=text, limit_bytes=limit, writer="rank0")


def picture(content: bytes) -> Tensor:
    return torch.full((3, 4, 4), float(content_hash(content)[0]))


def run(folder: Path, rows: Mapping[str, tuple[bytes, str]], *, latents: str = "vae", text: str = "t5", transform: str = "4x4") -> tuple[int, list[str]]:
    """One run over rows, name to image file and caption: how many images and which prompts it encoded. What it got is what encoding gives."""
    cache, encoder = open_cache(folder, latents, text), Encoder()
    texts = TextCache()
    texts.stored = cache
    for content, caption in rows.values():
        got = cache.encode_image(cache.latents_key(content_hash(content), transform), picture(content), encoder.image)
        assert torch.equal(got, Encoder().image(picture(content)[None])[0])
        fresh, found = Encoder().text([caption]), texts.encode([caption], lambda place, caption=caption: encoder.text([caption]))
        assert torch.equal(found.embeds, fresh.embeds)
        assert torch.equal(found.pooled, fresh.pooled)
    cache.close()
    assert cache.take_warnings() == []
    assert cache.misses == {"latents": encoder.images, "text": len(encoder.prompts)}
    return encoder.images, encoder.prompts


ROWS = {"a.png": (b"image a", "first"), "b.png": (b"image b", "second"), "c.png": (b"image c", "third")}


def test_each_change_encodes_anew_just_what_changed(tmp_path: Path) -> None:
    assert run(tmp_path, ROWS) == (3, ["first", "second", "third"])
    assert run(tmp_path, ROWS) == (0, [])
    assert run(tmp_path, {**ROWS, "b.png": (b"image b, edited under its old name", "second")}) == (1, [])
    assert run(tmp_path, {**ROWS, "b.png": (b"image b", "second, edited")}) == (0, ["second, edited"])
    assert run(tmp_path, {**ROWS, "d.png": (b"image a", "fourth")}) == (0, ["fourth"])  # the same image under another name
    assert run(tmp_path, {"b.png": ROWS["a.png"], "a.png": ROWS["b.png"]}) == (0, [])  # names that changed places
    assert run(tmp_path, ROWS, latents="another vae") == (3, [])
    assert run(tmp_path, ROWS, text="t5 of another revision") == (0, ["first", "second", "third"])
    assert run(tmp_path, ROWS, transform="4x4 flip") == (3, [])
    assert run(tmp_path, ROWS) == (0, [])  # nothing was overwritten


def test_hits_and_misses_are_counted(tmp_path: Path) -> None:
    cache, encoder = open_cache(tmp_path), Encoder()
    key = cache.latents_key(content_hash(b"x"), "4x4")
    for _ in range(3):
        cache.encode_image(key, picture(b"x"), encoder.image)
    assert cache.text("prompt") is None
    cache.keep_text("prompt", Text(torch.zeros(2, 3), torch.zeros(3)))
    assert cache.text("prompt") is not None
    assert (cache.hits, cache.misses) == ({"latents": 2, "text": 1}, {"latents": 1, "text": 1})


def test_what_one_process_flushed_another_finds_after_refresh(tmp_path: Path) -> None:
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    key = one.latents_key(content_hash(b"x"), "4x4")
    one.encode_image(key, picture(b"x"), Encoder().image)
    one.keep_text("prompt", Text(torch.zeros(2, 3), torch.ones(3)))
    one.flush()
    other.latents.refresh()
    other.texts.refresh()
    assert key in other.latents
    found = other.text("prompt")
    assert found is not None
    assert torch.equal(found.pooled, torch.ones(3))


def test_latents_and_text_keep_to_one_limit(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, limit=20_000)
    for number in range(40):
        cache.keep_text(str(number), Text(torch.zeros(10, 10), torch.zeros(10)))
        cache.encode_image(cache.latents_key(content_hash(str(number).encode()), "4x4"), torch.zeros(3, 20, 20), lambda images: images)
    cache.close()
    sizes = [sum(path.stat().st_size for path in (tmp_path / kind).iterdir()) for kind in ("latents", "text")]
    assert all(size > 0 for size in sizes)
    assert 10_000 < sum(sizes) <= 20_000


def test_prompts_are_encoded_one_at_a_time_and_each_once() -> None:
    texts, asked = TextCache(), list[list[str]]()

    def encode(prompts: list[str]) -> Text:
        return texts.encode(prompts, lambda place: asked.append([prompts[place]]) or Encoder().text([prompts[place]]))

    text = encode(["a", "bb", "a", "ccc"])
    assert asked == [["a"], ["bb"], ["ccc"]]
    assert text.embeds[:, 0, 0].tolist() == [1, 2, 1, 3]
    encode(["ccc", "a"])
    assert len(asked) == 3


def test_texts_at_hand_keep_to_their_limit_the_least_recently_used_leaving_first() -> None:
    texts, encoder = TextCache(limit=2 * 12), Encoder()
    for prompt in ("a", "b", "a", "c", "a", "b"):  # each takes 12 bytes; c pushes b out
        texts.encode([prompt], lambda place, prompt=prompt: encoder.text([prompt]))
    assert encoder.prompts == ["a", "b", "c", "b"]


# --- verifying ----------------------------------------------------------------------------------------------------------------------------

Entry = tuple[bytes, Callable[[], Mapping[str, Tensor]]]


def kept_entries(folder: Path, number: int) -> tuple[TensorStore, list[Entry], list[int]]:
    """A store of entries, what makes them anew, and the numbers of those that were made anew."""
    store, made = TensorStore(folder, limit_bytes=None, writer="test"), list[int]()

    def entry(which: int) -> Entry:
        tensors = {"x": torch.tensor([float(which), 100.0])}
        key = latents_key(bytes(16), str(which), "vae")
        store.put(key, tensors)
        return key, lambda: (made.append(which), tensors)[1]

    return store, [entry(which) for which in range(number)], made


def test_a_keyed_hundredth_is_verified_and_at_least_eight(tmp_path: Path) -> None:
    store, entries, made = kept_entries(tmp_path, 4000)
    assert verify(store, entries + entries) == Verified(checked=len(made), missing=0, different=(), largest=0.0)
    assert 15 < len(made) < 65
    assert len(set(made)) == len(made)
    again = sorted(made)
    made.clear()
    verify(store, reversed(entries))
    assert sorted(made) == again  # whatever the order
    made.clear()
    verify(store, entries, seed=1)
    assert sorted(made) != again
    assert verify(store, entries[:100]).checked == 8
    assert verify(store, entries[:5]).checked == 5
    assert verify(store, entries[:100], fraction=1.0).checked == 100
    assert verify(store, []) == Verified(0, 0, (), 0.0)


def test_entries_that_are_not_what_the_encoder_makes_are_named(tmp_path: Path) -> None:
    store, entries, _ = kept_entries(tmp_path, 6)
    off: dict[int, dict[str, Tensor]] = {
        1: {"x": torch.tensor([1.0, 100.0 + 5e-4])},  # passes
        2: {"x": torch.tensor([2.0, 100.1])},
        3: {"x": torch.tensor([3.0, float("nan")])},
        4: {"y": torch.tensor([4.0, 100.0])},
        5: {"x": torch.tensor([5.0, 100.0]).half()},
    }
    changed: list[Entry] = [(key, (lambda fresh: lambda: fresh)(off.get(number, {"x": torch.tensor([0.0, 100.0])}))) for number, (key, _) in enumerate(entries)]
    found = verify(store, [*changed, (bytes(16), dict)])
    assert found == Verified(checked=6, missing=1, different=tuple(sorted(entries[number][0].hex() for number in (2, 3, 4, 5))), largest=float("inf"))
    assert verify(store, changed[:3]).largest == pytest.approx(1e-3, rel=0.01)
    assert verify(store, changed[:3], tolerance=0.01).different == ()
    assert 0 < verify(store, changed[:2]).largest < 1e-5


# --- whose weights ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names = list[str]()
    monkeypatch.setattr(stages.digests, "file_digest", lambda path: (names.append(path.name), file_digest(path))[1])
    return names


def make_files(folder: Path) -> None:
    for name in ("vae/config.json", "vae/weights.safetensors", "tokenizer/vocab.json", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        os.utime(folder / name, (LONG_AGO, LONG_AGO))


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files' last changes be long ago."""
    monkeypatch.setattr(stages.digests, "_SETTLED_NANOSECONDS", 0)


def test_a_digest_is_of_the_asked_folders_files_by_name_and_content(tmp_path: Path) -> None:
    make_files(tmp_path)
    before = folders_digest(tmp_path, ["vae"], file_digest)
    (tmp_path / "README.md").write_text("changed")
    (tmp_path / "vae" / ".cache").mkdir()
    (tmp_path / "vae" / ".cache" / "note").write_text("hidden")
    assert folders_digest(tmp_path, ["vae"], file_digest) == before
    assert folders_digest(tmp_path, ["vae", "none"], file_digest) != before
    (tmp_path / "vae" / "config.json").rename(tmp_path / "vae" / "config2.json")
    renamed = folders_digest(tmp_path, ["vae"], file_digest)
    assert renamed != before
    (tmp_path / "vae" / "config2.json").write_text("vae/config.jsoN")
    assert folders_digest(tmp_path, ["vae"], file_digest) not in (before, renamed)


def test_a_file_is_hashed_once_and_again_when_it_was_touched(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    make_files(tmp_path)
    weights, memory = tmp_path / "vae" / "weights.safetensors", tmp_path / "cache" / "digests.json"
    first = FileDigests(memory).digest(weights)
    assert FileDigests(memory).digest(weights) == first == file_digest(weights)
    assert hashed == ["weights.safetensors"]
    weights.write_text("vae/weights.safetensorS")  # as long as before
    os.utime(weights, (LONG_AGO, LONG_AGO))  # and as old: the time of the last change of status tells
    assert FileDigests(memory).digest(weights) == file_digest(weights) != first
    assert len(hashed) == 2


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, hashed: list[str]) -> None:
    make_files(tmp_path)
    digests = FileDigests(tmp_path / "digests.json")
    assert digests.digest(tmp_path / "README.md") == digests.digest(tmp_path / "README.md")
    assert len(hashed) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"PATH": 3}', '{"PATH": [1, 2]}', '{"PATH": [1, 2, 3, 4]}', "[" * 100_000])
def test_a_broken_memory_of_digests_is_done_without_and_mended(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    settle(monkeypatch)
    make_files(tmp_path)
    path, memory = tmp_path / "README.md", tmp_path / "digests.json"
    memory.write_text(content.replace("PATH", str(path)))
    for _ in range(2):
        assert FileDigests(memory).digest(path) == file_digest(path)
    assert hashed == ["README.md"]
    assert list(json.loads(memory.read_text())) == [str(path)]
    assert list(tmp_path.glob(".*")) == []


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    make_files(tmp_path)
    (tmp_path / "file").write_text("")
    assert FileDigests(tmp_path / "file" / "digests.json").digest(tmp_path / "README.md") == file_digest(tmp_path / "README.md")
