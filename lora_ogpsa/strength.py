"""An adapter at another strength than it was trained at: its change of the weights, times a factor.

Training within tight budgets learns *which* prompts to refuse sooner than to refuse them all. The
change can then be made larger, or smaller, without training again: measure a few strengths
(`lora-ogpsa evaluate ADAPTER --weight 1 --weight 1.5`) and merge at the one wanted
(`lora-ogpsa merge ADAPTER OUTPUT --weight 1.5`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_ogpsa.errors import AdapterError
from lora_ogpsa.initialisation import base_is_kept


@contextmanager
def at_strength(model: Any, strength: float) -> Iterator[None]:
    r"""Within the context the LoRA adapters of `model` change it `strength` times as much.

    :math:`W + s\,\tfrac{\alpha}{r} BA` instead of :math:`W + \tfrac{\alpha}{r} BA`. Only the factor
    is touched, so that what was trained is there again afterwards, to the bit.

    Args:
        model: a PEFT model with unmerged LoRA adapters; the active ones are meant.
        strength: a positive factor; 1 changes nothing.

    Raises:
        AdapterError: the model has no LoRA layer, its adapter is merged or more than products BA
            (DoRA, wholly trained modules, PiSSA, trained biases), or `strength` is not a positive
            number.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not math.isfinite(strength) or strength <= 0:
        raise AdapterError(
            f"The strength of an adapter should be a positive number. Found {strength!r}."
        )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise AdapterError("The model has no LoRA layer whose strength could be set.")
    if any(layer.merged for layer in layers):
        raise AdapterError(
            "The adapter is merged into the weights; call `unmerge_adapter()` first."
        )
    # Of these the factor would scale something else than the change that merging scales.
    kinds = {type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()}
    # MiCA is one only in how BA begins.
    if any(not kind.startswith("MiCA") for kind in kinds) or any(
        isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()
    ):
        raise AdapterError(
            "Only of adapters that add BA to weights can the strength be set. This one is a "
            "variant of LoRA (such as DoRA) or trained whole modules or tokens too: merge it with "
            "`--weight`, and evaluate the merged model."
        )
    if not base_is_kept(model):
        raise AdapterError(
            "The adapter's `init_lora_weights` (PiSSA, OLoRA, CorDA, LoftQ...) or `bias` changed "
            "the base weights too, so that BA is not its change, and the change has no strength "
            "that could be set."
        )
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.active_adapters:
                if name in layer.scaling:
                    layer.scaling[name] *= strength
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
