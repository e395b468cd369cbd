"""What plans/digits.py writes: the quickstart's data and its untrained base."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "plans" / "digits.py"
Grey = np.ndarray[Any, np.dtype[np.uint8]]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def folder(digits: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("digits") / "digits"
    assert digits["main"]([str(path)]) == 0
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def grey(path: Path) -> Grey:
    return np.asarray(Image.open(path))


def digit_words(caption: str) -> list[str]:
    return [word for word in caption.replace(",", " ").split() if word in WORDS]


def test_two_runs_write_the_same_bytes(digits: Mapping[str, Any], folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)  # the global generators' state takes no part
    np.random.seed(1)
    assert digits["main"]([str(tmp_path / "again")]) == 0
    assert hashes(folder) == hashes(tmp_path / "again")


def test_a_folder_that_is_whole_is_left_as_it_is_and_another_one_is_refused(
    digits: Mapping[str, Any], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert digits["main"]([str(folder)]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.png").write_bytes(b"cat")
    assert digits["main"]([str(tmp_path / "mine")]) == 2
    assert "move it away or delete it" in capsys.readouterr().err
    assert hashes(tmp_path / "mine").keys() == {"cat.png"}


def test_what_a_killed_run_left_is_not_taken_for_the_folder(digits: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(partial: Path) -> None:
        partial.mkdir()
        (partial / "README.md").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    write = digits["write"]
    monkeypatch.setitem(write.__globals__, "write_sources", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()
    assert (tmp_path / "digits.partial").exists()
    assert not digits["complete"](tmp_path / "digits.partial")


def test_every_scan_is_in_the_sources_or_with_the_judge_and_never_in_both(folder: Path) -> None:
    training = {path.stem for path in (folder / "text_to_image").glob("*.png")}
    judge = {row["file_name"].removesuffix(".png"): row["label"] for row in lines(folder / "judge" / "metadata.jsonl")}
    assert training | judge.keys() == {f"{number:04d}" for number in range(1797)}
    assert training.isdisjoint(judge)
    assert all(list(judge.values()).count(word) == 50 for word in WORDS)
    assert {source: len(lines(folder / f"{source}.jsonl")) for source in ("subject", "control", "edit", "other")} == {"subject": 1297, "control": 1297, "edit": 3891, "other": 1297}


def test_a_caption_holds_one_digit_word_and_an_instruction_of_the_other_tasks_none(folder: Path) -> None:
    captions = [path.read_text(encoding="utf-8") for path in (folder / "text_to_image").glob("*.txt")]
    assert all(len(digit_words(caption)) == 1 for caption in captions)
    assert len(set(captions)) == 50
    assert all(len(digit_words(row["instruction"])) == 1 for row in lines(folder / "control.jsonl"))
    for source in ("subject", "edit", "other"):
        assert not any(digit_words(row["instruction"]) for row in lines(folder / f"{source}.jsonl"))


def test_each_target_is_what_its_instruction_asks_of_its_reference(folder: Path) -> None:
    def word(scan: str) -> list[str]:
        return digit_words((folder / scan).with_suffix(".txt").read_text(encoding="utf-8"))

    subject = lines(folder / "subject.jsonl")
    assert all(word(row["reference"]) == word(row["target"]) and row["reference"] != row["target"] for row in subject)
    assert len({row["target"] for row in subject}) == len(subject)
    done: dict[str, Callable[[Grey], Grey]] = {"mirror": lambda scan: scan[:, ::-1], "invert": lambda scan: np.subtract(255, scan, dtype=np.uint8), "turn": lambda scan: scan[::-1, ::-1]}
    for row in lines(folder / "edit.jsonl")[:300]:
        asked = done[row["instruction"].split()[0]]
        assert np.array_equal(asked(grey(folder / row["reference"])), grey(folder / row["target"]))
    for row in lines(folder / "control.jsonl")[:100]:
        silhouette = grey(folder / row["reference"])
        assert np.array_equal(silhouette, np.kron(silhouette[::2, ::2], np.ones((2, 2), dtype=np.uint8)))
        assert set(np.unique(silhouette)) <= {0, 255}
    for row in lines(folder / "other.jsonl")[:100]:
        assert not np.array_equal(grey(folder / row["reference"]), grey(folder / row["target"]))


def test_judge_reads_more_than_97_percent_of_the_training_scans(folder: Path) -> None:
    from sklearn.svm import SVC

    judge = lines(folder / "judge" / "metadata.jsonl")
    machine = SVC(C=10.0, gamma="scale").fit([grey(folder / "judge" / row["file_name"]).reshape(-1) / 255 for row in judge], [row["label"] for row in judge])
    scans = sorted((folder / "text_to_image").glob("*.png"))
    labels = [digit_words(scan.with_suffix(".txt").read_text(encoding="utf-8"))[0] for scan in scans]
    assert machine.score([grey(scan).reshape(-1) / 255 for scan in scans], labels) > 0.97


def test_base_loads_in_the_stock_pipeline_encodes_and_samples(folder: Path, digits: Mapping[str, Any]) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder / "base", vae=None)
    pipe.set_progress_bar_config(disable=True)
    length = pipe.tokenizer_2.model_max_length
    prompts = list(digits["prompts"]())
    known = pipe.tokenizer_2(prompts).input_ids
    assert max(map(len, known)) <= length
    assert not any(pipe.tokenizer_2.unk_token_id in ids for ids in known)

    embeds, pooled, _ = pipe.encode_prompt([f"A handwritten {word}." for word in WORDS], max_sequence_length=length)
    lower, _, _ = pipe.encode_prompt([f"a handwritten {word}" for word in WORDS], max_sequence_length=length)
    assert torch.equal(embeds, lower)
    for encoded in (embeds.flatten(1), pooled):
        apart = torch.cdist(encoded, encoded) + 9 * torch.eye(10)
        assert apart.min() > 0.5
    vector = pipe.text_encoder_2.get_input_embeddings().weight
    ids = pipe.tokenizer_2("a handwritten seven").input_ids
    mean = torch.nn.functional.layer_norm(torch.nn.functional.layer_norm(vector[ids], (32,)).mean(0), (32,))
    assert torch.allclose(pooled[7], mean, atol=1e-3), "the pooled prompt is the mean of its words"

    def sampled() -> torch.Tensor:
        latents: torch.Tensor = pipe(
            "a handwritten seven", height=64, width=64, num_inference_steps=2, max_sequence_length=length, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).images
        return latents

    assert sampled().shape == (1, 16, 12)
    assert torch.equal(sampled(), sampled())
    assert 4e5 < sum(parameter.numel() for parameter in pipe.transformer.parameters()) < 6e5
