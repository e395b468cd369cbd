"""The plan language: every word that may stand in a plan, on one screen, with what it means and its default.

Nothing here imports torch. `stages.reader` turns YAML into a `Plan`, `stages.check` asks whether it can be carried out,
and docs/plan.md and docs/plan.schema.json are generated from the docstrings below.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_RANK = 4096
BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)? ?(MB|GB|TB|MiB|GiB|TiB)$"

Task = Literal["text_to_image", "subject", "control", "edit", "other", "entity"]
Role = Literal["target", "reference", "prompt", "entity_prompts", "entity_masks"]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Storage = Literal["fp32", "bf16", "nf4", "int8", "fp8"]
TrackerName = Literal["trackio", "tensorboard", "wandb"]
Quantised = Literal["nf4", "int8", "fp8"]
MetricName = Literal["clip_score", "dino_similarity"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Side = Annotated[int, Field(strict=True, ge=1, le=16384)]
Bytes = Annotated[str, Field(pattern=BYTES_PATTERN, max_length=20)]
Rank = Annotated[int, Field(strict=True, ge=1, le=MOST_RANK)]


class _Word(BaseModel):
    """What every part of a plan has in common: unknown fields are errors, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, serialize_by_alias=True)


class Model(_Word):
    """The model that is trained: a diffusers pipeline, from the Hub or from a folder. Its family is read from model_index.json."""

    repo: str
    """A Hub id (`black-forest-labs/FLUX.1-dev`) or a folder in the diffusers layout, relative to where the command is typed."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. Pin a commit, and the run can be repeated."""
    guidance: Positive | None = None
    """The guidance that a guidance-distilled transformer is told while it trains (1.0 if left out). Refused for a model that takes none."""


class Adapter(_Word):
    """The LoRA that stages with `train: adapter` teach. Its weights and its optimizer's are float32, whatever the base is stored in."""

    rank: Rank = 16
    """Rank r of every low-rank pair."""
    alpha: Positive | None = None
    """Scale: the pair's product is multiplied by alpha / rank, with `variant: rslora` by alpha / sqrt(rank). Left out, it is the rank."""
    targets: Literal["attention", "blocks", "linear"] | list[str] = "blocks"
    """Which linear layers get a pair: `attention`; `blocks` (attention and feed-forward of every block); `linear` (those, and the
    blocks' modulation); or a list of patterns, each matched against a module's full name. A pattern that matches nothing is an error."""
    variant: Literal["lora", "dora", "rslora"] = "lora"
    """`lora` (Hu et al. 2021). `rslora`: another scale, under which large ranks learn as fast as small ones (Kalajdzievski 2023). `dora`: a pair
    turns the rows of a layer's weight and a vector of magnitudes, trained too, sets their lengths (Liu et al. 2024)."""
    dropout: Fraction = 0.0
    """How often a number of a pair's input is left out in training, in [0, 1). What is left out follows from (seed, stage, image, layer), so a
    resumed run repeats it; nothing is left out where the model is measured or sampled."""


class Power(_Word):
    """Shares by size to a power: 1 is natural, 0 gives every source the same share."""

    power: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    """The exponent."""


StillMix = Annotated[Literal["natural"] | Power | dict[str, Share], Field(union_mode="left_to_right")]


class Take(_Word):
    """A cap on a source: train on this many of its rows and no others. One of `count` and `fraction` is given."""

    count: Count | None = None
    """How many rows. More than the source has is an error."""
    fraction: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Or which part of them, rounded to the nearest row and at least one."""
    by: Literal["random", "first", "stratified"] = "random"
    """`random`: a keyed choice, the same in every epoch and every run with this seed. `first`: file order. `stratified`: a keyed choice inside
    each value of `column`, in proportion to how often the value occurs."""
    column: str | None = None
    """The column whose values `by: stratified` keeps in proportion."""
    seed: Seed = 0
    """Seed of the random choice."""


class Captions(_Word):
    """What is done to a row's prompt each time it is drawn; all of it follows from (seed, row, epoch), so a resumed run repeats it."""

    trigger: str | None = None
    """Words put before the prompt, with a comma between (`sks dog, ` + prompt); they stay in front of shuffled tags."""
    dropout: Fraction = 0.0
    """How often the prompt is left out, in [0, 1): what classifier-free guidance is trained by."""
    shuffle_tags: bool = False
    """Whether the parts between commas change places."""
    keep_tags: CountOrZero = 0
    """How many of the first parts stay where they are when tags are shuffled."""


class Augment(_Word):
    """What is done to a row's images each time it is drawn; all of it follows from (seed, row, epoch), so a resumed run repeats it."""

    flip: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """How often a row's images are mirrored left to right, all of them together. Leave it out where left and right mean something."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image is kept where its aspect is not its bucket's."""
    variants: Annotated[int, Field(strict=True, ge=1, le=1000)] = 4
    """How many different crops and flips of a row there are; epoch after epoch they take turns. More cost more cache."""


class Prior(_Word):
    """Images that the model itself makes before it is trained, to keep what it can do while it learns something else (prior preservation)."""

    prompts: str | Annotated[list[str], Field(min_length=1)]
    """A text file with a prompt on each line, or a list of prompts. They take turns."""
    count: Count
    """How many images."""
    steps: Count = 28
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] | None = None
    """Classifier-free guidance; 1 is none. Left out, what the family is usually sampled with."""
    resolution: Side | None = None
    """Side of the square images. Left out, the resolution of the first stage that draws the source."""


class Source(_Word):
    """Rows of one kind from one place."""

    prior: Prior | None = None
    """In the place of `path`: images that the model makes itself, once, and which are kept. Give it a share of the mix and a factor in `loss.sources`."""
    path: Annotated[str, Field(max_length=4096)] = ""
    """A folder of images with .txt captions, or with metadata.jsonl or metadata.csv; a .jsonl, .json (a list of objects) or .csv file; one or
    more .parquet or .arrow files or .tar shards of the webdataset layout (`data/*.parquet`, `data-{000..063}.tar`); a folder that `datasets`
    saved (`save_to_disk`); or `hub/USER/DATASET`."""
    task: Task = "text_to_image"
    """What a row asks for. `text_to_image` uses prompt and target; `entity` also regions, each a prompt and a mask; the others use prompt, one or
    more references, and target."""
    columns: dict[Role, str | list[str]] = Field(default_factory=dict)
    """Which column plays which role, where the usual names (target: image, target, output_image; reference: reference, references,
    input_images, source; prompt: prompt, text, caption, instruction; entity_prompts: eligen_entity_prompts; entity_masks:
    eligen_entity_masks) do not say. Several columns of references, or of masks, are given as a list. The columns of .tar shards are the
    members' extensions (usually target: jpg, jpeg, png, webp; prompt: txt, caption) and the fields of a row's .json."""
    prompt: str | None = None
    """The prompt of rows that have none of their own. Without it a row without a prompt is a bad row."""
    split: str = "train"
    """The split of a Hub dataset, or of a folder that `datasets` saved with several."""
    where: str | None = None
    """Which rows are used, as a condition on columns and image size: `width >= 512 and aspect < 2 and style in ["photo", "film"]`. Beside the
    table's own columns it knows width, height, pixels, aspect, references and prompt. Comes before `take`."""
    take: Take | None = None
    """Cap on the number of rows."""
    repeat: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1
    """How often the source counts in a mix by size (`natural`, `power`). 0 leaves it out there. Rows are not copied; shares given as numbers are
    not touched."""
    stream: bool = False
    """Read rows one after another, without looking at all of them first: for .tar shards, .parquet files and Hub datasets too large for that.
    Every image is cropped to the square of the stage's resolution, since its aspect is not known beforehand."""
    rows: Count | None = None
    """How many rows a stream has, where a mix by size needs to know."""
    references: Annotated[int, Field(strict=True, ge=0, le=16)] | None = None
    """How many references each row of a stream has; rows with another number are bad rows. Left out: none for text_to_image, else one."""
    lanes: Annotated[int, Field(strict=True, ge=1, le=1024)] = 8
    """In how many lanes a stream is read; processes share them out, so it is the largest number of processes, and best a
    multiple of it. What is drawn depends on it."""
    captions: Captions = Captions()
    """What is done to prompts."""
    augment: Augment = Augment()
    """What is done to images."""
    on_bad_row: Literal["skip", "stop"] = "skip"
    """What to do with a row that cannot be read: `skip` it, name it and count it, and stop once more than 1 % of the source is bad; or `stop` at the first."""


class Change(_Word):
    """A number that changes in a straight line over the stage."""

    first: Annotated[Count, Field(alias="from")]
    """Of the first step."""
    last: Annotated[Count, Field(alias="to")]
    """Of the last step."""


class MicroTokens(_Word):
    """A micro-batch that holds as many images as come to so many tokens."""

    tokens: Count
    """Tokens that one device computes on at a time: of targets, references and prompts."""


class Batch(_Word):
    """What one optimizer step holds, over all processes. One of `images` and `tokens` is given."""

    images: Count | Change | None = None
    """Images per optimizer step; {from, to} changes it over the stage."""
    tokens: Count | Change | None = None
    """Or tokens per optimizer step, over targets, references and prompts: work and memory stay the same where images differ in size. {from, to}
    changes it over the stage."""
    micro: Count | MicroTokens | None = None
    """What a micro-batch may hold, one forward and backward pass of one process: so many images, or {tokens: N}. The gradient does not depend on it;
    memory does. Left out: at most 4 images, of `images` a divisor; with `tokens` as many tokens as the four largest images have, and at most 16
    images."""


class LearningRate(_Word):
    """The learning rate over a stage. Written as a bare number it is that number, constant after a warm-up of min(100, 5 % of the steps)."""

    peak: Rate
    """The rate after the warm-up."""
    warmup: CountOrZero | None = None
    """Steps of linear warm-up. Left out: min(100, 5 % of the steps)."""
    warmup_from: Rate = 0.0
    """The rate at step 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The way from `peak` to `floor`."""
    floor: Rate | None = None
    """The rate at the last step; left out, 0. Refused with `schedule: constant`."""


class Optimizer(_Word):
    """What makes a step of the gradient. Weights stay float32 with each of them."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """`adamw`: its state in float32 (Loshchilov and Hutter 2019). `adamw8bit`: its two moments in 8 bits, a quarter of the memory, from bitsandbytes
    (Dettmers et al. 2022, arXiv:2110.02861); weights of fewer than 4,096 numbers keep them in 32. `prodigy`: AdamW that finds its step size itself
    (Mishchenko and Defazio 2024, arXiv:2306.06101); `lr` is a factor of it then: write lr: 1, constant or falling by a cosine."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: Rate = 0.0
    """Decoupled weight decay."""
    d0: Positive = 1e-6
    """Of `prodigy`: the step size that it begins with, and never goes below. Where it does not begin to grow, 1e-5 or 1e-4."""
    d_coef: Positive = 1.0
    """Of `prodigy`: factor of its estimate. 0.5 or 2 make its steps smaller or larger, which is better done here than by `lr`."""


class Timesteps(_Word):
    """Which noise levels are trained. t = 1 is noise, t = 0 the image."""

    density: Literal["logit_normal", "uniform", "mode"] | None = None
    """`logit_normal`: t = sigmoid(mean + std z), z normal (Esser et al. 2024). `uniform`: t uniform in (0, 1). `mode`: more at both ends or in the middle,
    by `scale` (the same paper, section 3.1). Left out: logit_normal, and uniform for a model that predicts noise."""
    mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """Mean of the logit; above 0 trains more on noise. Only with `logit_normal`."""
    std: Positive = 1.0
    """Standard deviation of the logit. Only with `logit_normal`."""
    scale: Annotated[float, Field(ge=-1, le=1.7519, allow_inf_nan=False)] = 1.29
    """Of `mode`: above 0 more in the middle, below 0 more at the ends, 0 uniform."""
    shift: Literal["auto", "none"] | Positive = "auto"
    """t becomes s t / (1 + (s - 1) t). `auto`: what the model's family is trained with, mostly by the number of tokens (docs/families.md). `none`: s = 1. Or
    s itself."""
    range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Only noise levels from the first to the second, [low, high]; the density keeps its shape inside. With `expert`, left out, what the expert is for."""
    stratified: bool = False
    """Whether each step spreads its images evenly over the density: the same levels in the long run, with less noise from step to step."""


class Ramped(_Word):
    """Numbers that change in a straight line over the stage."""

    first: Annotated[list[Share], Field(alias="from")]
    """Of the first image."""
    last: Annotated[list[Share], Field(alias="to")]
    """Of the last image."""


class Pyramid(_Word):
    """Train the way from noise to image through levels of resolution, coarse while there is much noise, as Pyramid-Flow does (Jin et al. 2024,
    arXiv:2410.05954). An adapter that was trained so is sampled so: previews are, and the published one says how."""

    levels: Annotated[int, Field(strict=True, ge=1, le=4)] = 3
    """How many; each halves the sides of the one after it. Sides of images become multiples of the model's multiple, doubled for each level but one."""
    shares: list[Share] | Ramped | None = None
    """Shares of the levels among the images, the coarsest first: [1, 2, 1] is Pyramid-Flow's, [1, 1, 1] its first. {from, to} changes them over the stage.
    Left out, all alike but the middle one of three, which has twice the others'."""
    gamma: Annotated[float, Field(gt=0, le=1 / 3, allow_inf_nan=False)] = 1 / 3
    """How the noise that a jump between levels adds hangs together: -gamma between the pixels of a 2 x 2 block."""
    loss: Literal["original", "plain"] = "original"
    """`original`: a level's loss counts by the square of its part of the way, as in Pyramid-Flow. `plain`: all alike."""


class Changed(_Word):
    """Weigh the loss of an edit where target and reference differ, as OmniGen says that it does (arXiv:2409.11340, section 2.3): places of the latents that differ by
    more than `threshold` count 1 / (mean difference) as much, within `limits`; a pair that is all but the same is left out."""

    threshold: Positive = 0.3
    """Difference of a place, mean over channels, above which it counts as changed."""
    limits: tuple[Positive, Positive] = (5.0, 64.0)
    """Least and most weight of a changed place."""
    same: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.001
    """A pair whose mean difference is below this teaches nothing, and has weight 0."""
    different: Positive = 0.8
    """A pair whose mean difference is above this is no edit of a part, and is weighed plainly."""


class Loss(_Word):
    """How the errors of images become one number."""

    weighting: Literal["none", "bell", "min_snr"] = "none"
    """By noise level: `none`; `bell`, most in the middle and nothing at the ends, its mean 1, as DiffSynth trains EliGen; `min_snr`, least of the signal-to-noise
    ratio and `gamma`, for models that predict noise (Hang et al. 2023, arXiv:2303.09556)."""
    gamma: Positive = 5.0
    """Of `min_snr`."""
    per: Literal["image", "token"] = "image"
    """`image`: each image counts alike, whatever its size. `token`: by its tokens, against those of an image of the stage's resolution."""
    sources: dict[Name, Rate] = Field(default_factory=dict)
    """Factor of a source's loss, such as {prior: 0.5}; 1 where it is left out."""
    changed: Changed | None = None
    """Weigh edits by what changes."""


class Dropout(_Word):
    """How often the transformer is shown less than a row holds, so that it learns what guidance at sampling compares with. Which rows follows from
    (seed, stage, image). A family's own empty prompt stands where a prompt was."""

    prompt: Fraction = 0.0
    """How often the prompt is left out, in [0, 1)."""
    references: Fraction = 0.0
    """How often the references are left out, in [0, 1); of the rows without prompt with `nested`. Refused with `joint`."""
    mode: Literal["joint", "nested", "independent"] = "independent"
    """`joint`: the references go whenever the prompt does (OmniGen). `nested`: they go only where the prompt went (OmniGen2). `independent`: each by itself."""


class Handoff(_Word):
    """What a stage takes over from the one before it, and in which form."""

    adapter: Literal["continue", "grow", "shrink", "stack", "merge"] = "continue"
    """`continue`: the same pairs train on. `grow`: each gets a larger `rank`. `stack`: what was learnt is frozen, and a fresh adapter of `rank` is put
    beside it; published, they are one. `merge`: what was learnt is folded into the base, and a fresh adapter of `rank` begins. All of these leave the
    function as it is. `shrink`: the nearest pairs of a smaller `rank`, by SVD, also of a stack; the error is reported. In a first stage, `grow`
    and `shrink` bring what `start` names to `rank`."""
    rank: Rank | None = None
    """The rank after the handoff. Left out: with `grow` twice the old one, with `shrink` half of it, with `stack` and `merge`, and after `start`, the plan's."""
    alpha: Positive | None = None
    """The alpha after the handoff. Left out, it is to `rank` as the adapter's alpha is to its rank."""
    lossy: bool = False
    """Whether `merge` may fold the adapter into weights that the stage stores in bf16, which rounds most of it away."""
    optimizer: Literal["reset", "keep", "keep_v"] = "reset"
    """`reset`: new moments. `keep`: both moments and their step count, where name and shape agree. `keep_v`: the second moment and the count, the first set to zero.
    Kept is what the same optimizer left behind; of `prodigy` its step size too, and all or nothing, for that belongs to all weights together."""
    ema: Literal["keep", "reset"] = "reset"
    """`keep`: the average goes on from where it was (its clock restarts). `reset`: it starts from this stage's first weights. Both need `ema`."""


class Guard(_Word):
    """What is done about steps whose numbers cannot be right. Before the optimizer makes a step all processes agree on whether every image's loss and the gradient are numbers; if one
    is not, the step is skipped: weights, moments, average and learning rate stay as they are, the data goes on, and the rows are named. A spike is a step whose mean loss or whose
    gradient's norm stands far above those of the steps before."""

    skips: Annotated[int, Field(strict=True, ge=0, le=100)] = 10
    """How many of any 100 steps may be skipped before the run stops, at its last checkpoint. 0 stops at the first; with 100 it stops only where no step of the stage was made. What
    fp16 skips while it looks for its loss scale is not counted."""
    on_spike: Literal["say", "skip", "ignore"] = "say"
    """`say`: a warning names the rows with the largest losses, and the step is made. `skip`: it is skipped besides, and counted among `skips`. `ignore`: nothing is looked for."""
    sigmas: Annotated[float, Field(ge=3, le=100, allow_inf_nan=False)] = 6.0
    """How many standard deviations above the median a spike stands, at least, both robust and of the logarithms over the last 256 steps; and twice as far above it as any of these.
    The first 64 steps of a stage are not judged."""


class Level(_Word):
    """One of several resolutions of a stage."""

    pixels: Side
    """Images have about as many pixels as a square of this side."""
    share: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    """Its share of the images; any numbers above 0, which are normalised."""


class Buckets(_Word):
    """To which shapes images are scaled and cropped: the nearest of the common aspects (1:1, 5:4, 4:3, 3:2, 16:9, 2:1 ..., upright too) at the stage's
    resolution, in multiples that the model asks for."""

    max_aspect: Annotated[float, Field(ge=1, le=4, allow_inf_nan=False)] = 2.0
    """The widest and, upside down, the narrowest aspect; more extreme images are cropped to it. 1 crops all images to squares."""
    upscale: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 1.5
    """How much larger than on disk an image's sides may become; smaller images get a smaller shape."""
    references: Annotated[list[Side], Field(min_length=1, max_length=16)] | None = None
    """Resolution of each reference of a row that has one, two, three ... of them; the last also of more. Left out, as OmniGen2: the target's for one
    or two, three quarters of it for three, half of it for more."""


class MixRamp(_Word):
    """A mix that changes in a straight line over the stage."""

    first: Annotated[StillMix, Field(alias="from")]
    """The mix of the first step."""
    last: Annotated[StillMix, Field(alias="to")]
    """The mix of the last step."""


class MixAdaptive(_Word):
    """A mix that follows held-out losses: at each evaluation inside the stage (`evaluate: {every: ...}`) shares are moved, within a band around the plan's own. What is drawn
    stays exact, and a run that is gone on with draws what it would have drawn. Each change is printed, and stands in metrics.jsonl, in the ledger and in the report."""

    adaptive: StillMix
    """The mix that it begins with, and stays near."""
    follows: Literal["progress", "balance"] = "progress"
    """`progress`: what gets better by being drawn gets more, and so does what got worse than it was by more than `tolerance`. `balance`: what is further
    above its loss in `targets`, relative to it, gets more."""
    band: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] = 2.0
    """By which factor a share may become larger or smaller than the plan's. With 2, every source is drawn at least half as often as the plan says."""
    floor: Fraction = 0.02
    """No share falls below it, unless the plan's own is smaller."""
    ceiling: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.95
    """No share rises above it, unless the plan's own is larger."""
    change: Annotated[float, Field(gt=1, le=10, allow_inf_nan=False)] = 1.25
    """By which factor a share may change at one evaluation."""
    lookback: Annotated[int, Field(strict=True, ge=1, le=20)] = 3
    """`progress`: over how many evaluations it is measured; before so many have passed in the stage nothing changes."""
    tolerance: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1
    """`progress`: how far a loss may rise above its lowest, relative to it, before its source gets more."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """`progress`: a source whose rows were drawn more often than this gets no more for a loss that rises, which then is overfitting."""
    targets: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """`balance`: the loss of each source that is in reach, say the one that a run with this source alone comes to."""


class Every(_Word):
    """Of so many blocks, one."""

    every: Annotated[int, Field(strict=True, ge=2, le=1000)]
    """`2` is every second block. More keep more activations and take less time."""


Attention = Literal["auto", "native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn", "flash"]
Compile = Annotated[bool | Literal["aot_eager"], Field(union_mode="left_to_right")]
Checkpointing = Annotated[Literal["auto", "none", "full"] | Every, Field(union_mode="left_to_right")]


class Stage(_Word):
    """One leg of the plan: its own mix, resolution, precision, trainable weights and learning rate."""

    name: Name
    """The stage's name, in folders, logs and the report."""
    steps: Count
    """Optimizer steps."""
    lr: Rate | LearningRate
    """Learning rate: a number, or {peak, warmup, warmup_from, schedule, floor}."""
    batch: Count | Batch
    """Images per optimizer step over all processes: a number, or {images, micro}."""
    resolution: Side | Annotated[list[Level], Field(min_length=1, max_length=16)]
    """How large images are: about as many pixels as a square of this side, in the shape of their bucket. A list of {pixels, share} mixes several
    resolutions, in their own exact shares; held-out rows and previews are then seen at the largest."""
    buckets: Buckets = Buckets()
    """To which shapes images are scaled and cropped."""
    mix: Annotated[StillMix | MixRamp | MixAdaptive, Field(union_mode="left_to_right")] = "natural"
    """Shares of the sources, counted in images: `natural` (by size after `take`), {power: 0.5} (by size to that power), or shares by name
    (any numbers of at least 0; they are normalised). A source that is not named is not drawn. {from, to} changes from one mix to another over the stage, and {adaptive} as held-out losses say."""
    precision: Precision = "bf16"
    """What the stage multiplies in. fp16 uses loss scaling: a step whose gradients leave its range is skipped, which moves neither weights, average nor learning rate on. fp8 is bf16
    but for the products of the blocks' frozen layers on the way forwards, made in fp8; it is for GPUs of compute capability 8.9 and later (Ada, Hopper, Blackwell),
    and elsewhere the run is refused before it loads anything."""
    base: Storage | None = None
    """What the frozen weights are stored in. nf4 and int8 are for the linear layers of the transformer's blocks, in about 4.5 and 8 bits a weight; the rest
    is then stored as if nothing were said. fp8 (e4m3, a scale for each row) goes with `precision: fp8` and with no other. Left out: bf16 for `precision: bf16`, unless `train: full`; else fp32 (fp16 and bf16 do not mix in every model)."""
    checkpointing: Checkpointing = "auto"
    """Which of the transformer's blocks let go of their activations and compute them again for the gradient, which is the same to the bit: memory is saved,
    and time is spent. `none`; `full`, all of them; {every: 2}, every second one; `auto`: all, on a GPU and with more than 2 billion parameters,
    else none."""
    attention: Attention = "auto"
    """Which kernel computes attention, as diffusers names them: `native`, torch's choice; its `_native_flash`, `_native_cudnn`, `_native_efficient` and
    `_native_math`; `flash`, of the package flash-attn. `auto` leaves it as it is, and most often is native. For Flux, Flux 2, Qwen-Image, Wan and Z-Image. Before
    anything is loaded it is tried on the device. Sage and flash 3 have no gradient in diffusers, and what comes from the Hub is code: neither is offered."""
    compile: Compile = False
    """Whether steps run the transformer's blocks as code that torch.compile makes for them at the stage's first step, and again for shapes that come later; it takes
    minutes, and is worth it on a GPU, in stages of many steps. `true`: by inductor, the same within rounding. `aot_eager`: taken apart and put together
    again without making anything faster, to look for faults; the same to the bit. Evaluation and previews run the blocks as they are."""
    offload: bool = False
    """Whether the weights of the linear layers of the transformer's blocks stay in the CPU's memory and come to the device for each product, forwards and again
    backwards, the next layer's while this one's is made: what is learnt is the same, memory is saved, and time is spent. On a CPU it changes nothing.
    Not with `train: full`."""
    train: Literal["adapter", "full"] | list[str] = "adapter"
    """`adapter`: the whole adapter, or all of them. `full`: the transformer's own weights. A list: each entry the name of an adapter, or a pattern: the
    pairs on modules whose full name matches it, of one adapter where its name and a colon stand before (`cond:transformer_blocks\\..*`). What does
    not train stays as it is, and stays active."""
    optimizer: Optimizer = Optimizer()
    """What makes a step of the gradient: AdamW if left out."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; `null` clips nothing."""
    guard: Guard = Guard()
    """What is done about steps whose numbers cannot be right."""
    ema: Fraction | None = None
    """Decay of a float32 moving average of what trains; it is evaluated and published in the place of the raw weights."""
    timesteps: Timesteps = Timesteps()
    """Which noise levels are trained."""
    expert: Literal["high", "low"] | None = None
    """Which of two transformers trains, for a model that has one for much noise and one for little (Wan 2.2). Its timesteps are those that it is for."""
    pyramid: Pyramid | None = None
    """Train through levels of resolution."""
    loss: Loss = Loss()
    """How the errors of images become one number."""
    dropout: Dropout = Dropout()
    """How often prompts and references are left out."""
    handoff: Handoff = Handoff()
    """What is taken over from the stage before."""


class Accuracy(_Word):
    """Sample from the held-out captions of a source and let a classifier judge the samples."""

    source: str
    """The source whose captions are sampled."""
    labelled: str
    """A folder of labelled images (metadata.jsonl with file_name and label) on which the classifier, a support vector machine over pixels, is fitted.
    A sample is right if its predicted label is the label whose words stand in its caption."""
    samples: Count = 200
    """How many samples."""


class MetricModel(_Word):
    """What a metric looks at images with."""

    model: str
    """A Hub id, or a folder as `save_pretrained` writes it, relative to where the command is typed; weights in safetensors. For `clip_score` a CLIP, for `dino_similarity` a DINOv2."""


class Evaluate(_Word):
    """What is measured before the first stage, at the start and the end of every stage, and in between."""

    rows: Annotated[Literal["auto"] | CountOrZero, Field(union_mode="left_to_right")] = "auto"
    """Rows of each source that are held out and never trained on, chosen by a hash of their names; at most a tenth of a source. All of them are measured.
    `auto` holds out up to 64, and measures so many of them that all evaluations together take at most `time`: a multiple of 8, at least 8, chosen once from
    measured times, kept in the run folder and said. All 64 where shares follow what is measured."""
    time: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.03
    """Of `rows: auto`: which part of the time of training evaluations may take. Samples (`accuracy`, `metrics`, previews) are not counted."""
    every: Count | None = None
    """Also every so many steps. Every one is in metrics.jsonl; of a stage that has over 100 of them the losses row by row are kept of every second one, then of every fourth, ..."""
    accuracy: Accuracy | None = None
    """Judge samples with a classifier at the end of every stage that has the last stage's resolution."""
    metrics: Annotated[list[MetricName] | dict[MetricName, MetricModel], Field(union_mode="left_to_right")] = Field(default_factory=list)
    """Judge samples of held-out rows at the end of every stage, and of the untrained model, source by source. `clip_score`: how well a sample fits its caption,
    100 times the cosine of CLIP's two embeddings, 0 where it is negative (Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5). `dino_similarity`: how like a sample is to
    its target, or with task subject to its first reference, the cosine of DINOv2's embeddings (as Ruiz et al. 2023, arXiv:2208.12242). A list of names, or each
    with its {model}; left out, openai/clip-vit-large-patch14 and facebook/dinov2-small. Beside each stand what real images get, and what samples get with another row's caption or image."""
    samples: Count = 16
    """Of `metrics`: how many held-out rows of each source are sampled."""


class Previews(_Word):
    """Samples at fixed seeds, from held-out rows, before any training and at the end of every stage."""

    rows: CountOrZero = 4
    """Rows of each source; 0 makes none."""
    steps: Count = 20
    """Sampling steps, of previews and of the samples that `evaluate.accuracy` judges."""
    guidance: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] | None = None
    """Classifier-free guidance of both; 1 is none. Left out, what the family is usually sampled with (docs/families.md)."""


class Cache(_Word):
    """What is encoded once is kept on disk, by content, for all stages and runs: latents of images and embeddings of prompts. An edited image or caption,
    another VAE or text encoder has another key, so nothing stale is ever used. What was seen of files (sizes, captions) is kept there too."""

    folder: str = "cache"
    """Where, relative to where the command is typed. Several runs, and several launches at once, may share it."""
    limit: Bytes | None = None
    """What latents and embeddings may take together, such as `200GB`; then those go that were not used for longest. Left out: no limit."""
    latents: bool = True
    """Whether latents are kept. A model without a VAE has none."""
    text: bool = True
    """Whether embeddings of prompts are kept."""


class Publish(_Word):
    """Where what was trained goes on the Hub. It is sent in the background and never holds up or ends a run; the token is that of HF_TOKEN or of `hf auth login`,
    and is written nowhere. docs/hub.md says more."""

    repo: Annotated[str, Field(max_length=96)]
    """The repository, user/name; it is made if there is none. Where two runs publish to one, the later one's files stand in it."""
    when: Literal["stage", "end"] = "end"
    """`end`: after the last stage. `stage`: after each stage, a commit each, which then is proved as the last one is and takes as long."""
    private: bool = True
    """How the repository is made. One that is there keeps its visibility."""
    checkpoints: bool = False
    """Whether each checkpoint is sent too, with all that resuming needs, to the branch `checkpoints`, in the place of the one before. The same command with an
    empty run folder then goes on from there, on whatever machine."""


class Tracker(_Word):
    """A tracker, with more than its name. One curve goes on over all stages and restarts of a run."""

    name: TrackerName
    """Which one."""
    project: Name | None = None
    """Under which name runs stand together there. Left out: the plan's name. TensorBoard has folders instead."""
    online: bool = False
    """`wandb`: whether everything is sent to its server as it comes, under the login of `wandb login`. Nothing is sent otherwise."""


class Plan(_Word):
    """A plan: one model, its sources, and the stages that it goes through."""

    name: Name = "plan"
    """The run's name and that of its folder, runs/NAME. Left out: the plan file's name."""
    seed: Seed = 0
    """Everything random is derived from it."""
    model: str | Model
    """The model: a Hub id or folder, or {repo, revision, guidance}."""
    adapter: Adapter = Adapter()
    """The LoRA."""
    adapters: Annotated[dict[Name, Adapter], Field(max_length=16)] = Field(default_factory=dict)
    """In its place several, by name (without a dot), all active at once; a stage's `train` says which learn. They are published as one, and each alone."""
    sources: Annotated[dict[Name, Source], Field(min_length=1, max_length=500)]
    """The sources by name; at most 500."""
    stages: Annotated[list[Stage], Field(min_length=1, max_length=200)]
    """The stages, in order; at most 200."""
    start: str | None = None
    """Begin from another run's folder (its last finished stage), one of its stages' folders, a published adapter, or one on the Hub (`hub:user/name`,
    `hub:user/name@revision`), in the place of a new adapter."""
    evaluate: Evaluate = Evaluate()
    """Held-out evaluation."""
    previews: Previews = Previews()
    """Preview samples."""
    cache: Cache | Literal["none"] = Cache()
    """What is encoded once and kept; `none` keeps nothing."""
    save_every: Count = 500
    """Steps between checkpoints inside a stage. The end of a stage is always saved."""
    keep: Count = 1
    """How many checkpoints inside a stage are kept; the end of a stage is always kept."""
    log_every: Count = 10
    """Steps between lines in metrics.jsonl and on the console. A file of 64 MiB is closed as metrics-000001.jsonl, and another is begun; so is trace.jsonl."""
    dry_step: bool | None = None
    """Whether, before anything trains, every stage makes a step of its largest micro-batch on made-up images and throws it away, so that what does not fit into
    memory is known in the first minutes. Left out: on a GPU."""
    workers: Annotated[int, Field(strict=True, ge=0, le=64)] = 2
    """Processes that read and decode images, for each training process. What is drawn does not depend on it."""
    publish: Publish | None = None
    """Where what was trained goes on the Hub; left out, nowhere."""
    track: Annotated[Literal["none"] | TrackerName | Tracker | Annotated[list[TrackerName | Tracker], Field(min_length=1, max_length=3)], Field(union_mode="left_to_right")] = "trackio"
    """Where curves, tables and previews go, on this machine: `trackio` (a SQLite file, `trackio show`), `tensorboard` (in the run folder), `wandb` (in the run folder,
    `wandb sync` sends it), or several in a list; `none` for nowhere. metrics.jsonl and report.html have them in any case."""

    def _repr_html_(self) -> str:
        """What a notebook shows: its sources and stages as tables."""
        from stages.as_html import to_html
        from stages.plan_tables import plan_tables

        return to_html(plan_tables(self))


Stage.model_rebuild()
Plan.model_rebuild()
