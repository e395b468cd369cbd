"""The cache in whole runs: whatever is in it, a run ends in the same weights; nothing is encoded that is there, and nothing that is there is used for another."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

import mixing.reading
import stages.finish
import stages.open_leg
import stages.tensor_shards
import stages.tensor_store
import stages.verify_cache
from mixing.buckets import AS_TARGET, RowClass, Signature
from mixing.reading import View, gathered, read_row
from mixing.tasks import Cells
from models import tiny_flux
from runs import adapter_bytes, carry_out, events, launch, make_data, plan_of, write_plan
from stages.adapter import add_adapter
from stages.cache import Cache
from stages.encode import KeptLatents, encode
from stages.families.family import Family
from stages.families.flux import Flux
from stages.plan import Adapter
from stages.tensor_store import TensorStore

pytestmark = pytest.mark.launch
CPU = torch.device("cpu")
EDITED = "007.bmp"
STAGE = {"steps": 4, "resolution": 16, "batch": {"images": 8, "micro": 4}, "lr": 0.01, "precision": "fp32"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, and a tiny model with a VAE. What forked runs import, and what Python keeps of classes, is at hand before the first fork."""
    folder = tmp_path_factory.mktemp("world")
    photos = make_data(folder / "data") / "photos"
    for path in sorted(photos.glob("*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))  # its length follows from height and width alone
        path.unlink()
    family = Family(Flux(), str(tiny_flux(folder / "model", pixels=False)), None, None, CPU)
    add_adapter(family.load_transformer(torch.float32, None), Adapter(), family.target_patterns, 0)
    gc.collect()
    gc.freeze()
    yield folder
    gc.unfreeze()


def plan_for(world: Path, folder: Path | None, *stage_changes: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A plan of one stage for each of `stage_changes`, at least one, that draws every photo. folder: of its cache, or None for none."""
    mix = {"photos": 4, "edits": 1}
    made = [{**STAGE, "name": f"stage{number}", "mix": mix, **each} for number, each in enumerate(stage_changes or ({},))]
    kept: object = "none" if folder is None else {"folder": str(folder)}
    return plan_of(world, **{"stages": made, "previews": {"rows": 0}, "save_every": 1, "log_every": 1, "cache": kept, **changes})


# --- what runs encode -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A run that was carried out, over all its processes."""

    folder: Path
    printed: str
    loaded: tuple[str, ...]
    """Encoders that were loaded, by class."""
    images: int
    """Images that the VAE encoded."""
    prompts: tuple[str, ...]
    """Prompts that the text encoders encoded."""
    hits: Counter[str]
    misses: Counter[str]

    @property
    def result(self) -> tuple[dict[str, bytes], list[object]]:
        """The bits of the published adapter, and every loss. (The adapter file holds the plan too, and with it what was said of the cache.)"""
        adapter = {name: value.numpy().tobytes() for name, value in load_file(self.folder / "adapter" / "pytorch_lora_weights.safetensors").items()}
        losses = [(line["stage"], line["step"], line["loss"], line["losses"]) for line in events(self.folder, "step")]
        return adapter, [*losses, *((line["stage"], line["kind"], line["sources"]) for line in events(self.folder, "eval"))]

    @property
    def warnings(self) -> list[str]:
        return [line["message"] for line in events(self.folder, "warning")]


RunPlan = Callable[..., Done]


@pytest.fixture
def carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPlan:
    """Carries out a plan in forked processes, which note what they load, encode, find and miss."""
    record = tmp_path / "record"

    def note(**what: object) -> None:
        with record.open("ab", buffering=0) as file:
            file.write(json.dumps(what).encode() + b"\n")

    def watched(owner: type, name: str, before: Callable[..., None]) -> None:
        original = getattr(owner, name)
        inner = getattr(original, "__func__", None)

        def noting(self: object, *arguments: object, **named: object) -> object:
            before(self, *arguments)
            return (inner or original)(self, *arguments, **named)

        monkeypatch.setattr(owner, name, classmethod(noting) if inner else noting)

    for encoder in (AutoencoderKL, CLIPTextModel, T5EncoderModel):
        watched(encoder, "from_pretrained", lambda cls, *_: note(loaded=cls.__name__))
    watched(AutoencoderKL, "encode", lambda _, images: note(images=len(images)))
    watched(FluxPipeline, "encode_prompt", lambda _, prompts: note(prompts=prompts))
    watched(Cache, "close", lambda cache: note(hits=cache.hits, misses=cache.misses))

    def act(name: str, plan: dict[str, Any], *options: str, processes: int = 1, kill_at: int | None = None, count: Path | None = None) -> Done:
        record.write_bytes(b"")
        printed = carry_out(tmp_path / name, plan, *options, processes=processes, kill_at=kill_at, record=count)
        lines = [json.loads(line) for line in record.read_bytes().splitlines()]
        hits, misses = (sum((Counter(line[word]) for line in lines if word in line), Counter()) for word in ("hits", "misses"))
        loaded = tuple(sorted(line["loaded"] for line in lines if "loaded" in line))
        prompts = tuple(prompt for line in lines for prompt in line.get("prompts", ()))
        return Done(tmp_path / name, printed, loaded, sum(line.get("images", 0) for line in lines), prompts, hits, misses)

    return act


Uncached = Callable[[int, int], Done]


@pytest.fixture(scope="module")
def uncached(world: Path) -> Uncached:
    """The run that keeps nothing, with some number of stages and processes."""

    @cache
    def of(stages: int, processes: int) -> Done:
        folder = world / f"uncached-{stages}-{processes}"
        printed = carry_out(folder, plan_for(world, None, *[{}] * stages), processes=processes)
        return Done(folder, printed, (), 0, (), Counter(), Counter())

    return of


@pytest.fixture(scope="module")
def filled(world: Path) -> Path:
    """A cache that holds all that the run of one stage asks for; not to be written into."""
    carry_out(world / "filling", plan_for(world, world / "filled"))
    return world / "filled"


def copy_of(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def entries(folder: Path, kind: str) -> set[bytes]:
    """The keys that are kept."""
    return {entry.key for path in (folder / kind).glob("*.safetensors") for entry in stages.tensor_shards.read_header(path)}


# --- a cache changes nothing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "workers", "processes"),
    [
        *(("cold", 0, 1), ("cold", 2, 1), ("warm", 2, 1), ("half", 2, 1), ("limited", 0, 1)),
        *(("cold", 2, 2), ("half", 0, 2), ("limited", 2, 2)),
    ],
)
def test_whatever_is_in_the_cache_a_run_ends_in_the_same_bits(
    world: Path, tmp_path: Path, carried_out: RunPlan, uncached: Uncached, filled: Path, state: str, workers: int, processes: int
) -> None:
    """Cold, warm, with every second shard gone, and under a limit of three entries, so that shards are deleted all the time."""
    folder = tmp_path / "cache"
    if state in ("warm", "half"):
        copy_of(filled, folder)
    if state == "half":
        for path in shards(folder)[::2]:
            path.unlink()
    before, distinct = entries(folder, "latents"), entries(filled, "latents")
    plan = plan_for(world, folder, workers=workers)
    if state == "limited":
        plan["cache"]["limit"] = "0.005MB"
    done = carried_out("run", plan, processes=processes)
    assert done.result == uncached(1, processes).result
    assert done.warnings == []
    if state == "limited":
        assert sum(path.stat().st_size for path in shards(folder)) <= 5_000
        assert done.images > 1.5 * len(distinct)
    else:
        assert before < distinct or state == "warm"
        assert entries(folder, "latents") == distinct
        assert done.images >= len(distinct - before)
        assert done.images == len(distinct - before) or processes > 1, "two processes may encode the same image at once"


def test_with_everything_kept_a_run_loads_no_encoder_and_misses_nothing(world: Path, tmp_path: Path, carried_out: RunPlan, uncached: Uncached) -> None:
    """Through evaluation, handoff and publishing; previews alone need a VAE, to show what they made."""
    plan = plan_for(world, tmp_path / "cache", {}, {})
    first = carried_out("first", plan)
    assert first.loaded == ("AutoencoderKL", "CLIPTextModel", "T5EncoderModel")
    assert first.images == first.misses["latents"]
    done = carried_out("again", plan)
    assert (done.loaded, done.images, done.prompts) == ((), 0, ())
    assert not done.misses.total()
    assert done.hits["latents"] > 2 * 4 * 8
    assert done.hits["text"] > 0
    assert done.result == first.result == uncached(2, 1).result
    assert len(events(done.folder, "handoff")) == len(events(done.folder, "publish")) == 1
    shown = carried_out("shown", {**plan, "previews": {"rows": 1, "steps": 2}})
    assert shown.loaded == ("AutoencoderKL",) * 3, "once for the previews of the base, and once for each stage's: its steps do without"
    assert not shown.misses.total()


def test_what_a_plan_does_not_keep_is_neither_looked_for_nor_kept(world: Path, tmp_path: Path, carried_out: RunPlan, uncached: Uncached, filled: Path) -> None:
    for left_out, kept, loaded in (("latents", "text", ("AutoencoderKL",)), ("text", "latents", ("CLIPTextModel", "T5EncoderModel"))):
        folder = copy_of(filled, tmp_path / f"without-{left_out}")
        shutil.rmtree(folder / left_out)
        plan = plan_for(world, folder)
        plan["cache"][left_out] = False
        done = carried_out(f"run-without-{left_out}", plan)
        assert done.loaded == loaded
        assert (set(done.hits), done.misses.total()) == ({kept}, 0)
        assert entries(folder, left_out) == set()
        assert done.result == uncached(1, 1).result


# --- what changed is encoded anew, and nothing else -------------------------------------------------------------------------------------


def scaled(path: Path, name: str) -> None:
    """Other weights in a file, its length and times as before."""
    weights, status = load_file(path), path.stat()
    weights[name] = weights[name] * 1.5
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_was_edited_is_encoded_anew_and_nothing_else(world: Path, tmp_path: Path, carried_out: RunPlan) -> None:
    """An image and a caption under their old names, the VAE and a text encoder in their old places, one after another."""
    own, folder = tmp_path / "world", tmp_path / "cache"
    for name in ("data", "model"):
        copy_of(world / name, own / name)
    plan = plan_for(own, folder, {"mix": {"photos": 1}})
    image = own / "data" / "photos" / EDITED
    first = carried_out("first", plan, "--trace")
    drawn = {json.loads(line)["key"] for line in (first.folder / "trace.jsonl").read_text().splitlines()}
    assert len(drawn) == 22
    assert EDITED in drawn
    assert (sorted(set(first.prompts)), len(first.prompts)) == (sorted(first.prompts), first.misses["text"])
    assert first.images == first.misses["latents"] == len(entries(folder, "latents"))

    def check(name: str, images: int, prompts: Sequence[str]) -> None:
        """A run encodes so many images and these prompts, and ends as one that keeps nothing."""
        done = carried_out(name, plan)
        assert (done.images, sorted(done.prompts)) == (images, sorted(prompts)), name
        assert done.misses == Counter(latents=images, text=len(prompts))
        fresh = carried_out(f"{name}-uncached", {**plan, "cache": "none"})
        assert done.result == fresh.result, name
        assert done.result != first.result, name

    status = image.stat()
    pixels = np.array(Image.open(image))
    Image.fromarray(255 - pixels).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    check("image", 1, ())

    # 16 x 9 pixels in as many bytes: another bucket, which the data index has to notice.
    Image.fromarray(np.resize(pixels, (9, 16, 3))).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    check("shape", 1, ())

    caption = image.with_suffix(".txt")
    status = caption.stat()
    caption.write_text(caption.read_text().replace("square", "disc  "))
    os.utime(caption, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert caption.stat().st_size == status.st_size
    check("caption", 0, [caption.read_text().strip()])

    everything = first.images
    scaled(own / "model" / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_in.weight")
    check("vae", everything, ())

    prompts = [*first.prompts, caption.read_text().strip()]
    scaled(own / "model" / "text_encoder_2" / "model.safetensors", "shared.weight")
    check("text encoder", 0, prompts)


# --- views ------------------------------------------------------------------------------------------------------------------------------


def test_each_image_is_encoded_once_for_each_resolution_and_variant_in_however_many_epochs_and_runs(world: Path, tmp_path: Path, carried_out: RunPlan) -> None:
    photos, draw = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(5):
        Image.fromarray(draw.integers(0, 255, (24, 26, 3), dtype=np.uint8)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("a red square")
    resolution = [{"pixels": 12, "share": 1}, {"pixels": 16, "share": 1}]
    stage = {"name": "both", "steps": 5, "resolution": resolution, "batch": {"images": 20, "micro": 10}, "mix": {"photos": 1}}
    sources = {"photos": {"path": str(photos), "augment": {"flip": 0.5, "crop": "random", "variants": 2}}}
    asked = {"sources": sources, "evaluate": {"rows": 0}, "save_every": 100}
    plan = plan_for(world, tmp_path / "cache", stage, {**stage, "name": "small", "resolution": 12}, **asked)
    done = carried_out("short", plan)
    probed = 2 * 4  # of the fixed inputs of the handoff: the first four images, seen plainly at the largest resolution of each stage
    assert done.images == done.misses["latents"] == len(entries(tmp_path / "cache", "latents")) == 5 * 2 * 2 + probed
    assert done.result == carried_out("short-uncached", {**plan, "cache": "none"}).result
    plan = plan_for(world, tmp_path / "cache", {**stage, "name": "longer", "steps": 12}, **asked)
    longer = carried_out("longer", plan)
    assert (longer.images, longer.loaded, longer.misses.total()) == (0, (), 0)
    assert longer.hits["latents"] > 12 * 20
    assert longer.result == carried_out("longer-uncached", {**plan, "cache": "none"}).result


# --- killed, and without room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_the_cache_is_half_written_a_run_ends_in_the_same_bits(
    world: Path, tmp_path: Path, carried_out: RunPlan, uncached: Uncached, filled: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """In its first epoch: first in the midst of writing a shard, then at a later step (kill -9)."""
    folder, wanted = tmp_path / "cache", entries(filled, "latents")
    plan = plan_for(world, folder)
    with monkeypatch.context() as patch:
        patch.setattr(stages.tensor_store, "write_shard", _killed_in_the_midst_of_shard(3))
        file = write_plan(tmp_path / "killed.yaml", plan)
        codes = launch([str(file), "--out", str(tmp_path / "killed")], processes=processes)
        assert -signal.SIGKILL in codes
    partials = list(folder.glob("*/.*.partial"))
    assert partials
    assert all(partial.stat().st_size > 0 for partial in partials)
    assert entries(folder, "latents") < wanted
    carried_out("killed", plan, processes=processes, kill_at=30)
    assert set() < entries(folder, "latents") < wanted
    resumed = carried_out("killed", plan, processes=processes)
    assert 0 < resumed.images < len(wanted)
    assert resumed.result == uncached(1, processes).result
    assert resumed.warnings == []
    assert entries(folder, "latents") == wanted


def _killed_in_the_midst_of_shard(last: int) -> Callable[[Path, Mapping[bytes, Mapping[str, Tensor]]], None]:
    """A `write_shard` under which the process dies with half of the bytes of its shard number `last` written."""
    number = 0

    def write_shard(path: Path, made: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        nonlocal number
        number += 1
        stages.tensor_shards.write_shard(path, made)
        if number == last:
            path.rename(partial := path.with_name(f".{path.name}.partial"))
            os.truncate(partial, partial.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return write_shard


def test_on_a_full_disk_there_is_one_warning_and_training_goes_on(
    world: Path, tmp_path: Path, carried_out: RunPlan, uncached: Uncached, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_shard(path: Path, made: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stages.tensor_store, "write_shard", write_shard)
    folder = tmp_path / "cache"
    done = carried_out("full", plan_for(world, folder))
    assert done.result == uncached(1, 1).result
    (warning,) = done.warnings
    assert warning.startswith(f"{folder}/latents: No space left on device; training goes on and nothing more is cached")
    assert shards(folder) == []


# --- verifying --------------------------------------------------------------------------------------------------------------------------


def verified(tmp_path: Path, plan: dict[str, Any]) -> tuple[int, str]:
    """Exit code and output of `train.py PLAN --verify-cache`."""
    output = tmp_path / "output"
    output.unlink(missing_ok=True)
    (code,) = launch([str(write_plan(tmp_path / "plan.yaml", plan)), "--verify-cache"], output=output)
    return code, output.read_text()


def test_a_sound_cache_is_verified_and_an_entry_that_is_not_what_the_encoder_makes_is_named(world: Path, tmp_path: Path, filled: Path) -> None:
    folder = copy_of(filled, tmp_path / "cache")
    plan = plan_for(world, folder)
    before = {path: path.read_bytes() for path in shards(folder)}
    code, said = verified(tmp_path, plan)
    assert code == 0, said
    found = re.search(r"latents: (\d+) entries encoded anew, all as they were kept .*; (\d+) not kept yet", said)
    assert found, said
    checked, missing = map(int, found.groups())
    assert checked + missing == 3 * 8, "of eight rows of each source, of which one has references"
    assert checked >= 2 * 8
    assert "text: 6 entries encoded anew, all as they were kept" in said
    assert {path: path.read_bytes() for path in shards(folder)} == before

    spoil(folder / "latents", entries(folder, "latents"))
    code, said = verified(tmp_path, plan)
    assert code == 1, said
    assert "text: 6 entries encoded anew, all as they were kept" in said
    named = named_in(said, checked)
    assert len(named) == 5

    one = copy_of(filled, tmp_path / "one")
    spoil(one / "latents", {named[0]})
    code, said = verified(tmp_path, {**plan, "cache": {"folder": str(one)}})
    assert (code, named_in(said, 1)) == (1, [named[0]])
    assert f"delete {one} to encode everything anew" in said


def test_held_out_rows_are_verified_as_evaluation_sees_them(world: Path, tmp_path: Path, filled: Path) -> None:
    """The cache was filled without augmentation: under a plan with it, what is kept of both sources is the plain views of held-out rows alone."""
    plan = plan_for(world, copy_of(filled, tmp_path / "cache"))
    for source in plan["sources"].values():
        source["augment"] = {"crop": "random", "variants": 2}
    code, said = verified(tmp_path, plan)
    assert code == 0, said
    assert re.search(r"latents: [1-4] entries encoded anew", said), said


def test_what_is_not_kept_is_not_even_decoded_by_a_verification(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing.reading, "decode", lambda *_: pytest.fail("an image is decoded"))
    code, said = verified(tmp_path, plan_for(world, tmp_path / "cache"))
    assert code == 0, said
    assert "latents: 0 entries encoded anew" in said
    assert "; 24 not kept yet" in said


def spoil(folder: Path, keys: set[bytes]) -> None:
    """Put other values under some keys, the shards sound in themselves."""
    store, made = (TensorStore(place, limit_bytes=None, writer="test") for place in (folder, folder.with_name("spoilt")))
    for path in folder.glob("*.safetensors"):
        for entry in stages.tensor_shards.read_header(path):
            tensors = store.get(entry.key)
            assert tensors is not None
            if entry.key in keys:
                tensors["latents"][0, 0, 0] += 1e-3 * tensors["latents"].abs().max()
            made.put(entry.key, tensors)
    store.close()
    made.close()
    shutil.rmtree(folder)
    folder.with_name("spoilt").rename(folder)


def named_in(said: str, number: int) -> list[bytes]:
    """The keys that a verification names, of so many that differ."""
    found = re.search(rf"latents: \d+ entries encoded anew, {number} differ: ([0-9a-f, ]+) \(", said)
    assert found, said
    return [bytes.fromhex(name) for name in found[1].split(", ")]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("none", "cache: 'none' keeps nothing that could be verified"),
        ({"latents": False, "text": False}, "cache: it keeps neither latents nor text"),
        ({"limit": "0MB"}, "cache.limit: '0MB' is less than a byte"),
    ],
)
def test_a_cache_that_keeps_nothing_is_not_called_verified(world: Path, tmp_path: Path, kept: str | dict[str, object], message: str) -> None:
    plan = {**plan_for(world, None), "cache": kept if isinstance(kept, str) else {"folder": str(tmp_path / "cache"), **kept}}
    code, said = verified(tmp_path, plan)
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said


# --- without a VAE ----------------------------------------------------------------------------------------------------------------------


def test_a_model_on_pixels_keeps_its_prompts_alone(world: Path, tmp_path: Path, carried_out: RunPlan) -> None:
    plan = plan_for(world, tmp_path / "cache", model=str(tiny_flux(tmp_path / "model", pixels=True)))
    first, again = carried_out("first", plan), carried_out("again", plan)
    assert again.result == first.result == carried_out("uncached", {**plan, "cache": "none"}).result
    assert adapter_bytes(again.folder) == adapter_bytes(first.folder)
    assert (entries(tmp_path / "cache", "latents"), len(entries(tmp_path / "cache", "text"))) == (set(), 6)
    assert (first.loaded, len(first.prompts)) == (("CLIPTextModel", "T5EncoderModel"), 6)
    assert (again.loaded, again.prompts, again.hits, again.misses.total()) == ((), (), Counter(text=6), 0)
    code, said = verified(tmp_path, plan)
    assert code == 0
    assert "latents" not in said
    assert "text: 6 entries encoded anew, all as they were kept" in said


# --- no row has another's latents -------------------------------------------------------------------------------------------------------


def _picture(number: int, height: int, width: int, form: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(content, form)
    return content.getvalue()


PICTURES = [_picture(number, *size, form) for number, size in enumerate([(8, 8), (8, 12), (12, 8), (9, 13)]) for form in ("PNG", "JPEG")]
PLAIN = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PLAIN, "PNG")
PICTURES.append(PLAIN.getvalue())  # whatever it is cut to, its bytes are the same: its shape tells
SIZES = [(8, 8), (4, 8), (8, 4)]
PLACES = [0.0, 0.25, 0.25 - 1e-8, 0.5, 1.0]
NEIGHBOURS = [(PICTURES[2], PICTURES[2], View(x=x)) for x in (0.25, 0.25 - 1e-8)]  # where four pixels are cut off, these are one apart


@dataclass
class Toy:
    """What `encode` asks of a family: an encoder that looks at every pixel and its place, one image at a time."""

    identity: str
    cache: Cache | None
    device: torch.device = CPU

    def encode_images(self, images: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, images[0].numel()).view(images[0].shape) + len(self.identity)
        return torch.cat([torch.nn.functional.avg_pool2d(image[None] * weights, 2) for image in images])


ROWS = st.tuples(st.sampled_from(PICTURES), st.sampled_from(PICTURES), st.builds(View, st.sampled_from(PLACES), st.sampled_from(PLACES), st.booleans()))
BATCHES = st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES), st.sampled_from(["vae", "another vae"]), st.sampled_from(["", "flush", "open again"]), st.booleans(), st.lists(ROWS, min_size=1, max_size=4))


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(BATCHES, min_size=1, max_size=5), limit=st.sampled_from([None, 1500]))
@example(batches=[((8, 8), (8, 8), "vae", "", True, NEIGHBOURS)], limit=None)
@example(batches=[((4, 8), (8, 4), "vae", "", False, [(PICTURES[-1], PICTURES[-1], View())])], limit=None)
def test_what_the_cache_gives_for_a_row_is_what_encoding_that_row_gives(tmp_path_factory: pytest.TempPathFactory, batches: list[Any], limit: int | None) -> None:
    """Whatever images, shapes, views and encoders share it, with and without room for all; hits and misses stand mixed in one micro-batch."""
    folder = tmp_path_factory.mktemp("toy")

    def open_cache(identity: str) -> Cache:
        return Cache(folder, latents_identity=identity, text_identity="t5", limit_bytes=limit, writer="test")

    caches = {identity: open_cache(identity) for identity in ("vae", "another vae")}
    for target, reference, identity, before, knows_keys, rows in batches:
        if before == "flush":
            caches[identity].flush()
        if before == "open again":
            caches[identity].close()
            caches[identity] = open_cache(identity)
        signature, row_class = Signature(target, (reference,)), RowClass(0, 0, (AS_TARGET,))
        made: dict[bool, list[Tensor]] = {}
        for cached in (True, False):
            family = cast(Family, Toy(identity, caches[identity] if cached else None))
            kept = KeptLatents(caches[identity]) if cached and knows_keys else None  # what is read without keys is known by its pixels
            seen = [read_row("toy", str(number), Cells(("",), one, (two,)), row_class, signature, view, kept) for number, (one, two, view) in enumerate(rows)]
            made[cached] = [encode(family, gathered(size, role)) for size, role in zip((target, reference), zip(*seen, strict=True), strict=True)]
        for got, wanted in zip(made[True], made[False], strict=True):
            assert torch.equal(got, wanted)
    for kept_by in caches.values():
        kept_by.close()
        assert kept_by.take_warnings() == []
    shutil.rmtree(folder)
