"""Rivals that combine safety and reference gradients before the optimizer sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rivals.base import StreamedRival, Training


def agem(safety: Tensor, reference: Tensor) -> Tensor:
    r"""Averaged gradient episodic memory (Chaudhry et al. 2019, arXiv 1812.00420, eq. 11).

    .. math:: \tilde g = g - \frac{g^\top g_{ref}}{g_{ref}^\top g_{ref}} g_{ref}
        \quad\text{if } g^\top g_{ref} < 0
    """
    product = safety @ reference
    if product >= 0:
        return safety
    return safety - product / (reference @ reference) * reference


def pcgrad(safety: Tensor, reference: Tensor) -> Tensor:
    """Gradient surgery (Yu et al. 2020, arXiv 2001.06782, algorithm 1), by torchjd.

    With two gradients this is also UPGrad (Quinton & Rey 2024, arXiv 2406.16232), summed:
    the projection of a gradient onto the dual cone of itself and one that conflicts with it is the
    one onto the other's normal plane. UPGrad is therefore no row of its own.
    """
    from torchjd.aggregation import PCGrad

    return PCGrad()(torch.stack([safety, reference]))


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "agem": agem,
    "pcgrad": pcgrad,
}


class SurgeryRival(StreamedRival):
    """The gradient that a rule makes of the safety gradient and a reference gradient.

    Args:
        rule: name in `RULES`.
        loss: of the references: ``"distill"``, the memory's own loss as in the papers, or
            ``"kl"``, the one OGPSA constrains.
        references: as in `StreamedRival`.
    """

    def __init__(self, rule: str, loss: str, references: str = "shared") -> None:
        super().__init__(loss, references=references)
        self.rule = RULES[rule]

    def use(self, training: Training, loss: Tensor) -> None:
        """Replace the safety gradient by the combined one."""
        found = torch.autograd.grad(
            loss, training.parameters, allow_unused=True, materialize_grads=True
        )
        safety = torch.cat([_gradient(p).flatten() for p in training.parameters])
        reference = torch.cat([g.flatten() for g in found])
        # At the base model the divergence and its gradient are zero: nothing to combine.
        if reference.any():
            combined = self.rule(safety, reference)
            parts = combined.split([p.numel() for p in training.parameters])
            for parameter, part in zip(training.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter).clone()


def _gradient(parameter: Any) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
