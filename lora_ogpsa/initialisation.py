"""Which LoRA settings leave the base model as it was, and which adapters do not change it yet."""

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


def starts_at_base(model: Any) -> bool:
    """Whether `model` with its adapters on is the base model still, since a factor of each is 0."""
    from peft.tuners.lora import LoraLayer

    from lora_ogpsa.sharding import whole

    def any_of(factor: Any) -> bool:
        return bool(whole(getattr(factor, "weight", factor).detach()).any())

    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for down, up in (
            (layer.lora_A, layer.lora_B),
            (layer.lora_embedding_A, layer.lora_embedding_B),
        ):
            for name in layer.active_adapters:
                if name in down and any_of(down[name]) and any_of(up[name]):
                    return False
    return base_is_kept(model)


def _keeps_base(config: Any) -> bool:
    return (
        getattr(config, "init_lora_weights", True) in PLAIN_INITS
        and getattr(config, "kasa_config", None) is None  # truncates the base weights
        and getattr(config, "bias", "none") == "none"  # the base's own biases are trained
    )
