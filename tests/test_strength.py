"""Adapters at other strengths: the factor is on the change, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_ogpsa.errors import AdapterError
from lora_ogpsa.strength import at_strength

IDS = torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"r": 2, "lora_alpha": 7}, {"init_lora_weights": "mica"}]
)
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.75])
def test_the_change_of_every_weight_is_multiplied(
    strength: float, settings: dict[str, Any], tiny_peft: Callable[..., Any]
) -> None:
    model = tiny_peft(warm=True, **settings)
    expected = tiny_peft(warm=True, **settings)
    trained = model(IDS).logits
    # The same by PEFT's own merging, of which what was there before is kept.
    for module in expected.modules():
        if hasattr(module, "get_delta_weight"):
            module.base_layer.weight.data += strength * module.get_delta_weight("default")
            module.lora_B["default"].weight.data.zero_()
    with at_strength(model, strength):
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(IDS).logits, trained)


def test_what_was_trained_is_there_again_after_a_failure(tiny_peft: Callable[..., Any]) -> None:
    model = tiny_peft(warm=True)
    trained = model(IDS).logits
    with pytest.raises(RuntimeError, match="midway"), at_strength(model, 1.1):
        raise RuntimeError("midway")
    assert torch.equal(model(IDS).logits, trained)


def test_only_active_adapters_are_meant(tiny_peft: Callable[..., Any]) -> None:
    model = tiny_peft(warm=True)
    model.add_adapter("other", model.peft_config["default"])
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    before = [dict(layer.scaling) for layer in layers]
    with at_strength(model, 3.0):
        for layer, scaling in zip(layers, before, strict=True):
            assert layer.scaling["default"] == 3 * scaling["default"]
            assert layer.scaling["other"] == scaling["other"]


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_a_strength_is_a_positive_number(strength: float, tiny_peft: Callable[..., Any]) -> None:
    with pytest.raises(AdapterError, match="positive"), at_strength(tiny_peft(), strength):
        pass


def test_what_has_no_strength_is_refused(
    tiny_model: Callable[..., Any], tiny_peft: Callable[..., Any]
) -> None:
    merged = tiny_peft(warm=True)
    merged.merge_adapter()
    for model, message in (
        (tiny_model(), "no LoRA layer"),
        (merged, "unmerge_adapter"),
        (tiny_peft(use_dora=True), "variant"),
        (tiny_peft(modules_to_save=["lm_head"]), "whole modules"),
        (tiny_peft(init_lora_weights="pissa"), "BA is not its change"),
        (tiny_peft(tiny_model(attention_bias=True), bias="lora_only"), "BA is not its change"),
    ):
        with pytest.raises(AdapterError, match=message), at_strength(model, 2.0):
            pass
