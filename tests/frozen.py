"""Frozen runs: run folders as each format of checkpoints left them, which every later version has to read.

    cd tests && ../.venv/bin/python -m frozen

freezes, under tests/formats/, runs of the format that today's code writes: one that was killed in its second of three stages, and one that is finished. It is done once, before a format goes out of use;
what is frozen is never made again, with its plan beside it. The model lies there too, since libraries draw and write their own otherwise from version to version; the images are made of bytes that depend on nothing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FROZEN = Path(__file__).resolve().parent / "formats"
HALFWAY, FINISHED = "halfway", "finished"
KILLED_AFTER = 5
"""Steps of the second stage; its last checkpoint is that of step 4."""


def plan() -> dict[str, Any]:
    """What the next runs are frozen by: three stages of adapters, with all that a checkpoint may hold: averages, an optimizer that is kept, a stream's lanes, shares that follow what is measured. Its paths are relative."""
    stage = {"steps": 4, "resolution": 8, "precision": "fp32", "batch": {"images": 4, "micro": 2}, "lr": 0.01}
    return {
        "name": "frozen",
        "seed": 5,
        "model": "model",
        "adapter": {"rank": 1, "alpha": 2, "targets": [r"transformer_blocks\.0\.attn\.to_[qkv]", r"single_transformer_blocks\.0\.attn\.to_v"]},
        "sources": {"photos": {"path": "photos"}, "tars": {"path": "tars/*.tar", "stream": True, "lanes": 2, "columns": {"target": "bmp"}}},
        "stages": [
            {**stage, "name": "low", "ema": 0.9, "mix": {"photos": 1}},
            {**stage, "name": "lanes", "steps": 6, "ema": 0.9, "handoff": {"optimizer": "keep", "ema": "keep"}, "mix": {"photos": 1, "tars": 1}},
            {**stage, "name": "follow", "steps": 7, "mix": {"adaptive": {"photos": 3, "tars": 1}, "lookback": 1}},
        ],
        "evaluate": {"rows": 4, "every": 2},
        "previews": {"rows": 0},
        "save_every": 2,
        "log_every": 1,
        "workers": 0,
        "track": "none",
        "cache": "none",
    }


def plan_of_format(number: str) -> dict[str, Any]:
    """The plan that runs of a format were made by."""
    made: dict[str, Any] = YAML(typ="safe").load((FROZEN / number / "plan.yaml").read_text())
    return made


def make_world(folder: Path) -> Path:
    """The model, and images in two sources, which have to stay what they are. Runs start in it."""
    shutil.copytree(FROZEN / "model", folder / "model")
    (folder / "photos").mkdir()
    (folder / "tars").mkdir()
    for number in range(24):
        (folder / "photos" / f"{number}.bmp").write_bytes(_picture(number))
        (folder / "photos" / f"{number}.txt").write_text(_words(number))
    for shard in range(3):
        with tarfile.open(folder / "tars" / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(24 + 8 * shard, 32 + 8 * shard):
                for name, content in ((f"{number}.bmp", _picture(number)), (f"{number}.txt", _words(number).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def _picture(number: int) -> bytes:
    """8 x 8 pixels in the simplest format that there is."""
    pixels = bytes((37 * number + 5 * at + (at * at * number) % 61) % 256 for at in range(8 * 8 * 3))
    return struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 24, 0, len(pixels), 2835, 2835, 0, 0) + pixels


def _words(number: int) -> str:
    return f"a {('red', 'green', 'blue')[number % 3]} {('square', 'disc')[number % 2]}"


def make_model(folder: Path) -> Path:
    """A Flux without a VAE, smaller than the tiny one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from stages.families.tiny.parts import clip, randomise, seeded, t5, tokenizer

    with seeded():
        sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1, "joint_attention_dim": 16, "pooled_projection_dim": 8}
        transformer = FluxTransformer2DModel(patch_size=1, in_channels=12, guidance_embeds=False, axes_dims_rope=(2, 2, 4), **sizes)
        randomise(transformer)
        encoders = {"text_encoder": clip(), "tokenizer": tokenizer(8), "text_encoder_2": t5(), "tokenizer_2": tokenizer(8)}
    FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, transformer=transformer, **encoders).save_pretrained(folder)
    return folder


def freeze(place: Path) -> None:
    """Carry out the plan twice, once until it is killed, and keep what the runs left. place: tests/formats/FORMAT."""
    import torch

    from runs import started, write_plan

    def killed(rank: int) -> None:
        step, made = torch.optim.AdamW.step, 0

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made > 4 + KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **named)

        torch.optim.AdamW.step = counted  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as name:
        world = make_world(Path(name) / "world")
        os.chdir(world)
        write_plan(Path("plan.yaml"), plan())
        for run, before, code in ((HALFWAY, killed, -signal.SIGKILL), (FINISHED, None, 0)):
            [number] = started(["plan.yaml", "--out", f"runs/{run}", "--trace"], output=Path("log"), before=before)
            assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == code, Path("log").read_text()
            for left_out in ("report.html", ".lock"):  # the one is written from the rest
                Path("runs", run, left_out).unlink(missing_ok=True)
            shutil.copytree(Path("runs", run), place / run)
        shutil.copy("plan.yaml", place / "plan.yaml")


def main() -> int:
    """Freeze runs of today's format."""
    from stages.checkpoint import FORMAT

    place = FROZEN / str(FORMAT)
    if place.exists():
        print(f"{place} is there already; what is frozen stays as it was written", file=sys.stderr)
        return 1
    if not (FROZEN / "model").exists():
        make_model(FROZEN / "model")
    freeze(place)
    print(json.dumps({file.relative_to(place).as_posix(): file.stat().st_size for file in sorted(place.rglob("*")) if file.is_file()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
