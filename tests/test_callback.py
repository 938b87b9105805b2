"""The callback inside real trainers."""

import pytest
import torch
from datasets import Dataset
from references import token_rows
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lora_ogpsa import OGPSA, OGPSACallback, OGPSAConfig, Reference
from lora_ogpsa.errors import ProjectionError

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"help me with bad thing {i}"}],
        "completion": [{"role": "assistant", "content": "no, that would hurt someone"}],
    }
    for i in range(8)
]
PROMPTS = [{"prompt": f"tell me about topic {i}"} for i in range(4)]


class Reporter(TrainerCallback):
    """Stands for a `report_to` integration: it sees what the Trainer sends to one."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def arguments(folder, kind=TrainingArguments, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(**{**defaults, **kwargs})


def token_dataset(n=8):
    rows = token_rows(n, shortest=12, longest=12)
    for row in rows:
        row["attention_mask"] = [1] * 12
    return Dataset.from_list(rows)


def token_references():
    return [Reference("a", token_rows(6), loss="sft"), Reference("b", token_rows(6, 3), loss="kl")]


class Watch(TrainerCallback):
    """Measures every step from outside the callback under test."""

    def __init__(self, ogpsa_callback):
        self.callback = ogpsa_callback
        self.worst = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = self.callback.ogpsa.space.read()

    def on_optimizer_step(self, args, state, control, **kwargs):
        ogpsa = self.callback.ogpsa
        change = ogpsa.space.read() - self.before
        norms = torch.cat(ogpsa.estimator.subspace.component(change))
        self.worst.append(float(norms.max() / change.norm()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_trainer_is_exact_at_every_step(tiny_peft, tmp_path, accumulation):
    callback = OGPSACallback(
        OGPSAConfig(constraint="orthogonal", rank=4, refresh_every=2, references_per_refresh=4),
        token_references(),
    )
    watch = Watch(callback)
    trainer = Trainer(
        tiny_peft(warm=True),
        arguments(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=0.5),
        train_dataset=token_dataset(),
        callbacks=[watch],
    )
    callback.attach(trainer)
    trainer.train()
    assert len(watch.worst) == 3
    assert max(watch.worst) < 1e-5
    assert callback.ogpsa.steps == 3


def test_sft_trainer_with_text_references(tiny_model, tiny_tokenizer, tmp_path):
    from peft import LoraConfig

    callback = OGPSACallback(
        OGPSAConfig(constraint="orthogonal", rank=4, references_per_refresh=4),
        [
            Reference("own", PROMPTS, loss="kl", max_new_tokens=6),
            Reference("told", PAIRS, loss="sft"),
        ],
        cache=tmp_path / "cache",
    )
    watch = Watch(callback)
    trainer = SFTTrainer(
        tiny_model(),
        arguments(tmp_path, SFTConfig, max_length=64, bf16=True),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[watch],
    )
    callback.attach(trainer)
    trainer.train()
    assert max(watch.worst) < 1e-5
    # SFTConfig(bf16=True) trains under autocast: so did the reference passes
    assert callback.ogpsa.estimator.passes.autocast.enabled
    assert callback.ogpsa.estimator.passes.autocast.dtype == torch.bfloat16


def test_default_callback_protects_with_the_embedded_prompts(tiny_peft, tiny_tokenizer, tmp_path):
    callback = OGPSACallback(cache=tmp_path / "cache")
    trainer = SFTTrainer(
        tiny_peft(),
        arguments(tmp_path, SFTConfig, max_length=64, max_steps=2),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
    )
    callback.attach(trainer)
    trainer.train()
    names = [o.name for o in callback.ogpsa.estimator.objectives]
    assert names == ["general", "general_first", "lookalike"]
    assert all(len(o) >= 80 for o in callback.ogpsa.estimator.objectives)


def test_numbers_reach_the_reporters_and_the_history(tiny_peft, tmp_path):
    reporter = Reporter()
    trainer = Trainer(
        tiny_peft(warm=True),
        arguments(tmp_path),
        train_dataset=token_dataset(),
        callbacks=[reporter],
    )
    OGPSACallback(references=token_references()).attach(trainer)
    trainer.train()
    expected = {"ogpsa/removed_energy", "ogpsa/refresh_seconds"}
    training = [log for log in reporter.logs if "loss" in log]
    assert len(training) == 3
    assert all(expected <= set(log) for log in training)
    assert {key for log in training for key in log} >= {
        "ogpsa/loss/a",
        "ogpsa/loss/b",
        "ogpsa/excess/b",
        "ogpsa/captured_energy",
    }
    history = [log for log in trainer.state.log_history if "loss" in log]
    assert all(expected <= set(log) for log in history)


def test_hooks_are_gone_after_training_and_back_in_the_next_run(tiny_peft, tmp_path):
    callback = OGPSACallback(references=token_references())
    trainer = Trainer(
        tiny_peft(warm=True),
        arguments(tmp_path),
        train_dataset=token_dataset(),
        callbacks=[callback],
    )
    trainer.train()
    first = callback.ogpsa
    assert not first.optimizer._optimizer_step_post_hooks
    trainer.train()
    assert callback.ogpsa is not first
    assert callback.ogpsa.steps == 3


def test_a_run_after_an_interrupted_one_is_weighed_once(tiny_peft, tmp_path, caplog):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    def trained(model, *callbacks):
        trainer = Trainer(
            model, arguments(tmp_path), train_dataset=token_dataset(), callbacks=[*callbacks]
        )
        OGPSACallback(references=token_references()).attach(trainer)
        trainer.train()
        return model

    again = tiny_peft(warm=True)
    with pytest.raises(KeyboardInterrupt):
        trained(again, Interrupt())
    trained(again)
    assert "still attached" in caplog.text
    for a, b in zip(again.parameters(), trained(tiny_peft(warm=True)).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_without_labels_in_the_models_call_is_reported(tiny_peft, tmp_path, caplog):
    for smoothing, reported in ((0.0, False), (0.1, True)):
        trainer = Trainer(
            tiny_peft(warm=True),
            arguments(tmp_path, label_smoothing_factor=smoothing),
            train_dataset=token_dataset(),
        )
        OGPSACallback(references=token_references()).attach(trainer)
        trainer.train()
        assert ("`label_smoothing_factor`" in caplog.text) == reported


def test_prepared_references_and_a_beta_of_zero_are_taken(tiny_peft, tmp_path):
    pair = {"prompt": "p", "chosen": "yes", "rejected": "no"}
    model = tiny_peft(warm=True)
    prepared = token_references()[0].prepare(model)
    preference = Reference("pairs", [pair], loss="dpo")
    callback = OGPSACallback(references=[prepared, preference])
    args = arguments(tmp_path)
    args.beta = 0.0
    assert callback._references(args) == [prepared, preference]
    args.beta = 0.3
    kept, with_beta = callback._references(args)
    assert kept is prepared
    assert with_beta.beta == 0.3


def test_trainer_with_and_without_an_idle_constraint_are_identical(tiny_peft, tmp_path):
    def trained(protected):
        torch.manual_seed(0)
        model = tiny_peft(warm=True, lora_dropout=0.1)
        trainer = Trainer(model, arguments(tmp_path), train_dataset=token_dataset())
        if protected:
            idle = OGPSAConfig(budget=1e6, penalty=0, first_token_weight=0)
            OGPSACallback(idle, [Reference("b", token_rows(6), loss="kl")]).attach(trainer)
        trainer.train()
        return model

    for a, b in zip(trained(False).parameters(), trained(True).parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_run_as_the_plain_loop(tiny_peft, tmp_path):
    """The callback only wires: a hand-written loop over the same batches ends the same."""
    config = OGPSAConfig(budget=0.0)
    rows = token_dataset(2)
    model = tiny_peft(warm=True)
    args = arguments(tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant")
    trainer = Trainer(model, args, train_dataset=rows)
    OGPSACallback(config, token_references()).attach(trainer)
    trainer.train()

    twin = tiny_peft(warm=True).train()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    batch = {k: torch.tensor(rows[k]) for k in ("input_ids", "labels", "attention_mask")}
    with OGPSA(twin, optimizer, token_references(), config):
        for _ in range(3):
            twin(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_deepspeed_is_refused(tiny_peft, tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    trainer = Trainer(tiny_peft(warm=True), arguments(tmp_path), train_dataset=token_dataset())
    trainer.args = args
    with pytest.raises(ProjectionError, match="DeepSpeed"):
        OGPSACallback(references=token_references()).attach(trainer)
