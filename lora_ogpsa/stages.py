"""One stage of a recipe: from a model and rows to a trained adapter on disk."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_ogpsa.checkpoints import check_checkpoint, last_checkpoint
from lora_ogpsa.console import StepDisplay, StopAtNonFinite, err
from lora_ogpsa.contrast_config import ContrastConfig
from lora_ogpsa.errors import ConfigError, ModelError, OGPSAError, one_line
from lora_ogpsa.export.folder import staged_folder
from lora_ogpsa.export.model_files import read_json
from lora_ogpsa.export.quantisation import RUN_FILE, describe_quantisation
from lora_ogpsa.models import cache_dir, load_model
from lora_ogpsa.recipe import Recipe, Stage, training_class
from lora_ogpsa.stage_data import check_batches, training_rows
from lora_ogpsa.training_record import PointSaver, StepRecorder, point_steps

TRAINING_FILE = "training.json"
# A module's name, dots included, and no regular expression of one.
_NAME = re.compile(r"[\w.-]+")


@dataclass
class Trained:
    """A trained model in memory.

    Args:
        model: the PEFT model, its adapter switched on.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any


def load_base(recipe: Recipe) -> tuple[Any, Any]:
    """The recipe's model and tokenizer.

    Raises:
        ModelError: they cannot be loaded.
    """
    given = recipe.model
    return load_model(
        given["model_name_or_path"],
        load_in_4bit=given["load_in_4bit"],
        dtype=given["dtype"],
        bnb_4bit_quant_type=given["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=given["use_bnb_nested_quant"],
    )


def load_trained(recipe: Recipe, adapter: Path) -> Trained:
    """The recipe's model with an adapter that an earlier stage or run has saved.

    Raises:
        ModelError: model or adapter cannot be loaded.
    """
    model, tokenizer = load_base(recipe)
    return Trained(with_adapter(model, adapter, trainable=False), tokenizer)


def with_adapter(model: Any, adapter: Path, *, trainable: bool) -> Any:
    """`model` with a saved adapter on it.

    Raises:
        ModelError: the adapter cannot be loaded.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter {adapter}: {one_line(error)}") from error


def read_record(path: Path) -> dict[str, Any]:
    """One of the JSON files that are saved with an adapter or a merged model.

    Raises:
        ExportError: it is damaged.
    """
    return read_json(path, f"Delete {path.parent} and repeat the command with --resume.")


def lora_config(recipe: Recipe) -> Any:
    """PEFT's settings of the adapter, by TRL's own translation."""
    from trl import ModelConfig, get_peft_config

    settings = get_peft_config(ModelConfig(**{**recipe.model, "use_peft": True}))
    # TRL unpacks a list of one name, and PEFT takes a text for a regular expression of the whole
    # path of a module (or, of those to save, for a list of letters).
    targets = settings.target_modules
    if isinstance(targets, str) and targets.lower() != "all-linear" and _NAME.fullmatch(targets):
        settings.target_modules = {targets}
    if isinstance(settings.modules_to_save, str):
        settings.modules_to_save = [settings.modules_to_save]
    return settings


def with_empty_adapter(model: Any, recipe: Recipe, *, contrast: ContrastConfig | None) -> Any:
    """`model` with an untrained adapter of the recipe's shape.

    Args:
        model: the base, or its like on the meta device.
        recipe: whose adapter it is.
        contrast: of a contrast adapter; ``None`` for a usual one.

    Raises:
        ConfigError: PEFT refuses the settings, or a module to be saved is not there.
        AdapterError: a contrast adapter does not suit the model.
    """
    from peft import get_peft_model

    from lora_ogpsa.contrast import contrast_adapter

    names = [name for name, _ in model.named_modules()]
    try:
        settings = lora_config(recipe)
        if contrast is None:
            adapted = get_peft_model(model, settings)
        else:
            adapted = contrast_adapter(model, contrast, settings)
    except OGPSAError:
        raise
    except (ValueError, TypeError, re.error) as error:
        raise ConfigError(
            f"{recipe.source}: the adapter's settings are refused: {one_line(error)}"
        ) from error
    for wanted in settings.modules_to_save or ():
        if not any(name.endswith(wanted) for name in names):
            raise ConfigError(
                f"{recipe.source}: `lora_modules_to_save` names `{wanted}`, and the model has no "
                "module whose name ends so."
            )
    return adapted


def training_arguments(stage: Stage, folder: Path) -> Any:
    """TRL's arguments of a stage.

    Raises:
        ConfigError: TRL or transformers refuse them, or what they report to is not installed.
    """
    import torch
    from transformers.integrations import get_reporting_integration_callbacks

    given = {
        **stage.training,
        "output_dir": str(folder),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    if not torch.accelerator.is_available():
        given["use_cpu"] = True
        given.setdefault("dataloader_pin_memory", False)
        if not given.get("fp16"):
            given.setdefault("bf16", cpu_computes_bfloat16())
    try:
        arguments = training_class(stage.trainer)(**given)
        reports = get_reporting_integration_callbacks(arguments.report_to)
        _check_listed(arguments)
        _check_together(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"stage `{stage.name}`: the training arguments are refused: {one_line(error)}"
        ) from error
    try:
        for report in reports:
            report()  # that it is not installed it says when it is made
    except (RuntimeError, ImportError) as error:
        raise ConfigError(
            f"stage `{stage.name}`: nothing can be reported as `report_to` asks: {one_line(error)}"
        ) from error
    return arguments


def _check_listed(arguments: Any) -> None:
    """Check what has to be one of a few names by TRL's own lists; it does so only in its trainers.

    Raises:
        ValueError: one is not listed.
    """
    for name, field in arguments.__dataclass_fields__.items():
        listed = field.metadata.get("choices")
        if listed is None and name == "loss_type":
            listed = re.findall(r"'(\w+)'", field.metadata.get("help", ""))
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if listed and value is not None and value not in listed:
                raise ValueError(f"there is no `{name}` {value!r}, but {', '.join(listed)}")


def _check_together(arguments: Any) -> None:
    """Check what needs something else, which shows only when a trainer is made or trains.

    Raises:
        ValueError: it is not so.
        ImportError: a library is not installed.
    """
    import torch
    from transformers.utils import is_liger_kernel_available

    packing = getattr(arguments, "packing", None)  # DPO cannot
    longest, losses = arguments.max_length, arguments.loss_type
    if packing and longest is None:
        raise ValueError("`packing` fills sequences of `max_length` tokens, and that is null")
    if packing is False and arguments.padding_free and longest is not None:
        raise ValueError(
            "`padding_free` cuts nothing to `max_length`; set it to null, or `packing`"
        )
    if packing is None and arguments.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError("`train_sampling_strategy` goes by one length, and a pair has two answers")
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise ValueError("`dataloader_persistent_workers` needs a `dataloader_num_workers` above 0")
    if "exo_pair" in losses and not arguments.label_smoothing:
        raise ValueError("the loss `exo_pair` needs a `label_smoothing` above 0, such as 1e-3")
    if arguments.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("`activation_offloading` is off the memory of a GPU, and there is none")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("`use_liger_kernel` needs the package liger-kernel, not installed here")


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is slower than float32."""
    import torch

    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def train_stage(
    recipe: Recipe,
    stage: Stage,
    base: tuple[Any, Any],
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    protected: bool,
    start: Path | None = None,
    resume: bool = False,
    points: int = 0,
    title: str = "training",
) -> Trained:
    """Train a stage and save its adapter as ``folder/adapter``, whole or not at all.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        base: a freshly loaded model, which is changed, and its tokenizer.
        rows: the stage's data, checked.
        folder: of the stage; the Trainer's checkpoints lie in it too.
        protected: with the stage's OGPSA settings, or plainly.
        start: adapter to go on training; ``None`` starts a new one.
        resume: go on from the Trainer's last checkpoint in `folder`, if there is one.
        points: at how many evenly spaced steps the adapter is saved, the last one included;
            checkpoints are then made at the same steps. 0 saves the trained adapter only.
        title: what the progress bar says.

    Raises:
        DataError: the training data cannot be used.
        ConfigError: the settings are refused by TRL.
        StateError: the checkpoint to go on from is damaged.
        TrainingError: the loss is no longer finite.
    """
    began = time.monotonic()
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    model, tokenizer = base
    arguments = training_arguments(stage, folder)
    contrast = None
    if start is not None:
        model, contrast = _continued(model, start)
    elif protected and stage.ogpsa is not None and recipe.contrast is not None:
        contrast = recipe.contrast
        model = _with_contrast(recipe, stage, model, tokenizer, rows)
    fresh = start is None and contrast is None
    rows = training_rows(stage, rows, model, tokenizer)
    if points:
        arguments.save_total_limit = arguments.save_total_limit or 1
    display = StepDisplay(title)
    trainer = _trainer(recipe, stage, arguments, model, tokenizer, rows, fresh=fresh)
    trainer.add_callback(display)
    trainer.add_callback(StopAtNonFinite())
    protection = None
    if protected and stage.ogpsa is not None:
        from lora_ogpsa.callback import OGPSACallback

        protection = OGPSACallback(stage.ogpsa, list(stage.references), cache=cache_dir())
        protection.attach(trainer)
    recorder = StepRecorder(folder, protection)
    trainer.add_callback(recorder)
    if points:
        trainer.add_callback(PointSaver(folder, points))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        display.close()
    ended = time.monotonic()
    first = display.began or ended
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # DPO's frozen copy of the adapter it began with
    trainer.model.eval()
    projection = recorder.projection
    beside = recorder.passes + (projection or 0.0)
    record = {
        "steps": trainer.state.global_step,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "rows": len(rows),
        "seconds": {
            "preparation": round(first - began, 2),
            "training": round(ended - first - beside, 2),
            "reference_passes": round(recorder.passes, 2),
            # On a GPU it cannot be told from the training, and is part of it.
            **({} if projection is None else {"projection": round(projection, 3)}),
        },
        "peak_bytes": recorder.memory,
        "points": point_steps(trainer.state.global_step, points) if points else [],
        "log": trainer.state.log_history,
    }
    facts = _facts(recipe, stage, trainer.model, record, contrast, protected=protected)
    _save(trainer.model, tokenizer, folder, record, facts)
    return Trained(trainer.model, tokenizer)


def _trainer(
    recipe: Recipe,
    stage: Stage,
    arguments: Any,
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    *,
    fresh: bool,
) -> Any:
    """TRL's trainer, its adapter in float32.

    TRL turns adapters on 4-bit models into bfloat16, whose steps are too coarse for a projected
    update to stay projected. In float32 they cost four bytes a parameter, and the parameters are
    few.

    Raises:
        ConfigError: TRL refuses the settings.
        DataError: nothing is left to train on.
    """
    import datasets
    from transformers import PrinterCallback
    from trl import DPOTrainer, SFTTrainer

    exact = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not fresh and parameter.requires_grad
    }
    try:
        trainer = {"sft": SFTTrainer, "dpo": DPOTrainer}[stage.trainer](
            model=model,
            args=arguments,
            # A table of fixed columns gives every tool call the arguments of all, as None.
            train_dataset=datasets.Dataset.from_list(rows, on_mixed_types="use_json"),
            processing_class=tokenizer,
            peft_config=lora_config(recipe) if fresh else None,
        )
    except (ValueError, ImportError, NotImplementedError, OSError) as error:
        # What fails on the machine has a number, and no setting is to blame; the hub's have none.
        if getattr(error, "errno", None) is not None:
            raise
        raise ConfigError(
            f"stage `{stage.name}`: TRL refuses the settings: {one_line(error)}"
        ) from error
    check_batches(stage, len(trainer.train_dataset))
    trainer.remove_callback(PrinterCallback)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = exact.get(name, parameter.data).float()
    return trainer


def _continued(model: Any, start: Path) -> tuple[Any, ContrastConfig | None]:
    """`model` with the adapter of an earlier stage, and how it was set if not as usual."""
    from lora_ogpsa.contrast import freeze_contrast

    model = with_adapter(model, start, trainable=True)
    facts = read_record(start / RUN_FILE)
    if facts.get("contrast") is None:
        return model, None
    freeze_contrast(model)
    return model, ContrastConfig(**facts["contrast"])


def _with_contrast(
    recipe: Recipe, stage: Stage, model: Any, tokenizer: Any, rows: list[dict[str, Any]]
) -> Any:
    """`model` with an adapter set from the stage's prompts and its references."""
    from lora_ogpsa.contrast import get_contrast_model

    return get_contrast_model(
        model,
        rows,
        stage.references,
        recipe.contrast,
        processing_class=tokenizer,
        max_length=stage.argument("max_length") or tokenizer.model_max_length,
        lora_config=lora_config(recipe),
        cache=cache_dir(),
        progress=err.is_terminal,
    )


def _facts(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    record: dict[str, Any],
    contrast: ContrastConfig | None,
    *,
    protected: bool,
) -> dict[str, Any]:
    """What the adapter's model card and later stages are told of its training."""
    return {
        "base": recipe.model["model_name_or_path"],
        "dtype": recipe.model["dtype"],
        "data": stage.dataset_name,
        "ogpsa": stage.acting.to_dict() if protected and stage.acting is not None else None,
        "contrast": None if contrast is None else contrast.to_dict(),
        "training": {"trainer": stage.trainer, **stage.training, "steps": record["steps"]},
        "quantisation": describe_quantisation(model),
    }


def _save(
    model: Any, tokenizer: Any, folder: Path, record: dict[str, Any], facts: dict[str, Any]
) -> None:
    with staged_folder(folder / "adapter") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / RUN_FILE, facts)
        write_json(partial / TRAINING_FILE, record)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a YAML file whole or not at all, its keys in the given order."""
    write_text(path, as_yaml(content))


def as_yaml(content: Any) -> str:
    """YAML text, its keys in the given order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
