"""What a run shows while it works: headings and a training bar."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_ogpsa.errors import OGPSAError

# Results go to standard output, everything about their making to standard error.
# A file or a pipe has no width to keep to.
out = Console(width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True)


def say(text: str) -> None:
    """Tell the user what is being done."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


class TrainingError(OGPSAError, RuntimeError):
    """Training diverged."""


class StepDisplay(TrainerCallback):
    """A progress bar of the optimizer steps; a line per log where there is no terminal.

    Args:
        title: what is trained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        #: When the first optimizer step began, in `time.monotonic` seconds.
        self.began: float | None = None
        self._bar: Progress | None = None
        self._task: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar; not earlier, because preparing the references draws its own."""
        if self.began is not None:
            return
        self.began = time.monotonic()
        if err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=err, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, numbers=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss, and by how many nats per token the worst reference exceeds the base."""
        if not logs or "loss" not in logs:
            return
        numbers = f"loss {float(logs['loss']):.3f}"
        excess = [float(v) for k, v in logs.items() if k.startswith("ogpsa/excess/")]
        if excess:
            numbers += f", references {max(excess):+.3f}"
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
        elif self.began is not None:
            seconds = time.monotonic() - self.began
            err.print(
                f"  step {state.global_step}/{state.max_steps}: {numbers} ({seconds:.0f} s)",
                highlight=False,
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StopAtNonFinite(TrainerCallback):
    """Stops a run whose loss or gradient is no longer a number.

    The weights are lost from the step on at which it happens; training on only hides it. Under fp16
    gradients overflow at times, and the step is skipped: there the loss alone tells.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at what is logged.

        Raises:
            TrainingError: the loss or the gradient norm is not finite.
        """
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise TrainingError(
                    f"training diverged: {name} is {float(value)} at step {state.global_step} "
                    f"(learning rate {args.learning_rate:g}). Lower `learning_rate`, or look for "
                    "broken rows in the training data."
                )
