"""Numbers that are none, put into a run from outside: production code has no hooks for this.

Which image, on which process, at which steps follows from what is drawn, so a run that is killed and goes on meets the same faults as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAN_LOSS, INF_LOSS, NAN_GRADIENT, NAN_LATENTS = "a loss that is nan", "an infinite loss with a finite gradient", "a gradient that is nan", "latents that are nan"
OVERFLOW, WRONG = "a gradient beyond fp16", "a target that is hugely wrong"
LARGE = 2.0**24  # of the loss scale: gradients of the tiny model overflow until some 2**18


@dataclass(frozen=True)
class NumberFault:
    """A fault of one process: at one step, in the first image that the process has of it; or at all steps from one on."""

    kind: str
    rank: int
    step: int
    """From 1."""
    always: bool = False
    kill_after: int | None = None
    """A step after which every process ends by kill -9, once."""

    def put_in(self, rank: int, note: Path) -> None:
        """In a forked process, before train.py begins: put it in. note: a folder; there the rows that were hit are noted, and each process's weights after every step, as a hash."""
        from stages.families.family import Family
        from stages.leg import Leg
        from stages.objectives import parts as of_parts
        from stages.sharing import whole

        under_way: dict[str, Any] = {"step": 0, "fresh": False}
        see, stepped, errors_and_losses, encode_images = Leg.parts, Leg.stepped, of_parts.errors_and_losses, Family.encode_images

        def is_due() -> bool:
            due = under_way["step"] >= self.step if self.always else under_way["step"] == self.step
            return rank == self.rank and due and under_way["fresh"]

        def parts(leg: Any, batch: Any, drawn: Any) -> Any:
            under_way["fresh"] = leg.step + 1 != under_way["step"]
            under_way["step"] = leg.step + 1
            if is_due() and self.kind != OVERFLOW:
                note.mkdir(exist_ok=True)
                (note / f"hit-{leg.step + 1}.json").write_text(json.dumps([batch.sources[0], batch.keys[0]]))
            return see(leg, batch, drawn)

        def losses(predicted: Tensor, part: Any) -> tuple[Tensor, Tensor]:
            if is_due() and 0 in part.rows.tolist():
                first = (part.rows == 0).to(predicted.device)
                if self.kind == NAN_GRADIENT:
                    predicted.register_hook(lambda gradient: gradient * torch.where(first, torch.nan, 1.0).reshape(-1, *[1] * (gradient.dim() - 1)))
                errors, weighted = errors_and_losses(predicted, part)
                if self.kind == NAN_LOSS:
                    weighted = weighted * torch.where(first, torch.nan, 1.0)
                elif self.kind == INF_LOSS:
                    weighted = weighted + torch.where(first, torch.inf, 0.0)
                elif self.kind == WRONG:
                    weighted = weighted * torch.where(first, 1e4, 1.0)
                return errors, weighted
            return errors_and_losses(predicted, part)

        def latents(family: Any, images: Tensor) -> Tensor:
            found = encode_images(family, images)
            if self.kind == NAN_LATENTS and is_due():
                under_way["fresh"] = False  # of the targets alone
                found[0] = torch.nan
            return found

        def after(leg: Any, made: bool, **named: Any) -> None:
            stepped(leg, made, **named)
            under_way["fresh"] = False  # what is measured between steps stays as it is
            note.mkdir(exist_ok=True)
            held = hashlib.sha256(b"".join(whole(value).numpy().tobytes() for value in leg.training.trainable.values())).hexdigest()
            (note / f"weights-{leg.stage.name}-{leg.step}-{rank}").write_text(held)
            killed = note / f"killed-{rank}"
            if leg.step == self.kill_after and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        Leg.parts, Leg.stepped, of_parts.errors_and_losses, Family.encode_images = parts, after, losses, latents  # type: ignore[method-assign, assignment]
        if self.kind == OVERFLOW:
            scaler: Callable[..., Any] = torch.amp.GradScaler
            scale = LARGE * (2.0**100 if self.always else 1.0)
            torch.amp.GradScaler = lambda *arguments, **named: scaler(*arguments, **{**named, "init_scale": scale})  # type: ignore[misc, assignment]
