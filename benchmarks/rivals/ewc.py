"""Elastic weight consolidation in adapter space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rivals.base import ReferenceStream, Rival, Training, with_loss


class EwcRival(Rival):
    r"""A quadratic penalty by the diagonal Fisher matrix.

    Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3:

    .. math:: L(\theta) = L_{safety}(\theta)
        + \frac\lambda 2 \sum_i F_i (\theta_i - \theta^*_i)^2

    F is the mean of squared per-example gradients of the base model's own answers, θ* the adapter
    at its start, which is the base model. While B = 0 only B has gradients, so the Fisher matrix
    at the start leaves A free; `renew_at` re-estimates it, with half of the budget, once B has
    grown.

    Args:
        weight: :math:`\lambda`.
        renew_at: share of the stage after which the Fisher matrix is estimated again.
        references: a name of `Source.references`.
    """

    def __init__(
        self, weight: float, renew_at: float | None = None, references: str = "shared"
    ) -> None:
        super().__init__()
        self.references = references
        self.weight = weight
        self.renew_at = renew_at
        self._anchor: list[Tensor] | None = None

    def begin(self, training: Training) -> None:
        """Estimate the Fisher matrix; the anchor of the first stage serves all."""
        objectives = with_loss(training.objectives, "distill", training.model)
        self._stream = ReferenceStream(objectives, training.passes, training.seed)
        total = round(training.passes * training.steps)
        first = total if self.renew_at is None else total // 2
        self._later = total - first
        if self._anchor is None:
            self._anchor = [p.detach().clone() for p in training.parameters]
        self._estimate(training, max(1, first))

    def backward(self, training: Training, step: int, batch: Any) -> float:
        """The gradient of the safety loss, plus the penalty's: λ F (θ - θ*)."""
        if self.renew_at is not None and step == round(self.renew_at * training.steps):
            self._estimate(training, max(1, self._later))
        value = super().backward(training, step, batch)
        with self.extra_time(training):
            rows = zip(training.parameters, self._fisher, self._anchor or [], strict=True)
            for parameter, fisher, anchor in rows:
                pull = self.weight * fisher * (parameter.detach() - anchor)
                parameter.grad = pull if parameter.grad is None else parameter.grad + pull
        return value

    def _estimate(self, training: Training, total: int) -> None:
        with self.extra_time(training):
            self._fisher = [torch.zeros_like(p) for p in training.parameters]
            for objective, examples in self._stream.split(total):
                for example in examples:
                    with training.cast():
                        losses, _ = objective.losses(training.model, [example])
                    found = torch.autograd.grad(
                        losses.sum(),
                        training.parameters,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    for fisher, gradient in zip(self._fisher, found, strict=True):
                        fisher.addcmul_(gradient, gradient, value=1 / total)
            self.passes += total
