"""A lead rather than a rival: OGPSA on a rank-1 adapter that begins blind to references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from lora_ogpsa.reference import Objective
from rivals.contrast import PROMPTS, ContrastRival, contrast_row, inputs, lora_layers

_LONGEST = 2.0  # times the length of an ordinary row of A


class AimedRival(ContrastRival):
    """The default rule, and a penalty, on a LoRA of rank 1 in the MLPs' up-projections.

    A's one row begins as the direction that responds most to safety prompts for how far it responds
    to references (`separability.direction`). The gradient of B is an outer product with A's
    response: what references would ask of B is next to nothing then, and what a step of B changes
    for them as well. Of the references count, a third each: general prompts and look-alikes at the
    last token before the answer, and all tokens of general prompts with their answers.

    Args:
        settings: of `OGPSAConfig`.
        references: as in `OgpsaRival`; ``general`` and ``lookalike`` must be among them.
        learning_rate: factor on the stage's; one row needs longer steps than sixteen.
        slowness: with the learning rate being B's, A moves as if its own were this many times
            smaller in proportion to its length; ``None`` holds A where it begins.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        references: str | Sequence[Mapping[str, Any]] = "shared",
        learning_rate: float = 60.0,
        slowness: float | None = None,
    ) -> None:
        super().__init__(settings, references, learning_rate)
        self.rank = 1
        self.slowness = slowness

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Put the adapter on all but the outermost layers and set its A."""
        depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
        layers = range(depth // 3, max(depth // 3 + 1, round(0.9 * depth)))
        longer = self.slowness or 1.0
        config = self._lora(
            target_modules=["up_proj"],
            layers_to_transform=list(layers),
            # The product BA is what it would be without: A is longer by as much.
            lora_alpha=2 * self.rank / longer,
        )
        by_name = {objective.name: objective for objective in objectives}
        general = by_name["general"].sequences[:PROMPTS]
        lookalikes = by_name["lookalike"].sequences[:PROMPTS]
        with self.setup_time(next(model.parameters()).device):
            wrapped = get_peft_model(model, config)
            safety = inputs(wrapped, self._safety)
            harmless = inputs(wrapped, [prompt for prompt, _ in lookalikes])
            whole = inputs(wrapped, [p + answer for p, answer in general], every_token=True)
            ends = torch.tensor([len(p + answer) for p, answer in general]).cumsum(0)
            ends -= torch.tensor([len(answer) + 1 for _, answer in general])
            for name, layer in lora_layers(wrapped).items():
                weight = layer.lora_A["default"].weight
                parts = [harmless[name], whole[name][ends], whole[name]]
                weight.data.copy_(longer * _row(safety[name], parts))
                weight.requires_grad_(self.slowness is not None)
        self.passes += len(lookalikes) + len(general)
        return wrapped


def _row(safety: Tensor, references: Sequence[Tensor]) -> Tensor:
    """A [1, d] from the inputs of safety prompts [n, d] and of references, each part [m, d]."""
    # Second moments: the parts count alike however many rows they have.
    rows = torch.cat([part / len(part) ** 0.5 for part in references])
    rows *= (len(rows) / len(references)) ** 0.5
    return contrast_row(safety, rows, _LONGEST)[None].float()
