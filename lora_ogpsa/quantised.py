"""Keeping 4-bit layers differentiable on CPU."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> int:
    """Stop bitsandbytes' 4-bit CPU layers from switching to a format without gradients.

    On CPUs with AVX512-BF16, the first evaluation-mode forward of a ``Linear4bit`` repacks its
    weight for inference (bitsandbytes 0.50). From then on its product has no backward: gradients
    that pass through it are wrong, without an error, in training as much as in reference passes;
    and ``dequantize()`` reads the new layout as if it were the old one, so that a merge would
    save noise. Weights packed already are unpacked, and no layer packs again. (Packing rounds
    the scales to bfloat16, which unpacking cannot undo: for the exact weights, load again.)

    Args:
        model: any module; nothing happens to layers that are not 4-bit or not on the CPU.

    Returns:
        How many layers had been packed, and would have trained wrongly.
    """
    unpacked = 0
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)  # a tied head is a plain Parameter
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # unpacks in place: only the plain format can be saved
                layer.quant_state = layer.weight.quant_state
                unpacked += 1
    return unpacked
