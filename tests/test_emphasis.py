"""The weight of first answer tokens: the gradient is that of the loss it stands for."""

import logging

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from references import token_reference
from torch.nn import functional
from transformers import Llama4ForCausalLM, Llama4TextConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_ogpsa import OGPSA, OGPSACallback, OGPSAConfig
from lora_ogpsa.emphasis import FirstTokenEmphasis, may_end_prompt, token_weights

SHARE = 0.4


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (3, 14), generator=generator)
    labels = ids.clone()
    for row, (start, end) in enumerate([(4, 14), (7, 9), (2, 11)]):
        labels[row, :start] = -100
        labels[row, end:] = -100
    return {"input_ids": ids, "labels": labels}


def explicit_loss(model, inputs, share=SHARE):
    """(1 - s) × mean over answer tokens + s × mean over first answer tokens, from the logits."""
    labels = inputs["labels"]
    logits = model(input_ids=inputs["input_ids"]).logits
    each = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    learned = labels[:, 1:] != -100
    starts = learned & (labels[:, :-1] == -100)
    return (1 - share) * each[learned].mean() + share * each[starts].mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    """Up to the float32 that the libraries' own losses are computed in."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_mixed_loss(tiny_peft, checkpointing):
    model = tiny_peft(warm=True).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch()
    expected = gradients(model, explicit_loss(model, inputs))
    plain = model(**inputs).loss
    emphasis = FirstTokenEmphasis(model, SHARE)
    loss = model(**inputs).loss
    assert loss == plain, "the reported loss stays what it is"
    assert_equal(gradients(model, loss), expected)
    emphasis.remove()
    assert_equal(
        gradients(model, model(**inputs).loss), gradients(model, explicit_loss(model, inputs, 0))
    )


def test_forwards_without_labels_or_in_evaluation_are_left_alone(tiny_peft):
    model = tiny_peft(warm=True).double().train()
    inputs = batch()
    expected = gradients(model, explicit_loss(model, inputs, 0))
    FirstTokenEmphasis(model, SHARE)
    assert_equal(gradients(model, explicit_loss(model, inputs, 0)), expected)
    assert_equal(gradients(model.eval(), model(**inputs).loss), expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.data())
def test_weights_keep_the_shares(masks, data):
    share = data.draw(st.floats(0.01, 1.0))
    learned = torch.tensor(masks)
    weights = token_weights(torch.where(learned, 5, -100), share)
    predicts = torch.zeros_like(learned)
    predicts[:, :-1] = learned[:, 1:]
    first = torch.zeros_like(learned)
    first[:, :-1] = learned[:, 1:] & ~learned[:, :-1]
    if not first.any():
        assert (weights == 1).all()
        return
    # In units of the mean over answer tokens, all weights together are still one loss.
    answers = predicts.sum()
    assert weights[predicts].sum() / answers == pytest.approx(1.0, abs=1e-5)
    assert (weights[first] - (1 - share)).sum() / answers == pytest.approx(share, abs=1e-5)


def test_masked_starts_of_packed_sequences_are_no_prompts():
    # As TRL collates packed rows: position 0 of each is masked, whatever it is a part of.
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    labels = torch.full((1, 10), 5)
    labels[positions == 0] = -100
    whole = _weights(labels, position_ids=positions)
    assert (whole == 1).all()
    labels[:, 4:7] = -100  # a prompt of three tokens in the second
    assert _weights(labels, position_ids=positions)[0].argmax() == 6
    assert (_weights(labels, position_ids=positions)[0, :6] < 1).all()


def test_padding_before_a_sequence_is_no_prompt():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    covered = torch.where(mask.bool(), 5, -100)
    assert (_weights(covered, attention_mask=mask) == 1).all()
    answered = covered.clone()
    answered[0, :5] = -100
    answered[1, :2] = -100
    weights = _weights(answered, attention_mask=mask)
    assert weights[0].argmax() == 4
    assert weights[1].argmax() == 1


def _weights(labels, **inputs):
    return token_weights(labels, SHARE, may_end_prompt(labels, **inputs))


def test_labels_that_cover_the_prompts_are_reported(tiny_peft, caplog):
    model = tiny_peft().train()
    FirstTokenEmphasis(model, SHARE)
    inputs = batch()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss.backward()
    assert sum("first_token_weight" in r.message for r in caplog.records) == 1


def test_ogpsa_weighs_training_and_not_its_references(tiny_peft):
    inputs = batch()
    results = []
    for share in (0.0, SHARE):
        model = tiny_peft(warm=True).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        config = OGPSAConfig(first_token_weight=share)
        with OGPSA(model, optimizer, [token_reference()], config) as ogpsa:
            ogpsa.refresh()
            trained = gradients(model, model(**inputs).loss)
            results.append((ogpsa.estimator.means.clone(), trained))
        assert not model._forward_pre_hooks
    (means, plain), (same, weighted) = results
    assert torch.equal(means, same)
    assert any(not torch.allclose(plain[n], weighted[n]) for n in plain)


def test_the_published_rule_has_none():
    assert OGPSAConfig(preset="paper").first_token_weight == 0


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_under_trl_the_gradient_is_that_of_the_mixed_loss(tiny_peft, tiny_tokenizer, tmp_path):
    rows = [
        {"prompt": "How do I pick a lock?", "completion": " I cannot help with that."},
        {"prompt": "Name a city.", "completion": " Paris"},
    ]
    model = tiny_peft(warm=True)
    kept = KeepGradients()
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        loss_type="nll",
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
        callbacks=[kept],
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    model.train()
    inputs = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}
    expected = gradients(model, explicit_loss(model, inputs))
    model.zero_grad()
    callback = OGPSACallback(OGPSAConfig(first_token_weight=SHARE), [token_reference()])
    callback.attach(trainer)
    trainer.train()
    assert_equal(kept.found, expected)


def test_code_compiled_before_has_the_hooks_and_after_has_none(tiny_model, tiny_peft):
    model = tiny_peft(tiny_model(num_hidden_layers=1), warm=True, target_modules=["q_proj"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    inputs = batch()
    plain, mixed = (gradients(model, explicit_loss(model, inputs, s)) for s in (0.0, SHARE))
    compiled = torch.compile(model, backend="eager")
    assert_equal(gradients(model, compiled(**inputs).loss), plain)
    config = OGPSAConfig(constraint="halfspace", first_token_weight=SHARE)
    with OGPSA(model, optimizer, [token_reference()], config):
        assert_equal(gradients(model, compiled(**inputs).loss), mixed)
    assert_equal(gradients(model, compiled(**inputs).loss), plain)


def test_a_model_that_names_no_decoder_is_reported(tiny_peft, caplog):
    """Its own name for it is one that transformers does not look under."""
    text = Llama4TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        intermediate_size_mlp=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = tiny_peft(Llama4ForCausalLM(text), target_modules=["q_proj"])
    FirstTokenEmphasis(model, SHARE)
    assert "Llama4ForCausalLM does not say which of its modules" in caplog.text
