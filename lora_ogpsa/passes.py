"""`ReferencePass`: one micro-batch of a reference objective, forward and backward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ogpsa.adapters import AdapterSpace, Slab
from lora_ogpsa.capture import capture_examples, gradients, quiet
from lora_ogpsa.errors import CaptureError, ReentrantCheckpointError, ReferenceLossError
from lora_ogpsa.reference import Objective
from lora_ogpsa.sharding import whole

# The trainer's GradScaler does not see reference losses; under float16 autocast their gradients
# would underflow without a scale of their own.
_HALF_SCALE = 2.0**12


# Tokens up to which a pass keeps its activations where training would compute them twice, and the
# share of the training pass's tokens that is as good: about 9 MB a token at 8B, when those of the
# training pass, 1.6 MB a token with what it does compute twice, are free.
_SHORT = 128
_SHARE = 1 / 8


@dataclass
class Autocast:
    """The autocast state of the training forward, to be repeated in reference passes."""

    enabled: bool = False
    dtype: torch.dtype = torch.float32


class _PassedByError(Exception):
    """The backward led past these parameters' modules, whose weights something else may read."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names


class ReferencePass:
    """Differentiates reference examples without a trace on training.

    Args:
        model: the PEFT model.
        space: its adapter space.
        slabs: the pieces that per-example rows are asked for.
    """

    def __init__(self, model: nn.Module, space: AdapterSpace, slabs: Sequence[Slab]) -> None:
        self.model = model
        self.space = space
        self.autocast = Autocast()
        #: Tokens, padding included, of the training pass before.
        self.training_tokens = 0
        self._capturable = {
            name for block in space.blocks if block.capturable for name in block.parameters
        }
        self._places: list[tuple[str, int, int, int, int]] = []
        for name, (start, end) in space.spans().items():
            for index, slab in enumerate(slabs):
                place = slab.locate(start)
                if place is not None:
                    piece, column = place
                    self._places.append((name, index, piece, column, column + end - start))
        self._slabs = list(slabs)
        # Sharded parameters are not on the graph: FSDP2 gathers plain tensors for a forward.
        self._stash = space.sharded

    def run(
        self,
        objective: Objective,
        examples: Sequence[int],
        total: Tensor,
        rows: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the sum of the examples' gradients to `total`, and each one's to `rows`.

        Args:
            objective: the reference.
            examples: B indices into it.
            total: [d], float32.
            rows: per slab, zeroed [count, B, w], or ``None`` if only the sum is wanted. A tensor
                whose gradient cannot be told apart by example (a DoRA magnitude, an embedding, a
                convolution) gets the micro-batch's mean in each of its B rows, which is its one
                row at the weight of B.

        Returns:
            Losses [B] and excess over the base model [B], detached.

        Raises:
            ReferenceLossError: a loss or gradient is not finite; `total` is as it was.
        """
        while True:
            try:
                return self._attempt(objective, examples, total, rows)
            except CaptureError as error:
                lost = self._like(error.module)
                if not lost:
                    raise
                # The layer does not see the examples one by one (it flattens tokens): from here
                # on its tensors, and those of its like, give one row per micro-batch.
                self._capturable -= lost
            except _PassedByError as error:
                self._capturable -= error.names
            except ReentrantCheckpointError:
                self._stash = True
            for row in rows or ():
                row.zero_()

    def _like(self, module: str) -> set[str]:
        """The parameters of the layer that `module` is a part of, and of the same in all depths."""

        def kind(name: str) -> str:
            return re.sub(r"\d+", "#", name.partition(".lora_")[0])

        return {name for name in self._capturable if kind(name) == kind(module)}

    def _attempt(
        self,
        objective: Objective,
        examples: Sequence[int],
        total: Tensor,
        rows: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        targets = {}
        if rows is not None:
            targets = {
                name: rows[slab][piece, :, start:end]
                for name, slab, piece, start, end in self._places
                if name in self._capturable
            }
        plain = {
            name: parameter
            for name, parameter in zip(
                self.space.parameter_names, self.space.parameters, strict=True
            )
            if name not in targets
        }
        scale = _HALF_SCALE if self.autocast.dtype == torch.float16 else 1.0
        leaves = [p for p in self.model.parameters() if p.requires_grad] if self._stash else None
        recomputed = objective.tokens(examples) > max(_SHORT, _SHARE * self.training_tokens)
        with quiet(self.model, checkpointing=recomputed), self._cast(), torch.enable_grad():
            capture = (
                capture_examples(self.model, self.space, targets, fold=objective.fold)
                if targets
                else nullcontext()
            )
            with capture as captured:
                losses, excess = objective.losses(self.model, examples)
                inputs = [*plain.values()] + ([captured.anchor] if captured is not None else [])
                found = gradients(losses.sum() * scale, inputs, stash=leaves)
            found = [g if g is None else whole(g) for g in found]
        reached = sum(g is not None for g in found) + len(captured.reached if captured else ())
        if not self._stash and not reached:
            # Behind reentrant checkpoints nothing is on the graph that leads from the loss.
            raise ReentrantCheckpointError("No LoRA parameter is reached by a reference loss.")
        if captured is not None:
            passed_by = {n for n in targets if n.rpartition(".")[0] not in captured.reached}
            if passed_by:
                raise _PassedByError(passed_by)
        summed = self._collect(dict(zip(plain, found, strict=False)), rows, len(examples), total)
        summed /= scale
        for row in rows or ():
            row /= scale
        losses = losses.detach()
        if not bool(torch.isfinite(losses.sum()) & torch.isfinite(summed.sum())):
            raise ReferenceLossError(
                f"Reference `{objective.name}` gave a loss or gradient that is not finite (losses "
                f"{[round(v, 4) for v in losses.tolist()]}). Look at its data, or at a run that "
                "has diverged (lower the learning rate). The step was not taken."
            )
        total += summed
        return losses, excess

    def _cast(self) -> torch.autocast:
        return torch.autocast(
            self.space.device.type,
            dtype=self.autocast.dtype if self.autocast.enabled else None,
            enabled=self.autocast.enabled,
            cache_enabled=False,
        )

    def _collect(
        self,
        plain: dict[str, Tensor | None],
        rows: Sequence[Tensor] | None,
        n: int,
        like: Tensor,
    ) -> Tensor:
        """The summed gradient [d]; fills the rows of tensors that were not captured."""
        summed = torch.zeros_like(like)
        if rows is None:
            views = dict(zip(self.space.parameter_names, self.space.views(summed), strict=True))
            reached = [(views[name], grad) for name, grad in plain.items() if grad is not None]
            torch._foreach_copy_([view for view, _ in reached], [grad for _, grad in reached])
            return summed
        for name, slab, piece, start, end in self._places:
            grad = plain.get(name)
            if grad is not None:
                rows[slab][piece, :, start:end] = grad.flatten().float() / n
        for target, held in zip(self._slabs, rows, strict=True):
            target.view(summed).copy_(held.sum(1))
        return summed
