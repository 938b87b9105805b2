"""The errors this library raises on purpose.

Every message says what was found, why it cannot work and what to do. The command line prints
such a message as one line; any other exception is a defect of ours and keeps its traceback.
"""

import textwrap


class OGPSAError(Exception):
    """Base of all errors raised by lora_ogpsa."""


class ConfigError(OGPSAError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class DataError(OGPSAError, ValueError):
    """A data set is missing, empty, or its rows lack the expected fields."""


class ModelError(OGPSAError, ValueError):
    """A model, tokenizer or adapter cannot be loaded or is of a kind that cannot be used."""


class AdapterError(OGPSAError, ValueError):
    """The model has no trainable LoRA adapter, or its adapter changed during the run."""


class CaptureError(OGPSAError, RuntimeError):
    """Per-example gradients cannot be told apart in one backward pass for some module.

    Args:
        message: the text.
        module: its full name.
    """

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


class ReentrantCheckpointError(OGPSAError, RuntimeError):
    """A backward met reentrant checkpointing where only the non-reentrant kind can pass."""


class ReferenceLossError(OGPSAError, RuntimeError):
    """A reference objective gave a loss or a gradient that is not finite."""


class ProjectionError(OGPSAError, RuntimeError):
    """The projection cannot be applied; training stops rather than going on unprotected."""


class StateError(OGPSAError, ValueError):
    """A saved state is missing, unreadable, or belongs to another run."""


class ExportError(OGPSAError, RuntimeError):
    """A merge or an export failed or did not reproduce the trained model."""


def one_line(error: BaseException) -> str:
    """An error's text on one line of bounded length, to be quoted in a message of ours."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
