"""Pairs: a saved adapter in another form. More or fewer rows, several adapters as one, or folded into the weights; from the tensors alone, in float32.

What a pair adds to its layer's weight is scale * B @ A, with A [rank, in] and B [out, rank]; DoRA then sets the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.adapter import fresh_key, fresh_rows

_NOTHING = 1e-9  # of the largest singular value, below which a row is one of rounding (float64)
_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def layers_of(weights: Mapping[str, Tensor]) -> list[str]:
    """The layers that have a pair, sorted."""
    return sorted(name.removesuffix(_DOWN) for name in weights if name.endswith(_DOWN))


def pair(weights: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """A and B of a layer."""
    return weights[layer + _DOWN], weights[layer + _UP]


def ranks_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Each layer's rank."""
    return {layer: weights[layer + _DOWN].shape[0] for layer in layers_of(weights)}


def rescaled(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same pairs with B multiplied."""
    return {name: value * factor if ".lora_B." in name else value for name, value in weights.items()}


def grown(weights: Mapping[str, Tensor], rank: int, factor: float, *, seed: int, adapter: str, turn: int) -> dict[str, Tensor]:
    """The same function with more rows: fresh rows below A, zeros beside B, and B multiplied by old scale / new scale, `factor`.

    seed, adapter, turn: what fresh rows are drawn by, beside the layer and the rank that it had. Raises ValueError if a layer has a larger rank already.
    """
    found = dict(weights)
    for layer in layers_of(weights):
        down, up = pair(weights, layer)
        more = rank - down.shape[0]
        if more < 0:
            raise ValueError(f"layer {layer} has rank {down.shape[0]}, which is more than {rank}")
        rows = fresh_rows((more, down.shape[1]), fresh_key(seed, f"{layer} from {down.shape[0]}", adapter, turn)) if more else down[:0]
        found[layer + _DOWN] = torch.cat([down, rows.to(down)])
        found[layer + _UP] = torch.cat([up * factor, up.new_zeros(up.shape[0], more)], dim=1)
    return found


def joined(adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Several adapters as one of scale 1 that adds what all of them add together: their A one below the other, their B side by side.

    adapters: the pairs of each, and its scale. A layer's rank is the sum of those that it has.
    """
    found: dict[str, Tensor] = {}
    for layer in sorted({layer for weights, _ in adapters for layer in layers_of(weights)}):
        own = [(*pair(weights, layer), scale) for weights, scale in adapters if layer + _DOWN in weights]
        found[layer + _DOWN] = torch.cat([down for down, _, _ in own])
        found[layer + _UP] = torch.cat([scale * up for _, up, scale in own], dim=1)
    return found


def shrunk(weights: Mapping[str, Tensor], rank: int, factor: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The nearest pairs of at most a rank, and for each layer |new - old| / |old| of its product.

    factor: B is multiplied by it. The singular values are shared out between A and B, as their roots. They are those of the rank x rank product of the
    triangles of QR (float64), since B @ A itself is as large as the layer. Where a product has a smaller rank its pair has too: rows of zeros in
    both would never learn again (`grown` fills them up).
    """
    found, errors = {}, {}
    for layer in layers_of(weights):
        down, up = pair(weights, layer)
        q_up, r_up = torch.linalg.qr(up.double())
        q_down, r_down = torch.linalg.qr(down.double().T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        kept = min(rank, int((values > _NOTHING * values[0]).sum()))
        roots = values[:kept].sqrt()
        lost, whole = float(values[kept:].square().sum().sqrt()), float(values.square().sum().sqrt())
        errors[layer] = lost / whole if whole else 0.0
        found[layer + _DOWN] = ((right[:kept] * roots[:, None]) @ q_down.T).float().contiguous()
        found[layer + _UP] = (factor * (q_up @ (left[:, :kept] * roots))).float().contiguous()
    return found, errors


def merged(weight: Tensor, weights: Mapping[str, Tensor], layer: str, scale: float) -> Tensor:
    """A layer's weight [out, in], float32, with its pair folded in."""
    down, up = pair(weights, layer)
    turned = weight.float() + scale * (up.to(weight.device).float() @ down.to(weight.device).float())
    magnitude = weights.get(layer + _MAGNITUDE)
    if magnitude is None:
        return turned
    lengths: Tensor = torch.linalg.norm(turned, dim=1)
    return (magnitude.to(weight.device) / lengths)[:, None] * turned
