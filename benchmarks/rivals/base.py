"""`Rival`: plain LoRA training, and what a method may change about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_ogpsa.estimator import furthest_behind
from lora_ogpsa.reference import Objective

RANK = 16


@dataclass
class Training:
    """What a method sees of the stage it trains in.

    Attributes:
        model: the PEFT model.
        optimizer: of the stage.
        parameters: the trainable ones.
        objectives: the prepared references, held to the base model's own answers.
        loss: the stage's mean loss of a batch.
        cast: the precision of forward passes.
        steps: optimizer steps in the stage.
        passes: reference examples a method may differentiate per step.
        seed: of the order in which reference examples are drawn.
        preferences: whether the stage's loss ranks answers.
        likelihood: whether it has the answers' likelihood beside that.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    objectives: list[Objective]
    loss: Callable[[Any], Tensor]
    cast: Callable[[], AbstractContextManager[Any]]
    steps: int
    passes: float
    seed: int
    preferences: bool
    likelihood: bool

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parameters[0].device

    def now(self) -> float:
        """Seconds on the clock that costs are measured with."""
        return seconds_on(self.device)


def seconds_on(device: torch.device) -> float:
    """A clock for differences.

    On a CPU it counts the process's own time, which other work on the machine does not touch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Rival:
    """Plain LoRA; subclasses change what is adapted, the gradient, or what surrounds a step.

    Args:
        learning_rate: factor on the stage's learning rate.
        rank: of the adapter.
        target_modules: what is adapted.
    """

    #: Which references are wanted: none, the ones all methods share, or the data sets' own answers.
    references: str | None = None
    #: Whether the base weights must be there in full precision.
    full_precision = False

    def __init__(
        self, learning_rate: float = 1.0, rank: int = RANK, target_modules: Any = "all-linear"
    ) -> None:
        self.learning_rate = learning_rate
        self.rank = rank
        self.target_modules = target_modules
        self.passes = 0
        #: Seconds spent on what plain training does not do; those before training among them.
        self.extra_seconds = 0.0
        self.setup_seconds = 0.0

    def see(self, rows: Sequence[Any]) -> None:
        """Look at the first stage's rows, before the adapter is put on."""

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Put the adapter on the base model.

        Args:
            model: the bare base model.
            objectives: the prepared references.
            budget: reference passes that the whole run may take.
        """
        return get_peft_model(model, self._lora())

    def begin(self, training: Training) -> None:
        """Prepare for a stage, before its first step."""

    def backward(self, training: Training, step: int, batch: Any) -> float:
        """Fill the gradients for one step.

        Returns:
            The stage's loss.
        """
        with training.cast():
            loss = training.loss(batch)
        loss.backward()
        return float(loss.detach())

    def end(self, training: Training) -> None:
        """Clean up after a stage."""

    def logs(self) -> dict[str, float]:
        """What the method did since the last call, for progress lines."""
        return {}

    def measured(self, model: nn.Module) -> nn.Module:
        """The model to evaluate: without its adapter it must be the base model."""
        return model

    def _lora(self, **settings: Any) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            task_type="CAUSAL_LM",
            **{"lora_alpha": 2 * self.rank, "target_modules": self.target_modules, **settings},
        )

    @contextmanager
    def extra_time(self, training: Training) -> Iterator[None]:
        """Count the time within the context as spent on what plain training does not do."""
        began = training.now()
        yield
        self.extra_seconds += training.now() - began

    @contextmanager
    def setup_time(self, device: torch.device) -> Iterator[None]:
        """The same, before training has begun."""
        began = seconds_on(device)
        yield
        seconds = seconds_on(device) - began
        self.setup_seconds += seconds
        self.extra_seconds += seconds


class ReferenceStream:
    """Reference examples for methods that take a few with every step: references in turn.

    Turns follow the references' shares, as OGPSA's do.

    Args:
        objectives: the prepared references.
        passes: examples per step; a fraction skips steps evenly.
        seed: of the order.
    """

    def __init__(self, objectives: Sequence[Objective], passes: float, seed: int) -> None:
        self.objectives = list(objectives)
        self.passes = passes
        self._seed = seed
        self._drawn = [0] * len(self.objectives)

    def take(self, step: int) -> tuple[Objective, list[int]] | None:
        """The reference whose turn it is, and its next examples; ``None`` if none are due."""
        # Rounded up, so that the first step takes one.
        due = math.ceil((step + 1) * self.passes) - math.ceil(step * self.passes)
        if due == 0:
            return None
        shares = [objective.reference.share for objective in self.objectives]
        index = furthest_behind(self._drawn, shares, sum(self._drawn) + due)
        return self.objectives[index], [self._next(index) for _ in range(due)]

    def split(self, total: int) -> list[tuple[Objective, list[int]]]:
        """`total` examples at once, as evenly as possible over the references."""
        count = len(self.objectives)
        shares = [total // count + (i < total % count) for i in range(count)]
        return [
            (self.objectives[i], [self._next(i) for _ in range(share)])
            for i, share in enumerate(shares)
        ]

    def _next(self, index: int) -> int:
        epoch, at = divmod(self._drawn[index], len(self.objectives[index]))
        self._drawn[index] += 1
        generator = torch.Generator().manual_seed((self._seed * 1009 + index) * 1_000_003 + epoch)
        return int(torch.randperm(len(self.objectives[index]), generator=generator)[at])


def with_loss(objectives: Sequence[Objective], loss: str, model: nn.Module) -> list[Objective]:
    """The same examples under another loss."""
    return [
        Objective(replace(o.reference, loss=loss), o.sequences, model)  # type: ignore[arg-type]
        for o in objectives
    ]


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output layer: what PEFT means by ``"all-linear"``."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


class StreamedRival(Rival):
    """A rival that uses the loss of reference examples, taken in turn with the training batches.

    Args:
        loss: of the references, ``"distill"`` or ``"kl"``.
        adapter: arguments of `Rival`; its own adapter if not given.
        references: a name of `Source.references`.
    """

    def __init__(
        self,
        loss: str,
        adapter: Mapping[str, Any] | None = None,
        references: str = "shared",
    ) -> None:
        super().__init__(**(adapter or {}))
        self.loss = loss
        self.references = references

    def begin(self, training: Training) -> None:
        """Start the stream of reference examples."""
        objectives = with_loss(training.objectives, self.loss, training.model)
        self._stream = ReferenceStream(objectives, training.passes, training.seed)

    def backward(self, training: Training, step: int, batch: Any) -> float:
        """The safety gradient, and where a reference is due what the rival makes of both."""
        value = super().backward(training, step, batch)
        with self.extra_time(training):
            due = self._stream.take(step)
            if due is not None:
                objective, examples = due
                with training.cast():
                    losses, _ = objective.losses(training.model, examples)
                self.use(training, losses.mean())
                self.passes += len(examples)
        return value

    def use(self, training: Training, loss: Tensor) -> None:
        """Change the safety gradient in `.grad` by a reference loss with its graph."""
        raise NotImplementedError
