"""What `OGPSA`, `OGPSACallback` and `get_contrast_model` are called with, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.reference import Objective, Reference


def given_config(config: Any) -> OGPSAConfig:
    """`config`, or the defaults where it is ``None``.

    Raises:
        ConfigError: it is something else.
    """
    if config is None:
        return OGPSAConfig()
    if not isinstance(config, OGPSAConfig):
        raise ConfigError(
            "`config` should be an `OGPSAConfig` (`OGPSAConfig.from_dict` makes one of a mapping). "
            f"Found {config!r:.60}."
        )
    return config


def given_references(references: Any) -> list[Reference | Objective]:
    """`references` as a list.

    Raises:
        ConfigError: they are not several, or one is no reference.
    """
    several = isinstance(references, Iterable) and not isinstance(references, str)
    found = list(references) if several else [references]
    for item in found:
        if not several or not isinstance(item, Reference | Objective):
            raise ConfigError(
                "`references` should be a list of `Reference`, such as "
                f'[Reference("general", "my_prompts.jsonl")]. Found {item!r:.60}'
                f"{' in it' if several else ''}."
            )
    return found
