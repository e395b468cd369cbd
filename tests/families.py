"""What every family has to prove, on its tiny model: one step is its pipeline's own, and an adapter is loaded by its pipeline as training saw it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapter import adapter_weights, add_adapter, choose_trainable, lora_layers
from stages.families.family import Family
from stages.layouts import ADAPTER_FILE, write_adapter
from stages.plan import Adapter

CPU = torch.device("cpu")
PROMPTS = ["a red disc", "a blue square", "make it the same"]


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pipelines_first_step(pipe: Any, call: Callable[[Any], object]) -> Tensor:
    """The latents after a pipeline's first step. call: calls the pipeline with the `callback_on_step_end` that it is given, and with `latents`."""
    seen: list[Tensor] = []

    def note(pipeline: object, step: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return values

    pipe.set_progress_bar_config(disable=True)
    call(note)
    return seen[0]


@torch.no_grad()
def our_first_step(family: Family, transformer: nn.Module, x: Tensor, prompts: list[str], *, steps: int, references: tuple[Tensor, ...] = (), images: tuple[Tensor, ...] = ()) -> Tensor:
    """The same by Medley's own parts. references: latents; images: what they are of, for prompts that see them."""
    sigmas = family.sigmas(steps, family.latent_tokens(x))
    now, then = (level.expand(len(x)) for level in sigmas[:2])
    predicted = family.predict(transformer, x, now, family.encode_prompts(prompts, images), references)
    return family.path.step(x, predicted, now, then)


def adapted(family: Family, *, rank: int = 2, targets: str = "linear", strength: float = 0.3) -> nn.Module:
    """A transformer with an adapter whose B is random, so that it counts."""
    model = family.load_transformer(torch.float32, None)
    add_adapter(model, Adapter(rank=rank, targets=targets), family.target_patterns, 0)  # type: ignore[arg-type]
    for number, layer in enumerate(lora_layers(model).values()):
        with torch.no_grad():
            up = layer.lora_B["default"].weight
            up.copy_(strength * noise(*up.shape, seed=number))
    return model


def reloaded(family: Family, trained: nn.Module, folder: Path, *, rank: int = 2, targets: str = "linear") -> nn.Module:
    """A fresh transformer into which the stock pipeline has loaded the adapter of a trained one, written as it is published."""
    folder.mkdir(exist_ok=True)
    write_adapter(folder / ADAPTER_FILE, adapter_weights(trained), Adapter(rank=rank, targets=targets), {})  # type: ignore[arg-type]
    fresh = family.load_transformer(torch.float32, None)
    family.stock_pipeline(fresh, encoders=False).load_lora_weights(folder, weight_name=ADAPTER_FILE)
    return fresh


def without_gradient(trained: nn.Module, predict: Callable[[nn.Module], Tensor]) -> list[str]:
    """The names of the adapter's weights that no gradient of the mean squared output reaches."""
    weights = choose_trainable(trained, "adapter", "test")
    predict(trained).square().mean().backward()
    return [name for name, weight in weights.items() if weight.grad is None or not bool(weight.grad.abs().max() > 0)]


def largest(one: Mapping[str, Tensor] | Tensor, other: Mapping[str, Tensor] | Tensor) -> float:
    """The largest difference."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return float((one - other).abs().max())
    assert not isinstance(one, Tensor)
    assert not isinstance(other, Tensor)
    return max(largest(one[name], other[name]) for name in one)
