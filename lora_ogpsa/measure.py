"""Evaluating a saved model or adapter, and in which precision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_ogpsa.errors import ExportError, ModelError
from lora_ogpsa.evaluation import EvaluationResult, EvaluationSuite
from lora_ogpsa.evaluation import evaluate as evaluate_model
from lora_ogpsa.evaluation.measures import check_measure
from lora_ogpsa.export.empty_model import embedding_rows
from lora_ogpsa.export.model_files import read_json
from lora_ogpsa.export.quantisation import RUN_FILE, Quantisation
from lora_ogpsa.export.sources import (
    ADAPTER_CONFIG,
    adapter_folder,
    adapter_weights,
    named_base,
)
from lora_ogpsa.models import EMBEDDED, checked_source, load_model
from lora_ogpsa.recipe import Recipe, load_recipe
from lora_ogpsa.stages import cpu_computes_bfloat16, with_adapter
from lora_ogpsa.strength import at_strength

BASE = "base"  # heading of the base model's column


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

    Both are asked through the adapter's tokenizer where one is saved with it, as `merge` takes it:
    training may have added a chat template or tokens.

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
    # Beforehand, so that a missing file of the last measure is known before hours of the others.
    for measure, spec in suite.measures.items():
        check_measure(suite, measure, spec)
    adapter = _adapter_folder(name)
    if adapter is None:
        if weights:
            raise ModelError(f"{name} is no adapter folder: there is nothing to apply at a weight.")
        model, tokenizer = load_model(name, load_in_4bit=bool(load_in_4bit))
        return {name: evaluate_model(model, tokenizer, suite, base=True)}
    base, dtype, quantisation = _training_of(adapter)
    if load_in_4bit is None:
        load_in_4bit = quantisation is not None
    chosen = quantisation or Quantisation()
    model, tokenizer = load_model(
        base,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        bnb_4bit_quant_type=chosen.quant_type,
        bnb_4bit_use_double_quant=chosen.double_quant,
        tokenizer_folder=adapter if (adapter / "tokenizer_config.json").is_file() else None,
    )
    _resize(model, adapter)
    model = with_adapter(model, adapter, trainable=False)
    heading = _heading(name)
    columns = {}
    # Beforehand, so that a wrong weight is known before hours of evaluation.
    for weight in weights:
        with at_strength(model, weight):
            pass
    columns[BASE] = evaluate_model(model, tokenizer, suite, base=True)
    for weight in weights:
        with at_strength(model, weight):
            columns[f"{heading} x {weight:g}"] = evaluate_model(model, tokenizer, suite)
    if not weights:
        columns[heading] = evaluate_model(model, tokenizer, suite)
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


def _adapter_folder(name: str) -> Path | None:
    """The folder of an adapter, downloaded if `name` is its hub id; `None` if it is a model's."""
    from transformers.utils import find_adapter_config_file

    try:
        # A model's hub id is none of an adapter, and its files are not wanted here.
        hub_id = name.count("/") == 1 and not Path(name).exists()
        if hub_id and find_adapter_config_file(name) is None:
            return None
        return adapter_folder(name)
    except (OSError, ValueError, ExportError):  # also what the hub's client raises of odd names
        return None  # loading the model says what is wrong


def _heading(name: str) -> str:
    """What the column of an adapter is called: the folder's name, but never as its base's is."""
    found = Path(os.path.abspath(name)).name
    return f"adapter {found}" if found == BASE else found


def _resize(model: Any, adapter: Path) -> None:
    """Give `model` as many tokens as the embeddings that were saved with the adapter, if any."""
    rows = embedding_rows(model, [adapter_weights(adapter)])
    if rows is None or rows == model.get_input_embeddings().num_embeddings:
        return
    # Seeded: the base has no such tokens, and is to be the same model every time.
    with torch.random.fork_rng([] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)


def _training_of(adapter: Path) -> tuple[str, str, Quantisation | None]:
    """The base that an adapter names, its dtype in training and how it was quantised, if known."""
    base = named_base(adapter, read_json(adapter / ADAPTER_CONFIG))
    if not base:
        raise ModelError(f"{adapter} does not name its base model in {ADAPTER_CONFIG}")
    if base != EMBEDDED:
        try:
            checked_source(base)
        except ModelError as error:
            raise ModelError(
                f"{error}. {adapter} names this base in {ADAPTER_CONFIG} as "
                "`base_model_name_or_path`: put it back, or change the name there."
            ) from error
    record = read_json(adapter / RUN_FILE) if (adapter / RUN_FILE).is_file() else {}
    quantisation = Quantisation.from_config(record.get("quantisation") or {})
    dtype = record.get("dtype") or (quantisation and quantisation.load_dtype) or "auto"
    return base, dtype, quantisation
