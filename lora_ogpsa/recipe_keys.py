"""Which keys a recipe may have and of what type, read from the dataclasses that take them."""

from __future__ import annotations

import difflib
import enum
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal

from lora_ogpsa.errors import ConfigError

_ONE_PROCESS = "Recipes run in one process; use OGPSACallback in a script of your own for more."
_ONE_TOKENIZER = (
    "The base model is measured with its tokenizer as it stands; set it in the model's folder."
)
_EVALUATED = "The `evaluation:` section says what is measured, before and after training."
_NO_BEST = "Nothing is evaluated during training that could choose a model."
_NO_REFERENCE_MODEL = (
    "DPO compares with the adapter switched off, or with a frozen copy of it; no model is kept "
    "that could follow."
)

# Keys that TRL's dataclasses have and that another part of the recipe or of the command line
# decides. Obeying them would be surprising, and ignoring them worse.
DECIDED_ELSEWHERE = {
    "use_peft": "Every recipe trains a LoRA adapter; leave the key out.",
    "lora_task_type": "Recipes train causal language models; leave the key out.",
    "resume_from_checkpoint": "Pass --resume on the command line.",
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval"), _EVALUATED
    ),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), _NO_BEST),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _NO_REFERENCE_MODEL
    ),
    "save_only_model": "--resume goes on with the optimizer's state of the last checkpoint.",
    "disable_tqdm": "The command draws its own progress bar.",
    "logging_nan_inf_filter": "A loss that is not finite stops the run and must not be hidden.",
    "dataset_test_split": "The `evaluation:` section names the data that is measured on.",
    "dataset_streaming": "Every row is checked before training, so data sets are read whole.",
    "dataset_text_field": "Rows are read as conversations; docs/recipes.md lists the formats.",
    "dataset_kwargs": "Rows are prepared as conversations; docs/recipes.md lists the formats.",
    "chat_template_path": _ONE_TOKENIZER,
    "eos_token": _ONE_TOKENIZER,
    "model_init_kwargs": "Name the settings themselves, such as `dtype` or `load_in_4bit`.",
    "lora_target_parameters": "Adapters on bare parameters are not supported yet.",
    "load_in_8bit": "A merge cannot reproduce 8-bit layers; use `load_in_4bit`.",
    "bnb_4bit_quant_storage": "4-bit weights are stored as bitsandbytes does by default.",
    "attn_implementation": "The model's default attention is used.",
    "model_revision": "Download the revision and name its folder as `model_name_or_path`.",
    "trust_remote_code": "Only model classes of transformers are loaded.",
    "remove_unused_columns": "The data set is prepared before the trainer sees it.",
    "ignore_bias_buffers": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
}


def names(cls: type) -> set[str]:
    """The fields of a dataclass."""
    return {f.name for f in fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that have a plain default, with it."""
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def check_known(
    given: Mapping[str, Any],
    known: set[str],
    place: str,
    *,
    elsewhere: Iterable[str] = (),
    about: str = "",
) -> None:
    """Refuse keys that nothing understands.

    Args:
        given: the section.
        known: its keys.
        place: where it stands, for the message.
        elsewhere: keys of the recipe's top level, which a section inside it cannot have.
        about: what the section is for, such as "with `trainer: sft`".

    Raises:
        ConfigError: about the first unknown key; it suggests the nearest known one.
    """
    for key in given:
        if key in DECIDED_ELSEWHERE:
            raise ConfigError(f"{place}: `{key}` is not for recipes. {DECIDED_ELSEWHERE[key]}")
        if key in known:
            continue
        if key in elsewhere:
            raise ConfigError(f"{place}: `{key}` belongs to the whole recipe, not to a section.")
        close = difflib.get_close_matches(str(key), sorted(known - DECIDED_ELSEWHERE.keys()), n=1)
        hint = f"Did you mean `{close[0]}`?" if close else "docs/recipes.md lists the keys."
        raise ConfigError(f"{place}: unknown key `{key}`{about and ' ' + about}. {hint}")


def take(given: dict[str, Any], cls: type, place: str) -> dict[str, Any]:
    """Remove the fields of the dataclass `cls` from `given` and return them.

    Raises:
        ConfigError: a value is not of the field's type, or the key is decided elsewhere.
    """
    hints = typing.get_type_hints(cls)
    taken = {}
    for name in [f.name for f in fields(cls) if f.name in given]:
        if name in DECIDED_ELSEWHERE:
            raise ConfigError(f"{place}: `{name}` is not for recipes. {DECIDED_ELSEWHERE[name]}")
        value = given.pop(name)
        if not fits(value, hints[name]):
            raise ConfigError(
                f"{place}: `{name}` should be {_in_words(hints[name])}. Found {value!r}."
            )
        taken[name] = value
    return taken


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand for a field of the type `hint`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if hint is Any:
        return True
    if hint is types.NoneType:
        return value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float)
    if hint in (int, str):
        return isinstance(value, hint)
    if origin in (list, tuple):
        # TRL's command line takes one text where a list of texts is meant; so do recipes.
        if isinstance(value, str):
            return str in inner
        return isinstance(value, list) and all(fits(v, inner[0]) for v in value)
    if hint is dict or origin in (dict, Mapping):
        return isinstance(value, dict)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [option.value for option in hint]
    return False


def _in_words(hint: Any) -> str:
    plain = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        dict: "a mapping",
        types.NoneType: "null",
    }
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(option) for option in inner))
    if origin is Literal:
        return " or ".join(f"`{option}`" for option in inner)
    if origin in (list, tuple):
        return "a list"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(f"`{option.value}`" for option in hint)
    return plain.get(origin or hint, str(hint))
