"""Write the quickstart's data and its untrained base model, once.

    python plans/digits.py [FOLDER]          # FOLDER is data/digits if left out

From the 1,797 scans of handwritten digits that come with scikit-learn (8 x 8 pixels, 17 greys) it makes ordinary files, which
train.py reads as it reads anyone's: PNGs with captions, four .jsonl files of instructions with reference images, a folder of
labelled scans for the judge, and a diffusers folder with a small FluxTransformer2DModel. Nothing is drawn from a random
generator's state: every choice is a hash of what it is about, so the same versions of the libraries write the same bytes. The
folder is written beside its place and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Scan = npt.NDArray[np.uint8]
"""Greys from 0 (paper) to 255 (ink), [8, 8]."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_OF_EACH_DIGIT = 50
TEXT_LENGTH = 12
"""Tokens that the base's tokenizers pad a prompt to, the end mark among them."""
TEXT_WIDTH = 32
"""Width of a word's vector."""

VERSION = 2
"""To be raised whenever the files change, so that a folder of an older version is not taken for this one."""
LISTING = "files.json"

CAPTIONS = (
    "a handwritten {}",
    "a scan of a handwritten {}",
    "the digit {}",
    "the digit {} written by hand",
    "a small picture of the digit {}",
)
ANOTHER = ("another handwritten scan of this digit", "the same digit written by another hand", "write this digit again")
FILL_IN = ("fill in this silhouette: {}", "{}, with this silhouette")
EDITS = {"mirror": "mirror this scan", "invert": "invert this scan", "turn": "turn this scan"}
"""One wording each: with two, the short stages of the quickstart learnt the edits half as well."""
RESTORE = ("restore this scan", "remove the noise and the patch from this scan")

README = """\
# Handwritten digits, for five tasks

Written by `plans/digits.py` from the {scans:,} scans that come with scikit-learn (`sklearn.datasets.load_digits`). Each scan is 8 x 8
pixels with 17 greys, ink light on dark paper. {judge} scans, {of_each} of each digit, are held out for the judge; the other {training:,} are what the
sources are made from. A scan may stand in several sources, so a row held out of one source is a new row, not always a new scan.

| file | rows | what a row asks for |
|---|---|---|
| `text_to_image/` | {text_to_image:,} | a caption (`0007.txt`) and its scan (`0007.png`) |
| `subject.jsonl` | {subject:,} | a reference scan; another scan of the same digit is the target |
| `control.jsonl` | {control:,} | a 4 x 4 silhouette, each cell stored as 2 x 2 pixels, and a caption; the scan is the target |
| `edit.jsonl` | {edit:,} | every scan mirrored, inverted and turned upside down, as the instruction says |
| `other.jsonl` | {other:,} | a scan under noise and a grey patch; the scan is the target |
| `judge/` | {judge} | held-out scans with their labels (`metadata.jsonl`: file_name, label) |
| `base/` | | the untrained model, a diffusers folder; its own README.md says what is in it |

Every line of a .jsonl has `instruction`, `reference` and `target`; the paths are relative to the .jsonl. A caption of
`text_to_image` or `control` holds exactly one of the ten words zero to nine; the judge goes by it.

**Source.** Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49; the copy in scikit-learn is its test set (13 writers). 32 x 32 bitmaps were made by NIST's programs and
counted down to 8 x 8. C. Kaynak (1995), Methods of Combining Multiple Classifiers and Their Applications to Handwritten Digit
Recognition, MSc thesis, Bogazici University.

**Licence.** scikit-learn ships the scans in its BSD-3-Clause package and names no other terms; the UCI repository offers the data set under CC BY 4.0.
"""

BASE_README = """\
# An untrained Flux in pixel space, for 8 x 8 digits

Written by `plans/digits.py`. `transformer/` is diffusers' own FluxTransformer2DModel, small ({parameters:,} parameters), its weights as they were
drawn. There is no VAE: the "latents" are the RGB pixels in [-1, 1], packed 2 x 2 into {tokens} tokens of 12 numbers. In the place of a trained T5 and CLIP
stand a T5EncoderModel without a layer, which looks up one fixed vector a word, and a CLIPTextModel whose one layer averages
the words' vectors into the pooled prompt. Both know the {words} words of the captions and instructions and are never trained. The
scheduler shifts by 3 whatever the number of tokens.

    pipe = FluxPipeline.from_pretrained("data/digits/base", vae=None)
    pipe("a handwritten seven", height=64, width=64, max_sequence_length={text_length}, output_type="latent")    # height / 8 = pixels
"""


class DigitsError(ValueError):
    """The folder is not one that this script may write or leave as it is."""


@dataclass(frozen=True)
class Row:
    """One line of a .jsonl; the paths are relative to it."""

    instruction: str
    reference: str
    target: str


def number(*parts: object) -> int:
    """Give the 64-bit number that belongs to these parts: their hash, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def choose(options: tuple[str, ...], *parts: object) -> str:
    """Give the option that belongs to these parts."""
    return options[number(*parts) % len(options)]


def split(labels: list[int]) -> tuple[list[int], list[int]]:
    """Give the indices of the training scans and of the judge's, each in ascending order; the judge has as many of each digit."""
    by_digit = [sorted((i for i, label in enumerate(labels) if label == digit), key=lambda i: number("split", i)) for digit in range(10)]
    judge = {i for indices in by_digit for i in indices[:HELD_OUT_OF_EACH_DIGIT]}
    return [i for i in range(len(labels)) if i not in judge], sorted(judge)


def partners(labels: list[int], training: list[int]) -> dict[int, int]:
    """Give each training scan another one of the same digit: the next in a ring, so that each is a partner once."""
    ring: dict[int, int] = {}
    for digit in range(10):
        indices = sorted((i for i in training if labels[i] == digit), key=lambda i: number("ring", i))
        ring |= dict(zip(indices, indices[1:] + indices[:1], strict=True))
    return ring


def silhouette(scan: Scan) -> Scan:
    """Give the 4 x 4 silhouette of a scan, each cell as 2 x 2 pixels: light where a third of the cell or more is ink."""
    cells = scan.reshape(4, 2, 4, 2).mean(axis=(1, 3)) >= 85
    large: Scan = (cells.repeat(2, axis=0).repeat(2, axis=1) * 255).astype(np.uint8)
    return large


def edited(scan: Scan, edit: str) -> Scan:
    """Give the scan mirrored, inverted or turned upside down."""
    match edit:
        case "mirror":
            return scan[:, ::-1].copy()
        case "invert":
            return np.subtract(255, scan, dtype=np.uint8)
        case "turn":
            return scan[::-1, ::-1].copy()
        case _:
            raise AssertionError(edit)


def damaged(scan: Scan, index: int) -> Scan:
    """Give the scan under noise of up to 80 greys a pixel and a grey patch of 3 x 3 pixels."""
    noise = np.frombuffer(hashlib.shake_256(f"noise/{index}".encode()).digest(64), dtype=np.uint8).reshape(8, 8)
    image: Scan = np.clip(scan.astype(np.int64) + noise.astype(np.int64) * 160 // 255 - 80, 0, 255).astype(np.uint8)
    top, left = number("top", index) % 6, number("left", index) % 6
    image[top : top + 3, left : left + 3] = 128
    return image


def write_png(scan: Scan, path: Path) -> None:
    """Write an 8-bit grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scan).save(path)


def write_rows(rows: list[Row], path: Path) -> None:
    """Write rows as .jsonl."""
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")


def tokens(prompt: str) -> list[str]:
    """Give a prompt's words as the base's tokenizers see them: in lower case, without punctuation."""
    return [word.strip(":,.") for word in prompt.lower().split()]


def prompts() -> Iterator[str]:
    """Give every prompt that a row can have."""
    captions = [caption.format(word) for caption in CAPTIONS for word in DIGITS]
    yield from captions
    yield from (fill_in.format(caption) for fill_in in FILL_IN for caption in captions)
    yield from (*ANOTHER, *RESTORE, *EDITS.values())


def write_sources(folder: Path) -> dict[str, int]:
    """Write the sources and the judge's folder; give the number of rows of each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans: list[Scan] = [np.rint(image * 255 / 16).astype(np.uint8) for image in digits.images]
    labels = [int(label) for label in digits.target]
    training, judge = split(labels)
    partner = partners(labels, training)
    rows: dict[str, list[Row]] = {"subject": [], "control": [], "edit": [], "other": []}
    for i in training:
        name, word = f"{i:04d}", DIGITS[labels[i]]
        scan = f"text_to_image/{name}.png"
        write_png(scans[i], folder / scan)
        caption = choose(CAPTIONS, "caption", i).format(word)
        (folder / f"text_to_image/{name}.txt").write_text(caption + "\n", encoding="utf-8")

        rows["subject"].append(Row(choose(ANOTHER, "subject", i), scan, f"text_to_image/{partner[i]:04d}.png"))

        write_png(silhouette(scans[i]), folder / f"control/{name}.png")
        rows["control"].append(Row(choose(FILL_IN, "control", i).format(caption), f"control/{name}.png", scan))

        for edit, instruction in EDITS.items():
            write_png(edited(scans[i], edit), folder / f"edit/{name}-{edit}.png")
            rows["edit"].append(Row(instruction, scan, f"edit/{name}-{edit}.png"))

        write_png(damaged(scans[i], i), folder / f"other/{name}.png")
        rows["other"].append(Row(choose(RESTORE, "other", i), f"other/{name}.png", scan))
    for source, lines in rows.items():
        write_rows(lines, folder / f"{source}.jsonl")

    for i in judge:
        write_png(scans[i], folder / f"judge/{i:04d}.png")
    metadata = "".join(json.dumps({"file_name": f"{i:04d}.png", "label": DIGITS[labels[i]]}) + "\n" for i in judge)
    (folder / "judge/metadata.jsonl").write_text(metadata, encoding="utf-8")
    counts = {source: len(lines) for source, lines in rows.items()}
    return {"scans": len(scans), "training": len(training), "judge": len(judge), "text_to_image": len(training), **counts}


def quiet() -> None:
    """Keep the libraries beneath from printing what nobody can act on. To be called before they are imported."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def write_base(folder: Path) -> None:
    """Write the untrained model as a diffusers folder that FluxPipeline.from_pretrained(folder, vae=None) loads."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    # CLIPTextModel pools at the end mark only where its id is not 2: transformers takes 2 for the mistaken id of old configs.
    pad, end, unknown = "[PAD]", "[END]", "[UNK]"
    words = [pad, end, unknown, *sorted({word for prompt in prompts() for word in tokens(prompt)})]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, vocabulary[end])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown, model_max_length=TEXT_LENGTH
    )

    def drawn(name: str, *shape: int) -> torch.Tensor:
        """Give the numbers that belong to a name, uniform in [-1, 1): not normal ones, whose last bit depends on the processor."""
        return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(number(name) >> 1)) - 1

    vectors = torch.stack([drawn(f"word/{word}", TEXT_WIDTH) for word in words]) * 3**0.5
    vectors[[vocabulary[pad], vocabulary[end]]] = 0

    sizes = {"vocab_size": len(words), "pad_token_id": vocabulary[pad], "eos_token_id": vocabulary[end]}
    t5 = T5EncoderModel(T5Config(d_model=TEXT_WIDTH, d_kv=TEXT_WIDTH, d_ff=1, num_layers=0, num_heads=1, dropout_rate=0.0, **sizes))
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary[end],
            **sizes,
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for parameter in (*t5.parameters(), *clip.parameters()):
            parameter.zero_()
        t5.get_input_embeddings().weight.copy_(vectors)
        t5.encoder.final_layer_norm.weight.fill_(1)
        # Queries and keys are zero, so the end mark attends to all words alike; the residual of the end mark is zero too.
        clip.get_input_embeddings().weight.copy_(vectors)
        for name, parameter in clip.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            elif name.endswith(("v_proj.weight", "out_proj.weight")):
                parameter.copy_(torch.eye(TEXT_WIDTH))
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2:  # the distribution of torch.nn.Linear, but drawn by name
                parameter.copy_(drawn(f"transformer/{name}", *parameter.shape) / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.zero_()

    # 3 as in SD3: three equal channels on a smooth 8 x 8 image show it through far more noise than one would.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    pipe = FluxPipeline(
        scheduler=scheduler, vae=None, text_encoder=clip, tokenizer=fast, text_encoder_2=t5, tokenizer_2=fast, transformer=transformer
    )
    pipe.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    readme = BASE_README.format(parameters=parameters, tokens=16, words=len(words) - 3, text_length=TEXT_LENGTH)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def files(folder: Path) -> list[str]:
    """Give the paths of the folder's files, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def complete(folder: Path) -> bool:
    """Tell whether the folder holds what this version of the script writes, in full."""
    listing = folder / LISTING
    if not listing.is_file():
        return False
    written = json.loads(listing.read_text(encoding="utf-8"))
    return bool(written["version"] == VERSION) and files(folder) == sorted([*written["files"], LISTING])


def write(folder: Path) -> bool:
    """Write the folder if it is not there; tell whether it was written. Raises DigitsError if something else stands in its place."""
    if folder.exists():
        if complete(folder):
            return False
        raise DigitsError(
            f"{folder} is there, but its files are not those that this version of plans/digits.py writes;"
            f" move it away or delete it, then run the command again"
        )
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    counts = write_sources(partial)
    quiet()
    write_base(partial / "base")
    (partial / "README.md").write_text(README.format(of_each=HELD_OUT_OF_EACH_DIGIT, **counts), encoding="utf-8")
    (partial / LISTING).write_text(json.dumps({"version": VERSION, "files": files(partial)}, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)
    return True


def main(arguments: list[str]) -> int:
    """Write the folder that the command line names; give the exit code: 0 done, 2 something else is in its place."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python plans/digits.py [FOLDER]", file=sys.stderr)
        return 2
    folder = Path(arguments[0] if arguments else "data/digits")
    try:
        written = write(folder)
    except DigitsError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder}: written" if written else f"{folder}: there already, left as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
