"""Which initialisations of LoRA leave the base model as it was."""

from __future__ import annotations

from typing import Any

# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ...)
# subtract something from the base, and with the adapter off that something is missing.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def base_is_kept(model: Any) -> bool:
    """Whether `model` with its adapters off is the model that training began with."""
    configs = getattr(model, "peft_config", {})
    return all(
        getattr(configs[name], "init_lora_weights", True) in PLAIN_INITS
        for name in getattr(model, "active_adapters", ())
        if name in configs
    )
