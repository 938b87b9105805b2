"""What can be wrong with a recipe, looked for before anything is measured, trained or deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_ogpsa.compare_settings import check_safety
from lora_ogpsa.errors import ConfigError, one_line
from lora_ogpsa.evaluation.measures import check_measure
from lora_ogpsa.export.empty_model import empty_model
from lora_ogpsa.recipe import Recipe, Stage
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
    """Make the recipe's adapters on a model without memory, and what would train them.

    Args:
        recipe: the recipe.
        config: of its model.

    Raises:
        ConfigError: PEFT refuses the settings, or an optimizer or a schedule cannot be made.
        AdapterError: a contrast adapter does not suit the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    contrasts = {recipe.contrast if arm == "ogpsa" else None for arm in recipe.arms}
    for contrast in contrasts:
        model = with_empty_adapter(empty_model(config), recipe, contrast=contrast)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                f"{recipe.source}: TRL does not train an adapter of `lm_head`, since it reads its "
                "weights directly. Leave it out of `lora_target_modules`."
            )
        for stage in recipe.stages:
            _check_optimizer(stage, training_arguments(stage, recipe.output_dir), model)


def _check_optimizer(stage: Stage, arguments: Any, model: Any) -> None:
    """Make a stage's optimizer and schedule; most of their libraries and settings show only then.

    Raises:
        ConfigError: a library is not installed, or they refuse their settings.
    """
    import torch
    from transformers import Trainer, get_scheduler

    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            return  # a factory, which wants the model itself
        # Some bring the parameters with them; any will do here.
        own = {k: v for k, v in settings.items() if k not in ("params", "model", "optimizer_dict")}
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=kind([torch.nn.Parameter(torch.zeros(1))], **own),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"stage `{stage.name}`: its optimizer or schedule cannot be made: {one_line(error)}"
        ) from error


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
