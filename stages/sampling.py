"""Samples: what the model makes of held-out rows, as a sheet to look at and as an accuracy that a classifier gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from mixing.batch import read_rows
from mixing.buckets import Shapes
from mixing.images import UnreadableImage, decode, fit, from_tensor
from mixing.keys import key
from mixing.plain_file import read_plain
from mixing.selected import Selection
from stages.engine import ALONE
from stages.families.family import Family
from stages.sampler import Sampler, sample
from stages.shown import Shown, show

_AT_ONCE = 32


@dataclass(frozen=True)
class Preview:
    """One row of the sheet."""

    source: str
    prompt: str
    references: tuple[Image.Image, ...]
    output: Image.Image
    target: Image.Image


@torch.no_grad()
def previews(
    family: Family,
    transformer: nn.Module,
    selections: Mapping[str, Selection],
    *,
    rows: int,
    shapes: Shapes,
    sampler: Sampler,
    seed: int,
    accelerator: Accelerator,
    in_step: AbstractContextManager[None] = ALONE,
) -> list[Preview]:
    """Samples for the first held-out rows of each source, their noise keyed by (seed, source, row), shared out among the processes; all of them on each.

    in_step: what they are shared out in, of `Engine.shared_out`.
    """
    made: list[tuple[int, int, Preview]] = []
    with in_step:
        for number, (name, selection) in enumerate(selections.items()):
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            for batch in read_rows(selection, selection.held_out[:rows].tolist(), shapes)[0]:
                targets, shown_references = batch.targets.tensor(), [reference.tensor() for reference in batch.references]
                shown = show(family, batch)
                keys = [key(seed, "preview", name, row) for row in batch.keys]
                images = family.decode_latents(sample(family, transformer, shown.x.shape[1:], keys, shown, sampler))
                for place, image in enumerate(images):
                    of_row = tuple(from_tensor(reference[place]) for reference in shown_references)
                    made.append((number, place, Preview(name, batch.prompts[place], of_row, from_tensor(image.cpu()), from_tensor(targets[place]))))
    gathered: list[tuple[int, int, Preview]] = gather_object(made) if accelerator.num_processes > 1 else made
    return [preview for _, _, preview in sorted(gathered, key=lambda entry: entry[:2])]


_CELL, _GAP, _TEXT = 84, 8, 34


def sheet(shown: Sequence[Preview]) -> Image.Image:
    """A picture of the previews: for each source a band of rows, each with reference, output and target side by side and its caption beneath."""
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    names = list(dict.fromkeys(preview.source for preview in shown))
    columns = max(sum(preview.source == name for preview in shown) for name in names)
    widest = max(2 + len(preview.references) for preview in shown)
    block = widest * (_CELL + 4) + _GAP * 2
    band = 24 + 16 + _CELL + _TEXT
    picture = Image.new("RGB", (columns * block + _GAP, len(names) * band + _GAP), "#f6f6f4")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        top = row * band + _GAP
        draw.text((_GAP, top), name, fill="#222222", font=font)
        for column, preview in enumerate(preview for preview in shown if preview.source == name):
            left = column * block + _GAP
            cells = [*(("reference", image) for image in preview.references), ("output", preview.output), ("target", preview.target)]
            for place, (label, image) in enumerate(cells):
                x = left + place * (_CELL + 4)
                draw.text((x, top + 20), label, fill="#777777", font=small)
                small_image = _in_cell(image)
                corner = x + (_CELL - small_image.width) // 2, top + 36 + (_CELL - small_image.height) // 2
                picture.paste(small_image, corner)
                if label == "output":
                    draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + small_image.width, corner[1] + small_image.height), outline="#c2571a")
            for line, text in enumerate(_wrapped(preview.prompt, small, block - _GAP * 3)):
                draw.text((left, top + 40 + _CELL + 13 * line), text, fill="#444444", font=small)
    return picture


def _in_cell(image: Image.Image) -> Image.Image:
    """The image in its own aspect, its longer side that of a cell."""
    scale = _CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The first two lines of a caption, broken between words, and inside a word that is wider than a line."""
    text = " ".join(text.split())[:400]
    lines: list[str] = []
    while text and len(lines) < 3:
        fits = next(length for length in range(len(text), 0, -1) if length == 1 or font.getlength(text[:length]) <= width)
        space = text.rfind(" ", 0, fits + 1) if fits < len(text) else -1
        cut = space if space > 0 else fits
        lines.append(text[:cut])
        text = text[cut:].lstrip()
    return lines if len(lines) <= 2 else [lines[0], lines[1][:-2].rstrip() + " …"]


# --- accuracy -------------------------------------------------------------------------------------------------------------------------


class JudgeError(ValueError):
    """No classifier can be fitted on the labelled folder, or it has nothing to judge."""


@dataclass(frozen=True)
class Judge:
    """A support vector machine over pixels, fitted on a folder of labelled images."""

    labels: tuple[str, ...]
    machine: object
    resolution: int

    def predict(self, images: Sequence[Image.Image]) -> list[str]:
        """The label of each image."""
        from sklearn.svm import SVC

        assert isinstance(self.machine, SVC)
        return [str(label) for label in self.machine.predict(_pixels(images, self.resolution))]

    def label_of(self, caption: str) -> str | None:
        """The one label whose words stand in a caption, or None if none or several do."""
        words = _words(caption)
        found = [label for label in self.labels if f" {_words(label).strip()} " in words]
        return found[0] if len(found) == 1 else None


def _words(text: str) -> str:
    """The words of a text in lower case, a space before and after each, without punctuation."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def _pixels(images: Sequence[Image.Image], resolution: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.stack([np.asarray(fit(image, resolution, resolution), dtype=np.float64).reshape(-1) / 255 for image in images])


def fit_judge(folder: Path, resolution: int) -> Judge:
    """Fit a judge on a folder with metadata.jsonl (file_name, label). Raises JudgeError, naming the place, if a line cannot be read or lacks either."""
    from sklearn.svm import SVC

    images, labels = [], []
    file = folder / "metadata.jsonl"
    for number, line in enumerate(read_plain(file).decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"file_name", "label"} <= row.keys():
                raise ValueError("a line needs file_name and label")
            path = (folder / str(row["file_name"])).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ValueError("file_name leaves the folder")
            images.append(decode(path))
        except (ValueError, OSError, UnreadableImage) as error:
            raise JudgeError(f"{file}:{number}: {error}") from None
        labels.append(str(row["label"]))
    if len(set(labels)) < 2:
        raise JudgeError(f"{file}: {len(set(labels))} labels; a classifier needs two or more")
    machine = SVC(C=10.0, gamma="scale")
    machine.fit(_pixels(images, resolution), labels)
    return Judge(tuple(sorted(set(labels))), machine, resolution)


@torch.no_grad()
def accuracy(
    family: Family,
    transformer: nn.Module,
    selection: Selection,
    judge: Judge,
    *,
    samples: int,
    sampler: Sampler,
    seed: int,
    accelerator: Accelerator,
    in_step: AbstractContextManager[None] = ALONE,
) -> dict[str, float]:
    """Judge samples made from the held-out captions of a source. in_step: what they are shared out in, of `Engine.shared_out`.

    Returns accuracy; shuffled_captions (the same samples against captions moved on by a keyed permutation: what guessing gives); judge_on_real
    (the judge's own score on this source's training images, which it has not seen); each in [0, 1]. Raises JudgeError if no caption names a label.
    """
    resolution, source = judge.resolution, selection.source
    squares = Shapes(resolution, family.pixel_multiple, max_aspect=1.0, upscale=100.0)
    captions = [prompt for batch in read_rows(selection, selection.held_out.tolist(), squares)[0] for prompt in batch.prompts]
    captions = [caption for caption in captions if judge.label_of(caption)]
    if not captions:
        raise JudgeError(f"evaluate.accuracy: no held-out caption of source '{source.name}' holds exactly one of the labels {', '.join(judge.labels)}")
    asked = [captions[number % len(captions)] for number in range(samples)]
    correct: list[tuple[int, str]] = []
    shape = family.encode_images(torch.zeros(1, 3, resolution, resolution)).shape[1:]
    with in_step:
        for number, first in enumerate(range(0, samples, _AT_ONCE)):
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            prompts = asked[first : first + _AT_ONCE]
            keys = [key(seed, "accuracy", first + place) for place in range(len(prompts))]
            shown = Shown(torch.empty(len(prompts), *shape), family.encode_prompts(prompts), (), None)
            images = family.decode_latents(sample(family, transformer, shape, keys, shown, sampler)).cpu()
            correct += enumerate(judge.predict([from_tensor(image) for image in images]), first)
    gathered: list[tuple[int, str]] = sorted(gather_object(correct)) if accelerator.num_processes > 1 else correct
    wanted = [judge.label_of(caption) for caption in asked]
    moved = sorted(range(samples), key=lambda number: key(seed, "shuffled", number))
    rows = np.concatenate([np.asarray(rows) for rows in selection.training.values()])[:500].tolist() if selection.stream is None else selection.held_out.tolist()
    real = [(from_tensor(image), judge.label_of(prompt)) for batch in read_rows(selection, rows, squares)[0] for image, prompt in zip(batch.targets.tensor(), batch.prompts, strict=True)]
    real = [(image, label) for image, label in real if label]
    if not real:
        raise JudgeError(f"evaluate.accuracy: none of the first {len(rows)} training captions of source '{source.name}' holds exactly one of the labels {', '.join(judge.labels)}")
    return {
        "accuracy": sum(label == wanted[number] for number, label in gathered) / samples,
        "shuffled_captions": sum(label == wanted[moved[number]] for number, label in gathered) / samples,
        "judge_on_real": sum(label == found for (_, label), found in zip(real, judge.predict([image for image, _ in real]), strict=True)) / len(real),
    }
