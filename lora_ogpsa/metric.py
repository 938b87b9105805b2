"""The optimizer's own metric: what one unit of each coordinate costs in the optimizer's eyes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.optimizers import learning_rate
from lora_ogpsa.sharding import whole

# Where optimizers keep a float second moment of the gradient's shape: torch's and schedule-free
# Adam and non-factored Adafactor; RMSprop; bitsandbytes' 32-bit Adam.
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "state2")
_OWN_DECAY = 0.999


class InverseMetric:
    r"""The diagonal of M⁻¹ for :math:`M = \mathrm{diag}((\sqrt{\hat v} + \delta) / \eta)`.

    Only ratios matter to a constrained step, so it is given in units in which the root mean
    square of :math:`\sqrt{\hat v}` is one. η is the learning rate of each parameter's group
    relative to the largest: under LoRA+ the rates of A and B differ, and so do the steps.

    :math:`\hat v` is the optimizer's second moment where it keeps one in floating point, else a
    running average of squared gradients of our own (8-bit states, SGD, Lion, factored Adafactor).

    Args:
        space: the adapter space.
        optimizer: the innermost optimizer.
        damping: δ, in the units above.
    """

    def __init__(self, space: AdapterSpace, optimizer: Any, damping: float) -> None:
        self.space = space
        self.optimizer = optimizer
        self.damping = damping
        self.own: Tensor | None = None

    @property
    def latest(self) -> Tensor | None:
        """The metric between steps [d], ``None`` before the first.

        Made anew from the optimizer's state rather than kept: it would take the memory of the
        whole adapter throughout training.
        """
        moments = self._optimizer_moments()
        if moments is None and self.own is None:
            return None
        return self._values(moments)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of our own, if there is one."""
        return {} if self.own is None else {"metric.own": self.own}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, from among other tensors."""
        own = tensors.get("metric.own")
        self.own = None if own is None else self.space.zeros().copy_(own)

    @torch.no_grad()
    def update(self) -> Tensor:
        """After a step, while its gradients are still there: the diagonal of M⁻¹ [d], float32."""
        moments = self._optimizer_moments()
        if moments is None:
            self._update_own()
        return self._values(moments)

    @torch.no_grad()
    def _values(self, moments: list[Tensor | None] | None) -> Tensor:
        """The diagonal of M⁻¹ [d] from the optimizer's moments, or else from our own."""
        values = self.space.zeros()
        if moments is None:
            assert self.own is not None
            values.copy_(self.own)
        else:
            views = self.space.views(values)
            pairs = [(v, m) for v, m in zip(views, moments, strict=True) if m is not None]
            torch._foreach_copy_([v for v, _ in pairs], [m for _, m in pairs])
        scale = values.mean().sqrt()
        values.sqrt_().div_(scale.clamp_min(torch.finfo(values.dtype).tiny))
        values.add_(self.damping).reciprocal_()
        self._apply_learning_rates(values)
        return values

    def _optimizer_moments(self) -> list[Tensor | None] | None:
        """The optimizer's second moments, one per parameter, or None if it keeps none."""
        found: list[Tensor | None] = []
        for parameter in self.space.parameters:
            state = self.optimizer.state.get(parameter)
            if not state:
                found.append(None)
                continue
            moment = next((state[key] for key in _SECOND_MOMENTS if key in state), None)
            if (
                not isinstance(moment, Tensor)
                or moment.shape != parameter.shape
                or not moment.is_floating_point()
            ):
                return None
            found.append(whole(moment))
        return found if any(m is not None for m in found) else None

    def _update_own(self) -> None:
        if self.own is None:
            self.own = self.space.zeros()
        for view, parameter in zip(self.space.views(self.own), self.space.parameters, strict=True):
            view.mul_(_OWN_DECAY)
            if parameter.grad is not None:
                # A fused step under a GradScaler has unscaled them in place by now.
                view.add_(whole(parameter.grad).float().square(), alpha=1 - _OWN_DECAY)

    def _apply_learning_rates(self, values: Tensor) -> None:
        own = _learning_rates(self.space, self.optimizer)
        highest = max(own)
        if highest > 0 and min(own) != highest:
            for view, rate in zip(self.space.views(values), own, strict=True):
                view.mul_(rate / highest)


def euclidean(space: AdapterSpace, optimizer: Any) -> Tensor | None:
    """The diagonal of M⁻¹ [d] that weighs alike all that moves, and leaves alone what does not.

    Returns:
        1, or 0 where a learning rate is 0 and another is not; ``None`` if that is so nowhere.
    """
    rates = _learning_rates(space, optimizer)
    if all(rates) or not any(rates):
        return None
    values = space.zeros()
    for view, rate in zip(space.views(values), rates, strict=True):
        view.fill_(float(rate > 0))
    return values


def _learning_rates(space: AdapterSpace, optimizer: Any) -> list[float]:
    """That of each parameter."""
    rates = {
        id(p): learning_rate(group) for group in optimizer.param_groups for p in group["params"]
    }
    return [rates[id(p)] for p in space.parameters]
