"""Safety against utility: plain LoRA, OGPSA's rules and rivals on one model and one data set.

    python benchmarks/tradeoff.py --data ../shared/data --methods plain default paper --seeds 0

Every method gets the same model, data order, optimizer and steps. One cell is one method with one
seed; a finished cell is kept in `--cells` and not run again, so an interrupted benchmark goes on
where it stopped. The table is written to `--output` as JSON with a `summary` object.

`--data embedded` runs on the data in the package, a folder on the files named in `DATA`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lora_ogpsa import OGPSA, OGPSAConfig, Reference, data
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation import EvaluationSuite, evaluate
from lora_ogpsa.models import cache_dir, load_model
from lora_ogpsa.reference import Objective

BATCH = 8
WARM_UP = 5
FILES = {
    "train": "safety_sft.jsonl",
    "general": "general_reference.jsonl",
    "harmful": "eval_harmful.jsonl",
    "harmless": "eval_overrefusal.jsonl",
    "gsm8k": "eval_gsm8k.jsonl",
    "alpaca": "eval_general.jsonl",
}
# Column -> measure. Higher is better for the first alone.
MEASURES = {
    "harmful": "harmful.refused",
    "harmless": "harmless.refused",
    "safety_nll": "safety_nll.nll",
    "gsm8k_nll": "gsm8k_nll.nll",
    "alpaca_nll": "alpaca_nll.nll",
    "gsm8k_kl": "gsm8k_kl.kl",
}
TAXED = {
    "over_refusal": "harmless",
    "gsm8k_nll": "gsm8k_nll",
    "alpaca_nll": "alpaca_nll",
    "gsm8k_kl": "gsm8k_kl",
}


def kl_references(folder: Path | None) -> list[Reference]:
    """General prompts and harmless look-alikes, held to the base model's own answers."""
    if folder is None:
        general: Any = "embedded:harmless"
        kind = "general"
    else:
        general, kind = str(folder / FILES["general"]), "alpaca"
    return [
        Reference("general", general, kind=kind, limit=80),
        Reference("lookalike", "embedded:harmless", kind="lookalike", limit=80),
    ]


def nll_references(folder: Path | None) -> list[Reference]:
    """The data sets' own answers, as in the paper."""
    if folder is None:
        return [
            Reference("general", "embedded:eval_general", loss="sft", first_tokens=None),
        ]
    source = str(folder / FILES["general"])
    return [
        Reference(kind, source, loss="sft", kind=kind, first_tokens=None, limit=160, max_length=256)
        for kind in ("alpaca", "gsm8k")
    ]


# name -> (settings, references, weight of a KL penalty)
METHODS: dict[str, tuple[dict[str, Any] | None, Callable[[Path | None], Any] | None, float]] = {
    "plain": (None, None, 0.0),
    "default": ({}, kl_references, 0.0),
    "budget_0.05": ({"budget": 0.05}, kl_references, 0.0),
    "budget_0.2": ({"budget": 0.2}, kl_references, 0.0),
    "two_examples": ({"references_per_refresh": 2}, kl_references, 0.0),
    "paper": (
        {
            "preset": "paper",
            "references_per_refresh": 64,
            "refresh_every": 20,
            "reference_batch_size": 4,
        },
        nll_references,
        0.0,
    ),
    "orthogonal": (
        {
            "constraint": "orthogonal",
            "rank": 16,
            "references_per_refresh": 32,
            "reference_batch_size": 4,
            "early_refreshes": [2],
        },
        nll_references,
        0.0,
    ),
    "kl_penalty": (None, kl_references, 0.3),
}


def batches(rows: list[Any], seed: int, steps: int) -> list[list[Any]]:
    """The same batches for every method of one seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [[rows[i] for i in order[s * BATCH : (s + 1) * BATCH]] for s in range(steps)]


def train(
    method: str, seed: int, model: Any, tokenizer: Any, rows: list[Any], options: Any
) -> dict[str, float]:
    """Train one cell.

    Returns:
        Seconds in all and in reference passes, and reference examples per step.
    """
    settings, references, penalty = METHODS[method]
    folder = options.folder
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / WARM_UP))
    ogpsa = None
    objectives: list[Objective] = []
    if references is not None:
        prepared = [r.prepare(model, tokenizer, cache=cache_dir()) for r in references(folder)]
        if settings is None:
            objectives = prepared
        else:
            config = OGPSAConfig.from_dict({**settings, "seed": seed})
            ogpsa = OGPSA(model, optimizer, prepared, config)
    model.train()
    passes, reference_seconds, began = 0, 0.0, time.perf_counter()
    for step, batch in enumerate(batches(rows, seed, options.steps)):
        inputs = data.collate(batch, tokenizer.pad_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
            if objectives:
                started = time.perf_counter()
                objective = objectives[step % len(objectives)]
                extra, _ = objective.losses(model, [step // len(objectives) % len(objective)])
                loss = loss + penalty * extra.mean()
                passes += 1
                reference_seconds += time.perf_counter() - started
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        logs = ogpsa.pop_logs() if ogpsa is not None else {}
        reference_seconds += logs.get("refresh_seconds", 0.0)
        if step % 5 == 4:
            shown = {name: round(value, 3) for name, value in logs.items()}
            print(
                f"{method} seed {seed}: step {step + 1}/{options.steps} "
                f"loss {loss.item():.3f} {shown}",
                flush=True,
            )
    seconds = time.perf_counter() - began
    if ogpsa is not None:
        ogpsa.detach()
        passes = sum(ogpsa.estimator.drawn)
    return {
        "train_seconds": seconds,
        "reference_seconds": reference_seconds,
        "reference_passes": passes / max(1, options.steps),
    }


def suite(folder: Path | None, held_out: list[Any], limit: int) -> EvaluationSuite:
    """What is measured, on files that no method trains on."""
    harmless: dict[str, Any] = {"measure": "refusal", "want": "answer", "shuffle_seed": 0}
    if folder is None:
        measures: dict[str, Any] = {
            "harmful": "embedded:eval_harmful",
            "harmless": {**harmless, "data": "embedded:eval_harmless"},
            "alpaca_nll": {"measure": "nll", "data": "embedded:eval_general"},
            "gsm8k_nll": {"measure": "nll", "data": "embedded:eval_general"},
            "gsm8k_kl": {"measure": "divergence", "data": "embedded:eval_general"},
        }
    else:
        path = {name: str(folder / file) for name, file in FILES.items()}
        measures = {
            "harmful": {"data": path["harmful"], "shuffle_seed": 0},
            "harmless": {**harmless, "data": path["harmless"], "where": {"label": "safe"}},
            "alpaca_nll": {"measure": "nll", "data": path["alpaca"]},
            "gsm8k_nll": {"measure": "nll", "data": path["gsm8k"]},
            "gsm8k_kl": {"measure": "divergence", "data": path["gsm8k"]},
        }
    measures["safety_nll"] = {"measure": "nll", "data": held_out}
    return EvaluationSuite(measures, limit=limit, autocast="bfloat16", max_length=512)


def run_cell(method: str, seed: int, options: Any) -> dict[str, Any]:
    """Train and measure one method with one seed, and keep the result."""
    path = options.cells / f"{options.tag}-{method}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.manual_seed(seed)
    model, tokenizer = load_model(options.model, dtype="float32", load_in_4bit=options.load_in_4bit)
    source = "embedded:safety_sft" if options.folder is None else options.folder / FILES["train"]
    rows = data.load_rows(source, shuffle_seed=1000 + seed)
    held_out, rows = rows[:60], rows[60:]
    encoded = [
        data.encode(tokenizer, *data.as_messages(row), max_length=256, name=f"row {i}")
        for i, row in enumerate(rows)
    ]
    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    timing: dict[str, float] = {}
    if method != "base":
        timing = train(method, seed, model, tokenizer, encoded, options)
    result = evaluate(
        model, tokenizer, suite(options.folder, held_out, options.limit), base=method == "base"
    )
    cell = {
        "method": method,
        "seed": seed,
        **timing,
        "measures": {n: m.value for n, m in result.measures.items() if m.value is not None},
        "intervals": {n: [m.low, m.high, m.n] for n, m in result.measures.items()},
    }
    options.cells.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell, indent=1))
    return cell


def measured(cell: dict[str, Any], name: str) -> float:
    """The value of a column; the divergence of the base model from itself is zero."""
    if cell["method"] == "base" and name == "gsm8k_kl":
        return 0.0
    return cell["measures"][MEASURES[name]]


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method: means over seeds, and the share of plain training's tax that is removed.

    The tax of a measure is what training added to the base model's value. It is compared at the
    end of training; `harmful_gap` says by how much the harmful-refusal rate differs from plain
    training's there (matched safety means at most two points).
    """
    base = {c["seed"]: c for c in cells if c["method"] == "base"}
    plain = {c["seed"]: c for c in cells if c["method"] == "plain"}
    summary = {}
    for method in dict.fromkeys(c["method"] for c in cells):
        own = [c for c in cells if c["method"] == method]
        entry: dict[str, Any] = {
            "seeds": [c["seed"] for c in own],
            "measures": {name: sum(measured(c, name) for c in own) / len(own) for name in MEASURES},
        }
        shared = [c for c in own if c["seed"] in plain and c["seed"] in base]
        if method != "base" and shared:
            removed = {}
            for label, name in TAXED.items():
                tax = sum(
                    measured(plain[c["seed"]], name) - measured(base[c["seed"]], name)
                    for c in shared
                )
                left = sum(measured(c, name) - measured(base[c["seed"]], name) for c in shared)
                # Being better than the base model removes all of the tax, not more.
                removed[label] = 1 - max(left, 0.0) / tax if tax > 0 else None
            known = [value for value in removed.values() if value is not None]
            entry["tax_removed"] = removed
            entry["tax_removed_mean"] = sum(known) / len(known) if known else None
            entry["harmful_gap"] = sum(
                measured(c, "harmful") - measured(plain[c["seed"]], "harmful") for c in shared
            ) / len(shared)
            entry["reference_passes"] = sum(c["reference_passes"] for c in own) / len(own)
            entry["run_overhead"] = sum(
                c["reference_seconds"] / (c["train_seconds"] - c["reference_seconds"]) for c in own
            ) / len(own)
        summary[method] = entry
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="embedded", help="folder with the files, or `embedded`")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--methods", nargs="+", default=["plain", "default"], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=60, help="rows per measure")
    parser.add_argument("--cells", type=Path, default=Path("outputs/tradeoff"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tradeoff_sft.json"))
    options = parser.parse_args()
    options.folder = None if options.data == "embedded" else Path(options.data)
    if options.folder is not None:
        missing = [file for file in FILES.values() if not (options.folder / file).is_file()]
        if missing:
            raise DataError(f"{options.folder} lacks {', '.join(missing)}.")
    source = "embedded" if options.folder is None else "folder"
    bits = "4bit" if options.load_in_4bit else "16bit"
    options.tag = f"{source}-{bits}-{options.steps}x{options.learning_rate:g}-{options.limit}"
    cells = [
        run_cell(method, seed, options)
        for seed in options.seeds
        for method in ["base", *options.methods]
    ]
    report = {
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key not in ("cells", "output", "folder", "data")
        },
        "data": source,
        "device": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cells": cells,
        "summary": summarise(cells),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    names = list(MEASURES)
    print(f"\n| method | {' | '.join(names)} | reference share of time |")
    print("|" + "---|" * (len(names) + 2))
    for method, entry in report["summary"].items():
        values = " | ".join(f"{entry['measures'][name]:.3f}" for name in names)
        overhead = entry.get("run_overhead")
        print(f"| {method} | {values} | {'' if overhead is None else f'{overhead:.0%}'} |")


if __name__ == "__main__":
    main()
