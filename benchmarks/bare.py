"""The bare loop that `benchmarks.step` holds Medley's to: diffusers' transformer, peft's pairs, torch's AdamW, and what is left of a step then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.adapter import exactly
from stages.families.open import ARCHITECTURES
from stages.precision import DTYPES


@dataclass(frozen=True)
class Inputs:
    """What one step is made of: all of it encoded and drawn."""

    x: Tensor
    """Latents, float32 [B, C, h, w]."""
    e: Tensor
    """Noise, as large."""
    t: Tensor
    """Noise levels, float32 [B]."""
    embeds: Tensor
    """[B, L, D]"""
    pooled: Tensor | None
    """[B, P]"""
    mask: Tensor | None
    """bool [B, L]"""


@dataclass(frozen=True)
class Recorded:
    """What Medley would train on, so that another loop can train on the same."""

    family: str

    inputs: tuple[Inputs, ...]
    """Of each step."""
    adapter: Mapping[str, Tensor]
    """The fresh adapter's weights."""
    layers: tuple[str, ...]
    """The names of those that carry a pair."""
    tokens: int
    """Of an image and its prompt."""
    guidance: float | None
    storage: torch.dtype
    """Of the frozen weights."""


class Predict:
    """A transformer's velocity of packed or plain latents, as its pipeline calls it; position ids are made once."""

    def __init__(self, recorded: Recorded, device: torch.device) -> None:
        self._recorded = recorded
        first = recorded.inputs[0]
        _, _, height, width = first.x.shape
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        self._places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float().to(device)
        self._text_places = torch.zeros(first.embeds.shape[1], 3, device=device)
        ways: dict[str, Callable[[nn.Module, Tensor, Inputs], Tensor]] = {"flux": self._flux, "sd3": self._sd3, "qwen_image": self._qwen_image, "sana": self._sana}
        self.of_family = ways[recorded.family]

    def _flux(self, model: nn.Module, noised: Tensor, given: Inputs) -> Tensor:
        guidance = self._recorded.guidance
        assert given.pooled is not None
        out: Tensor = model(
            hidden_states=_packed(noised),
            timestep=given.t,
            guidance=None if guidance is None else torch.full_like(given.t, guidance),
            pooled_projections=given.pooled.float(),
            encoder_hidden_states=given.embeds.float(),
            txt_ids=self._text_places,
            img_ids=self._places,
            return_dict=False,
        )[0]
        return _unpacked(out.float(), noised)

    def _sd3(self, model: nn.Module, noised: Tensor, given: Inputs) -> Tensor:
        assert given.pooled is not None
        out: Tensor = model(hidden_states=noised, timestep=given.t * 1000, encoder_hidden_states=given.embeds.float(), pooled_projections=given.pooled.float(), return_dict=False)[0]
        return out.float()

    def _qwen_image(self, model: nn.Module, noised: Tensor, given: Inputs) -> Tensor:
        images, _, height, width = noised.shape
        grids = [[(1, height // 2, width // 2)]] * images
        out: Tensor = model(
            hidden_states=_packed(noised), timestep=given.t, encoder_hidden_states=given.embeds.float(), encoder_hidden_states_mask=given.mask, img_shapes=grids, return_dict=False
        )[0]
        return _unpacked(out.float(), noised)

    def _sana(self, model: nn.Module, noised: Tensor, given: Inputs) -> Tensor:
        assert given.mask is not None
        t = given.t * 1000 * float(getattr(model.config, "timestep_scale", 1.0) or 1.0)
        out: Tensor = model(hidden_states=noised, encoder_hidden_states=given.embeds.float(), encoder_attention_mask=given.mask.float(), timestep=t, return_dict=False)[0]
        return out[:, : noised.shape[1]].float()


FAMILIES = ("flux", "sd3", "qwen_image", "sana")
"""Of which there is a bare loop."""


def _packed(latents: Tensor) -> Tensor:
    images, channels, height, width = latents.shape
    return latents.view(images, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(images, -1, 4 * channels)


def _unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    images, channels, height, width = like.shape
    return tokens.view(images, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


class Bare:
    """A plain training loop of an adapter: diffusers' transformer, peft's pairs, torch's AdamW, and nothing else."""

    def __init__(self, model_folder: Path, recorded: Recorded, rank: int, precision: str, device: torch.device) -> None:
        self.recorded, self.device, self.losses = recorded, device, list[Tensor]()
        of_class = ARCHITECTURES[recorded.family].transformer_class
        model = of_class.from_pretrained(model_folder, subfolder="transformer", dtype=recorded.storage).requires_grad_(False).to(device)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly(recorded.layers)), model)
        self.parameters = []
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = recorded.adapter[name.replace(".default", "")].to(device)
                self.parameters.append(parameter.requires_grad_())
        self.model = model.train()
        self.autocast = torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        self.predict = Predict(recorded, device).of_family

    def loss(self, given: Inputs) -> Tensor:
        """The mean squared error of the velocity."""
        t = given.t.view(-1, 1, 1, 1)
        noised, target = (1 - t) * given.x + t * given.e, given.e - given.x
        with self.autocast:
            velocity = self.predict(self.model, noised, given)
        return (velocity.float() - target).square().mean()

    def __call__(self) -> None:
        """Make all steps."""
        for given in self.recorded.inputs:
            loss = self.loss(given)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.losses.append(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def operations(self) -> int:
        """Multiplications and additions in the matrix products of a step, forward and backward, attention among them."""
        # On a CPU attention is one kernel that the counter does not know (torch 2.13); written out it is two products.
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            torch.autograd.backward(self.loss(self.recorded.inputs[0]))
        self.optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())
