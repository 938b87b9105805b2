"""A lead rather than a rival: OGPSA on an adapter that reads little but what tells harm apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from separability import direction
from torch import Tensor, nn

from lora_ogpsa.reference import Objective
from rivals.base import ReferenceStream
from rivals.ogpsa import OgpsaRival

#: What reads the residual stream in each layer.
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PROMPTS = 48  # of the safety data
_RIDGE = 1.0
_OFFSET = 0.5  # response to the references' mean, against that to safety prompts
_LONGEST = 3.0  # times the length of an ordinary row of A


class ContrastRival(OgpsaRival):
    """The default rule on a LoRA of rank 2 whose A is set from prompts and not trained.

    Its first row is the direction along which safety prompts differ most from references
    (`separability.direction`), at the last token before the answer; the second is the references'
    mean, an offset. Together B learns an affine function of one feature. Only the middle layers
    are adapted, where the feature is best. The prompts cost a forward each, counted as passes.

    Args:
        settings: of `OGPSAConfig`.
        references: as in `OgpsaRival`.
        learning_rate: factor on the stage's; two rows need longer steps than sixteen.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        references: str | Sequence[Mapping[str, Any]] = "shared",
        learning_rate: float = 40.0,
    ) -> None:
        super().__init__(settings, references)
        self.learning_rate = learning_rate
        self.rank = 2
        self._safety: list[list[int]] = []

    def see(self, rows: Sequence[Any]) -> None:
        """Keep prompts from all over the training data, which may be of several kinds in turn."""
        spread = rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]
        # Of a pair both sides have the prompt.
        self._safety = [row[0][0] if isinstance(row[0], tuple) else row[0] for row in spread]

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Put the adapter on the middle layers and set its A."""
        depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
        layers = range(depth // 2, max(depth // 2 + 1, round(0.8 * depth)))
        config = self._lora(target_modules=list(READERS), layers_to_transform=list(layers))
        drawn = ReferenceStream(objectives, 1.0, seed=0).split(budget)
        prompts = [o.sequences[index][0] for o, indices in drawn for index in indices]
        with self.setup_time(next(model.parameters()).device):
            wrapped = get_peft_model(model, config)
            safety, references = inputs(wrapped, self._safety), inputs(wrapped, prompts)
            for name, layer in lora_layers(wrapped).items():
                weight = layer.lora_A["default"].weight
                weight.data.copy_(_rows(safety[name], references[name]))
                weight.requires_grad_(False)
        self.passes += budget
        return wrapped


def _usual_response(safety: Tensor) -> Tensor:
    """How far a row of A under LoRA's usual start responds to inputs [n, d]; a scalar, float64.

    The entries of such a row have variance 1 / 3d.
    """
    return (safety.double().square().sum(1).mean() / (3 * safety.shape[1])).sqrt()


def contrast_row(safety: Tensor, references: Tensor, longest: float) -> Tensor:
    """A row of A [d] along what sets safety prompts apart, as responsive to them as a usual row.

    Args:
        safety: inputs of safety prompts [n, d].
        references: inputs of references [m, d].
        longest: times the length of a usual row that it may be.

    Returns:
        [d], float64.
    """
    found = _usual_response(safety) * direction(safety, references, _RIDGE)
    return found * (longest / 3**0.5 / found.norm()).clamp_max(1.0)


def _rows(safety: Tensor, references: Tensor) -> Tensor:
    """A [2, d] from the inputs of safety prompts [n, d] and references [m, d]."""
    contrast = contrast_row(safety, references, _LONGEST)
    mean = references.double().mean(0)
    offset = _OFFSET * _usual_response(safety) * mean / mean.square().sum()
    return torch.stack([contrast, offset]).float()


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def inputs(
    model: nn.Module, sequences: Sequence[list[int]], *, every_token: bool = False
) -> dict[str, Tensor]:
    """What every adapted layer reads at the last token of each sequence, or at all of them.

    Returns:
        By layer, [sequences, d] or [tokens of all sequences, d].
    """
    layers = lora_layers(model)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    kept = slice(None) if every_token else slice(-1, None)
    handles = [
        layer.register_forward_pre_hook(  # type: ignore[attr-defined]
            lambda _, args, rows=found[name]: rows.append(args[0][0, kept].float())
        )
        for name, layer in layers.items()
    ]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    for sequence in sequences:
        model(input_ids=torch.tensor([sequence], device=device))
    model.train(training)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}
