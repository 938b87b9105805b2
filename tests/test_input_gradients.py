"""The layers below the lowest adapter have no backward, and no gradient changes by that."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from references import token_reference
from trl import SFTConfig, SFTTrainer

from lora_ogpsa import OGPSA, OGPSACallback, OGPSAConfig

IDS = torch.arange(3, 35).reshape(2, 16)
UPPER = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2, 3]}
PAIRS = [{"prompt": f"say {n}", "completion": f" {n} it is"} for n in range(8)]


@pytest.fixture
def upper(tiny_model: Any, tiny_peft: Any) -> Any:
    """A model of four layers whose adapter begins in the third."""
    return tiny_peft(tiny_model(num_hidden_layers=4), warm=True, **UPPER)


def backward(model: Any) -> tuple[dict[str, Any], list[int]]:
    """Gradients of a step, and how often each layer computed."""
    layers = model.get_base_model().model.layers
    calls = [0] * len(layers)

    def count(at: int) -> None:
        calls[at] += 1

    handles = [
        layer.mlp.register_forward_pre_hook(lambda *_, at=at: count(at))
        for at, layer in enumerate(layers)
    ]
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for handle in handles:
        handle.remove()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, calls


def checkpointed(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # As PEFT and TRL do besides, so that there are several hooks.
    model.enable_input_require_grads()


def attached(model: Any) -> OGPSA:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = OGPSAConfig(first_token_weight=0.0)
    return OGPSA(model, optimizer, [token_reference("r", n=4, loss="kl")], config)


def test_layers_below_the_adapter_are_computed_once(upper):
    expected, calls = backward(upper)
    assert calls == [1, 1, 1, 1]
    checkpointed(upper, reentrant=False)
    _, before = backward(upper)
    assert before == [2, 2, 2, 2]
    with attached(upper):
        found, calls = backward(upper)
    assert calls == [1, 1, 2, 2]
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])
    # Taken off, the model is as it was.
    assert backward(upper)[1] == before


def test_reentrant_checkpoints_need_them(upper):
    expected, _ = backward(upper)
    checkpointed(upper, reentrant=True)
    with attached(upper):
        found, calls = backward(upper)
    assert calls == [2, 2, 2, 2]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert found.keys() == expected.keys()


def test_without_checkpointing_the_embeddings_are_left_alone(upper):
    upper.enable_input_require_grads()
    seen = []
    with attached(upper):
        upper.get_base_model().model.layers[0].register_forward_pre_hook(
            lambda module, args: seen.append(args[0].requires_grad)
        )
        backward(upper)
    assert seen == [True]


def test_trained_embeddings_keep_their_gradients(tiny_model, tiny_peft):
    model = tiny_peft(
        tiny_model(num_hidden_layers=4),
        warm=True,
        **UPPER,
        modules_to_save=["embed_tokens"],
    )
    expected, _ = backward(model)
    assert any("embed_tokens" in name for name in expected)
    checkpointed(model, reentrant=False)
    with attached(model):
        found, _ = backward(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_in_a_trainer_that_lets_the_inputs_require_gradients(upper, tiny_tokenizer, tmp_path):
    calls = []
    trainer = SFTTrainer(
        upper,
        SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
    )
    OGPSACallback(references=[token_reference("r", n=4, loss="kl")]).attach(trainer)
    trainer.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: calls.append(torch.is_grad_enabled() and args[0].requires_grad)
    )
    trainer.train()
    assert calls
    assert not any(calls)
