"""What is measured, along a run and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tradeoff_data import Source

from lora_ogpsa.evaluation import EvaluationSuite, evaluate

# Column -> measure of the evaluation.
COLUMNS = {
    "harmful": "harmful.refused",
    "over_refusal": "harmless.refused",
    "general_refusal": "ordinary.refused",
    "package_harmful": "package_harmful.refused",
    "package_harmless": "package_harmless.refused",
    "safety_nll": "safety.nll",
    "gsm8k_nll": "gsm8k.nll",
    "alpaca_nll": "alpaca.nll",
    "gsm8k_kl": "gsm8k_kl.kl",
    "alpaca_kl": "alpaca_kl.kl",
    "pair_accuracy": "pairs.reward_right",
    "pairs_ranked": "pairs.ranked_right",
    "mmlu": "mmlu.acc",
    "arc_easy": "arc_easy.acc_norm",
}
# What the tax is counted in; of accuracies, the error.
TAXED = ("over_refusal", "general_refusal", "gsm8k_nll", "alpaca_nll", "gsm8k_kl", "alpaca_kl")
TAXED_AT_END = (*TAXED, "mmlu", "arc_easy")
ACCURACIES = ("mmlu", "arc_easy")
_OPTIONAL = "general_refusals"


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Attributes:
        refusals: prompts per refusal measure.
        likelihoods: rows per likelihood measure.
        divergences: rows per divergence, which takes two passes and varies less between rows.
        choices: multiple-choice questions per data set, at the end of a run; 0 for none.
        new_tokens: length of the answers that are judged.
        general_refusals: ordinary requests per refusal measure; 0 for none.
    """

    refusals: int = 60
    likelihoods: int = 32
    divergences: int = 12
    choices: int = 60
    new_tokens: int = 24
    general_refusals: int = 0

    def identity(self) -> dict[str, int]:
        """JSON values; a measure that is off is not among them, nor in the cells before it."""
        return {name: value for name, value in asdict(self).items() if value or name != _OPTIONAL}


def suite(
    source: Source, limits: Limits, precision: str, *, dpo: bool, final: bool
) -> EvaluationSuite:
    """The measures of one evaluation, all on rows that no method trains on.

    Args:
        source: of the data.
        limits: how much of it.
        precision: of forward passes.
        dpo: measure preference pairs too.
        final: measure multiple choice too.
    """
    refusal: dict[str, Any] = {
        "measure": "refusal",
        "limit": limits.refusals,
        "shuffle_seed": 0,
        "max_new_tokens": limits.new_tokens,
    }
    likelihood = {"limit": limits.likelihoods}
    choices = {"measure": "multiple_choice", "limit": limits.choices, "shuffle_seed": 0}
    held_out = source.safety_rows()[0]
    measures: dict[str, Any] = {
        "safety": {"measure": "nll", "data": held_out, **likelihood},
    }
    if source.folder is None:
        measures["harmful"] = {**refusal, "data": "embedded:eval_harmful", "want": "refuse"}
        measures["harmless"] = {**refusal, "data": "embedded:eval_harmless", "want": "answer"}
        texts = {"alpaca": "embedded:eval_general"}
    else:
        measures["harmful"] = {**refusal, "data": source.path("harmful"), "want": "refuse"}
        measures["harmless"] = {
            **refusal,
            "data": source.path("harmless"),
            "want": "answer",
            "where": {"label": "safe"},
        }
        texts = {name: source.path(name) for name in ("gsm8k", "alpaca")}
        pairs = source.held_out_pairs()
        if dpo:
            measures["pairs"] = {"measure": "preference", "data": pairs, **likelihood}
        if final and limits.choices:
            measures["mmlu"] = {**choices, "data": source.path("mmlu"), "style": "letters"}
            measures["arc_easy"] = {**choices, "data": source.path("arc")}
    if limits.general_refusals:
        limit = {"limit": limits.general_refusals}
        measures["ordinary"] = {**refusal, **limit, "data": texts["alpaca"], "want": "answer"}
    for name, file in texts.items():
        measures[name] = {"measure": "nll", "data": file, **likelihood}
        measures[f"{name}_kl"] = {
            "measure": "divergence",
            "data": file,
            "limit": limits.divergences,
        }
    autocast = None if precision == "float32" else precision
    # A GPU is as fast with large batches as with small ones.
    sizes = {"batch_size": 128, "batch_tokens": 16384} if torch.cuda.is_available() else {}
    return EvaluationSuite(measures, autocast=autocast, max_length=384, **sizes)


def measure(
    model: Any, tokenizer: Any, chosen: EvaluationSuite, *, base: bool, cache: Path
) -> dict[str, Any]:
    """Evaluate a model.

    Returns:
        ``values`` and ``intervals`` ([low, high, n]) by column. The base model's divergence from
        itself is zero.
    """
    result = evaluate(model, tokenizer, chosen, base=base, cache_dir=cache, progress=False)
    values, intervals = {}, {}
    for column, name in COLUMNS.items():
        found = result.measures.get(name)
        if found is not None:
            values[column] = found.value
            intervals[column] = [found.low, found.high, found.n]
        elif base and name.endswith(".kl") and name.split(".")[0] in chosen.measures:
            values[column] = 0.0
    return {"values": values, "intervals": intervals}


def taxed(values: Mapping[str, float], columns: tuple[str, ...] = TAXED) -> dict[str, float]:
    """What the tax is counted in, of which less is better."""
    return {
        name: 1 - values[name] if name in ACCURACIES else values[name]
        for name in columns
        if name in values
    }
