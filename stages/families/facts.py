"""What is known of each family without its weights, and without torch: which pipelines it serves, what it can train, how large an image's side must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Config = Mapping[str, object]
Read = Callable[[str, str], Config]
"""Gives a model's JSON file by its name, such as vae/config.json. The second argument ends the sentence `it has no NAME, ...` of the error."""

_IMAGE_TASKS = ("text_to_image", "subject", "control", "edit", "other")
_TEXT_TASKS = ("text_to_image",)


class UnsuitableModel(ValueError):
    """A folder that holds no model that can be trained; the message says why."""


def check_parts(index: Mapping[str, object]) -> None:
    """Raise UnsuitableModel if a model_index.json says that one of its parts is made by code that lies beside it. Such code is never executed."""
    for part, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in (None, "diffusers", "transformers"):
            raise UnsuitableModel(f"has a {part} that is made by code of its own ({str(entry[0])[:60]!r}), and no code of a model is executed; choose a model whose parts are those of diffusers and transformers")


def check_named(index: Mapping[str, object]) -> None:
    """Raise UnsuitableModel if a model_index.json does not say which pipeline and which scheduler it has."""
    scheduler = index.get("scheduler")
    named = {"pipeline": isinstance(index.get("_class_name"), str), "scheduler": isinstance(scheduler, list | tuple) and len(scheduler) == 2}
    if unnamed := [part for part, is_named in named.items() if not is_named]:
        raise UnsuitableModel(f"has a model_index.json that names no {unnamed[0]}; download the model anew, or name a folder in the diffusers layout")


@dataclass(frozen=True)
class ModelSizes:
    """What a model's configs say of sizes."""

    factor: int
    """A latent is as wide as so many pixels; 1 without a VAE."""
    patch: int
    """A token is as wide as so many latents."""
    takes_guidance: bool
    """Whether the transformer is told a guidance."""
    text_tokens: int
    """Tokens of a prompt, padding included; the largest number where prompts are not padded."""

    @property
    def pixel_multiple(self) -> int:
        """Sides of images in pixels are multiples of this."""
        return self.factor * self.patch


@dataclass(frozen=True)
class FamilyFacts:
    """What can be said of a family before a model of it is read."""

    pipelines: Mapping[str, tuple[str, ...]]
    """Class that model_index.json names, to the tasks that such a model can be trained for."""
    sizes: Callable[[Read], ModelSizes]
    objective: Literal["flow", "epsilon"] = "flow"
    """What its transformer was trained to predict."""
    training_shift: float | Literal["by_tokens"] | None = None
    """The shift of the noise levels that it is best trained with where that is not its sampler's, which may leave hardly a level near the image (docs/families.md
    has the sources). by_tokens: as FLUX.1, from exp(0.5) at 256 tokens to exp(1.15) at 4096."""
    guidance: float = 1.0
    """What it is usually sampled with, as its pipeline does by default; 1 is none."""
    guidance_is_told: bool = False
    """Whether that is told to the transformer (and a model that takes none has none), and not classifier-free guidance."""
    takes_scaled_positions: bool = False
    """Whether the tokens of a coarse grid can be told that they lie further apart, as levels of a pyramid do."""
    experts: tuple[str, ...] = ()
    """Transformers that share the noise levels among them; empty where there is one for all."""
    prompts_see_references: tuple[str, ...] = ()
    """Pipelines whose text encoder looks at the references too."""
    fp16: str = ""
    """Why a stage in fp16 goes wrong, so that it is refused; empty if it does not."""
    fp16_risk: str = ""
    """What has been reported of fp16, so that it is warned of; empty if nothing has."""
    one_reference: tuple[str, ...] = ()
    """Pipelines that take one reference and no more."""
    names_images: bool = False
    """Whether a prompt may say where a reference stands in it, by `<|image_1|>`."""
    text_width: str = ""
    """The field of the transformer's config that says how many numbers of a token of the prompt it is shown; empty if it embeds words itself."""
    further_tokens: int = 0
    """Tokens of a prompt that the transformer is shown beside those that count for a model's size: CLIP's."""
    tells_mask: bool = False
    """Whether the transformer is told which tokens of a prompt are words."""
    names_attention: bool = False
    """Whether a kernel for the transformer's attention can be chosen by name (diffusers 0.42.1)."""
    masks_prompts: bool = False
    """Whether its attention is given a mask where prompts of different length stand in one micro-batch."""


def _number(config: Config, name: str, otherwise: int) -> int:
    """A whole number of a config."""
    value = config.get(name, otherwise)
    return int(value) if isinstance(value, int | float) else otherwise


def _length(config: Config, name: str, place: str) -> int:
    """The length of a list that a config must have."""
    value = config.get(name)
    if not isinstance(value, list) or not value:
        raise UnsuitableModel(f"has no list {name} in {place}")
    return len(value)


_NOTHING = "so there is nothing to train"
_PROMISED = "which model_index.json promises"


def _has(index: Config, part: str) -> bool:
    """Whether a model has a part."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _flux(read: Read) -> ModelSizes:
    """A token is 2 x 2 latents; without a VAE it trains on pixels."""
    transformer = read("transformer/config.json", _NOTHING)
    halvings = 0
    if _has(read("model_index.json", ""), "vae"):
        halvings = _length(read("vae/config.json", _PROMISED), "block_out_channels", "vae/config.json") - 1
    # FluxPipeline asks for 512 T5 tokens unless told otherwise; a tokenizer that allows fewer says so itself.
    length = _number(read("tokenizer_2/tokenizer_config.json", "so it cannot read prompts"), "model_max_length", 512)
    return ModelSizes(2**halvings, 2, bool(transformer.get("guidance_embeds")), min(512, length))


def _kl(text_tokens: int) -> Callable[[Read], ModelSizes]:
    """A transformer on the latents of an AutoencoderKL, its patches as its config says (2 if it does not)."""

    def sizes(read: Read) -> ModelSizes:
        transformer = read("transformer/config.json", _NOTHING)
        halvings = _length(read("vae/config.json", _PROMISED), "block_out_channels", "vae/config.json") - 1
        patch = transformer.get("patch_size", transformer.get("all_patch_size", 2))
        first = patch[0] if isinstance(patch, list) and patch else patch
        return ModelSizes(2**halvings, int(first) if isinstance(first, int) else 2, bool(transformer.get("guidance_embeds")), text_tokens)

    return sizes


def _qwen_image(read: Read) -> ModelSizes:
    """A token is 2 x 2 latents, as the pipelines pack them whatever the transformer's config says."""
    if read("transformer/config.json", _NOTHING).get("guidance_embeds"):
        # QwenImageTransformer2DModel hands a guidance to an embedding that takes none (diffusers 0.42.1).
        raise UnsuitableModel("has guidance_embeds in transformer/config.json, which diffusers' QwenImageTransformer2DModel cannot run; no published model has it")
    halvings = _length(read("vae/config.json", _PROMISED), "temperal_downsample", "vae/config.json")
    return ModelSizes(2**halvings, 2, False, 512)


def _sana(read: Read) -> ModelSizes:
    """A deep-compression autoencoder, by 32 in Sana's own models; SanaPipeline asks for 300 Gemma tokens."""
    transformer = read("transformer/config.json", _NOTHING)
    halvings = _length(read("vae/config.json", _PROMISED), "encoder_block_out_channels", "vae/config.json") - 1
    return ModelSizes(2**halvings, _number(transformer, "patch_size", 1), False, 300)


def _flux2(read: Read) -> ModelSizes:
    """A token is a latent, which is 2 x 2 of the VAE's; both pipelines ask for 512 tokens of text. Klein's never tells its transformer a guidance."""
    told = read("transformer/config.json", _NOTHING).get("guidance_embeds", True) and read("model_index.json", "").get("_class_name") != "Flux2KleinPipeline"
    halvings = _length(read("vae/config.json", _PROMISED), "block_out_channels", "vae/config.json") - 1
    return ModelSizes(2 * 2**halvings, 1, bool(told), 512)


def _pixart(read: Read) -> ModelSizes:
    """PixArtAlphaPipeline asks for 120 T5 tokens, PixArtSigmaPipeline for 300."""
    return _kl(120 if read("model_index.json", "").get("_class_name") == "PixArtAlphaPipeline" else 300)(read)


def _wan(read: Read) -> ModelSizes:
    """A token is 1 x 2 x 2 latents; WanPipeline asks for 512 UMT5 tokens. The VAE shrinks by 8 unless its config says otherwise, as that of 5B does (16)."""
    patch = read("transformer/config.json", _NOTHING).get("patch_size")
    factor = _number(read("vae/config.json", _PROMISED), "scale_factor_spatial", 8)
    return ModelSizes(factor, int(patch[-1]) if isinstance(patch, list) and patch else 2, False, 512)


_CLIPS = "its blocks cut activations off at 65504, and nothing is learnt through those"
_REPORTED = "black images and losses that are no number have been reported"

FAMILIES: Mapping[str, FamilyFacts] = MappingProxyType(
    {
        "flux": FamilyFacts({"FluxPipeline": (*_IMAGE_TASKS, "entity"), "FluxKontextPipeline": (*_IMAGE_TASKS, "entity")}, _flux, guidance=3.5, guidance_is_told=True, fp16_risk=_CLIPS, takes_scaled_positions=True, text_width="joint_attention_dim", names_attention=True),
        "omnigen": FamilyFacts({"OmniGenPipeline": _IMAGE_TASKS}, _kl(256), guidance=2.5, names_images=True),
        "pixart": FamilyFacts({"PixArtAlphaPipeline": _TEXT_TASKS, "PixArtSigmaPipeline": _TEXT_TASKS}, _pixart, objective="epsilon", guidance=4.5, text_width="caption_channels", tells_mask=True),
        "sd3": FamilyFacts({"StableDiffusion3Pipeline": _TEXT_TASKS}, _kl(256), guidance=7.0, text_width="joint_attention_dim", further_tokens=77),
        "flux2": FamilyFacts({"Flux2Pipeline": _IMAGE_TASKS, "Flux2KleinPipeline": _IMAGE_TASKS}, _flux2, training_shift="by_tokens", guidance=4.0, guidance_is_told=True, fp16_risk=_CLIPS, text_width="joint_attention_dim", names_attention=True),
        "lumina2": FamilyFacts({"Lumina2Pipeline": _TEXT_TASKS}, _kl(256), training_shift="by_tokens", guidance=4.0, fp16_risk=_REPORTED, text_width="cap_feat_dim", tells_mask=True),
        "sana": FamilyFacts({"SanaPipeline": _TEXT_TASKS}, _sana, guidance=4.5, fp16="its linear attention leaves the range of fp16 under autocast, without a warning", text_width="caption_channels", tells_mask=True),
        "qwen_image": FamilyFacts(
            dict.fromkeys(("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"), (*_IMAGE_TASKS, "entity")),
            _qwen_image,
            guidance=4.0,
            fp16_risk=_REPORTED,
            prompts_see_references=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
            one_reference=("QwenImageEditPipeline",),
            text_width="joint_attention_dim",
            names_attention=True,
            masks_prompts=True,
        ),
        "z_image": FamilyFacts({"ZImagePipeline": _TEXT_TASKS}, _kl(512), training_shift=3.0, guidance=5.0, fp16_risk=_REPORTED, text_width="cap_feat_dim", names_attention=True),
        "wan": FamilyFacts({"WanPipeline": _TEXT_TASKS}, _wan, guidance=5.0, experts=("high", "low"), text_width="text_dim", names_attention=True),
    }
)
"""The families by name."""

PIPELINES: Mapping[str, str] = MappingProxyType({pipeline: name for name, facts in FAMILIES.items() for pipeline in facts.pipelines})
"""The class that a model's model_index.json names to the family that trains it."""

DISTILLED: frozenset[str] = frozenset(
    {
        "black-forest-labs/FLUX.1-schnell",
        "black-forest-labs/FLUX.2-klein-4B",
        "black-forest-labs/FLUX.2-klein-9B",
        "stabilityai/stable-diffusion-3.5-large-turbo",
        "Tongyi-MAI/Z-Image-Turbo",
    }
)
"""Repositories of models that were distilled to sample in few steps, which training takes from them."""

KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "black-forest-labs/FLUX.1-dev": "FluxPipeline",
        "black-forest-labs/FLUX.1-schnell": "FluxPipeline",
        "black-forest-labs/FLUX.1-Krea-dev": "FluxPipeline",
        "black-forest-labs/FLUX.1-Kontext-dev": "FluxKontextPipeline",
        "black-forest-labs/FLUX.2-dev": "Flux2Pipeline",
        "black-forest-labs/FLUX.2-klein-4B": "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-9B": "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-base-4B": "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-base-9B": "Flux2KleinPipeline",
        "stabilityai/stable-diffusion-3-medium-diffusers": "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-large": "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-large-turbo": "StableDiffusion3Pipeline",
        "Efficient-Large-Model/Sana_600M_512px_diffusers": "SanaPipeline",
        "Efficient-Large-Model/Sana_600M_1024px_diffusers": "SanaPipeline",
        "Efficient-Large-Model/Sana_1600M_512px_diffusers": "SanaPipeline",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "SanaPipeline",
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "SanaPipeline",
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "SanaPipeline",
        "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": "SanaPipeline",
        "Alpha-VLLM/Lumina-Image-2.0": "Lumina2Pipeline",
        "Qwen/Qwen-Image": "QwenImagePipeline",
        "Qwen/Qwen-Image-2512": "QwenImagePipeline",
        "Qwen/Qwen-Image-Edit": "QwenImageEditPipeline",
        "Qwen/Qwen-Image-Edit-2509": "QwenImageEditPlusPipeline",
        "Qwen/Qwen-Image-Edit-2511": "QwenImageEditPlusPipeline",
        "Tongyi-MAI/Z-Image": "ZImagePipeline",
        "Tongyi-MAI/Z-Image-Turbo": "ZImagePipeline",
        "PixArt-alpha/PixArt-XL-2-1024-MS": "PixArtAlphaPipeline",
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "PixArtSigmaPipeline",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "PixArtSigmaPipeline",
        "Shitao/OmniGen-v1-diffusers": "OmniGenPipeline",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "WanPipeline",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": "WanPipeline",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "WanPipeline",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "WanPipeline",
    }
)
"""Well-known models of the Hub to the class that their model_index.json names: what a rehearsal goes by where the Hub cannot be reached."""


def tasks_of(pipeline: str) -> tuple[str, ...]:
    """The tasks that a model of this pipeline can be trained for."""
    return FAMILIES[PIPELINES[pipeline]].pipelines[pipeline]
