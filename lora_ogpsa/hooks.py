"""Hooks on a model: `OwnHook`, which copies do not have, and what compiled code knows of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class OwnHook:
    """A hook that does nothing in a copy of the model, made with ``copy`` or ``pickle``.

    No optimizer of ours steps the copy: it would be watched and its gradients weighed, and the
    projector with optimizer and references would be copied along.

    Args:
        function: what the hook does on the model itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do it."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnHook, (do_nothing,)


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in a copy."""


def forget_compiled() -> None:
    """Have compiled code made anew, to be called where hooks were added or removed.

    What `torch.compile` has made holds the hooks of the time when it was made, and does not look
    for others.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the context, compiled code is not used, nor made.

    Code is compiled for one mode of a model, and after a few others, which reference passes would
    be, no more is made for training either.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
