"""Which LoRA settings leave the base model as it was."""

from __future__ import annotations

from typing import Any

# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ...)
# subtract something from the base, and with the adapter off that something is missing.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def base_is_kept(model: Any) -> bool:
    """Whether `model` with its adapters off is the model that training began with."""
    configs = getattr(model, "peft_config", {})
    return all(
        _keeps_base(configs[name])
        for name in getattr(model, "active_adapters", ())
        if name in configs
    )


def _keeps_base(config: Any) -> bool:
    return (
        getattr(config, "init_lora_weights", True) in PLAIN_INITS
        and getattr(config, "kasa_config", None) is None  # truncates the base weights
        and getattr(config, "bias", "none") == "none"  # the base's own biases are trained
    )
