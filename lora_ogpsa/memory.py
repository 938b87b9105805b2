"""How much memory a recipe needs, from the model's configuration alone (docs/method.md, Cost)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lora_ogpsa.basis import BLOCK
from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.contrast_config import ContrastConfig
from lora_ogpsa.recipe import Recipe, Stage
from lora_ogpsa.reference import Reference

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BASIS_BYTES = {**_DTYPE_BYTES, "int8": 1 + 4 / BLOCK}  # a float32 scale for each block
# Bytes of optimizer state per trained parameter; what is not listed is taken for AdamW.
_OPTIMIZER_BYTES = (("8bit", 2.0), ("sgd", 0.0), ("adafactor", 0.1), ("lion", 4.0))
# An 8B Llama with rank 16 on all linear layers, from which an unknown model is scaled, and what of
# a contrast adapter on it is trained.
_KNOWN_BASE, _KNOWN_ADAPTER, _KNOWN_RANK = 8.0e9, 42e6, 16
_KNOWN_CONTRAST = 0.7e6


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a base model and of the adapter a recipe puts on it.

    Args:
        parameters: of the base.
        quantised: those that 4-bit loading packs.
        adapter: trained parameters, d.
        layers: transformer blocks; 0 if unknown.
        hidden: width; 0 if unknown.
        vocabulary: size; 0 if unknown.
        dtype: of the base's weights.
        note: how the sizes were found, if not from the model's configuration.
    """

    parameters: int
    quantised: int
    adapter: int
    layers: int
    hidden: int
    vocabulary: int
    dtype: str
    note: str = ""


def model_size(recipe: Recipe) -> ModelSize | None:
    """Sizes from the configuration, without reading weights; nothing is downloaded.

    Returns:
        The sizes; scaled from the billions in the model's name if only that is known; ``None``
        if not even that.
    """
    config = local_config(recipe.model["model_name_or_path"])
    return _from_name(recipe) if config is None else _from_config(recipe, config)


def local_config(name: str) -> Any | None:
    """The configuration of a model, if it is on this machine.

    Raises:
        ModelError: `name` is a path, and there is no model.
    """
    from transformers import AutoConfig

    from lora_ogpsa import models

    source: dict[str, Any]
    if name == models.EMBEDDED:
        gguf = models._embedded_gguf()
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    else:
        source = {"pretrained_model_name_or_path": models.checked_source(name)}
    try:
        return AutoConfig.from_pretrained(local_files_only=True, **source)
    except (OSError, ValueError):
        return None


def _contrast_alone(recipe: Recipe) -> ContrastConfig | None:
    """The contrast adapter, if no usual one is trained beside it."""
    return recipe.contrast if recipe.arms == ["ogpsa"] else None


def _from_config(recipe: Recipe, config: Any) -> ModelSize:
    import torch

    from lora_ogpsa.export.empty_model import empty_model
    from lora_ogpsa.models import EMBEDDED
    from lora_ogpsa.stages import with_empty_adapter

    model = empty_model(config)
    head = model.get_output_embeddings()
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    )
    adapted = with_empty_adapter(model, recipe, contrast=_contrast_alone(recipe))
    dtype = recipe.model["dtype"]
    if dtype in (None, "auto"):
        embedded = recipe.model["model_name_or_path"] == EMBEDDED
        stored = "float32" if embedded else str(config.dtype or "bfloat16")
        dtype = stored.removeprefix("torch.")
    text = config.get_text_config()
    return ModelSize(
        parameters=parameters,
        quantised=linear,
        adapter=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        dtype=dtype,
    )


def _from_name(recipe: Recipe) -> ModelSize | None:
    """Rough sizes: parameters from the name, the adapter scaled from a model that is known."""
    found = re.search(
        r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", recipe.model["model_name_or_path"], re.I
    )
    if found is None:
        return None
    parameters = float(found.group(1)) * (1e9 if found.group(2).lower() == "b" else 1e6)
    # A base grows with depth times width squared, an adapter with depth times width.
    known = _KNOWN_ADAPTER * recipe.model["lora_r"] / _KNOWN_RANK
    if _contrast_alone(recipe) is not None:
        known = _KNOWN_CONTRAST
    dtype = recipe.model["dtype"]
    return ModelSize(
        parameters=int(parameters),
        quantised=int(0.87 * parameters),
        adapter=int(known * (parameters / _KNOWN_BASE) ** (2 / 3)),
        layers=0,
        hidden=0,
        vocabulary=0,
        dtype=dtype if dtype in _DTYPE_BYTES else "bfloat16",
        note="roughly, from the model's name: its configuration is not on this machine",
    )


def estimate(recipe: Recipe, stage: Stage, size: ModelSize, tokens: int) -> dict[str, float]:
    """Bytes on the training device by what they hold.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        size: of the model.
        tokens: of a training row.
    """
    per = _DTYPE_BYTES.get(size.dtype, 2)
    base = float(size.parameters * per)
    if recipe.model["load_in_4bit"]:
        # 64 weights share a scale: 4 bytes, or 1 byte and 4 bytes per 256 scales.
        scale = 1 + 4 / 256 if recipe.model["use_bnb_nested_quant"] else 4
        base = size.quantised * (0.5 + scale / 64) + (size.parameters - size.quantised) * per
    optim = str(getattr(stage.argument("optim"), "value", stage.argument("optim"))).lower()
    state = next((b for name, b in _OPTIMIZER_BYTES if name in optim), 8.0)
    found = {
        "base weights": base,
        "adapter and its gradient (float32)": 8.0 * size.adapter,
        f"optimizer state ({optim})": state * size.adapter,
    }
    if stage.acting is not None:
        found["OGPSA"] = ogpsa_bytes(stage.acting, len(stage.references), size.adapter)
    if size.layers:
        found["activations, roughly"] = _activations(stage, size, tokens)
    return found


def ogpsa_bytes(config: OGPSAConfig, references: int, d: int) -> float:
    """The most that OGPSA holds on the device at once (benchmarks/memory.py measures it).

    That is its rows or bases, and what a step or a refresh needs beside them: vectors of the
    adapter's length, or the rows of a sketch.

    Args:
        config: the settings.
        references: how many, K.
        d: trained parameters.
    """
    vectors, step, sketch, bases = 0 if config.mean_rows_idle else references, 4, 0, 0.0
    vectors += config.keeps_latest
    if config.constraint == "orthogonal" and not config.offload:
        assert config.rank is not None and config.basis_dtype is not None
        bases = config.rank * d * _BASIS_BYTES[config.basis_dtype]
        sketch = config.sketch_rows
    # Sketches that start over are gone when a step needs its memory.
    vectors += max(step, sketch) if config.sketches_start_over else step + sketch
    return bases + vectors * 4.0 * d


def _activations(stage: Stage, size: ModelSize, tokens: int) -> float:
    rows = stage.argument("per_device_train_batch_size") * (2 if stage.trainer == "dpo" else 1)
    checkpointed = stage.argument("gradient_checkpointing")
    per = 2 if stage.argument("bf16") is not False or stage.argument("fp16") else 4
    # Korthikanti et al. 2022: 34 bytes per token, layer and unit of width in 16 bits.
    layer = 17 * per * rows * tokens * size.hidden
    found = layer + per * rows * tokens * size.hidden * size.layers
    if not checkpointed:
        found = layer * size.layers
    return float(found + max([_reference_logits(stage, r, size) for r in stage.references] or [0]))


def _reference_logits(stage: Stage, reference: Reference, size: ModelSize) -> int:
    """A reference pass holds the base's and its own log-probabilities and their gradient."""
    if stage.ogpsa is None:
        return 0
    rows = min(stage.ogpsa.reference_batch_size, stage.ogpsa.references_per_refresh or 1)
    return 3 * 4 * rows * reference.max_new_tokens * size.vocabulary
