"""Methods on the library's contrast adapter: OGPSA, and a KL penalty in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_ogpsa import ContrastConfig, get_contrast_model
from lora_ogpsa.contrast import examples_by_kind
from lora_ogpsa.hidden_states import Tokens
from lora_ogpsa.reference import Objective
from rivals.base import Rival
from rivals.ogpsa import OgpsaRival
from rivals.penalties import PenaltyRival


class OnContrastAdapter(Rival):
    """Training of an adapter whose A is set from prompts.

    What it looks at costs a forward each, counted as reference passes.

    Attributes:
        contrast: the adapter's settings.
    """

    contrast: ContrastConfig
    _rows: Sequence[Tokens] = ()

    def see(self, rows: Sequence[Any]) -> None:
        """Keep the prompts with their answers, of a pair the chosen ones."""
        self._rows = [row[0] if isinstance(row[0], tuple) else row for row in rows]

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Put the adapter on the base model."""
        with self.setup_time(next(model.parameters()).device):
            wrapped = get_contrast_model(
                model, self._rows, objectives, self.contrast, lora_config=self._lora()
            )
        looked_at = examples_by_kind(objectives, self.contrast.references)
        self.passes += sum(map(len, looked_at.values()))
        return wrapped


class ContrastRival(OnContrastAdapter, OgpsaRival):
    """OGPSA on a contrast adapter.

    Args:
        settings: of `OGPSAConfig`.
        references: as in `OgpsaRival`.
        contrast: of `ContrastConfig`.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        references: str | Sequence[Mapping[str, Any]] = "shared",
        contrast: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(settings, references)
        self.contrast = ContrastConfig(**(contrast or {}))


class ContrastPenaltyRival(OnContrastAdapter, PenaltyRival):
    """A penalty on a contrast adapter, to tell what the adapter does from what the rule does.

    Args:
        weight: as in `PenaltyRival`.
        loss: as in `PenaltyRival`.
        first_token_weight: as in `PenaltyRival`.
        references: as in `PenaltyRival`.
        contrast: of `ContrastConfig`.
    """

    def __init__(
        self,
        weight: float,
        loss: str,
        first_token_weight: float = 0.0,
        references: str = "shared",
        contrast: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, loss, first_token_weight, references=references)
        self.contrast = ContrastConfig(**(contrast or {}))
