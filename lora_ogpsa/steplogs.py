"""`StepLogs`: what happened in the steps since the last log, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ogpsa.estimator import Refreshed


class StepLogs:
    """Running sums on the device; nothing waits until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._seconds = 0.0

    def _add(self, name: str, value: Tensor) -> None:
        self._sums.setdefault(name, []).append(value.detach())

    def removed(self, fix: Tensor, step: Tensor) -> None:
        """The share of a step's energy that the correction changed."""
        energy = step.square().sum().clamp_min(torch.finfo(step.dtype).tiny)
        self._add("removed_energy", fix.square().sum() / energy)

    def refreshed(self, seen: Refreshed, seconds: float) -> None:
        """What a refresh saw, and how long it took."""
        for name, value in seen.losses.items():
            self._add(f"loss/{name}", value)
        for name, value in seen.excess.items():
            self._add(f"excess/{name}", value)
        for value in seen.captured:
            self._add("captured_energy", value)
        self._seconds += seconds

    def pop(self) -> dict[str, float]:
        """Averages since the last call (seconds: the sum); waits for the device."""
        logs = {
            name: float(torch.stack([v.float() for v in values]).mean())
            for name, values in self._sums.items()
        }
        if self._seconds:
            logs["refresh_seconds"] = self._seconds
        self._sums, self._seconds = {}, 0.0
        return logs
