"""Safety-align chat models with LoRA or QLoRA without paying the alignment tax.

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_ogpsa.adapters import AdapterSpace as AdapterSpace
    from lora_ogpsa.callback import OGPSACallback as OGPSACallback
    from lora_ogpsa.config import OGPSAConfig as OGPSAConfig
    from lora_ogpsa.contrast import freeze_contrast as freeze_contrast
    from lora_ogpsa.contrast import get_contrast_model as get_contrast_model
    from lora_ogpsa.contrast_config import ContrastConfig as ContrastConfig
    from lora_ogpsa.errors import OGPSAError as OGPSAError
    from lora_ogpsa.factory import create_ogpsa_optimizer as create_ogpsa_optimizer
    from lora_ogpsa.projector import OGPSA as OGPSA
    from lora_ogpsa.reference import Reference as Reference
    from lora_ogpsa.reference import default_references as default_references
    from lora_ogpsa.sketch import FrequentDirections as FrequentDirections
    from lora_ogpsa.subspace import Subspace as Subspace

_HOMES = {
    "AdapterSpace": "adapters",
    "ContrastConfig": "contrast_config",
    "FrequentDirections": "sketch",
    "OGPSA": "projector",
    "OGPSACallback": "callback",
    "OGPSAConfig": "config",
    "OGPSAError": "errors",
    "Reference": "reference",
    "Subspace": "subspace",
    "create_ogpsa_optimizer": "factory",
    "default_references": "reference",
    "freeze_contrast": "contrast",
    "get_contrast_model": "contrast",
}

__all__ = [  # noqa: RUF022 - in reading order
    "OGPSAConfig",
    "Reference",
    "default_references",
    "OGPSACallback",
    "OGPSA",
    "create_ogpsa_optimizer",
    "ContrastConfig",
    "get_contrast_model",
    "freeze_contrast",
    "AdapterSpace",
    "FrequentDirections",
    "Subspace",
    "OGPSAError",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lora_ogpsa.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
