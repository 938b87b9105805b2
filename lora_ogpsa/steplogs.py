"""`StepLogs`: what happened in the steps since the last log, without waiting for the device."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ogpsa.adapters import AdapterSpace, Slab
from lora_ogpsa.estimator import Refreshed

# The index of a transformer layer is the first number in the name of a module inside it.
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")
OTHER_LAYER = "other"


class LayerSteps(NamedTuple):
    """The share of each layer's step energy that the correction changed, step by step.

    Attributes:
        layers: indices of the transformer layers, as text; ``"other"`` holds what lies outside.
        shares: one list per step, one number per layer.
    """

    layers: list[str]
    shares: list[list[float]]


class StepLogs:
    """Running sums on the device; nothing waits until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._seconds = 0.0
        self._layers: _Layers | None = None
        self._by_layer: list[Tensor] = []

    def _add(self, name: str, value: Tensor) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value.detach().float(), count + 1)

    def watch_layers(self, space: AdapterSpace) -> None:
        """From now on, also keep the removed energy of every layer, until `pop_layers`."""
        self._layers = _Layers(space)

    def removed(self, fix: Tensor, step: Tensor) -> None:
        """The share of a step's energy that the correction changed."""
        energy = step.square().sum().clamp_min(torch.finfo(step.dtype).tiny)
        self._add("removed_energy", fix.square().sum() / energy)
        if self._layers is not None:
            self._by_layer.append(self._layers.share(fix, step))

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
        logs = {name: float(total) / count for name, (total, count) in self._sums.items()}
        if self._seconds:
            logs["refresh_seconds"] = self._seconds
        self._sums, self._seconds = {}, 0.0
        return logs

    def pop_layers(self) -> LayerSteps:
        """Removed energy by layer of the steps since the last call; waits for the device."""
        if self._layers is None:
            return LayerSteps([], [])
        shares = torch.stack(self._by_layer).tolist() if self._by_layer else []
        self._by_layer = []
        return LayerSteps(self._layers.names, shares)


class _Layers:
    """Sums over the pieces of a flat vector that belong to one transformer layer."""

    def __init__(self, space: AdapterSpace) -> None:
        self._slabs: list[Slab] = space.slabs("adapter")
        found = [_layer_of(name) for slab in self._slabs for name in slab.names]
        self.names = sorted(set(found), key=lambda n: (n == OTHER_LAYER, n.zfill(9)))
        index = [self.names.index(name) for name in found]
        self._index = torch.tensor(index, device=space.device)

    def share(self, fix: Tensor, step: Tensor) -> Tensor:
        """Energy of `fix` [d] over that of `step` [d], layer by layer."""
        changed, whole = self._energies(fix), self._energies(step)
        return changed / whole.clamp_min(torch.finfo(whole.dtype).tiny)

    def _energies(self, flat: Tensor) -> Tensor:
        # A norm needs no temporary copy of the vector, which the square would.
        blocks = torch.cat(
            [torch.linalg.vector_norm(slab.view(flat), dim=-1).square() for slab in self._slabs]
        )
        return blocks.new_zeros(len(self.names)).index_add_(0, self._index, blocks)


def _layer_of(module: str) -> str:
    found = _LAYER.search(module)
    return found.group(1) if found else OTHER_LAYER
