"""`OwnHook`: a hook on a model that its copies do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
