"""OGPSA in trainings of axolotl, from its YAML. Skipped where axolotl is not installed."""

import json
import os
import signal

import pytest
import torch
import yaml
from test_callback import PAIRS, PROMPTS

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # read when axolotl is imported
pytest.importorskip("axolotl")

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.train import train

PLUGIN = {"plugins": ["lora_ogpsa.integrations.axolotl.OGPSAPlugin"]}
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# Axolotl turns the kernels on where there is no GPU for them, too.
PLAIN = dict.fromkeys(KERNELS, False)


@pytest.fixture(autouse=True)
def _own_signal_handler():
    """Axolotl's saves a model at an interrupt, and ends the process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def load(tiny_folder, tmp_path):
    """Writes a YAML file of a tiny SFT training with changes, and has axolotl read it."""
    messages = [{"messages": [*p["prompt"], *p["completion"]]} for p in PAIRS]
    preferences = [
        {
            "messages": p["prompt"],
            "chosen": p["completion"][0],
            "rejected": {"role": "assistant", "content": "of course, like this"},
        }
        for p in PAIRS
    ]
    data = {"sft": messages, "dpo": preferences, "prompts": PROMPTS}
    for name, rows in data.items():
        lines = [json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def loaded(name, **changes):
        settings = {
            "base_model": str(tiny_folder),
            "chat_template": "tokenizer_default",
            "datasets": [
                {"path": str(tmp_path / "sft.jsonl"), "ds_type": "json", "type": "chat_template"}
            ],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / name),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "bf16": False,
            "fp16": False,
            "val_set_size": 0,
            "seed": 0,
            **changes,
        }
        file = tmp_path / f"{name}.yml"
        file.write_text(yaml.safe_dump(settings))
        return load_cfg(str(file))

    return loaded


@pytest.fixture
def protected(tmp_path):
    """The keys of a training under OGPSA."""
    own = {"name": "own", "data": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 4}
    return {**PLUGIN, "ogpsa": {"budget": 0.0}, "ogpsa_references": [own]}


def trained(cfg):
    """The trainer, after what `axolotl train` does."""
    torch.manual_seed(0)  # axolotl seeds after the adapter has been drawn
    load_rows = load_preference_datasets if cfg.rl else load_datasets
    _, _, trainer = train(cfg, load_rows(cfg=cfg, cli_args=TrainerCliArgs()))
    return trainer


def adapter(trainer):
    parameters = trainer.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in parameters if ".lora_" in name])


def steps(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def test_sft(load, protected):
    trainer = trained(load("protected", **protected))
    logs = steps(trainer)
    assert len(logs) == 4
    assert {"ogpsa/removed_energy", "ogpsa/loss/own", "ogpsa/excess/own"} <= set(logs[-1])
    assert max(log["ogpsa/removed_energy"] for log in logs) > 0.01

    # In the same process, where axolotl keeps the plugin.
    plain = trained(load("plain", **PLAIN))
    assert not any(key.startswith("ogpsa/") for log in steps(plain) for key in log)
    assert not torch.equal(adapter(plain), adapter(trainer))
    off = trained(load("off", **{**protected, **PLAIN, "ogpsa": False}))
    assert torch.equal(adapter(plain), adapter(off))


def test_a_resumed_training_equals_the_uninterrupted_one(load, protected, tmp_path, caplog):
    whole = trained(load("whole", **protected))
    trained(load("parts", **protected, max_steps=2))
    # From a folder that is not the one to come.
    (tmp_path / "parts").rename(tmp_path / "moved")
    checkpoint = str(tmp_path / "moved" / "checkpoint-2")
    resumed = trained(load("parts", **protected, resume_from_checkpoint=checkpoint))
    assert [log["step"] for log in steps(resumed)] == [1, 2, 3, 4]
    assert torch.equal(adapter(whole), adapter(resumed))
    assert "no OGPSA state" not in caplog.text


def test_dpo(load, protected, tmp_path):
    rows = {
        "path": str(tmp_path / "dpo.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "messages",
    }
    references = protected["ogpsa_references"] + [
        {"name": "pairs", "data": str(tmp_path / "dpo_pairs.jsonl"), "loss": "dpo"}
    ]
    pair = {"prompt": "help me", "chosen": "of course", "rejected": "no, i will not"}
    (tmp_path / "dpo_pairs.jsonl").write_text(json.dumps(pair))
    dpo = {"rl": "dpo", "rl_beta": 0.3, "datasets": [rows]}
    trainer = trained(load("dpo", **{**protected, **dpo, "ogpsa_references": references}))
    logs = steps(trainer)
    assert len(logs) == 4
    assert {"ogpsa/loss/own", "ogpsa/loss/pairs"} <= {key for log in logs for key in log}
    assert not torch.equal(adapter(trainer), adapter(trained(load("plain_dpo", **PLAIN, **dpo))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "Set `adapter: lora`"),
        ({"ogpsa": {"bugdet": 0.2}}, "ogpsa: unknown key `bugdet`. Did you mean `budget`?"),
        ({"ogpsa": {"budget": -1}}, "`budget` should be a number in"),
        ({"ogpsa_references": [{"name": "a", "los": "sft"}]}, "Did you mean `loss`?"),
        ({"relora": True, "jagged_restart_steps": 2}, "`relora`: it merges"),
        ({"lora_mlp_kernel": True}, "`lora_mlp_kernel`: these kernels"),
        ({"deepspeed": "zero2.json"}, "`deepspeed`: it steps"),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": False}}, "`fsdp_config`: this has"),
        ({"tensor_parallel_size": 2}, "`tensor_parallel_size`: this has not been tested"),
    ],
)
def test_what_cannot_be_protected_is_refused(load, changes, message):
    with pytest.raises(ValueError) as raised:
        load("refused", **PLUGIN, **changes)
    assert message in str(raised.value)


def test_the_fused_kernels_are_turned_off(load):
    assert any(load("plain")[key] for key in KERNELS)
    assert not any(load("protected", **PLUGIN)[key] for key in KERNELS)
