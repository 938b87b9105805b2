"""`Summary`: the rules of a comparison at the end of training and at matched safety."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_ogpsa.compare_settings import PLAIN, nearest
from lora_ogpsa.compare_statistics import over_seeds, resampled_values
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.evaluation import EvaluationResult, EvaluationSuite, Measure
from lora_ogpsa.evaluation.tax import Point, matched_point, mean_of_known, taxes_removed

_Key = tuple[str, int]  # rule and seed
# What a measure of each unit lies between.
_BOUNDS = {"share": (0.0, 1.0), "nats": (0.0, math.inf), "score": (-math.inf, math.inf)}
# By rule and seed, a point on all prompts and then on each resample of them.
_Points = Mapping[_Key, Sequence[Point | None]]


def safety_measure(suite: EvaluationSuite, wanted: str | None) -> str:
    """The measure at which runs are matched, or the first part of its name.

    Raises:
        ConfigError: nothing that is measured can serve.
    """
    if wanted is not None:
        return wanted
    for name, spec in suite.measures.items():
        if spec.measure == "refusal" and spec.want == "refuse":
            return name
    raise ConfigError(
        "a comparison matches runs at their safety, and nothing in `evaluation: measures:` says "
        "how many harmful prompts are refused. Add `harmful: embedded:eval_harmful`, or name "
        "another measure as `compare: safety:`."
    )


class Summary:
    """The rules of one comparison, over their seeds.

    The tax is counted in every measure but those of safety. All of it is computed on the prompts
    as they are and on resamples of them, the same for all models, which gives the intervals.

    Args:
        suite: what was measured.
        base: evaluation of the base model.
        paths: by rule and seed, (optimizer steps, evaluation) of every checkpoint.
        safety: the measure at which runs are matched; ``None`` takes the first on harmful prompts.
        margin: how much less safe than plain training at its end the target is.

    Raises:
        ConfigError: there is no such measure.
    """

    def __init__(
        self,
        suite: EvaluationSuite,
        base: EvaluationResult,
        paths: Mapping[_Key, Sequence[tuple[int, EvaluationResult]]],
        safety: str | None,
        margin: float,
    ) -> None:
        self._suite, self._base = suite, base
        self._steps = {key: [step for step, _ in path] for key, path in paths.items()}
        results = [base, *(result for path in paths.values() for _, result in path)]
        #: One measure of each name, for what does not depend on the model.
        self._examples: dict[str, Measure] = {}
        for result in reversed(results):
            self._examples.update(result.measures)
        everything = dict.fromkeys(name for result in results for name in result.measures)
        self._names = [n for n in everything if n in base.measures or self._is_divergence(n)]
        self.safety = self._find(safety_measure(suite, safety))
        self.taxes = [name for name in self._names if self._is_tax(name)]
        self._tables = {name: resampled_values(results, name) for name in self._names}
        self._columns: dict[_Key, range] = {}
        at = 1  # after the base
        for key, steps in self._steps.items():
            self._columns[key] = range(at, at + len(steps))
            at += len(steps)
        self._bases = self._points(0, 0)
        self._ends: dict[_Key, list[Point]] = {}
        self._matched: dict[_Key, list[Point | None]] = {}
        # Plain training first: its end sets the target of the others.
        for key in sorted(self._steps, key=lambda k: k[0] != PLAIN):
            self._match(key, margin)

    # ------------------------------------------------------------------ measures

    def _spec(self, name: str) -> Any:
        return self._suite.measures[name.partition(".")[0]]

    def _is_divergence(self, name: str) -> bool:
        """Whether the base lacks the measure because it is its distance from itself, 0."""
        return bool(self._spec(name).measure == "divergence")

    def _is_tax(self, name: str) -> bool:
        spec = self._spec(name)
        return name != self.safety and spec.measure != "preference" and spec.want != "refuse"

    def _find(self, wanted: str) -> str:
        for name in self._names:
            if wanted in (name, name.partition(".")[0]):
                return name
        raise ConfigError(
            f"`compare: safety: {wanted}` was not measured. {nearest(wanted, self._names)}"
        )

    def _sign(self, name: str) -> float:
        """What turns a measure into one of which less is better."""
        return 1.0 if self._examples[name].better == "lower" else -1.0

    def _prompts(self, name: str) -> int | None:
        example = self._examples[name]
        return example.n if example.unit == "share" else None

    def _bounds(self, name: str) -> tuple[float, float]:
        return _BOUNDS[self._examples[name].unit]

    # ------------------------------------------------------------------ points

    def _points(self, step: int, column: int) -> list[Point]:
        """A checkpoint, on all prompts and on each resample of them."""
        safety = self._tables[self.safety][:, column].tolist()
        losses = [(self._sign(n) * self._tables[n][:, column]).tolist() for n in self.taxes]
        return [
            Point(step, safe, dict(zip(self.taxes, metrics, strict=True)))
            for safe, *metrics in zip(safety, *losses, strict=True)
        ]

    def _match(self, key: _Key, margin: float) -> None:
        columns = zip(self._steps[key], self._columns[key], strict=True)
        path = [self._points(step, column) for step, column in columns]
        self._ends[key] = path[-1]
        plain = self._ends.get((PLAIN, key[1]))
        if plain is not None:
            # Where plain training ends no safer than it began, there is no safety to match.
            self._matched[key] = [
                matched_point([base, *run], target)
                if (target := end.safety - margin) > base.safety
                else None
                for end, base, *run in zip(plain, self._bases, *path, strict=True)
            ]

    # ------------------------------------------------------------------ results

    def to_json(self) -> dict[str, Any]:
        """Base, rules at the end and at matched safety, taxes removed."""
        plain = [points[0].safety for (rule, _), points in self._ends.items() if rule == PLAIN]
        return {
            "safety": self.safety,
            "plain_safety": mean_of_known(plain),
            "taxes": self.taxes,
            "measures": {
                name: {"unit": m.unit, "better": m.better, "n": m.n}
                for name in self._names
                for m in [self._examples[name]]
            },
            "base": {name: self._of_base(name) for name in self._names},
            "rules": {rule: self._rule(rule) for rule in dict.fromkeys(r for r, _ in self._steps)},
        }

    def _of_base(self, name: str) -> dict[str, float]:
        found = self._base.measures.get(name)
        if found is None:
            return {"value": 0.0, "low": 0.0, "high": 0.0}
        return {"value": found.value, "low": found.low, "high": found.high}

    def _rule(self, rule: str) -> dict[str, Any]:
        seeds = [seed for name, seed in self._steps if name == rule]
        path = [
            {"step": step, "measures": {n: self._measured(rule, seeds, i, n) for n in self._names}}
            for i, step in enumerate(self._steps[rule, seeds[0]])
        ]
        found: dict[str, Any] = {"path": path, "end": path[-1]["measures"]}
        pairs = [seed for seed in seeds if (PLAIN, seed) in self._steps]
        found["matched"] = {
            "reached": [seed for seed in pairs if self._matched[rule, seed][0] is not None],
            "step": self._over(rule, pairs, lambda point: point.step, (0.0, math.inf)),
            "measures": {
                name: self._over(rule, pairs, self._reader(name), self._bounds(name))
                for name in self.taxes
            },
        }
        if rule != PLAIN:
            found["tax_removed"] = {
                "matched": self._removed(rule, pairs, self._matched),
                "end": self._removed(rule, pairs, self._ends),
            }
        return found

    def _reader(self, name: str) -> Callable[[Point], float]:
        sign = self._sign(name)
        return lambda point: sign * point.metrics[name]

    def _measured(self, rule: str, seeds: Sequence[int], index: int, name: str) -> dict[str, Any]:
        """A measure at a checkpoint."""
        table = self._tables[name][:, [self._columns[rule, seed][index] for seed in seeds]]
        values = dict(zip(seeds, table[0].tolist(), strict=True))
        drawn = table[1:].mean(1).tolist()
        return over_seeds(values, drawn, prompts=self._prompts(name), bounds=self._bounds(name))

    def _over(
        self,
        rule: str,
        seeds: Sequence[int],
        read: Callable[[Point], float],
        bounds: tuple[float, float],
    ) -> dict[str, Any]:
        """What `read` finds at matched safety."""
        rows = [
            [None if point is None else read(point) for point in self._matched[rule, seed]]
            for seed in seeds
        ]
        return _summarised(seeds, rows, bounds)

    def _removed(self, rule: str, seeds: Sequence[int], points: _Points) -> dict[str, Any]:
        """The tax removed, by measure; `clear` tells whether plain training paid any at all."""
        found = {}
        shares = [
            [
                taxes_removed(base.metrics, plain.metrics, own.metrics) if plain and own else {}
                for base, plain, own in zip(
                    self._bases, points[PLAIN, seed], points[rule, seed], strict=True
                )
            ]
            for seed in seeds
        ]
        for name in self.taxes:
            rows = [[share.get(name) for share in row] for row in shares]
            paid = [
                mean_of_known(
                    point.metrics[name] - base.metrics[name] if point else None
                    for point in (points[PLAIN, seed][i] for seed in seeds)
                )
                for i, base in enumerate(self._bases)
            ]
            drawn = [tax for tax in paid[1:] if tax is not None]
            clear = bool(drawn) and float(np.percentile(drawn, 2.5)) > 0
            found[name] = {**_summarised(seeds, rows), "clear": clear}
        return found


def _summarised(
    seeds: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """Over seeds: per seed a row of values, on all prompts and then on resamples of them."""
    values = {seed: row[0] for seed, row in zip(seeds, rows, strict=True)}
    means = [mean_of_known(column) for column in zip(*rows, strict=True)]
    return over_seeds(values, means[1:], bounds=bounds)
