"""Foreseen failures as one line on standard error, with an exit code of their own."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from lora_ogpsa.errors import OGPSAError

FAILED, INTERRUPTED = 2, 130


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn foreseen failures into one line on standard error; others keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OGPSAError as error:
            fail(str(error))
        except KeyboardInterrupt as error:
            typer.echo(str(error) or "interrupted. Nothing was saved.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            reason = _foreseen(error)
            if reason is None:
                raise
            fail(reason)

    return wrapped


def fail(message: str) -> NoReturn:
    """Print an error and exit."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(FAILED) from None


def _foreseen(error: BaseException) -> str | None:
    """What went wrong, if it is the machine's limits; libraries wrap these in errors of theirs."""
    for cause in _chain(error):
        text = str(cause)
        full = getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in text
        # torch.save hides the cause and complains about its own file positions.
        if full or "inline_container.cc" in text:
            return (
                f"the disk is full ({getattr(cause, 'filename', None) or 'while writing results'})."
                " What was finished before is intact. Free some space or choose another folder, "
                "and repeat the command; `run` and `compare` with --resume."
            )
        if type(cause).__name__ == "OutOfMemoryError":
            return (
                "out of memory. Lower `per_device_train_batch_size` or `max_length`, set "
                "`gradient_checkpointing: true`, or load the model with `load_in_4bit: true`."
            )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"  # a path of the user's that cannot be used
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
