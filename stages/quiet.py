"""Keep the libraries beneath from printing what no user of Medley can act on, and from sending anything anywhere."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """To be called before they are imported. What a user has set in the environment stands."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
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
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
