"""Models without memory: the names, shapes and ties of a base."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lora_ogpsa.errors import ExportError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a causal language model on the meta device: all names and shapes, no memory.

    Its linear layers are plain ones, as they are before they are quantised.

    Raises:
        ExportError: transformers has no causal language model for this config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ExportError(
            f"transformers cannot build a causal language model of type {config.model_type!r}: "
            f"{one_line(error)}"
        ) from error


def tied_names(tensors: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Maps each name that shares its tensor with others to all names of that tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def embedding_names(model: PreTrainedModel) -> set[str]:
    """Names the weights of the input and output embeddings."""
    ends = [id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m]
    return {f"{name}.weight" for name, m in model.named_modules() if id(m) in ends}


def embedding_rows(model: PreTrainedModel, states: list[dict[str, torch.Tensor]]) -> int | None:
    """Returns the vocabulary size of embeddings that adapter files bring along, or None."""
    for weight in embedding_names(model):
        module = weight.removesuffix(".weight")
        for state in states:
            for key in (f"{module}.weight", f"{module}.base_layer.weight"):
                if (tensor := state.get(f"base_model.model.{key}")) is not None:
                    return tensor.shape[0]
    return None
