"""TRL's trainers: every step measured from outside, or the run refused with a reason."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from launch import launch
from peft import LoraConfig
from references import token_rows
from test_callback import Watch, arguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)

from lora_ogpsa import OGPSA, OGPSACallback, OGPSAConfig, Reference
from lora_ogpsa.config import LIKELIHOOD_PENALTY, SUPERVISED_PENALTY
from lora_ogpsa.errors import ConfigError, ProjectionError
from lora_ogpsa.reference import Objective

LORA = {"r": 4, "target_modules": "all-linear"}
PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": f"help me with bad thing {i}"}],
        "chosen": [{"role": "assistant", "content": "no, that would hurt someone"}],
        "rejected": [{"role": "assistant", "content": f"sure, take {i} of them"}],
    }
    for i in range(8)
]
LABELLED = [
    {
        "prompt": row["prompt"],
        "completion": row["chosen" if i % 2 else "rejected"],
        "label": bool(i % 2),
    }
    for i, row in enumerate(PREFERENCES)
]
HELPFUL = [
    {"prompt": f"tell me about topic {i}", "chosen": "gladly, it is", "rejected": "no"}
    for i in range(4)
]
REFERENCES = {
    "kl": Reference("kl", token_rows(6), loss="kl"),
    "sft": Reference("sft", token_rows(6, 3), loss="sft"),
    "dpo": Reference("dpo", HELPFUL, loss="dpo", beta=0.2),
}
ORTHOGONAL = OGPSAConfig(constraint="orthogonal", rank=4, refresh_every=2, references_per_refresh=4)


def protect(trainer, *losses, config=ORTHOGONAL):
    """Attach OGPSA, and a `Watch` of what every optimizer step really did."""
    callback = OGPSACallback(config, [REFERENCES[loss] for loss in losses])
    watch = Watch(callback)
    trainer.add_callback(watch)
    callback.attach(trainer)
    return callback, watch


def assert_exact(trainer, callback, watch, steps=3):
    trainer.train()
    assert callback.ogpsa.steps == len(watch.worst) == steps
    assert sum(callback.ogpsa.estimator.subspace.dimensions.values()) > 0
    assert max(watch.worst) < 1e-5


# ------------------------------------------------------------------ DPO


@pytest.mark.parametrize("loss", REFERENCES)
def test_dpo_with_a_new_adapter_and_no_second_model(tiny_model, tiny_tokenizer, tmp_path, loss):
    trainer = DPOTrainer(
        tiny_model(),
        args=arguments(tmp_path, DPOConfig, beta=0.2, bf16=False),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    assert trainer.ref_model is None
    assert_exact(trainer, *protect(trainer, loss))


def test_dpo_after_sft_compares_with_a_frozen_copy(tiny_peft, tiny_tokenizer, tmp_path):
    """TRL copies the adapter to a second one called `ref`: it is not trained, nor protected."""
    model = tiny_peft(warm=True)
    trainer = DPOTrainer(
        model,
        args=arguments(tmp_path, DPOConfig, bf16=False),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer,
    )
    assert trainer.ref_model is None
    assert "ref" in model.peft_config
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if ".ref." in n}
    callback, watch = protect(trainer, "kl", "dpo", "sft")
    assert_exact(trainer, callback, watch)
    assert all(".default." in name for name in callback.ogpsa.space.parameter_names)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
            assert not parameter.requires_grad
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("continued", [False, True])
def test_dpo_reference_is_the_trainers_own_loss(
    tiny_model, tiny_peft, tiny_tokenizer, tmp_path, continued
):
    """On the trainer's tokens, with its beta, it has the trainer's loss and gradient.

    Also where training goes on from an adapter, and TRL compares with a frozen copy of it.
    """
    trainer = DPOTrainer(
        tiny_peft(warm=True) if continued else tiny_model(),
        args=arguments(tmp_path, DPOConfig, beta=0.2, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(PREFERENCES[:2]),
        processing_class=tiny_tokenizer,
        peft_config=None if continued else LoraConfig(**LORA),
    )
    model = trainer.model
    assert ("ref" in model.peft_config) is continued
    for name, parameter in model.named_parameters():
        if "lora_B" in name and ".ref." not in name:
            parameter.data.normal_(std=0.05)
    model.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model, batch)
    expected = torch.autograd.grad(theirs, trainable)

    # Its template ends an answer with a line break after the end of turn; `Reference` stops
    # there. So take its tokens: the loss is what is compared.
    tokens = [
        (row["prompt_ids"], row[answer])
        for row in trainer.train_dataset
        for answer in ("chosen_ids", "rejected_ids")
    ]
    reference = Reference("own", PREFERENCES[:2], loss="dpo", beta=0.2)
    losses, excess = Objective(reference, tokens, model).losses(model, [0, 1])
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-4, atol=1e-5)
    # Of the policy compared with itself the loss is log 2, whatever the pair.
    torch.testing.assert_close(excess, losses.detach() - torch.tensor(2.0).log())
    for mine, other in zip(torch.autograd.grad(losses.mean(), trainable), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    assert model.active_adapters == ["default"]
    assert [p for p in model.parameters() if p.requires_grad] == trainable


def test_preference_references_take_the_trainers_beta(tiny_model, tiny_tokenizer, tmp_path):
    trainer = DPOTrainer(
        tiny_model(),
        args=arguments(tmp_path, DPOConfig, beta=0.3, bf16=False, max_steps=1),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    references = [
        Reference("theirs", PREFERENCES, loss="dpo"),
        Reference("own", PREFERENCES, loss="dpo", beta=0.05),
    ]
    callback = OGPSACallback(references=references).attach(trainer)
    trainer.train()
    assert [o.reference.beta for o in callback.ogpsa.estimator.objectives] == [0.3, 0.05]


def test_sft_then_dpo_each_with_its_own_settings(tiny_model, tiny_tokenizer, tmp_path):
    """One model through both trainers, OGPSA attached anew to each."""
    from test_callback import PAIRS
    from trl import SFTConfig, SFTTrainer

    first = SFTTrainer(
        tiny_model(),
        arguments(tmp_path / "sft", SFTConfig, max_length=64, bf16=False),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    assert_exact(first, *protect(first, "kl"))
    second = DPOTrainer(
        first.model,
        args=arguments(tmp_path / "dpo", DPOConfig, bf16=False),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer,
    )
    assert_exact(second, *protect(second, "kl", "dpo"))


def test_what_is_for_next_token_losses_leaves_preference_losses_alone(
    tiny_peft, tiny_tokenizer, tmp_path
):
    """TRL's trainers give the model labels for either."""
    from test_callback import PAIRS
    from trl import SFTConfig, SFTTrainer

    with_likelihood = partial(DPOConfig, loss_type=["sigmoid", "sft"])
    kinds = {
        "sft": (SFTTrainer, SFTConfig, PAIRS),
        "dpo": (DPOTrainer, DPOConfig, PREFERENCES),
        "kto": (KTOTrainer, KTOConfig, LABELLED),
        "rpo": (DPOTrainer, with_likelihood, PREFERENCES),
    }

    def trained(kind, warm=True, **settings):
        torch.manual_seed(0)
        trainer, settings_of, rows = kinds[kind]
        trainer = trainer(
            tiny_peft(warm=warm),
            args=arguments(
                tmp_path, settings_of, bf16=False, max_length=64, per_device_train_batch_size=4
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
        )
        callback = OGPSACallback(OGPSAConfig(**settings), [REFERENCES["kl"]]).attach(trainer)
        trainer.train()
        return callback.ogpsa.space.read()

    without = {"penalty": 0.0, "first_token_weight": 0.0}
    for kind in ("dpo", "kto"):
        assert torch.equal(trained(kind), trained(kind, **without))
        assert not torch.equal(trained(kind), trained(kind, **without | {"penalty": 1.0}))
    supervised = trained("sft")
    assert torch.equal(supervised, trained("sft", penalty=SUPERVISED_PENALTY))
    assert not torch.equal(supervised, trained("sft", penalty=0.0))
    assert not torch.equal(supervised, trained("sft", first_token_weight=0.0))
    both = trained("rpo")
    assert torch.equal(both, trained("rpo", penalty=0.0))
    assert not torch.equal(both, trained("rpo", first_token_weight=0.0))
    # A new adapter has nothing yet that a penalty could undo.
    new = partial(trained, "rpo", warm=False)
    assert torch.equal(new(), new(penalty=LIKELIHOOD_PENALTY, penalty_of="latest"))
    assert not torch.equal(new(), new(penalty_of="means"))
    assert not torch.equal(new(), new(penalty=0.0))


def test_a_resumed_run_knows_that_its_adapter_was_new(tiny_peft, tiny_tokenizer, tmp_path):
    """Its penalty goes by that, and the weights of the checkpoint do not say it any more."""

    def trained(folder, steps, resume=None):
        torch.manual_seed(0)
        settings = arguments(
            tmp_path / folder,
            partial(DPOConfig, loss_type=["sigmoid", "sft"]),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
            bf16=False,
        )
        settings.max_steps = steps
        trainer = DPOTrainer(
            tiny_peft(),
            args=settings,
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=tiny_tokenizer,
        )
        callback = OGPSACallback(references=[REFERENCES["kl"]]).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return callback.ogpsa

    whole = trained("whole", 4)
    assert (whole.config.penalty, whole.config.penalty_of) == (LIKELIHOOD_PENALTY, "latest")
    trained("parts", 2)
    resumed = trained("parts", 4, str(tmp_path / "parts" / "checkpoint-2"))
    assert resumed.config == whole.config
    assert torch.equal(resumed.space.read(), whole.space.read())
    # What a resumed run saves says it, too.
    again = trained("parts", 4, str(tmp_path / "parts" / "checkpoint-4"))
    assert again.config == whole.config


# ------------------------------------------------------------------ other trainers


def test_kto(tiny_model, tiny_tokenizer, tmp_path):
    trainer = KTOTrainer(
        tiny_model(),
        args=arguments(tmp_path, KTOConfig, bf16=False, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(LABELLED),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    assert_exact(trainer, *protect(trainer, "kl", "sft"))


def test_grpo(tiny_model, tiny_tokenizer, tmp_path):
    """Rollouts between the steps, and several optimizer steps on one of them."""

    def reward(completions, **kwargs):
        return [float(len(c[0]["content"]) % 5) for c in completions]

    trainer = GRPOTrainer(
        tiny_model(),
        reward_funcs=reward,
        args=arguments(
            tmp_path,
            GRPOConfig,
            bf16=False,
            num_generations=2,
            num_iterations=2,
            max_completion_length=6,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    assert_exact(trainer, *protect(trainer, "kl"))


def test_reward_models_are_refused(tiny_tokenizer, tmp_path):
    """A classifier has no token probabilities; its logits must not be taken for some."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=2,
            num_labels=1,
        )
    )
    trainer = RewardTrainer(
        model,
        args=arguments(tmp_path, RewardConfig, bf16=False),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(**LORA, task_type="SEQ_CLS"),
    )
    protect(trainer, "kl")
    with (
        pytest.warns(UserWarning, match="not protected"),
        pytest.raises(ConfigError, match="SequenceClassification has no language-model head"),
    ):
        trainer.train()


# ------------------------------------------------------------------ several processes


def test_trainer_in_two_processes(tmp_path):
    """DDP through the Trainer: both processes exact at every step, and alike at the end.

    `accelerate launch` starts one process on a CPU whatever it is asked for; on GPUs it calls the
    same launcher as here.
    """
    launch(tmp_path, "trainer_run.py")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["size"] == 2
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["steps"] == 3
    assert max(first["worst"], second["worst"]) < 1e-5
    assert first["means"].any()
    for key in ("weights", "means"):
        assert torch.equal(first[key], second[key]), key


# ------------------------------------------------------------------ refused


def test_accelerates_deepspeed_optimizer_is_refused(tiny_peft):
    """Its `step` does nothing: the engine has stepped already."""
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    model = tiny_peft(warm=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ProjectionError, match="DeepSpeedOptimizerWrapper belongs to DeepSpeed"):
        OGPSA(model, DeepSpeedOptimizerWrapper(optimizer), [REFERENCES["kl"]])


@pytest.mark.parametrize(
    ("name", "module"),
    [("DeepSpeedZeroOptimizer", "elsewhere"), ("FP16_Optimizer", "deepspeed.runtime.fp16")],
)
def test_deepspeeds_own_optimizers_are_refused(tiny_peft, name, module):
    """DeepSpeed does not install here: stand-ins of its classes' names."""
    model = tiny_peft(warm=True)
    kind = type(name, (torch.optim.AdamW,), {"__module__": module})
    optimizer = kind([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ProjectionError, match=f"{name} belongs to DeepSpeed.*FSDP2"):
        OGPSA(model, optimizer, [REFERENCES["kl"]])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "DeepSpeed"),
        ("fsdp", ["full_shard"], "FSDP through the Trainer"),
        ("_n_gpu", 2, "DataParallel"),
    ],
)
def test_parallelism_that_the_trainer_hides_is_refused(tmp_path, setting, value, message):
    from types import SimpleNamespace

    args = arguments(tmp_path)
    setattr(args, setting, value)
    trainer = SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=[]))
    with pytest.raises(ProjectionError, match=message):
        OGPSACallback().attach(trainer)
    assert not trainer.callback_handler.callbacks
