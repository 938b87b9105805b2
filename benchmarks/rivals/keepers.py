"""What PEFT ships for keeping a model's knowledge: CorDA, OSF and MiCA.

LoRA-Null (arXiv 2503.02659) is not in PEFT 0.21 and hence not here. All three decompose the base
weights, so none runs on a 4-bit base.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from lora_ogpsa.reference import Objective
from rivals.base import ReferenceStream, Rival, linear_names


class CordaRival(Rival):
    """CorDA in knowledge-preserved mode (Yang et al. 2024, arXiv 2406.05223), by PEFT.

    The adapter begins as the components of each weight that matter least to the references'
    activations, and these are taken out of the base weight. The model *without* the adapter is
    then no longer the base model, so it is evaluated as PEFT converts such adapters: a LoRA of
    twice the rank on the original weights, BA - B₀A₀.
    """

    references = "shared"
    full_precision = True

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Collect the references' activations and initialise from them."""
        # Here, because PEFT's module needs attrs, which PEFT does not install.
        from peft.tuners.lora.corda import preprocess_corda

        names = linear_names(model)
        twin = self._lora(r=2 * self.rank, lora_alpha=4 * self.rank, target_modules=names)
        self._twin = get_peft_model(copy.deepcopy(model), twin)
        examples = ReferenceStream(objectives, 1.0, seed=0).split(budget)

        device = next(model.parameters()).device

        def run_model() -> None:
            for objective, indices in examples:
                for index in indices:
                    prompt, answer = objective.sequences[index]
                    # One sequence at a time: PEFT's hook takes no batch dimension.
                    model(torch.tensor([[*prompt, *answer]], device=device))

        config = self._lora(
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="kpm"),
            target_modules=names,
        )
        with self.setup_time(device):
            preprocess_corda(model, config, run_model=run_model)
            wrapped = get_peft_model(model, config)
        self.passes += budget
        self._start = {name: [t.clone() for t in pair] for name, pair in _factors(wrapped).items()}
        return wrapped

    @torch.no_grad()
    def measured(self, model: nn.Module) -> nn.Module:
        """The twin with the original base weights, brought up to date."""
        twin = _factors(self._twin)
        for name, (a, b) in _factors(model).items():
            a_start, b_start = self._start[name]
            twin[name][0].copy_(torch.cat([a, a_start]))
            twin[name][1].copy_(torch.cat([b, -b_start], dim=1))
        return self._twin

    def _lora(self, **settings: Any) -> LoraConfig:
        merged = {"r": self.rank, "lora_alpha": 2 * self.rank, **settings}
        return LoraConfig(task_type="CAUSAL_LM", **merged)


class OsfRival(Rival):
    """Orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv 2504.07097), by PEFT.

    The leading singular directions of every weight are frozen; the smallest ones are trained,
    orthogonally to them. It sees no reference data.

    Args:
        trained: singular directions trained per weight; ``None`` takes PEFT's default, half.
    """

    full_precision = True

    def __init__(self, trained: int | None = None) -> None:
        super().__init__()
        self.trained = trained

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Decompose every linear layer."""
        names = linear_names(model)
        kept = {}
        if self.trained is not None:
            shapes = {name: model.get_submodule(name).weight.shape for name in names}
            kept = {f"^{name}$": min(shape) - self.trained for name, shape in shapes.items()}
        config = OSFConfig(task_type="CAUSAL_LM", target_modules=names, rank_pattern=kept or None)
        with self.setup_time(next(model.parameters()).device):
            return get_peft_model(model, config)


class MicaRival(Rival):
    """Minor component adaptation (arXiv 2604.01694), by PEFT.

    B is fixed at the left singular vectors of each weight's smallest singular values and A is
    trained from zero. It sees no reference data.
    """

    full_precision = True

    def wrap(self, model: nn.Module, objectives: Sequence[Objective], budget: int) -> nn.Module:
        """Put the adapter on."""
        with self.setup_time(next(model.parameters()).device):
            return get_peft_model(model, self._lora(init_lora_weights="mica"))


def _factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every LoRA layer by name."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            found[name] = (layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data)
    return found
