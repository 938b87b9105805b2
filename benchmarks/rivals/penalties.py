"""Rivals that add a weighted reference loss to the safety loss: replay and a KL penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_ogpsa.emphasis import FirstTokenEmphasis
from rivals.base import StreamedRival, Training


class PenaltyRival(StreamedRival):
    r"""Safety loss + :math:`\lambda` × reference loss, on reference examples taken in turn.

    With ``loss="distill"`` this is experience replay (Rolnick et al. 2019, arXiv 1811.11682, on the
    base model's own answers; "general data mixed in" in the OGPSA paper): the negative
    log-likelihood of reference answers is mixed into the batch. With ``loss="kl"`` it is the KL
    penalty towards the base model that RLHF trains with (Ziegler et al. 2019, arXiv 1909.08593,
    eq. 2), in the direction of learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282,
    eq. 2: the old model's outputs are the target).

    Both are on the same examples with the same weight on first tokens as OGPSA's references.

    Args:
        weight: :math:`\lambda`.
        loss: ``"distill"`` or ``"kl"``.
        first_token_weight: as in `OGPSAConfig`, so that a rule which has it is not compared with
            rivals that go without.
        adapter: as in `StreamedRival`.
        references: as in `StreamedRival`.
    """

    def __init__(
        self,
        weight: float,
        loss: str,
        first_token_weight: float = 0.0,
        adapter: Mapping[str, Any] | None = None,
        references: str = "shared",
    ) -> None:
        super().__init__(loss, adapter, references)
        self.weight = weight
        self.first_token_weight = first_token_weight

    def begin(self, training: Training) -> None:
        """Start the references, and weigh first tokens from here on."""
        super().begin(training)
        self._emphasis = (
            FirstTokenEmphasis(training.model, self.first_token_weight)
            if self.first_token_weight
            else None
        )

    def end(self, training: Training) -> None:
        """Leave the model as it was found."""
        if self._emphasis is not None:
            self._emphasis.remove()

    def use(self, training: Training, loss: Tensor) -> None:
        """Add the penalty's gradient."""
        (self.weight * loss).backward()
