"""Keep the libraries beneath from printing what no user of Medley can act on, and from sending anything anywhere."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Literal

from stages.heard import Heard


def listen_to_libraries() -> Heard:
    """Catch what they remark, so that each text is shown once. To be called before they are imported; what comes back is to be closed."""
    heard = Heard(int(os.environ.get("RANK", "0")))
    quiet_libraries("warning")
    heard.take_over()
    return heard


def quiet_libraries(verbosity: Literal["error", "warning"] = "error") -> None:
    """To be called before they are imported. What a user has set in the environment stands. verbosity: what they log."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": verbosity,
        "DIFFUSERS_VERBOSITY": verbosity,
        "DATASETS_VERBOSITY": verbosity,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # it writes to the terminal past Python, on every process
        "WANDB_ERROR_REPORTING": "false",  # it would tell its makers of errors
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",  # data workers are forked
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # diffusers 0.42.1 normalises in its weights' dtype: a bf16 input to float32 weights is what autocast means.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # No transformer of diffusers writes into what a block gives: all ten families learn sharded what they learn whole (tests/test_fsdp.py).
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # diffusers 0.42.1 still asks huggingface_hub 2.4 for what it has given up.
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    # Whether a file is read Medley says itself, by the file's name; Pillow 12.3 remarks upon damaged EXIF and large sizes without one.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
