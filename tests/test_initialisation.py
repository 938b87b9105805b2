"""What is said of an adapter before training, against what the model computes with it."""

import pytest
import torch
from peft import LoraConfig

from lora_ogpsa.initialisation import starts_at_base

IDS = torch.arange(3, 19).unsqueeze(0)


def same_logits(model):
    with torch.no_grad():
        adapted = model.eval()(input_ids=IDS).logits
        with model.disable_adapter():
            return torch.allclose(adapted, model(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["lora", "dora", "gaussian", "embedding"],
)
def test_an_adapter_starts_at_the_base_model_until_it_is_trained(tiny_peft, lora):
    new, trained = tiny_peft(**lora), tiny_peft(warm=True, **lora)
    if "embed_tokens" in lora.get("target_modules", ()):
        for name, parameter in trained.named_parameters():
            if "lora_embedding_A" in name:
                parameter.data.normal_(std=0.05)
    assert starts_at_base(new) and same_logits(new)
    assert not starts_at_base(trained) and not same_logits(trained)


def test_only_active_adapters_count(tiny_peft):
    """TRL keeps a trained copy of what DPO goes on with as an inactive adapter."""
    model = tiny_peft(warm=True)
    model.add_adapter("new", LoraConfig(r=2, target_modules="all-linear"))
    assert not starts_at_base(model)
    model.set_adapter("new")
    assert starts_at_base(model) and same_logits(model)


def test_an_initialisation_that_changes_the_base_weights_does_not_start_there(tiny_peft):
    model = tiny_peft(init_lora_weights="pissa")
    assert not starts_at_base(model) and not same_logits(model)
