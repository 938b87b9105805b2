"""What can be wrong with a recipe, looked for before anything is measured, trained or deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_ogpsa.compare_settings import check_safety
from lora_ogpsa.errors import ConfigError, one_line
from lora_ogpsa.evaluation.measures import check_measure
from lora_ogpsa.export.empty_model import empty_model
from lora_ogpsa.recipe import Recipe
from lora_ogpsa.stages import training_arguments, with_empty_adapter

Here = Callable[[str], bool]


def check_arguments(recipe: Recipe) -> None:
    """Make every stage's training arguments.

    Raises:
        ConfigError: TRL or transformers refuse them.
    """
    for stage in recipe.stages:
        training_arguments(stage, recipe.output_dir)


def check_adapters(recipe: Recipe, config: Any) -> None:
    """Make the recipe's adapters on a model without memory.

    Args:
        recipe: the recipe.
        config: of its model.

    Raises:
        ConfigError: PEFT refuses the settings.
        AdapterError: a contrast adapter does not suit the model.
    """
    contrasts = {recipe.contrast if arm == "ogpsa" else None for arm in recipe.arms}
    for contrast in contrasts:
        with_empty_adapter(empty_model(config), recipe, contrast=contrast)


def check_data(recipe: Recipe, tokenizer: Any | None, here: Here = lambda _: True) -> None:
    """Read the references and what is measured on, and set up the judges.

    Args:
        recipe: the recipe.
        tokenizer: encodes the references; without it they are only read.
        here: whether the data set of a name is to be read, for what must not go to the hub.

    Raises:
        DataError: a file is missing, or its rows lack fields.
        ConfigError: a judge does not exist or cannot answer what is asked, or
            ``compare: safety:`` is not measured.
        ModelError: a judge's model is not there.
    """
    protected = [stage for stage in recipe.stages if stage.ogpsa is not None]
    for reference in dict.fromkeys(r for stage in protected for r in stage.references):
        if here(reference.data):
            reference.check(tokenizer)
    if recipe.evaluation is None:
        return
    measured = {
        name: check_measure(recipe.evaluation, name, spec)
        for name, spec in recipe.evaluation.measures.items()
        if not isinstance(spec.data, str) or here(spec.data)
    }
    check_safety(recipe.comparison, measured)


def check_hub(recipe: Recipe) -> None:
    """Ask the hub who is uploading, where a stage uploads.

    Raises:
        ConfigError: the hub cannot be reached, or does not know the user.
    """
    from huggingface_hub import HfApi

    for stage in recipe.stages:
        if stage.argument("push_to_hub"):
            try:
                HfApi().whoami(token=stage.argument("hub_token"))
            except Exception as error:  # the hub's client and its transport share no base
                raise ConfigError(
                    f"stage `{stage.name}`: `push_to_hub` cannot work: {one_line(error)}"
                ) from error
