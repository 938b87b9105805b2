"""What is left of a step where none should be: trainer x precision x optimizer x adapter type.

    python benchmarks/residual.py
    python benchmarks/residual.py --trainers sft dpo --optimizers adamw_torch --adapters lora

Each cell trains a real model with a real trainer for a few steps and measures every step from
outside: the residual is the largest share, over steps and modules, of the parameters' actual change
that lies in the protected basis. Finished cells are kept in the results file and not run again, so
an interrupted matrix goes on where it stopped; `--overwrite` starts anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lora_ogpsa import OGPSACallback, OGPSAConfig, Reference, chat, data
from lora_ogpsa.initialisation import base_is_kept
from lora_ogpsa.models import cache_dir, load_model
from lora_ogpsa.stages import cpu_computes_bfloat16

LENGTH = 96
TRAINERS = ("trainer", "sft", "dpo")
# "nf4" is a 4-bit base with float32 adapters, which is how recipes train.
PRECISIONS = ("float32", "bf16_autocast", "nf4")
OPTIMIZERS = ("adamw_torch", "adamw_bnb_8bit", "sgd", "adafactor")
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
}
CONFIG = OGPSAConfig(constraint="orthogonal", rank=4, refresh_every=2, references_per_refresh=4)


class Watch(TrainerCallback):
    """Measures every step from outside the callback under test."""

    def __init__(self, protection: OGPSACallback) -> None:
        self.protection = protection
        self.worst: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note where the step begins."""
        self.before = self.protection.ogpsa.space.read()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Measure what the step did to each module."""
        ogpsa = self.protection.ogpsa
        change = ogpsa.space.read() - self.before
        norms = ogpsa.estimator.subspace.component(change)
        shares = [
            (inside / slab.view(change).norm(dim=-1).clamp_min(1e-30)).max()
            for inside, slab in zip(norms, ogpsa.estimator.slabs, strict=True)
        ]
        self.worst.append(float(torch.stack(shares).max()))


def make_trainer(
    kind: str, precision: str, optimizer: str, adapter: str, folder: str, options: Any
) -> Any:
    """A trainer of the wanted kind on a fresh model."""
    model, tokenizer = load_model(options.model, dtype="float32", load_in_4bit=precision == "nf4")
    lora = LoraConfig(
        **{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **ADAPTERS[adapter]}
    )
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1 if optimizer == "sgd" else 5e-4,
        "weight_decay": 0.01,
        "optim": optimizer,
        "bf16": precision == "bf16_autocast",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    if optimizer == "sgd":
        arguments["optim_args"] = "momentum=0.9"
    rows = data.load_rows("embedded:safety_sft")[: 2 * options.steps]
    if kind == "trainer":
        from peft import get_peft_model

        encoded = [
            chat.encode(tokenizer, *chat.as_messages(row), max_length=LENGTH, name="row")
            for row in rows
        ]
        return Trainer(
            get_peft_model(model, lora),
            TrainingArguments(remove_unused_columns=False, **arguments),
            train_dataset=encoded,  # type: ignore[arg-type]  # any sequence will do
            data_collator=lambda batch: chat.collate(batch, tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
    if kind == "sft":
        return SFTTrainer(
            model,
            SFTConfig(max_length=LENGTH, gradient_checkpointing=False, **arguments),
            train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]),
            processing_class=tokenizer,
            peft_config=lora,
        )
    pairs = [
        {
            "prompt": row["messages"][:-1],
            "chosen": row["messages"][-1:],
            "rejected": [{"role": "assistant", "content": "Sure, I can do that."}],
        }
        for row in rows
    ]
    return DPOTrainer(
        model,
        args=DPOConfig(max_length=LENGTH, gradient_checkpointing=False, **arguments),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora,
    )


def measure(cell: tuple[str, str, str, str], options: Any) -> dict[str, Any]:
    """Train one cell."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        trainer = make_trainer(*cell, folder, options)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL makes those on a 4-bit base bfloat16
                parameter.data = parameter.data.float()
        answers = {"data": "embedded:eval_general", "loss": "sft", "max_length": LENGTH, "limit": 8}
        references = [Reference("answers", **answers), Reference("others", **answers, seed=1)]
        if base_is_kept(trainer.model):  # else there is nothing to measure a divergence from
            references[1] = Reference("general", kind="general", limit=8, max_new_tokens=24)
        protection = OGPSACallback(CONFIG, references, cache=cache_dir())
        watch = Watch(protection)
        trainer.add_callback(watch)
        protection.attach(trainer)
        trainer.train()
    ogpsa = protection.ogpsa
    assert ogpsa is not None
    assert ogpsa.estimator.subspace is not None
    return {
        **dict(zip(("trainer", "precision", "optimizer", "adapter"), cell, strict=True)),
        "optimizer_class": type(ogpsa.optimizer).__name__,
        "steps": len(watch.worst),
        "basis_rows": sum(ogpsa.estimator.subspace.dimensions.values()),
        "residual": max(watch.worst),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: one row per precision, optimizer and adapter, one column per trainer."""
    trainers = list(dict.fromkeys(cell["trainer"] for cell in cells))
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for cell in cells:
        key = (cell["adapter"], cell["precision"], cell["optimizer"])
        rows.setdefault(key, {})[cell["trainer"]] = cell["residual"]
    lines = []
    for key, found in rows.items():
        values = [f"{found[t]:.0e}" if t in found else "" for t in trainers]
        lines.append([*key, *values])
    return common.table(["adapter", "precision", "optimizer", *trainers], lines)


def wanted(options: Any) -> list[tuple[str, str, str, str]]:
    """All precisions and optimizers with the first adapter; the other adapters with the first."""
    cells = list(
        itertools.product(
            options.trainers, options.precisions, options.optimizers, options.adapters[:1]
        )
    )
    cells += itertools.product(
        options.trainers, options.precisions[:1], options.optimizers[:1], options.adapters[1:]
    )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", help="folder, hub id or `embedded`")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help="default: all, but bf16 autocast only where the processor computes in it",
    )
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "residual_smollm2.json")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    if options.precisions is None:
        fast = torch.cuda.is_available() or cpu_computes_bfloat16()
        options.precisions = [p for p in PRECISIONS if fast or p != "bf16_autocast"]
    cells: list[dict[str, Any]] = []
    if options.output.is_file() and not options.overwrite:
        cells = json.loads(options.output.read_text())["cells"]
    done = {(c["trainer"], c["precision"], c["optimizer"], c["adapter"]) for c in cells}
    for cell in wanted(options):
        if cell in done:
            continue
        cells.append(measure(cell, options))
        print(f"{' x '.join(cell)}: {cells[-1]['residual']:.1e}", flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report = {**common.environment(device), "steps": options.steps, "cells": cells}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(cells))


if __name__ == "__main__":
    main()
