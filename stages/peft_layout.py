"""An adapter as peft itself keeps it, for pipelines of diffusers that have no `load_lora_weights`: `PeftModel.from_pretrained(pipe.transformer, FOLDER)`.

The transformer is changed in place, so the pipeline around it has the adapter from then on. peft 0.21.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from stages.adapter import exactly
from stages.header import sort_header
from stages.pairs import layers_of, ranks_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def write_peft_adapter(folder: Path, weights: Mapping[str, Tensor], *, rank: int, target_modules: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Write both files of an adapter whose scale is in its B already, so that alpha is the rank: equal adapters become equal bytes.

    weights: of one adapter, as `stages.adapter.adapter_weights` names them; magnitudes of DoRA too. rank: of the layers, but for those that have another.
    target_modules: full names of the layers that have a pair. metadata: strings of the weights' header. The folder is made if it is not there.
    Raises ValueError if the layers are not those of the weights.
    """
    if sorted(target_modules) != layers_of(weights):
        other = sorted(set(target_modules) ^ set(layers_of(weights)))
        raise ValueError(f"{folder}: target_modules has {len(target_modules)} layers and the weights have pairs of {len(layers_of(weights))}; they differ in {other[:3]}")
    # A pattern is matched against a name's end unless it begins with ^ (peft 0.21).
    ranks = {f"^{re.escape(layer)}": own for layer, own in ranks_of(weights).items() if own != rank}
    config = {
        "alpha_pattern": ranks,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": exactly(sorted(target_modules)),
        "task_type": None,
        "use_dora": any(name.endswith(".lora_magnitude_vector") for name in weights),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    named = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata})
    sort_header(folder / WEIGHTS_FILE)
