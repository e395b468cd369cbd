"""PyramidFluxPipeline: the diffusers pipeline that an adapter trained over a pyramid is sampled with.

    pipe = PyramidFluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
    pipe.load_lora_weights("runs/x/adapter", weight_name="adapter.safetensors")
    pipe("a red disc", height=1024, width=1024).images[0].save("disc.png")

FluxPipeline would start such an adapter at the full size, where it was taught nothing about the first noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_base import _best_guess_weight_name
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import _get_model_file
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stages.objectives.pyramid import noise_at, sample_pyramid
from stages.objectives.windows import METADATA_KEY, Windows, check_size, of_file

_PATCH = 2


class PyramidFluxPipeline(FluxPipeline):  # type: ignore[misc]
    """FluxPipeline that samples over a pyramid of resolutions. It loads, saves and moves as FluxPipeline does."""

    _windows_of: Mapping[str, Windows | None] = MappingProxyType({})
    """By adapter. On the class, for diffusers reads the components off the signature of __init__, which stays FluxPipeline's."""

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, hotswap: bool = False, **kwargs: Any) -> None:
        """As FluxPipeline, whose signature this is; and read from the file's header which pyramid the adapter was trained over, if any.

        Raises ValueError, before anything is loaded, if the header says something of a pyramid that cannot be read.
        """
        windows = _windows_in(pretrained_model_name_or_path_or_dict, kwargs)
        before = self._adapters()
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name=adapter_name, hotswap=hotswap, **kwargs)
        loaded = {adapter_name} if adapter_name is not None else self._adapters() - before
        self._windows_of = {**self._windows_of, **dict.fromkeys(loaded, windows)}

    def _adapters(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}

    def windows(self, levels: int | None = None, gamma: float | None = None, shift: float | None = None) -> Windows:
        """The pyramid to sample over: that of the active adapters, else what is asked for.

        Raises ValueError if neither says how many levels, or if the active adapters disagree with each other or with what is asked for.
        """
        active = {name: windows for name in self.get_active_adapters() if (windows := self._windows_of.get(name)) is not None}
        if len(set(active.values())) > 1:
            said = ", ".join(f"{name}: {windows}" for name, windows in active.items())
            raise ValueError(f"the active adapters were trained over different pyramids ({said}); activate one of them with set_adapters")
        for name, windows in active.items():
            for field, asked, trained in (("levels", levels, windows.levels), ("gamma", gamma, windows.gamma), ("window_shift", shift, windows.shift)):
                if asked is not None and asked != trained:
                    raise ValueError(f"{field}: {asked} asked, but adapter '{name}' was trained with {trained}; leave {field} out, or deactivate the adapter")
            return windows
        if levels is None:
            raise ValueError(f"levels: no active adapter says how many ('{METADATA_KEY}' in the header of its file); give levels, and gamma if it is not 1/3")
        return Windows(levels, 1 / 3 if gamma is None else gamma, 1.0 if shift is None else shift)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | Sequence[int] = 20,
        levels: int | None = None,
        gamma: float | None = None,
        window_shift: float | None = None,
        course: Literal["even", "scheduler"] = "even",
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 512,
    ) -> Any:
        """Images for prompts, as FluxPipelineOutput or, without return_dict, a tuple of one; what is not named here is as in FluxPipeline.

        height, width: in pixels, multiples of 2^(levels - 1) x 2 x the VAE's factor. num_inference_steps: in each level, or a list of one number for
        each. levels, gamma, window_shift: of `Windows`; left out, those of the active adapter. course: how the steps of a level are spaced over its
        window: evenly, as Pyramid-Flow is trained and sampled, or as the scheduler shifts a straight flow of as many tokens; with that and one level
        the images are FluxPipeline's. latents: noise of the full size, packed as FluxPipeline's; the jumps' noise comes from `generator`.
        output_type "latent" gives packed latents. Raises ValueError if an argument is not one of these.
        """
        windows = self.windows(levels, gamma, window_shift)
        if course not in ("even", "scheduler"):
            raise ValueError(f"course: '{course}' is not one of even, scheduler")
        height, width = (side or self.default_sample_size * self.vae_scale_factor for side in (height, width))
        check_size(height, width, windows.levels, _PATCH * self.vae_scale_factor)
        self.check_inputs(prompt, prompt_2, height, width, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, max_sequence_length=max_sequence_length)
        self._guidance_scale, self._joint_attention_kwargs = guidance_scale, dict(joint_attention_kwargs or {})
        self._interrupt = False
        if prompt is not None:
            images = 1 if isinstance(prompt, str) else len(prompt)
        else:
            assert prompt_embeds is not None  # else check_inputs had raised
            images = len(prompt_embeds)
        device = self._execution_device
        embeds, pooled, text_ids = self.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            lora_scale=self._joint_attention_kwargs.get("scale"),
        )
        full = (images * num_images_per_prompt, self.transformer.config.in_channels // 4, height // self.vae_scale_factor, width // self.vae_scale_factor)
        noise = _noise(full, windows, latents, generator, device, embeds.dtype)
        guidance = torch.full([full[0]], guidance_scale, device=device, dtype=torch.float32) if self.transformer.config.guidance_embeds else None
        counts = [num_inference_steps] * windows.levels if isinstance(num_inference_steps, int) else list(num_inference_steps)
        self._num_timesteps = sum(counts)

        with self.progress_bar(total=sum(counts)) as bar:

            def predict(noised: Tensor, t: Tensor, scale: float) -> Tensor:
                batch, channels, rows, columns = noised.shape
                # The way is kept in float32, and so are the position ids: the transformer alone computes in its own dtype. It multiplies t by 1000 there
                # (diffusers 0.42.1): in bf16 a t that was rounded before comes to another multiple of 4 than 1000 t does, so FluxPipeline rounds that.
                velocity = self.transformer(
                    hidden_states=self._pack_latents(noised.to(embeds.dtype), batch, channels, rows, columns),
                    timestep=(t * 1000).to(embeds.dtype) / 1000,
                    guidance=guidance,
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=text_ids,
                    img_ids=_positions(rows // _PATCH, columns // _PATCH, scale, device),
                    joint_attention_kwargs=self._joint_attention_kwargs,
                    return_dict=False,
                )[0]
                bar.update()
                return _unpack(velocity.float(), rows, columns)

            shifts = [self._shift(each.shape[2] * each.shape[3] // _PATCH**2) for each in noise] if course == "scheduler" else None
            x = sample_pyramid(predict, noise, windows, counts, shifts)

        if output_type == "latent":
            made: Any = self._pack_latents(x.to(embeds.dtype), *x.shape)
        else:
            x = x / self.vae.config.scaling_factor + self.vae.config.shift_factor
            made = self.image_processor.postprocess(self.vae.decode(x.to(self.vae.dtype), return_dict=False)[0], output_type=output_type)
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=made) if return_dict else (made,)

    def _shift(self, tokens: int) -> float:
        """By how much the scheduler shifts the noise levels of so many tokens."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        return float(torch.tensor(calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift), dtype=torch.float64).exp())


def _windows_in(adapter: Any, options: dict[str, Any]) -> Windows | None:
    """The pyramid that an adapter's file names; None for weights in memory and for files of another kind.

    options: what FluxPipeline.load_lora_weights is given. The file is looked up by the two functions that it uses itself (diffusers 0.42.1,
    loaders/lora_base.py, _fetch_state_dict), which on the Hub download it once; that it can ask them for the header too, Flux's loader leaves out.
    """
    if isinstance(adapter, dict) or options.get("use_safetensors") is False:
        return None
    offline = options.get("local_files_only")
    name = options.get("weight_name") or _best_guess_weight_name(adapter, file_extension=".safetensors", local_files_only=offline)
    if not str(name or adapter).endswith(".safetensors"):
        return None
    asked = {option: options.get(option) for option in ("cache_dir", "proxies", "token", "revision", "subfolder")}
    return of_file(Path(_get_model_file(adapter, weights_name=name, force_download=False, local_files_only=offline, user_agent=None, **asked)))


def _noise(
    full: tuple[int, int, int, int], windows: Windows, latents: Tensor | None, generator: torch.Generator | list[torch.Generator] | None, device: Any, dtype: torch.dtype
) -> list[Tensor]:
    """Standard normal noise, float32, in the size of each level; the first is that of the full size, drawn as FluxPipeline draws it, made smaller."""
    count, channels, height, width = full
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"generator: a list of {len(generator)} for {count} images; give one generator, or one for each image")
    if latents is None:
        first = randn_tensor(full, generator=generator, device=device, dtype=dtype).float()
    else:
        tokens = (count, height * width // _PATCH**2, channels * _PATCH**2)
        if tuple(latents.shape) != tokens:
            raise ValueError(f"latents: {tuple(latents.shape)} are not the packed noise of the full size, {tokens}")
        first = _unpack(latents.to(device, torch.float32), height, width)
    sides = [int(windows.scale(level)) for level in range(1, windows.levels)]
    jumps = [randn_tensor((count, channels, height // side, width // side), generator=generator, device=device, dtype=dtype).float() for side in sides]
    return [noise_at(first, windows.levels - 1), *jumps]


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h/2 x w/2, 4 C] to [B, C, h, w]."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // _PATCH, width // _PATCH, channels // _PATCH**2, _PATCH, _PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // _PATCH**2, height, width)


def _positions(rows: int, columns: int, scale: float, device: Any) -> Tensor:
    """Position ids float32 [rows x columns, 3] of a grid whose tokens each span `scale` tokens of the full grid: their centres on it."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = (torch.arange(rows) * scale + (scale - 1) / 2)[:, None]
    ids[..., 2] = torch.arange(columns) * scale + (scale - 1) / 2
    return ids.reshape(-1, 3).to(device)
