"""No noise of the libraries underneath; imports none of them before it has silenced them."""

from __future__ import annotations

import logging
import os
import warnings

# Their log lines below an error are not for a user of this command.
_NOISY = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "torch")


def quiet_libraries() -> None:
    """Silence log lines, warnings and bars of the libraries underneath; errors stay errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_NOISY)})(\.|$)")
    warnings.filterwarnings("ignore", message=".*will be removed in v.*", category=FutureWarning)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)

    import datasets
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
