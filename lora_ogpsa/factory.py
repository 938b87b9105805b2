"""`create_ogpsa_optimizer`: an optimizer with OGPSA attached, for people with their own loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.errors import AdapterError
from lora_ogpsa.projector import OGPSA
from lora_ogpsa.reference import Objective, Reference


def create_ogpsa_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    references: Sequence[Reference | Objective] | None = None,
    config: OGPSAConfig | None = None,
    processing_class: Any = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over `model`'s trainable parameters whose steps OGPSA constrains.

    In the manner of ``peft.optimizers.create_loraplus_optimizer``. The optimizer is an ordinary
    instance of `optimizer_cls`; the projector hangs on it as ``optimizer.ogpsa``.

    ::

        optimizer = create_ogpsa_optimizer(
            model, torch.optim.AdamW, processing_class=tokenizer, lr=2e-4
        )
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.ogpsa.detach()

    .. warning::
        Call it after the model is on its device and in its final form. For an optimizer with
        parameter groups of its own (LoRA+, LoRA-FA, Riemannian), build it with its own factory
        and attach :class:`OGPSA` to it.

    Args:
        model: the PEFT model; unwrapped, if it has been wrapped for several processes.
        optimizer_cls: the optimizer's class, e.g. ``torch.optim.AdamW``.
        references: what must not get worse; ``None`` takes the embedded harmless prompts.
        config: the settings; ``None`` takes the defaults.
        processing_class: the tokenizer, needed for references that hold text.
        kwargs: of `optimizer_cls` (``lr``, ``weight_decay``, ...).

    Returns:
        The optimizer, with the running :class:`OGPSA` as its attribute ``ogpsa``.

    Raises:
        AdapterError: the model has no trainable parameter, or no LoRA layer.
        ProjectionError: the steps of `optimizer_cls` cannot be constrained.
        ConfigError: the references and the settings do not go together.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise AdapterError(
            "The model has no trainable parameter. Is the adapter loaded with "
            "`is_trainable=True`, and is it the active one (`model.set_adapter(name)`)?"
        )
    optimizer: Any = optimizer_cls(trainable, **kwargs)
    optimizer.ogpsa = OGPSA(model, optimizer, references, config, processing_class=processing_class)
    return optimizer
