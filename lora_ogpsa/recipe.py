"""Recipes: a flat YAML mapping of TRL's and PEFT's own argument names, parsed and checked."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_ogpsa.compare_settings import CompareSettings, parse_compare
from lora_ogpsa.config import OGPSAConfig, has_likelihood
from lora_ogpsa.contrast_config import ContrastConfig
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.recipe_file import as_mapping, read_recipe_file
from lora_ogpsa.recipe_keys import check_known, defaults, names, take
from lora_ogpsa.recipe_sections import (
    check_unique,
    parse_contrast,
    parse_evaluation,
    parse_ogpsa,
    parse_references,
)

if TYPE_CHECKING:
    from lora_ogpsa.evaluation import EvaluationSuite
    from lora_ogpsa.reference import Reference

Trainer = Literal["sft", "dpo"]
MergeType = Literal["bfloat16", "float16", "float32"]
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_ABOVE_0, _FINITE = math.ulp(0.0), sys.float_info.max
# What the trainers do not check, or only once they train: from, to, and in words.
_RANGES: dict[str, tuple[float, float, str]] = {
    "per_device_train_batch_size": (1, math.inf, "at least 1"),
    "gradient_accumulation_steps": (1, math.inf, "at least 1"),
    "max_length": (1, math.inf, "at least 1"),
    "learning_rate": (_ABOVE_0, _FINITE, "above 0"),
    "num_train_epochs": (_ABOVE_0, _FINITE, "above 0"),
    "save_steps": (_ABOVE_0, _FINITE, "above 0"),
    "beta": (_ABOVE_0, _FINITE, "above 0"),
    "weight_decay": (0, _FINITE, "0 or above"),
    "seed": (0, 2**32 - 1, "from 0 to 4294967295"),
    "data_seed": (0, 2**32 - 1, "from 0 to 4294967295"),
}

# Where a recipe departs from TRL's defaults. Any of them can be set in the recipe;
# docs/recipes.md says why they differ.
_MODEL_DEFAULTS = {
    "dtype": "auto",
    "lora_target_modules": "all-linear",
    "use_bnb_nested_quant": True,
}
_TRAINING_DEFAULTS = {"report_to": "none", "save_strategy": "no"}


@dataclass(frozen=True)
class Stage:
    """One training run: a trainer, its arguments and data, and what protects it.

    Args:
        name: folder name and table heading.
        trainer: ``"sft"`` or ``"dpo"``.
        training: arguments of TRL's ``SFTConfig`` or ``DPOConfig``.
        dataset_name: file, ``embedded:NAME`` or hub id.
        dataset_config: configuration of a hub data set.
        dataset_train_split: split of a hub data set.
        dataset_limit: most rows used, drawn with the stage's seed.
        rejected: for DPO: ``"data"``, the rows are preference pairs; ``"base"``, the rows hold
            good answers only, and what the base model answers is the rejected side.
        rejected_max_new_tokens: length of those answers, in tokens.
        ogpsa: the settings; ``None`` trains plainly.
        references: what must not get worse.
        from_base: whether it trains a new adapter, or goes on with that of the stage before.
    """

    name: str
    trainer: Trainer
    training: dict[str, Any]
    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str | None = None
    dataset_limit: int | None = None
    rejected: Literal["data", "base"] = "data"
    rejected_max_new_tokens: int = 64
    ogpsa: OGPSAConfig | None = None
    references: tuple[Reference, ...] = ()
    from_base: bool = True

    @property
    def acting(self) -> OGPSAConfig | None:
        """The settings as they act on the trainer's loss."""
        if self.ogpsa is None:
            return None
        supervised = self.trainer == "sft"
        likelihood = supervised or has_likelihood(
            self.argument("loss_type"), self.argument("loss_weights")
        )
        return self.ogpsa.acting(
            preferences=not supervised, likelihood=likelihood, from_base=self.from_base
        )

    def argument(self, name: str) -> Any:
        """An argument of the trainer, its default where the recipe is silent."""
        return self.training.get(name, defaults(training_class(self.trainer)).get(name))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        source: what it was read from, for messages.
        raw: the mapping it was made of, overrides included.
        model: fields of TRL's ``ModelConfig``, defaults filled in.
        stages: at least one; each goes on training the adapter of the one before.
        output_dir: folder of everything a run writes.
        contrast: how the adapter's A is set from prompts; ``None`` begins with a usual adapter,
            as a training that nothing protects always does.
        evaluation: what is measured; ``None`` measures nothing.
        compare: repeat the run without projection, for comparison.
        comparison: what ``lora-ogpsa compare`` does.
        merge: dtype of the merged model that is written and verified; ``None`` merges nothing.
    """

    source: str
    raw: dict[str, Any]
    model: dict[str, Any]
    stages: tuple[Stage, ...]
    output_dir: Path
    contrast: ContrastConfig | None = None
    evaluation: EvaluationSuite | None = None
    compare: bool = False
    comparison: CompareSettings = field(default_factory=CompareSettings)
    merge: str | None = None

    @property
    def ogpsa_settings(self) -> dict[str, dict[str, Any] | None]:
        """The settings as they act in each stage, by its name; ``None`` where it trains plainly."""
        acting = {stage.name: stage.acting for stage in self.stages}
        return {n: None if c is None else c.to_dict() for n, c in acting.items()}

    @property
    def arms(self) -> list[str]:
        """The runs to be made: ``"ogpsa"``, ``"plain"`` or both, the recipe's own first."""
        if all(stage.ogpsa is None for stage in self.stages):
            return ["plain"]
        return ["ogpsa", "plain"] if self.compare else ["ogpsa"]

    @property
    def adapter(self) -> str:
        """What is trained, in a few words."""
        usual = f"LoRA rank {self.model['lora_r']}"
        if self.contrast is None or "ogpsa" not in self.arms:
            return usual
        return "contrast adapter" + (f" (plain training: {usual})" if self.compare else "")


@dataclass(frozen=True)
class _RecipeKeys:
    """Keys of the top level that no stage can have, besides those of TRL's ``ModelConfig``."""

    output_dir: str = ""
    contrast: bool | dict = False
    evaluation: Any = None
    compare: bool | dict = False
    merge: bool | MergeType = False
    stages: Any = None


@dataclass(frozen=True)
class _StageKeys:
    """Keys of a stage that are not arguments of its trainer."""

    trainer: str = "sft"
    name: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str | None = None
    dataset_limit: int | None = None
    rejected: Literal["data", "base"] = "data"
    rejected_max_new_tokens: int = 64
    ogpsa: Any = field(default_factory=dict)
    references: Any = None


def load_recipe(
    path: str | Path,
    *,
    overrides: Iterable[str] = (),
    smoke: bool = False,
    output_dir: str | Path | None = None,
) -> Recipe:
    """Read and check a recipe; see `read_recipe_file` for the arguments.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the nearest known one is
            suggested), or a value is wrong.
    """
    raw = read_recipe_file(path, overrides=overrides, smoke=smoke, output_dir=output_dir)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check a recipe that is a mapping already.

    Args:
        raw: the mapping.
        source: what messages call it.

    Raises:
        ConfigError: a key is unknown (the nearest known one is suggested), or a value is wrong.
    """
    from trl import ModelConfig

    given = as_mapping(raw, source)
    overlays, several = _overlays(given.get("stages"), source)
    kinds = [
        _kind(overlay.get("trainer", given.get("trainer", "sft")), source) for overlay in overlays
    ]
    whole = names(_RecipeKeys) | names(ModelConfig)
    shared_keys = set().union(*(_stage_keys(kind) for kind in kinds))
    about = f"with `trainer: {'` and `'.join(dict.fromkeys(kinds))}`"
    check_known(given, whole | shared_keys, source, about=about)
    top = take(given, _RecipeKeys, source)
    model = defaults(ModelConfig) | _MODEL_DEFAULTS | take(given, ModelConfig, source)
    for key, value, hint in (
        ("output_dir", top.get("output_dir"), "a folder"),
        ("model_name_or_path", model["model_name_or_path"], "a folder, a hub id or `embedded`"),
    ):
        if not value:
            raise ConfigError(f"{source}: `{key}` is missing. It names {hint}.")
    stages = []
    for index, (overlay, kind) in enumerate(zip(overlays, kinds, strict=True)):
        place = f"{source}, stages[{index}]" if several else source
        known = _stage_keys(kind)
        check_known(overlay, known, place, elsewhere=whole, about=f"with `trainer: {kind}`")
        own = {k: v for k, v in given.items() if k in known} | overlay
        own.setdefault("name", f"{index + 1}-{kind}" if several else kind)
        stages.append(_stage(own, kind, place, from_base=not index))
    check_unique([stage.name for stage in stages], source)
    compare = top.get("compare", False)
    if compare is not False and all(stage.ogpsa is None for stage in stages):
        raise ConfigError(
            f"{source}: `compare` puts training without projection beside the run, and `ogpsa: "
            "false` leaves nothing to compare with. Leave one of the two out."
        )
    evaluation = parse_evaluation(top.get("evaluation"), f"{source}, evaluation")
    return Recipe(
        source=source,
        raw=dict(raw),
        model=model,
        stages=tuple(stages),
        # As transformers reads it, or checkpoints would lie in another folder than all the rest.
        output_dir=Path(os.path.expanduser(top["output_dir"])),
        contrast=_contrast(top.get("contrast", False), model, f"{source}, contrast"),
        evaluation=evaluation,
        compare=compare is not False,
        comparison=parse_compare(compare, f"{source}, compare", evaluation),
        merge={True: "bfloat16", False: None}.get(merge := top.get("merge", False), merge),
    )


def _contrast(given: Any, model: Mapping[str, Any], place: str) -> ContrastConfig | None:
    """The `contrast:` section, if the adapter's other settings allow it."""
    contrast = parse_contrast(given, place)
    if contrast is not None and model["use_dora"]:
        raise ConfigError(
            f"{place}: DoRA's magnitudes change the layer for every token, which a contrast "
            "adapter is to leave alone. Leave one of the two out."
        )
    return contrast


def _overlays(stages: Any, source: str) -> tuple[list[dict[str, Any]], bool]:
    """What each stage changes, and whether the recipe has a list of stages at all."""
    if stages is None:
        return [{}], False
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{source}: `stages` should be a list of mappings. Found {stages!r}.")
    return [as_mapping(stage, f"{source}, stages[{i}]") for i, stage in enumerate(stages)], True


def training_class(kind: Trainer) -> type:
    """TRL's dataclass of training arguments."""
    from trl import DPOConfig, SFTConfig

    return {"sft": SFTConfig, "dpo": DPOConfig}[kind]


def _kind(value: Any, source: str) -> Trainer:
    if value not in ("sft", "dpo"):
        raise ConfigError(f"{source}: `trainer` should be `sft` or `dpo`. Found {value!r}.")
    kind: Trainer = value
    return kind


def _stage_keys(kind: Trainer) -> set[str]:
    return (names(_StageKeys) | names(training_class(kind))) - {"output_dir"}


def _check_ranges(training: Mapping[str, Any], place: str) -> None:
    for key, (low, high, words) in _RANGES.items():
        value = training.get(key)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{place}: `{key}` should be {words}. Found {value}.")
    steps = training.get("max_steps", -1)
    if steps < 1 and steps != -1:
        raise ConfigError(
            f"{place}: `max_steps` should be at least 1, or -1 to go by `num_train_epochs`. "
            f"Found {steps}."
        )


def _stage(given: dict[str, Any], kind: Trainer, place: str, *, from_base: bool) -> Stage:
    own = take(given, _StageKeys, place)
    training = _TRAINING_DEFAULTS | take(given, training_class(kind), place)
    _check_ranges(training, place)
    if training["save_strategy"] == "best":
        raise ConfigError(
            f"{place}: `save_strategy: best` is not for recipes. Nothing is evaluated during "
            "training that could choose a checkpoint; use `steps` or `epoch`."
        )
    if "save_steps" in training and training["save_strategy"] == "no":
        training["save_strategy"] = "steps"
    if not own.get("dataset_name"):
        raise ConfigError(
            f"{place}: `dataset_name` is missing. It names a file, `embedded:safety_sft`, or a "
            "data set on the hub."
        )
    if _FOLDER_NAME.fullmatch(own["name"]) is None:
        raise ConfigError(f"{place}: `name` becomes a folder's name. Found {own['name']!r}.")
    if own.get("rejected") == "base" and kind != "dpo":
        raise ConfigError(f"{place}: `rejected: base` makes preference pairs, for `trainer: dpo`.")
    for key in ("dataset_limit", "rejected_max_new_tokens"):
        if own.get(key) is not None and own[key] < 1:
            raise ConfigError(f"{place}: `{key}` should be at least 1. Found {own[key]}.")
    settings = {k: v for k, v in own.items() if k not in ("trainer", "ogpsa", "references")}
    return Stage(
        trainer=kind,
        training=training,
        ogpsa=parse_ogpsa(own.get("ogpsa"), f"{place}, ogpsa"),
        references=parse_references(own.get("references"), f"{place}, references"),
        from_base=from_base,
        **settings,
    )
