"""Windows: at which noise levels each level of a pyramid of resolutions begins and ends, and how they are told to whoever samples. Imports no torch.

Level 0 is the coarsest. A level takes the latents from its start, the noisier end, to its end; the end of one level, enlarged and with some noise
added (the jump), has the law of the next one's start. Source: Jin et al. 2024, arXiv:2410.05954, in noise levels: 1 is noise, 0 is data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

METADATA_KEY = "medley.pyramid"
"""Of a safetensors header, whose values are strings: what `write` gives."""

MOST_LEVELS = 4
"""Beyond, an image's sides would be multiples of 256 pixels, and no level's count would be sure to stay within one of its share."""


@dataclass(frozen=True)
class Windows:
    """The noise levels of a pyramid. Raises ValueError if a value is out of its range."""

    levels: int
    """1 to 4; 1 is the straight flow."""
    gamma: float = 1 / 3
    """Two pixels of a 2 x 2 block share minus this much of the noise that a jump adds; in (0, 1/3]. At 1/3 a jump leaves the blocks' means alone."""
    shift: float = 1.0
    """s in o -> s o / (1 + (s - 1) o), which moves the borders between levels as Pyramid-Flow's scheduler does; what lies inside a level stays even.

    Pyramid-Flow trains and samples with 1. Its borders come from a grid of 1000 points (0.667 for 2/3); these are exact.
    """

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MOST_LEVELS:
            raise ValueError(f"levels: {self.levels} is not a whole number from 1 to {MOST_LEVELS}")
        if not 0 < self.gamma <= 1 / 3:
            raise ValueError(f"gamma: {self.gamma} is not above 0 and at most 1/3 (beyond 1/3 there is no such noise); leave it out for 1/3")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: {self.shift} is not a positive number; leave it out for 1")

    def _border(self, level: int) -> float:
        even = 1 - level / self.levels
        return self.shift * even / (1 + (self.shift - 1) * even)

    def start(self, level: int) -> float:
        """s_k, the noise level at which a level begins: 1 at the coarsest, else r o / ((1 - o) + r o), with o = e_{k-1} and r = sqrt(1 + 1 / gamma)."""
        return 1.0 if level == 0 else math.sqrt(1 + 1 / self.gamma) * self.jump(level)[0] * self.end(level - 1)

    def end(self, level: int) -> float:
        """e_k, the noise level at which a level ends: 0 at the finest."""
        return self._border(level + 1)

    def width(self, level: int) -> float:
        """s_k - e_k, above 0."""
        return self.start(level) - self.end(level)

    def jump(self, level: int) -> tuple[float, float]:
        """alpha_k and beta_k of the jump into a level of at least 1: x -> alpha_k x enlarged + beta_k x noise."""
        assert 0 < level < self.levels
        before = self.end(level - 1)
        alpha = 1 / ((1 - before) + math.sqrt(1 + 1 / self.gamma) * before)
        return alpha, alpha * before / math.sqrt(self.gamma)

    def scale(self, level: int) -> float:
        """How many pixels of the full size a pixel of this level spans, in each direction."""
        return 2.0 ** (self.levels - 1 - level)

    def sigmas(self, level: int, steps: int, shift: float = 1.0) -> list[float]:
        """The steps + 1 noise levels from start to end at which a level is sampled: even, or with the level's own course shifted as a straight flow's."""
        if steps < 1:
            raise ValueError(f"level {level}: {steps} steps; each level needs at least 1")
        way = [1 - step / steps for step in range(steps + 1)]
        way = [shift * r / (1 + (shift - 1) * r) for r in way]
        return [self.end(level) + r * self.width(level) for r in way]


def check_size(height: int, width: int, levels: int, multiple: int) -> None:
    """Raise ValueError, naming sizes that would do, unless every level is whole patches: both sides multiples of 2^(levels - 1) x multiple.

    height, width: in pixels or latents. multiple: what a side must be a multiple of at one level, in the same unit.
    """
    step = 2 ** (levels - 1) * multiple
    if height % step == 0 and width % step == 0 and min(height, width) > 0:
        return
    near = [sorted({max(step, side // step * step), max(step, -(-side // step) * step)}) for side in (height, width)]
    fitting = " or ".join(f"{one} x {other}" for one in near[0] for other in near[1])
    raise ValueError(f"{height} x {width} cannot be halved {levels - 1} times into patches of {multiple}: both sides must be multiples of {step}, such as {fitting}")


def write(windows: Windows) -> str:
    """Windows as JSON, to stand under METADATA_KEY in an adapter's header: an adapter of a pyramid is of no use without them."""
    return json.dumps({"levels": windows.levels, "gamma": windows.gamma, "shift": windows.shift}, sort_keys=True)


def read(text: str) -> Windows:
    """The windows that `write` wrote. Raises ValueError if the text says anything else."""
    try:
        said = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{METADATA_KEY}: not JSON: {error}") from None
    fields = {"levels", "gamma", "shift"}
    if not isinstance(said, dict) or not {"levels", "gamma"} <= said.keys() <= fields:
        raise ValueError(f"{METADATA_KEY}: {text} is not an object with levels, gamma and, if need be, shift")
    if type(said["levels"]) is not int or any(type(said.get(name, 1.0)) not in (int, float) for name in ("gamma", "shift")):
        raise ValueError(f"{METADATA_KEY}: {text}: levels must be a whole number, gamma and shift numbers")
    try:
        return Windows(said["levels"], float(said["gamma"]), float(said.get("shift", 1.0)))
    except ValueError as error:
        raise ValueError(f"{METADATA_KEY}: {error}") from None


def of_file(path: Path) -> Windows | None:
    """The windows in a safetensors file's header, None if it has none. Raises ValueError if they cannot be read."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        return None
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
