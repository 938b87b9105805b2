"""One progress display for a whole evaluation; silent where nobody would see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Not when first needed: rich draws from Python's random generator as it is imported, and an
# evaluation must leave that as it was.
from rich import progress
from rich.console import Console


class Advance(Protocol):
    """Called with the number of items that were just finished."""

    def __call__(self, done: int = 1) -> None:
        """Report `done` more items."""


class Progress:
    """Progress bars of the steps of an evaluation.

    Args:
        enabled: draw bars, if standard error is a terminal.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @contextmanager
    def step(self, label: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        """A bar for one step.

        Args:
            label: what is being done.
            total: number of items.
            done: how many are there already, from an earlier run.
        """
        console = Console(stderr=True)
        if not (self.enabled and console.is_terminal and done < total):
            yield lambda done=1: None
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(label, total=total, completed=done)
            yield lambda done=1: bars.advance(task, done)
