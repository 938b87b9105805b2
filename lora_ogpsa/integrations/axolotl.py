"""`OGPSAPlugin`: OGPSA in a training that axolotl runs from its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator, model_validator

from lora_ogpsa.errors import ConfigError
from lora_ogpsa.recipe_sections import parse_ogpsa, parse_references

# Axolotl goes on without a plugin that it cannot import. So only what this module cannot do without
# is imported above; what is missing for the rest stops the training.

_NAME = f"{__name__}.OGPSAPlugin"
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_PARALLEL = "Train in one process, or in several with plain data parallelism (DDP)."
_UNTESTED = f"this has not been tested. {_PARALLEL}"
_BESIDE = (
    "these kernels go past the adapter's layers, where OGPSA sees in which precision it trains. "
    "Leave it out: the plugin turns it off."
)
# What the callback could not tell, or would refuse only after the model has been loaded.
_REFUSED = {
    "relora": "it merges the adapter into the base model, from which losses are measured. Leave "
    "it out.",
    "deepspeed": f"it steps flat partitions of its own, outside `optimizer.step`. {_PARALLEL}",
    "fsdp": _UNTESTED,
    "fsdp_config": _UNTESTED,
    **dict.fromkeys(_KERNELS, _BESIDE),
}
_REFUSED_SIZES = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")


class OGPSAArgs(BaseModel):
    """The keys that the plugin adds to axolotl's configuration.

    Raises:
        ValidationError: a setting or reference is wrong, or steps of such a training cannot be
            constrained.
    """

    #: Settings of `OGPSAConfig`; ``false`` trains plainly.
    ogpsa: dict[str, Any] | bool | None = None
    #: As `references:` of a recipe; ``None`` takes the embedded harmless prompts.
    ogpsa_references: list[dict[str, Any]] | None = None

    @field_validator("ogpsa")
    @classmethod
    def _check_settings(cls, value: Any) -> Any:
        parse_ogpsa(value, "ogpsa")
        return value

    @field_validator("ogpsa_references")
    @classmethod
    def _check_references(cls, value: Any) -> Any:
        parse_references(value, "ogpsa_references")
        return value

    @model_validator(mode="before")
    @classmethod
    def _check_training(cls, data: Any) -> Any:
        if not _acts(data):
            return data
        if not data.get("adapter"):
            raise ConfigError(
                "OGPSA constrains the steps of a LoRA adapter, and there is none: all parameters "
                "would be trained. Set `adapter: lora` or `adapter: qlora`, or remove the plugin."
            )
        refused = {key: reason for key, reason in _REFUSED.items() if data.get(key)}
        refused.update({key: _UNTESTED for key in _REFUSED_SIZES if (data.get(key) or 1) > 1})
        if refused:
            reasons = " ".join(f"`{key}`: {reason}" for key, reason in refused.items())
            raise ConfigError(f"OGPSA cannot protect this training. {reasons}")
        return data


class OGPSAPlugin(BasePlugin):
    """Keeps every step of an axolotl training within what the reference objectives allow.

    ::

        plugins:
          - lora_ogpsa.integrations.axolotl.OGPSAPlugin
        ogpsa:               # settings of OGPSAConfig, if not the defaults
          budget: 0.2
        ogpsa_references:    # if not the embedded harmless prompts
          - {name: general, data: my_prompts.jsonl}
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that the plugin adds to its configuration."""
        return f"{__name__}.{OGPSAArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Turn off the fused kernels, which axolotl turns on by itself if nothing is said."""
        if not _acts(cfg):
            return
        for key in _KERNELS:
            if cfg.get(key) is None:
                cfg[key] = False

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the callback.

        Raises:
            ProjectionError: the trainer runs in a way in which steps cannot be constrained.
        """
        from lora_ogpsa.callback import OGPSACallback

        if not _acts(cfg):
            return
        OGPSACallback(
            parse_ogpsa(cfg.get("ogpsa"), "ogpsa"),
            parse_references(cfg.get("ogpsa_references"), "ogpsa_references"),
            resume_from_checkpoint=cfg.get("resume_from_checkpoint"),
        ).attach(trainer)


def _acts(cfg: Mapping[str, Any]) -> bool:
    """Whether `cfg` asks for the plugin: axolotl keeps those of earlier configurations."""
    return _NAME in (cfg.get("plugins") or ()) and cfg.get("ogpsa") is not False
