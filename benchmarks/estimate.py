"""The memory that --explain says, beside what a process takes.

    OMP_NUM_THREADS=1 python -m benchmarks.estimate                     every case on the CPU, a process each
    python -m benchmarks.estimate flux nf4                              those whose name has all these words
    python -m benchmarks.estimate --device cuda                         on a GPU

Each case is a transformer of some 10 to 30 million weights of a family, with random weights and made-up images and prompts. On the CPU what is measured is by how
much the process grows from before the model is loaded to its largest, the loading itself left out; on a GPU, what torch has allocated at the most.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixing.buckets import Signature
from mixing.keys import key
from stages.dropout import add_dropout
from stages.estimate import Kind, estimate, latent_channels
from stages.families.base import Text
from stages.families.family import Family
from stages.families.open import open_family
from stages.families.tiny import flux, pixart, qwen_image, sana, sd3, wan
from stages.handoff import Baton, build_model
from stages.largest import Largest, made_up
from stages.memory import held_bytes, peak_bytes, restart_peak
from stages.objective import LeftOut, Objective
from stages.objectives.parts import losses
from stages.optim import Average, make_optimizer
from stages.placed import placed_adapters
from stages.plan import Plan
from stages.precision import StagePrecision
from stages.quiet import quiet_libraries
from stages.recomputation import recompute

_LARGER: Mapping[str, Mapping[str, Any]] = {
    "flux": {"num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)},
    "pixart": {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 12, "cross_attention_dim": 256},
    "qwen_image": {"num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)},
    "sana": {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 10, "num_cross_attention_heads": 4, "cross_attention_head_dim": 64, "cross_attention_dim": 256},
    "sd3": {"num_layers": 8, "attention_head_dim": 64, "num_attention_heads": 4, "caption_projection_dim": 256},
    "wan": {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 12, "freq_dim": 256},
}
"""What a family's tiny transformer is made larger by."""
_BUILD: Mapping[str, Callable[..., Path]] = {"flux": flux.build, "pixart": pixart.build, "qwen_image": qwen_image.build, "sana": sana.build, "sd3": sd3.build, "wan": wan.build}
_TOKENS_A_SIDE = 32


@dataclass(frozen=True)
class Case:
    """A stage whose memory is estimated and measured."""

    family: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the stage."""
    images: int = 1

    def __str__(self) -> str:
        said = [f"{name} {value}" if value not in (True, "full") else name for name, value in self.asked.items()]
        return ", ".join([self.family, *said, f"{self.images} image{'s' if self.images > 1 else ''}"])


CASES = (
    Case("flux", {"precision": "fp32"}),
    Case("flux", {"precision": "fp32"}, 4),
    Case("flux", {"precision": "bf16"}, 4),
    Case("flux", {"precision": "bf16", "base": "nf4"}, 4),
    Case("flux", {"precision": "fp32", "checkpointing": "full"}, 4),
    Case("flux", {"precision": "fp32", "train": "full", "ema": 0.99}, 2),
    Case("sd3", {"precision": "fp32"}, 2),
    Case("sd3", {"precision": "bf16", "base": "int8"}, 2),
    Case("sana", {"precision": "fp32"}, 2),
    Case("sana", {"precision": "bf16", "checkpointing": "full"}, 2),
    Case("qwen_image", {"precision": "fp32"}, 2),
    Case("qwen_image", {"precision": "bf16", "base": "nf4", "checkpointing": "full"}, 4),
    Case("wan", {"precision": "fp32"}, 2),
    Case("wan", {"precision": "bf16"}, 2),
    Case("pixart", {"precision": "fp32", "checkpointing": "full"}, 4),
)


@dataclass(frozen=True)
class Found:
    """Bytes of one case."""

    estimated: int
    measured: int
    imported: int
    """What the process took before the model was loaded."""

    @property
    def ratio(self) -> float:
        """Estimated / measured."""
        return self.estimated / self.measured


def enlarged(name: str, folder: Path, device: torch.device) -> Family:
    """A family whose transformer is `_LARGER`, with random weights: its folder holds the tiny one."""
    family = open_family(str(_BUILD[name](folder)), device)
    family.model = replace(family.model, transformer={**family.model.transformer, **_LARGER[name]})

    def load(storage: torch.dtype, weights: Path | None, expert: str | None = None, *, device: torch.device | None = None) -> nn.Module:
        made: nn.Module = family.architecture.transformer_class.from_config(family.model.transformer)
        return made.requires_grad_(False).eval().to(device or family.device, storage)

    family.load_transformer = load  # type: ignore[method-assign]
    return family


def found(case: Case, device: torch.device) -> Found:
    """Estimate a case, and carry it out in this process, which should be fresh."""
    kind: Kind = "cuda" if device.type == "cuda" else "cpu"
    stage = {"name": "only", "steps": 4, "resolution": 64, "batch": case.images, "lr": 0.01, **case.asked}
    plan = Plan.model_validate({"model": "m", "adapter": {"rank": 16}, "sources": {"a": {"path": "a"}}, "stages": [stage]})
    with tempfile.TemporaryDirectory() as folder:
        family = enlarged(case.family, Path(folder, "model"), device)
        side = _TOKENS_A_SIDE * family.pixel_multiple
        largest = Largest("a", Signature((side, side), ()), case.images, _TOKENS_A_SIDE**2 + family.text_tokens, 0)
        estimated = estimate(family, plan, 0, largest, kind).peak
        channels = latent_channels(family)
        gc.collect()
        imported, measured = _measured(family, plan, largest, channels)
    return Found(estimated, measured, imported)


def _measured(family: Family, plan: Plan, largest: Largest, channels: int) -> tuple[int, int]:
    """What the process took before, and by how much it grew at the most."""
    device, stage = family.device, plan.stages[0]
    _trim()
    before = held_bytes(device)
    model, trainable = build_model(family, plan, stage, "stages[0]", Baton(None, None, "the benchmark"))
    drawing = add_dropout(model, placed_adapters(plan, 0), trainable.values())
    recompute(model, stage.checkpointing, device)
    precision = StagePrecision(stage.precision, device)
    optimizer = make_optimizer(trainable, stage.optimizer)
    beside = [Average(trainable, stage.ema)] if stage.ema is not None else []
    batch, shown = made_up(family, largest, key("benchmark"), channels, _prompts(family, largest))
    none = (False,) * largest.images
    _trim()
    restart_peak(device)
    for _ in range(2):  # the second one has the optimizer's moments beside its activations
        for part in Objective(family, stage, key("benchmark"), precision.dtype, largest.images).parts(batch, shown, LeftOut(none, none), 0):
            with drawing.of([0] * len(part.rows)):
                with precision.autocast():
                    predicted = shown.predict_part(family, model, part)
                losses(predicted, part).sum().backward()  # type: ignore[no-untyped-call]
        del predicted
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del beside
    peak = peak_bytes(device)
    assert peak is not None, "only where Linux tells"
    return before, peak - before


def _prompts(family: Family, largest: Largest) -> Text:
    """Prompts of zeros, as long as they can be."""
    config, facts = family.model.transformer, family.facts
    length, pooled = family.text_tokens + facts.further_tokens, config.get("pooled_projection_dim")
    embeds = torch.zeros(largest.images, length, int(config[facts.text_width]), device=family.device)
    mask = torch.ones(largest.images, length, dtype=torch.bool, device=family.device) if facts.tells_mask else None
    return Text(embeds, torch.zeros(largest.images, int(pooled), device=family.device) if pooled else None, mask)


def _trim() -> None:
    """Give back to the system what nothing holds any more."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of glibc alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def in_a_process(case: Case, device: str) -> Found:
    """The same in a process of its own, with one thread."""
    told = json.dumps({"family": case.family, "asked": dict(case.asked), "images": case.images})
    # glibc keeps what was freed for what comes, in holes that fit less and less: a process may hold twice what its tensors take. Told so, it hands back at once what is
    # larger than 128 KiB, at a price: steps take half as long again.
    told_of_memory = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-m", "benchmarks.estimate", "--device", device, "--case", told]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=told_of_memory)
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def chosen(words: Sequence[str]) -> Iterator[Case]:
    """The cases whose name has all these words."""
    return (case for case in CASES if all(word in str(case) for word in words))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="cases whose name has all of these")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case is not None:
        quiet_libraries()
        torch.set_num_threads(1)
        result = found(Case(**json.loads(given.case)), torch.device(given.device))
        print(json.dumps({"estimated": result.estimated, "measured": result.measured, "imported": result.imported}))
        return 0
    print("| case | estimated, MB | measured, MB | estimated / measured | of the process before, MB |\n|---|---:|---:|---:|---:|", flush=True)
    for case in chosen(given.words):
        result = in_a_process(case, given.device)
        print(f"| {case} | {result.estimated / 1e6:,.0f} | {result.measured / 1e6:,.0f} | {result.ratio:.2f} | {result.imported / 1e6:,.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
