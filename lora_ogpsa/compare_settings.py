"""The `compare:` section of a recipe: which update rules are trained with which seeds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ConfigError
from lora_ogpsa.recipe_file import as_mapping
from lora_ogpsa.recipe_keys import check_known, names, take
from lora_ogpsa.recipe_sections import parse_ogpsa

if TYPE_CHECKING:
    from lora_ogpsa.evaluation import EvaluationSuite

PLAIN = "plain"
# `False` trains plainly, an empty mapping keeps the recipe's own settings, any other replaces them.
BUILT_IN_RULES: dict[str, Any] = {PLAIN: False, "default": {}, "paper": {"preset": "paper"}}
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Rules = Mapping[str, Any]


@dataclass(frozen=True)
class CompareSettings:
    """What ``lora-ogpsa compare`` trains and how it matches the runs.

    Args:
        seeds: each rule is trained with each of them.
        rules: by name: ``False`` for plain training, an empty mapping for the recipe's own
            ``ogpsa:`` settings, or settings that replace these.
        checkpoints: at how many evenly spaced steps of a stage the model is evaluated, the last
            one included.
        safety: the measure at which runs are matched; ``None`` takes the first refusal measure on
            harmful prompts.
        safety_margin: runs are compared where they first are as safe as plain training at its
            end, less this much.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    rules: Rules = field(default_factory=lambda: dict(BUILT_IN_RULES))
    checkpoints: int = 4
    safety: str | None = None
    safety_margin: float = 0.02


@dataclass(frozen=True)
class _CompareKeys:
    """Types of the section's keys, as YAML has them."""

    seeds: list[int] = field(default_factory=list)
    rules: dict = field(default_factory=dict)
    checkpoints: int = 4
    safety: str = ""
    safety_margin: float = 0.02


def parse_compare(given: Any, place: str, evaluation: EvaluationSuite | None) -> CompareSettings:
    """Check the `compare:` section, a mapping or a truth value.

    Args:
        given: what stands in the recipe.
        place: where, for messages.
        evaluation: what the recipe measures.

    Raises:
        ConfigError: a key is unknown (the nearest one is suggested), or a value is wrong.
    """
    if isinstance(given, bool):
        return CompareSettings()
    section = as_mapping(given, place)
    check_known(section, names(CompareSettings), place)
    values = take(section, _CompareKeys, place)
    if "seeds" in values:
        values["seeds"] = _seeds(values["seeds"], f"{place}: `seeds`")
    if "rules" in values:
        _check_rules(values["rules"], f"{place}, rules")
    settings = CompareSettings(**values)
    if settings.checkpoints < 1:
        raise ConfigError(
            f"{place}: `checkpoints` should be at least 1. Found {settings.checkpoints}."
        )
    if not 0 <= settings.safety_margin < 1:
        raise ConfigError(
            f"{place}: `safety_margin` should be a share such as 0.02. "
            f"Found {settings.safety_margin}."
        )
    if settings.safety is not None and evaluation is not None:
        measure = settings.safety.partition(".")[0]
        if measure not in evaluation.measures:
            hint = nearest(measure, evaluation.measures)
            raise ConfigError(
                f"{place}: `safety` should begin with the name of a measure, such as "
                f"`harmful.refused`. Found {settings.safety!r}. {hint}"
            )
    return settings


def check_safety(settings: CompareSettings, measured: Mapping[str, Sequence[str] | None]) -> None:
    """Check that what runs are matched by will be measured.

    Args:
        settings: the comparison's.
        measured: names of the results by measure; ``None`` where they are not known yet.

    Raises:
        ConfigError: it will not.
    """
    wanted = settings.safety
    if wanted is None:
        return
    measure = wanted.partition(".")[0]
    names = measured.get(measure)
    if names is not None and wanted not in (measure, *names):
        raise ConfigError(f"`compare: safety: {wanted}` is not measured. {nearest(wanted, names)}")


def _seeds(found: Any, what: str) -> tuple[int, ...]:
    bad = not isinstance(found, list) or not found or any(seed < 0 for seed in found)
    if bad or len(set(found)) < len(found):
        raise ConfigError(
            f"{what} should be a list of different whole numbers such as [0, 1, 2]. "
            f"Found {found!r}."
        )
    return tuple(found)


def _check_rules(rules: Mapping[Any, Any], place: str) -> None:
    for name, rule in rules.items():
        if not isinstance(name, str) or _FOLDER_NAME.fullmatch(name) is None:
            raise ConfigError(f"{place}: a rule's name becomes a folder's name. Found {name!r}.")
        if (name == PLAIN) != (rule is False):
            raise ConfigError(
                f"{place}: plain training is the rule `plain: false`, and the only one that is "
                f"`false`. Found `{name}: {str(rule).lower() if rule is False else rule}`."
            )
        if rule is None or rule is True:
            raise ConfigError(
                f"{place}: `{name}` should be `{{}}` for the recipe's own settings, or a mapping "
                "of `ogpsa` settings that replaces them."
            )
        parse_ogpsa(rule, f"{place}.{name}")
    if PLAIN not in rules or len(rules) < 2:
        raise ConfigError(
            f"{place}: what OGPSA removes is counted in what plain training loses, so a comparison "
            f"needs `plain: false` and at least one rule more. Found {list(rules)}."
        )


def chosen_rules(settings: CompareSettings, wanted: Iterable[str] | None) -> dict[str, Any]:
    """The rules to be trained, plain training first.

    Args:
        settings: the recipe's.
        wanted: names from the command line; ``None`` takes the recipe's rules.

    Raises:
        ConfigError: a name is unknown, given twice, or `plain` is not among them.
    """
    known = {**BUILT_IN_RULES, **settings.rules}
    chosen = list(settings.rules) if wanted is None else list(wanted)
    for name in chosen:
        if name not in known:
            raise ConfigError(
                f"--rules: there is no rule `{name}`. {nearest(name, known)} Name more of them "
                "in the recipe, under `compare: rules:`."
            )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--rules: a rule is given twice. Found {', '.join(chosen)}.")
    if PLAIN not in chosen or len(chosen) < 2:
        raise ConfigError(
            "--rules: what OGPSA removes is counted in what plain training loses. Name `plain` and "
            f"at least one rule more. Found {', '.join(chosen) or 'none'}. Finished parts of an "
            "earlier comparison are not trained again with --resume."
        )
    return {name: known[name] for name in sorted(chosen, key=lambda n: n != PLAIN)}


def parse_names(text: str) -> list[str]:
    """The names in a list such as ``plain,default``."""
    return [name for name in re.split(r"[\s,]+", text) if name]


def parse_seeds(text: str) -> list[int]:
    """The seeds in a list such as ``0,1,2``.

    Raises:
        ConfigError: they are not different whole numbers.
    """
    parts = parse_names(text)
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds takes whole numbers such as 0,1,2. Found {text!r}.")
    return list(_seeds([int(part) for part in parts], "--seeds"))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what was meant by `name`."""
    options = list(known)
    close = difflib.get_close_matches(name, options, n=1)
    return f"Did you mean `{close[0]}`?" if close else f"There are {', '.join(options)}."


def cell_mapping(raw: Mapping[str, Any], rule: Any, seed: int, output_dir: str) -> dict[str, Any]:
    """The recipe of one training run of a comparison: one rule, one seed, no comparison of its own.

    The seed decides the adapter's initial values, the order of the rows, which rows a
    ``dataset_limit`` draws, and the order of the reference examples.

    Args:
        raw: the recipe's mapping.
        rule: see `CompareSettings`; a stage with ``ogpsa: false`` stays plain under every rule.
        seed: replaces every `seed` in the recipe.
        output_dir: of the cell.
    """
    cell = {k: v for k, v in raw.items() if k not in ("compare", "merge", "stages")}
    cell["output_dir"] = output_dir
    stages = raw.get("stages")
    if isinstance(stages, list):
        cell["stages"] = [dict(stage) for stage in stages]
    cell.pop("ogpsa", None)
    for section in cell.get("stages", [cell]):
        own = section.get("ogpsa", raw.get("ogpsa"))
        if rule is False or own is False:
            section["ogpsa"] = False
        else:
            settings = rule or (own if isinstance(own, Mapping) else {})
            section["ogpsa"] = {**settings, "seed": seed}
        section.pop("seed", None)
    cell["seed"] = seed
    return cell
