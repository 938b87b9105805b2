"""The sections of a recipe that this library defines: `ogpsa`, `contrast`, `references`..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.contrast_config import ContrastConfig
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.recipe_file import as_mapping
from lora_ogpsa.recipe_keys import check_known, names, take

if TYPE_CHECKING:
    from lora_ogpsa.evaluation import EvaluationSuite
    from lora_ogpsa.reference import Reference


def parse_ogpsa(given: Any, place: str) -> OGPSAConfig | None:
    """The `ogpsa:` section; ``None`` where it is ``false``, which trains plainly.

    Raises:
        ConfigError: a key is unknown or a value is wrong.
    """
    if given is False:
        return None
    given = {} if given in (None, True) else as_mapping(given, place)
    check_known(given, names(OGPSAConfig), place)
    try:
        return OGPSAConfig.from_dict(given)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def parse_contrast(given: Any, place: str) -> ContrastConfig | None:
    """The `contrast:` section; ``None`` where it is ``false``: a usual adapter.

    Raises:
        ConfigError: a key is unknown or a value is wrong.
    """
    if given is False:
        return None
    section = {} if given is True else as_mapping(given, place)
    check_known(section, names(ContrastConfig), place)
    try:
        return ContrastConfig(**take(section, ContrastConfig, place))
    except ConfigError as error:
        raise ConfigError(error.args[0] if place in str(error) else f"{place}: {error}") from error


def parse_references(given: Any, place: str) -> tuple[Reference, ...]:
    """The `references:` section; our own references where there is none.

    Raises:
        ConfigError: a key is unknown or a value is wrong.
    """
    from lora_ogpsa.reference import Reference, default_references

    if given is None:
        return tuple(default_references())
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f"{place}: should be a list of at least one mapping, such as {{name: general, data: "
            f"embedded:harmless}}. Found {given!r}."
        )
    made = []
    for index, item in enumerate(given):
        where = f"{place}[{index}]"
        item = as_mapping(item, where)
        check_known(item, names(Reference), where)
        if not isinstance(item.get("data", ""), str) or not isinstance(item.get("name"), str):
            raise ConfigError(
                f"{where}: a reference needs a `name` and, in `data`, the name of a file or data "
                f"set. Found name={item.get('name')!r}, data={item.get('data')!r}."
            )
        try:
            made.append(Reference(**take(item, Reference, where)))
        except ConfigError as error:
            raise ConfigError(
                error.args[0] if where in str(error) else f"{where}: {error}"
            ) from error
    check_unique([reference.name for reference in made], place)
    return tuple(made)


def parse_evaluation(given: Any, place: str) -> EvaluationSuite | None:
    """The `evaluation:` section; ``None`` where it is ``false``, which measures nothing.

    Raises:
        ConfigError: a key is unknown or a value is wrong.
    """
    from lora_ogpsa.evaluation import EvaluationSuite, MeasureSpec

    if given is False:
        return None
    section = {} if given in (None, True) else as_mapping(given, place)
    check_known(section, names(EvaluationSuite), place)
    section.setdefault("measures", EvaluationSuite.default().measures)
    for name, spec in as_mapping(section["measures"], f"{place}, measures").items():
        if isinstance(spec, Mapping):
            check_known(spec, names(MeasureSpec), f"{place}, measures.{name}")
    try:
        return EvaluationSuite.from_dict(section)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def check_unique(found: list[str], place: str) -> None:
    """Refuse a name that is given twice.

    Raises:
        ConfigError: one is.
    """
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{place}: the name {twice!r} is given twice.")
