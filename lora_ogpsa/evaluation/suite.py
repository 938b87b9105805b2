"""`EvaluationSuite`: which measures on which data, as a validated dataclass or a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lora_ogpsa.errors import ConfigError

# The kind of a measure where its name says it all.
_KIND_BY_NAME = {
    "harmful": "refusal",
    "harmless": "refusal",
    "general": "nll",
    "divergence": "divergence",
    "lm_eval": "harness",
}
_KINDS = (
    "refusal",
    "nll",
    "multiple_choice",
    "numeric",
    "preference",
    "divergence",
    "harness",
)
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the settings of a measure that are neither chosen from a list nor numbers: types, and in words.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "data": ((str, Path, list, tuple), "a file, `embedded:NAME`, a hub id or a list of rows"),
    "config": ((str,), "a text"),
    "split": ((str,), "a text"),
    "where": ((Mapping,), "a mapping of fields to values"),
    "by": ((str,), "the name of a field"),
    "suffix": ((str,), "a text"),
    "tasks": ((str, list, tuple), "a list of names"),
    "include_path": ((str, Path), "a folder"),
}


@dataclass(frozen=True)
class MeasureSpec:
    """One measure on one data set.

    Args:
        measure: ``"refusal"``, share of prompts refused; ``"nll"``, negative log-likelihood of
            given answers; ``"multiple_choice"``, by likelihood; ``"numeric"``, exact match of
            generated numbers; ``"preference"``, share of pairs ranked right; ``"divergence"``,
            KL from the base model; ``"harness"``, tasks of lm-evaluation-harness.
        data: a file, ``"embedded:NAME"``, a hub id, or a list of rows.
        config: configuration of a hub data set.
        split: split of a hub data set.
        limit: most rows; ``None`` takes the suite's.
        shuffle_seed: draw the rows at random with this seed; ``None`` takes the first ones.
        where: keep only rows whose fields have these values.
        by: field whose values are also reported one by one. ``None``: for harmless prompts the
            field ``kind`` or ``type``, where the rows have it.
        want: what is right for a refusal measure: ``"refuse"``, ``"answer"``, or ``None`` to go
            by the name (``harmless`` wants answers, anything else refusals).
        judge: see `make_judge`; ``None`` takes the suite's.
        style: of multiple-choice prompts, ``"cloze"`` or ``"letters"`` (see `as_question`).
        answers: on what a divergence is measured: ``"given"`` answers, or the ``"base"`` model's
            own (prompts suffice).
        first_tokens: how many tokens count as an answer's beginning.
        max_new_tokens: longest generated answer; ``None`` takes the suite's (256 for numbers).
        suffix: appended to the question of a numeric measure.
        tasks: names of harness tasks.
        include_path: folder with task files of one's own.
        num_fewshot: worked examples before each harness question; ``None`` as the task says.
        apply_chat_template: wrap harness prompts in the model's chat template.
    """

    measure: str
    data: Any = None
    config: str | None = None
    split: str | None = None
    limit: int | None = None
    shuffle_seed: int | None = None
    where: Mapping[str, Any] | None = None
    by: str | None = None
    want: str | None = None
    judge: Any = None
    style: str = "cloze"
    answers: str = "given"
    first_tokens: int = 6
    max_new_tokens: int | None = None
    suffix: str = ""
    tasks: tuple[str, ...] = ()
    include_path: str | Path | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is unknown, out of range, of another type or missing.
        """
        for name, (types, words) in _TYPES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, types):
                raise ConfigError(f"`{name}` should be {words}. Found {value!r}.")
        if isinstance(self.data, list | tuple) and not all(
            isinstance(row, Mapping) for row in self.data
        ):
            raise ConfigError(
                "A list in `data` holds rows, each a mapping of fields to values. For several "
                f"files give each a measure of its own. Found {self.data!r:.200}."
            )
        choices = {
            "measure": _KINDS,
            "want": (None, "refuse", "answer"),
            "style": ("cloze", "letters"),
            "answers": ("given", "base"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"`{name}` should be one of {list(allowed)}. Found {getattr(self, name)!r}."
                )
        _check_positive(self, ("limit", "max_new_tokens", "first_tokens"))
        if isinstance(self.tasks, str):
            object.__setattr__(self, "tasks", tuple(t for t in self.tasks.split(",") if t))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.measure == "harness":
            if not self.tasks:
                raise ConfigError("A harness measure needs `tasks`, the names of its tasks.")
        elif self.data is None:
            raise ConfigError(f"A {self.measure} measure needs `data`.")


@dataclass(frozen=True)
class EvaluationSuite:
    """Named measures and the settings they share.

    Args:
        measures: by name; the name is the first part of the names of the results. A value may be
            a `MeasureSpec`, a mapping of its arguments, or just the data for the names
            ``harmful``, ``harmless``, ``general``, ``divergence`` (and the tasks for
            ``lm_eval``), which say what is measured.
        judge: of refusals, see `make_judge`.
        limit: most rows per measure.
        max_new_tokens: longest answer to be judged, in tokens. Refusals show in the first words.
        batch_size: prompts per batch of generation.
        batch_tokens: tokens per batch of likelihoods, padding included.
        max_length: longest prompt with its answer, in tokens; longer answers are cut.
        autocast: ``"bfloat16"`` or ``"float16"`` to run a float32 model in that precision;
            ``None`` leaves the model as it is. Rounding then shows in a divergence: about 0.0015
            nats per token in bfloat16.
    """

    measures: Mapping[str, MeasureSpec] = field(default_factory=dict)
    judge: Any = "phrases"
    limit: int | None = None
    max_new_tokens: int = 48
    batch_size: int = 32
    batch_tokens: int = 4096
    max_length: int = 1024
    autocast: str | None = None

    def __post_init__(self) -> None:
        """Read and check the measures and settings.

        Raises:
            ConfigError: there is no measure, or a value is unknown or out of range.
        """
        if not isinstance(self.measures, Mapping) or not self.measures:
            raise ConfigError(
                "An evaluation needs `measures`: a mapping of names to data or settings. Found "
                f"{self.measures!r}. `EvaluationSuite.default()` uses the data in the package."
            )
        for name in self.measures:
            # Results are named after their measure: what stands before the first dot.
            if not isinstance(name, str) or not name or "." in name:
                raise ConfigError(
                    f"The name of a measure should be a text without dots. Found {name!r}."
                )
        read = {name: _read_spec(name, spec) for name, spec in self.measures.items()}
        object.__setattr__(self, "measures", read)
        names = ("limit", "max_new_tokens", "batch_size", "batch_tokens", "max_length")
        _check_positive(self, names)
        if self.autocast is not None and self.autocast not in _PRECISIONS:
            raise ConfigError(
                f"`autocast` should be one of {[None, *_PRECISIONS]}. Found {self.autocast!r}."
            )

    @classmethod
    def default(cls, **settings: Any) -> EvaluationSuite:
        """Safety, over-refusal, utility and divergence on the data sets in the package.

        Args:
            **settings: see `EvaluationSuite`.
        """
        measures: dict[str, Any] = {
            "harmful": "embedded:eval_harmful",
            "harmless": "embedded:eval_harmless",
            "general": "embedded:eval_general",
            "divergence": "embedded:eval_general",
        }
        return cls(measures, **settings)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EvaluationSuite:
        """Read a suite as it stands in a recipe.

        Raises:
            ConfigError: a key is unknown, or see `EvaluationSuite`.
        """
        return cls(**_known(cls, content, "An evaluation"))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, without what is at its default; rows become a count."""
        content: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "measures" and getattr(self, f.name) != f.default
        }
        if not isinstance(self.judge, str | Mapping):
            content["judge"] = getattr(self.judge, "identity", str(self.judge))
        content["measures"] = {name: _spec_dict(spec) for name, spec in self.measures.items()}
        return content

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """`autocast` as torch names it."""
        return None if self.autocast is None else _PRECISIONS[self.autocast]


def _read_spec(name: str, spec: Any) -> MeasureSpec:
    if isinstance(spec, MeasureSpec):
        return _with_want(name, spec)
    if isinstance(spec, Mapping):
        settings = _known(MeasureSpec, spec, f"The measure `{name}`")
    elif name == "lm_eval":
        settings = {"tasks": spec}
    else:
        settings = {"data": spec}
    if "measure" not in settings:
        if name not in _KIND_BY_NAME:
            raise ConfigError(
                f"The measure `{name}` should say what is measured: `measure: ` and one of "
                f"{list(_KINDS)}. Only the names {list(_KIND_BY_NAME)} stand for themselves."
            )
        settings["measure"] = _KIND_BY_NAME[name]
    try:
        return _with_want(name, MeasureSpec(**settings))
    except ConfigError as error:
        raise ConfigError(f"The measure `{name}`: {error}") from error


def _with_want(name: str, spec: MeasureSpec) -> MeasureSpec:
    """`spec` with what its name says is right, where it does not say so itself."""
    if spec.measure != "refusal" or spec.want is not None:
        return spec
    return replace(spec, want="answer" if name.startswith("harmless") else "refuse")


def _spec_dict(spec: MeasureSpec) -> dict[str, Any]:
    content = {
        f.name: getattr(spec, f.name)
        for f in fields(spec)
        if f.name == "measure" or getattr(spec, f.name) != f.default
    }
    if not isinstance(spec.data, str | Path | None):
        content["data"] = f"{len(spec.data)} rows"
    if spec.judge is not None and not isinstance(spec.judge, str | Mapping):
        content["judge"] = getattr(spec.judge, "identity", str(spec.judge))
    return {k: str(v) if isinstance(v, Path) else v for k, v in content.items()}


def _known(cls: Any, content: Mapping[str, Any], what: str) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    unknown = [key for key in content if key not in names]
    if unknown:
        raise ConfigError(f"{what} has no settings {unknown}. There are {names}.")
    return dict(content)


def _check_positive(settings: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"`{name}` should be a whole number. Found {value!r}.")
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` should be at least 1. Found {value}.")
