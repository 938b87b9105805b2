"""The YAML file of a recipe: reading it, changing single keys, shrinking it to smoke size."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_ogpsa.errors import ConfigError, one_line

# Sizes of a smoke run: every part of the pipeline runs, on a handful of examples.
_SMOKE_TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "dataset_limit": 8,
    "rejected_max_new_tokens": 8,
}
_SMOKE_REFERENCE = {"limit": 4, "max_new_tokens": 8}
_SMOKE_EVALUATION = {"limit": 4, "max_new_tokens": 16}


def read_recipe_file(
    path: str | Path,
    *,
    overrides: Iterable[str] = (),
    smoke: bool = False,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Read a recipe's mapping; nothing in it is checked yet.

    Args:
        path: a YAML file.
        overrides: ``key=value`` pairs; dots reach into sections and lists, as in
            ``ogpsa.budget=0.05`` or ``stages.1.max_steps=20``. They win over `smoke`.
        smoke: shrink everything to a size that tries the pipeline and nothing else.
        output_dir: replaces the recipe's.

    Raises:
        ConfigError: the file is missing or not YAML, or an override reaches into nothing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"recipe not found: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a recipe: {error}") from error
    raw = as_mapping(_parse(text, str(path)), str(path))
    if smoke:
        raw = shrunk(raw)
    for override in overrides:
        _override(raw, override)
    if output_dir is not None:
        raw["output_dir"] = str(output_dir)
    return raw


def as_mapping(value: Any, place: str) -> dict[str, Any]:
    """`value`, if it is a mapping.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else repr(value)
        raise ConfigError(f"{place}: expected a mapping of keys to values. Found {found}.")
    return dict(value)


def shrunk(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe at smoke size, in a folder of its own."""
    small = copy.deepcopy(dict(raw))
    sections = [small, *(s for s in small.get("stages") or () if isinstance(s, dict))]
    for section in sections:
        # A stage's own sizes would win over those at the top level.
        for key, size in _SMOKE_TRAINING.items():
            if section is small or key in section:
                section[key] = size
        section.pop("save_steps", None)
        if isinstance(section.get("references"), list):
            section["references"] = [
                {**r, **_SMOKE_REFERENCE} if isinstance(r, dict) else r
                for r in section["references"]
            ]
    if small.get("references") is None:
        from lora_ogpsa.reference import default_references

        small["references"] = [
            {"name": r.name, "data": r.data, "kind": r.kind, **_SMOKE_REFERENCE}
            for r in default_references()
        ]
    small["evaluation"] = _shrunk_evaluation(small.get("evaluation"))
    if isinstance(small.get("output_dir"), str):
        small["output_dir"] = small["output_dir"].rstrip("/") + "-smoke"
    return small


def _shrunk_evaluation(given: Any) -> Any:
    if given is False:
        return False
    section = dict(given) if isinstance(given, Mapping) else {}
    measures = section.get("measures")
    if isinstance(measures, Mapping):
        section["measures"] = {
            name: {k: v for k, v in spec.items() if k not in _SMOKE_EVALUATION}
            if isinstance(spec, Mapping)
            else spec
            for name, spec in measures.items()
        }
    return {**section, **_SMOKE_EVALUATION}


# ---------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written ``5e-4``."""


_Loader.add_implicit_resolver(  # YAML 1.1, which PyYAML speaks, takes 5e-4 for a text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, place: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Beforehand, because PyYAML writes what a merge key brings into the mapping as if given.
        _require_single_keys(node, set())
        return _own_copies(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{place}{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # dates such as 2024-13-01 are a ValueError
        raise ConfigError(f"{place}: not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{place}: nested too deeply, or an alias stands inside of what it names"
        ) from error


def _require_single_keys(node: Any, seen: set[int]) -> None:
    """Refuse mappings that give a key twice, of which PyYAML takes the last without a word."""
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _require_single_keys(item, seen)
        return
    given = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in given:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key.value}` is given twice", key.start_mark
                )
            given.add((key.tag, key.value))
        _require_single_keys(value, seen)


def _own_copies(value: Any) -> Any:
    """`value` with a copy for every alias, which is the very object of its anchor.

    A key that is changed in one of two stages would change in the other too.
    """
    if isinstance(value, dict):
        return {key: _own_copies(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_own_copies(item) for item in value]
    return value


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in place."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, as in max_steps=20. Found {override!r}.")
    *path, last = key.strip().split(".")
    target: Any = raw
    for depth, part in enumerate(path):
        if isinstance(target, list):
            target = target[_index(target, part, override)]
        else:
            if target.get(part) is None or target[part] is True:
                target[part] = {}  # `true` switches a section on with its defaults
            target = target[part]
        if not isinstance(target, dict | list):
            here = ".".join(path[: depth + 1])
            raise ConfigError(f"--set {override}: `{here}` is {target!r}, with nothing inside.")
    parsed = _parse(value, f"--set {override}")
    if isinstance(target, list):
        target[_index(target, last, override)] = parsed
    else:
        target[last] = parsed


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(
            f"--set {override}: `{part}` should be the number of one of {len(target)} items, "
            "counted from 0."
        )
    return int(part)
