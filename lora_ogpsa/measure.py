"""Evaluating a saved model or adapter, and in which precision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_ogpsa.errors import ModelError
from lora_ogpsa.evaluation import EvaluationResult, EvaluationSuite
from lora_ogpsa.evaluation import evaluate as evaluate_model
from lora_ogpsa.export.quantisation import RUN_FILE, Quantisation
from lora_ogpsa.models import load_model
from lora_ogpsa.recipe import Recipe, load_recipe
from lora_ogpsa.stages import cpu_computes_bfloat16, with_adapter
from lora_ogpsa.strength import at_strength


def _limited(suite: EvaluationSuite, limit: int) -> EvaluationSuite:
    measures = {
        name: replace(spec, limit=min(spec.limit or limit, limit))
        for name, spec in suite.measures.items()
    }
    return replace(suite, limit=limit, measures=measures)


def measure_model(
    name: str,
    *,
    recipe: Path | None = None,
    limit: int | None = None,
    load_in_4bit: bool | None = None,
    weights: Sequence[float] = (),
) -> dict[str, EvaluationResult]:
    """Evaluate a model, or an adapter beside its base.

    Args:
        name: adapter folder, model folder, hub id, or ``embedded``.
        recipe: whose ``evaluation:`` section says what is measured.
        limit: most prompts per measure, those with a limit of their own too.
        load_in_4bit: whether the base is loaded in 4 bits; ``None``: as the adapter was trained.
        weights: how much of the adapter's change is applied, a column each; as it is if none.

    Returns:
        Results by heading.

    Raises:
        OGPSAError: the model cannot be loaded or the measures are wrong.
    """
    suite = None if recipe is None else recipe_suite(load_recipe(recipe))
    suite = suite or quicker(EvaluationSuite.default())
    if limit is not None:
        suite = _limited(suite, limit)
    adapter = Path(name)
    if not (adapter / "adapter_config.json").is_file():
        if weights:
            raise ModelError(f"{name} is no adapter folder: there is nothing to apply at a weight.")
        model, tokenizer = load_model(name, load_in_4bit=bool(load_in_4bit))
        return {name: evaluate_model(model, tokenizer, suite, base=True)}
    base, quantisation = _training_of(adapter)
    if load_in_4bit is None:
        load_in_4bit = quantisation is not None
    chosen = quantisation or Quantisation()
    model, tokenizer = load_model(
        base,
        load_in_4bit=load_in_4bit,
        bnb_4bit_quant_type=chosen.quant_type,
        bnb_4bit_use_double_quant=chosen.double_quant,
    )
    model = with_adapter(model, adapter, trainable=False)
    columns = {}
    # Beforehand, so that a wrong weight is known before hours of evaluation.
    for weight in weights:
        with at_strength(model, weight):
            pass
    columns["base"] = evaluate_model(model, tokenizer, suite, base=True)
    for weight in weights:
        with at_strength(model, weight):
            columns[f"{adapter.name} x {weight:g}"] = evaluate_model(model, tokenizer, suite)
    if not weights:
        columns[adapter.name] = evaluate_model(model, tokenizer, suite)
    return columns


def recipe_suite(recipe: Recipe) -> EvaluationSuite | None:
    """What a recipe measures, in the quicker precision where the recipe does not say."""
    section = recipe.raw.get("evaluation")
    if recipe.evaluation is None or (isinstance(section, dict) and "autocast" in section):
        return recipe.evaluation
    return quicker(recipe.evaluation)


def quicker(suite: EvaluationSuite) -> EvaluationSuite:
    """`suite` in bfloat16 on a CPU that computes it; a GPU's model has its precision already."""
    if torch.accelerator.is_available() or not cpu_computes_bfloat16():
        return suite
    return replace(suite, autocast="bfloat16")


def _training_of(adapter: Path) -> tuple[str, Quantisation | None]:
    """The base that an adapter names, and how it was quantised in training if that is known."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter} does not name its base model in adapter_config.json")
    record: Any = {}
    if (adapter / RUN_FILE).is_file():
        record = json.loads((adapter / RUN_FILE).read_text(encoding="utf-8"))
    if Path(base).is_absolute() and not Path(base).exists():
        base = record.get("base", base)  # the folder of another machine
    return base, Quantisation.from_config(record.get("quantisation") or {})
