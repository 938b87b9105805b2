"""Checks that a step can be constrained: if it cannot, the run stops; it never goes on unprotected.

Each raises an error with what was found, the likely cause, and the way out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.errors import AdapterError, ConfigError, ProjectionError
from lora_ogpsa.initialisation import base_is_kept
from lora_ogpsa.optimizers import learning_rate
from lora_ogpsa.reference import Objective, Reference
from lora_ogpsa.sharding import whole

logger = logging.getLogger(__name__)


def check_model(model: Any) -> None:
    """The model must be PEFT's own with LoRA in it, to be switched off: the base is measured so.

    Raises:
        AdapterError: it is not.
    """
    if hasattr(model, "disable_adapter"):
        _check_adapters(model)
        return
    kind = type(model).__name__
    if hasattr(model, "module"):
        way_out = (
            f"`{kind}` wraps one: pass the model inside, `accelerator.unwrap_model(model)` or "
            "`model.module`, whose parameters are the same."
        )
    else:
        way_out = (
            "Wrap the model with `peft.get_peft_model`; adapters that were put into it otherwise "
            "(`model.add_adapter`, `inject_adapter_in_model`) are not supported."
        )
    raise AdapterError(f"OGPSA needs a `PeftModel`. Found `{kind}`. {way_out}")


def _check_adapters(model: Any) -> None:
    from peft import PeftType
    from peft.tuners.lora import LoraLayer

    # To PEFT the layers of AdaLoRA are LoRA layers; it takes ranks away after a step.
    kinds = {name: model.peft_config[name].peft_type for name in model.active_adapters}
    if PeftType.LORA not in kinds.values():
        found = ", ".join(f"`{name}` ({kind.value})" for name, kind in kinds.items()) or "none"
        raise AdapterError(
            "OGPSA protects LoRA adapters (`peft.LoraConfig`), and no active adapter of the model "
            f"is one. Found: {found}."
        )
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        raise AdapterError(
            "The adapter is merged into the base weights, where it does not train. Call "
            "`model.unmerge_adapter()` first."
        )


def refuse_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """`optimizer.step` must not be given a closure."""
    if any(callable(value) for value in (*args, *kwargs.values())):
        raise ProjectionError(
            "`optimizer.step` was called with a closure: the gradient is computed inside the "
            "step, where it cannot be constrained. Call `loss.backward()` and then "
            "`optimizer.step()`."
        )


def check_held(space: AdapterSpace, optimizer: Any) -> set[int]:
    """The optimizer must hold the very parameters of the adapter, and they must be trainable.

    Returns:
        The `id` of all trainable parameters that it holds.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {id(p) for p in parameters}
    for name, parameter in zip(space.parameter_names, space.parameters, strict=True):
        if id(parameter) not in held:
            raise ProjectionError(
                f"The optimizer does not hold `{name}`. It was built before the adapter was "
                "attached or moved, or holds other Parameter objects: its steps would not "
                "move this model. Build the optimizer from the final model, then attach OGPSA."
            )
        if not parameter.requires_grad:
            raise ProjectionError(
                f"`{name}` was frozen after OGPSA was attached. Freeze before that, or detach "
                "it and create a new OGPSA."
            )
    return {id(p) for p in parameters if p.requires_grad}


def refuse_new(model: nn.Module, parameters: set[int]) -> None:
    """No LoRA parameter may be trained that OGPSA has not been told of.

    Args:
        model: the PEFT model.
        parameters: the `id` of those that were not trained before.

    Raises:
        ProjectionError: one of them is LoRA's.
    """
    for name, parameter in model.named_parameters():
        if id(parameter) in parameters and ".lora_" in name:
            raise ProjectionError(
                f"`{name}` is trained since OGPSA was attached, and would be without protection. "
                "Make it trainable before that, or detach OGPSA and create a new one."
            )


def check_base(
    model: Any, references: Sequence[Reference | Objective], config: OGPSAConfig
) -> None:
    """What is measured from the base model needs one that the adapter's settings keep.

    Raises:
        ConfigError: it did not, and references or settings are measured from it.
    """
    if base_is_kept(model):
        return
    measured = [r.name for r in references if _loss(r) != "sft"]
    settings = [
        text
        for text, used in (
            ("`constraint='budget'`", config.constraint == "budget"),
            ("`restoration`", config.restoration > 0),
        )
        if used
    ]
    if measured or settings:
        raise ConfigError(
            "The adapter's `init_lora_weights` (PiSSA, OLoRA, CorDA, LoftQ...), `kasa_config` or "
            "`bias` changes the base weights: with the adapter off they are not the base model "
            "any more, from which "
            f"{' and '.join([*settings, *(f'reference `{name}`' for name in measured)])} would be "
            "measured. Use a plain initialisation (True, 'gaussian', 'eva') and `bias='none'`, or "
            "`constraint='orthogonal'` or `'halfspace'` with references of `loss='sft'`."
        )


def _loss(reference: Reference | Objective) -> str:
    return reference.loss if isinstance(reference, Reference) else reference.reference.loss


def warn_of_rounding(space: AdapterSpace) -> None:
    """Say so if the parameters are too coarse for an exact step."""
    coarse = sorted({str(p.dtype) for p in space.parameters if p.dtype.itemsize < 4})
    if coarse:
        logger.warning(
            "The LoRA weights are %s: rounding them leaves 1 to 20 %% of a step in the protected "
            "directions (docs/support.md). TRL makes them so on 4-bit bases. For exact steps, "
            "before training: `for p in model.parameters(): if p.requires_grad: "
            "p.data = p.data.float()`.",
            " and ".join(coarse),
        )


def check_device(space: AdapterSpace, flat: Tensor) -> None:
    """The model must be where it was when OGPSA was attached."""
    if flat.device != space.device:
        raise ProjectionError(
            f"The model was moved to {space.device} after OGPSA was attached on {flat.device}. "
            "Move it (or `accelerator.prepare` it) first, then attach."
        )


def check_gradients(space: AdapterSpace) -> None:
    """Some parameter must have a gradient."""
    if all(p.grad is None for p in space.parameters):
        raise ProjectionError(
            "No LoRA parameter that OGPSA holds received a gradient. Was the adapter replaced "
            "or deleted, or the model wrapped again, after OGPSA was attached? Attach it last."
        )


def check_movement(space: AdapterSpace, optimizer: Any, step: Tensor) -> bool:
    """A step that should move the adapter must have moved it.

    Returns:
        Whether this step was one to judge by: a zero learning rate or gradient moves nothing.
    """
    # Schedule-free optimizers have a warm-up of their own.
    groups = optimizer.param_groups
    if not any(float(group.get("scheduled_lr", learning_rate(group))) > 0 for group in groups):
        return False
    grads = [p.grad for p in space.parameters if p.grad is not None]
    if not any(bool(whole(g).any()) for g in grads):
        return False
    if not bool(step.any()):
        raise ProjectionError(
            f"A step of {type(optimizer).__name__} with non-zero gradients and learning rate moved "
            "none of the LoRA parameters that OGPSA holds. Its `step` does nothing here "
            "(layer-wise and DeepSpeed optimizers step elsewhere), so nothing can be protected: "
            "use an optimizer that steps in `step`."
        )
    return True


def check_rest(space: AdapterSpace, optimizer: Any, flat: Tensor) -> None:
    """The parameters must still be `flat` [d], where a constrained step has left them."""
    if not torch.equal(flat, space.read()):
        raise ProjectionError(
            f"{type(optimizer).__name__} moves the parameters after the step of its base class, "
            "where they cannot be constrained. Use an optimizer that moves them once."
        )
