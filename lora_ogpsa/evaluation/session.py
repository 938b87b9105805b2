"""`Run`: the model, data, settings and finished results that all measures of a suite share."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_ogpsa import chat, data
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation.generate import Answer, generate
from lora_ogpsa.evaluation.likelihood import Score, Tokens, score
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.result import EvaluationResult
from lora_ogpsa.evaluation.store import Store, content_key
from lora_ogpsa.evaluation.suite import EvaluationSuite, MeasureSpec
from lora_ogpsa.fingerprints import fingerprint

Row = Mapping[str, Any]
_NUMERIC_TOKENS = 256


@dataclass
class Run:
    """What all measures of one evaluation share.

    Args:
        model: the model, already switched to its base where that is evaluated.
        tokenizer: its tokenizer.
        suite: the settings.
        store: finished results.
        progress: where progress is shown.
        result: where measures are recorded.
        adapter: whether an adapter is switched on, so that there is a base to compare with.
    """

    model: Any
    tokenizer: Any
    suite: EvaluationSuite
    store: Store
    progress: Progress
    result: EvaluationResult
    adapter: bool

    def rows(self, name: str, spec: MeasureSpec) -> list[Row]:
        """The rows of a measure, filtered and limited.

        Raises:
            DataError: none are left, or the source cannot be read.
        """
        return measured_rows(name, spec, spec.limit or self.suite.limit)

    def answers(self, name: str, spec: MeasureSpec, prompts: list[list[int]]) -> list[Answer]:
        """The evaluated model's answers."""
        numeric = _NUMERIC_TOKENS if spec.measure == "numeric" else self.suite.max_new_tokens
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=spec.max_new_tokens or numeric,
            batch_size=self.suite.batch_size,
            autocast=self.suite.autocast_dtype,
            cache=self.store.section("answers", self.result.model),
            progress=self.progress,
            label=f"{name}: answers",
        )

    def scores(self, name: str, requests: list[Tokens]) -> list[Score]:
        """Log-likelihoods under the evaluated model."""
        return score(
            self.model,
            self.tokenizer,
            requests,
            batch_tokens=self.suite.batch_tokens,
            autocast=self.suite.autocast_dtype,
            cache=self.store.section("scores", self.result.model),
            progress=self.progress,
            label=f"{name}: likelihoods",
        )

    def base(self) -> Run:
        """The same run on the base model; to be used within `base_mode`."""
        identity = fingerprint(self.model, base=True)
        result = EvaluationResult(identity, base=True)
        return Run(self.model, self.tokenizer, self.suite, self.store, self.progress, result, False)

    def encode(self, name: str, number: int, messages: list[dict], answer: str | None) -> Tokens:
        """Tokens of a prompt and its answer, under the suite's limit on length."""
        return chat.encode(
            self.tokenizer,
            messages,
            answer,
            max_length=self.suite.max_length,
            name=place(name, number),
        )


def place(name: str, number: int) -> str:
    """How error messages call a row of a measure."""
    return f"measure `{name}`, row {number}"


def measured_rows(name: str, spec: MeasureSpec, limit: int | None) -> list[Row]:
    """The rows of a measure, filtered, and the first `limit` of them.

    Raises:
        DataError: none are left, or the source cannot be read.
    """
    if isinstance(spec.data, list | tuple):
        rows: list[Row] = list(spec.data)
        if spec.shuffle_seed is not None:
            random.Random(spec.shuffle_seed).shuffle(rows)
    else:
        try:
            rows = list(
                data.load_rows(
                    spec.data,
                    config=spec.config,
                    split=spec.split,
                    limit=None if spec.where else limit,
                    shuffle_seed=spec.shuffle_seed,
                )
            )
        except DataError as error:
            raise DataError(f"measure `{name}`: {error}") from error
    if spec.where:
        wanted = spec.where.items()
        rows = [row for row in rows if all(row.get(key) == value for key, value in wanted)]
    if not rows:
        condition = f" with {dict(spec.where)}" if spec.where else ""
        source = "its list" if isinstance(spec.data, list | tuple) else repr(spec.data)
        raise DataError(f"The measure `{name}` has no rows{condition} in {source}.")
    if spec.by is not None and all(row.get(spec.by) is None for row in rows):
        raise DataError(
            f"The measure `{name}` is to be reported `by: {spec.by}`, and no row has that field. "
            f"The fields of the first are {sorted(rows[0])}."
        )
    return rows[:limit]


def item_keys(rows: list[Any]) -> list[str]:
    """A key per row by content; a repeated row gets a key of its own."""
    seen: dict[str, int] = {}
    keys = []
    for row in rows:
        content = dict(row) if isinstance(row, Mapping) else row
        key = content_key(content)[:16]
        seen[key] = seen.get(key, 0) + 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys
