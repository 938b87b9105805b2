"""What a model is, as a hash: the name under which its results are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_ogpsa.errors import ModelError

# Settings that do not change what the model computes.
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "architectures")
_WORDS = 1 << 20  # 64-bit words hashed at a time: bounds the scratch memory to a few 8 MiB


def fingerprint(model: nn.Module, *, base: bool = False) -> str:
    """SHA-256 over every weight of `model`, its configuration and the state of its adapters.

    Every byte counts: two checkpoints of one run differ, and so do an adapter and the same
    adapter scaled down. The bytes are condensed on the model's own device, so nothing but a few
    numbers per tensor is copied (one CPU core does 0.6 GB a second).

    Args:
        model: a model, PEFT-wrapped or not.
        base: leave the adapters out. The result is that of the bare model before it was wrapped:
            results of a base model are shared by all adapters trained on it.

    Raises:
        ModelError: weights are offloaded (on the meta device), or `base` is asked for and an
            adapter is merged into the base weights or cannot be switched off.
    """
    layers = dict(adapter_layers(model))
    if base:
        require_unmerged(model)
        require_switch(model)
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        described = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    if layers and not base:
        state = {name: _adapter_state(layer) for name, layer in layers.items()}
        digest.update(json.dumps(state, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if base and _belongs_to_adapter(name, layers):
            continue
        digest.update(f"|{_bare_name(name)}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for words in _condensed(name, tensor):
            digest.update(str(words).encode())
    return digest.hexdigest()


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every PEFT layer of `model` by name."""
    # By attribute and not by class: PEFT's LoRA layers and its wrappers of fully trained modules
    # have no public base class in common.
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters"):
            yield name, module


def require_unmerged(model: nn.Module) -> None:
    """Make sure that `model` without its adapter is the base model.

    Raises:
        ModelError: an adapter is merged into the base weights. PEFT would quietly unmerge it.
    """
    merged = [name for name, layer in adapter_layers(model) if getattr(layer, "merged", False)]
    if merged:
        raise ModelError(
            f"The adapter is merged into {len(merged)} layers (the first is `{merged[0]}`), so "
            "the base model's weights are not there to be evaluated. Call "
            "`model.unmerge_adapter()` first."
        )


def require_switch(model: nn.Module) -> None:
    """Make sure that the adapters of `model` are off, or can be switched off from outside.

    transformers puts adapters into its models by itself: `load_adapter`, `add_adapter`, and
    `from_pretrained` of a hub id that is an adapter's. Such a model has layers, but not PEFT's
    switch, and would pass for its own base.

    Raises:
        ModelError: one is on and stays on.
    """
    if hasattr(model, "disable_adapter"):
        return
    on = [name for name, layer in adapter_layers(model) if not layer.disable_adapters]
    if on:
        raise ModelError(
            f"The model has {len(on)} adapter layers (the first is `{on[0]}`) and is no "
            "`PeftModel`, so its adapter cannot be switched off to get at the base model. Load "
            "the base model alone and put the adapter on it with peft.PeftModel.from_pretrained."
        )


def _adapter_state(layer: Any) -> list[Any]:
    """Settings of an adapter layer that change its output and stand in no tensor."""
    return [
        sorted(layer.active_adapters),
        bool(getattr(layer, "disable_adapters", False)),
        list(getattr(layer, "merged_adapters", [])),
        dict(getattr(layer, "scaling", {}) or {}),
    ]


def _belongs_to_adapter(name: str, layers: dict[str, nn.Module]) -> bool:
    """Whether the tensor `name` lies in an adapter layer outside of what the layer wraps."""
    parts = name.split(".")
    return any(
        ".".join(parts[:at]) in layers and parts[at] not in ("base_layer", "original_module")
        for at in range(1, len(parts))
    )


def _bare_name(name: str) -> str:
    """`name` as it was before PEFT wrapped the model."""
    kept = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
    if kept[:2] == ["base_model", "model"]:
        kept = kept[2:]
    return ".".join(kept)


def _condensed(name: str, tensor: Tensor) -> Iterator[list[int]]:
    """64-bit sums of the tensor's mixed words, one per slice: integers, hence exact anywhere."""
    if tensor.device.type == "meta":
        raise ModelError(
            f"The weight `{name}` is offloaded (on the meta device), so the model has no content "
            "to tell it from another. Load it on one device to evaluate it."
        )
    raw = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    missing = -raw.numel() % 8
    if missing or raw.data_ptr() % 8:
        raw = torch.cat([raw, raw.new_zeros(missing)])
    words = raw.view(torch.int64)
    keys = _mixed(torch.arange(1, min(_WORDS, max(1, len(words))) + 1, device=words.device)) | 1
    sums = []
    for start in range(0, len(words), _WORDS):
        piece = words[start : start + _WORDS]
        key = keys[: len(piece)]
        # Mixing before the sum: without it, flipped signs of two weights could cancel.
        sums.append((_mixed(piece + key) * key).sum())
    if sums:
        yield torch.stack(sums).tolist()


def _mixed(words: Tensor) -> Tensor:
    """A bijective scramble of 64-bit words in the manner of splitmix64 (overflow wraps)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # Masked, because `>>` copies the sign bit and would then lose it to the xor.
        words = (words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return words
