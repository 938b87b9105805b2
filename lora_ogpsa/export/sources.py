"""Where the base model and the adapters of an export come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError, one_line
from lora_ogpsa.export.model_files import read_json
from lora_ogpsa.export.quantisation import RUN_FILE
from lora_ogpsa.initialisation import PLAIN_INITS

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What `AdapterSource` may be: one adapter, or several with the weight of each.
Adapters = str | Path | Sequence[tuple[str | Path, float]]

# A merge needs no other format of the weights.
_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]


@dataclass(frozen=True)
class AdapterSource:
    """One LoRA adapter on disk.

    Attributes:
        folder: A standard PEFT adapter folder.
        weight: How much of the change it makes is applied; 1 is the adapter as trained.
        config: Its `adapter_config.json`.
    """

    folder: Path
    weight: float
    config: dict[str, Any]


def resolve_adapters(adapter: Adapters) -> list[AdapterSource]:
    """Finds one or several adapters and checks that they can be merged.

    Args:
        adapter: A folder or hub id, or pairs of those with a weight.

    Returns:
        One source per adapter, in the given order.

    Raises:
        ExportError: There is none, or one is not a LoRA adapter that can become base weights.
    """
    pairs = [(adapter, 1.0)] if isinstance(adapter, (str, Path)) else list(adapter)
    if not pairs:
        raise ExportError("no adapter was given. Pass at least one adapter folder.")
    return [_adapter(path, weight) for path, weight in pairs]


def _adapter(path: str | Path, weight: float) -> AdapterSource:
    if not math.isfinite(weight):
        raise ExportError(
            f"the weight of the adapter {path} should be a number such as 0.5. Found {weight}."
        )
    folder = adapter_folder(path)
    config = read_json(folder / ADAPTER_CONFIG)
    reason = _unmergeable(config)
    if reason:
        raise ExportError(f"the adapter {path} cannot be merged: {reason}")
    if weight != 1 and config.get("bias", "none") != "none":
        # Its file holds the biases themselves, not what training changed in them.
        raise ExportError(
            f"the adapter {path} trained the base's biases too (bias: {config['bias']}), which it "
            f"replaces whole, so it cannot be merged with the weight {weight:g}. Merge it with the "
            "weight 1."
        )
    return AdapterSource(folder, float(weight), config)


def _unmergeable(config: dict[str, Any]) -> str | None:
    if config.get("peft_type") != "LORA":
        return f"it is of type {config.get('peft_type')!r}, and only LORA adapters are supported."
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        return (
            f"its initialisation {config['init_lora_weights']!r} changed the base weights during "
            "training. Save it again with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA."
        )
    if config.get("layer_replication"):
        return "it replicates layers, so the merged model has another architecture than the base."
    if config.get("alora_invocation_tokens"):
        return "an activated LoRA changes the weights only after certain tokens."
    if config.get("monteclora_config"):
        return (
            "MonteCLoRA's samplers have no place in the merged model. PEFT's merge_and_unload() "
            "leaves them out."
        )
    return None


def resolve_base(base: str | Path | None, adapters: list[AdapterSource]) -> tuple[Path, str]:
    """Finds the base model's folder.

    Args:
        base: A folder, a hub id or `embedded`; None for the one the first adapter names.
        adapters: The adapters.

    Returns:
        The folder, and the name the user would know it by.

    Raises:
        ExportError: It is not named anywhere, or is not there.
    """
    name = base if base is not None else named_base(adapters[0].folder, adapters[0].config)
    if not name:
        raise ExportError(f"{adapters[0].folder} does not name its base model. Pass it as --base.")
    if Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _resolve_named(str(name), explicit=base is not None)
    if not (folder / "config.json").is_file():
        raise ExportError(f"the base {folder} has no config.json: it is not a model folder.")
    return folder, str(name)


def named_base(adapter: Path, config: dict[str, Any]) -> str | None:
    """The base that an adapter names, or None.

    Where that is a folder of another machine, the run's record may know a name that is good here.

    Raises:
        ExportError: The record is damaged.
    """
    name = config.get("base_model_name_or_path")
    record = adapter / RUN_FILE
    if name and Path(name).is_absolute() and not Path(name).exists() and record.is_file():
        return read_json(record).get("base", name)
    return name


def _resolve_named(name: str, *, explicit: bool) -> Path:
    from lora_ogpsa.models import EMBEDDED, embedded_folder

    if name == EMBEDDED:
        return embedded_folder()
    hint = "" if explicit else " The adapter names this base; pass its new place as --base."
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ExportError(f"the base model's folder {name} does not exist.{hint}")
    return _download(name, _MODEL_FILES, f"the base model {name!r} was not found.{hint}")


def adapter_folder(path: str | Path) -> Path:
    """Finds an adapter's folder, and downloads it if `path` is its hub id.

    Raises:
        ExportError: It is neither here nor on the hub.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    if folder.exists() or isinstance(path, Path) or str(path).count("/") != 1:
        raise ExportError(
            f"{path} has no {ADAPTER_CONFIG}. Pass the folder that save_pretrained wrote, or a "
            "hub id."
        )
    reason = f"{path} is no local folder with {ADAPTER_CONFIG} either."
    # Of a training's folder the adapter alone, without the checkpoints below it.
    return _download(str(path), None, reason, ignored="*/*")


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads an adapter's tensors.

    Args:
        folder: As `adapter_folder` finds it.

    Raises:
        ExportError: The file is not there, or damaged.
    """
    from peft.utils import load_peft_weights

    # PEFT would take the folder for a hub id.
    file = next((name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ExportError(
            f"the adapter {folder} has no {_ADAPTER_WEIGHTS[0]}: it is only partly there. Copy or "
            "download it again."
        )
    try:
        return load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors and pickle share no base
        raise ExportError(
            f"{folder / file} cannot be read: {one_line(error)}. Copy or download it again."
        ) from error


def _download(name: str, files: list[str] | None, reason: str, ignored: str = "original/*") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Some repositories hold the weights a second time, in a folder of another format.
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=[ignored]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ExportError(f"{reason} The hub says: {error}") from error
